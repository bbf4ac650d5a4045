"""WeightedTrainer: a transformers Trainer with a weighted loss that is right under gradient accumulation."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from esm_efficient import compat
from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import (
    base_model_of,
    has_known_loss,
    head_of,
    label_names_of,
    problem_type_of,
    set_problem_type,
)
from esm_efficient.training.audit import AuditCallback
from esm_efficient.training.batches import forget_labels
from esm_efficient.training.collating import refuse_rows_without_padding
from esm_efficient.training.losses import LOSSES, WeightedLoss, make_loss
from esm_efficient.training.runs import WatchedTrainer
from esm_efficient.training.weights import check_labels, resolve_class_weights
from esm_efficient.trunk.cache import STATES_COLUMN

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import TrainerState
    from transformers.trainer_utils import EvalLoopOutput

logger = logging.getLogger(__name__)


class WeightedTrainer(WatchedTrainer):
    """A `transformers.Trainer` with class weights, exact under accumulation and over several ranks.

    The loss of an optimizer step is the weighted sum over the accumulated batch, divided by the total weight of that
    batch over all micro-batches and all ranks. Loss and gradient are therefore the same however the batch is divided
    into micro-batches, which is not true of a mean of the micro-batches' weighted means. Examples that a distributed
    sampler repeats to fill the last batch have no weight. The evaluation loss is the weighted mean over the whole set,
    whatever the evaluation batch size.

    The model's head and its ``config.problem_type`` determine the loss, or else the labels of the first batch:
    cross-entropy for one class per sequence or per token, binary cross-entropy for several labels, squared error for
    numbers (`esm_efficient.training.losses`). Unknown labels, -100 or NaN, have no weight. A column ``sample_weight``
    multiplies loss and weight of a sequence.

    Models and options with their own loss (``compute_loss_func``, a custom model class, a model with its own
    ``loss_function``, a causal language model) keep it, as in Trainer. Class weights together with
    ``compute_loss_func`` are an error. A subclass that overrides `compute_loss` is treated as in Trainer: its loss is
    divided by the accumulation steps, unless ``loss_is_scaled_for_ga`` says that it needs no division. Class weights
    or a focal exponent that it does not use are an error in the first step.

    Args:
        *args: as `transformers.Trainer`.
        class_weights: ``"balanced"`` for weights from the labels of ``train_dataset``; one number per class, as an
            array, a sequence or a tensor in the order of the class ids; a mapping by label name or by class id; or None
            for equal weights. The classes of a masked language model are its token ids. With several labels per
            sequence they multiply the loss of positive labels. The default is None, unlike in `finetune`, because a
            WeightedTrainer without options must have the loss of Trainer.
        focal_gamma: exponent of the focal loss; 0 for the plain loss.
        token_budget: make training batches of at most this number of tokens, padding included, from sequences of
            similar length (`TokenBudgetBatchSampler`), instead of ``per_device_train_batch_size`` sequences.
        audit: whether a run fails if a trainable parameter gets no gradient or does not move (`AuditCallback`).
        **kwargs: as `transformers.Trainer`.

    Attributes:
        class_weights: float64 array of shape (classes,), or None.

    Raises:
        ConfigurationError: the weights or the exponent do not fit the model's labels or the task, or a token budget is
            given with a stream of data; or, in training, a subclass's `compute_loss` does not use them, or sequences
            of unequal lengths have no tokenizer and no collator that pads them.
        DataError: a class has no example, so its balanced weight is undefined; or, in training, labels do not fit the
            model or none is known.
        AuditError: in training, if a parameter got no gradient or did not move.
        DivergenceError: in training, if a loss, a gradient or a parameter is NaN or infinite, or the loss has exploded.

    Example:
        >>> trainer = WeightedTrainer(
        ...     model,
        ...     args,
        ...     train_dataset=tokenized["train"],
        ...     processing_class=tokenizer,
        ...     class_weights={"non-membrane": 0.7, "membrane": 1.7},
        ... )  # doctest: +SKIP
    """

    _is_weighted = False
    _problem_type: str | None = None
    _loss: WeightedLoss | None = None
    _step_batches: list | None = None
    _step_scale: Tensor | None = None
    _step_divisor = 1

    def __init__(
        self,
        *args: Any,
        class_weights: str
        | Mapping[str, float]
        | Mapping[int, float]
        | Sequence[float]
        | np.ndarray
        | Tensor
        | None = None,
        focal_gamma: float = 0.0,
        token_budget: int | None = None,
        audit: bool = True,
        **kwargs: Any,
    ) -> None:
        with warnings.catch_warnings():
            if kwargs.get("compute_loss_func") is None:  # transformers cannot smooth several labels; this loss does
                warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label", UserWarning)
            super().__init__(*args, token_budget=token_budget, **kwargs)
        self.class_weights: np.ndarray | None = None
        self._focal_gamma = focal_gamma
        self._evaluation_losses: list[tuple[Tensor, Tensor]] | None = None
        self._has_other_loss: Tensor
        self._last_losses: tuple[Tensor, Tensor] | None = None
        compat.keep_column(self, STATES_COLUMN)

        self._has_options = has_options = class_weights is not None or bool(focal_gamma)
        if has_options and self.compute_loss_func is not None:
            raise ConfigurationError(
                "class_weights or focal_gamma was given together with compute_loss_func: expected only one of them"
            )
        self._is_weighted = has_options or (self.compute_loss_func is None and has_known_loss(self.model))
        if self._is_weighted:
            self._choose_loss(class_weights)
            self._refuse_model_parallelism()
        self._keep_sample_weights()
        if audit and not any(isinstance(c, AuditCallback) for c in self.callback_handler.callbacks):
            self.add_callback(AuditCallback())

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model from ``model_init``, with the same ``problem_type`` as the first."""
        model = super().call_model_init(trial)
        if self._problem_type is not None:  # Trainer.__init__ calls this too, and our __init__ sets the type later
            set_problem_type(model, self._problem_type)
        return model

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the micro-batches of one optimizer step, and the number of items as Trainer counts them."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_batches, self._step_scale = batches, None
        self._step_divisor = len(batches) if compat.divides_loss(self, count) else 1
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Do what Trainer does, and refuse options of the loss that an overriding `compute_loss` does not use."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._has_options and self._step_batches:  # this class's loss takes the batches of the step
            raise ConfigurationError(
                f"class_weights or focal_gamma was given, but {type(self).__name__}.compute_loss does not use them: "
                "call super().compute_loss() there, or leave them out and weight the loss there"
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted loss of a micro-batch.

        In an optimizer step this is the micro-batch's share of the accumulated batch's loss, times the number by which
        Trainer divides it. A method that overrides this one may therefore add a mean over the micro-batch to it. One
        that does not call it has its loss divided exactly as in Trainer.
        """
        if not self._is_weighted:
            return super().compute_loss(model, self._without_sample_weights(inputs), return_outputs, num_items_in_batch)
        scale = self._scale_of_step() if model.training else None
        # Gradients are synchronised in the last micro-batch of a step.
        labels = self._real_labels(inputs, is_last=scale is not None and self.accelerator.sync_gradients)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHT_COLUMN)})
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        loss_function = self._loss_for(labels)
        losses, weights = (_times_sample_weight(part, inputs) for part in loss_function(logits, labels))
        if labels.device.type != "cpu":  # on a CPU the loss has raised
            self._watch.observe_labels(loss_function.wrong(logits, labels))
        if scale is not None:
            loss = losses.sum() * scale
            self._watch.observe_logits(logits)
        else:
            loss = losses.sum() / _nonzero(weights.sum())
            self._last_losses = (losses.detach(), weights.detach())
        if not return_outputs:
            return loss
        # Trainer drops the first item of a tuple, which is the loss if the model was given labels.
        return loss, (outputs if isinstance(outputs, dict) else (loss, *outputs))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Any, Any]:
        """Predict as Trainer does, and store the loss and weight of each example for the loss of the whole set."""
        self._last_losses = None
        if not (self._is_weighted and inputs.get("labels") is not None):
            inputs = self._without_sample_weights(inputs)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if self._evaluation_losses is not None and self._last_losses is not None:
            if type(self).compute_loss is not WeightedTrainer.compute_loss and result[0] is not None:
                losses, weights = self._last_losses
                own = (losses.sum() / _nonzero(weights.sum())).to(result[0].dtype)
                self._has_other_loss = self._has_other_loss | ~torch.isclose(result[0], own, rtol=1e-5, equal_nan=True)
            self._evaluation_losses.append(self.accelerator.gather_for_metrics(self._last_losses))
        return result

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with the weighted mean over the whole set as the loss.

        If an overriding `compute_loss` returns another loss, such as one with a penalty, it is the mean of that over
        the batches, as Trainer has it.
        """
        self._evaluation_losses = []
        self._has_other_loss = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            other = bool(self.accelerator.gather(self._has_other_loss).any())
            if self._evaluation_losses and output.metrics is not None and not other:
                total = sum(float(losses.cpu().double().sum()) for losses, _ in self._evaluation_losses)
                weight = sum(float(weights.cpu().double().sum()) for _, weights in self._evaluation_losses)
                output.metrics[f"{metric_key_prefix}_loss"] = total / weight if weight else float("nan")
        finally:
            self._evaluation_losses = None
        return output

    def begin_run(self, state: TrainerState) -> None:
        """Reset what is counted in a run, check that its sequences can be padded, and check its labels.

        The labels are left to an overriding `compute_loss`, which may have its own.
        """
        super().begin_run(state)
        refuse_rows_without_padding(self)
        if type(self).compute_loss is WeightedTrainer.compute_loss and self._is_weighted:
            check_labels(self.train_dataset, self.data_collator, self.model, self._problem_type)

    def end_run(self) -> None:
        """Let go of the batches of the run."""
        super().end_run()
        self._step_batches = self._step_scale = None

    def _choose_loss(self, class_weights: Any) -> None:
        """Check the options, and choose the loss if the model tells the task; otherwise the first batch does."""
        kind = problem_type_of(self.model)
        if kind is not None and kind not in LOSSES:
            raise ConfigurationError(f"problem_type={kind!r} in the model's config: expected {', '.join(LOSSES)}")
        if class_weights is not None:
            if isinstance(class_weights, str) and head_of(self.model) == "masked-lm":
                raise ConfigurationError(
                    f"class_weights={class_weights!r} with a masked language model: expected one number per token of "
                    "the vocabulary, or None, because the data collator chooses the labels"
                )
            self.class_weights = resolve_class_weights(
                class_weights, self.train_dataset, label_names_of(self.model), problem_type=kind
            )
        # The options of classes are the same for one class and for several labels: an error in them need not wait.
        loss = self._make_loss(kind or "single_label_classification")
        if kind is not None:
            self._set_loss(kind, loss)

    def _make_loss(self, problem_type: str) -> WeightedLoss:
        weights = None if self.class_weights is None else torch.from_numpy(self.class_weights).float()
        return make_loss(
            problem_type,
            weights if weights is None else weights.to(self.accelerator.device),  # once, not in every micro-batch
            label_smoothing=self.args.label_smoothing_factor,
            focal_gamma=self._focal_gamma,
        )

    def _set_loss(self, problem_type: str, loss: WeightedLoss) -> None:
        self._problem_type, self._loss = problem_type, loss
        set_problem_type(self.model, problem_type)

    def _loss_for(self, labels: Tensor) -> WeightedLoss:
        """Return the loss; if the model does not tell the task, the first labels do, as in transformers' models."""
        if self._loss is None:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            self._set_loss(kind, self._make_loss(kind))
        assert self._loss is not None
        return self._loss

    def _scale_of_step(self) -> Tensor | None:
        """Return the factor of a micro-batch's summed loss in its optimizer step; None outside of one.

        It is computed at the first use, because the labels need not fit this loss if an overriding `compute_loss` has
        its own. All ranks are then at the same place.
        """
        if self._step_scale is None and self._step_batches:
            batches, self._step_batches = self._step_batches, None
            total = torch.zeros((), device=self.accelerator.device)
            for batch in batches:
                labels = self._real_labels(batch, is_last=batch is batches[-1])
                total += _times_sample_weight(self._loss_for(labels).weights(labels), batch).sum().to(total.device)
            total = self.accelerator.reduce(total, reduction="sum")
            self._watch.observe_weight(total)
            # Data-parallel ranks average their gradients: their number turns the average into a sum.
            self._step_scale = self._step_divisor * self.accelerator.num_processes / _nonzero(total)
        return self._step_scale

    def _keep_sample_weights(self) -> None:
        """Keep the weights' column in the batches if the loss uses it; otherwise warn that it has no effect."""
        self._model_takes_weights = WEIGHT_COLUMN in inspect.signature(base_model_of(self.model).forward).parameters
        if self._is_weighted:
            compat.keep_column(self, WEIGHT_COLUMN)
        elif not self._model_takes_weights and WEIGHT_COLUMN in _columns_of(self.train_dataset):
            logger.warning(
                "the column %s has no effect: the model or compute_loss_func has its own loss", WEIGHT_COLUMN
            )

    def _without_sample_weights(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs without the weights' column, unless the model takes it."""
        if self._model_takes_weights or not isinstance(inputs, Mapping) or WEIGHT_COLUMN not in inputs:
            return inputs
        return {name: value for name, value in inputs.items() if name != WEIGHT_COLUMN}

    def _refuse_model_parallelism(self) -> None:
        """Raise if ranks share a batch: their weights would be counted once per rank."""
        config = getattr(self.accelerator, "parallelism_config", None)
        sizes = {name: getattr(config, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")}
        if shared := [name for name, size in sizes.items() if size > 1]:
            raise ConfigurationError(f"WeightedTrainer supports only data-parallel ranks; got {', '.join(shared)} > 1")

    def _real_labels(self, batch: Mapping[str, Any], *, is_last: bool) -> Tensor:
        """Return the labels of a micro-batch; in the last one of an epoch, those of repeated examples are unknown."""
        labels = _labels(batch)
        if self._problem_type == "regression":
            labels = labels.float()  # -100 means unknown in class ids alone
        return forget_labels(labels, self._real_examples) if is_last else labels


def _columns_of(dataset: Any) -> Sequence[str]:
    return getattr(dataset, "column_names", None) or ()


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if batch.get("labels") is None:
        raise DataError(f"a batch has no 'labels', only {', '.join(batch)}: the loss needs them")
    return batch["labels"]


def _times_sample_weight(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return one number per example, multiplied by the examples' weights if there are any."""
    weights = batch.get(WEIGHT_COLUMN)
    return values if weights is None else values * weights.to(device=values.device, dtype=values.dtype)


def _nonzero(weight: Any) -> Any:
    """Return a total weight to divide by; without any label it is 1, and the loss is 0."""
    weight = torch.as_tensor(weight)
    return torch.where(weight > 0, weight, torch.ones_like(weight))
