"""The named training methods, as data.

A recipe fixes the *accumulated batch*. Accumulation divides it into smaller micro-batches: it needs less memory, and
the number of optimizer steps stays the same. The recipes are therefore comparable. If accumulation enlarged the batch
instead, a run would take fewer steps, and at an unchanged learning rate it would learn less.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from esm_efficient.errors import ConfigurationError
from esm_efficient.tasks import Head, Pooling

Trains = Literal["full", "adapters", "head"]
Encoder = Literal["lean", "plain"]
Precision = Literal["auto", "float32", "bf16", "fp16", "pure-bf16"]
"""Number formats of a training step.

- ``"auto"``: bf16 on a CUDA device that multiplies bfloat16 in hardware, fp16 on an older one with tensor cores, such
  as a T4, and float32 on any other device.
- ``"float32"``: everything in float32.
- ``"bf16"``: autocast to bfloat16; frozen parameters are bfloat16, trainable ones float32.
- ``"fp16"``: the same with float16 and a loss scale. It needs a GPU.
- ``"pure-bf16"``: everything in bfloat16. For estimates only: training would lose small updates.
"""

Quantization = Literal["4bit", "8bit"]
"""How the frozen weights of linear layers are held, by bitsandbytes.

- ``"4bit"``: NF4 with quantised scales (Dettmers et al. 2023, "QLoRA"). Products use the restored weight.
- ``"8bit"``: LLM.int8 (Dettmers et al. 2022), which rounds the inputs of a product too.
"""


@dataclass(frozen=True)
class Recipe:
    """A named training method.

    Attributes:
        name: name of the recipe.
        trains: ``"full"`` for all parameters, ``"adapters"`` for adapters and the head, ``"head"`` for the head alone.
        learning_rate: peak learning rate of AdamW at `batch_size` sequences per optimizer step.
        micro_batch: sequences in one forward pass on one device.
        accumulation: micro-batches per optimizer step.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        preset: the layers that get adapters: ``"qkv"``, ``"attention"``, ``"mlp"`` or ``"all-linear"``; None without
            adapters.
        r: rank of the adapters; None without adapters.
        layers: the encoder layers that train or get adapters, as `select_layers` reads them. All layers, if
            ``trains="full"`` is to train the embeddings too.
        cache: compute the states that enter the lowest layer that trains once, keep them on disk, and train on them
            (`esm_efficient.trunk`). The layers below are then neither computed again nor in memory.
        pooling: what the head of a sequence-level task reads: ``"first"`` for the first token, as transformers' own
            head, ``"mean"`` for the mean over the residues, ``"attention"`` for a mean with learned weights
            (`esm_efficient.heads`). Where a head cannot have the pooling of a named recipe, it has its own
            (`with_possible_pooling`).
        quantization: hold the frozen linear layers in 4 or 8 bits (`Quantization`); None for the precision of the run.
            It needs adapters, and the extra ``quantized``.
        encoder: ``"lean"`` for the encoder that computes without padding and saves less for the backward pass
            (`esm_efficient.encoder`), ``"plain"`` for that of transformers. Loss and gradient are the same.
        keep_layers: number of the lowest encoder layers to keep; the others are dropped before anything is trained
            (`esm_efficient.truncate`). `layers` are then chosen among those that are kept. None for all.
        description: one line for a table; empty after a change that may contradict it (`replace`).

    Raises:
        ConfigurationError: preset and rank do not fit `trains`, the learning rate is not a finite number from 0, a size
            or `keep_layers` is below 1, the encoder, the layers, the pooling or the quantization are unknown,
            everything trains and there is nothing to cache, or a base is to be quantised that trains or is cached.
    """

    name: str
    trains: Trains
    learning_rate: float
    micro_batch: int = 8
    accumulation: int = 1
    gradient_checkpointing: bool = False
    preset: str | None = None
    r: int | None = None
    layers: str | tuple[int, ...] = "all"
    cache: bool = False
    pooling: Pooling = "first"
    quantization: Quantization | None = None
    encoder: Encoder = "lean"
    keep_layers: int | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if self.trains not in ("full", "adapters", "head"):
            raise ConfigurationError(
                f"recipe {self.name!r}: trains={self.trains!r}: expected 'full', 'adapters' or 'head'"
            )
        if (self.trains == "adapters") != (self.preset is not None) or (self.preset is None) != (self.r is None):
            raise ConfigurationError(
                f"recipe {self.name!r}: got trains={self.trains!r}, preset={self.preset!r}, r={self.r!r}: expected a "
                "preset and a rank with trains='adapters', and neither otherwise"
            )
        check_learning_rate(self.learning_rate)
        if self.encoder not in ("lean", "plain"):
            raise ConfigurationError(f"recipe {self.name!r}: encoder={self.encoder!r}: expected 'lean' or 'plain'")
        if self.pooling not in get_args(Pooling):
            raise ConfigurationError(
                f"recipe {self.name!r}: pooling={self.pooling!r}: expected one of {', '.join(get_args(Pooling))}"
            )
        if self.quantization not in (None, *get_args(Quantization)):
            raise ConfigurationError(
                f"recipe {self.name!r}: quantization={self.quantization!r}: expected '4bit', '8bit' or None"
            )
        if self.quantization and (self.trains != "adapters" or self.cache):
            raise ConfigurationError(
                f"recipe {self.name!r}: quantization={self.quantization!r} with trains={self.trains!r} and "
                f"cache={self.cache}: only adapters train on a quantised base, and without a cache. Use a recipe such "
                "as 'lora' or 'all'"
            )
        object.__setattr__(self, "layers", check_layers(self.layers))
        if self.keep_layers is not None and self.keep_layers < 1:
            raise ConfigurationError(
                f"recipe {self.name!r}: keep_layers={self.keep_layers}: expected at least 1 layer, or None for all"
            )
        if self.cache and self.trains == "full" and self.layers == "all":
            raise ConfigurationError(
                f"recipe {self.name!r}: cache=True with all parameters training: nothing stays the same, so nothing "
                'can be computed once. Give layers, such as layers="top-1/3"'
            )
        if self.micro_batch < 1 or self.accumulation < 1:
            raise ConfigurationError(
                f"recipe {self.name!r}: micro_batch={self.micro_batch} and accumulation={self.accumulation}: expected "
                "at least 1 for both"
            )

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step on one device: the accumulated batch."""
        return self.micro_batch * self.accumulation

    def trained_layers(self, count: int) -> tuple[int, ...]:
        """Return the numbers of the layers that train or get adapters, of an encoder with `count` layers."""
        return () if self.trains == "head" else select_layers(self.layers, count)

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with other settings, with the learning rate scaled to the accumulated batch unless it is given.

        For Adam, a batch k times as large needs a learning rate sqrt(k) times as large (Malladi et al. 2022, "On the
        SDEs and Scaling Rules for Adaptive Gradient Algorithms"). With all layers or a quantised base, `cache`
        becomes False unless it is given. A description that was written for other settings is dropped.

        Raises:
            ConfigurationError: a recipe has no such setting, or as `Recipe`.

        Example:
            >>> RECIPES["lora"].replace(accumulation=4).learning_rate
            0.002
        """
        names = [field.name for field in dataclasses.fields(self)]
        if unknown := [name for name in changes if name not in names]:
            raise ConfigurationError(
                f"a recipe has no setting {unknown[0]!r}: expected one of {', '.join(names)}. Others, such as epochs, "
                "are options of finetune"
            )
        if (changes.get("layers") == "all" and self.trains != "head") or changes.get("quantization"):
            changes = {"cache": False} | changes
        changed = dataclasses.replace(self, **changes)
        if "learning_rate" not in changes and changed.batch_size != self.batch_size:
            scaled = self.learning_rate * math.sqrt(changed.batch_size / self.batch_size)
            changed = dataclasses.replace(changed, learning_rate=scaled)
        if "description" not in changes and changed._described != self._described:
            changed = dataclasses.replace(changed, description="")
        return changed

    @property
    def _described(self) -> tuple[Any, ...]:
        """The settings that a description may name."""
        names = ("trains", "preset", "layers", "cache", "gradient_checkpointing", "pooling", "quantization")
        return (*(getattr(self, name) for name in names), self.keep_layers, self.accumulation > 1)


def check_learning_rate(rate: Any) -> None:
    """Refuse a learning rate that is not a finite number from 0; at 0 nothing is learned.

    Raises:
        ConfigurationError: as above.
    """
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= float(rate) < math.inf:  # false for NaN too
        raise ConfigurationError(f"learning_rate={rate!r}: expected a finite number, 0 or more, such as 1e-3")


def check_layers(layers: str | Sequence[int]) -> str | tuple[int, ...]:
    """Return a choice of layers, a list as a sorted tuple.

    Raises:
        ConfigurationError: `layers` is not a choice that `select_layers` reads.
    """
    if isinstance(layers, str):
        if layers != "all" and not re.fullmatch(r"top-[1-9]\d*(/[1-9]\d*)?", layers):
            raise ConfigurationError(
                f'layers={layers!r}: expected "all", a number of top layers such as "top-11", a share such as '
                '"top-1/3", or a list of layer numbers from 0'
            )
        return layers
    numbers = tuple(sorted({int(number) for number in layers}))
    if not numbers or numbers[0] < 0:
        raise ConfigurationError(f"layers={list(layers)}: expected at least one layer number, from 0")
    return numbers


def select_layers(layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Return the numbers of the chosen layers of an encoder, in order.

    Args:
        layers: ``"all"``; ``"top-11"`` for the 11 layers next to the head; ``"top-1/3"`` for that share of the layers,
            rounded, and at least one; or a list of layer numbers from 0.
        count: number of layers of the encoder.

    Raises:
        ConfigurationError: `layers` is not such a choice, or the encoder has fewer layers.

    Example:
        >>> select_layers("top-1/3", 6), select_layers([0, 5], 6)
        ((4, 5), (0, 5))
    """
    choice = check_layers(layers)
    if choice == "all":
        return tuple(range(count))
    if isinstance(choice, str):
        top, _, parts = choice.removeprefix("top-").partition("/")
        number = max(1, round(count * int(top) / int(parts))) if parts else int(top)
        if number > count:
            raise ConfigurationError(f"layers={layers!r}: the encoder has only {count} layers")
        return tuple(range(count - number, count))
    if choice[-1] >= count:
        raise ConfigurationError(f"layers={list(choice)}: the encoder has the layers 0 to {count - 1}")
    return choice


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "base",
            "full",
            1e-4,
            description="all parameters; with a few thousand proteins use one epoch. `top` was not clearly worse",
        ),
        Recipe("ga", "full", 1e-4, micro_batch=2, accumulation=4, description="`base` with gradient accumulation"),
        Recipe("gc", "full", 1e-4, gradient_checkpointing=True, description="`base` with gradient checkpointing"),
        Recipe(
            "lora",
            "adapters",
            1e-3,
            preset="all-linear",
            r=8,
            description="LoRA on every linear layer; not clearly better than `top`, in two to three times the time",
        ),
        Recipe(
            "all",
            "adapters",
            1e-3,
            micro_batch=2,
            accumulation=4,
            gradient_checkpointing=True,
            preset="all-linear",
            r=8,
            description="LoRA, accumulation, checkpointing; not clearly better than `top`, in more than twice the time",
        ),
        Recipe(
            "top",
            "adapters",
            1e-3,
            preset="all-linear",
            r=8,
            layers="top-1/3",
            cache=True,
            description="LoRA on the top third of the layers, on cached states",
        ),
        Recipe(
            "frozen",
            "head",
            1e-3,
            cache=True,
            pooling="attention",
            description="the head alone, on cached states",
        ),
    )
}
"""The recipes by their names: `base`, `ga`, `gc`, `lora`, `all`, `top` and `frozen`."""


def with_possible_pooling(recipe: Recipe, head: Head, model_type: str, own: Pooling | None = None) -> Recipe:
    """Return a recipe whose usual pooling gives way to what a head can read.

    A head for residues pools nothing, models other than ESM-2 have the head of transformers alone, and a loaded model
    has its own head. A pooling other than the usual one of the recipe was chosen for the run: it is kept, and is an
    error where it does not fit.

    Args:
        recipe: the recipe.
        head: the kind of head.
        model_type: ``config.model_type`` of the model.
        own: what the head of a loaded model reads.
    """
    if recipe.name not in RECIPES or recipe.pooling != RECIPES[recipe.name].pooling:
        return recipe
    if head != "sequence-classification" or model_type != "esm":
        own = "first"
    return dataclasses.replace(recipe, pooling=own or recipe.pooling)


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Return the recipe of a name; a `Recipe` is returned unchanged.

    Raises:
        ConfigurationError: the recipe is unknown.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ConfigurationError(f"no recipe is named {recipe!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[recipe]
