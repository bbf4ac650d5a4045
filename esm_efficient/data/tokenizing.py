"""Tokenise the sequences and labels of a dataset for a transformers Trainer, and report what was changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient import __version__
from esm_efficient.data.encoding import ResidueEncoder, residue_positions, truncation_mask
from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.data.sequences import Keep, NucleotideCount, check_texts, count_residues, is_nucleotides
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.tasks import IGNORE, SPECIAL_TOKENS, Task, task_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict, Features
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LENGTH_COLUMN = "tokens"
"""The column of the number of tokens of a sequence, special tokens included."""

_COUNT_COLUMNS = ("_cut", "_unknown", "_ambiguous", "_dropped", "_nucleotides")
_COUNT_BATCH_ROWS = 100_000


@dataclass(frozen=True)
class SplitCounts:
    """The counts of one tokenised split; `TokenizationReport` explains them."""

    sequences: int
    residues: int
    sequences_cut: int
    residues_cut: int
    unknown_residues: int
    ambiguous_residues: int
    characters_dropped: int
    nucleotides: int


@dataclass(frozen=True)
class TokenizationReport:
    """What tokenising did to each split.

    Attributes:
        splits: counts by the name of the split. ``residues`` were kept, ``residues_cut`` were truncated;
            ``unknown_residues`` were kept as ``<unk>``, ``ambiguous_residues`` were kept as X, B or Z;
            ``characters_dropped`` were white space, gaps and final stops; ``nucleotides`` are sequences that consist of
            the letters of DNA and RNA.
    """

    splits: Mapping[str, SplitCounts]

    @property
    def total(self) -> SplitCounts:
        """The counts summed over the splits."""
        fields = SplitCounts.__dataclass_fields__
        return SplitCounts(*(sum(getattr(counts, name) for counts in self.splits.values()) for name in fields))

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {counts.sequences:,} sequences, {counts.residues:,} residues; {counts.residues_cut:,} residues "
            f"cut from {counts.sequences_cut:,} sequences; {counts.unknown_residues:,} unknown and "
            f"{counts.ambiguous_residues:,} ambiguous residues; {counts.characters_dropped:,} characters "
            "dropped (white space, gaps, final stops)"
            + (f"; {counts.nucleotides:,} sequences may be nucleotides, not proteins" if counts.nucleotides else "")
            for name, counts in self.splits.items()
        )


def tokenize_dataset(
    dataset: DatasetDict, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 1024, keep: Keep = "start"
) -> tuple[DatasetDict, TokenizationReport]:
    """Turn sequences into ``input_ids``, ``attention_mask`` and ``labels`` for a transformers Trainer.

    The feature of the labels decides what they become (`esm_efficient.tasks.task_of`). Class ids stay. Several labels
    per sequence become a list of float32, NaN where a label is unknown. Labels of residues are aligned with the tokens,
    with -100 for special tokens, and truncated with them. Numbers become float32.

    Args:
        dataset: splits with ``sequence`` (str) and, to train or evaluate, ``label``; ``sample_weight`` is kept, other
            columns are dropped.
        tokenizer: the tokenizer of an ESM model.
        max_tokens: the most tokens per sequence, the two special tokens included.
        keep: the part of a longer sequence to keep: its ``"start"``, its ``"end"``, or ``"both"`` ends.

    Returns:
        The tokenised splits, with a column ``tokens`` (their number) for sampling by length.
        The counts of residues that were cut off, dropped or unknown, which are also logged.

    Raises:
        ConfigurationError: `max_tokens` leaves no room for a residue, or the tokenizer is not that of an ESM model.
        DataError: a split is streamed, empty or without ``sequence``; a sequence is empty or missing; a label is
            invalid; most sequences are nucleotides; or the splits have different labels.

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
    from datasets import DatasetDict

    if max_tokens <= SPECIAL_TOKENS:
        raise ConfigurationError(f"max_tokens={max_tokens} leaves no room for a residue beside {SPECIAL_TOKENS} tokens")
    encoder = ResidueEncoder(tokenizer)
    label_columns = {name: _check_split(name, split) for name, split in dataset.items()}
    tasks = {name: task_of(dataset[name].features, column) for name, column in label_columns.items() if column}
    if len(set(tasks.values())) > 1:
        raise DataError(
            f"the splits have different labels: {'; '.join(f'{n} {t.describe()}' for n, t in tasks.items())}. A "
            "model knows labels by their position: give every split the same labels in the same order"
        )
    splits, counts, nucleotides = {}, {}, NucleotideCount()
    for name, split in dataset.items():
        column, task = label_columns[name], tasks.get(name)
        encoded = split.with_format("arrow").map(
            _encode_table,
            batched=True,
            with_indices=True,
            fn_kwargs={
                "encoder": encoder,
                "max_residues": max_tokens - SPECIAL_TOKENS,
                "keep": keep,
                "column": column,
                "task": task,
                "split": name,
                "version": __version__,
            },
            features=_tokenised_features(split.features, column, task),
            remove_columns=split.column_names,
            desc=name,
        )
        counts[name] = _sum_counts(encoded, nucleotides)
        splits[name] = encoded.remove_columns(list(_COUNT_COLUMNS)).with_format(None)
    if problem := nucleotides.warning("the data set"):
        logger.warning(problem)
    report = TokenizationReport(counts)
    logger.info("tokenised\n%s", report)
    if doubts := _doubts(report.total, max_tokens, keep):
        logger.warning("; ".join(doubts))
    return DatasetDict(splits), report


