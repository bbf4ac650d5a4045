"""ProfilerCallback: its figures reach the trackers on one and two ranks, and a failed run leaves nothing installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dataset, make_model, slow_except
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from esm_efficient import ProfilerCallback, WeightedTrainer, recipe_arguments
from esm_efficient.compat import GUARDED_METHODS
from esm_efficient.costs.memory import CATEGORIES
from esm_efficient.errors import ConfigurationError
from esm_efficient.out_of_memory import OutOfMemoryError
from esm_efficient.training.metrics import compute_metrics_for


class Tracker(TrainerCallback):
    """Records the logged values, as a tracker does. The Trainer calls it before the user's callbacks."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(dict(logs))


def make_trainer(kind, tokenizer, folder, *callbacks, **options):
    tracker = Tracker()
    args = recipe_arguments("base", folder, max_steps=6, logging_steps=2, disable_tqdm=True, **options)
    trainer = kind(
        make_model(),
        args,
        train_dataset=make_dataset(64),
        eval_dataset=make_dataset(16, seed=1),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics_for(["no", "yes"]),
        callbacks=[tracker, *callbacks],
    )
    return trainer, tracker


def assert_nothing_installed(trainer):
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trainer.model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainer.model.parameters())
    assert not set(GUARDED_METHODS) & set(vars(trainer))
    assert "on_epoch_begin" not in vars(trainer.callback_handler)


@pytest.mark.parametrize("added_later", [False, True])
@pytest.mark.parametrize("kind", [Trainer, WeightedTrainer])
def test_figures_reach_the_trackers_of_any_trainer(kind, tokenizer, tmp_path, added_later):
    profiler = ProfilerCallback(compare_with_matmul=False)
    callbacks = [] if added_later else [profiler]
    trainer, tracker = make_trainer(kind, tokenizer, tmp_path, *callbacks, eval_strategy="steps", eval_steps=3)
    if added_later:
        trainer.add_callback(profiler)
    trainer.train()
    final = [logs for logs in tracker.logged if "profile/peak_bytes" in logs]
    assert len(final) == 3  # twice during the run, once at the end
    report = profiler.report
    assert final[-1]["profile/peak_bytes"] == report.peak.total
    assert sum(final[-1][f"profile/peak_{category}_bytes"] for category in CATEGORIES) == report.peak.total
    assert final[-1]["profile/residues_per_second"] == pytest.approx(report.residues_per_second)
    assert set(report.phases) == {"data", "forward", "backward", "optimizer", "evaluation"}
    assert report.steps == 6
    assert any("profile/peak_bytes" in entry for entry in trainer.state.log_history)
    # The Trainer's own figures are logged at its own intervals too.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6]
    assert_nothing_installed(trainer)


def test_accumulated_micro_batches_make_one_step(tokenizer, tmp_path):
    profiler = ProfilerCallback(warmup_steps=1)
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path, profiler, **options)
    trainer.train()
    assert profiler.report.steps == 6
    trained = sum(f.seconds for name, f in profiler.report.phases.items() if name != "evaluation")
    assert profiler.report.samples_per_second * trained == pytest.approx(5 * 8)
    assert profiler.report.phases["forward"].peak.gradients > 0


def test_an_out_of_memory_error_of_a_run_is_replaced_and_nothing_stays_installed(tokenizer, tmp_path):
    profiler = ProfilerCallback()
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path, profiler)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = trainer.model.esm.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemoryError, match="out of memory in the phase 'forward'") as caught:
        trainer.train()
    assert caught.value.held["weights"] > 0
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    hook.remove()
    assert_nothing_installed(trainer)
    trainer.train()
    assert profiler.report.steps == 6


@pytest.mark.parametrize(
    "event",
    slow_except(["on_train_begin", "on_epoch_begin", "on_step_end", "on_evaluate", "on_train_end"], "on_step_end"),
)
def test_a_run_that_another_callback_ends_leaves_nothing_on_the_model(tokenizer, tmp_path, event):
    class Fails(TrainerCallback):
        pass

    def fail(*_, **__):
        raise KeyboardInterrupt

    setattr(Fails, event, fail)
    options = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": event == "on_epoch_begin"}
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path, ProfilerCallback(), Fails(), **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Fails)
    if event != "on_train_begin":  # the guard stays installed until the next run, but no hook does
        assert_nothing_installed(trainer)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    trainer.train()
    assert_nothing_installed(trainer)


def test_an_evaluation_before_the_first_step_is_profiled(tokenizer, tmp_path):
    profiler = ProfilerCallback()
    make_trainer(Trainer, tokenizer, tmp_path, profiler, eval_on_start=True)[0].train()
    assert profiler.report.phases["evaluation"].peak.activations > 0


@pytest.mark.slow
def test_a_run_that_starts_again_with_a_smaller_batch_is_profiled_anew(tokenizer, tmp_path):
    profiler = ProfilerCallback()
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path, profiler, **options)
    sizes = []

    def fail(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = trainer.model.register_forward_pre_hook(fail, with_kwargs=True)
    trainer.train()
    hook.remove()
    assert sizes[0] == 8
    assert max(sizes[-6:]) <= 4
    assert profiler.report.steps == 6
    assert_nothing_installed(trainer)


def test_two_profiler_callbacks_in_one_trainer_are_refused(tokenizer, tmp_path):
    trainer, _ = make_trainer(WeightedTrainer, tokenizer, tmp_path, ProfilerCallback(), ProfilerCallback())
    with pytest.raises(ConfigurationError, match="more than one ProfilerCallback"):
        trainer.train()
    assert_nothing_installed(trainer)


def test_using_the_callback_without_a_trainer_is_an_error(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ConfigurationError, match="use Profiler for other loops"):
        ProfilerCallback().on_train_begin(args, None, None, model=make_model(), optimizer=None)


@pytest.mark.slow
def test_two_ranks_are_reported_one_by_one_and_summed(tmp_path):
    script = Path(__file__).with_name("profiled_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    run = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    record = json.loads((tmp_path / "ranks.json").read_text())
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1]
    peaks = [rank["peak_bytes"] for rank in record["ranks"]]
    assert record["sum"]["peak_bytes"] == sum(peaks)
    assert min(peaks) > 0
    rates = [rank["residues_per_second"] for rank in record["ranks"]]
    assert record["sum"]["residues_per_second"] == pytest.approx(sum(rates))


def test_training_arguments_of_plain_transformers_are_enough(tokenizer, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    collator = DataCollatorWithPadding(tokenizer)
    profiler = ProfilerCallback()
    trainer = Trainer(make_model(), args, train_dataset=make_dataset(32), data_collator=collator, callbacks=[profiler])
    trainer.train()
    assert profiler.report.phases["backward"].peak.total > 0
