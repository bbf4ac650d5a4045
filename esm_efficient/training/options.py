"""The options of a run as people name them, turned into a recipe and options of `TrainingArguments`."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from inspect import signature
from numbers import Real
from typing import Any

import numpy as np
from transformers import TrainingArguments

from esm_efficient import compat
from esm_efficient.adapters.registry import ARCHITECTURES
from esm_efficient.adapters.resolve import lora_config, names_to_save
from esm_efficient.data.loading import load_sequences
from esm_efficient.errors import ConfigurationError, nearest
from esm_efficient.inference.foreign import unread_options
from esm_efficient.recipes import Recipe, check_learning_rate

_OF_RECIPE = ("layers", "cache", "pooling", "quantization", "keep_layers")
"""Parts of a recipe that are options of a run."""

_OWN = ("preset", "layers")
"""Options of `lora_config` that are not in the saved adapter: they say where it is."""


def resolve_options(
    recipe: Recipe, options: Mapping[str, Any], known: Collection[str] = ()
) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe with what was asked for, and the options of `TrainingArguments`.

    ``epochs`` is another name of ``num_train_epochs``. ``batch_size`` is the number of sequences per optimizer step on
    one device: the recipe's micro-batch stays as it is where it divides the batch, and the accumulation changes.
    ``micro_batch`` is the number of sequences in one forward pass, which divides the batch; the batch stays as it is.
    ``layers``, ``cache``, ``pooling``, ``quantization`` and ``keep_layers`` are those of the recipe; None leaves its
    own.

    Args:
        recipe: the recipe.
        options: what the user gave.
        known: the names of other options, for the advice on a name that is wrong.

    Raises:
        ConfigurationError: an option is unknown, given twice under two names, or out of its range.

    Example:
        >>> from esm_efficient.recipes import RECIPES
        >>> recipe, options = resolve_options(RECIPES["all"], {"batch_size": 16, "epochs": 3})
        >>> recipe.micro_batch, recipe.accumulation, options
        (2, 8, {'num_train_epochs': 3})
        >>> resolve_options(RECIPES["lora"], {"micro_batch": 4})[0].accumulation
        2
    """
    # A number of numpy, such as one of a grid search, is no int for transformers, nor for JSON.
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    names = {field.name for field in dataclasses.fields(TrainingArguments)} | {
        "epochs",
        "batch_size",
        "micro_batch",
        *_OF_RECIPE,
        *known,
    }
    for name in options:
        if name not in names and compat.installed_names({name: None}).keys() <= {name}:
            if name in signature(load_sequences).parameters:
                given = f'data_options={{"{name}": {json.dumps(options[name], default=str)}}}'
                raise ConfigurationError(f"unknown option {name!r}: it says how data are read, so write {given}")
            advice = nearest(name, names, "an option of finetune or of TrainingArguments")
            raise ConfigurationError(f"unknown option {name!r}{advice}")
    if "epochs" in options:
        if "num_train_epochs" in options:
            raise ConfigurationError("epochs and num_train_epochs are the same option: give one of them")
        options["num_train_epochs"] = options.pop("epochs")
    _check_numbers(options)
    epochs = options.get("num_train_epochs", 1)
    if not 0 < epochs < math.inf and options.get("max_steps", -1) <= 0:  # NaN is refused too
        raise ConfigurationError(f"epochs={epochs}: expected more than 0 and a finite number")
    changes = {name: options.pop(name) for name in _OF_RECIPE if options.get(name) is not None}
    options = {name: value for name, value in options.items() if name not in _OF_RECIPE}
    recipe = recipe.replace(**changes) if changes else recipe
    sizes = {name: options.pop(name) for name in ("batch_size", "micro_batch") if name in options}
    if sizes:
        recipe = _with_sizes(recipe, options, **sizes)
    return recipe, options


