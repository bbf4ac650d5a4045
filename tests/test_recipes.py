"""Recipes: their settings, and a learning rate that scales with the accumulated batch."""

from __future__ import annotations

import pytest

from esm_efficient import RECIPES, ConfigurationError, Recipe
from esm_efficient.recipes import get_recipe, select_layers


def test_the_seven_recipes():
    table = {
        r.name: (r.trains, r.accumulation > 1, r.gradient_checkpointing, r.preset is not None) for r in RECIPES.values()
    }
    assert [r.name for r in RECIPES.values() if r.pooling != "first"] == ["frozen"]
    assert table == {
        "base": ("full", False, False, False),
        "ga": ("full", True, False, False),
        "gc": ("full", False, True, False),
        "lora": ("adapters", False, False, True),
        "all": ("adapters", True, True, True),
        "top": ("adapters", False, False, True),
        "frozen": ("head", False, False, False),
    }


def test_every_recipe_takes_the_same_number_of_optimizer_steps():
    assert {r.batch_size for r in RECIPES.values()} == {8}


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"accumulation": 4}, 2e-3),
        ({"micro_batch": 2}, 5e-4),
        ({"micro_batch": 4, "accumulation": 2}, 1e-3),
        ({"accumulation": 4, "learning_rate": 3e-4}, 3e-4),
        ({"r": 16}, 1e-3),
    ],
)
def test_the_learning_rate_scales_with_the_root_of_the_accumulated_batch(changes, rate):
    assert RECIPES["lora"].replace(**changes).learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("name", "changes", "stays"),
    [
        ("top", {"layers": "all"}, False),
        ("top", {"layers": "top-2"}, False),
        ("top", {"cache": False}, False),
        ("base", {"layers": "top-2", "cache": True}, False),
        ("ga", {"accumulation": 1, "micro_batch": 8}, False),
        ("all", {"gradient_checkpointing": False}, False),
        ("lora", {"trains": "full", "preset": None, "r": None}, False),
        ("frozen", {"pooling": "mean"}, False),
        ("lora", {"keep_layers": 4}, False),
        ("lora", {"quantization": "4bit"}, False),
        ("top", {"layers": "top-1/3", "learning_rate": 1e-4, "micro_batch": 4, "r": 4}, True),
        ("all", {"accumulation": 8}, True),
    ],
)
def test_a_description_of_other_settings_is_dropped(name, changes, stays):
    recipe = RECIPES[name]
    assert recipe.replace(**changes).description == (recipe.description if stays else "")
    assert recipe.replace(**changes, description="mine").description == "mine"


@pytest.mark.parametrize(
    ("name", "changes", "cache"),
    [
        ("top", {}, True),
        ("top", {"layers": "top-1"}, True),
        ("top", {"layers": "all"}, False),
        ("top", {"layers": "all", "cache": True}, True),
        ("top", {"quantization": "4bit"}, False),
        ("frozen", {"layers": "all"}, True),
        ("lora", {"layers": "top-1"}, False),
    ],
)
def test_a_change_that_leaves_nothing_to_cache_turns_the_cache_off(name, changes, cache):
    assert RECIPES[name].replace(**changes).cache is cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trains": "adapters"}, "expected a preset and a rank with trains='adapters'"),
        ({"trains": "full", "preset": "qkv", "r": 8}, "and neither otherwise"),
        ({"trains": "adapters", "preset": "qkv"}, "expected a preset and a rank with trains='adapters'"),
        ({"trains": "full", "micro_batch": 0}, "micro_batch=0 .*expected at least 1 for both"),
        ({"trains": "full", "accumulation": 0}, "accumulation=0: expected at least 1 for both"),
        ({"trains": "full", "cache": True}, "cache=True with all parameters training"),
        ({"trains": "full", "layers": "bottom-2"}, "layers='bottom-2': expected \"all\""),
        ({"trains": "full", "layers": "top-0"}, "layers='top-0'"),
        ({"trains": "full", "layers": ()}, "expected at least one layer number"),
        ({"trains": "full", "layers": [-1]}, "expected at least one layer number, from 0"),
        ({"trains": "full", "pooling": "max"}, "pooling='max': expected one of first, mean, attention"),
        ({"trains": "full", "keep_layers": 0}, "keep_layers=0: expected at least 1 layer"),
    ],
)
def test_contradictory_settings_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Recipe("mine", learning_rate=1e-3, **options)


def test_the_error_for_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="base, ga, gc, lora, all, top, frozen"):
        get_recipe("everything")
    custom = Recipe("custom", "full", 1e-5)
    assert get_recipe(custom) is custom


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("top-1", 3, (2,)),
        ("top-11", 33, tuple(range(22, 33))),
        ("top-1/3", 33, tuple(range(22, 33))),
        ("top-1/3", 6, (4, 5)),
        ("top-1/6", 4, (3,)),
        ("top-1/2", 6, (3, 4, 5)),
        ([4, 0, 4], 6, (0, 4)),
    ],
)
def test_a_choice_of_layers_gives_their_numbers(layers, count, expected):
    assert select_layers(layers, count) == expected
    assert Recipe("mine", "full", 1e-4, layers=layers).trained_layers(count) == expected


@pytest.mark.parametrize(("layers", "count"), [("top-4", 3), ([3], 3), ("top-3/2", 6)])
def test_more_layers_than_the_encoder_has_are_refused(layers, count):
    with pytest.raises(ConfigurationError, match="the encoder has"):
        select_layers(layers, count)


def test_a_recipe_for_the_head_trains_no_layer():
    assert RECIPES["frozen"].trained_layers(6) == ()


@pytest.mark.parametrize("rate", ["1e-4", -1e-4, float("nan"), float("inf"), None, True])
def test_a_learning_rate_is_a_finite_number(rate):
    with pytest.raises(ConfigurationError, match=r"learning_rate=.*: expected a finite number, 0 or more"):
        RECIPES["lora"].replace(learning_rate=rate)


def test_an_unknown_setting_is_refused_with_those_of_a_recipe():
    with pytest.raises(ConfigurationError, match=r"no setting 'epochs': expected one of name, .*options of finetune"):
        RECIPES["lora"].replace(epochs=5)
