"""Recipes: their settings, and a learning rate that scales with the accumulated batch."""

from __future__ import annotations

import pytest

from esm_efficient import RECIPES, ConfigurationError, Recipe
from esm_efficient.recipes import get_recipe


def test_the_six_recipes():
    table = {
        r.name: (r.trains, r.accumulation > 1, r.gradient_checkpointing, r.preset is not None) for r in RECIPES.values()
    }
    assert table == {
        "base": ("full", False, False, False),
        "ga": ("full", True, False, False),
        "gc": ("full", False, True, False),
        "lora": ("adapters", False, False, True),
        "all": ("adapters", True, True, True),
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
    "options",
    [
        {"trains": "adapters"},
        {"trains": "full", "preset": "qkv", "r": 8},
        {"trains": "adapters", "preset": "qkv"},
        {"trains": "full", "micro_batch": 0},
        {"trains": "full", "accumulation": 0},
    ],
)
def test_contradictory_settings_are_refused(options):
    with pytest.raises(ConfigurationError):
        Recipe("mine", learning_rate=1e-3, **options)


def test_the_error_for_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="base, ga, gc, lora, all, frozen"):
        get_recipe("everything")
    custom = Recipe("custom", "full", 1e-5)
    assert get_recipe(custom) is custom
