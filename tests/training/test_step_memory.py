"""The memory of a step on the page of a run: predicted beside measured, or one of them alone."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import make_dataset, make_model, tiny_config
from datasets import DatasetDict

from esm_efficient import demo_model_path, estimate, finetune, load_deeploc, load_result, stratified_sample
from esm_efficient.reporting.html import html_page
from esm_efficient.training.step_memory import StepMemory, memory_section, step_memory

pytestmark = pytest.mark.usefixtures("drawn_figures")
PEAK = {"weights": 3 * 2**20, "activations": 5 * 2**20, "total": 8 * 2**20}
MEASURED = StepMemory(measured_on="cuda:0", measured={"forward": PEAK}, counted="bytes of tensors")


@pytest.fixture(scope="module")
def predicted():
    return step_memory(estimate(tiny_config(), recipe="lora", device="cpu", tokens=20), None)


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=180)
    return DatasetDict({name: stratified_sample(split, 8) for name, split in splits.items()})


def text_of(memory):
    return html_page("page", [memory_section(memory)])


@pytest.mark.slow
def test_a_profiled_run_shows_both_and_so_does_its_folder(tmp_path, data):
    result = finetune(demo_model_path(), data, recipe="lora", output_dir=tmp_path, profile=True, disable_tqdm=True)
    memory = result.step_memory
    assert memory.predicted_for == memory.measured_on == "cpu"
    assert set(memory.predicted) == set(memory.measured) == {"forward", "backward", "optimizer"}
    assert memory.predicted["backward"]["total"] == pytest.approx(memory.measured["backward"]["total"], rel=0.25)
    page = result.page.read_text()
    assert "of the measured one" in page
    assert "Both are those of a CPU" in page
    assert "<td>backward</td><td>measured</td>" in page
    assert "backward, estimated" in page
    assert load_result(tmp_path).step_memory == memory
    assert load_result(tmp_path).to_html() == result.to_html()


def test_without_a_measurement_the_estimate_is_shown_alone(predicted):
    assert json.loads(json.dumps(predicted.to_dict()))["predicted_for"] == "cpu"
    page = text_of(predicted)
    assert "It was not measured" in page
    assert "<td>forward</td><td>estimated</td>" in page
    assert "<td>measured</td>" not in page
    assert "moments, in order" in page
    assert "Dashed" not in page


def test_the_pass_that_computes_the_cache_has_a_row_and_is_no_part_of_the_step():
    found = estimate(tiny_config(), recipe="top", device="cpu", tokens=20)
    memory = step_memory(found, None)
    section = memory_section(memory)
    assert section.parts[1].rows[0][:2] == ("caching", "estimated")
    assert max(peak["total"] for peak in memory.predicted.values()) == found.peak.total
    assert "Caching is the pass over the data" in section.parts[0]
    huge = dataclasses.replace(memory, predicted={**memory.predicted, "caching": {"total": 2**50}})
    measured = dataclasses.replace(huge, measured_on="cpu", measured=memory.predicted)
    assert "is 100 % of the measured one" in memory_section(measured).parts[0]


def test_without_an_estimate_the_measurement_is_shown_alone():
    page = text_of(MEASURED)
    assert "Before the run" not in page
    assert "8.00 MiB" in page
    assert "peak memory, MiB" in page
    assert step_memory(None, None) is None


def test_other_devices_are_said_to_differ(predicted):
    both = dataclasses.replace(predicted, measured_on="cuda:0", measured=MEASURED.measured)
    assert "The devices differ" in text_of(both)
    same = dataclasses.replace(both, predicted_for="A10G")
    assert "The devices differ" not in text_of(same)
    assert "CPU, whose kernels" not in text_of(same)


def test_a_run_without_sequences_has_no_estimate(tmp_path, tokenizer):
    data = DatasetDict(train=make_dataset(8), test=make_dataset(8))
    result = finetune(
        make_model(), data, tokenizer=tokenizer, recipe="frozen", output_dir=tmp_path, profile=True, disable_tqdm=True
    )
    assert result.step_memory.predicted is None
    assert result.step_memory.measured_on == "cpu"


@pytest.mark.slow
def test_the_estimate_does_not_change_the_run(tmp_path, data):
    said = []
    losses = [
        finetune(
            demo_model_path(), data, recipe="frozen", output_dir=tmp_path, announce=announce, disable_tqdm=True
        ).train_loss
        for announce in (None, said.append)
    ]
    assert losses[0] == losses[1]
    assert said[0].estimate is not None
