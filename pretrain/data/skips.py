"""Positions that a run leaves out: the samples of steps from which it was rolled back. Integers only.

Ranges are [first, end) pairs in rising order, none touching another. They only lie ahead of the run or behind it: a step never
straddles one, because its samples begin where the last step's ended, or at the end of a range.
"""

from __future__ import annotations

Ranges = list[list[int]]


def next_position(position: int, skipped: Ranges) -> int:
    """Where the next step begins, given where the last one ended."""
    return next((end for first, end in skipped if first <= position < end), position)


def begin_of_last(position: int, steps: int, global_batch_size: int, skipped: Ranges) -> int:
    """Where the last `steps` steps before `position` began."""
    for _ in range(steps):
        position = next((first for first, end in skipped if end == position), position) - global_batch_size
    return position


def with_range(skipped: Ranges, first: int, end: int) -> Ranges:
    """`skipped` and [first, end), as one list; ranges that touch become one."""
    apart = [each for each in skipped if each[1] < first or each[0] > end]
    joined = [each for each in skipped if each not in apart] + [[first, end]]
    return sorted([*apart, [min(each[0] for each in joined), max(each[1] for each in joined)]])


def position_of_step(step: int, global_batch_size: int, skipped: Ranges) -> int:
    """Where `step`, counted from 1, begins in a run whose global batch never changed."""
    position = (step - 1) * global_batch_size
    for first, end in skipped:
        if position >= first:
            position += end - first
    return position


def step_of_position(position: int, global_batch_size: int, skipped: Ranges) -> int | None:
    """The step, counted from 1, that takes the sample at `position`; None: no step does."""
    if any(first <= position < end for first, end in skipped):
        return None
    return (position - sum(end - first for first, end in skipped if end <= position)) // global_batch_size + 1
