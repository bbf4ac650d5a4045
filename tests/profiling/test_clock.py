"""PhaseClock: laps add up, and CUDA events are not waited for unless asked."""

from __future__ import annotations

import pytest
import torch

from esm_efficient.profiling.clock import PhaseClock


class Event:
    """A CUDA event that is reached when the test sets it."""

    def __init__(self, moment):
        self.moment, self.reached = moment, False

    def query(self):
        return self.reached

    def synchronize(self):
        self.reached = True

    def elapsed_time(self, other):
        return 1000.0 * (other.moment - self.moment)


def test_laps_of_the_host_add_up(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 3.5])
    monkeypatch.setattr(PhaseClock, "_now", lambda _: next(moments))
    clock = PhaseClock(torch.device("cpu"))
    for phase in ("forward", "backward", "forward"):
        clock.lap(phase)
    assert clock.seconds() == {"forward": 1.5, "backward": 2.0}


def test_pending_events_are_waited_for_only_if_asked(monkeypatch):
    events = [Event(moment) for moment in (0, 2, 5)]
    left = iter(events)
    monkeypatch.setattr(PhaseClock, "_now", lambda _: next(left))
    clock = PhaseClock(torch.device("cpu"))
    clock.lap("forward")
    clock.lap("backward")
    assert clock.seconds(wait=False) == {}
    events[1].reached = True
    assert clock.seconds(wait=False) == {"forward": 2.0}
    assert clock.seconds() == {"forward": 2.0, "backward": 3.0}


def test_a_restart_forgets_all_phases(monkeypatch):
    moments = iter([0.0, 1.0, 7.0, 9.0])
    monkeypatch.setattr(PhaseClock, "_now", lambda _: next(moments))
    clock = PhaseClock(torch.device("cpu"))
    clock.lap("data")
    clock.restart()
    clock.lap("forward")
    assert clock.seconds() == pytest.approx({"forward": 2.0})
