"""Weighted losses as pairs of a sum and the total weight, one pair an example.

A mean of means is not the mean: with class weights, or with uneven batches, the average of the micro-batches' weighted
means has another gradient than the weighted mean of the whole accumulated batch. A loss here therefore never divides.
Whoever knows the whole batch sums both parts over it and divides once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from esm_efficient.errors import DataError

IGNORE = -100
"""The label of what has none."""


class WeightedLoss(Protocol):
    """What a trainer needs of a loss."""

    def weights(self, labels: Tensor) -> Tensor:
        """The weight of each example, float32 of shape (batch,), from labels alone."""
        ...

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss summed over each example, and its weight: both float32 of shape (batch,)."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy over classes, one label an example or one a token.

    Attributes:
        class_weights: float of shape (classes,), or None for one each.
        label_smoothing: share of the target that is spread over all classes, as in
            `torch.nn.functional.cross_entropy`: with class weights, each class' share is weighted too.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0

    def weights(self, labels: Tensor) -> Tensor:
        """Weights of examples.

        Args:
            labels: integers of shape (batch,) or (batch, tokens); -100 weighs nothing.

        Returns:
            float32 of shape (batch,): the sum of the class weights of an example's labels.

        Raises:
            DataError: the labels are no integers, or no class.
        """
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise DataError(f"labels are {labels.dtype}: one class an example is a whole number")
        counted = labels != IGNORE
        if self.class_weights is None:
            weights = counted.float()
        else:
            table = self.class_weights.to(device=labels.device, dtype=torch.float32)
            weights = table[labels.where(counted, 0)] * counted
        return weights.reshape(len(labels), -1).sum(1)

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and weights of examples.

        Args:
            logits: shape (batch, classes) or (batch, tokens, classes), of any float type.
            labels: as in `weights`.

        Returns:
            The weighted loss summed over each example, and its weight: both float32 of shape (batch,).

        Raises:
            DataError: as `weights`.
        """
        table = self.class_weights
        values = F.cross_entropy(
            logits.float().flatten(0, -2),
            labels.flatten(),
            weight=None if table is None else table.to(device=logits.device, dtype=torch.float32),
            ignore_index=IGNORE,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        return values.reshape(len(labels), -1).sum(1), self.weights(labels)


LOSSES: dict[str, type[CrossEntropy]] = {"single_label_classification": CrossEntropy}
"""``config.problem_type`` to the loss that serves it."""
