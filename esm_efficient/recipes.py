"""The named training methods, as data.

A recipe fixes the *accumulated batch*. Accumulation divides it into smaller micro-batches: it needs less memory, and
the number of optimizer steps stays the same. The recipes are therefore comparable. If accumulation enlarged the batch
instead, a run would take fewer steps, and at an unchanged learning rate it would learn less.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from esm_efficient.errors import ConfigurationError

Trains = Literal["full", "adapters", "head"]
Encoder = Literal["lean", "plain"]
Precision = Literal["auto", "float32", "bf16", "fp16", "pure-bf16"]
"""Number formats of a training step.

- ``"auto"``: bf16 on a CUDA device that multiplies bfloat16 in hardware, else float32.
- ``"float32"``: everything in float32.
- ``"bf16"``: autocast to bfloat16; frozen parameters are bfloat16, trainable ones float32.
- ``"fp16"``: the same with float16. For estimates only: training would need a loss scale.
- ``"pure-bf16"``: everything in bfloat16. For estimates only: training would lose small updates.
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
        preset: the layers that get adapters (`esm_efficient.adapters.resolve`); None without adapters.
        r: rank of the adapters; None without adapters.
        encoder: ``"lean"`` for the encoder that computes without padding and saves less for the backward pass
            (`esm_efficient.encoder`), ``"plain"`` for that of transformers. Loss and gradient are the same.
        description: one line for a table.

    Raises:
        ConfigurationError: preset and rank do not fit `trains`, a size is below 1, or the encoder is unknown.
    """

    name: str
    trains: Trains
    learning_rate: float
    micro_batch: int = 8
    accumulation: int = 1
    gradient_checkpointing: bool = False
    preset: str | None = None
    r: int | None = None
    encoder: Encoder = "lean"
    description: str = ""

    def __post_init__(self) -> None:
        if (self.trains == "adapters") != (self.preset is not None) or (self.preset is None) != (self.r is None):
            raise ConfigurationError(
                f"recipe {self.name!r}: got trains={self.trains!r}, preset={self.preset!r}, r={self.r!r}: expected a "
                "preset and a rank with trains='adapters', and neither otherwise"
            )
        if self.encoder not in ("lean", "plain"):
            raise ConfigurationError(f"recipe {self.name!r}: encoder={self.encoder!r}: expected 'lean' or 'plain'")
        if self.micro_batch < 1 or self.accumulation < 1:
            raise ConfigurationError(
                f"recipe {self.name!r}: micro_batch={self.micro_batch} and accumulation={self.accumulation}: expected "
                "at least 1 for both"
            )

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step on one device: the accumulated batch."""
        return self.micro_batch * self.accumulation

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with other settings, with the learning rate scaled to the accumulated batch unless it is given.

        For Adam, a batch k times as large needs a learning rate sqrt(k) times as large (Malladi et al. 2022, "On the
        SDEs and Scaling Rules for Adaptive Gradient Algorithms").

        Example:
            >>> RECIPES["lora"].replace(accumulation=4).learning_rate
            0.002
        """
        changed = dataclasses.replace(self, **changes)
        if "learning_rate" not in changes and changed.batch_size != self.batch_size:
            scaled = self.learning_rate * math.sqrt(changed.batch_size / self.batch_size)
            changed = dataclasses.replace(changed, learning_rate=scaled)
        return changed


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("base", "full", 1e-4, description="all parameters"),
        Recipe("ga", "full", 1e-4, micro_batch=2, accumulation=4, description="all parameters, gradient accumulation"),
        Recipe("gc", "full", 1e-4, gradient_checkpointing=True, description="all parameters, gradient checkpointing"),
        Recipe("lora", "adapters", 1e-3, preset="all-linear", r=8, description="LoRA on every linear layer"),
        Recipe(
            "all",
            "adapters",
            1e-3,
            micro_batch=2,
            accumulation=4,
            gradient_checkpointing=True,
            preset="all-linear",
            r=8,
            description="LoRA, gradient accumulation and gradient checkpointing",
        ),
        Recipe("frozen", "head", 1e-3, description="the classification head alone"),
    )
}


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
