"""Training batches of a `WeightedTrainer`: those of a token budget, and examples that fill the last batch."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Sized
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler
from torch.utils.data import RandomSampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, find_batch_size
from transformers.trainer_utils import has_length, seed_worker

from esm_efficient import compat
from esm_efficient.data.batching import TokenBudgetBatchSampler, lengths_of
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import IGNORE

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from esm_efficient.training.runs import WatchedTrainer

logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """Sets the order of each epoch, and tells callbacks where the passes of a stream end.

    accelerate sets the epoch of a batch sampler too, but not always when a run resumes: transformers first wraps the
    loader to skip batches, and the epoch does not reach a sampler that is inside of several others.
    """

    def __init__(self, trainer: WatchedTrainer) -> None:
        self._trainer = trainer
        self._is_telling = False
        self._generator: torch.Generator | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count."""
        self._trainer.begin_run(state)
        self._is_telling = False

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch."""
        loader, epoch = kwargs.get("train_dataloader"), int(state.epoch + 1e-6)
        sampler = getattr(loader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None)
        self._seed_order(loader, args.seed if args.data_seed is None else args.data_seed, epoch)
        stream = self._trainer.stream
        if stream is not None and stream.batches and not self._is_telling:
            stream.skip_pass()  # a callback ended the epoch before the stream did

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Tell all callbacks that a pass has ended in this step; Trainer tells them at the end of training."""
        stream = self._trainer.stream
        if stream is None:
            return control
        state.epoch = stream.passes + stream.batches / (state.max_steps * args.gradient_accumulation_steps)
        if not stream.ends_pass or control.should_training_stop or state.global_step >= state.max_steps:
            return control
        self._is_telling = True
        return self._trainer.callback_handler.on_epoch_end(args, state, control)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Tell all callbacks that a pass has begun."""
        if self._is_telling:
            control = self._trainer.callback_handler.on_epoch_begin(args, state, control)
            self._is_telling = False
        return control

    def _seed_order(self, loader: Any, seed: int, epoch: int) -> None:
        """Let the order of an epoch depend on its number, and be the same on all ranks.

        Trainer takes the order of ``group_by_length``, and without ``use_seedable_sampler`` every random order, from
        the state that the random numbers have when the epoch begins. A run that resumes in a later epoch has another
        state and another order, and so may the ranks have. The first epoch of one process keeps Trainer's order.
        """
        sampler = _innermost_sampler(loader)
        is_random = isinstance(sampler, (LengthGroupedSampler, RandomSampler))
        if not is_random or isinstance(sampler, SeedableRandomSampler):
            return
        if self._trainer.accelerator.num_processes == 1:
            is_of_user = sampler.generator is not None and sampler.generator is not self._generator
            if epoch == 0 or is_of_user:
                return
        sampler.generator = self._generator = torch.Generator().manual_seed(seed + epoch)


class EndlessStream:
    """The micro-batches of a training set without a length, pass after pass.

    Trainer starts a new epoch where a stream ends. What is left of an accumulated batch then has no optimizer step, and
    its gradient stays for the first step of the next epoch. Here the next pass completes the accumulated batch. A run
    also resumes in any pass, by the number of micro-batches that it has trained on.

    Attributes:
        passes: number of complete passes.
        batches: micro-batches of the pass that has begun.
        ends_pass: whether a pass ended in the micro-batches that were taken last.
    """

    def __init__(self, dataloader: Any, *, seed: int, skip: int = 0) -> None:
        self._dataloader, self._seed = dataloader, seed
        self._iterator: Iterator | None = None
        self._has_ended = self.ends_pass = False
        self.passes = self.batches = 0
        for _ in range(skip):
            if self._next() is None:
                raise DataError(
                    f"the stream ended for good after fewer than {skip} batches, which the checkpoint has trained on: "
                    "expected the stream of the first run"
                )

    def take(self, count: int) -> list:
        """Return the next micro-batches; none if the stream has ended for good before there were so many."""
        before = self.passes
        batches = list(itertools.islice(iter(self._next, None), count))
        self.ends_pass = self.passes > before
        if len(batches) == count:
            return batches
        if not self._has_ended and (batches or self.passes):
            logger.warning(
                "the stream ended for good and training stops; its last %d batch(es) fill no accumulated batch and are "
                "left out",
                len(batches),
            )
        self._has_ended = True
        return []

    def skip_pass(self) -> None:
        """Begin the next pass."""
        self.passes, self.batches, self._iterator = self.passes + 1, 0, None

    def _next(self) -> Any:
        is_first = self._iterator is None
        if self._has_ended:
            return None
        if self._iterator is None:
            if hasattr(self._dataloader, "set_epoch"):
                self._dataloader.set_epoch(self.passes)
            self._iterator = iter(self._dataloader)
        # A later pass takes no random number, so that a run that resumes there has the same dropout.
        with torch.random.fork_rng(devices=[], enabled=is_first and self.passes > 0):
            if is_first and self.passes > 0:
                torch.manual_seed(self._seed + self.passes)
            batch = next(self._iterator, None)
        if batch is None:
            if is_first:
                return None
            self.skip_pass()
            return self._next()
        self.batches += 1
        if getattr(self._dataloader, "end_of_dataloader", False):
            next(self._iterator, None)  # accelerate's loader only then knows that the pass is over
            self.skip_pass()
        return batch


class EndlessRows(torch.utils.data.IterableDataset):
    """The rows of a stream for one of several ranks, pass after pass; all batches are full, and no row is repeated.

    accelerate would repeat rows at the end of each pass.
    """

    def __init__(self, dataset: Any, *, batch_size: int, ranks: int, rank: int) -> None:
        self.dataset, self._total, self._own = (
            dataset,
            batch_size * ranks,
            slice(rank * batch_size, (rank + 1) * batch_size),
        )

    def __iter__(self) -> Iterator[Any]:
        rows: list = []
        for number in itertools.count():
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(number)
            is_empty = True
            for row in self.dataset:
                is_empty = False
                rows.append(row)
                if len(rows) == self._total:
                    yield from rows[self._own]
                    rows = []
            if is_empty:
                return


class EvaluationRows(torch.utils.data.IterableDataset):
    """One pass of a stream for one of several ranks, which all have equally many batches.

    Rows of the last batches are repeated to fill them; `accelerate.Accelerator.gather_for_metrics` drops the repeated
    ones by the remainder of the data loader. It must run in the process of the loader, whose remainder it sets.
    """

    loader: Any = None

    def __init__(self, dataset: Any, *, batch_size: int, ranks: int, rank: int) -> None:
        self.dataset, self._total = dataset, batch_size * ranks
        self._own = slice(rank * batch_size, (rank + 1) * batch_size)

    def __iter__(self) -> Iterator[Any]:
        rows: list = []
        for row in self.dataset:
            rows.append(row)
            if len(rows) == self._total:
                yield from rows[self._own]
                rows = []
        self.loader.remainder = len(rows)
        if rows:
            yield from list(itertools.islice(itertools.cycle(rows), self._total))[self._own]


class EvaluationLoader(DataLoaderShard):
    """A data loader that knows at its last batch how many rows of it count.

    Trainer repeats a batch's loss to the length of a whole batch, and `accelerate.Accelerator.gather_for_metrics` then
    drops what is too much. Without the number, a short last batch of a stream would count as a whole one.
    """

    remainder: int

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if self.end_of_dataloader and self.remainder < 0:
                self.remainder = find_batch_size(batch) or 0
            yield batch


def stream_evaluation_dataloader(trainer: Trainer, dataset: Any) -> DataLoader:
    """Return a Trainer's data loader for a pass of a stream; of several ranks, every one reads all rows.

    accelerate's own loader for streams fails at an empty stream, and on several ranks at batches that are padded to
    different lengths.
    """
    args, accelerator = trainer.args, trainer.accelerator
    ranks, size, loading = accelerator.num_processes, args.eval_batch_size, _loading_options(args, accelerator)
    rows, collate = compat.without_unused_columns(trainer, dataset, trainer.data_collator)
    if ranks > 1:
        rows = EvaluationRows(rows, batch_size=size, ranks=ranks, rank=accelerator.process_index)
        loading |= {"num_workers": 0, "persistent_workers": False, "prefetch_factor": None}
    loader = EvaluationLoader(rows, device=accelerator.device, batch_size=size, collate_fn=collate, **loading)
    if ranks > 1:
        rows.loader = loader
    return loader


def stream_dataloader(trainer: Trainer) -> DataLoader:
    """Return a Trainer's data loader for a stream; of several ranks, every one reads all rows and keeps its share.

    Raises:
        ConfigurationError: on several ranks, something is to be done at the end of an epoch.
    """
    args, accelerator = trainer.args, trainer.accelerator
    ranks, size = accelerator.num_processes, args.train_batch_size
    _refuse_found_size(args, "a stream")
    if ranks > 1 and "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy):
        raise ConfigurationError(
            'the training set is a stream without a length, which has no epochs on several ranks: expected "steps" or '
            '"no" for eval_strategy, save_strategy and logging_strategy'
        )
    dataset, collate = compat.without_unused_columns(trainer, trainer.train_dataset, trainer.data_collator)
    if ranks > 1:
        dataset = EndlessRows(dataset, batch_size=size, ranks=ranks, rank=accelerator.process_index)
    # accelerate's own loader for streams fails at an empty pass, and at batches that are padded to different lengths.
    return DataLoaderShard(
        dataset,
        device=accelerator.device,
        batch_size=size,
        drop_last=args.dataloader_drop_last,
        collate_fn=collate,
        **_loading_options(args, accelerator),
    )


def budget_dataloader(trainer: Trainer, token_budget: int) -> DataLoader:
    """Return a Trainer's data loader with batches of at most `token_budget` tokens, padding included.

    Raises:
        ConfigurationError: the training set is missing or is a stream.
    """
    args, accelerator = trainer.args, trainer.accelerator
    _refuse_found_size(args, "a token budget")
    dataset: Any = trainer.train_dataset
    if dataset is None or not hasattr(dataset, "__len__"):
        raise ConfigurationError("token_budget needs a train_dataset with a length, to sort sequences by their tokens")
    sampler = TokenBudgetBatchSampler(
        lengths_of(dataset, args.length_column_name),
        token_budget,
        seed=args.seed if args.data_seed is None else args.data_seed,
        ranks=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    dataset, collate = compat.without_unused_columns(trainer, dataset, trainer.data_collator)
    # The sampler already divides the batches among the ranks: accelerate only moves them to the device.
    return DataLoaderShard(
        dataset,
        device=accelerator.device,
        batch_sampler=sampler,
        collate_fn=collate,
        **_loading_options(args, accelerator),
    )


def _refuse_found_size(args: TrainingArguments, what: str) -> None:
    """Refuse to look for a batch size where it does not decide the size of a batch."""
    if args.auto_find_batch_size:
        raise ConfigurationError(f"auto_find_batch_size=True cannot make the batches of {what} smaller: leave it out")


def count_real_examples(dataloader: Any, accelerator: Accelerator) -> int | None:
    """Count the examples of this rank's newest batch that accelerate does not repeat to give every rank a full batch.

    Args:
        dataloader: the data loader that made the batch.
        accelerator: the accelerator that divides the batches among the ranks.

    Returns:
        The number of examples at the start of the batch that are not repeated, `sys.maxsize` if all are real; None if
        it is unknown.
    """
    world = accelerator.num_processes
    if world == 1 or not accelerator.even_batches or not accelerator.gradient_state.end_of_dataloader:
        return sys.maxsize
    shards = getattr(dataloader, "batch_sampler", None)
    batches = getattr(shards, "batch_sampler", None)
    sampler, size = getattr(batches, "sampler", None), getattr(batches, "batch_size", None)
    if not (isinstance(shards, BatchSamplerShard) and isinstance(sampler, Sized) and size) or shards.split_batches:
        return None
    remainder = len(sampler) % (size * world)
    # The ranks' last batches in order of rank are the rest of the dataset, followed by repeated examples.
    return min(max(remainder - size * accelerator.process_index, 0), size) if remainder else sys.maxsize


def forget_labels(labels: Tensor, start: int) -> Tensor:
    """Return labels that are unknown, and so have no weight, from an example on."""
    if start >= len(labels):
        return labels
    labels = labels.clone()
    labels[start:] = float("nan") if labels.is_floating_point() else IGNORE
    return labels


def _innermost_sampler(loader: Any) -> Any:
    """Return the sampler of sequences inside the batch samplers that accelerate wraps around each other."""
    sampler = getattr(loader, "batch_sampler", None)
    while inner := getattr(sampler, "batch_sampler", None):
        sampler = inner
    return getattr(sampler, "sampler", None)


def is_stream(dataset: Any) -> bool:
    """Return whether a dataset has no length."""
    return dataset is not None and not has_length(dataset)


def _loading_options(args: TrainingArguments, accelerator: Accelerator) -> dict[str, Any]:
    workers = args.dataloader_num_workers
    newer = {name: getattr(args, f"dataloader_{name}", None) for name in ("multiprocessing_context", "in_order")}
    return {
        **({name: value for name, value in newer.items() if value is not None} if workers else {}),
        # The workers of each rank have other random numbers.
        "worker_init_fn": partial(seed_worker, num_workers=workers, rank=args.process_index) if workers else None,
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor if workers else None,
        "_non_blocking": accelerator.non_blocking,
    }
