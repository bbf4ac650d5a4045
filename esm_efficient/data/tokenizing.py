"""Sequences and labels of a dataset to what a transformers Trainer takes, with a report of what was changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.data.encoding import ResidueEncoder, kept_by
from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.data.sequences import Keep
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.tasks import IGNORE, SPECIAL_TOKENS, Task, task_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LENGTH_COLUMN = "tokens"
"""The column of the number of tokens of a sequence, special tokens included."""

_COUNTS = ("_cut", "_unknown", "_ambiguous", "_dropped")


@dataclass(frozen=True)
class SplitCounts:
    """What tokenising one split counted."""

    sequences: int
    residues: int
    sequences_cut: int
    residues_cut: int
    unknown_residues: int
    ambiguous_residues: int
    characters_dropped: int


@dataclass(frozen=True)
class TokenizationReport:
    """What tokenising did to each split.

    Attributes:
        splits: split name to counts. ``residues`` are those kept, ``residues_cut`` those dropped by truncation,
            ``unknown_residues`` those kept that became ``<unk>``, ``ambiguous_residues`` those kept that are X, B or Z,
            ``characters_dropped`` the white space, gaps and final stops.
    """

    splits: Mapping[str, SplitCounts]

    @property
    def total(self) -> SplitCounts:
        """The counts summed over the splits."""
        fields = SplitCounts.__dataclass_fields__
        return SplitCounts(*(sum(getattr(counts, name) for counts in self.splits.values()) for name in fields))

    def __str__(self) -> str:
        lines = []
        for name, counts in self.splits.items():
            lines.append(
                f"{name}: {counts.sequences:,} sequences, {counts.residues:,} residues; {counts.residues_cut:,} "
                f"residues cut from {counts.sequences_cut:,} sequences; {counts.unknown_residues:,} unknown and "
                f"{counts.ambiguous_residues:,} ambiguous residues; {counts.characters_dropped:,} characters that are "
                "no residues dropped"
            )
        return "\n".join(lines)


def tokenize_dataset(
    dataset: DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 1024,
    keep: Keep = "start",
) -> tuple[DatasetDict | IterableDatasetDict, TokenizationReport]:
    """Turn sequences into ``input_ids``, ``attention_mask`` and ``labels`` for a transformers Trainer.

    What the labels become follows from their feature (`esm_efficient.tasks.task_of`): class ids stay; several
    labels a sequence become a list of float32, NaN where one is unknown; labels of residues are put beside the tokens,
    -100 beside special ones, and cut with them; numbers become float32.

    Args:
        dataset: splits with ``sequence`` (str) and, to train or evaluate, ``label``; ``sample_weight`` is kept, other
            columns are dropped. Streams stay streams; they are gone through once for the counts.
        tokenizer: of an ESM model.
        max_tokens: the most *tokens* of a sequence, with the two special ones.
        keep: what stays of a longer sequence: its ``"start"``, its ``"end"``, or ``"both"`` ends.

    Returns:
        The tokenised splits, with ``tokens`` (their number) for sampling by length; and the counts of what was cut,
        dropped and unknown, which are logged too.

    Raises:
        ConfigurationError: `max_tokens` leaves no room for a residue, or the tokenizer is not one of an ESM model.
        DataError: a split has no ``sequence`` column, a sequence is empty or missing, or a label does not fit.

    Example:
        >>> from datasets import Dataset, DatasetDict
        >>> from transformers import AutoTokenizer
        >>> from esm_efficient.demo import demo_model_path
        >>> tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
        >>> data = DatasetDict(test=Dataset.from_dict({"sequence": ["MKTJ"]}))
        >>> tokenized, report = tokenize_dataset(data, tokenizer)
        >>> tokenized["test"][0]["input_ids"], report.total.unknown_residues
        ([0, 20, 15, 11, 3, 2], 1)
    """
    if max_tokens <= SPECIAL_TOKENS:
        raise ConfigurationError(f"max_tokens={max_tokens} leaves no room for a residue beside {SPECIAL_TOKENS} tokens")
    encoder = ResidueEncoder(tokenizer)
    splits, counts = {}, {}
    tasks: dict[str, Task] = {}
    for name, split in dataset.items():
        streamed = not hasattr(split, "__len__")
        if not (streamed or len(split)):
            raise DataError(f"split {name!r} has no row")
        if split.features is None:
            raise DataError(f"split {name!r} is a stream that does not know its features: give it some with cast()")
        if "sequence" not in split.features:
            raise DataError(f"split {name!r} has no column 'sequence'; it has {', '.join(split.features)}")
        column = next((name for name in ("label", "labels") if name in split.features), None)
        task = None if column is None else task_of(split.features, column)
        if task is not None:
            tasks[name] = task
            if task != next(iter(tasks.values())):
                raise DataError(
                    f"the splits have different labels: {'; '.join(f'{n} {t.describe()}' for n, t in tasks.items())}. "
                    "Labels are told by their place: their names must stand in one order"
                )
        options = {"encoder": encoder, "max_residues": max_tokens - SPECIAL_TOKENS, "keep": keep}
        encoded = split.with_format("arrow").map(
            _encode_table,
            batched=True,
            with_indices=True,
            fn_kwargs={**options, "column": column, "task": task, "split": name},
            features=_features_of(split.features, column, task),
            # A stream holds what the function returns; columns to remove would be taken from that.
            **({} if streamed else {"desc": name, "remove_columns": split.column_names}),
        )
        counts[name] = _count(encoded)
        splits[name] = encoded.remove_columns(list(_COUNTS)).with_format(None)
    report = TokenizationReport(counts)
    total = report.total
    level = logging.WARNING if total.unknown_residues or total.residues_cut else logging.INFO
    logger.log(level, "tokenised\n%s", report)

    from datasets import DatasetDict, IterableDatasetDict

    return (IterableDatasetDict if isinstance(dataset, IterableDatasetDict) else DatasetDict)(splits), report


def _count(encoded: Dataset | IterableDataset) -> SplitCounts:
    """The counts of a split, summed a block at a time; a stream is encoded for it."""
    totals = np.zeros(len(SplitCounts.__dataclass_fields__), dtype=np.int64)
    for block in encoded.select_columns([LENGTH_COLUMN, *_COUNTS]).with_format("numpy").iter(100_000):
        length, cut, unknown, ambiguous, dropped = (block[name] for name in (LENGTH_COLUMN, *_COUNTS))
        residues = length.sum() - SPECIAL_TOKENS * len(length)
        marked = (unknown.sum(), ambiguous.sum(), dropped.sum())
        totals += np.array([len(length), residues, np.count_nonzero(cut), cut.sum(), *marked])
    return SplitCounts(*totals.tolist())


def _features_of(features: Features, column: str | None, task: Task | None) -> Features:
    """The features of a split once it is tokenised."""
    from datasets import Features, List, Value

    result = {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8"))}
    if task is not None:
        result["labels"] = label_feature(task, features[column])
    if WEIGHT_COLUMN in features:
        result[WEIGHT_COLUMN] = Value("float32")
    return Features(result | dict.fromkeys((LENGTH_COLUMN, *_COUNTS), Value("int64")))


def _encode_table(
    table: pa.Table,
    indices: Sequence[int],
    *,
    encoder: ResidueEncoder,
    max_residues: int,
    keep: Keep,
    column: str | None,
    task: Task | None,
    split: str,
) -> pa.Table:
    """Encode a batch of rows; the underscored columns count and are removed by the caller."""
    import pyarrow as pa

    rows = [f"row {index} of {split}" for index in indices]
    sequences = table["sequence"].to_pylist()
    if bad := [row for row, sequence in zip(rows, sequences, strict=True) if not isinstance(sequence, str)]:
        raise DataError(f"the sequence of {len(bad)} row(s) is missing or no text: {listing(bad)}")
    ids, offsets, residues = encoder(sequences, max_residues=max_residues, keep=keep)
    if bad := [rows[i] for i in np.flatnonzero(residues == 0)]:
        raise DataError(f"{len(bad)} sequence(s) are empty: {listing(bad)}")
    lengths = np.diff(offsets)
    places = pa.array(offsets.astype(np.int32))
    columns: dict[str, Any] = {
        "input_ids": pa.ListArray.from_arrays(places, pa.array(ids.astype(np.int32))),
        "attention_mask": pa.ListArray.from_arrays(places, pa.array(np.ones(len(ids), dtype=np.int8))),
    }
    if task is not None:
        labels = table[column].combine_chunks()
        kept = kept_by(residues, max_residues, keep) if task.kind == "token_classification" else np.empty(0, bool)
        columns["labels"] = encode_labels(labels, task, residues, kept, offsets, rows)
    if WEIGHT_COLUMN in table.column_names:
        columns[WEIGHT_COLUMN] = _sample_weights(table[WEIGHT_COLUMN], rows)
    marked = (ids == encoder.unknown, np.isin(ids, encoder.ambiguous))
    unknown, ambiguous = (np.add.reduceat(mark, offsets[:-1], dtype=np.int64) for mark in marked)
    dropped = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences)) - residues
    counted = (lengths, residues + SPECIAL_TOKENS - lengths, unknown, ambiguous, dropped)
    return pa.table(columns | dict(zip((LENGTH_COLUMN, *_COUNTS), counted, strict=True)))


def _sample_weights(column: pa.ChunkedArray, rows: list[str]) -> np.ndarray:
    weights = np.array([np.nan if w is None else w for w in column.to_pylist()], dtype=np.float32)
    if bad := [rows[i] for i in np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))]:
        raise DataError(f"the {WEIGHT_COLUMN} is no finite number >= 0 in {len(bad)} row(s): {listing(bad)}")
    return weights


def label_feature(task: Task, feature: Any) -> Any:
    """The feature of the labels that a model trains on."""
    from datasets import List, Value

    if task.kind == "multi_label_classification":
        return List(Value("float32"), length=len(task.names))
    if task.kind == "regression":
        return Value("float32") if len(task.names) == 1 else List(Value("float32"), length=len(task.names))
    # Beside the tokens stand two more labels than residues: a list of a fixed length would have another one.
    return List(feature.feature) if task.kind == "token_classification" else feature


def encode_labels(
    labels: pa.Array, task: Task, residues: np.ndarray, kept: np.ndarray, offsets: np.ndarray, rows: list[str]
) -> pa.Array:
    """Labels as a model trains on them.

    Args:
        labels: the column of a batch of sequences.
        task: what they are.
        residues: of each sequence, before it is cut.
        kept: bool, which residues of all sequences stay.
        offsets: where each sequence's tokens begin, special ones included, and the end of the last.
        rows: what to call each row in a message.

    Raises:
        DataError: a label is missing, or is none of the task's.
    """
    import pyarrow as pa

    if task.kind == "single_label_classification":
        values = _classes(labels, task, rows)
        if bad := np.flatnonzero(values == IGNORE).tolist():
            raise DataError(f"the label is missing in {len(bad)} row(s): {listing([rows[i] for i in bad])}")
        return pa.array(values)
    if task.kind == "multi_label_classification":
        parts = [_numbers(labels.field(index)) for index in range(labels.type.num_fields)]
        table = np.stack(parts, axis=1)
        table[labels.is_null().to_numpy(zero_copy_only=False)] = np.nan
        if bad := np.flatnonzero(~(np.isnan(table) | ((table >= 0) & (table <= 1))).all(1)).tolist():
            raise DataError(f"a label is not between 0 and 1 in {len(bad)} row(s): {listing([rows[i] for i in bad])}")
        return pa.FixedSizeListArray.from_arrays(pa.array(table.ravel()), len(task.names))
    if task.kind == "regression":
        flat = _numbers(labels.flatten() if len(task.names) > 1 else labels)
        if len(flat) != len(rows) * len(task.names):
            raise DataError(f"a row has not {len(task.names)} numbers: {listing(rows)}")
        if bad := np.flatnonzero(np.isinf(flat.reshape(len(rows), -1)).any(1)).tolist():
            raise DataError(f"a number is infinite in {len(bad)} row(s): {listing([rows[i] for i in bad])}")
        return pa.array(flat) if len(task.names) == 1 else pa.FixedSizeListArray.from_arrays(flat, len(task.names))
    return _token_labels(labels, task, residues, kept, offsets, rows)


def _token_labels(
    labels: pa.Array, task: Task, residues: np.ndarray, kept: np.ndarray, offsets: np.ndarray, rows: list[str]
) -> pa.Array:
    """Labels of residues, with `IGNORE` beside special tokens."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.fill_null(pc.list_value_length(labels).cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    if bad := np.flatnonzero(found != residues).tolist():
        shown = [f"{rows[i]} ({residues[i]} residues, {max(found[i], 0)} labels)" for i in bad]
        raise DataError(
            f"{len(bad)} row(s) have not one label for each residue: {listing(shown)}. For several labels of a whole "
            "sequence, make the column a struct of numbers"
        )
    values = _classes(labels.flatten(), task, np.repeat(rows, residues).tolist() if len(rows) else [])
    beside = np.full(offsets[-1], IGNORE, dtype=np.int64)
    inner = np.ones(len(beside), dtype=bool)
    inner[offsets[:-1]] = inner[offsets[1:] - 1] = False
    beside[inner] = values[kept]
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(beside))


def _classes(labels: pa.Array, task: Task, rows: list[str]) -> np.ndarray:
    """Class ids, int64, with `IGNORE` for null."""
    import pyarrow.compute as pc

    values = pc.fill_null(labels, IGNORE).to_numpy(zero_copy_only=False).astype(np.int64)
    strange = (values != IGNORE) & ((values < 0) | (values >= len(task.names)))
    if strange.any():
        shown = [f"{values[i]} in {rows[i]}" for i in np.flatnonzero(strange)[:6].tolist()]
        raise DataError(f"a label is no class of the {len(task.names)} ({', '.join(task.names)}): {listing(shown)}")
    return values


def _numbers(values: pa.Array) -> np.ndarray:
    """float32, NaN for null."""
    import pyarrow as pa

    return values.cast(pa.float32()).to_numpy(zero_copy_only=False).astype(np.float32)
