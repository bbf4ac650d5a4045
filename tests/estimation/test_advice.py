"""Advice after an out-of-memory error: the nearest setting that fits, and the message."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import make_model
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

from esm_efficient import Device, Recipe, apply_lean_encoder, estimate, lora_config, prepare_model, split_model
from esm_efficient.costs.memory import Memory
from esm_efficient.estimation.advice import explain_out_of_memory, nearest_fit

MIB = 2**20


def gpu(mib):
    return Device("test GPU", "cuda", mib * MIB, {"float32": 1e13, "bfloat16": 1e14}, 1e12)


def describe(result):
    recipe = result.recipe
    return recipe.micro_batch, recipe.accumulation, recipe.gradient_checkpointing, recipe.trains


@pytest.mark.slow
def test_the_nearest_setting_changes_as_little_as_possible():
    model = make_model(hidden_size=128, intermediate_size=512, num_attention_heads=8)
    options = {"micro_batch": 4, "accumulation": 1, "tokens": 200}

    def nearest(mib):
        return nearest_fit(model, memory=int(mib * MIB), **options)

    def peak(**changes):
        settings = {"recipe": "base", "micro_batch": 4, "tokens": 200, "device": gpu(1), "precision": "float32"}
        return estimate(model, padding="padded", **(settings | changes)).peak.total / MIB / 0.9

    halved = peak(micro_batch=2, accumulation=2)
    assert describe(nearest(halved + 0.01)) == (2, 2, False, "full")
    single = peak(micro_batch=1, accumulation=4)
    assert single < halved
    assert describe(nearest(single + 0.01)) == (1, 4, False, "full")
    assert describe(nearest(single - 0.1))[2] is True
    leanest = peak(recipe="all", micro_batch=1, accumulation=4)
    assert describe(nearest(leanest + 0.01)) == (1, 4, True, "adapters")
    assert nearest(leanest - 0.1) is None
    apply_lean_encoder(model)
    assert nearest(single + 0.01).recipe.micro_batch > 1


def test_adapters_keep_their_preset_and_rank():
    model = make_model(hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    prepared = prepare_model(model, adapters=lora_config(model, preset="qkv", r=3), dtype=torch.bfloat16)
    options = {"micro_batch": 8, "accumulation": 2, "tokens": 200, "dtype": torch.bfloat16}
    found = nearest_fit(prepared, memory=40 * MIB, **options)
    assert (found.recipe.preset, found.recipe.r, found.precision) == ("qkv", 3, "bf16")
    assert found.recipe.batch_size == 16


@pytest.mark.parametrize("trains", ["full", "adapters"])
def test_advice_is_for_the_layers_that_train(trains):
    model = make_model(hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    adapters = lora_config(model, layers="top-1") if trains == "adapters" else None
    prepared = prepare_model(model, adapters=adapters, layers="top-1", dtype=torch.float32)
    found = nearest_fit(prepared, memory=10**12, micro_batch=4, accumulation=1, tokens=200)
    assert (found.recipe.trains, found.recipe.layers) == (trains, (3,))
    settings = {"preset": "all-linear", "r": 8} if trains == "adapters" else {}
    recipe = Recipe("own", trains, 1e-3, micro_batch=2, accumulation=2, layers=(3,), **settings)
    options = {"tokens": 200, "device": gpu(1), "precision": "float32", "padding": "padded"}
    assert found.peak.total == estimate(model, recipe=recipe, **options).peak.total


def test_advice_takes_attention_and_adapters_from_the_model():
    model = make_model(hidden_size=128, intermediate_size=512, num_attention_heads=8)
    model.set_attn_implementation("eager")
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.1)
    prepared = prepare_model(model, adapters=config)
    found = nearest_fit(prepared, memory=10**12, micro_batch=4, accumulation=1, tokens=100, dtype=torch.bfloat16)
    expected = estimate(
        model,
        recipe=Recipe("own", "adapters", 1e-3, micro_batch=2, accumulation=2, preset="qkv", r=4),
        device=gpu(1),
        tokens=100,
        precision="bf16",
        optimizer="adamw_foreach",
        attention="eager",
        adapter_options={"target_modules": ["query", "value"], "lora_dropout": 0.1},
    )
    assert found.peak == expected.peak
    assert found.recipe.preset == "attention.self.query, attention.self.value"


def test_advice_for_a_run_on_cached_states_is_for_the_part_that_trains():
    _, rest = split_model(make_model(hidden_size=128, intermediate_size=512, num_hidden_layers=4), 1)
    prepared = prepare_model(rest, adapters=lora_config(rest, layers="top-1"), dtype=torch.float32)
    found = nearest_fit(prepared, memory=10**12, micro_batch=4, accumulation=1, tokens=200)
    assert (found.recipe.cache, found.recipe.layers) == (True, (3,))
    recipe = Recipe("own", "adapters", 1e-3, 2, 2, preset="all-linear", r=8, layers=(3,), cache=True)
    options = {"tokens": 200, "device": gpu(1), "precision": "float32", "padding": "padded"}
    assert found.peak == estimate(rest, recipe=recipe, **(options | {"optimizer": "adamw_foreach"})).peak


def lora_on(targets):
    return LoraConfig(task_type="SEQ_CLS", target_modules=targets)


ADAPTERS = {
    "all-linear": (lora_on("all-linear"), "all-linear"),
    "embeddings": (lora_on(["query", "word_embeddings"]), "attention.self.query"),
    "pattern": (lora_on(r".*\.query"), "attention.self.query"),
    "no linear layer": (lora_on(["word_embeddings"]), ""),
    "prompt": (PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4), ""),
    "IA3": (IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[]), ""),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_advice_is_for_the_adapters_that_can_be_estimated(kind):
    config, setting = ADAPTERS[kind]
    model = get_peft_model(make_model(), config)
    error, held = torch.OutOfMemoryError("CUDA out of memory."), Memory()
    explained = explain_out_of_memory(
        error, phase="backward", held=held, model=model, batch=(2, 9), memory=2**37, accumulation=1
    )
    assert ("By the estimator" in str(explained)) == bool(setting)
    assert f"LoRA on {setting}, micro-batch 1 x accumulation 2" in str(explained) or not setting
    assert "no setting would fit" not in str(explained)
    assert str(explained).endswith("torch said: CUDA out of memory.")


class WithoutConfigForSequenceClassification(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    ("kind", "logged"),
    [(torch.nn.Linear, "Linear has an unknown head"), (WithoutConfigForSequenceClassification, "Traceback")],
)
def test_an_error_is_explained_even_if_nothing_can_be_advised(kind, logged, caplog):
    model = kind(2, 2)
    options = {"phase": "forward", "held": Memory(), "batch": (2, 9), "memory": 2**37}
    explained = explain_out_of_memory(torch.OutOfMemoryError("no memory"), model=model, **options)
    assert "micro-batch of 2 x 9 tokens. torch said: no memory" in str(explained)
    assert logged in caplog.text


def test_an_out_of_memory_error_names_a_setting_that_fits():
    model = make_model(hidden_size=128, intermediate_size=512, num_attention_heads=8)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    halved = estimate(
        model,
        recipe="base",
        micro_batch=2,
        accumulation=2,
        tokens=200,
        device=gpu(1),
        precision="float32",
        padding="padded",
    )
    memory = int(halved.peak.total / 0.9) + 1
    options = {"phase": "backward", "held": Memory(weights=5, activations=7), "model": model, "batch": (4, 200)}
    explained = explain_out_of_memory(error, memory=memory, **options)
    assert "in the phase 'backward'" in str(explained)
    assert "activations 7 B" in str(explained)
    assert "by the estimator this setting would fit" in str(explained).lower()
    assert "micro-batch 2 x accumulation 2" in str(explained)
    assert (explained.phase, explained.held["total"]) == ("backward", 12)
    assert "no setting would fit" in str(explain_out_of_memory(error, memory=MIB, **options))
    assert "estimator" not in str(explain_out_of_memory(error, memory=0, **options))


def test_advice_raises_no_deprecation_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert nearest_fit(make_model(), memory=2**40, micro_batch=2, accumulation=1, tokens=8) is not None
