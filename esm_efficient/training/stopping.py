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
from esm_efficient.tasks import Task
from esm_efficient.training.metrics import compute_metrics_for
from esm_efficient.training.weights import evaluated_labels

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

_LESS_IS_BETTER = ("loss", "rmse", "mae", "runtime")
"""The metrics of an evaluation of which less is better."""

_STEPS = 500
"""The steps between two evaluations if they are by steps and no number is given, as transformers saves."""

_CHOICES = ("metric_for_best_model", "greater_is_better")

_SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
"""What a Trainer adds to the metrics of an evaluation."""


@dataclass(frozen=True)
class EarlyStopping:
    """How a run stops early.

    Attributes:
        patience: evaluations without a better result after which a run stops; None for no early stopping.
        metric: the metric that decides, and whether more of it is better.
        automatic: whether nobody asked for it, so that a callback that stops early takes its place.
    """

    patience: int | None
    metric: tuple[str, bool]
    automatic: bool = False

    @classmethod
    def check(
        cls,
        patience: int | Literal["auto"] | None,
        splits: Collection[str],
        task: Task,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> EarlyStopping:
        """Return how a run stops.

        The metric is that of `BEST`. If validation has examples of fewer than two classes, or of no label, that metric
        is the same for every model, and the loss decides.

        Args:
            patience: evaluations without a better result; ``"auto"`` for `AUTOMATIC` if there is a validation split and
                `options` let the best checkpoint be kept.
            splits: the splits, raw or tokenised, by name.
            task: the task.
            options: options of `TrainingArguments` that were given.

        Raises:
            ConfigurationError: the patience is below 1, there is no validation split, or the options say not to
                evaluate, or not to save what is to be kept.
        """
        options = options or {}
        automatic = patience == "auto"
        if patience == "auto":
            patience = AUTOMATIC if "validation" in splits and _can_keep_best(options) else None
        if patience is not None and (isinstance(patience, bool) or not isinstance(patience, Integral) or patience < 1):
            raise ConfigurationError(f'early_stopping={patience!r}: expected at least 1 evaluation, None or "auto"')
        if patience is not None and "validation" not in splits:
            raise ConfigurationError(
                f"early_stopping={patience} needs a validation split, and the data have {', '.join(splits)}: add one, "
                "or train without early stopping"
            )
        if patience is not None:
            _refuse_strategies(patience, options)
        metric = BEST[task.kind]
        if "validation" in splits and isinstance(splits, Mapping) and task.kind != "regression":
            # Of several labels, one that is positive somewhere is enough.
            known = [np.unique(part) for part in evaluated_labels(splits["validation"], task)]
            same = [
                not (part > 0).any() if task.kind == "multi_label_classification" else len(part) < 2 for part in known
            ]
            if known and all(same):
                metric = ("loss", False)
        return cls(patience, metric, automatic)

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
        """Return options of `TrainingArguments`: those given, and what the best checkpoint needs beside them.

        A model is evaluated whenever it is saved, by steps if the given options say steps, and after each epoch
        otherwise: ``save_strategy="best"`` too, because transformers 5.3 does not load what it keeps.
        """
        unset = [name for name in (*_CHOICES, "eval_strategy", "save_strategy") if given.get(name) is None]
        given = {name: value for name, value in given.items() if name not in unset}
        if (named := given.get("metric_for_best_model")) is not None and "greater_is_better" not in given:
            # transformers takes everything but a loss for better the greater it is.
            given["greater_is_better"] = named.removeprefix("eval_") not in _LESS_IS_BETTER
        if self.patience is None:
            return given
        metric, greater = self.metric
        strategies = _strategies(given)
        same = next((strategy for strategy in strategies.values() if strategy not in ("best", "no")), "epoch")
        needed: dict[str, Any] = {"eval_strategy": same, "save_strategy": same}
        if same == "steps":
            steps = next((given[name] for name in ("eval_steps", "save_steps") if name in given), _STEPS)
            needed |= {"eval_steps": steps, "save_steps": steps}
        if strategies.get("save_strategy", "best") == "best":  # otherwise the user wants checkpoints
            needed["save_total_limit"] = 1
        if strategies.get("save_strategy") == "best":
            del given["save_strategy"]
        return needed | {"load_best_model_at_end": True} | dict(zip(_CHOICES, (metric, greater), strict=True)) | given

    def callbacks(self, given: Collection[TrainerCallback] = ()) -> list[TrainerCallback]:
        """Return the callback that stops the run; none if nobody asked for it and one that was given does."""
        has_own = self.automatic and any(_stops_early(callback) for callback in given)
        if self.patience is None or has_own:
            return []
        return [ResumedEarlyStopping(early_stopping_patience=self.patience)]

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

    def check_metric_value(self, args: Any, state: Any, control: Any, metric_value: Any) -> None:
        """Count an evaluation; as long as the metric has stayed the same, a lower loss is a better result.

        A model that still predicts one class alone has the metric 0 while it learns.
        """
        super().check_metric_value(args, state, control, metric_value)
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        seen = [entry for entry in state.log_history if name in entry and "eval_loss" in entry]
        losses = [entry["eval_loss"] for entry in seen]
        if len({entry[name] for entry in seen}) == 1 < len(seen) and losses[-1] < min(losses[:-1]):
            self.early_stopping_patience_counter = 0
            state.best_metric = None  # the Trainer then takes this evaluation for the best

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate and save nothing again if the checkpoint is that of the end."""
        if self._has_ended:
            control.should_evaluate = control.should_save = False


def _stops_early(callback: Any) -> bool:
    """Whether a callback, or a class of callbacks, stops a run early as transformers does."""
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, EarlyStoppingCallback)


def _strategies(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the given strategies of evaluating and saving, as text."""
    given = {name: options[name] for name in ("eval_strategy", "save_strategy") if options.get(name) is not None}
    return {name: str(getattr(strategy, "value", strategy)) for name, strategy in given.items()}


def _can_keep_best(options: Mapping[str, Any]) -> bool:
    """Whether options of `TrainingArguments` let a run keep its best epoch, and nothing asks for something else."""
    by_epoch = all(strategy in ("epoch", "best") for strategy in _strategies(options).values())
    is_divided = options.get("save_only_model") and (options.get("fsdp") or options.get("deepspeed"))
    return by_epoch and not is_divided and options.get("load_best_model_at_end", True)


def _refuse_strategies(patience: int, options: Mapping[str, Any]) -> None:
    """Refuse strategies with which a run cannot stop early or keep its best checkpoint.

    Raises:
        ConfigurationError: the model is not to be evaluated, or not to be saved when it is evaluated.
    """
    strategies = _strategies(options)
    evaluated, saved = strategies.get("eval_strategy", ""), strategies.get("save_strategy", "")
    keeps = options.get("load_best_model_at_end", True)
    differ = bool(evaluated) and saved not in ("", "best", evaluated)
    both = {"save_steps", "eval_steps"} <= options.keys() and "steps" in (evaluated, saved)
    apart = both and options["save_steps"] != options["eval_steps"]
    if evaluated == "no" or (keeps and (saved == "no" or differ or apart)):
        names = (*strategies, *(name for name in ("save_steps", "eval_steps") if name in options))
        given = ", ".join(f"{name}={options[name]!r}" for name in names)
        raise ConfigurationError(
            f"early_stopping={patience} with {given}: expected the same for evaluating and saving, so that what was "
            "evaluated is there to keep: leave these options out, or early stopping"
        )


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
