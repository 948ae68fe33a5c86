"""The right word for each kind of curve."""

from __future__ import annotations

import math

import pytest

from pretrain.report.diagnose import first_step, last_word, reference_lines

RANDOM = {"uniform": math.log(10000), "unigram": math.log(10000), "bigram": math.log(10000), "floor": math.log(10000)}
TEXT = {"uniform": 8.3, "unigram": 6.5, "bigram": 4.2}


def test_the_first_loss_is_compared_with_ln_of_the_vocabulary():
    assert first_step(8.77, 6400).endswith("gives ln(6400) = 8.764: as it should be")
    assert "24.39 times that" in first_step(213.776, 6400)
    assert "0.95 times that" in first_step(8.31, 6400)


@pytest.mark.parametrize(
    ("loss", "val_loss", "lines", "word"),
    [
        (9.21, 9.22, RANDOM, "no token can be predicted"),
        (9.21, None, RANDOM, "no token can be predicted"),
        (8.2, 8.25, TEXT, "Nothing was learned"),
        (6.5, 6.45, TEXT, "Little more than token frequencies"),
        (2.0, 4.0, TEXT, "memorising"),
        (4.0, 4.3, TEXT, "far better than token frequencies"),
        (1.21, 1.22, {"uniform": 4.1, "unigram": 4.1, "bigram": 1.21, "floor": 1.21}, "has learned all there is"),
    ],
)
def test_the_verdict_names_what_happened(loss, val_loss, lines, word):
    assert word in last_word(loss, val_loss, lines)


def test_lines_that_say_the_same_are_shown_once():
    assert len(reference_lines(RANDOM)) == 2
    assert [line.split()[0] for line in reference_lines(TEXT)] == ["8.300", "6.500", "4.200"]