def _doubts(total: SplitCounts, max_tokens: int, keep: Keep) -> list[str]:
    """Return what a user should know of the sequences that were read with a loss."""
    doubts = []
    if total.residues_cut:
        kept = "start and end were" if keep == "both" else f"{keep} was"
        doubts.append(
            f"{total.sequences_cut:,} of {total.sequences:,} sequences have more than {max_tokens - SPECIAL_TOKENS:,} "
            f"residues: their {kept} kept, and {total.residues_cut:,} residues were cut"
        )
    if total.unknown_residues:
        doubts.append(f"letters that are not amino acids, which the model reads as <unk>: {total.unknown_residues:,}")
    return doubts


def _check_split(name: str, split: Any) -> str | None:
    """Refuse a split that cannot be tokenised; return the name of its label column, None without one."""
    if not hasattr(split, "__len__"):
        raise DataError(
            f"split {name!r} is streamed ({type(split).__name__}), and tokenize_dataset needs its length. Load it "
            "without streaming, or map a ResidueEncoder over it yourself"
        )
    if not len(split):
        raise DataError(f"split {name!r} has no row")
    if "sequence" not in split.features:
        raise DataError(f"split {name!r} has no column 'sequence'; it has {', '.join(split.features)}")
    return next((column for column in ("label", "labels") if column in split.features), None)


def _sum_counts(encoded: Dataset, nucleotides: NucleotideCount) -> SplitCounts:
    """Sum the counts of a split, some rows at a time; also in `nucleotides`, over all splits."""
    totals = np.zeros(len(SplitCounts.__dataclass_fields__), dtype=np.int64)
    batches = encoded.select_columns([LENGTH_COLUMN, *_COUNT_COLUMNS]).with_format("numpy").iter(_COUNT_BATCH_ROWS)
    for batch in batches:
        tokens, cut, unknown, ambiguous, dropped, genes = (batch[name] for name in (LENGTH_COLUMN, *_COUNT_COLUMNS))
        residues = tokens.sum() - SPECIAL_TOKENS * len(tokens)
        nucleotides.sequences += len(tokens)
        nucleotides.found += int(np.count_nonzero(genes))
        nucleotides.residues += int(genes.sum())
        sums = [counted.sum() for counted in (cut, unknown, ambiguous, dropped)]
        totals += np.array([len(tokens), residues, np.count_nonzero(cut), *sums, np.count_nonzero(genes)])
    return SplitCounts(*totals.tolist())


def _tokenised_features(features: Features, column: str | None, task: Task | None) -> Features:
    """Return the features of a tokenised split, the columns of counts included."""
    from datasets import Features, List, Value

    result = {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8"))}
    if task is not None:
        result["labels"] = _label_feature(task, features[column])
    if WEIGHT_COLUMN in features:
        result[WEIGHT_COLUMN] = Value("float32")
    return Features(result | dict.fromkeys((LENGTH_COLUMN, *_COUNT_COLUMNS), Value("int64")))


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
    version: str,  # datasets keeps results on disk by the arguments, and must not reuse those of another version
) -> pa.Table:
    """Encode a batch of rows; the caller sums and removes the columns of counts."""
    import pyarrow as pa

    rows = [f"row {index} of {split}" for index in indices]
    sequences = table["sequence"].to_pylist()
    check_texts(sequences, indices, split)
    ids, offsets, residues = encoder(sequences, max_residues=max_residues, keep=keep)
    _complain(residues == 0, rows, "the sequence is empty")
    lengths = np.diff(offsets)
    list_offsets = pa.array(offsets.astype(np.int32))
    columns: dict[str, Any] = {
        "input_ids": pa.ListArray.from_arrays(list_offsets, pa.array(ids.astype(np.int32))),
        "attention_mask": pa.ListArray.from_arrays(list_offsets, pa.array(np.ones(len(ids), dtype=np.int8))),
    }
    if task is not None:
        labels = table[column].combine_chunks()
        if task.kind == "token_classification":
            kept = truncation_mask(residues, max_residues, keep)
            columns["labels"] = _encode_residue_labels(labels, task, residues, kept, offsets, rows)
        else:
            columns["labels"] = _encode_sequence_labels(labels, task, rows)
    if WEIGHT_COLUMN in table.column_names:
        columns[WEIGHT_COLUMN] = weights = _float32(table[WEIGHT_COLUMN].combine_chunks())
        _complain(~(np.isfinite(weights) & (weights >= 0)), rows, f"the {WEIGHT_COLUMN} is not a finite number >= 0")
    marks = (ids == encoder.unknown, np.isin(ids, encoder.ambiguous))
    unknown, ambiguous = (np.add.reduceat(mark, offsets[:-1], dtype=np.int64) for mark in marks)
    dropped = np.fromiter(map(count_residues, sequences), dtype=np.int64, count=len(sequences)) - residues
    genes = np.where([is_nucleotides(sequence) for sequence in sequences], residues, 0)
    counts = (lengths, residues + SPECIAL_TOKENS - lengths, unknown, ambiguous, dropped, genes)
    return pa.table(columns | dict(zip((LENGTH_COLUMN, *_COUNT_COLUMNS), counts, strict=True)))


