"""Near-duplicates are those that the exact Jaccard index finds, and nothing else is dropped."""

import random
import re
import subprocess
import sys
import tracemalloc

import datasketch
import pytest

from pretrain.data.corpus import Corpus
from pretrain.data.indexed import DataError
from pretrain.data.near_duplicates import NearDuplicates


def jaccard(a: str, b: str, words: int = 5) -> float:
    """Of the shingles of two texts of ASCII words."""
    sets = []
    for text in (a, b):
        found = re.findall(r"\w+", text.lower())
        sets.append({tuple(found[i : i + words]) for i in range(len(found) - words + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def changed(text: str, count: int, rng: random.Random) -> str:
    """The text with `count` of its words replaced."""
    words = text.split()
    for i in rng.sample(range(len(words)), count):
        words[i] = f"changed{rng.randrange(10**6)}"
    return " ".join(words)


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    """300 different paragraphs of real text, of 60 to 200 words."""
    found = {}
    for _, text in Corpus(["stdlib"]).documents():
        for paragraph in re.findall(r'"""(.*?)"""', text, re.DOTALL):
            words = paragraph.split()
            if 60 <= len(words) <= 200 and paragraph.isascii():
                found.setdefault(" ".join(words[:8]), paragraph)
    assert len(found) > 300
    return list(found.values())[:300]


def test_what_is_dropped_agrees_with_the_exact_jaccard_index(paragraphs):
    """On both sides of the threshold, with a margin of 3.5 standard errors of the estimate (0.5 / sqrt(1024))."""
    rng, wrong, near, far = random.Random(0), [], 0, 0
    duplicates = NearDuplicates(0.7, permutations=1024)
    for number, paragraph in enumerate(paragraphs):
        paragraph = re.sub(r"\b(?=\w)", f"p{number}", paragraph)  # so that it resembles no other paragraph
        other = changed(paragraph, rng.randrange(0, 12), rng)
        exact = jaccard(paragraph, other)
        assert duplicates.is_new(f"{number}", paragraph)
        new = duplicates.is_new(f"{number} changed", other)
        if abs(exact - 0.7) > 0.055:
            near, far = near + (exact > 0.7), far + (exact < 0.7)
            wrong += [exact] if new != (exact < 0.7) else []
    assert near > 50 and far > 50 and not wrong


def test_different_paragraphs_of_real_text_are_kept(paragraphs):
    duplicates = NearDuplicates()
    for number, paragraph in enumerate(paragraphs):
        if not duplicates.is_new(str(number), paragraph):
            assert any(jaccard(paragraph, other) > 0.65 for other in paragraphs[:number]), paragraph
    assert duplicates.num_dropped < 30
    for number, paragraph in enumerate(paragraphs):  # and none is new a second time
        assert not duplicates.is_new(f"again {number}", paragraph.upper().replace(",", " ;"))


def test_the_first_of_a_group_is_kept_and_no_chain_of_small_changes_removes_what_is_unlike_it():
    words = [f"word{i}" for i in range(300)]
    chain = [" ".join([*words[: 300 - 20 * i], *(f"new{j}" for j in range(20 * i))]) for i in range(8)]
    duplicates = NearDuplicates(0.8)
    assert [duplicates.is_new(str(i), text) for i, text in enumerate(chain)][:2] == [True, False]
    assert min(jaccard(chain[i], chain[i + 1]) for i in range(7)) > 0.83 and jaccard(chain[0], chain[7]) < 0.5
    assert duplicates.num_dropped < 6 and any(duplicates._kept[i][0] in ("2", "3", "4", "5") for i in range(1, 3))
    assert "the first, 1, is like 0" in duplicates.problems()[0]


def test_texts_without_words_short_texts_and_texts_without_spaces_are_compared():
    chinese = "公園里有一只小猫,它喜歡在陽光下睡覺,也喜歡追逐飛過的蝴蝶和落葉,每天傍晚都會回到同一棵樹下等待主人。"
    different = "昨天下午我們乘火車去了海邊,天氣很好,孩子們在沙灘上玩了很久,晚上大家一起吃了新鮮的魚。"
    texts = [
        ("!!!", True), ("???", True), ("!!!", False), (" !!!\n", False),
        ("one", True), ("two", True), ("One.", False),
        ("one two three", True), ("one two four", True), ("one, two three", False),
        (chinese, True), (different, True), (chinese.replace("小猫", "小狗"), False), (chinese.replace(",", "\n"), False),
    ]  # fmt: skip
    duplicates = NearDuplicates(0.5)
    for text, new in texts:
        assert duplicates.is_new(text, text) == new, text


def test_a_document_of_a_million_words_takes_little_memory():
    duplicates, text = NearDuplicates(), " ".join(map(str, range(100_000)))
    duplicates.is_new("a", "first")
    tracemalloc.start()
    assert duplicates.is_new("b", text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(text)  # a table of all its permutations would take 100,000 x 128 x 4 bytes more
    assert not duplicates.is_new("c", text + " end")


@pytest.mark.parametrize(
    "values", [(0.2,), (0.99,), (float("nan"),), (0.8, 0), (0.8, 5, 16), (0.8, 5, 10**5)], ids=lambda values: str(values)
)
def test_impossible_settings_are_refused(values):
    with pytest.raises(DataError, match=r"--duplicate-.*from .* to"):
        NearDuplicates(*values)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match="pip install datasketch"):
        NearDuplicates()


def test_the_corpus_counts_and_describes_what_it_leaves_out(tmp_path, paragraphs):
    rng = random.Random(1)
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(paragraphs[number])
        (tmp_path / f"{number:02}-again.txt").write_text(changed(paragraphs[number], 1, rng))
    plain = Corpus([str(tmp_path)])
    assert len(list(plain.documents())) == 40 and "near_duplicates" not in plain.description()
    corpus = Corpus([str(tmp_path)], near_duplicates=NearDuplicates(0.7))
    kept = [text for _, text in corpus.documents()]
    assert kept == [text for number in range(20) for text in [(tmp_path / f"{number:02}-again.txt").read_text()]]
    assert corpus.num_documents == 20 and corpus.utf8_bytes == sum(map(len, kept))
    description = corpus.description()["near_duplicates"]
    assert description == {
        "dropped": 20,
        "similarity": 0.7,
        "words": 5,
        "permutations": 128,
        "datasketch": datasketch.__version__,
    }
    assert corpus.problems() == [
        f"20 near-duplicates were left out; the first, {tmp_path}/00.txt, is like {tmp_path}/00-again.txt"
    ]


def test_the_result_does_not_depend_on_the_hash_seed_of_python(paragraphs, tmp_path):
    rng = random.Random(2)
    texts = [changed(paragraph, count, rng) for paragraph in paragraphs[:40] for count in (0, 2, 4, 6)]
    (tmp_path / "a.txt").write_text("\0".join(texts))
    code = (
        "import sys\nfrom pretrain.data.near_duplicates import NearDuplicates\nduplicates = NearDuplicates(0.7)\n"
        "for i, text in enumerate(open(sys.argv[1]).read().split('\\0')):\n"
        "    if duplicates.is_new(str(i), text): print(i, *duplicates._kept[-1][1])\n"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a.txt")], env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True, check=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(results) == 1 and 40 <= len(results.pop().splitlines()) < 160
