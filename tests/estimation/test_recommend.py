"""recommend(): only settings that fit are recommended, and the fastest of them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_efficient import RECIPES, Device, get_device, recommend
from esm_efficient.costs.devices import DEFAULT_DEVICE
from esm_efficient.errors import ConfigurationError

MIB = 2**20


def gpu(mib):
    return Device("test GPU", "cuda", mib * MIB, {"float32": 1e13, "bfloat16": 1e14}, 1e12)


@settings(max_examples=12, deadline=None)
@given(st.integers(30, 200), st.sampled_from([0.0, 0.1, 0.3]))
@pytest.mark.slow
def test_nothing_is_recommended_that_does_not_fit(mib, margin):
    limit = (1 - margin) * mib * MIB
    try:
        result = recommend("8M", gpu(mib), 100, batch_size=2, margin=margin, progress=False)
    except ConfigurationError as error:
        refusal = str(error)
        result = None
    if result is None:
        assert "no setting that was tried fits" in refusal
        assert limit < 60 * MIB  # the leanest setting needs less
        return
    assert result.chosen.peak.total <= limit
    assert result.recipe.batch_size == 2
    fitting = [a.estimate for a in result.attempts if a.estimate.peak.total <= limit]
    assert result.chosen.seconds <= 1.01 * min(e.seconds for e in fitting)
    for attempt in result.attempts:
        assert attempt.refused.startswith("does not fit") == (attempt.estimate.peak.total > limit)
    assert sum(not attempt.refused for attempt in result.attempts) == 1


@pytest.mark.slow
def test_a_smaller_device_gets_a_leaner_setting():
    options = {"batch_size": 2, "progress": False}
    peaks = [recommend("8M", gpu(mib), 100, **options).chosen.peak.total for mib in (1000, 60, 22)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_a_device_of_known_memory_alone_is_ranked_by_the_rates_of_the_usual_one():
    known, options = get_device(DEFAULT_DEVICE), {"batch_size": 1, "recipes": ["lora", "base"], "progress": False}
    config = tiny_config()
    expected = recommend(config, dataclasses.replace(known, memory=12 * 1024 * MIB), 100, **options)
    got = recommend(config, "12GB", 100, **options)
    assert got.chosen.device.memory == 12 * 1024 * MIB
    assert [a.estimate.seconds for a in got.attempts] == [a.estimate.seconds for a in expected.attempts]
    assert f"on 12GB with the rates of {DEFAULT_DEVICE} (12.0 GiB" in str(got)


def test_every_setting_has_the_batch_size_and_its_learning_rate():
    options = {"recipes": ["lora"], "presets": ["qkv", "mlp"], "progress": False}
    result = recommend(tiny_config(), gpu(4000), 50, batch_size=2, **options)
    assert {a.estimate.recipe.batch_size for a in result.attempts} == {2}
    assert {a.estimate.recipe.preset for a in result.attempts} == {"qkv", "mlp"}
    assert {a.estimate.recipe.micro_batch for a in result.attempts} == {1, 2}
    assert result.recipe.learning_rate == pytest.approx(RECIPES["lora"].learning_rate * 0.25**0.5)
    record = json.loads(json.dumps(result.to_dict()))
    assert (record["micro_batch"], record["chosen"]["fits"]) == (result.recipe.micro_batch, True)
    assert "taken" in str(result)


TOP = RECIPES["lora"].replace(layers="top-1/3")


def cached(result):
    return [a for a in result.attempts if a.estimate.cache is not None]


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "expected"), [(0.2, False), (10, True)])
def test_a_cache_is_recommended_if_it_pays_within_the_epochs(epochs, expected):
    options = {"batch_size": 2, "progress": False, "sequences": 500}
    result = recommend("150M", "A100-80", 200, recipes=[TOP], epochs=epochs, **options)
    assert (result.chosen.cache is not None) is expected
    assert len(cached(result)) == len(result.attempts) / 2 == 2
    pays_after = cached(result)[0].estimate.cache.pays_after
    assert (pays_after < epochs) is expected
    steps = round(epochs * 250)
    times = [a.estimate.run_seconds(steps) for a in result.attempts]
    assert result.chosen.run_seconds(steps) <= 1.01 * min(times)
    record = json.loads(json.dumps(result.to_dict()))
    assert (record["cached"], record["run_seconds"]) == (expected, result.chosen.run_seconds(steps))
    assert ("caching included" in str(result)) is expected


def test_a_cache_that_is_larger_than_the_disk_is_refused():
    options = {"batch_size": 1, "progress": False, "sequences": 500, "epochs": 50, "recipes": [TOP]}
    config = tiny_config(num_hidden_layers=3)
    free = recommend(config, "A10G", 100, **options)
    size = free.chosen.cache.bytes
    assert size == 500 * (100 * 16 * 2 + 1)  # one byte for the format
    enough, too_small = (recommend(config, "A10G", 100, disk=size - lack, **options) for lack in (0, 1))
    assert "fits the disk with 1.53 MiB" in str(enough)
    assert too_small.chosen.cache is None
    assert [a.refused for a in cached(too_small)] == ["the cache does not fit the disk: 1 B too much"]


def test_only_settings_with_a_cache_leave_out_recipes_that_train_everything():
    config = tiny_config(num_hidden_layers=3)
    result = recommend(
        config, "A10G", 50, cache=True, batch_size=1, progress=False, recipes=["base", "gc", "lora", "top"]
    )
    assert [a.estimate.recipe.name for a in result.attempts] == ["lora", "top"]


@pytest.mark.parametrize(
    "options", [{"recipes": []}, {"recipes": ["lora"], "presets": []}, {"recipes": ["base"], "cache": True}]
)
def test_nothing_to_try_is_refused(options):
    with pytest.raises(ConfigurationError, match="nothing to try: expected a recipe, and a preset"):
        recommend("8M", "A10G", **options)


def test_settings_without_a_cache_can_be_asked_for():
    options = {"batch_size": 1, "progress": False, "recipes": ["frozen", TOP, "lora"]}
    config = tiny_config(num_hidden_layers=3)
    assert not cached(recommend(config, "A10G", 50, cache=False, **options))
    both = recommend(config, "A10G", 50, **options)
    assert [a.estimate.recipe.cache for a in both.attempts] == [False, True, False, True, False]


def test_each_setting_of_a_model_with_dropout_is_tried_once_without_a_cache():
    config = tiny_config(hidden_dropout_prob=0.1)
    with pytest.raises(ConfigurationError, match="cache=True, but the model has dropout"):
        recommend(config, "A10G", cache=True)
    result = recommend(config, "A10G", 50, batch_size=2, recipes=["top"], progress=False)
    assert [(a.estimate.recipe.micro_batch, a.estimate.recipe.cache) for a in result.attempts] == [
        (2, False),
        (1, False),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "more than 0 epochs"),
        ({"epochs": math.nan}, "epochs=nan.* finite"),
        ({"epochs": math.inf}, "epochs=inf.* finite"),
        ({"margin": math.nan}, "margin=nan.* finite"),
        ({"disk": math.inf}, "disk=inf.* finite"),
        ({"disk": math.nan}, "disk=nan.* finite"),
        ({"presets": ["bogus"], "recipes": ["base"]}, "presets='bogus': expected some of qkv"),
        ({"cache": True, "recipes": [RECIPES["lora"].replace(quantization="4bit")]}, "without a cache"),
        ({"device": "cpu"}, "name a GPU"),
        ({"batch_size": 0}, "at least 1"),
        ({"margin": 1.0}, "below 1"),
        ({"recipes": ["best"]}, "no recipe is named"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        recommend("8M", options.pop("device", gpu(1000)), 50, progress=False, **options)


def test_on_a_quantised_checkpoint_the_recipes_with_adapters_are_tried(caplog):
    config = tiny_config()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    options = {"batch_size": 1, "progress": False}
    result = recommend(config, "A10G", 9, recipes=["base", "top"], **options)
    [attempt] = result.attempts
    assert (attempt.estimate.recipe.name, attempt.estimate.recipe.quantization) == ("top", "4bit")
    assert attempt.estimate.cache is None
    assert "only adapters train on a base in 4bit: base" in caplog.text
    with pytest.raises(ConfigurationError, match="only adapters train on a base in 4bit: expected a recipe"):
        recommend(config, "A10G", 9, recipes=["base", "frozen"], **options)
