"""What a run says before it starts: the device that it is estimated for is the one that trains."""

from __future__ import annotations

import dataclasses
import re
import types

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import TrainingArguments

from esm_efficient import RECIPES, estimate, finetune, load_deeploc
from esm_efficient.costs.devices import GIB
from esm_efficient.errors import DataError
from esm_efficient.reporting.description import describe
from esm_efficient.tasks import Task
from esm_efficient.training.run_plan import RunPlan, device_here, gpu_named, warn_of_few_steps
from esm_efficient.trunk.states import StateFormat


def make_proteins(size: int) -> Dataset:
    """Return proteins of two classes in turn."""
    rows = {"sequence": [f"MKT{'ACDEFGHI'[row % 8]}{'W' * (row % 5)}" for row in range(size)]}
    table = Dataset.from_dict(rows | {"label": [row % 2 for row in range(size)]})
    return table.cast_column("label", ClassLabel(names=["no", "yes"]))


@pytest.fixture
def machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A10G")
    properties = types.SimpleNamespace(total_memory=22 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_run_on_the_cpu_is_estimated_for_the_cpu_of_a_machine_with_a_gpu(machine_with_a_gpu):
    assert device_here(torch.device("cpu")).name == "cpu"
    gpu = device_here(torch.device("cuda", 0))
    assert (gpu.name, gpu.memory) == ("A10G", 22 * GIB)
    assert gpu.flops_per_second


def planned(table, folder, **options):
    """The plan of a run on a table, with options of training."""
    from esm_efficient.training.job import begin_job

    job = begin_job(
        "8M",
        load_deeploc(table, max_residues=220),
        RECIPES["frozen"],
        folder,
        seed=0,
        task=None,
        precision="float32",
        data_options={},
        training_options=options,
        early_stopping=None,
    )
    return job.with_plan(max_tokens=200, probe=False).plan


@pytest.mark.parametrize(("options", "has_cache"), [({}, True), ({"neftune_noise_alpha": 5.0}, False)])
def test_the_plan_has_a_cache_only_if_the_run_can_have_one(demo_table, tmp_path, options, has_cache):
    assert (planned(demo_table, tmp_path, **options).estimate.cache is not None) is has_cache


def test_the_planned_cache_has_the_states_of_training_and_validation(demo_table, tmp_path):
    plan = planned(demo_table, tmp_path)
    data = load_deeploc(demo_table, max_residues=220)
    tokens = [min(n + 2, 200) for name in ("train", "validation") for n in data[name]["residues"]]
    assert len(tokens) > len(data["train"])
    assert plan.estimate.cache.bytes == StateFormat().bytes_for(np.array(tokens), 320).sum()


def test_the_plan_of_a_run_names_the_device_of_its_options(machine_with_a_gpu, demo_table, tmp_path):
    plan = planned(demo_table, tmp_path, use_cpu=True)
    assert plan.estimate.device.name == "cpu"
    assert "of cpu" in str(plan)


@pytest.mark.parametrize(
    ("sequences", "epochs", "warning"),
    [
        (
            45,
            1.5,
            "9 optimizer steps may be too few: with less than 100 the result may be below that of a linear probe. "
            "epochs=17 makes 102",
        ),
        (45, 17, None),
    ],
)
def test_the_planned_steps_are_those_of_the_trainer_and_few_of_them_are_warned_of(
    sequences, epochs, warning, tmp_path, tokenizer
):
    plans = []
    data = DatasetDict({name: make_proteins(n) for name, n in (("train", sequences), ("test", 8))})
    result = finetune(
        make_model(),
        data,
        tokenizer=tokenizer,
        recipe="frozen",
        output_dir=tmp_path,
        epochs=epochs,
        announce=plans.append,
        report=False,
    )
    assert [plan.steps for plan in plans] == [result.steps]
    assert plans[0].epochs == epochs
    assert list(result.warnings) == ([] if warning is None else [warning])


@pytest.mark.parametrize(
    ("sequences", "batch_size", "words"),
    [
        (42, 64, "the batch size 64 is more than the 42 training sequences.* the run has 3: batch_size=8 makes 18"),
        (12, 16, "the batch size 16 is more than the 12 training sequences.* the run has 3: batch_size=3 makes 12"),
        (42, 42, "3 optimizer steps may be too few"),
    ],
)
def test_a_batch_of_more_than_all_sequences_names_a_smaller_one(sequences, batch_size, words, tmp_path, caplog):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=batch_size, num_train_epochs=3, use_cpu=True)
    warn_of_few_steps(sequences, args)
    [record] = caplog.records
    assert re.match(words, record.getMessage())


