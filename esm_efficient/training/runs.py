"""WatchedTrainer: a transformers Trainer whose runs stop at broken numbers, and resume in any pass of a stream."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import has_length

from esm_efficient import compat
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.out_of_memory import OutOfMemoryError
from esm_efficient.published import BASE_CONFIG
from esm_efficient.saving import portable_saving, save_base_config, share_weights
from esm_efficient.tasks import SPECIAL_TOKENS
from esm_efficient.training.arguments import check_token_budget, half_dtype
from esm_efficient.training.batches import (
    EndlessStream,
    EpochCallback,
    budget_dataloader,
    count_real_examples,
    is_stream,
    stream_dataloader,
    stream_evaluation_dataloader,
)
from esm_efficient.training.collating import attach_packing_of, packing_collator
from esm_efficient.training.divergence import DivergenceWatch, check_parameters
from esm_efficient.training.resuming import start_run

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import TrainerState, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

logger = logging.getLogger(__name__)

_STATE = "WeightedTrainer"
"""The key of what a checkpoint keeps of a trainer, among the states of callbacks."""


class WatchedTrainer(Trainer):
    """What `WeightedTrainer` adds to a Trainer besides its loss.

    A run stops at the next logging step, evaluation or save after a number is NaN or infinite
    (`esm_efficient.training.divergence`). A stream without a length fills every accumulated batch. Residues are
    counted. Evaluation and prediction read all rows in their order, whatever the options of the training batches.

    Args:
        *args: as `transformers.Trainer`.
        token_budget: as `WeightedTrainer`.
        **kwargs: as `transformers.Trainer`.

    Attributes:
        stream: the training batches of a run on a stream; None otherwise.
        residues_resumed: residues that the run had trained on whose checkpoint this one resumed.
        steps_resumed: its optimizer steps.
    """

    stream: EndlessStream | None = None
    residues_resumed = 0
    steps_resumed = 0
    _residues_trained: Tensor | int = 0
    _losses: Tensor | float = 0.0
    _losses_resumed = 0.0
    _real_examples = sys.maxsize
    _warned_of_repeats = False
    _last_batch: tuple[str, tuple[int, int] | None] = ("training", None)
    """The phase of the latest batch, and its sequences and tokens per sequence."""

    def __init__(self, *args: Any, token_budget: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_budget = token_budget
        check_token_budget(token_budget, self.args)
        self._watch = DivergenceWatch(self.accelerator)
        compat.check_loaded_weights(self, self._refuse_missing_weights)
        self.add_callback(EpochCallback(self))

    @property
    def residues_trained(self) -> int:
        """Residues trained on over all ranks, without padding and special tokens; counted in the attention masks.

        Sequences that accelerate repeats to give every rank a full batch do not count.
        Those of the run whose checkpoint this one resumed, `residues_resumed`, count too; aborted attempts do not.
        """
        on_this_rank = torch.as_tensor(self._residues_trained, device=self.accelerator.device)
        return self.residues_resumed + int(self.accelerator.reduce(on_this_rank, reduction="sum"))

    @property
    def mean_loss(self) -> float:
        """Mean loss of the optimizer steps over all ranks, also of those before the checkpoint that was resumed.

        NaN before the first step, and if a checkpoint does not know it.
        """
        return self._total_loss() / self.state.global_step if self.state.global_step else math.nan

    def _total_loss(self) -> float:
        """Return the sum of the losses of the optimizer steps."""
        on_this_rank = torch.as_tensor(self._losses, device=self.accelerator.device)
        return self._losses_resumed + float(self.accelerator.reduce(on_this_rank, reduction="mean"))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as Trainer does, but leave the division by the accumulation steps to the trainer.

        Batches in pinned memory go to a GPU without a wait.
        """
        super().create_accelerator_and_postprocess()
        compat.leave_division_to_trainer(self.accelerator)
        if self.accelerator.device.type == "cuda" and self.args.dataloader_pin_memory:
            self.accelerator.dataloader_config.non_blocking = True

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does, and stop a run whose numbers are broken (`esm_efficient.training.divergence`).

        A run resumes from a whole checkpoint of the same run only (`start_run`).

        Raises:
            DataError: labels do not fit the model, or none is known.
            DivergenceError: a loss, a gradient or a parameter is NaN or infinite, or the loss has exploded.
            OutOfMemoryError: the device has too little memory; the message says what would fit.
        """
        self._last_batch = "training", None
        try:
            result = super().train(start_run(self, resume_from_checkpoint), *args, **kwargs)
            self._watch.look(self.args, at_end=True)
            check_parameters(self.accelerator.unwrap_model(self.model), self.args)
            return result
        except OutOfMemoryError:  # a profiler has explained it, or an evaluation
            raise
        except torch.OutOfMemoryError as error:
            raise self._explain(error) from error
        finally:
            self.end_run()

    def _explain(self, error: torch.OutOfMemoryError) -> OutOfMemoryError:
        """Return the error to raise in place of torch's."""
        from esm_efficient.estimation.advice import explain_out_of_memory  # an estimator, which other runs do not need

        device, (phase, batch) = self.accelerator.device, self._last_batch
        return explain_out_of_memory(
            error,
            phase=phase,
            held=None,
            model=self.accelerator.unwrap_model(self.model),
            batch=batch,
            memory=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
            accumulation=self.args.gradient_accumulation_steps,
            optimizer=self.optimizer,
            dtype=half_dtype(self.args),
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the micro-batches of one optimizer step, and the number of items as Trainer counts them.

        There is none for a run that resumes after its last step, or after early stopping; Trainer would take one more.
        """
        is_over = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        if self.is_in_train and is_over:
            self.control.should_training_stop = True
            return [], None
        if self.is_in_train and is_stream(self.callback_handler.train_dataloader):
            epoch_iterator = iter(self._take_from_stream(num_batches))
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._real_examples = self._count_real_examples()
        for number, batch in enumerate(batches, 1):
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if mask is not None:
                real = mask[: self._real_examples] if number == len(batches) else mask
                self._residues_trained += real.sum() - SPECIAL_TOKENS * len(real)
        return batches, count

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Do what Trainer does, and count a loss that is NaN or infinite."""
        self._last_batch = "training", _shape_of(inputs)
        loss = super().training_step(model, attach_packing_of(inputs), *args, **kwargs)
        self._losses = self._losses + loss.detach().to(self.accelerator.device, torch.float32)
        self._watch.observe_loss(loss, self.state.global_step + 1)
        return loss

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Do what Trainer does."""
        self._last_batch = "evaluation", _shape_of(inputs)
        return super().prediction_step(model, attach_packing_of(inputs), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, unless the numbers of the run are broken."""
        if self.is_in_train:
            if {"loss", "train_loss"} & logs.keys():  # all ranks log these; a callback may log on one alone
                self._watch.look(self.args)
            self._watch.look_at_logs(logs, self.args)
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the training batches: those of Trainer, of the token budget, or of a stream."""
        if self.train_dataset is not None and has_length(self.train_dataset) and not len(self.train_dataset):
            raise DataError("train_dataset has no rows: expected at least one")
        with packing_collator(self):
            if self.token_budget is not None:
                return budget_dataloader(self, self.token_budget)
            if is_stream(self.train_dataset) and self.accelerator.dispatch_batches is None:
                return stream_dataloader(self)
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the evaluation batches of all rows in their order: those of Trainer, or of a stream."""
        sets: Any = self.eval_dataset
        chosen = sets[eval_dataset] if isinstance(eval_dataset, str) else sets if eval_dataset is None else eval_dataset
        with packing_collator(self), _all_rows_in_order(self.args):
            if is_stream(chosen) and self.accelerator.dispatch_batches is None:
                return stream_evaluation_dataloader(self, chosen)
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the batches to predict from, of all rows in their order: those of Trainer, or of a stream."""
        with packing_collator(self), _all_rows_in_order(self.args):
            if is_stream(test_dataset) and self.accelerator.dispatch_batches is None:
                return stream_evaluation_dataloader(self, test_dataset)
            return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as Trainer does, unless the set is empty or the numbers of the run are broken.

        Raises:
            DataError: the set is empty.
            DivergenceError: the numbers are broken.
            OutOfMemoryError: the device has too little memory.
        """
        dataset = getattr(dataloader, "dataset", None)
        if has_length(dataset) and not len(dataset):
            raise DataError("the evaluation set has no rows: expected at least one")
        if not self.is_in_train:
            self._watch = DivergenceWatch(self.accelerator)
        self._watch.look(self.args)
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if self.is_in_train:  # `train` explains it, or a profiler
                raise
            raise self._explain(error) from error
        if not output.num_samples:
            raise DataError("the evaluation set is a stream without rows: expected at least one")
        self._watch.look(self.args)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does; beside an adapter, also save the base model's config, with task and label names.

        The config has its own folder, ``base_config/``: transformers would load a folder with both a ``config.json``
        and an adapter as a whole model.
        """
        model = self.accelerator.unwrap_model(self.model)
        if _internal_call and self.is_in_train:
            self._watch.look(self.args)
            check_parameters(model, self.args)
            states: Any = self.state.stateful_callbacks
            counts = {"residues": self.residues_trained, "loss": self._total_loss()}
            states[_STATE] = {"args": {}, "attributes": counts}
        whole = nullcontext() if _internal_call else _gathered_weights(self.accelerator)
        names = portable_saving(model) if isinstance(model, PreTrainedModel) else nullcontext()
        with whole, names:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            share_weights(folder)
            if hasattr(model, "get_base_model"):  # adapters that are injected into a model have no base model
                save_base_config(model, folder / BASE_CONFIG)

    def begin_run(self, state: TrainerState) -> None:
        """Reset what is counted in a run; `EpochCallback` calls this for every attempt of `train`."""
        self.stream = None
        self._watch = DivergenceWatch(self.accelerator)
        states: Any = state.stateful_callbacks
        saved = states.get(_STATE, {}).get("attributes", {})
        self._residues_trained, self.residues_resumed = 0, int(saved.get("residues", 0))
        self._losses, self._losses_resumed = 0.0, float(saved.get("loss", 0.0 if state.global_step == 0 else math.nan))
        self.steps_resumed = state.global_step

    def end_run(self) -> None:
        """Let go of what a run needed; `train` calls this also after an error."""
        self.stream = None
        self.is_in_train = False

    def _take_from_stream(self, count: int) -> list:
        """Return the next micro-batches of a stream, which are those of the uninterrupted run if this one resumed."""
        args, state = self.args, self.state
        if self.stream is None:
            skip = 0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps
            self.stream = EndlessStream(self.callback_handler.train_dataloader, seed=args.seed, skip=skip)
        batches = self.stream.take(count)
        if not batches and not state.global_step:
            raise DataError(f"the training set is a stream with fewer than {count} batches: expected at least so many")
        return batches

    def _count_real_examples(self) -> int:
        """Count the examples of the newest batch that accelerate does not repeat to give every rank a full batch."""
        if self.token_budget is not None or self.args.dataloader_drop_last:
            return sys.maxsize
        real = count_real_examples(self.callback_handler.train_dataloader, self.accelerator)
        if real is None and not self._warned_of_repeats:
            logger.warning("cannot tell which examples of the last batch are repeated: they count twice")
            self._warned_of_repeats = True
        return sys.maxsize if real is None else real

    def _refuse_missing_weights(self, missing: Sequence[str]) -> None:
        """Raise if a checkpoint lacks weights: they would keep the values that the model had."""
        tied = compat.tied_weights(self.accelerator.unwrap_model(self.model))
        if lost := [name for name in missing if name not in tied]:
            raise ConfigurationError(
                f"the checkpoint lacks {len(lost)} weights of the model ({listing(lost)}): training cannot resume "
                "from it. Use another checkpoint, or load this one with from_pretrained() and start a new run"
            )


def _shape_of(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the sequences and the tokens per sequence of a batch; None if they are unknown."""
    states = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return None if states is None or states.ndim < 2 else (states.shape[0], states.shape[1])


@contextmanager
def _all_rows_in_order(args: TrainingArguments) -> Iterator[None]:
    """Make the data loaders that a Trainer creates in a ``with`` block read every row, in the order of the rows.

    Trainer evaluates with options of training too: sorted by length, predictions would be given to other rows, and
    without the last batch, rows would have none.
    """
    before = args.train_sampling_strategy, args.dataloader_drop_last
    args.train_sampling_strategy, args.dataloader_drop_last = "sequential", False
    try:
        yield
    finally:
        args.train_sampling_strategy, args.dataloader_drop_last = before


@contextmanager
def _gathered_weights(accelerator: Accelerator) -> Iterator[None]:
    """Make a Trainer save whole weights under FSDP in a ``with`` block.

    With sharded state dicts, the save_model of transformers 5.3 writes no weights and raises nothing.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    kind = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(kind)
