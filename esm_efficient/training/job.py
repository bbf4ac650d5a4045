"""What a run is asked to do: its data, task, options and plan, checked before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainingArguments

from esm_efficient.encoder.attention import BACKENDS
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.recipes import Precision, Recipe
from esm_efficient.reporting.description import DataDescription
from esm_efficient.tasks import LARGEST_SEED, MAX_TOKENS, Task
from esm_efficient.training.arguments import (
    check_token_budget,
    recipe_arguments,
    refuse_data_parallel,
    refuse_missing_trackers,
    refuse_no_predictions,
    refuse_unsaved_weights,
)
from esm_efficient.training.baselines import reason_against_probe
from esm_efficient.training.given import (
    command_words,
    describe_if_known,
    evaluated_split,
    name_of,
    splits_from,
    task_of_splits,
)
from esm_efficient.training.losses import make_loss
from esm_efficient.training.options import check_adapter_options
from esm_efficient.training.outcome import WarningList
from esm_efficient.training.run_plan import RunPlan, plan_run, warn_of_few_steps
from esm_efficient.training.start import name_of_model
from esm_efficient.training.stopping import EarlyStopping
from esm_efficient.training.weights import (
    check_all_present,
    refuse_constant_labels,
    refuse_unlabelled,
    resolve_class_weights,
)

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run before it starts.

    Attributes:
        recipe: the recipe, with the options that were given.
        task: what is predicted.
        args: the options of the Trainer.
        stopping: when the run ends early.
        output_dir: the folder of the run.
        seed: seed of the head, the adapters and the order of the batches.
        raw: the splits as they were given; they may be tokenised already.
        evaluated_on: the split that is evaluated in the end.
        base_model: the Hub name or the folder of the model; empty if it is not known.
        data_name: the name of the data; empty if it is not known.
        probe_words: what a command needs to read the same data and model; empty if it cannot.
        data: what is in the splits; None for streams and tokenised splits.
        plan: what the run will do and cost; None if nobody asked.
        warned: the warnings of the run.
    """

    recipe: Recipe
    task: Task
    args: TrainingArguments
    stopping: EarlyStopping
    output_dir: Path
    seed: int
    raw: DatasetDict
    evaluated_on: str
    base_model: str
    data_name: str
    probe_words: tuple[str, ...]
    data: DataDescription | None
    plan: RunPlan | None = None
    warned: WarningList = field(default_factory=WarningList)

    @property
    def is_tokenized(self) -> bool:
        """Whether the splits were given as token ids."""
        return "input_ids" in next(iter(self.raw.values())).features

    def check(
        self,
        *,
        class_weights: Any,
        focal_gamma: float,
        token_budget: int | None,
        attention: str,
        adapter_options: Mapping[str, Any],
    ) -> None:
        """Refuse options that do not fit the task, the data or each other, before anything is computed.

        It also warns if the run has few optimizer steps; of a stream, their number is not known. The arguments are as
        in `finetune`.

        Raises:
            ConfigurationError: an option is wrong.
            DataError: a label has no training example, and so no balanced weight.
        """
        problem_type = self.task.problem_type or "single_label_classification"
        if isinstance(class_weights, str) and class_weights == "balanced":
            self._check_balance()
        elif class_weights is not None:
            resolve_class_weights(class_weights, None, self.task.names, problem_type=problem_type)
        make_loss(problem_type, None, label_smoothing=self.args.label_smoothing_factor, focal_gamma=focal_gamma)
        check_token_budget(token_budget, self.args)
        if attention not in BACKENDS:
            raise ConfigurationError(f"attention={attention!r}: expected one of {', '.join(BACKENDS)}")
        check_adapter_options(self.recipe, adapter_options)
        if token_budget is None and hasattr(self.raw["train"], "__len__"):
            with self.warned:
                warn_of_few_steps(len(self.raw["train"]), self.args)

    def _check_balance(self) -> None:
        if self.data is not None and self.task.kind != "regression":
            labels = self.data.splits["train"].labels
            check_all_present([labels.get(name, 0) for name in self.task.names], self.task.names)

    def with_plan(self, *, max_tokens: int, probe: bool, fused: bool = False, **options: Any) -> Job:
        """Return the job with its plan, whose estimate takes seconds; without a plan if the data are not known.

        Args:
            max_tokens: the most tokens per sequence.
            probe: whether a linear probe was asked for.
            fused: whether the lean encoder's small kernels are fused.
            **options: ``adapter_options`` and ``token_budget`` of `plan_run`.
        """
        if self.data is None:
            return self
        plan = plan_run(
            self.base_model,
            self.data_name,
            self.data,
            self.raw,
            recipe=self.recipe,
            task=self.task,
            args=self.args,
            max_tokens=max_tokens,
            fused=fused,
            probe=probe and not reason_against_probe(self.raw, self.task, self.recipe, self.args),
            **options,
        )
        return replace(self, plan=plan)


