"""WeightedTrainer: a transformers Trainer whose weighted loss is right under gradient accumulation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esm_efficient import compat
from esm_efficient.data.batching import TokenBudgetBatchSampler, lengths_of
from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.tasks import IGNORE, SPECIAL_TOKENS, head_of
from esm_efficient.training.audit import AuditCallback
from esm_efficient.training.losses import LOSSES, SquaredError, WeightedLoss
from esm_efficient.training.weights import (
    balanced_class_weights,
    balanced_label_weights,
    check_class_weights,
    dataset_labels,
)

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import EvalLoopOutput

logger = logging.getLogger(__name__)

BASE_CONFIG = "base_config"
"""The folder beside an adapter that holds the config of the model it belongs to."""


class WeightedTrainer(Trainer):
    """A `transformers.Trainer` with class weights, exact under accumulation and over several ranks.

    The loss of an optimizer step is the weighted sum over the accumulated batch, divided by the total weight of that
    batch over all micro-batches and all ranks: the same number and the same gradient however the batch is cut up.
    A mean of the micro-batches' weighted means is neither. Examples that a distributed sampler repeats to fill the
    last batch weigh nothing. The evaluation loss is the weighted mean over the whole set, whatever the evaluation
    batch size.

    The model's ``config.problem_type`` and the labels say which loss: cross-entropy for one class a sequence or a
    token, binary cross-entropy for several labels, the squared error for numbers (`esm_efficient.training.losses`).
    Unknown labels, -100 or NaN, weigh nothing. A column ``sample_weight`` multiplies loss and weight of a sequence.

    It takes what Trainer takes. What has a loss of its own (``compute_loss_func``, a model class of yours, a causal
    language model) is left to Trainer; with class weights, the first is an error.

    Args:
        *args: as `transformers.Trainer`.
        class_weights: ``"balanced"`` for weights from the labels of ``train_dataset``; one number a class, as an
            array, a sequence or a tensor in the order of the class ids; a mapping by label name; None for one each.
            With several labels a sequence they multiply the loss of a label that holds.
        focal_gamma: exponent of the focal loss; 0 for the plain one.
        token_budget: make training batches of as many sequences of similar length as this number of tokens holds,
            padding included (`TokenBudgetBatchSampler`), instead of ``per_device_train_batch_size`` sequences.
        audit: whether a run fails when a parameter that should train gets no gradient or does not move
            (`AuditCallback`).
        **kwargs: as `transformers.Trainer`.

    Attributes:
        class_weights: float64 array of shape (classes,), or None.

    Raises:
        ConfigurationError: the weights or the exponent do not fit the model's labels or the task; a budget goes with
            a stream of data.
        DataError: a class has no example to weigh it by.

    Example:
        >>> trainer = WeightedTrainer(
        ...     model, args, train_dataset=data["train"], class_weights={"non-membrane": 0.7, "membrane": 1.7}
        ... )  # doctest: +SKIP
    """

    _loss: WeightedLoss | None = None

    def __init__(
        self,
        *args: Any,
        class_weights: str | Mapping[str, float] | Sequence[float] | np.ndarray | Tensor | None = None,
        focal_gamma: float = 0.0,
        token_budget: int | None = None,
        audit: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.token_budget = token_budget
        self.class_weights: np.ndarray | None = None
        self._residues_trained: Tensor | int = 0
        self._evaluated: list[tuple[Tensor, Tensor]] | None = None
        self._last_evaluated: tuple[Tensor, Tensor] | None = None
        self._warned_of_repeats = False

        problem_type = self._set_problem_type(self.model)
        asked = class_weights is not None or focal_gamma
        if self.compute_loss_func is None and problem_type in LOSSES and (asked or self._has_known_loss(self.model)):
            self._loss = self._make_loss(problem_type, class_weights, focal_gamma)
            self._refuse_model_parallelism()
            compat.declare_loss_normalised(self)
        elif asked:
            raise ConfigurationError(
                "class_weights and focal_gamma do not go with a compute_loss_func of your own: leave one of the two out"
            )
        if token_budget is not None:
            if self.args.dataloader_drop_last:
                raise ConfigurationError("token_budget drops no batch: leave dataloader_drop_last out")
            self.add_callback(_TellEpoch())
        if audit and not any(isinstance(c, AuditCallback) for c in self.callback_handler.callbacks):
            self.add_callback(AuditCallback())

    @property
    def residues_trained(self) -> int:
        """Residues, without padding and special tokens, that all ranks have trained on; of the ids' attention mask."""
        own = torch.as_tensor(self._residues_trained, device=self.accelerator.device)
        return int(self.accelerator.reduce(own, reduction="sum"))

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; dividing by the accumulation steps stays with the trainer."""
        super().create_accelerator_and_postprocess()
        compat.leave_division_to_trainer(self.accelerator)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from ``model_init``, told its task like the first."""
        model = super().call_model_init(trial)
        if self._loss is not None:  # not yet while Trainer is being made; __init__ comes to it
            self._set_problem_type(model)
        return model

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and their total weight over all ranks."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if mask is not None:
                self._residues_trained += mask.sum() - SPECIAL_TOKENS * len(mask)
        if self._loss is None:
            return batches, count
        if batches:
            self._silence_repeats(batches[-1])
        total = torch.zeros((), device=device)
        for batch in batches:
            total += _weighted(self._loss.weights(_labels(batch)), batch).sum().to(device)
        return batches, self.accelerator.reduce(total, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of a micro-batch, as its share of the accumulated batch when training."""
        if self._loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = _labels(inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHT_COLUMN)})
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        losses, weights = (_weighted(part, inputs) for part in self._loss(logits, labels))
        if model.training and num_items_in_batch is not None:
            # Data-parallel ranks average their gradients: the factor makes the average a sum.
            loss = losses.sum() / _nonzero(num_items_in_batch) * self.accelerator.num_processes
        else:
            loss = losses.sum() / _nonzero(weights.sum())
            self._last_evaluated = (losses.detach(), weights.detach())
        if not return_outputs:
            return loss
        # Trainer drops the first item of a tuple, where a model that was given labels puts its loss.
        return loss, (outputs if isinstance(outputs, dict) else (loss, *outputs))

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; with a token budget, of batches that hold it."""
        if self.token_budget is None:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            raise ConfigurationError("token_budget needs a train_dataset with a length, to sort sequences by theirs")
        lengths = lengths_of(dataset, self.args.length_column_name)
        collate = self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        sampler = TokenBudgetBatchSampler(
            lengths,
            self.token_budget,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            ranks=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )
        workers = self.args.dataloader_num_workers
        # The sampler knows the ranks, so that accelerate has only to place the batches.
        return DataLoaderShard(
            dataset,
            device=self.accelerator.device,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Any, Any]:
        """As Trainer's; keeps the parts of the loss of every example for the whole set's loss."""
        self._last_evaluated = None
        result = super().prediction_step(*args, **kwargs)
        if self._evaluated is not None and self._last_evaluated is not None:
            self._evaluated.append(self.accelerator.gather_for_metrics(self._last_evaluated))
        return result

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's; its loss is replaced by the weighted mean over the whole set."""
        self._evaluated = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._evaluated and output.metrics is not None:
                total = sum(float(losses.double().sum()) for losses, _ in self._evaluated)
                weight = sum(float(weights.double().sum()) for _, weights in self._evaluated)
                output.metrics[f"{metric_key_prefix}_loss"] = total / weight if weight else float("nan")
        finally:
            self._evaluated = None
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; beside an adapter, ``base_config/`` gets the model's config with the task and label names.

        It has a folder of its own because transformers takes one with a ``config.json`` for a whole model.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "peft_config"):
            compat.save_under_own_names(model)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and hasattr(model, "peft_config"):
            folder = Path(output_dir or self.args.output_dir or ".") / BASE_CONFIG
            model.get_base_model().config.save_pretrained(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """What is missing from a checkpoint would silently keep its value: an error, where Trainer only warns."""
        tied = compat.tied_weights(self.accelerator.unwrap_model(self.model))
        if missing := [name for name in load_result.missing_keys if name not in tied]:
            raise ConfigurationError(
                f"the checkpoint lacks {len(missing)} weights of the model ({listing(missing)}), so it would not "
                "resume where it stopped. Load it with from_pretrained() and train anew, or take another checkpoint"
            )
        super()._issue_warnings_after_load(load_result)

    def _set_problem_type(self, model: Any) -> str | None:
        """The task; written into a classifier's config, since labels never reach the model, which would do it."""
        config = getattr(model, "config", None)
        if config is None or self.compute_loss_func is not None:
            return None
        task = config.problem_type
        if task is None and config.num_labels == 1:
            task = "regression"
        elif task is None:
            several = _has_float_labels(self.train_dataset if self.train_dataset is not None else self.eval_dataset)
            task = "multi_label_classification" if several else "single_label_classification"
        if head_of(model) == "sequence-classification":
            config.problem_type = task
        return task

    @staticmethod
    def _has_known_loss(model: Any) -> bool:
        """Whether the model's own loss is plain cross-entropy, which this class may stand in for unasked."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        own_forward = type(base).forward.__module__.startswith("transformers.")
        return own_forward and head_of(model) is not None

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the weights of sequences, which no model takes, from being dropped as unused."""
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if columns is not None and WEIGHT_COLUMN not in columns:
            self._signature_columns = [*columns, WEIGHT_COLUMN]

    def _make_loss(self, problem_type: str, class_weights: Any, focal_gamma: float) -> WeightedLoss:
        """The loss of a task."""
        if problem_type == "regression":
            if class_weights is not None or focal_gamma:
                raise ConfigurationError("class_weights and focal_gamma do not go with regression: it has no classes")
            if self.args.label_smoothing_factor:
                raise ConfigurationError("label_smoothing_factor does not go with regression: it has no classes")
            return SquaredError()
        if class_weights is not None:
            self.class_weights = self._resolve_weights(class_weights, several="multi" in problem_type)
        return LOSSES[problem_type](
            None if self.class_weights is None else torch.from_numpy(self.class_weights).float(),
            label_smoothing=self.args.label_smoothing_factor,
            focal_gamma=focal_gamma,
        )

    def _resolve_weights(self, class_weights: Any, *, several: bool) -> np.ndarray:
        model: Any = self.model
        config = model.config
        names = [str(config.id2label[index]) for index in range(config.num_labels)]
        if isinstance(class_weights, str) and class_weights == "balanced":
            labels = dataset_labels(self.train_dataset)
            return (balanced_label_weights if several else balanced_class_weights)(labels, names)
        return check_class_weights(class_weights, names)

    def _refuse_model_parallelism(self) -> None:
        """Ranks that share a batch would be counted as if each had its own."""
        config = getattr(self.accelerator, "parallelism_config", None)
        sizes = {name: getattr(config, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")}
        if shared := [name for name, size in sizes.items() if size > 1]:
            raise ConfigurationError(f"WeightedTrainer runs data-parallel ranks only; got {', '.join(shared)} > 1")

    def _silence_repeats(self, batch: dict[str, Any]) -> None:
        """Take the labels from examples that are repeated to give every rank a full last batch."""
        accelerator = self.accelerator
        world = accelerator.num_processes
        at_end = accelerator.gradient_state.end_of_dataloader and accelerator.even_batches
        if world == 1 or not at_end or self.args.dataloader_drop_last or self.token_budget is not None:
            return
        shards = getattr(self.callback_handler.train_dataloader, "batch_sampler", None)
        batches = getattr(shards, "batch_sampler", None)
        sampler, size = getattr(batches, "sampler", None), getattr(batches, "batch_size", None)
        if not (isinstance(shards, BatchSamplerShard) and isinstance(sampler, Sized) and size) or shards.split_batches:
            if not self._warned_of_repeats:
                logger.warning("cannot tell which examples of the last batch are repeated: they count twice")
                self._warned_of_repeats = True
            return
        remainder = len(sampler) % (size * world)
        if remainder:
            # The ranks' batches, one after another, are the rest of the data set and then repeats.
            real = min(max(remainder - size * accelerator.process_index, 0), size)
            batch["labels"][real:] = float("nan") if batch["labels"].is_floating_point() else IGNORE


class _TellEpoch(TrainerCallback):
    """Tells the sampler of a token budget its epoch.

    accelerate does, but not where a run is resumed: transformers 5.3 skips batches first, and then the epoch does not
    reach the sampler inside.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sampler = getattr(kwargs.get("train_dataloader"), "batch_sampler", None)
        if isinstance(sampler, TokenBudgetBatchSampler):
            sampler.set_epoch(int(state.epoch + 1e-6))


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if batch.get("labels") is None:
        raise DataError(f"a batch has no 'labels', only {', '.join(batch)}: the loss needs them")
    return batch["labels"]


def _weighted(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Numbers of examples, times the weights of the examples if there are any."""
    weights = batch.get(WEIGHT_COLUMN)
    return values if weights is None else values * weights.to(device=values.device, dtype=values.dtype)


def _has_float_labels(dataset: Any) -> bool:
    """Whether the labels of a data set are numbers with a fraction, which makes several of them multi-label."""
    if isinstance(dataset, IterableDataset):
        example = next(iter(dataset), None)
    elif not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(dataset, dict):
        return False
    else:
        example = dataset[0]
    value = example.get("labels", example.get("label")) if isinstance(example, Mapping) else None
    return value is not None and np.issubdtype(np.asarray(value).dtype, np.floating)


def _nonzero(weight: Any) -> Any:
    """A total weight to divide by; a batch without any label has a sum of zero and stays so."""
    weight = torch.as_tensor(weight)
    return torch.where(weight > 0, weight, torch.ones_like(weight))
