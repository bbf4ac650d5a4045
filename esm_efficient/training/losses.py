"""Weighted losses: for each example the weighted sum of its losses, and its total weight.

With class weights, or with uneven batches, the average of the micro-batches' weighted means has another gradient than
the weighted mean of the accumulated batch. A loss here therefore never divides: the trainer adds both parts over the
whole accumulated batch, and divides once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import IGNORE

LARGEST_NUMBER = 1e18
"""The largest number to regress; the square of one above 1.8e19 is infinite in float32."""


class WeightedLoss(Protocol):
    """The interface of a loss that a trainer can use."""

    def weights(self, labels: Tensor) -> Tensor:
        """Return the weight of each example, float32 of shape (batch,), from its labels."""
        ...

    def wrong(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a mask of the labels that this loss cannot use, of the labels' shape."""
        ...

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted loss and the weight of each example, both float32 of shape (batch,).

        Labels that are wrong are an error on a CPU. On another device, where looking at them would take time, their
        loss is NaN.
        """
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with one class per example or per token; with `focal_gamma` the focal loss.

    The focal loss (Lin et al. 2017, "Focal Loss for Dense Object Detection") multiplies the loss of a label by
    ``(1 - p) ** gamma``, where p is the probability of the right class. Easy examples thus count less.

    Attributes:
        class_weights: float of shape (classes,); None for equal weights of 1.
        label_smoothing: share of the target that is spread over all classes, as in
            `torch.nn.functional.cross_entropy`: class weights apply to each class' share.
        focal_gamma: the exponent; 0 for plain cross-entropy.

    Raises:
        ConfigurationError: the exponent is negative, or label smoothing is given too: the focal loss defines none.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self) -> None:
        _check_focal(self.focal_gamma, self.label_smoothing)

    def weights(self, labels: Tensor) -> Tensor:
        """Return the weight of each example.

        Args:
            labels: integers of shape (batch,) or (batch, tokens); -100 has no weight.

        Returns:
            float32 of shape (batch,): the sum of the class weights of an example's labels.

        Raises:
            DataError: the labels are not integers.
        """
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise DataError(f"labels are {labels.dtype}: expected class ids, which are whole numbers")
        counted = labels != IGNORE
        if self.class_weights is None:
            weights = counted.float()
        else:
            table = self.class_weights.to(device=labels.device, dtype=torch.float32)
            weights = table[labels.where(counted, 0).clamp(0, len(table) - 1)] * counted
        return weights.reshape(len(labels), -1).sum(1)

    def wrong(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a mask of the labels that are not class ids of the logits."""
        return (labels != IGNORE) & ((labels < 0) | (labels >= logits.shape[-1]))

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the weight of each example.

        Args:
            logits: shape (batch, classes) or (batch, tokens, classes), of any float type.
            labels: as in `weights`.

        Returns:
            The weighted loss summed over each example, and its weight: both float32 of shape (batch,).

        Raises:
            DataError: as `weights`; the labels' shape does not fit the logits; on a CPU, a label is not a class id.
        """
        if labels.shape != logits.shape[:-1]:
            advice = ". Several labels per sequence must be floats" if labels.shape == logits.shape else ""
            raise DataError(_wrong_shape(labels, logits.shape[:-1]) + advice)
        wrong = _refuse(self.wrong(logits, labels), labels, f"class ids from 0 to {logits.shape[-1] - 1}, or {IGNORE}")
        table = self.class_weights
        flat, targets = logits.float().flatten(0, -2), labels.masked_fill(wrong, IGNORE).flatten()
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
        values = values.masked_fill(wrong.flatten(), torch.nan)
        return values.reshape(len(labels), -1).sum(1), self.weights(labels)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy for several labels per example, each of them positive, negative or unknown.

    Attributes:
        class_weights: float of shape (labels,), factors of the loss of positive labels (``pos_weight`` of
            `torch.nn.BCEWithLogitsLoss`); None for equal factors of 1.
        label_smoothing: twice the distance by which 0 and 1 move towards 0.5.
        focal_gamma: as in `CrossEntropy`, for each label separately.

    Raises:
        ConfigurationError: as `CrossEntropy`.
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self) -> None:
        _check_focal(self.focal_gamma, self.label_smoothing)

    def weights(self, labels: Tensor) -> Tensor:
        """Return the weight of each example.

        Args:
            labels: floats of shape (batch, labels), 0 to 1; NaN or -100 has no weight.

        Returns:
            float32 of shape (batch,): the number of known labels.

        Raises:
            DataError: the labels are not floats.
        """
        return _is_known(labels).float().reshape(len(labels), -1).sum(1)

    def wrong(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a mask of the known labels that are not from 0 to 1."""
        return _is_known(labels) & ((labels < 0) | (labels > 1))

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the weight of each example, as `CrossEntropy`; logits of shape (batch, labels)."""
        if labels.shape != logits.shape:
            raise DataError(_wrong_shape(labels, logits.shape))
        known = _is_known(labels)
        wrong = _refuse(self.wrong(logits, labels), labels, f"numbers from 0 to 1; NaN or {IGNORE} if unknown")
        targets = labels.where(known, 0).float()
        smooth = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        pos_weight = None if self.class_weights is None else self.class_weights.to(device=logits.device).float()
        logits = logits.float()
        values = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=pos_weight, reduction="none")
        if self.focal_gamma:
            right = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").neg().exp()
            values = _focal(values, right, self.focal_gamma)
        values = values.where(known, 0).masked_fill(wrong, torch.nan)
        return values.sum(1), known.float().sum(1)


@dataclass(frozen=True)
class SquaredError:
    """Squared error of one or several numbers per example, each of them known or unknown."""

    def weights(self, labels: Tensor) -> Tensor:
        """Return the weight of each example, float32 of shape (batch,): the number of its known numbers.

        Args:
            labels: numbers of shape (batch,) or (batch, numbers); NaN has no weight.
        """
        return (~labels.isnan()).float().reshape(len(labels), -1).sum(1)

    def wrong(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a mask of the numbers that are infinite, or whose square is infinite in float32."""
        return labels.float().abs() > LARGEST_NUMBER

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the weight of each example, as `CrossEntropy`; logits of shape (batch, numbers)."""
        targets = labels.reshape(len(labels), -1).float()
        if targets.shape != (shape := logits.reshape(len(labels), -1).shape):
            raise DataError(_wrong_shape(labels, shape))
        # On another device than a CPU the loss of a wrong number is infinite anyway.
        _refuse(self.wrong(logits, labels), labels, f"numbers of at most {LARGEST_NUMBER:g}; standardise them")
        known = ~targets.isnan()
        errors = logits.float().reshape(targets.shape) - targets.where(known, 0)
        return errors.square().where(known, 0).sum(1), known.float().sum(1)


def make_loss(
    problem_type: str, class_weights: Tensor | None, *, label_smoothing: float, focal_gamma: float
) -> WeightedLoss:
    """Return the loss for a ``problem_type`` of `LOSSES`.

    Raises:
        ConfigurationError: an option does not fit the task.
    """
    if problem_type != "regression":
        return LOSSES[problem_type](class_weights, label_smoothing=label_smoothing, focal_gamma=focal_gamma)
    if label_smoothing or focal_gamma:
        raise ConfigurationError(
            f"label_smoothing_factor={label_smoothing} and focal_gamma={focal_gamma} with regression: expected 0 for "
            "both, because numbers have no classes"
        )
    return SquaredError()


def _is_known(labels: Tensor) -> Tensor:
    """Return a mask of known labels, of several per example."""
    if not labels.is_floating_point():
        raise DataError(
            f"labels are {labels.dtype}: expected floats from 0 to 1, with NaN for unknown ones. Cast the column to "
            "float32"
        )
    return ~labels.isnan() & (labels != IGNORE)


def _wrong_shape(labels: Tensor, expected: Sequence[int]) -> str:
    return f"labels have shape {tuple(labels.shape)}: expected {tuple(expected)}, which fits the model's outputs"


def _refuse(wrong: Tensor, labels: Tensor, expected: str) -> Tensor:
    """Return the mask of wrong labels; on a CPU there is none."""
    if wrong.device.type == "cpu" and wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{int(wrong.sum())} label(s) of a batch are wrong, the first in its row {place[0]}: "
            f"{labels[tuple(place)].item():g}. Expected {expected}"
        )
    return wrong


def _focal(values: Tensor, right: Tensor, gamma: float) -> Tensor:
    """Scale by (1 - p)**gamma; the clamp keeps the gradient finite for gamma < 1."""
    return values * (1 - right).clamp(min=torch.finfo(torch.float32).tiny) ** gamma


def _check_focal(gamma: float, smoothing: float) -> None:
    if gamma < 0 or (gamma and smoothing):
        raise ConfigurationError(
            f"focal_gamma={gamma} with label_smoothing={smoothing}: expected an exponent >= 0, and no smoothing if it "
            "is above 0"
        )


LOSSES: dict[str, Callable[..., WeightedLoss]] = {
    "single_label_classification": CrossEntropy,
    "multi_label_classification": BinaryCrossEntropy,
    "regression": SquaredError,
}
"""``config.problem_type`` -> loss; a token classifier uses the first."""