def test_the_plan_has_the_options_of_the_run(demo_table, tmp_path):
    plain, checkpointed, other = (
        planned(demo_table, tmp_path, **options)
        for options in ({}, {"gradient_checkpointing": True}, {"optim": "adafactor"})
    )
    assert (plain.recipe.gradient_checkpointing, checkpointed.recipe.gradient_checkpointing) == (False, True)
    assert other.estimate is None
    assert "the memory of the optimizer" in other.reason
    assert "not estimated: " in str(other)


def test_on_a_cpu_a_plan_that_does_not_fit_names_no_command_that_needs_a_gpu():
    found = estimate(tiny_config(), recipe="frozen", device="cpu", tokens=9)
    small = dataclasses.replace(found, device=dataclasses.replace(found.device, memory=1))
    splits = DatasetDict(train=make_proteins(8), test=make_proteins(8))
    task = Task("single_label_classification", ("no", "yes"))
    plan = str(RunPlan("8M", "x.csv", describe(splits), RECIPES["frozen"], task, 3, 1, 8, small))
    assert "DOES NOT FIT" in plan
    assert "a smaller model" in plan
    assert "recommend" not in plan


@pytest.mark.parametrize(
    ("micro_batch", "cure"),
    [
        (8, "Try --micro-batch 1 (micro_batch=1 in Python), or a smaller model; this looks for a recipe that fits: "),
        (1, "Try a smaller model; this looks for a recipe that fits: "),
    ],
)
def test_a_plan_that_does_not_fit_says_what_to_try(micro_batch, cure):
    recipe = RECIPES["lora"].replace(micro_batch=micro_batch)
    found = estimate("8M", recipe=recipe, device="A10G", tokens=64)
    large = dataclasses.replace(found, peak=dataclasses.replace(found.peak, activations=2**40))
    splits = DatasetDict(train=make_proteins(8), test=make_proteins(8))
    task = Task("single_label_classification", ("no", "yes"))
    plan = RunPlan("8M", "x.csv", describe(splits), recipe, task, 3, 1, 8, large)
    [cost] = [line for line in str(plan).splitlines() if line.startswith("cost")]
    assert "DOES NOT FIT" in cost
    assert cost.endswith(f". {cure}esm-efficient recommend --model 8M --device A10G --tokens 64")
    for name in ("RTX 3060", "A10G"):
        other = dataclasses.replace(found.device, name=name, memory=12 * 2**30)
        unlike = dataclasses.replace(plan, estimate=dataclasses.replace(large, device=other))
        assert "recommend --model 8M --device 12GB --tokens 64" in str(unlike)
    assert "1 step of 8 sequences (3 epochs)" in str(plan)
    assert "Try" not in str(dataclasses.replace(plan, estimate=found))


def test_a_number_of_steps_that_was_given_is_not_warned_of(tmp_path, tokenizer):
    data = DatasetDict(train=make_proteins(16), test=make_proteins(8))
    result = finetune(make_model(), data, tokenizer=tokenizer, recipe="frozen", output_dir=tmp_path, max_steps=3)
    assert (result.steps, result.warnings) == (3, ())


def test_an_empty_training_split_is_our_error(tmp_path, tokenizer):
    data = DatasetDict(train=make_proteins(8).select([]), test=make_proteins(8))
    with pytest.raises(DataError, match="train"):
        finetune(make_model(), data, tokenizer=tokenizer, recipe="frozen", output_dir=tmp_path)


def test_labels_that_a_split_lacks_are_warnings_of_a_run(tmp_path, tokenizer):
    data = DatasetDict(train=make_proteins(16), test=make_proteins(8).filter(lambda row: row["label"] == 0))
    result = finetune(make_model(), data, tokenizer=tokenizer, recipe="frozen", output_dir=tmp_path, max_steps=1)
    assert [text.partition(":")[0] for text in result.warnings] == ["test has no example of the label yes"]


def test_what_is_read_of_long_sequences_is_a_warning_of_a_run(tmp_path, tokenizer):
    data = DatasetDict(train=make_proteins(16), test=make_proteins(8))
    options = {"recipe": "frozen", "output_dir": tmp_path, "max_steps": 1, "max_tokens": 6}
    result = finetune(make_model(), data, tokenizer=tokenizer, **options)
    assert any("their start was kept" in text for text in result.warnings)


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 79, "A100-80"),
        ("NVIDIA A100-PCIE-40GB", 39, "A100-40"),
        ("Tesla T4", 15, "T4"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX-4090"),
        ("NVIDIA L40S", 45, None),
        ("NVIDIA GeForce GT 430", 1, None),
        ("NVIDIA GH200 480GB", 95, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
    ],
)
def test_a_gpu_has_the_rates_of_the_device_of_its_name_alone(name, gib, known):
    found = gpu_named(name, gib * 2**30)
    assert found.memory == gib * 2**30
    assert (found.name, found.bandwidth > 0) == ((known, True) if known else (name, False))
