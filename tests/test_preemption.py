"""Signals become flags, flags become an exit status."""

from __future__ import annotations

import os
import signal

import pytest

from pretrain.runtime.preemption import StopRequest, exit_status


@pytest.mark.parametrize(("number", "flags", "status"), [(signal.SIGTERM, [1, 0], 75), (signal.SIGINT, [0, 1], 130)])
def test_a_signal_becomes_a_flag_and_the_old_handler_comes_back(number, flags, status):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.flags == [0, 0] and exit_status(stop.flags) == 0
        os.kill(os.getpid(), number)
        assert stop.flags == flags and exit_status(stop.flags) == status
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_leaves_at_once_and_a_second_sigterm_does_not():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.flags == [0, 1]
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_on_any_of_many_ranks_wins_over_sigterm():
    assert exit_status([5000, 1]) == 130
