"""WeightedTrainer: a transformers Trainer with a weighted loss that is right under gradient accumulation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from esm_efficient import compat
from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.tasks import SPECIAL_TOKENS, head_of
from esm_efficient.training.audit import AuditCallback
from esm_efficient.training.batches import EpochCallback, budget_dataloader, mask_repeated_examples
from esm_efficient.training.losses import LOSSES, WeightedLoss, make_loss
from esm_efficient.training.weights import has_float_labels, resolve_class_weights
from esm_efficient.trunk.cache import STATES_COLUMN

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import EvalLoopOutput

logger = logging.getLogger(__name__)

BASE_CONFIG = "base_config"
"""The folder beside an adapter with the config of its base model."""


class WeightedTrainer(Trainer):
    """A `transformers.Trainer` with class weights, exact under accumulation and over several ranks.

    The loss of an optimizer step is the weighted sum over the accumulated batch, divided by the total weight of that
    batch over all micro-batches and all ranks. Loss and gradient are therefore the same however the batch is divided
    into micro-batches, which is not true of a mean of the micro-batches' weighted means. Examples that a distributed
    sampler repeats to fill the last batch have no weight. The evaluation loss is the weighted mean over the whole set,
    whatever the evaluation batch size.

    The model's ``config.problem_type`` and the labels determine the loss: cross-entropy for one class per sequence or
    per token, binary cross-entropy for several labels, squared error for numbers (`esm_efficient.training.losses`).
    Unknown labels, -100 or NaN, have no weight. A column ``sample_weight`` multiplies loss and weight of a sequence.

    Models and options with their own loss (``compute_loss_func``, a custom model class, a causal language model) keep
    it, as in Trainer. Class weights together with ``compute_loss_func`` are an error.

    Args:
        *args: as `transformers.Trainer`.
        class_weights: ``"balanced"`` for weights from the labels of ``train_dataset``; one number per class, as an
            array, a sequence or a tensor in the order of the class ids; a mapping by label name; or None for equal
            weights. With several labels per sequence they multiply the loss of positive labels. The default is None,
            unlike in `finetune`, because a WeightedTrainer without options must have the same loss as Trainer.
        focal_gamma: exponent of the focal loss; 0 for the plain loss.
        token_budget: make training batches of at most this number of tokens, padding included, from sequences of
            similar length (`TokenBudgetBatchSampler`), instead of ``per_device_train_batch_size`` sequences.
        audit: whether a run fails if a trainable parameter gets no gradient or does not move (`AuditCallback`).
        **kwargs: as `transformers.Trainer`.

    Attributes:
        class_weights: float64 array of shape (classes,), or None.

    Raises:
        ConfigurationError: the weights or the exponent do not fit the model's labels or the task, or a token budget is
            given with a stream of data.
        DataError: a class has no example, so its balanced weight is undefined.

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
        self._evaluation_losses: list[tuple[Tensor, Tensor]] | None = None
        self._last_losses: tuple[Tensor, Tensor] | None = None
        self._warned_of_repeats = False
        for column in (WEIGHT_COLUMN, STATES_COLUMN):
            compat.keep_column(self, column)
        compat.check_loaded_weights(self, self._refuse_missing_weights)

        problem_type = self._set_problem_type(self.model)
        has_options = class_weights is not None or focal_gamma
        if self.compute_loss_func is None and problem_type in LOSSES and (has_options or _has_known_loss(self.model)):
            self._loss = self._make_loss(problem_type, class_weights, focal_gamma)
            self._refuse_model_parallelism()
            compat.declare_loss_normalised(self)
        elif has_options:
            raise ConfigurationError(
                "class_weights or focal_gamma was given together with compute_loss_func: expected only one of them"
            )
        if token_budget is not None:
            if self.args.dataloader_drop_last:
                raise ConfigurationError("token_budget keeps all batches: leave dataloader_drop_last out")
            self.add_callback(EpochCallback())
        if audit and not any(isinstance(c, AuditCallback) for c in self.callback_handler.callbacks):
            self.add_callback(AuditCallback())

    @property
    def residues_trained(self) -> int:
        """Residues trained on over all ranks, without padding and special tokens; counted in the attention masks."""
        on_this_rank = torch.as_tensor(self._residues_trained, device=self.accelerator.device)
        return int(self.accelerator.reduce(on_this_rank, reduction="sum"))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as Trainer does, but leave the division by the accumulation steps to the trainer."""
        super().create_accelerator_and_postprocess()
        compat.leave_division_to_trainer(self.accelerator)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model from ``model_init``, with the same ``problem_type`` as the first."""
        model = super().call_model_init(trial)
        if self._loss is not None:  # Trainer.__init__ calls this too, and our __init__ sets the type later
            self._set_problem_type(model)
        return model

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the micro-batches of one optimizer step, and their total weight over all ranks."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if mask is not None:
                self._residues_trained += mask.sum() - SPECIAL_TOKENS * len(mask)
        if self._loss is None:
            return batches, count
        if batches and self.token_budget is None and not self.args.dataloader_drop_last:
            self._mask_repeated_examples(batches[-1])
        total = torch.zeros((), device=device)
        for batch in batches:
            total += _times_sample_weight(self._loss.weights(_labels(batch)), batch).sum().to(device)
        return batches, self.accelerator.reduce(total, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted loss of a micro-batch; in training, its share of the accumulated batch's loss."""
        if self._loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = _labels(inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHT_COLUMN)})
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        losses, weights = (_times_sample_weight(part, inputs) for part in self._loss(logits, labels))
        if model.training and num_items_in_batch is not None:
            # Data-parallel ranks average their gradients: the factor turns the average into a sum.
            loss = losses.sum() / _nonzero(num_items_in_batch) * self.accelerator.num_processes
        else:
            loss = losses.sum() / _nonzero(weights.sum())
            self._last_losses = (losses.detach(), weights.detach())
        if not return_outputs:
            return loss
        # Trainer drops the first item of a tuple, which is the loss if the model was given labels.
        return loss, (outputs if isinstance(outputs, dict) else (loss, *outputs))

    def get_train_dataloader(self) -> DataLoader:
        """Return the training batches: those of Trainer, or those of the token budget."""
        if self.token_budget is None:
            return super().get_train_dataloader()
        return budget_dataloader(self, self.token_budget)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Any, Any]:
        """Predict as Trainer does, and store the loss and weight of each example for the loss of the whole set."""
        self._last_losses = None
        result = super().prediction_step(*args, **kwargs)
        if self._evaluation_losses is not None and self._last_losses is not None:
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
        """Evaluate as Trainer does, with the weighted mean over the whole set as the loss."""
        self._evaluation_losses = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._evaluation_losses and output.metrics is not None:
                total = sum(float(losses.double().sum()) for losses, _ in self._evaluation_losses)
                weight = sum(float(weights.double().sum()) for _, weights in self._evaluation_losses)
                output.metrics[f"{metric_key_prefix}_loss"] = total / weight if weight else float("nan")
        finally:
            self._evaluation_losses = None
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does; beside an adapter, also save the base model's config, with task and label names.

        The config has its own folder, ``base_config/``: transformers would load a folder with both a ``config.json``
        and an adapter as a whole model.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "peft_config"):
            compat.save_under_own_names(model)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and hasattr(model, "peft_config"):
            folder = Path(output_dir or self.args.output_dir or ".") / BASE_CONFIG
            model.get_base_model().config.save_pretrained(folder)

    def _refuse_missing_weights(self, missing: Sequence[str]) -> None:
        """Raise if a checkpoint lacks weights: they would keep the values that the model had."""
        tied = compat.tied_weights(self.accelerator.unwrap_model(self.model))
        if lost := [name for name in missing if name not in tied]:
            raise ConfigurationError(
                f"the checkpoint lacks {len(lost)} weights of the model ({listing(lost)}): training cannot resume "
                "from it. Use another checkpoint, or load this one with from_pretrained() and start a new run"
            )

    def _set_problem_type(self, model: Any) -> str | None:
        """Return problem_type and set it on the config.

        transformers infers it from the labels in forward, but this Trainer removes them.
        """
        config = getattr(model, "config", None)
        if config is None or self.compute_loss_func is not None:
            return None
        problem_type = config.problem_type
        if problem_type is None and config.num_labels == 1:
            problem_type = "regression"
        elif problem_type is None:
            multi_label = has_float_labels(self.eval_dataset if self.train_dataset is None else self.train_dataset)
            problem_type = "multi_label_classification" if multi_label else "single_label_classification"
        if head_of(model) == "sequence-classification":
            config.problem_type = problem_type
        return problem_type

    def _make_loss(self, problem_type: str, class_weights: Any, focal_gamma: float) -> WeightedLoss:
        """Return the loss of a task, and set `class_weights`."""
        if class_weights is not None:
            if problem_type == "regression":
                raise ConfigurationError(
                    "class_weights with regression: expected None, because numbers have no classes"
                )
            model: Any = self.model
            config = model.config
            names = [str(config.id2label[index]) for index in range(config.num_labels)]
            self.class_weights = resolve_class_weights(
                class_weights, self.train_dataset, names, multi_label=problem_type == "multi_label_classification"
            )
        return make_loss(
            problem_type,
            None if self.class_weights is None else torch.from_numpy(self.class_weights).float(),
            label_smoothing=self.args.label_smoothing_factor,
            focal_gamma=focal_gamma,
        )

    def _refuse_model_parallelism(self) -> None:
        """Raise if ranks share a batch: their weights would be counted once per rank."""
        config = getattr(self.accelerator, "parallelism_config", None)
        sizes = {name: getattr(config, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")}
        if shared := [name for name, size in sizes.items() if size > 1]:
            raise ConfigurationError(f"WeightedTrainer supports only data-parallel ranks; got {', '.join(shared)} > 1")

    def _mask_repeated_examples(self, batch: dict[str, Any]) -> None:
        loader = self.callback_handler.train_dataloader
        if not mask_repeated_examples(batch, loader, self.accelerator) and not self._warned_of_repeats:
            logger.warning("cannot tell which examples of the last batch are repeated: they count twice")
            self._warned_of_repeats = True


def _has_known_loss(model: Any) -> bool:
    """Return whether a model's own loss is plain cross-entropy, which WeightedTrainer may replace by default."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_of_transformers = type(base).forward.__module__.startswith("transformers.")
    return is_of_transformers and head_of(model) is not None


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
