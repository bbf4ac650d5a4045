"""A run that keeps the lowest layers trains, saves, predicts, exports and is estimated as the smaller model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import slow_except
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from esm_efficient import (
    RECIPES,
    Predictor,
    demo_model_path,
    estimate,
    export_model,
    finetune,
    load_deeploc,
    truncate,
)
from esm_efficient.errors import ConfigurationError

SEQUENCES = ["MKTAYIAKQR", "MALWMRLLPLLALLALWGPDPAAA"]
TOP_HALF = dataclasses.replace(RECIPES["base"], layers="top-1/2")


@pytest.fixture(scope="module")
def data(demo_table):
    return load_deeploc(demo_table, max_residues=180)


def loaded():
    return AutoModelForSequenceClassification.from_pretrained(demo_model_path())


def run(folder, data, recipe, **options):
    torch.manual_seed(0)
    return finetune(
        options.pop("model", demo_model_path()),
        data,
        recipe=recipe,
        output_dir=folder,
        max_steps=2,
        learning_rate=1e-2,
        probe=False,
        disable_tqdm=True,
        **options,
    )


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model.cpu().eval()(**tokenizer(SEQUENCES, return_tensors="pt", padding=True)).logits.float()


@pytest.mark.parametrize(
    ("recipe", "precision"),
    slow_except(
        [("lora", "float32"), ("top", "bf16"), ("top", "float32"), (TOP_HALF, "bf16"), ("frozen", "float32")],
        ("lora", "float32"),
        (TOP_HALF, "bf16"),
    ),
)
def test_what_was_trained_is_what_predicts(tmp_path, data, recipe, precision):
    result = run(tmp_path, data, recipe, keep_layers=2, precision=precision)
    assert result.model.config.num_hidden_layers == 2
    assert result.layers == 2
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    expected = logits_of(result.model.float(), tokenizer)
    for folder in (result.model_dir, export_model(tmp_path, tmp_path / "exported", base_model="a/demo")):
        predictor = Predictor.load(folder)
        assert predictor.model.config.num_hidden_layers == 2
        # bfloat16 rounds what does not train.
        found = torch.tensor([prediction.values for prediction in predictor.predict(SEQUENCES)])
        tolerance = 1e-5 if precision == "float32" else 0.05
        torch.testing.assert_close(found, expected.softmax(-1), atol=tolerance, rtol=0, check_dtype=False)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert len(plain.esm.encoder.layer) == 2
    card = (result.model_dir / "README.md").read_text()
    assert "the lowest 2 of 4" in card
    # Plain transformers would load the base model of adapters with all its layers, and no head that pools.
    has_adapters = (result.model_dir / "adapter_config.json").is_file()
    assert has_adapters is (recipe in ("lora", "top"))
    assert ("With transformers alone" in card) is (not has_adapters and recipe != "frozen")


def test_a_truncated_model_object_is_saved_as_one(tmp_path, data):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    result = run(tmp_path, data, "lora", model=truncate(loaded(), 3), tokenizer=tokenizer)
    predictor = Predictor.load(result.model_dir)
    assert predictor.model.config.num_hidden_layers == 3
    found = torch.tensor([prediction.values for prediction in predictor.predict(SEQUENCES)])
    torch.testing.assert_close(
        found, logits_of(result.model, tokenizer).softmax(-1), atol=1e-5, rtol=0, check_dtype=False
    )


def test_the_same_run_from_a_name_and_from_a_truncated_folder(tmp_path, data):
    truncate(loaded().base_model, 2).save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(tmp_path / "short")
    kept = run(tmp_path / "a", data, "lora", keep_layers=2)
    short = run(tmp_path / "b", data, "lora", model=tmp_path / "short")
    assert kept.metrics == pytest.approx(short.metrics)


def test_adapters_of_another_depth_are_no_ensemble(tmp_path, data):
    runs = [run(tmp_path / str(kept), data, "lora", keep_layers=kept) for kept in (2, 3)]
    with pytest.raises(ConfigurationError, match="must have the same head"):
        Predictor.load([result.model_dir for result in runs])


@pytest.mark.parametrize("recipe", ["base", "lora", "top"])
def test_the_estimate_is_that_of_the_smaller_model(recipe):
    config = AutoConfig.from_pretrained(demo_model_path())
    smaller = AutoConfig.from_pretrained(demo_model_path(), num_hidden_layers=2)
    options = {"tokens": 60, "device": "A10G"}
    found = estimate(config, recipe=dataclasses.replace(RECIPES[recipe], keep_layers=2), **options)
    expected = estimate(smaller, recipe=recipe, **options)
    assert found.peak == expected.peak
    assert found.seconds == expected.seconds
    assert found.total_parameters == expected.total_parameters
    assert "the lowest 2 layers alone" in str(found)
    with pytest.raises(ConfigurationError, match="keep_layers=5: expected 1 to 4 layers"):
        estimate(config, recipe=dataclasses.replace(RECIPES[recipe], keep_layers=5), **options)


def test_more_layers_than_there_are_are_refused(tmp_path, data):
    with pytest.raises(ConfigurationError, match=r"^keep_layers=5: expected 1 to 4 layers to keep"):
        run(tmp_path, data, "lora", keep_layers=5)
