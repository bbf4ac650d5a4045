"""finetune() with a recipe that caches the states of the layers which do not train."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import slow_except
from datasets import DatasetDict, IterableDatasetDict
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from esm_efficient import (
    RECIPES,
    PooledEsmForSequenceClassification,
    Predictor,
    demo_model_path,
    finetune,
    load_deeploc,
    stratified_sample,
    tokenize_dataset,
)
from esm_efficient.heads import pooling_of_model
from esm_efficient.trunk import cache, shards


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=220)
    return DatasetDict({name: stratified_sample(split, 24) for name, split in splits.items()})


def run(recipe, data, folder, **options):
    return finetune(demo_model_path(), data, recipe=recipe, output_dir=folder, disable_tqdm=True, **options)


def logits_in_plain_transformers(result, sequences):
    pooling = pooling_of_model(result.model)
    if pooling != "first":
        kind = PooledEsmForSequenceClassification
        adapted = result.model_dir.name == "adapter"
        model = kind.from_pretrained(
            demo_model_path() if adapted else result.model_dir, classifier_pooling=pooling, num_labels=2
        )
        model = PeftModel.from_pretrained(model, result.model_dir) if adapted else model
    elif result.model_dir.name == "adapter":
        model = AutoPeftModelForSequenceClassification.from_pretrained(result.model_dir, num_labels=2)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(result.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    with torch.no_grad():
        return model.eval()(**tokenizer(sequences, return_tensors="pt", padding=True)).logits


RECIPES_TO_CACHE = {
    "head": RECIPES["frozen"].replace(pooling="first"),
    "head on the mean": RECIPES["frozen"].replace(pooling="mean"),
    "head with attention": RECIPES["frozen"].replace(pooling="attention"),
    "adapters, head on the mean": RECIPES["lora"].replace(layers="top-1", pooling="mean"),
    "adapters": RECIPES["lora"].replace(layers="top-1"),
    "adapters, checkpointing": RECIPES["all"].replace(layers=[1, 3]),
    "all layers": RECIPES["lora"],
    "full": RECIPES["base"].replace(layers="top-1/2"),
    "plain encoder": RECIPES["lora"].replace(layers="top-1", encoder="plain"),
}


def test_an_adapter_has_the_whole_path_of_its_base_and_the_trunk_is_hashed_once(tmp_path, data, monkeypatch):
    """The path holds in every folder, and one hash serves training and validation."""
    hashed = []
    real = cache._hash_model
    monkeypatch.setattr(cache, "_hash_model", lambda trunk: hashed.append(trunk) or real(trunk))
    shutil.copytree(demo_model_path(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    result = finetune("base", data, recipe="top", output_dir="out", max_steps=2, save_strategy="steps", save_steps=1)
    assert len(hashed) == 1
    configs = [*Path("out").rglob("adapter_config.json")]
    assert len(configs) == 3  # the adapter and two checkpoints
    for config in configs:
        assert json.loads(config.read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    folder = result.model_dir.absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Predictor.load(folder).predict(["MKTAYIAKQR"])


@pytest.mark.parametrize("name", slow_except(RECIPES_TO_CACHE, "adapters"))
def test_a_cached_run_gives_the_model_and_the_metrics_of_the_same_run_without_a_cache(tmp_path, data, name):
    recipe = RECIPES_TO_CACHE[name]
    options = {"num_train_epochs": 2, "eval_strategy": "epoch"}
    plain, cached = (
        run(recipe.replace(cache=cache), data, tmp_path / str(cache), **options) for cache in (False, True)
    )
    assert cached.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    assert cached.metrics == pytest.approx(plain.metrics, rel=1e-3, abs=1e-5)
    for field in ("steps", "trainable_parameters", "total_parameters", "trained_layers", "layers"):
        assert getattr(cached, field) == getattr(plain, field)
    assert cached.states_seconds > 0
    assert plain.states_seconds == 0
    residues = [result.residues_per_second * result.seconds for result in (plain, cached)]
    assert residues[1] == pytest.approx(residues[0])
    weights = [result.model.state_dict() for result in (plain, cached)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5)
    sequences = data["test"]["sequence"][:4]
    got, expected = (logits_in_plain_transformers(result, sequences) for result in (cached, plain))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    files = {path.name for path in cached.model_dir.iterdir()}
    assert files == {path.name for path in plain.model_dir.iterdir()}


@pytest.mark.parametrize(("pooling", "states"), [("first", 1), ("mean", 1), ("attention", None)])
def test_a_frozen_run_keeps_one_state_per_protein_if_the_head_reads_no_more(tmp_path, data, pooling, states):
    run(RECIPES["frozen"].replace(pooling=pooling), data, tmp_path, max_steps=1)
    width, rows = 128, sum(len(data[name]) for name in data if name != "test")
    size = sum(path.stat().st_size for path in (tmp_path / "states").rglob("*.arrow"))
    assert (size < 2 * rows * width * 4) is (states == 1)


@pytest.mark.parametrize(
    ("options", "trained"),
    slow_except(
        [
            ({"layers": "top-1/2"}, (2, 3)),
            ({"layers": [1, 3]}, (1, 3)),
            ({"layers": "all"}, (0, 1, 2, 3)),
            ({"layers_to_transform": [0, 3]}, (0, 3)),
            ({"layers_to_transform": 2, "preset": "qkv", "r": 2}, (2,)),
        ],
        ({"layers": [1, 3]}, (1, 3)),
    ),
    ids=str,
)
def test_options_of_adapters_choose_the_layers_of_a_run_on_cached_states(tmp_path, data, options, trained):
    result = run("top", data, tmp_path, epochs=1, probe=False, adapter_options=options)
    assert result.trained_layers == trained
    adapters = [name for name, _ in result.model.named_parameters() if "lora_A" in name]
    if "r" in options:
        assert len(adapters) == 3
        assert result.model.peft_config["default"].r == 2


def test_runs_that_share_a_folder_compute_the_states_once(tmp_path, data, monkeypatch):
    recipe = RECIPES["lora"].replace(layers="top-1", cache=True)
    first = run(recipe, data, tmp_path / "a", states_dir=tmp_path / "states")
    monkeypatch.setattr(shards, "compute_states", None)  # a second computation would fail
    again = run(recipe, data, tmp_path / "b", states_dir=tmp_path / "states")
    assert again.metrics == first.metrics
    assert not (tmp_path / "a" / "states").exists()


def test_a_cached_run_resumes_as_the_whole_run(tmp_path, data):
    recipe = RECIPES["base"].replace(layers="top-1", cache=True)
    options = {"states_dir": tmp_path / "states", "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = run(recipe, data, tmp_path / "whole", **options)
    for number in (4, 6):
        for path in sorted((tmp_path / "whole" / f"checkpoint-{number}").iterdir()):
            path.unlink()
        (tmp_path / "whole" / f"checkpoint-{number}").rmdir()
    resumed = run(recipe, data, tmp_path / "whole", resume_from_checkpoint=True, **options)
    assert (resumed.steps_resumed, resumed.steps) == (2, 6)
    assert resumed.metrics == pytest.approx(whole.metrics, rel=1e-6)


@pytest.mark.parametrize("recipe", ["frozen", "top"])
def test_the_speed_of_a_resumed_run_is_that_of_its_own_steps(tmp_path, data, recipe):
    options = {"states_dir": tmp_path / "states", "save_strategy": "epoch", "probe": False}
    run(recipe, data, tmp_path / "run", epochs=2, **options)
    found = run(recipe, data, tmp_path / "run", epochs=3, resume_from_checkpoint=True, **options)
    residues = sum(map(len, data["train"]["sequence"]))
    assert found.steps_resumed == 2 * found.steps // 3 > 0
    assert found.residues_per_second * found.seconds == pytest.approx(residues, rel=0.01)


def test_the_saved_model_predicts_from_sequences(tmp_path, data):
    result = run("frozen", data, tmp_path)
    assert len(Predictor.load(result.model_dir).predict(data["test"]["sequence"][:3])) == 3


def test_a_model_with_dropout_trains_without_a_cache_and_says_so(tmp_path, data, caplog):
    model = AutoModelForSequenceClassification.from_pretrained(
        demo_model_path(), num_labels=2, hidden_dropout_prob=0.1, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    with caplog.at_level(logging.WARNING):
        result = finetune(
            model, data, recipe="frozen", tokenizer=tokenizer, output_dir=tmp_path, disable_tqdm=True, max_steps=2
        )
    assert "dropout" in caplog.text
    assert result.states_seconds == 0


def test_noise_in_the_embeddings_reaches_the_model_and_the_run_says_why_it_has_no_cache(tmp_path, data, caplog):
    plain, noisy = (
        finetune(demo_model_path(), data, output_dir=tmp_path, max_steps=2, report=False, disable_tqdm=True, **options)
        for options in ({}, {"neftune_noise_alpha": 500.0})
    )
    assert noisy.train_loss != pytest.approx(plain.train_loss, rel=1e-4)
    assert "neftune_noise_alpha adds noise to the embeddings" in caplog.text


def test_a_stream_trains_without_a_cache_and_says_so(tmp_path, data, caplog):
    tokenized, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(demo_model_path()))
    streams = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in tokenized.items()})
    with caplog.at_level(logging.WARNING):
        result = run("frozen", streams, tmp_path, max_steps=2, class_weights=None)
    assert "stream" in caplog.text
    assert result.states_seconds == 0