def begin_job(
    model: Any,
    dataset: Any,
    recipe: Recipe,
    output_dir: Path,
    *,
    seed: int,
    task: Task | None,
    precision: Precision,
    data_options: Mapping[str, Any],
    training_options: Mapping[str, Any],
    early_stopping: int | Literal["auto"] | None,
    max_tokens: int = MAX_TOKENS,
) -> Job:
    """Read the data and check the options of a run; the arguments are as in `finetune`.

    Raises:
        DataError: as `finetune`; a split is empty, or early stopping has no known label to compare by.
        ConfigurationError: the options contradict each other.
    """
    if not isinstance(seed, Integral) or not 0 <= int(seed) <= LARGEST_SEED:
        raise ConfigurationError(f"seed={seed!r}: expected a whole number from 0 to {LARGEST_SEED:,}")
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigurationError(f"output_dir={str(output_dir)!r} is a file: expected a folder")
    seed = int(seed)  # a number of numpy is none for Python's generator
    warned, data_name, base_model = WarningList(), name_of(dataset), name_of_model(model)
    with warned:
        raw = splits_from(dataset, **data_options)
    if empty := [name for name, split in raw.items() if hasattr(split, "__len__") and not len(split)]:
        raise DataError(f"split {empty[0]!r} has no row")
    name, first = next(iter(raw.items()))
    if first.features is None:
        raise DataError(
            f"split {name!r} is a stream that does not say its columns: give it features, such as "
            "stream.map(..., features=features) or stream.cast(features)"
        )
    task = task or task_of_splits(first.features, data_options.get("label"))
    evaluated_on = evaluated_split(raw)
    label = data_options.get("label")
    refuse_constant_labels(raw["train"], task, label if isinstance(label, str) else None)
    data = describe_if_known(raw)
    if early_stopping == "auto" and not hasattr(raw["train"], "__len__"):
        early_stopping = None  # the epochs of a stream may never end
    stopping = EarlyStopping.check(early_stopping, raw, task, options=training_options)
    if stopping.patience is not None:
        refuse_unlabelled(raw["validation"], task)
    args = recipe_arguments(recipe, output_dir, precision=precision, seed=seed, **stopping.options(training_options))
    stopping.check_metric(args, task)
    refuse_data_parallel(args)
    refuse_unsaved_weights(args)
    refuse_no_predictions(args)
    refuse_missing_trackers(args)
    with warned:
        if args.load_best_model_at_end and evaluated_on == "validation":
            logger.warning(
                "there is no test split: the metrics are those of validation, by which the best epoch is chosen, so "
                "they are a little too good. Give a test split too"
            )
        for gap in () if data is None else data.label_gaps():
            logger.warning("%s", gap)
    return Job(
        recipe=recipe,
        task=task,
        args=args,
        stopping=stopping,
        output_dir=output_dir,
        seed=seed,
        raw=raw,
        evaluated_on=evaluated_on,
        base_model=base_model,
        data_name=data_name,
        probe_words=command_words(dataset, data_options, base_model, max_tokens=max_tokens),
        data=data,
        warned=warned,
    )
