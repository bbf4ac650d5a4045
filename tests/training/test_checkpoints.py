"""Interrupted runs: a signal writes a checkpoint, and incomplete checkpoints are skipped."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from esm_efficient import (
    CheckpointCallback,
    demo_model_path,
    finetune,
    last_checkpoint,
    load_deeploc,
    task_of,
    tokenize_dataset,
)
from esm_efficient.errors import ConfigurationError, TrainingInterrupted

STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "disable_tqdm": True}


@pytest.fixture(scope="module")
def data(demo_table):
    return load_deeploc(demo_table, max_residues=180, validation_partitions=())


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
    assert all(torch.equal(found, expected[name]) for name, found in weights(again).items())


def test_a_signal_during_a_scheduled_checkpoint_ends_the_run_after_the_next_step(tmp_path, data):
    callbacks = [SignalInSave(), CheckpointCallback()]
    with pytest.raises(TrainingInterrupted, match=r"after optimizer step 3 of 6"):
        finetune(demo_model_path(), data, output_dir=tmp_path, callbacks=callbacks, **STEPS)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("broken", ["adapter_model.safetensors", "optimizer.pt", "files.json"])
@pytest.mark.parametrize("how", ["absent", "cut off"])
def test_an_incomplete_checkpoint_is_skipped(tmp_path, whole_run, caplog, broken, how):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    path = folder / "checkpoint-4" / broken
    if how == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1][: path.stat().st_size // 2])
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    assert "checkpoint-4 is incomplete and is skipped" in caplog.text
    shutil.rmtree(folder / "checkpoint-2")
    assert last_checkpoint(folder) is None


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
    found = finetune(demo_model_path(), tokenized, output_dir=tmp_path, **options)
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
