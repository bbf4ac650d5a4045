"""What to simulate: one training step with its recipe, its batch and its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from esm_efficient.costs.devices import Device
from esm_efficient.recipes import Precision, Recipe
from esm_efficient.tasks import Head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

Padding = Literal["padded", "equal-length", "padding-free"]
"""Three ways to lay out a batch.

- ``"padded"``: sequences of different lengths, filled up with padding tokens.
- ``"equal-length"``: sequences of one length, so that nothing is filled up.
- ``"padding-free"``: the tokens of all sequences in one row, as the lean encoder computes them.
"""

Attention = Literal["sdpa", "eager"]
"""transformers' names of the attention implementations that can be simulated."""


class Pairs(tuple[tuple[str, Any], ...]):
    """A mapping that can be hashed, from `frozen`."""


NO_PAIRS = Pairs()


def frozen(value: Any) -> Any:
    """Return a value with `Pairs` in place of mappings, and tuples in place of lists and sets."""
    if isinstance(value, Mapping):
        return Pairs((str(name), frozen(inner)) for name, inner in value.items())  # the first pattern that fits counts
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    return tuple(sorted(value, key=str)) if isinstance(value, set | frozenset) else value


def thawed(value: Any) -> Any:
    """Return a value of `frozen` with dictionaries in place of `Pairs`."""
    return {name: thawed(inner) for name, inner in value} if isinstance(value, Pairs) else value


@dataclass(frozen=True)
class Step:
    """What step to simulate: arguments of `estimate`, after the defaults of recipe and device have been filled in.

    Attributes:
        recipe: the training method with its sizes.
        tokens: tokens of every sequence in the batch, special tokens included.
        precision: a `Precision` other than ``"auto"``.
        adapter_options: options of `lora_config` that override the recipe's, from `frozen`.
        fused: whether the lean encoder's small kernels are fused.
    """

    recipe: Recipe
    tokens: int
    device: Device
    precision: Precision = "float32"
    optimizer: str = "adamw_fused"
    attention: Attention = "sdpa"
    padding: Padding = "padded"
    head: Head = "sequence-classification"
    num_labels: int = 2
    adapter_options: Pairs = NO_PAIRS
    fused: bool = False

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The dtype of parameters that do not train, and of cached states."""
        import torch

        return {"float32": torch.float32, "fp16": torch.float16}.get(self.precision, torch.bfloat16)

    def cached_states(self, config: PreTrainedConfig) -> Literal["tokens", "first", "mean"]:
        """Return which states `finetune` caches: if no layer trains, what the head reads, and else all tokens."""
        pools = self.head == "sequence-classification" and config.model_type in ("esm", "esmc")
        if self.recipe.trains != "head" or not pools or self.recipe.pooling == "attention":
            return "tokens"
        return self.recipe.pooling
