"""Signals that ask a run to stop: noticed on any rank, agreed on by all ranks inside the step's own collective.

SIGTERM means "save, and start me again" (a spot notice, a scheduler); SIGINT "save, and stop". A second SIGINT leaves at once.
"""

from __future__ import annotations

import signal
from types import FrameType

EXIT_STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}
SIGNALS = tuple(EXIT_STATUS)


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into a flag."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    @property
    def flags(self) -> list[int]:
        """1 for the signal that this rank received, 0 for the others, in the order of SIGNALS."""
        return [int(self.received == number) for number in SIGNALS]


def exit_status(flags: list[int]) -> int:
    """Exit status for the flags of all ranks, summed; 0: nobody asks to stop. A person's Ctrl-C wins over a SIGTERM."""
    asked = [EXIT_STATUS[number] for number, count in zip(SIGNALS, flags, strict=True) if count]
    return max(asked, default=0)
