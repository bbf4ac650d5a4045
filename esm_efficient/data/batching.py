"""Make batches of tokenised sequences: of a fixed number of sequences, or of a budget of tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from esm_efficient.data.deeploc import load_deeploc
from esm_efficient.data.encoding import offsets_from_lengths
from esm_efficient.data.sequences import Keep
from esm_efficient.data.tokenizing import LENGTH_COLUMN, tokenize_dataset
from esm_efficient.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

_LENGTH_TOLERANCE = 0.03
"""Sequences are shuffled with others that are shorter by at most this fraction."""

_NEIGHBOURING_BATCHES = 4
"""Sequences of this many neighbouring batches are shuffled together, whatever their lengths."""


class TokenBudgetBatchSampler:
    """Makes batches of sequences of similar length, with as many sequences as fit into a budget of tokens.

    A batch of n sequences that has m tokens in the longest takes n x m tokens, padding included. This is at most the
    budget; a longer sequence is alone in its batch. An epoch yields every sequence exactly once over all ranks, and the
    same number of batches on each rank; some of the last batches are halved for that. Each epoch shuffles the batches,
    and the sequences with others of nearly equal length; the number of batches never changes. A loop of your own calls
    `set_epoch` before each epoch, or the order stays the same. Trainer does it.

    It is a batch sampler for `torch.utils.data.DataLoader`.

    Args:
        lengths: tokens per sequence.
        budget: the most tokens per batch.
        seed: seed of the order; the same on all ranks.
        shuffle: shuffle in each epoch, or go from the longest sequence to the shortest.
        ranks: number of processes that share the batches.
        rank: the rank of this process.

    Attributes:
        epoch: number of the epoch, which the order depends on; see `set_epoch`.

    Raises:
        ConfigurationError: there is no sequence, a length or the budget is below 1, `rank` is not one of the ranks, or
            the sequences cannot be spread evenly over the ranks because every one fills a batch.

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
        sizes = np.array(_batch_sizes(ordered, budget))
        _check_enough_sequences(len(ordered), len(sizes), ranks)
        self._offsets = offsets_from_lengths(sizes)
        self._shuffle_groups = _shuffle_groups(ordered, np.repeat(sizes, sizes))

    def __len__(self) -> int:
        """Return the batches per epoch on one rank."""
        return -(-(len(self._offsets) - 1) // self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the sequences of each batch of this rank, from where the epoch was resumed."""
        skipped, self._skipped = self._skipped, 0
        order, sizes = self._order, np.diff(self._offsets)
        batches = np.arange(len(sizes))
        if self.shuffle:
            rng = np.random.default_rng((self.seed, self.epoch))
            order = order[np.lexsort((rng.random(len(order)), self._shuffle_groups))]
            batches = _end_with_many(rng.permutation(batches), sizes)
        start, limits = _halve_last_batches(sizes[batches], self.ranks)
        whole = (order[self._offsets[batch] : self._offsets[batch + 1]] for batch in batches[:start])
        last = np.concatenate([order[:0], *(order[self._offsets[b] : self._offsets[b + 1]] for b in batches[start:])])
        parts = (last[begin:end] for begin, end in itertools.pairwise(limits))
        first = self.rank + skipped * self.ranks
        for batch in itertools.islice(itertools.chain(whole, parts), first, None, self.ranks):
            yield batch.tolist()

    def set_epoch(self, epoch: int, *, skip: int = 0) -> None:
        """Set the epoch of the next iteration; transformers' Trainer and accelerate call this.

        Args:
            epoch: number of the epoch.
            skip: batches of this rank to skip in the next iteration, to resume an epoch in its middle.
        """
        self.epoch, self._skipped = epoch, skip


def _batch_sizes(ordered: np.ndarray, budget: int) -> list[int]:
    """Return the sequences per batch, with the batches filled from the longest sequence on."""
    sizes, start = [], 0
    while start < len(ordered):
        size = min(max(budget // int(ordered[start]), 1), len(ordered) - start)
        sizes.append(size)
        start += size
    return sizes


def _check_enough_sequences(sequences: int, batches: int, ranks: int) -> None:
    """Raise if no multiple of the ranks lies between the number of batches and the number of sequences."""
    if batches + -batches % ranks > sequences:
        raise ConfigurationError(
            f"{sequences} sequences in {batches} batches cannot be spread evenly over {ranks} ranks without a batch "
            f"that is empty or over the budget: raise the budget, or leave out {batches % ranks} sequence(s)"
        )


def _end_with_many(batches: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Move a batch with many sequences to the end of an epoch, so that it can be divided among the ranks."""
    has_many = 2 * sizes[batches] >= sizes.max()
    last = np.flatnonzero(has_many)[-1]
    return np.append(np.delete(batches, last), batches[last])


def _halve_last_batches(sizes: np.ndarray, ranks: int) -> tuple[int, list[int]]:
    """Halve some of the last batches, so that the number of batches is a multiple of the ranks.

    Only the last batches change, and together they keep their sequences. The sequences of an optimizer step are
    therefore the same for any number of ranks, and a run can resume on another number. More batches are halved only if
    those that would be left for some of the ranks have fewer sequences than there are ranks.

    Args:
        sizes: sequences per batch, in the order of the epoch.
        ranks: number of ranks.

    Returns:
        The number of batches that stay as they are, and the limits of the others: positions in the sequences of the
        batches after these.
    """
    missing = -len(sizes) % ranks
    start = len(sizes) - (len(sizes) % ranks if missing else 0)
    while (sizes[start:] - 1).sum() < missing:
        start -= 1
    parts = sizes[start:].tolist()
    for _ in range(missing):
        largest = parts.index(max(parts))
        parts[largest : largest + 1] = [parts[largest] - parts[largest] // 2, parts[largest] // 2]
    return start, [0, *itertools.accumulate(parts)]


def _shuffle_groups(ordered: np.ndarray, batch_size_of: np.ndarray) -> np.ndarray:
    """Return a group number per sequence; sequences of a group are shuffled with each other.

    A group has sequences of similar length, in batches of one size, so that every batch stays within the budget.

    Args:
        ordered: tokens per sequence, from the longest on.
        batch_size_of: sequences in the batch of each sequence.
    """
    groups = np.empty(len(ordered), dtype=np.int64)
    rising = -ordered
    start = number = 0
    while start < len(ordered):
        shortest = (1 - _LENGTH_TOLERANCE) * ordered[start]
        stop = int(np.searchsorted(rising, -shortest, side="right"))
        stop = max(stop, min(start + _NEIGHBOURING_BATCHES * int(batch_size_of[start]), len(ordered)))
        other_size = np.flatnonzero(batch_size_of[start:stop] != batch_size_of[start])
        end = start + int(other_size[0]) if len(other_size) else stop
        groups[start:end] = number
        start, number = end, number + 1
    return groups


def lengths_of(dataset: Any, column: str = LENGTH_COLUMN) -> np.ndarray:
    """Return the tokens of every sequence of a tokenised dataset, int64 of shape (sequences,).

    Args:
        dataset: a dataset of `datasets`, or any sequence of mappings, with ``input_ids``.
        column: the column of the lengths in tokens; if it is missing, the ids are counted.
    """
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    length_column = next((name for name in (column, LENGTH_COLUMN) if name in columns), None)
    if length_column is not None and hasattr(dataset, "with_format"):
        return np.asarray(dataset.with_format("numpy")[length_column][:])
    return np.array([len(dataset[index]["input_ids"]) for index in range(len(dataset))])


class DeepLocLoaders(NamedTuple):
    """The three DataLoaders of `deeploc_dataloaders`; ``validation`` is None without a validation split."""

    train: DataLoader
    validation: DataLoader | None
    test: DataLoader


def deeploc_dataloaders(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path | None = None,
    *,
    min_residues: int | None = 100,
    max_residues: int | None = 512,
    batch_size: int = 8,
    max_tokens: int = 1024,
    keep: Keep = "start",
    seed: int = 0,
    num_workers: int = 0,
    **load_options: Any,
) -> DeepLocLoaders:
    """Make plain torch DataLoaders over DeepLoc-2.0, for a custom training loop.

    Args:
        tokenizer: the tokenizer of an ESM model.
        source: the table, as in `load_deeploc`.
        min_residues: the fewest residues of a protein; shorter proteins are left out. None for no bound.
        max_residues: the most residues of a protein; longer proteins are left out. None for no bound.
        batch_size: sequences per batch.
        max_tokens: the most tokens per sequence, the two special tokens included; longer sequences are truncated.
        keep: the part of a longer sequence to keep, as in `tokenize_dataset`.
        seed: seed of the split and of the order of the training batches; each epoch has another order.
        num_workers: processes that prepare batches.
        **load_options: other options of `load_deeploc`.

    Returns:
        Loaders for training (shuffled), validation and test. A batch is a mapping (`BatchEncoding`): ``input_ids`` and
        ``attention_mask``, int64 of shape (batch, tokens of the longest), and ``labels``: int64 of shape (batch,), or
        with several labels float32 of shape (batch, labels), NaN where unknown. Ranks are not told apart.

    Raises:
        DownloadError, DataError, ConfigurationError: as raised by `load_deeploc` and `tokenize_dataset`.

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

    table = load_deeploc(source, min_residues=min_residues, max_residues=max_residues, seed=seed, **load_options)
    data, _ = tokenize_dataset(table, tokenizer, max_tokens=max_tokens, keep=keep)
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
