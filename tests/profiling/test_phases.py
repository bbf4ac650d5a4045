"""Phases: which stage counts as which phase, and which phase an error is reported for."""

from __future__ import annotations

from esm_efficient.profiling.phases import PhaseTracker


def phases_of(*stages):
    tracker = PhaseTracker()
    return [tracker.switch(stage) for stage in stages]


def test_clipping_counts_as_optimizer_time_and_waiting_as_data_time():
    assert phases_of("forward", "backward", "between", "optimizer", "between", "forward") == [
        *("data", "forward", "backward", "optimizer", "optimizer", "data")
    ]


def test_the_time_before_and_between_evaluations_counts_as_evaluation():
    assert phases_of("evaluation", "evaluation", "forward") == ["evaluation"] * 3


def test_an_error_between_backward_pass_and_step_is_reported_for_the_optimizer():
    tracker = PhaseTracker()
    failed = [tracker.failed_phase]
    for stage in ("forward", "backward", "between", "optimizer", "between"):
        tracker.switch(stage)
        failed.append(tracker.failed_phase)
    assert failed == ["data", "forward", "backward", "optimizer", "optimizer", "data"]
