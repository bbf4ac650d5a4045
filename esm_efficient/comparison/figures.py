"""MethodFigures: costs and result of one recipe at one budget, estimated or measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.estimation.estimate import Estimate
from esm_efficient.recipes import Recipe

if TYPE_CHECKING:
    from esm_efficient.training.result import FinetuneResult

BUDGETS = {"steps": "equal numbers of optimizer steps", "epochs": "equal epochs"}
"""The two budgets of a comparison, and their headings."""


@dataclass(frozen=True)
class MethodFigures:
    """Costs and result of one recipe at one budget.

    Attributes:
        recipe: the training method with its sizes.
        budget: ``"steps"`` or ``"epochs"``: the quantity that is equal for all recipes.
        steps: optimizer steps.
        epochs: passes over the training sequences.
        seconds: time of the training loop and of caching: the mean over seeds, or the bound of the roofline.
        residues_per_second: trained residues per second, likewise.
        peak: bytes in use at the highest moment of any seed, by category.
        trainable_parameters: parameters that the optimizer updates.
        total_parameters: parameters of the whole model.
        cache_bytes: bytes of cached states on disk, by the estimate; 0 without a cache.
        cache_seconds: the part of `seconds` that computed these states.
        scores: the metric of each seed; empty for estimates.
        interval: 95 % confidence interval of the metric (Student's t over the seeds); None with fewer than two seeds.
    """

    recipe: Recipe
    budget: str
    steps: int
    epochs: float
    seconds: float
    residues_per_second: float
    peak: Memory
    trainable_parameters: int
    total_parameters: int
    cache_bytes: int = 0
    cache_seconds: float = 0.0
    scores: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None

    @property
    def score(self) -> float | None:
        """Mean of the metric over the seeds; None for estimates."""
        return statistics.fmean(self.scores) if self.scores else None

    def to_dict(self, metric: str) -> dict[str, Any]:
        """Return the figures as plain numbers, in bytes and seconds, ready for JSON; NaN becomes None."""
        low, high = self.interval or (None, None)
        record = {
            "recipe": self.recipe.name,
            "budget": self.budget,
            "micro_batch": self.recipe.micro_batch,
            "accumulation": self.recipe.accumulation,
            "steps": self.steps,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "residues_per_second": self.residues_per_second,
            "peak_bytes": self.peak.total,
            **{f"{category}_bytes": getattr(self.peak, category) for category in CATEGORIES},
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "cache_bytes": self.cache_bytes,
            "cache_seconds": self.cache_seconds,
            metric: self.score,
            f"{metric}_low": low,
            f"{metric}_high": high,
        }
        return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in record.items()}


def estimated_figures(estimate: Estimate, budget: str, steps: int) -> MethodFigures:
    """Return the figures of an estimated recipe.

    Args:
        estimate: the costs of one optimizer step.
        budget: ``"steps"`` or ``"epochs"``.
        steps: optimizer steps.
    """
    return MethodFigures(
        recipe=estimate.recipe,
        budget=budget,
        steps=steps,
        epochs=_passes(steps, estimate.recipe, estimate.sequences),
        seconds=estimate.run_seconds(steps),
        residues_per_second=estimate.residues_per_second,
        peak=estimate.peak,
        trainable_parameters=estimate.trainable_parameters,
        total_parameters=estimate.total_parameters,
        cache_bytes=0 if estimate.cache is None else estimate.cache.bytes,
        cache_seconds=0.0 if estimate.cache is None else estimate.cache.seconds,
    )


def _passes(steps: int, recipe: Recipe, sequences: int) -> float:
    """Return the passes over the training sequences; the last batch of a pass may be smaller."""
    return steps / math.ceil(sequences / recipe.batch_size)


def measured_figures(
    recipe: Recipe, budget: str, results: Sequence[FinetuneResult], metric: str, sequences: int, *, cache_bytes: int
) -> MethodFigures:
    """Return the figures of a trained recipe.

    Args:
        recipe: the training method.
        budget: ``"steps"`` or ``"epochs"``.
        results: results of the runs, one per seed.
        metric: name of the metric.
        sequences: training sequences.
        cache_bytes: bytes of cached states on disk.
    """
    from esm_efficient.training.metrics import confidence_interval

    first = results[0]
    scores = tuple(float(result.metrics[metric]) for result in results)
    peaks = [result.profile.peak for result in results if result.profile is not None]
    return MethodFigures(
        recipe=recipe,
        budget=budget,
        steps=first.steps,
        epochs=_passes(first.steps, recipe, sequences),
        seconds=statistics.fmean(result.seconds + result.states_seconds for result in results),
        residues_per_second=statistics.fmean(result.residues_per_second for result in results),
        peak=max(peaks, key=lambda peak: peak.total),
        trainable_parameters=first.trainable_parameters,
        total_parameters=first.total_parameters,
        cache_bytes=cache_bytes,
        cache_seconds=statistics.fmean(result.states_seconds for result in results),
        scores=scores,
        interval=confidence_interval(scores),
    )
