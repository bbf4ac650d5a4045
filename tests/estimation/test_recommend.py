from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from esm_efficient import RECIPES, Device, Recipe, apply_lean_encoder, estimate, lora_config, prepare_model, recommend
from esm_efficient.costs.memory import Memory
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.advice import explain_out_of_memory, nearest_fit

MIB = 2**20


def gpu(mib, **changes):
    return Device("test GPU", "cuda", mib * MIB, {"float32": 1e13, "bfloat16": 1e14}, 1e12, **changes)


@settings(max_examples=12, deadline=None)
@given(st.integers(30, 200), st.sampled_from([0.0, 0.1, 0.3]))
def test_nothing_is_recommended_that_does_not_fit(mib, margin):
    limit = (1 - margin) * mib * MIB
    try:
        result = recommend("8M", gpu(mib), 100, batch_size=2, margin=margin, progress=False)
    except ConfigurationError as error:
        refusal = str(error)
        result = None
    if result is None:
        assert "nothing that was tried fits" in refusal
        assert limit < 60 * MIB  # which the leanest setting fits
        return
    assert result.chosen.peak.total <= limit
    assert result.recipe.batch_size == 2
    fitting = [a.estimate for a in result.attempts if a.estimate.peak.total <= limit]
    assert result.chosen.seconds <= 1.01 * min(e.seconds for e in fitting)
    for attempt in result.attempts:
        assert attempt.refused.startswith("does not fit") == (attempt.estimate.peak.total > limit)
    assert sum(not attempt.refused for attempt in result.attempts) == 1


def test_a_smaller_device_gets_a_leaner_setting():
    options = {"batch_size": 2, "progress": False}
    peaks = [recommend("8M", gpu(mib), 100, **options).chosen.peak.total for mib in (1000, 80, 28)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_the_accumulated_batch_is_the_wanted_one_and_the_rate_follows_it():
    result = recommend("8M", gpu(4000), 50, batch_size=2, recipes=["lora"], presets=["qkv", "mlp"], progress=False)
    assert {a.estimate.recipe.batch_size for a in result.attempts} == {2}
    assert {a.estimate.recipe.preset for a in result.attempts} == {"qkv", "mlp"}
    assert {a.estimate.recipe.micro_batch for a in result.attempts} == {1, 2}
    assert result.recipe.learning_rate == pytest.approx(RECIPES["lora"].learning_rate * 0.25**0.5)
    record = json.loads(json.dumps(result.to_dict()))
    assert (record["micro_batch"], record["chosen"]["fits"]) == (result.recipe.micro_batch, True)
    assert "taken" in str(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "name a GPU"),
        ({"batch_size": 0}, "at least 1"),
        ({"margin": 1.0}, "below 1"),
        ({"recipes": ["best"]}, "no recipe is named"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        recommend("8M", options.pop("device", gpu(1000)), 50, progress=False, **options)


def describe(found):
    return found.recipe.micro_batch, found.recipe.accumulation, found.recipe.gradient_checkpointing, found.recipe.trains


def test_the_nearest_setting_changes_as_little_as_it_must():
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


def test_adapters_stay_what_they_are():
    model = make_model(hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    prepared = prepare_model(model, adapters=lora_config(model, preset="qkv", r=3), dtype=torch.bfloat16)
    options = {"micro_batch": 8, "accumulation": 2, "tokens": 200, "dtype": torch.bfloat16}
    found = nearest_fit(prepared, memory=40 * MIB, **options)
    assert (found.recipe.preset, found.recipe.r, found.precision) == ("qkv", 3, "bf16")
    assert found.recipe.batch_size == 16


def test_the_advice_is_for_the_run_as_it_is():
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
    assert found.recipe.preset == "query, value"
    assert nearest_fit(torch.nn.Linear(2, 2), memory=1, micro_batch=1, accumulation=1, tokens=1) is None


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
    assert "by the estimator this would fit" in str(explained).lower()
    assert "micro-batch 2 x accumulation 2" in str(explained)
    assert (explained.phase, explained.held["total"]) == ("backward", 12)
    assert "nothing that was tried would fit" in str(explain_out_of_memory(error, memory=MIB, **options))
    assert "estimator" not in str(explain_out_of_memory(error, memory=0, **options))
