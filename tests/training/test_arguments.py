"""recipe_arguments(): options override a recipe, and a precision that cannot train is refused."""

from __future__ import annotations

import pytest
import torch

from esm_efficient import compat, recipe_arguments
from esm_efficient.errors import ConfigurationError
from esm_efficient.training.arguments import _uses_bf16


def test_options_override_those_of_the_recipe(tmp_path):
    args = recipe_arguments("all", tmp_path, learning_rate=5e-5, gradient_accumulation_steps=2)
    assert (args.learning_rate, args.gradient_accumulation_steps, args.per_device_train_batch_size) == (5e-5, 2, 2)
    assert compat.asks_for_checkpointing(args)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert compat.asks_for_checkpointing(recipe_arguments("base", tmp_path, **{name: True}))
        assert not compat.asks_for_checkpointing(recipe_arguments("all", tmp_path, **{name: False}))


def test_a_precision_for_estimates_or_an_unknown_one_is_refused(tmp_path):
    for precision in ("fp16", "pure-bf16"):
        with pytest.raises(ConfigurationError, match=f"precision='{precision}' is for estimates"):
            recipe_arguments("all", tmp_path, precision=precision)
    with pytest.raises(ConfigurationError, match="precision='fp8': expected"):
        recipe_arguments("all", tmp_path, precision="fp8")


@pytest.mark.parametrize("in_hardware", [True, False])
def test_auto_precision_is_bf16_only_where_the_hardware_multiplies_it(monkeypatch, in_hardware):
    """A T4 reports support for bfloat16, by emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or in_hardware
    )
    assert _uses_bf16("auto") is in_hardware
