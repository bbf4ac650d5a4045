"""Interrupted runs: a signal writes a checkpoint, and only whole checkpoints are used."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import slow_except
from datasets import DatasetDict
from safetensors.torch import load_file
from trainer_runs import arguments, weighted
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback

from esm_efficient import (
    CheckpointCallback,
    CheckpointError,
    ProfilerCallback,
    compat,
    demo_model_path,
    finetune,
    last_checkpoint,
    load_deeploc,
    prepare_model,
    stratified_sample,
    task_of,
    tokenize_dataset,
)
from esm_efficient.errors import ConfigurationError, TrainingInterrupted
from esm_efficient.training.card import run_settings
from esm_efficient.training.checkpoints import find_faults
from esm_efficient.training.outcome import cost_rows

STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "disable_tqdm": True}


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=180, validation_partitions=())
    return DatasetDict(train=splits["train"], test=stratified_sample(splits["test"], 16))


class Signal(TrainerCallback):
    """Sends a signal to this process at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalInSave(TrainerCallback):
    """Sends a signal while a scheduled checkpoint is written."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def weights(result):
    return load_file(result.model_dir / "adapter_model.safetensors")


def test_a_run_that_resumes_after_a_signal_ends_with_the_weights_of_a_whole_run(tmp_path, data):
    whole = finetune(demo_model_path(), data, output_dir=tmp_path / "whole", **STEPS)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match=r"after optimizer step 4 of 6"):
        finetune(
            demo_model_path(), data, output_dir=tmp_path / "cut", callbacks=[CheckpointCallback(), Signal(3)], **STEPS
        )
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "cut" / "adapter").exists()
    newest = last_checkpoint(tmp_path / "cut")
    assert newest == tmp_path / "cut" / "checkpoint-4"
    resumed = finetune(
        demo_model_path(),
        data,
        output_dir=tmp_path / "cut",
        callbacks=[CheckpointCallback()],
        resume_from_checkpoint=newest,
        **STEPS,
    )
    expected = weights(whole)
    assert (resumed.steps_resumed, resumed.steps, whole.steps_resumed) == (4, 6, 0)
    assert weights(resumed).keys() == expected.keys()
    for name, found in weights(resumed).items():
        assert torch.equal(found, expected[name]), name
    # A run that resumes after its last step trains nothing, and has the same weights.
    again = finetune(
        demo_model_path(),
        data,
        output_dir=tmp_path / "cut",
        callbacks=[CheckpointCallback()],
        resume_from_checkpoint=last_checkpoint(tmp_path / "cut"),
        **STEPS,
    )
    assert (again.steps_resumed, again.steps) == (6, 6)
    assert weights(again).keys() == expected.keys()
    assert all(torch.equal(found, expected[name]) for name, found in weights(again).items())
    table = dict(cost_rows(again))
    assert "layers that trained" not in table
    assert "time of the training loop after step 6" in table
    assert "time of the training loop after step 6" in run_settings(again)
    assert dict(cost_rows(whole))["layers that trained"]


def test_a_signal_during_a_scheduled_checkpoint_ends_the_run_after_the_next_step(tmp_path, data):
    callbacks = [SignalInSave(), CheckpointCallback()]
    with pytest.raises(TrainingInterrupted, match=r"after optimizer step 3 of 6"):
        finetune(demo_model_path(), data, output_dir=tmp_path, callbacks=callbacks, **STEPS)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def damage(path, how):
    content = path.read_bytes()
    if how == "absent":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


FILES = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "files.json",
)


@pytest.mark.parametrize("broken", FILES)
@pytest.mark.parametrize("how", ["absent", "cut off", "half of zeros"])
def test_an_incomplete_or_damaged_checkpoint_is_skipped(tmp_path, whole_run, caplog, broken, how):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    damage(folder / "checkpoint-4" / broken, how)
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    assert "checkpoint-4 is incomplete or damaged and is skipped" in caplog.text
    assert broken in caplog.text
    shutil.rmtree(folder / "checkpoint-2")
    assert last_checkpoint(folder) is None


@pytest.mark.parametrize("broken", FILES[1:-1])
@pytest.mark.parametrize("how", ["absent", "cut off", "half of zeros"])
def test_without_a_list_the_files_are_checked_by_their_formats(tmp_path, whole_run, broken, how):
    folder = shutil.copytree(whole_run / "checkpoint-4", tmp_path / "checkpoint-4")
    (folder / "files.json").unlink()
    assert find_faults(folder) == []
    damage(folder / broken, how)
    # A run without the file of random states resumes, as with Trainer.
    expected = [] if (broken, how) == ("rng_state.pth", "absent") else [broken]
    assert [fault.split()[0] for fault in find_faults(folder)] == expected


def tiny_run(folder, tiny_model, tiny_dataset, tokenizer, *callbacks, trainer=None, **options):
    """Return a Trainer of 6 steps that writes a checkpoint every 2 steps, its callbacks in this order."""
    args = arguments(
        folder, 4, **({"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-3} | options)
    )
    torch.manual_seed(0)
    model = prepare_model(tiny_model())
    if trainer is not None:
        collator = DataCollatorWithPadding(tokenizer)
        return trainer(model, args, train_dataset=tiny_dataset(32), data_collator=collator, callbacks=list(callbacks))
    return weighted(model, args, tiny_dataset(32), tokenizer, callbacks=list(callbacks), eval_dataset=tiny_dataset(8))


class Fails(TrainerCallback):
    """Fails in an event, from a step on."""

    def __init__(self, event: str, step: int = 0, error: type[BaseException] = RuntimeError) -> None:
        def fail(args, state, control, **kwargs):
            if state.global_step >= step:
                raise error("as the test wants")

        setattr(self, event, fail)


EVENTS = ("on_train_begin", "on_epoch_begin", "on_step_end", "on_save", "on_log", "on_train_end")
ERRORS = (RuntimeError, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("error", "event", "trainer"),
    slow_except(
        itertools.product(ERRORS, EVENTS, (None, Trainer)),
        *((ERRORS[number % 2], event, None) for number, event in enumerate(EVENTS)),
        *((ERRORS[1 - number % 2], event, Trainer) for number, event in enumerate(EVENTS)),
    ),
)
def test_a_run_that_fails_leaves_no_signal_handler_behind(
    tmp_path, tiny_model, tiny_dataset, tokenizer, trainer, event, error
):
    before = signal.getsignal(signal.SIGTERM)
    callbacks = CheckpointCallback(), Fails(event, error=error)
    run = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, *callbacks, trainer=trainer)
    with pytest.raises(error, match="as the test wants"):
        run.train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_callbacks_that_guard_a_run_leave_nothing_behind(tmp_path, tiny_model, tiny_dataset, tokenizer):
    callbacks = CheckpointCallback(), ProfilerCallback(), CheckpointCallback(signals=(signal.SIGUSR1,))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    run = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, *callbacks)
    for _ in range(2):
        run.train()
        assert not {*compat.GUARDED_METHODS} & {*vars(run)}
        assert "on_epoch_begin" not in vars(run.callback_handler)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_a_thread_beside_the_main_one_trains_without_signals(tmp_path, tiny_model, tiny_dataset, tokenizer):
    run = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback())
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run.train).result().global_step == 6
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_an_old_checkpoint_stays_until_the_new_one_is_listed(tmp_path, tiny_model, tiny_dataset, tokenizer):
    options = {"save_total_limit": 1}
    run = tiny_run(tmp_path / "whole", tiny_model, tiny_dataset, tokenizer, CheckpointCallback(), **options)
    run.train()
    assert os.listdir(tmp_path / "whole") == ["checkpoint-6"]
    assert run.args.save_total_limit == 1
    # The run dies after Trainer has written checkpoint-4 and before it is listed.
    dies = Fails("on_save", step=4, error=KeyboardInterrupt), CheckpointCallback()
    run = tiny_run(tmp_path / "cut", tiny_model, tiny_dataset, tokenizer, *dies, **options)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-2"
    assert run.args.save_total_limit == 1


def test_a_run_that_does_not_begin_leaves_the_limit_of_checkpoints(tmp_path, tiny_model, tiny_dataset, tokenizer):
    fails = Fails("on_train_begin", step=0, error=KeyboardInterrupt)
    run = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback(), fails, save_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.args.save_total_limit == 1


def test_checkpoints_of_later_steps_that_an_earlier_run_left_are_deleted_first(
    tmp_path, tiny_model, tiny_dataset, tokenizer
):
    tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback()).train()
    damage(tmp_path / "checkpoint-4" / "optimizer.pt", "cut off")
    damage(tmp_path / "checkpoint-6" / "optimizer.pt", "cut off")
    callbacks = CheckpointCallback(), Fails("on_save", step=4, error=KeyboardInterrupt)
    run = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, *callbacks, save_total_limit=2)
    with pytest.raises(KeyboardInterrupt):
        run.train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


LIMITS = (0, 1_000, 5_000, 12_000, 20_000, 40_000)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk_is_named_and_the_last_whole_checkpoint_stays(tmp_path, tiny_model, tiny_dataset, tokenizer, limit):
    """A limit of the size of a file stands for the disk; it stops the write in another file each time."""

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback(), Full())
    try:
        with pytest.raises(CheckpointError) as caught:
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path / "checkpoint-2") in str(caught.value)
    assert "could not be written" in str(caught.value)
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    options = STEPS | {"max_steps": 4}
    finetune(demo_model_path(), data, output_dir=folder, callbacks=[CheckpointCallback()], **options)
    return folder


def test_the_newest_checkpoint_is_the_one_with_the_highest_number(tmp_path, whole_run):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    (folder / "checkpoint-4").rename(folder / "checkpoint-10")
    (folder / "checkpoint-other").mkdir()
    assert last_checkpoint(folder) == folder / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_tokenised_splits_train_as_raw_ones_and_several_labels_need_a_task(tmp_path, data, demo_table):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    options = {"max_steps": 2, "disable_tqdm": True}
    raw = finetune(demo_model_path(), data, output_dir=tmp_path, **options)
    tokenized = tokenize_dataset(data, tokenizer)[0]
    longest = max(map(len, tokenized["train"]["input_ids"]))
    for most in (longest - 1, longest + 1):  # the model reads what it was trained on
        found = finetune(demo_model_path(), tokenized, output_dir=tmp_path, max_tokens=most, **options)
        saved = AutoTokenizer.from_pretrained(found.model_dir)
        assert saved.model_max_length == max(longest, most)
    assert found.metrics == raw.metrics
    assert found.task == raw.task
    several = load_deeploc(demo_table, task="location", max_residues=180)
    task = task_of(several["train"].features)
    tokenized = tokenize_dataset(several, tokenizer)[0]
    with pytest.raises(ConfigurationError, match="lists of 10 numbers"):
        finetune(demo_model_path(), tokenized, output_dir=tmp_path, class_weights=None, **options)
    found = finetune(demo_model_path(), tokenized, output_dir=tmp_path, class_weights=None, task=task, **options)
    assert found.model.config.id2label == dict(enumerate(task.names))
    assert set(found.thresholds) == set(task.names)


def test_without_the_state_of_the_optimizer_no_run_resumes(tmp_path, tiny_model, tiny_dataset, tokenizer):
    options = {"save_only_model": True, "max_steps": 4}
    tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback(), **options).train()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    resumed = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback(), max_steps=6)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing, as with save_only_model=True"):
        resumed.train(resume_from_checkpoint=True)


def test_a_signal_in_the_last_step_of_an_epoch_comes_after_its_evaluation(
    tmp_path, tiny_model, tiny_dataset, tokenizer
):
    epochs = {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    given = tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback()
    with pytest.raises(TrainingInterrupted, match="after optimizer step 8"):
        tiny_run(*given, Signal(7), **epochs).train()
    resumed = tiny_run(*given, **epochs)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["epoch"] for entry in resumed.state.log_history if "eval_loss" in entry] == [1, 2]


def test_a_signal_ends_a_run_that_saves_the_best_alone(tmp_path, tiny_model, tiny_dataset, tokenizer):
    options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    options |= {"greater_is_better": True, "learning_rate": 0.0}  # the first evaluation stays the best
    trainer = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback(), Signal(3), **options)
    with pytest.raises(TrainingInterrupted, match="after optimizer step 4"):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert trainer.args.save_strategy == "best"
