"""Weighted losses as pairs of a sum and the total weight, one pair an example.

A mean of means is not the mean: with class weights, or with uneven batches, the average of the micro-batches' weighted
means has another gradient than the weighted mean of the whole accumulated batch. A loss here therefore never divides.
Whoever knows the whole batch sums both parts over it and divides once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import IGNORE


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
    """Cross-entropy over classes, one label an example or one a token; with `focal_gamma` the focal loss.

    The focal loss (Lin et al. 2017, "Focal Loss for Dense Object Detection") multiplies a label's loss by
    ``(1 - p) ** gamma``, where p is the probability of the right class: what is easy counts little.

    Attributes:
        class_weights: float of shape (classes,), or None for one each.
        label_smoothing: share of the target that is spread over all classes, as in
            `torch.nn.functional.cross_entropy`: with class weights, each class' share is weighted too.
        focal_gamma: the exponent; 0 for plain cross-entropy.

    Raises:
        ConfigurationError: the exponent is negative, or goes with label smoothing, which it is not defined for.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self) -> None:
        _check_focal(self.focal_gamma, self.label_smoothing)

    def weights(self, labels: Tensor) -> Tensor:
        """Weights of examples.

        Args:
            labels: integers of shape (batch,) or (batch, tokens); -100 weighs nothing.

        Returns:
            float32 of shape (batch,): the sum of the class weights of an example's labels.

        Raises:
            DataError: the labels are no integers.
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
        flat, targets = logits.float().flatten(0, -2), labels.flatten()
        values = F.cross_entropy(
            flat,
            targets,
            weight=None if table is None else table.to(device=logits.device, dtype=torch.float32),
            ignore_index=IGNORE,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if self.focal_gamma:
            right = F.cross_entropy(flat, targets, ignore_index=IGNORE, reduction="none").neg().exp()
            values = _focal(values, right, self.focal_gamma)
        return values.reshape(len(labels), -1).sum(1), self.weights(labels)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Cross-entropy of several labels an example, each of which holds or not, or is unknown.

    Attributes:
        class_weights: float of shape (labels,), the loss of a label that holds is multiplied by its weight
            (``pos_weight`` of `torch.nn.BCEWithLogitsLoss`); None for one each.
        label_smoothing: a target moves by half of it towards 0.5.
        focal_gamma: as in `CrossEntropy`, for each label by itself.

    Raises:
        ConfigurationError: as `CrossEntropy`.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self) -> None:
        _check_focal(self.focal_gamma, self.label_smoothing)

    def weights(self, labels: Tensor) -> Tensor:
        """Weights of examples.

        Args:
            labels: floats of shape (batch, labels), 0 to 1; NaN or -100 weighs nothing.

        Returns:
            float32 of shape (batch,): how many labels of an example are known.

        Raises:
            DataError: the labels are no floats.
        """
        return _known(labels, "several labels an example are numbers from 0 to 1").float().sum(1)

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and weights of examples: as in `CrossEntropy`, with logits of shape (batch, labels)."""
        known = _known(labels, "several labels an example are numbers from 0 to 1")
        targets = labels.where(known, 0).float()
        smooth = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        positive = None if self.class_weights is None else self.class_weights.to(device=logits.device).float()
        wide = logits.float()
        values = F.binary_cross_entropy_with_logits(wide, smooth, pos_weight=positive, reduction="none")
        if self.focal_gamma:
            right = F.binary_cross_entropy_with_logits(wide, targets, reduction="none").neg().exp()
            values = _focal(values, right, self.focal_gamma)
        return values.where(known, 0).sum(1), known.float().sum(1)


@dataclass(frozen=True)
class SquaredError:
    """The squared error of one number an example or of several, each of which may be unknown."""

    def weights(self, labels: Tensor) -> Tensor:
        """Weights of examples: how many numbers are known.

        Args:
            labels: floats of shape (batch,) or (batch, numbers); NaN weighs nothing.

        Raises:
            DataError: the labels are no floats.
        """
        known = _known(labels, "numbers to regress are floats", classes=False)
        return known.float().reshape(len(labels), -1).sum(1)

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and weights of examples: as in `CrossEntropy`, with logits of shape (batch, numbers)."""
        targets = labels.reshape(len(labels), -1)
        known = _known(targets, "numbers to regress are floats", classes=False)
        errors = logits.float().reshape(targets.shape) - targets.where(known, 0).float()
        return errors.square().where(known, 0).sum(1), known.float().sum(1)


def _known(labels: Tensor, expected: str, *, classes: bool = True) -> Tensor:
    """Which labels are known; -100 is a number like any other where there are no classes."""
    if not labels.is_floating_point():
        raise DataError(f"labels are {labels.dtype}: {expected}, with NaN for unknown ones")
    return ~labels.isnan() & (labels != IGNORE) if classes else ~labels.isnan()


def _focal(values: Tensor, right: Tensor, gamma: float) -> Tensor:
    """Losses by how far the right answer's probability is from 1; the bound keeps a root's slope finite at 1."""
    return values * (1 - right).clamp(min=torch.finfo(torch.float32).tiny) ** gamma


def _check_focal(gamma: float, smoothing: float) -> None:
    if gamma < 0 or (gamma and smoothing):
        raise ConfigurationError(
            f"focal_gamma={gamma} with label_smoothing={smoothing}: expected an exponent >= 0, without smoothing"
        )


LOSSES: dict[str, Callable[..., WeightedLoss]] = {
    "single_label_classification": CrossEntropy,
    "multi_label_classification": BinaryCrossEntropy,
    "regression": SquaredError,
}
"""``config.problem_type`` to the loss that serves it; a token classifier has the first."""
