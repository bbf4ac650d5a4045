"""Residues to token ids, whole batches at once, equal to `EsmTokenizer` on every letter that it knows.

`EsmTokenizer` folds a run of unknown characters into a single ``<unk>``, which shifts every later residue. Here each
unknown character is one ``<unk>``; what is no residue at all is dropped as `esm_efficient.data.sequences.clean` says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from esm_efficient.data.labels import Task, encode_labels, label_feature, task_of
from esm_efficient.data.sequences import AMBIGUOUS_RESIDUES, GAPS, RESIDUES, STOP, Keep, clean
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = 2
"""Tokens that are added to a sequence: ``<cls>`` before it and ``<eos>`` after it."""

WEIGHT_COLUMN = "sample_weight"
"""How much a sequence counts in the loss: a number >= 0, 1 for all if there is no such column."""

_DROPPED = 255
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


class Encoded(NamedTuple):
    """Token ids of many sequences, one after another.

    Attributes:
        ids: uint8 of shape (tokens of all sequences,).
        offsets: int64 of shape (sequences + 1,): sequence i is ``ids[offsets[i]:offsets[i + 1]]``.
        residues: int64 of shape (sequences,): residues of each before it was cut.
    """

    ids: np.ndarray
    offsets: np.ndarray
    residues: np.ndarray


class ResidueEncoder:
    """Turns sequences into the token ids of an ESM model, without a loop over residues.

    Args:
        tokenizer: of an ESM model; its vocabulary says which id a residue has.

    Attributes:
        cls: id of ``<cls>``, put before a sequence.
        eos: id of ``<eos>``, put after it.
        unknown: id of ``<unk>``, for a character that is no residue of the vocabulary.
        ambiguous: ids of X, B and Z.

    Raises:
        ConfigurationError: the tokenizer lacks one of the 25 residue letters or a special token, or has ids above 254.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from esm_efficient.demo import demo_model_path
        >>> encoder = ResidueEncoder(AutoTokenizer.from_pretrained(demo_model_path()))
        >>> ids, offsets, _ = encoder(["MKT", "j-v*"])
        >>> [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
        [[0, 20, 15, 11, 2], [0, 3, 7, 2]]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        if missing := [residue for residue in RESIDUES if residue not in vocabulary]:
            raise ConfigurationError(
                f"the tokenizer has no token for {', '.join(missing)}: expected the tokenizer of an ESM model, got "
                f"{type(tokenizer).__name__}"
            )
        specials = {name: getattr(tokenizer, name) for name in ("cls_token_id", "eos_token_id", "unk_token_id")}
        if absent := [name for name, value in specials.items() if value is None]:
            raise ConfigurationError(f"the tokenizer has no {', '.join(absent)}")
        if (highest := max(*vocabulary.values(), *specials.values())) >= _DROPPED:
            raise ConfigurationError(f"the tokenizer has the id {highest}: an ESM model's vocabulary has 33 tokens")
        self.cls, self.eos, self.unknown = specials.values()
        self.ambiguous = [vocabulary[residue] for residue in AMBIGUOUS_RESIDUES]
        self._table = self._make_table(vocabulary)

    def _make_table(self, vocabulary: Mapping[str, int]) -> np.ndarray:
        """The id of every ASCII character, uint8 of shape (256,)."""
        table = np.full(256, self.unknown, dtype=np.uint8)
        for token, index in vocabulary.items():
            if len(token) == 1 and token.isascii():
                table[ord(token)] = index
        for letter in range(ord("A"), ord("Z") + 1):
            table[letter + 32] = table[letter]
        for character in map(chr, range(128)):
            if character.isspace() or character in GAPS:
                table[ord(character)] = _DROPPED
        table[ord(STOP)] = self.unknown
        return table

    def __call__(
        self, sequences: Sequence[str], *, max_residues: int | None = None, keep: Keep = "start", special: bool = True
    ) -> Encoded:
        """Encode sequences.

        Args:
            sequences: texts, cleaned on the way as by `esm_efficient.data.sequences.clean`.
            max_residues: the most residues to keep of each; None for all.
            keep: what stays of a longer one: its ``"start"``, its ``"end"``, or ``"both"`` ends.
            special: put ``<cls>`` before each and ``<eos>`` after it.

        Raises:
            ConfigurationError: `keep` is none of these, or `max_residues` is below 1.
        """
        check_cut(max_residues, keep)
        ids, lengths = self._residues(sequences)
        residues = lengths
        if max_residues is not None and lengths.max(initial=0) > max_residues:
            kept = kept_by(lengths, max_residues, keep)
            ids, lengths = ids[kept], np.minimum(lengths, max_residues)
        if not special:
            return Encoded(ids, offsets_of(lengths), residues)
        offsets = offsets_of(lengths + SPECIAL_TOKENS)
        tokens = np.empty(offsets[-1], dtype=np.uint8)
        inner = np.ones(len(tokens), dtype=bool)
        inner[offsets[:-1]] = inner[offsets[1:] - 1] = False
        tokens[inner] = ids
        tokens[offsets[:-1]], tokens[offsets[1:] - 1] = self.cls, self.eos
        return Encoded(tokens, offsets, residues)

    def _residues(self, sequences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all residues, and how many each sequence has."""
        text = "".join(sequences)
        if not text.isascii() or STOP in text:
            # Only in the few that hold such a character, other white space or a final stop must be looked for.
            sequences = [s if s.isascii() and STOP not in s else clean(s) for s in sequences]
            text = "".join(sequences)
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        # A character outside of ASCII becomes '?', which is no token: one <unk> for one character.
        ids = self._table[np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)]
        dropped = ids == _DROPPED
        if not dropped.any():
            return ids, lengths
        so_far = np.concatenate(([0], np.cumsum(dropped)))
        offsets = offsets_of(lengths)
        return ids[~dropped], lengths - (so_far[offsets[1:]] - so_far[offsets[:-1]])


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of several pieces begins, and the end of the last: int64 of shape (pieces + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths)))


def kept_by(lengths: np.ndarray, most: int, keep: Keep = "start") -> np.ndarray:
    """Which residues stay when sequences are cut.

    Args:
        lengths: residues of each sequence.
        most: the most residues to keep of each, at least 1.
        keep: what stays: the ``"start"``, the ``"end"``, or ``"both"`` ends (the start gets the odd residue).

    Returns:
        bool of shape (residues of all sequences,).

    Raises:
        ConfigurationError: `keep` is none of these, or `most` is below 1.

    Example:
        >>> kept_by(np.array([4, 2]), 3, "both").tolist()
        [True, True, False, True, True, True]
    """
    check_cut(most, keep)
    tail = {"start": 0, "end": most, "both": most // 2}[keep]
    place = np.arange(lengths.sum()) - np.repeat(offsets_of(lengths)[:-1], lengths)
    return (place < most - tail) | (place >= np.repeat(lengths - tail, lengths))


def check_cut(max_residues: int | None, keep: str) -> None:
    """Refuse a cut that leaves nothing or that has no name.

    Raises:
        ConfigurationError: `keep` is no kind of cut, or `max_residues` is below 1.
    """
    if keep not in get_args(Keep):
        raise ConfigurationError(f"keep={keep!r}: expected one of {', '.join(get_args(Keep))}")
    if max_residues is not None and max_residues < 1:
        raise ConfigurationError(f"max_residues={max_residues}: at least one residue must stay")


def tokenize_dataset(
    dataset: DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    keep: Keep = "start",
) -> tuple[DatasetDict | IterableDatasetDict, TokenizationReport]:
    """Turn sequences into ``input_ids``, ``attention_mask`` and ``labels`` for a transformers Trainer.

    What the labels become follows from their feature (`esm_efficient.data.labels.task_of`): class ids stay; several
    labels a sequence become a list of float32, NaN where one is unknown; labels of residues are put beside the tokens,
    -100 beside special ones, and cut with them; numbers become float32.

    Args:
        dataset: splits with ``sequence`` (str) and, to train or evaluate, ``label``; ``sample_weight`` is kept, other
            columns are dropped. Streams stay streams; they are gone through once for the counts.
        tokenizer: of an ESM model.
        max_length: the most *tokens* of a sequence, with the two special ones.
        keep: what stays of a longer sequence: its ``"start"``, its ``"end"``, or ``"both"`` ends.

    Returns:
        The tokenised splits, with ``length`` (tokens) for sampling by length; and the counts of what was cut, dropped
        and unknown, which are logged too.

    Raises:
        ConfigurationError: `max_length` leaves no room for a residue, or the tokenizer is not one of an ESM model.
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
    if max_length <= SPECIAL_TOKENS:
        raise ConfigurationError(f"max_length={max_length} leaves no room for a residue beside {SPECIAL_TOKENS} tokens")
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
        options = {"encoder": encoder, "max_residues": max_length - SPECIAL_TOKENS, "keep": keep}
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
    for block in encoded.select_columns(["length", *_COUNTS]).with_format("numpy").iter(100_000):
        length, cut, unknown, ambiguous, dropped = (block[name] for name in ("length", *_COUNTS))
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
    return Features(result | dict.fromkeys(("length", *_COUNTS), Value("int64")))


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
    return pa.table(columns | dict(zip(("length", *_COUNTS), counted, strict=True)))


def _sample_weights(column: pa.ChunkedArray, rows: list[str]) -> np.ndarray:
    weights = np.array([np.nan if w is None else w for w in column.to_pylist()], dtype=np.float32)
    if bad := [rows[i] for i in np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))]:
        raise DataError(f"the {WEIGHT_COLUMN} is no finite number >= 0 in {len(bad)} row(s): {listing(bad)}")
    return weights