def _complain(bad: np.ndarray, rows: list[str], problem: str) -> None:
    """Raise a DataError that names the rows where `bad`, bool of shape (rows,), is true."""
    if len(places := np.flatnonzero(bad)):
        raise DataError(f"{problem} in {len(places)} row(s): {listing([rows[i] for i in places])}")


def _label_feature(task: Task, feature: Any) -> Any:
    """Return the feature of the labels that a model trains on."""
    from datasets import List, Value

    if task.kind == "multi_label_classification":
        return List(Value("float32"), length=len(task.names))
    if task.kind == "regression":
        return Value("float32") if len(task.names) == 1 else List(Value("float32"), length=len(task.names))
    # A list of a fixed length would have another length with the labels of the special tokens.
    return List(feature.feature) if task.kind == "token_classification" else feature


def _encode_sequence_labels(labels: pa.Array, task: Task, rows: list[str]) -> pa.Array:
    """Return the labels of sequences, one entry per row, as a model trains on them.

    Raises:
        DataError: a label is missing, or is not valid for the task.
    """
    import pyarrow as pa

    size = len(task.names)
    if task.kind == "single_label_classification":
        class_ids = _class_ids(labels, task, rows)
        _complain(class_ids == IGNORE, rows, "the label is missing")
        return pa.array(class_ids)
    if task.kind == "multi_label_classification":
        table = np.stack([_float32(labels.field(index)) for index in range(size)], axis=1)
        table[labels.is_null().to_numpy(zero_copy_only=False)] = np.nan
        valid = np.isnan(table) | ((table >= 0) & (table <= 1))
        _complain(~valid.all(axis=1), rows, "a label is not between 0 and 1")
        return pa.FixedSizeListArray.from_arrays(pa.array(table.ravel()), size)
    values = _float32(labels.flatten() if pa.types.is_nested(labels.type) else labels)
    if len(values) != len(rows) * size:
        raise DataError(f"expected {size} numbers per row, got {len(values)} in {len(rows)} row(s): {listing(rows)}")
    _complain(np.isinf(values.reshape(len(rows), size)).any(axis=1), rows, "a number is infinite")
    return pa.array(values) if size == 1 else pa.FixedSizeListArray.from_arrays(values, size)


def _encode_residue_labels(
    labels: pa.Array, task: Task, residues: np.ndarray, kept: np.ndarray, offsets: np.ndarray, rows: list[str]
) -> pa.Array:
    """Return the labels of residues, aligned with the tokens; `IGNORE` for special tokens.

    Args:
        labels: a list of class ids per sequence.
        task: the task.
        residues: residues per sequence before truncation.
        kept: which residues of all sequences are kept, bool.
        offsets: the start of each sequence's tokens, special tokens included, and the end of the last.
        rows: the name of each row for a message.

    Raises:
        DataError: the labels of a sequence are not as many as its residues, or a label is not a class.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    given = pc.fill_null(pc.list_value_length(labels).cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
    if bad := np.flatnonzero(given != residues).tolist():
        shown = [f"{rows[i]} ({residues[i]} residues, {given[i]} labels)" for i in bad]
        raise DataError(
            f"{len(bad)} row(s): label count differs from residue count: {listing(shown)}. For several labels of a "
            "whole sequence, make the column a struct of numbers"
        )
    row_of_residue = np.repeat(np.array(rows, dtype=object), residues)
    aligned = np.full(offsets[-1], IGNORE, dtype=np.int64)
    aligned[residue_positions(offsets)] = _class_ids(labels.flatten(), task, row_of_residue)[kept]
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(aligned))


def _class_ids(labels: pa.Array, task: Task, rows: list[str] | np.ndarray) -> np.ndarray:
    """Return class ids, int64, with `IGNORE` for null."""
    import pyarrow.compute as pc

    ids = pc.fill_null(labels, IGNORE).to_numpy(zero_copy_only=False).astype(np.int64)
    bad = np.flatnonzero((ids != IGNORE) & ((ids < 0) | (ids >= len(task.names))))
    if len(bad):
        shown = [f"{ids[i]} in {rows[i]}" for i in bad[:6].tolist()]
        raise DataError(
            f"a label is not one of the {len(task.names)} classes {', '.join(task.names)}: {listing(shown)}"
        )
    return ids


def _float32(values: pa.Array) -> np.ndarray:
    """Return numbers as float32, NaN for null."""
    import pyarrow as pa

    return values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False).astype(np.float32)
