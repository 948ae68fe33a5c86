"""Positions that a run leaves out: forwards and backwards they are the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pretrain.data import skips


@given(st.sets(st.integers(1, 60)), st.integers(1, 7))
def test_steps_forwards_backwards_and_by_number_agree(left_out, size):
    """`left_out`: numbers of whole global batches."""
    ranges: skips.Ranges = []
    for number in left_out:
        ranges = skips.with_range(ranges, number * size, (number + 1) * size)
    begins, position = [], 0
    for _ in range(40):
        begin = skips.next_position(position, ranges)
        begins.append(begin)
        position = begin + size
    assert begins == [number * size for number in range(200) if number not in left_out][:40]
    for step, begin in enumerate(begins, start=1):
        assert skips.position_of_step(step, size, ranges) == begin
        assert skips.step_of_position(begin + size - 1, size, ranges) == step
    assert all(skips.step_of_position(number * size, size, ranges) is None for number in left_out)
    for steps in range(1, 41):
        assert skips.begin_of_last(position, steps, size, ranges) == begins[-steps]


def test_ranges_that_touch_or_overlap_become_one():
    assert skips.with_range([[8, 16], [32, 40]], 16, 24) == [[8, 24], [32, 40]]
    assert skips.with_range([[8, 16], [32, 40]], 0, 40) == [[0, 40]]
    assert skips.with_range([], 8, 16) == [[8, 16]]