def _check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse a text, or another value, for an option of `TrainingArguments` that is a number."""
    if "learning_rate" in options:
        check_learning_rate(options["learning_rate"])
    for field in dataclasses.fields(TrainingArguments):
        kinds = set(re.findall(r"\w+", str(field.type).removeprefix("<class ")))
        if field.name not in options or not kinds & {"float", "int"} or kinds - {"float", "int", "None", "Optional"}:
            continue
        value = options[field.name]
        if not isinstance(value, Real) and not (value is None and kinds & {"None", "Optional"}):
            name = "epochs" if field.name == "num_train_epochs" else field.name
            raise ConfigurationError(f"{name}={value!r} is a {type(value).__name__}: expected a number")


def with_adapter_options(recipe: Recipe, options: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """Return a recipe with what it has itself of some options of adapters, and the other options.

    The recipe's layers decide which states are cached, and its estimate reads the preset and the rank.
    """
    rest = dict(options)
    if recipe.preset is None:
        return recipe, rest
    changes = {name: rest.pop(name) for name in ("preset", "r", "layers") if rest.get(name) is not None}
    numbers = rest.get("layers_to_transform")
    if numbers is not None and "layers" not in changes and rest.get("layers_pattern") is None:
        changes["layers"] = [numbers] if isinstance(numbers, int) else list(numbers)
        del rest["layers_to_transform"]
    return recipe.replace(**changes), rest


def check_adapter_options(recipe: Recipe, options: Mapping[str, Any]) -> None:
    """Refuse options of adapters that a recipe cannot have, or that could not be read when the model is loaded.

    Raises:
        ConfigurationError: an option is unknown or not read, the recipe has no adapters, or an option trains something
            below the layers whose states are cached.
    """
    from peft import LoraConfig

    if options and recipe.preset is None:
        raise ConfigurationError(
            f"a recipe that trains {recipe.trains!r} has no adapters: leave out {', '.join(options)}"
        )
    names = {field.name for field in dataclasses.fields(LoraConfig)} | signature(lora_config).parameters.keys()
    names -= {"model", "peft_options"}
    for name in options:
        if name not in names:
            advice = nearest(name, names, "an option of lora_config or of peft.LoraConfig")
            raise ConfigurationError(f"adapter_options has the unknown option {name!r}{advice}")
    if unread := unread_options({name: value for name, value in options.items() if name not in _OWN}):
        raise ConfigurationError(
            f"adapter_options: {unread[0]}={options[unread[0]]!r:.80} is not read when the model is loaded again. "
            "Train with prepare_model and WeightedTrainer, and load the adapter with peft"
        )
    heads = {head for architecture in ARCHITECTURES for head in architecture.heads}
    saved = {*names_to_save(options)} - heads
    below = ("bias", "all") if options.get("bias") == "all" else ("modules_to_save", sorted(saved)) if saved else None
    if recipe.cache and below:
        raise ConfigurationError(
            f"adapter_options: {below[0]}={below[1]!r} trains below the layers whose states are cached too. Give the "
            f"recipe without a cache: get_recipe({recipe.name!r}).replace(cache=False)"
        )


def _with_sizes(recipe: Recipe, options: Mapping[str, Any], **sizes: Any) -> Recipe:
    """Return a recipe with a batch size, a micro-batch, or both."""
    for name, size in sizes.items():
        if both := {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(options):
            raise ConfigurationError(f"{name} and {sorted(both)[0]} contradict each other: give one of them")
        if not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{name}={size!r}: expected a whole number of sequences, at least 1")
    size = sizes.get("batch_size", recipe.batch_size)
    micro = sizes.get("micro_batch")
    if micro is None:
        micro = max(part for part in range(1, min(recipe.micro_batch, size) + 1) if size % part == 0)
    elif size % micro:
        raise ConfigurationError(
            f"micro_batch={micro} does not divide the {size} sequences of an optimizer step: give a divisor of {size}, "
            f"or batch_size={micro}"
        )
    return recipe.replace(micro_batch=micro, accumulation=size // micro)
