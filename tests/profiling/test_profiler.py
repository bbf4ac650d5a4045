"""Profiler: it measures phases, categories, rates and leaks of real loops, and leaves nothing installed."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from conftest import each_value, make_model, slow_except
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from esm_efficient import RECIPES, Profiler, apply_lean_encoder, estimate, lora_config, prepare_model
from esm_efficient.costs.allocations import AllocationTracker, model_tensors
from esm_efficient.costs.memory import CATEGORIES
from esm_efficient.errors import ConfigurationError, EsmEfficientError
from esm_efficient.out_of_memory import OutOfMemoryError
from esm_efficient.profiling.backends import TotalsBackend
from esm_efficient.profiling.clock import PhaseClock


def make_batch(rows=4, tokens=20, padding=0):
    ids = torch.randint(4, 24, (rows, tokens))
    mask = torch.ones_like(ids)
    if padding:
        ids[:, -padding:], mask[:, -padding:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def make_run(recipe="base", *, lean=False, **changes):
    model = make_model(hidden_size=64, intermediate_size=256, num_attention_heads=4, **changes)
    settings = RECIPES[recipe]
    adapters = lora_config(model) if settings.preset else None
    model = prepare_model(model, adapters=adapters, gradient_checkpointing=settings.gradient_checkpointing).train()
    if lean:
        apply_lean_encoder(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def train(model, optimizer, batches, profiler=None, keep=None):
    for batch in batches:
        logits = model(**batch).logits
        loss = F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long))
        loss.backward()
        if keep is not None:
            keep.append(model(**batch).logits.exp())
        del logits, loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if profiler is not None:
            profiler.step()


def hooks_of(model, optimizer):
    modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    parameters = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return modules, parameters, len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize(("recipe", "lean"), each_value(["base", "gc", "lora", "all"], [True, False]))
def test_measured_peak_equals_the_estimate(recipe, lean):
    model, optimizer = make_run(recipe, lean=lean)
    batches = [make_batch(4, 60, padding=1) for _ in range(4)]
    with Profiler(model, optimizer, compare_with_matmul=False) as profiler:
        train(model, optimizer, batches, profiler)
    report = profiler.report()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {"tokens": 59} if lean else {"tokens": 60, "padding": "padded"}
    expected = estimate(base.config, device="cpu", recipe=recipe, micro_batch=4, accumulation=1, **options)
    assert report.peak.total == pytest.approx(expected.peak.total, rel=0.01)
    assert report.peak_phase == expected.peak_phase
    for category in CATEGORIES:
        ours, theirs = getattr(report.peak, category), getattr(expected.peak, category)
        assert ours == pytest.approx(theirs, rel=0.03, abs=30_000)
    for phase in ("forward", "backward", "optimizer"):
        peak = report.phases[phase].peak
        assert sum(getattr(peak, category) for category in CATEGORIES) == peak.total <= report.peak.total


def test_phases_share_the_whole_time():
    model, optimizer = make_run()
    with Profiler(model, optimizer, warmup_steps=1, compare_with_matmul=False) as profiler:
        train(model, optimizer, [make_batch()] * 4, profiler)
        model.eval()
        with torch.no_grad():
            model(**make_batch())
    report = profiler.report()
    assert list(report.phases) == ["data", "forward", "backward", "optimizer", "evaluation"]
    assert all(figures.seconds > 0 for figures in report.phases.values())
    assert (report.steps, report.warmup_steps) == (4, 1)
    trained = sum(figures.seconds for name, figures in report.phases.items() if name != "evaluation")
    assert report.samples_per_second == pytest.approx(3 * 4 / trained)


def test_a_loop_that_trains_in_evaluation_mode_is_measured_as_training():
    model, optimizer = make_run()
    with Profiler(model.eval(), optimizer, warmup_steps=1, compare_with_matmul=False) as profiler:
        train(model, optimizer, [make_batch()] * 3, profiler)
    report = profiler.report()
    assert list(report.phases) == ["data", "forward", "backward", "optimizer"]
    assert report.samples_per_second > 0


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_the_peak_of_a_short_warmup_has_the_optimizers_state(warmup_steps):
    model, optimizer = make_run()
    with Profiler(model, optimizer, warmup_steps=warmup_steps, compare_with_matmul=False) as profiler:
        train(model, optimizer, [make_batch(4, 60, padding=1)] * 2, profiler)
    expected = estimate(model.config, device="cpu", recipe="base", micro_batch=4, tokens=60, padding="padded")
    assert profiler.report().peak.total == pytest.approx(expected.peak.total, rel=0.01)


def test_padding_and_special_tokens_do_not_count_as_residues():
    model, optimizer = make_run()
    with Profiler(model, optimizer, warmup_steps=0) as profiler:
        train(model, optimizer, [make_batch(4, 20, padding=5), make_batch(2, 10)], profiler)
    report = profiler.report()
    assert report.non_padding == pytest.approx((4 * 15 + 20) / 100)
    assert report.residues_per_second / report.tokens_per_second == pytest.approx((4 * 13 + 2 * 8) / 100)
    assert report.samples_per_second / report.tokens_per_second == pytest.approx(6 / 100)


@pytest.mark.parametrize(("columns", "line"), [(20, "residues/s"), (1, "samples/s")])
def test_a_run_on_cached_states_has_rates(columns, line):
    model, optimizer = make_run()
    with Profiler(model, optimizer, warmup_steps=1, compare_with_matmul=False) as profiler:
        train(model, optimizer, [{"inputs_embeds": torch.randn(4, columns, 64)} for _ in range(3)], profiler)
    report = profiler.report()
    seconds = 2 * 4 / report.samples_per_second
    assert line in str(report)
    assert "nan" not in str(report)
    if columns == 1:  # pooled states
        assert math.isnan(report.residues_per_second)
    else:
        assert report.residues_per_second == pytest.approx(2 * 4 * 18 / seconds)


@pytest.mark.parametrize("recipe", ["base", "all"])
def test_model_flops_equal_torchs_counter_without_recomputation(recipe):
    model, optimizer = make_run(recipe)
    batches = [make_batch(4, n) for n in (20, 64, 30, 50)]
    with Profiler(model, optimizer, warmup_steps=2) as profiler:
        train(model, optimizer, batches, profiler)
    report = profiler.report()
    plain, other = make_run("lora" if recipe == "all" else "base")
    if recipe == "all":
        plain.enable_input_require_grads()  # as with checkpointing: the first layer has an input gradient
    counter = FlopCounterMode(display=False)
    with counter:
        train(plain, other, batches[2:])
    seconds = 8 / report.samples_per_second
    # torch's counter has no formula for the CPU's attention kernel: two products forward and five backward per head.
    attention = sum(2 * 4 * 7 * 2 * n * n * 64 for n in (30, 50))
    assert report.model_flops_per_second * seconds == pytest.approx(counter.get_total_flops() + attention, rel=0.02)
    assert 0 < report.utilisation < 1


def test_no_hook_is_left_installed():
    model, optimizer = make_run()
    before = hooks_of(model, optimizer)
    with Profiler(model, optimizer) as profiler:
        assert hooks_of(model, optimizer) != before
        train(model, optimizer, [make_batch()] * 3, profiler)
    with pytest.raises(IndexError), Profiler(model, optimizer):
        model(input_ids=torch.full((1, 5), 99))
    assert hooks_of(model, optimizer) == before
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_profiling_does_not_change_training():
    weights = []
    for profiled in (False, True):
        torch.manual_seed(0)
        model, optimizer = make_run("all")
        batches = [make_batch(4, n) for n in (20, 30, 10)]
        if profiled:
            with Profiler(model, optimizer) as profiler:
                train(model, optimizer, batches, profiler)
        else:
            train(model, optimizer, batches)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*weights)


def test_profiling_does_not_change_random_numbers():
    model, optimizer = make_run()
    batches = [make_batch()] * 4
    state = torch.get_rng_state()
    with Profiler(model, optimizer) as profiler:
        train(model, optimizer, batches, profiler)
    assert not math.isnan(profiler.report().matmul_flops_per_second)
    assert torch.equal(torch.get_rng_state(), state)


def test_time_and_memory_of_the_last_evaluation_are_counted(monkeypatch):
    model, optimizer = make_run()
    with Profiler(model, optimizer, warmup_steps=1, compare_with_matmul=False) as profiler:
        train(model, optimizer, [make_batch()] * 3, profiler)
        model.eval()
        with torch.no_grad():
            model(**make_batch(64, 100))
        before = profiler.report().phases["evaluation"].seconds
        monkeypatch.setattr(PhaseClock, "_now", lambda clock: clock._began + 3600.0)
    report = profiler.report()
    assert report.phases["evaluation"].seconds >= before + 3599
    assert report.phases["evaluation"].peak.activations > 64 * 100 * 64 * 4


def test_a_leak_is_found_at_the_default_interval():
    model, optimizer = make_run()
    with Profiler(model, optimizer) as profiler:
        train(model, optimizer, [make_batch(2, 30)] * 75, profiler, keep=[])
    assert profiler.report().growth.category == "activations"


def test_activations_kept_in_a_list_are_found_and_named(caplog):
    model, optimizer = make_run(num_hidden_layers=3)
    kept: list = []
    with caplog.at_level(logging.WARNING), Profiler(model, optimizer, warmup_steps=2, every=1) as profiler:
        train(model, optimizer, [make_batch(8, 60) for _ in range(12)], profiler, keep=kept)
    growth = profiler.report().growth
    assert growth is not None
    assert growth.category == "activations"
    # The estimator predicts the memory that one forward pass keeps.
    config = model.config
    held = estimate(
        config, device="cpu", recipe="base", micro_batch=8, accumulation=1, tokens=60, padding="equal-length"
    )
    assert growth.bytes_per_step == pytest.approx(held.phases["backward"].peak.activations, rel=0.3)
    [record] = [r for r in caplog.records if "grows by" in r.getMessage()]
    assert "activations" in record.getMessage()
    assert "detach()" in record.getMessage()


def test_batches_of_different_lengths_are_not_reported_as_a_leak():
    model, optimizer = make_run()
    with Profiler(model, optimizer, every=1) as profiler:
        train(model, optimizer, [make_batch(4, 10 + 5 * (i % 7) + i) for i in range(20)], profiler)
    assert profiler.report().growth is None


def test_a_larger_batch_between_detailed_steps_is_counted():
    model, optimizer = make_run()
    lengths = [20, 20, 20, 20, 90, 20, 20]
    with Profiler(model, optimizer, warmup_steps=2, every=100, compare_with_matmul=False) as profiler:
        train(model, optimizer, [make_batch(4, n, padding=1) for n in lengths], profiler)
    expected = estimate(model.config, device="cpu", recipe="base", micro_batch=4, tokens=90, padding="padded")
    assert profiler.report().peak.total == pytest.approx(expected.peak.total, rel=0.01)


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_out_of_memory_error_names_the_phase_and_what_was_held(where):
    model, optimizer = make_run()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def run():
        with Profiler(model, optimizer) as profiler:
            train(model, optimizer, [make_batch()], profiler)
            if where == "forward":
                model.esm.encoder.layer[1].register_forward_pre_hook(fail)
            elif where == "backward":
                model.esm.encoder.layer[0].register_full_backward_hook(fail)
            else:
                optimizer.register_step_pre_hook(fail)
            train(model, optimizer, [make_batch(3, 17)], profiler)

    with pytest.raises(OutOfMemoryError) as caught:
        run()
    error = caught.value
    assert error.phase == where
    assert isinstance(error, EsmEfficientError)
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert not isinstance(error.__cause__, OutOfMemoryError)
    assert error.held["weights"] > 0
    assert error.held["total"] == sum(error.held[category] for category in CATEGORIES)
    assert "3 x 17 tokens" in str(error)
    assert "Tried to allocate 2.00 GiB" in str(error)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


class TrackedTotals(TotalsBackend):
    """Reads only totals, as on a GPU. Here the totals come from a tracker of CPU tensors."""

    tracker: AllocationTracker

    def _current(self):
        return self.tracker.current.total

    def _take_peak(self):
        peak = self.tracker.peak.total
        self.tracker.reset_peak()
        return peak, 2 * peak


@pytest.mark.parametrize("recipe", slow_except(["base", "gc", "lora", "all"], "base", "all"))
def test_the_split_of_totals_is_close_to_exact_counts(monkeypatch, recipe):
    def run():
        with Profiler(model, optimizer, warmup_steps=0, every=1) as profiler:
            train(model, optimizer, batches, profiler)
        return profiler.report()

    def make_input():
        model, optimizer = make_run(recipe, num_hidden_layers=6)
        return model, optimizer, [make_batch(8, 60, padding=1) for _ in range(3)]

    model, optimizer, batches = make_input()
    exact = run()
    model, optimizer, batches = make_input()
    with AllocationTracker() as tracker:
        tracker.hold(model_tensors(model), "weights")
        monkeypatch.setattr(TrackedTotals, "tracker", tracker, raising=False)
        monkeypatch.setattr("esm_efficient.profiling.profiler.make_backend", TrackedTotals)
        split_up = run()
    assert split_up.reserved == 2 * max(f.peak.total for f in split_up.phases.values())
    for phase in ("forward", "backward", "optimizer"):
        ours, theirs = split_up.phases[phase].peak, exact.phases[phase].peak
        assert ours.total == pytest.approx(theirs.total, rel=0.01)
        assert (ours.weights, ours.optimizer) == (theirs.weights, theirs.optimizer)
        assert abs(ours.gradients - theirs.gradients) < 100_000  # those of a layer
        # What the backward pass adds is divided by what the forward pass had kept, which is a guess.
        assert ours.activations == pytest.approx(theirs.activations, abs=0.25 * theirs.total)
        assert ours.activations + ours.other == pytest.approx(theirs.activations + theirs.other, rel=0.02, abs=50_000)


def test_a_model_without_tokens_has_no_token_rates():
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Profiler(model, optimizer, warmup_steps=0) as profiler:
        for _ in range(2):
            model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
            profiler.step()
    report = profiler.report()
    assert math.isnan(report.model_flops_per_second)
    assert report.phases["backward"].peak.total > 0
    assert math.isnan(report.samples_per_second)
    assert not any(name.endswith("_per_second") for name in report.metrics())
    assert "samples/s" not in str(report)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigurationError, match="no parameters"):
        Profiler(torch.nn.Identity())
    for options in ({"warmup_steps": -1}, {"every": 0}):
        with pytest.raises(ConfigurationError, match="expected at least 0 and 1"):
            Profiler(torch.nn.Linear(1, 1), **options)


def test_using_a_profiler_before_it_starts_is_an_error():
    profiler = Profiler(torch.nn.Linear(1, 1))
    for method in (profiler.report, profiler.step):
        with pytest.raises(ConfigurationError, match="has not been started"):
            method()


def test_a_profiler_measures_loops_in_turn_and_refuses_two_at_once():
    model, optimizer = make_run()
    before = hooks_of(model, optimizer)
    profiler = Profiler(model, optimizer, compare_with_matmul=False)
    with profiler:
        train(model, optimizer, [make_batch()] * 3, profiler)
        for second in (profiler, Profiler(*make_run())):
            with pytest.raises(ConfigurationError, match="running already"):
                second.__enter__()
    with profiler:
        train(model, optimizer, [make_batch()] * 2, profiler)
    assert profiler.report().steps == 2
    assert hooks_of(model, optimizer) == before


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_dispatch_mode_that_overlaps_with_a_profiled_step_is_warned_of(overlaps, caplog):
    model, optimizer = make_run()
    profiler, flops = Profiler(model, optimizer, warmup_steps=0), FlopCounterMode(display=False)
    with profiler if overlaps else flops, flops if overlaps else profiler:
        train(model, optimizer, [make_batch()], profiler if not overlaps else None)
    assert ("another dispatch mode" in caplog.text) == overlaps
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.cuda
def test_cuda_counters_add_up():
    model, optimizer = make_run()
    model = model.cuda()
    batch = {name: value.cuda() for name, value in make_batch(8, 100).items()}
    optimizer = torch.optim.AdamW(model.parameters())
    with Profiler(model, optimizer) as profiler:
        for _ in range(4):
            model(**batch).logits.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    report = profiler.report()
    assert report.reserved >= report.peak.total > report.peak.weights > 0
    assert report.driver_bytes >= report.reserved
    assert report.peak.activations > 0
    assert sum(getattr(report.peak, category) for category in CATEGORIES) == report.peak.total
