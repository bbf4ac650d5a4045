"""From token ids to batches of tensors: of a fixed number of sequences, or of a budget of tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from esm_efficient.data.deeploc import load_deeploc
from esm_efficient.data.sequences import Keep
from esm_efficient.data.tokenizing import LENGTH_COLUMN, tokenize_dataset
from esm_efficient.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

_ALIKE, _MIXED = 0.03, 4
"""Sequences change places whose lengths differ by so little, or that are in so many neighbouring batches."""


class TokenBudgetBatchSampler:
    """Batches of sequences of similar length, as many as a budget of tokens holds.

    A batch of n sequences whose longest has m tokens takes n x m tokens, padding included, and no more than the budget;
    a sequence that is longer than that is alone in its batch. An epoch yields every sequence exactly once over all
    ranks, and as many batches on each. Which sequences of nearly equal length come together, and the order of the
    batches, are drawn anew in each epoch; the number of batches never changes.

    It is a batch sampler for `torch.utils.data.DataLoader`.

    Args:
        lengths: tokens of each sequence.
        budget: the most tokens of a batch.
        seed: of the order; the same on all ranks.
        shuffle: draw an order in each epoch, or go from the longest to the shortest.
        ranks: processes that share the batches.
        rank: which of them this is.

    Attributes:
        epoch: what the order is drawn for; see `set_epoch`.

    Raises:
        ConfigurationError: there is no sequence, a length or the budget is below 1, `rank` is none of the ranks, or the
            sequences cannot be spread evenly over the ranks because every one fills a batch.

    Example:
        >>> sampler = TokenBudgetBatchSampler([4, 9, 5, 4], budget=10, shuffle=False)
        >>> list(sampler)
        [[1], [2, 0], [3]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        budget: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        tokens = np.asarray(lengths, dtype=np.int64).ravel()
        if not 0 <= rank < ranks:
            raise ConfigurationError(f"rank={rank} of ranks={ranks}: expected a rank from 0 to {ranks - 1}")
        if not len(tokens) or tokens.min() < 1 or budget < 1 or budget != int(budget):
            raise ConfigurationError(
                f"{len(tokens)} sequences and a budget of {budget} tokens: expected at least one sequence, of at least "
                "one token, and a whole number above 0"
            )
        budget = int(budget)
        self.budget, self.seed, self.shuffle, self.ranks, self.rank = budget, seed, shuffle, ranks, rank
        self.epoch = 0
        self._skipped = 0
        self._order = np.argsort(-tokens, kind="stable")
        ordered = tokens[self._order]
        if over := int(np.count_nonzero(ordered > budget)):
            logger.warning(
                "%d sequence(s) exceed the budget of %d tokens (the longest has %d): each is alone in its batch",
                *(over, budget, int(ordered[0])),
            )
        sizes = _spread(_fill(ordered, budget), ranks)
        self._ends = np.cumsum(sizes)
        self._windows = _windows(ordered, np.repeat(sizes, sizes))

    def __len__(self) -> int:
        """Batches of an epoch on one rank."""
        return len(self._ends) // self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of the sequences of each of this rank's batches, from where the epoch was resumed."""
        skipped, self._skipped = self._skipped, 0
        order, batches = self._order, np.arange(len(self._ends))
        if self.shuffle:
            rng = np.random.default_rng((self.seed, self.epoch))
            order = order[np.lexsort((rng.random(len(order)), self._windows))]
            batches = rng.permutation(batches)
        starts = np.concatenate(([0], self._ends[:-1]))
        for batch in batches[self.rank :: self.ranks][skipped:].tolist():
            yield order[starts[batch] : self._ends[batch]].tolist()

    def set_epoch(self, epoch: int, *, skip: int = 0) -> None:
        """Say which epoch is iterated next; transformers' Trainer and accelerate do.

        Args:
            epoch: number of the epoch.
            skip: batches of this rank that were used already, where an epoch is resumed in its middle. It holds for the
                next iteration only.
        """
        self.epoch, self._skipped = epoch, skip


def _fill(ordered: np.ndarray, budget: int) -> list[int]:
    """Sequences of each batch, from the longest sequence on."""
    sizes, start = [], 0
    while start < len(ordered):
        size = min(max(budget // int(ordered[start]), 1), len(ordered) - start)
        sizes.append(size)
        start += size
    return sizes


def _spread(sizes: list[int], ranks: int) -> np.ndarray:
    """Batches cut in two until every rank gets as many."""
    missing = -len(sizes) % ranks
    if missing > sum(size - 1 for size in sizes):
        raise ConfigurationError(
            f"{sum(sizes)} sequences in {len(sizes)} batches cannot be spread evenly over {ranks} ranks without a "
            f"batch that is empty or over the budget: raise the budget, or leave out {len(sizes) % ranks} sequence(s)"
        )
    while missing:
        # The largest are cut, each once a round, so that none gets much smaller than the others.
        chosen = set(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:missing])
        chosen = {i for i in chosen if sizes[i] > 1}
        missing -= len(chosen)
        halves = [(n - n // 2, n // 2) if i in chosen else (n,) for i, n in enumerate(sizes)]
        sizes = list(itertools.chain.from_iterable(halves))
    return np.array(sizes)


def _windows(ordered: np.ndarray, of_size: np.ndarray) -> np.ndarray:
    """Runs of sequences that may change places: of similar length, in batches of one size, so that all fit."""
    windows = np.empty(len(ordered), dtype=np.int64)
    rising = -ordered
    start = number = 0
    while start < len(ordered):
        shortest = (1 - _ALIKE) * ordered[start]
        same = int(np.searchsorted(rising, -shortest, side="right"))
        same = max(same, min(start + _MIXED * int(of_size[start]), len(ordered)))
        different = np.flatnonzero(of_size[start:same] != of_size[start])
        end = start + int(different[0]) if len(different) else same
        windows[start:end] = number
        start, number = end, number + 1
    return windows


def lengths_of(dataset: Any, column: str = LENGTH_COLUMN) -> np.ndarray:
    """Return the tokens of every sequence of a tokenised dataset, int64 of shape (sequences,).

    Args:
        dataset: of `datasets`, or any sequence of mappings, with ``input_ids``.
        column: the column of the lengths in tokens; where it is missing, the ids are counted.
    """
    names = getattr(dataset, "column_names", None) or list(dataset[0])
    found = next((name for name in (column, LENGTH_COLUMN) if name in names), None)
    if found is not None and hasattr(dataset, "with_format"):
        return np.asarray(dataset.with_format("numpy")[found][:])
    return np.array([len(dataset[index]["input_ids"]) for index in range(len(dataset))])


class DeepLocLoaders(NamedTuple):
    """The three DataLoaders of `deeploc_dataloaders`; ``validation`` is None when the split has none."""

    train: DataLoader
    validation: DataLoader | None
    test: DataLoader


def deeploc_dataloaders(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path | None = None,
    *,
    batch_size: int = 8,
    max_tokens: int = 1024,
    keep: Keep = "start",
    seed: int = 0,
    num_workers: int = 0,
    **load_options: Any,
) -> DeepLocLoaders:
    """Plain torch DataLoaders over DeepLoc-2.0, for people with a training loop of their own.

    Args:
        tokenizer: of an ESM model.
        source: as in `load_deeploc`.
        batch_size: sequences a batch.
        max_tokens: the most tokens of a sequence.
        keep: what stays of a longer sequence, as in `tokenize_dataset`.
        seed: of the split and of the order of the training batches; each epoch has another order.
        num_workers: processes that prepare batches.
        **load_options: everything else that `load_deeploc` takes.

    Returns:
        Loaders for training (shuffled), validation and test. A batch is a dict of int64 tensors: ``input_ids`` and
        ``attention_mask`` of shape (batch, tokens of the longest), ``labels`` of shape (batch,).

    Raises:
        DownloadError, DataError, ConfigurationError: as `load_deeploc` and `tokenize_dataset`.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from esm_efficient.demo import demo_model_path, write_demo_table
        >>> tokenizer = AutoTokenizer.from_pretrained(demo_model_path())  # doctest: +SKIP
        >>> loaders = deeploc_dataloaders(tokenizer, write_demo_table("demo.csv"))  # doctest: +SKIP
        >>> sorted(next(iter(loaders.train)))  # doctest: +SKIP
        ['attention_mask', 'input_ids', 'labels']
    """
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    data, _ = tokenize_dataset(
        load_deeploc(source, seed=seed, **load_options), tokenizer, max_tokens=max_tokens, keep=keep
    )
    data = data.remove_columns(LENGTH_COLUMN)
    collate = DataCollatorWithPadding(tokenizer)

    def loader(name: str) -> DataLoader:
        shuffle = name == "train"
        return DataLoader(
            data[name],
            batch_size=batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(seed) if shuffle else None,
            collate_fn=collate,
            num_workers=num_workers,
        )

    return DeepLocLoaders(loader("train"), loader("validation") if "validation" in data else None, loader("test"))
