"""A run resumes from a whole checkpoint of the same run, and from no other."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from conftest import each_value
from datasets import Dataset
from test_checkpoints import damage, tiny_run
from torch.utils.data import DataLoader
from trainer_runs import arguments, weighted
from transformers import TrainingArguments

from esm_efficient import CheckpointCallback, CheckpointError, lora_config, prepare_model
from esm_efficient.cli import parameters_of
from esm_efficient.cli.output import as_typed
from esm_efficient.errors import ConfigurationError
from esm_efficient.training import resuming
from esm_efficient.training.batches import EpochCallback
from esm_efficient.training.resuming import describe_run, refuse_finished
from esm_efficient.training.stopping import EarlyStopping


def values(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def identical(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def whole(tmp_path, tiny_model, tiny_dataset, tokenizer):
    """The weights after a run of 6 steps with checkpoints 2, 4 and 6 in tmp_path."""
    trainer = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer, CheckpointCallback())
    trainer.train()
    return values(trainer)


@pytest.mark.parametrize(
    ("broken", "how"),
    each_value(
        ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"],
        ["absent", "cut off", "half of zeros"],
    ),
)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(
    tmp_path, whole, tiny_model, tiny_dataset, tokenizer, caplog, broken, how
):
    shutil.rmtree(tmp_path / "checkpoint-6")
    damage(tmp_path / "checkpoint-4" / broken, how)
    trainer = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer)
    trainer.train(resume_from_checkpoint=True if how == "absent" else tmp_path / "checkpoint-4")
    assert identical(values(trainer), whole)
    assert f"training resumes from {tmp_path / 'checkpoint-2'}" in caplog.text
    assert broken in caplog.text


@pytest.mark.parametrize("step", [2, 4, 6])
def test_the_loss_of_a_resumed_run_is_that_of_the_whole(tmp_path, tiny_model, tiny_dataset, tokenizer, step):
    trainer = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer)
    loss = trainer.train().training_loss
    assert trainer.mean_loss == pytest.approx(loss, rel=1e-6)
    resumed = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer)
    resumed.train(resume_from_checkpoint=tmp_path / f"checkpoint-{step}")
    assert resumed.mean_loss == pytest.approx(loss, rel=1e-6)


def test_without_a_whole_checkpoint_no_run_resumes(tmp_path, whole, tiny_model, tiny_dataset, tokenizer):
    for step in (2, 4, 6):
        damage(tmp_path / f"checkpoint-{step}" / "optimizer.pt", "cut off")
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is incomplete or damaged \(optimizer.pt has"):
        tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer).train(resume_from_checkpoint=tmp_path / "checkpoint-8")
    with pytest.raises(CheckpointError, match="No valid checkpoint found"):
        tiny_run(tmp_path / "none", tiny_model, tiny_dataset, tokenizer).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_list_resumes_if_its_files_are_whole(
    tmp_path, tiny_model, tiny_dataset, tokenizer, caplog
):
    trainer = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer)
    trainer.train()
    expected = values(trainer)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = tiny_run(tmp_path, tiny_model, tiny_dataset, tokenizer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert identical(values(trainer), expected)
    assert "optimizer.pt is missing" in caplog.text


def other_labels(data):
    return data.map(lambda row: {"labels": 1 - row["labels"]}, features=data.features)


def other_sequence(data):
    return data.map(lambda row, i: {"input_ids": [*row["input_ids"][:-2], 7 + i % 2, 2]}, with_indices=True)


# What changes between the checkpoint's run and the one that resumes, and how the error names it.
CHANGES = {
    "rate": ({"args": {"learning_rate": 2e-3}}, "learning_rate was 0.001 and is 0.002"),
    "decay": ({"args": {"weight_decay": 0.1}}, "weight_decay was 0.0 and is 0.1"),
    "seed": ({"args": {"seed": 7}}, "seed was 42 and is 7"),
    "shorter": ({"args": {"max_steps": 5}}, "max_steps was 6 and is 5"),
    "weights": ({"options": {"class_weights": [1.0, 1.0]}}, "class_weights was"),
    "focal": ({"options": {"focal_gamma": 2.0}}, "focal_gamma was 0.0 and is 2.0"),
    "labels": ({"data": other_labels}, "the labels differ"),
    "sequences": ({"data": other_sequence}, "the sequences differ"),
    "rows": ({"data": lambda data: data.select(range(31))}, "rows was 32 and is 31"),
    "order": ({"data": lambda data: data.shuffle(seed=1)}, "the sequences differ"),
    "base": ({"seed": 1}, "the frozen weights differ"),
    "rank": ({"adapters": {"r": 3}}, "the trainable parameters differ"),
    "alpha": ({"adapters": {"lora_alpha": 64}}, "adapters was"),
}


def adapted(folder, tiny_model, data, tokenizer, *, seed=0, args=(), options=(), adapters=()):
    model = tiny_model(seed=seed)
    model = prepare_model(model, adapters=lora_config(model, **({"r": 2} | dict(adapters))))
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-3} | dict(args)
    options = {"callbacks": [CheckpointCallback(signals=())]} | dict(options)
    return weighted(model, arguments(folder, 4, **args), data, tokenizer, **options)


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory, tokenizer):
    from conftest import make_dataset, make_model

    folder = tmp_path_factory.mktemp("adapted")
    adapted(folder, make_model, make_dataset(32), tokenizer).train()
    return folder


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("step", [2, 6])
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path, adapted_run, tiny_model, tiny_dataset, tokenizer, change, step
):
    changes, message = CHANGES[change]
    changes = dict(changes)
    data = changes.pop("data", lambda data: data)(tiny_dataset(32))
    trainer = adapted(tmp_path, tiny_model, data, tokenizer, **changes)
    with pytest.raises(ConfigurationError, match="belongs to another run") as caught:
        trainer.train(resume_from_checkpoint=adapted_run / f"checkpoint-{step}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"options": {"class_weights": {"LABEL_0": 0.3, "LABEL_1": 2.5}}}, None),
        ({"args": {"max_steps": 8}}, "max_steps was 6 and is 8"),
        ({"args": {"gradient_accumulation_steps": 2}}, "batch_size was 4 and is 8"),
        ({"args": {"save_steps": 3, "logging_steps": 2, "per_device_eval_batch_size": 2}}, None),
    ],
    ids=str,
)
def test_the_same_run_resumes_and_another_length_is_a_warning(
    tmp_path, adapted_run, tiny_model, tiny_dataset, tokenizer, caplog, change, message
):
    change = {"options": {"class_weights": [0.3, 2.5]}} | change
    trainer = adapted(tmp_path, tiny_model, tiny_dataset(32), tokenizer, **change)
    trainer.train(resume_from_checkpoint=adapted_run / "checkpoint-4")
    warned = [record.getMessage() for record in caplog.records if "another length or batch" in record.getMessage()]
    assert (message is None) == (not warned)
    assert message is None or message in warned[0]


@pytest.mark.parametrize(
    ("options", "is_finished"),
    [({"max_steps": 6}, True), ({"max_steps": 5}, True), ({"max_steps": 7}, False), ({"num_train_epochs": 9}, False)],
)
def test_a_finished_run_has_nothing_to_resume(adapted_run, tmp_path, options, is_finished):
    args = TrainingArguments(str(tmp_path), use_cpu=True, **options)
    if not is_finished:
        refuse_finished(adapted_run, args, EarlyStopping(None, ("mcc", True)))
        return
    with pytest.raises(ConfigurationError, match=r"is finished \(6 of 6 steps\): nothing to resume") as error:
        refuse_finished(adapted_run, args, EarlyStopping(None, ("mcc", True)))
    typed = as_typed(str(error.value), parameters_of(["finetune"]))
    assert "Train without --resume to repeat it" in typed


def test_the_most_telling_difference_is_named_first(adapted_run, tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = other_sequence(tiny_dataset(32))
    options = {"class_weights": [1.0, 2.0]}
    trainer = adapted(tmp_path, tiny_model, data, tokenizer, options=options, args={"learning_rate": 0.5})
    first_and_last = "another run: the sequences differ; .*; class_weights was"
    with pytest.raises(ConfigurationError, match=first_and_last) as e:
        trainer.train(resume_from_checkpoint=adapted_run / "checkpoint-2")
    typed = as_typed(str(e.value), parameters_of(["finetune"]))
    assert typed.endswith("another folder with --output and no --resume")


@pytest.mark.parametrize(("read", "other"), [("input_ids", "sequence"), ("labels", "label")])
def test_of_two_columns_with_the_same_content_the_one_that_is_trained_on_is_described(read, other):
    """Which one was described depended on the hashes of strings, which differ between processes."""
    rows = Dataset.from_dict({read: [[1], [2]], other: ["a", "b"]})
    changed = Dataset.from_dict({read: [[1], [2]], other: ["a", "c"]})
    wrong = Dataset.from_dict({read: [[1], [3]], other: ["a", "b"]})
    found = [resuming._describe_data(data) for data in (rows, changed, wrong)]
    assert found[0] == found[1] != found[2]


def test_a_description_is_the_same_for_the_same_rows_in_other_blocks(tmp_path, tiny_model, tiny_dataset, tokenizer):
    from datasets import concatenate_datasets

    data = tiny_dataset(32)
    parts = concatenate_datasets([data.select(range(20)), data.select(range(20, 32))])
    described = [describe_run(adapted(tmp_path, tiny_model, rows, tokenizer)) for rows in (data, parts)]
    assert described[0] == described[1]
    assert {"the_labels", "the_sequences", "the_frozen_weights", "the_trainable_parameters"} <= described[0].keys()


def test_a_sampler_inside_of_others_gets_the_epoch_of_a_run_that_resumes():
    samplers = pytest.importorskip("transformers.trainer_pt_utils")
    if not hasattr(samplers, "BatchRebalanceSampler"):
        pytest.skip("this version of transformers has no such sampler")

    def loader():
        options = {"effective_batch_size": 8, "dp_size": 2, "grad_accum": 1, "rank": 0, "drop_last": False}
        batches = samplers.BatchRebalanceSampler([5 + number % 7 for number in range(24)], **options)
        given = DataLoader(list(range(24)), batch_sampler=batches)
        made = prepare_data_loader(given, num_processes=2, process_index=0, put_on_device=False)
        made.batch_sampler.num_processes = 1  # as Trainer does: the sampler itself divides the batches
        return made

    def batches_of(epoch, skipped):
        made = loader()
        seen = skip_first_batches(made, skipped) if skipped else made
        callback = EpochCallback(SimpleNamespace(stream=None, accelerator=SimpleNamespace(num_processes=2)))
        state = SimpleNamespace(epoch=epoch)
        callback.on_epoch_begin(SimpleNamespace(seed=0, data_seed=None), state, None, train_dataloader=seen)
        return [batch.tolist() for batch in seen]

    assert batches_of(1, 1) == batches_of(1, 0)[1:]
    assert batches_of(1, 1) != batches_of(0, 1)
