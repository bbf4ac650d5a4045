"""Early stopping on the validation split, with the best checkpoint kept."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback, TrainingArguments

from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.reporting.description import DataDescription
from esm_efficient.tasks import Task
from esm_efficient.training.metrics import compute_metrics_for

AUTOMATIC = 3
"""The patience of ``"auto"`` where there is a validation split."""

BEST: Mapping[str, tuple[str, bool]] = {
    "single_label_classification": ("mcc", True),
    "token_classification": ("mcc", True),
    "multi_label_classification": ("f1_macro", True),
    "regression": ("rmse", False),  # a rank correlation is undefined while all predictions are equal
}
"""The metric that decides which model is best, by kind of task, and whether more of it is better."""


_COUNTER = "early_stopping_patience_counter"
"""What transformers calls the number of evaluations without a better result, in a callback and in its saved state."""

_SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
"""What a Trainer adds to the metrics of an evaluation."""


@dataclass(frozen=True)
class EarlyStopping:
    """How a run stops early.

    Attributes:
        patience: evaluations without a better result after which a run stops; None for no early stopping.
        metric: the metric that decides, and whether more of it is better.
    """

    patience: int | None
    metric: tuple[str, bool]

    @classmethod
    def check(
        cls,
        patience: int | Literal["auto"] | None,
        splits: Collection[str],
        task: Task,
        *,
        data: DataDescription | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> EarlyStopping:
        """Return how a run stops.

        The metric is that of `BEST`. If validation has examples of fewer than two classes, or of no label, that metric
        is the same for every model, and the loss decides.

        Args:
            patience: evaluations without a better result; ``"auto"`` for `AUTOMATIC` if there is a validation split and
                `options` let the best checkpoint be kept.
            splits: the names of the splits.
            task: the task.
            data: what is in the splits, if it is known.
            options: options of `TrainingArguments` that were given.

        Raises:
            ConfigurationError: the patience is below 1, or there is no validation split.
        """
        if patience == "auto":
            patience = AUTOMATIC if "validation" in splits and _can_keep_best(options or {}) else None
        if patience is not None and (isinstance(patience, bool) or not isinstance(patience, Integral) or patience < 1):
            raise ConfigurationError(f'early_stopping={patience!r}: expected at least 1 evaluation, None or "auto"')
        if patience is not None and "validation" not in splits:
            raise ConfigurationError(
                f"early_stopping={patience} needs a validation split, and the data have {', '.join(splits)}: add one, "
                "or train without early stopping"
            )
        metric = BEST[task.kind]
        if data is not None and "validation" in data.splits and task.kind != "regression":
            present = sum(count > 0 for count in data.splits["validation"].labels.values())
            if present < (1 if task.kind == "multi_label_classification" else 2):
                metric = ("loss", False)
        return cls(patience, metric)

    def check_metric(self, args: TrainingArguments, task: Task) -> None:
        """Refuse the name of a metric that the evaluations of a task do not have.

        Raises:
            ConfigurationError: ``metric_for_best_model`` is such a name.
        """
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        known = ["loss", *_metric_names(task)]
        if name not in known and name not in _SPEEDS:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"expected one of {listing(known, 20)}"
            raise ConfigurationError(f"metric_for_best_model={name!r}: no evaluation has this metric: {advice}")

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options of `TrainingArguments`: those given, and what early stopping needs beside them."""
        if self.patience is None:
            return dict(given)
        metric, greater = self.metric
        needed = {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
        chosen = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": greater}
        for name, other in (("eval", "save"), ("save", "eval")):  # transformers needs the same strategy for both
            strategy = given.get(f"{name}_strategy", "no")
            if getattr(strategy, "value", strategy) not in ("no", "best") and f"{other}_strategy" not in given:
                needed[f"{other}_strategy"] = strategy
                needed |= {f"{other}_steps": given[f"{name}_steps"]} if f"{name}_steps" in given else {}
        return needed | chosen | dict(given)

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that stops the run."""
        return [] if self.patience is None else [ResumedEarlyStopping(early_stopping_patience=self.patience)]

    def has_ended(self, state: Mapping[str, Any]) -> bool:
        """Return whether early stopping ended the run of a checkpoint, by the record of its state."""
        saved = state["stateful_callbacks"].get(ResumedEarlyStopping.__name__)
        return None not in (saved, self.patience) and saved["attributes"][_COUNTER] >= self.patience


class ResumedEarlyStopping(EarlyStoppingCallback):
    """Counts on from the checkpoint when a run resumes; transformers begins at 0 again."""

    _has_ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the count of the checkpoint, and stop at once if it has ended the run already."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"][_COUNTER]
        self._has_ended = self.early_stopping_patience_counter >= self.early_stopping_patience
        control.should_training_stop |= self._has_ended

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate and save nothing again if the checkpoint is that of the end."""
        if self._has_ended:
            control.should_evaluate = control.should_save = False


def _can_keep_best(options: Mapping[str, Any]) -> bool:
    """Whether options of `TrainingArguments` let a run keep its best checkpoint, which needs an evaluation of each."""
    given = [options[name] for name in ("eval_strategy", "save_strategy") if name in options]
    strategies = [getattr(strategy, "value", strategy) for strategy in given]
    # Steps of both need not be multiples, as transformers wants for the best checkpoint.
    is_possible = "no" not in strategies and (len(strategies) < 2 or strategies == ["epoch", "epoch"])
    return is_possible and options.get("load_best_model_at_end", True)


def _metric_names(task: Task) -> list[str]:
    """Return the names of the metrics of a task, from those of an evaluation in which each label occurs."""
    count = len(task.names)
    scores = np.eye(max(count, 2), count)
    labels = scores if task.problem_type else np.arange(count)
    if task.kind == "single_label_classification":
        labels = np.arange(count)
    elif task.kind == "token_classification":
        scores, labels = scores[None], np.arange(count)[None]
    return list(compute_metrics_for(task)(EvalPrediction(predictions=scores, label_ids=labels)))
