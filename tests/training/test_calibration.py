"""Temperature scaling makes probabilities come true, and changes no class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_model
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_efficient import Predictor, Recipe, finetune, load_result
from esm_efficient.tasks import Task
from esm_efficient.training import calibration
from esm_efficient.training.calibration import fit_temperature, scale_logits

CLASSES = Task("single_label_classification", ("a", "b", "c"))
RESIDUES = Task("token_classification", ("a", "b", "c"))
SEVERAL = Task("multi_label_classification", ("a", "b", "c"))
NUMBERS = Task("regression", ("a",))


def draw(task, number=4000, seed=0):
    """Return labels that are drawn with the probabilities of the logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(number, 3))
    if task.kind == "multi_label_classification":
        return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float), logits
    return (logits + rng.gumbel(size=logits.shape)).argmax(axis=1), logits


@settings(max_examples=20)  # each fits 4,000 examples
@given(temperature=st.floats(0.2, 8), task=st.sampled_from([CLASSES, RESIDUES, SEVERAL]))
def test_the_temperature_that_was_applied_is_found(temperature, task):
    labels, logits = draw(task)
    assert fit_temperature(task, labels, logits * temperature) == pytest.approx(temperature, rel=0.12)


def test_unknown_labels_do_not_count():
    labels, logits = draw(RESIDUES, 400)
    table, scores = np.full((2, 300), -100), np.full((2, 300, 3), 50.0)
    table[:, :200], scores[:, :200] = labels.reshape(2, 200), logits.reshape(2, 200, 3)
    assert fit_temperature(RESIDUES, table, scores) == pytest.approx(fit_temperature(RESIDUES, labels, logits))
    labels, logits = draw(SEVERAL, 400)
    changed, holes = logits.copy(), labels.copy()
    changed[:40], holes[:40] = 99.0, np.nan
    assert fit_temperature(SEVERAL, holes, changed) == pytest.approx(fit_temperature(SEVERAL, labels[40:], logits[40:]))


@pytest.mark.parametrize(("task", "number"), [(CLASSES, 99), (NUMBERS, 1000), (SEVERAL, 33)])
def test_numbers_and_few_examples_have_no_temperature(task, number):
    labels, logits = draw(SEVERAL if task is SEVERAL else CLASSES, number)
    assert fit_temperature(task, labels, logits[:, :1] if task is NUMBERS else logits) is None


@pytest.mark.parametrize("number", [150, 300, 3000])
@pytest.mark.parametrize("task", [CLASSES, SEVERAL])
def test_a_model_that_is_always_right_claims_what_the_number_of_examples_can_show(task, number):
    labels = np.arange(number) % 3
    logits = 3 * np.eye(3)[labels] - 1.5
    several = task is SEVERAL
    temperature = fit_temperature(task, np.eye(3)[labels] if several else labels, logits)
    z = logits[0] / temperature
    claimed = 1 / (1 + np.exp(-z[0])) if several else np.exp(z[0]) / np.exp(z).sum()
    known = number * 3 if several else number
    assert claimed == pytest.approx((known + 1) / (known + (2 if several else 3)), abs=1e-6)


def test_noise_in_the_logits_of_a_model_that_is_always_right_hardly_moves_the_temperature():
    labels = np.arange(150) % 3
    logits = 4 * np.eye(3)[labels] + np.random.default_rng(0).normal(size=(150, 3)) * 0.5
    moved = logits + np.random.default_rng(1).normal(size=(150, 3)) * 1e-6
    assert fit_temperature(CLASSES, labels, moved) == pytest.approx(fit_temperature(CLASSES, labels, logits), rel=1e-5)


def test_a_scaled_layer_computes_divided_logits():
    layer, inputs = torch.nn.Linear(4, 3), torch.randn(5, 4)
    before = layer(inputs).detach()
    scale_logits(layer, 2.5)
    torch.testing.assert_close(layer(inputs), before / 2.5)


def make_split(number, seed):
    rng = np.random.default_rng(seed)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 12)) for _ in range(number)]
    features = Features({"sequence": Value("string"), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"sequence": sequences, "label": [i % 2 for i in range(number)]}, features=features)


@pytest.mark.parametrize("trains", ["adapters", "full", "head"])
def test_finetune_saves_a_model_whose_logits_are_divided_and_whose_classes_are_the_same(
    trains, tmp_path, tokenizer, monkeypatch
):
    recipe = Recipe("quick", trains, 1e-2, **({"preset": "qkv", "r": 2} if trains == "adapters" else {}))
    splits = {name: make_split(8, seed) for seed, name in enumerate(("train", "validation", "test"))}
    states = {"output_hidden_states": True} if trains == "full" else {}  # beside the logits
    make_model(**states).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    results = []
    for least in (10**6, 8):
        monkeypatch.setattr(calibration, "MIN_EXAMPLES", least)
        results.append(finetune(tmp_path / "base", splits, recipe=recipe, output_dir=tmp_path / str(least)))
    plain, calibrated = results
    assert plain.temperature is None
    assert calibrated.temperature != pytest.approx(1, abs=1e-3)
    expected = plain.evaluation.scores / calibrated.temperature
    np.testing.assert_allclose(calibrated.evaluation.scores, expected, rtol=1e-4, atol=1e-5)
    assert calibrated.metrics["mcc"] == plain.metrics["mcc"]
    assert load_result(tmp_path / "8").temperature == calibrated.temperature
    logits = Predictor.load(calibrated.model_dir).logits(splits["test"]["sequence"])
    np.testing.assert_allclose(np.stack(logits), expected, rtol=1e-3, atol=1e-4)


def test_without_a_test_split_nothing_is_calibrated(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration, "MIN_EXAMPLES", 4)
    splits = {"train": make_dataset(8), "validation": make_dataset(8, seed=1)}
    result = finetune(make_model(), splits, recipe="lora", output_dir=tmp_path, tokenizer=tokenizer)
    assert result.temperature is None
