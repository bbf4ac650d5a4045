"""The named training methods, as data: what each one does, not how.

A recipe fixes the *accumulated batch*: accumulation splits it into smaller micro-batches and so lowers memory, and the
number of optimizer steps stays what it was. That is what makes the recipes comparable. Accumulating whole batches
instead takes fewer steps, and at an unchanged learning rate it learns less.
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

- ``"float32"``: everything in float32.
- ``"bf16"``, ``"fp16"``: autocast; frozen parameters are held in that type, trainable ones in float32.
- ``"pure-bf16"``: everything is held in bfloat16. For estimates only: it loses small updates.
- ``"auto"``: bf16 on a CUDA device that multiplies bfloat16 in hardware, else float32.
"""


@dataclass(frozen=True)
class Recipe:
    """A named training method.

    Attributes:
        name: the word it goes by.
        trains: ``"full"`` for all parameters, ``"adapters"`` and the head, or the ``"head"`` alone.
        learning_rate: peak learning rate of AdamW at `batch_size` sequences an optimizer step.
        micro_batch: sequences in one forward pass on one device.
        accumulation: micro-batches accumulated before one optimizer step.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        preset: which layers get adapters (see `esm_efficient.adapters.resolve`); None without adapters.
        r: rank of the adapters; None without adapters.
        encoder: ``"lean"`` computes without padding and keeps less (`esm_efficient.encoder`); ``"plain"`` as
            transformers does. Loss and gradient are the same.
        description: one line for a table.

    Raises:
        ConfigurationError: adapters without a preset and a rank or the other way round, sizes below 1, or an unknown
            encoder.
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
                f"recipe {self.name!r}: a preset and a rank go with trains='adapters' and with nothing else; got "
                f"trains={self.trains!r}, preset={self.preset!r}, r={self.r!r}"
            )
        if self.encoder not in ("lean", "plain"):
            raise ConfigurationError(f"recipe {self.name!r}: encoder={self.encoder!r}: expected 'lean' or 'plain'")
        if self.micro_batch < 1 or self.accumulation < 1:
            raise ConfigurationError(
                f"recipe {self.name!r}: micro_batch and accumulation must be at least 1; got {self.micro_batch} and "
                f"{self.accumulation}"
            )

    @property
    def batch_size(self) -> int:
        """Sequences an optimizer step on one device: the accumulated batch."""
        return self.micro_batch * self.accumulation

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other settings; the learning rate follows the accumulated batch unless it is given.

        Under Adam a batch k times as large wants a rate sqrt(k) times as large (Malladi et al. 2022, "On the SDEs and
        Scaling Rules for Adaptive Gradient Algorithms").

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
    """The recipe of that name; a `Recipe` is returned as it is.

    Raises:
        ConfigurationError: no recipe has that name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ConfigurationError(f"no recipe is named {recipe!r}; there are {', '.join(RECIPES)}")
    return RECIPES[recipe]
