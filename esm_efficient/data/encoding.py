"""Residues to token ids, equal to `EsmTokenizer` on every letter that it knows.

`EsmTokenizer` folds a run of unknown characters into a single ``<unk>``, which shifts every later residue. Here each
unknown character is one ``<unk>``, lower case is upper case, and white space is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.data.sequences import AMBIGUOUS_RESIDUES, RESIDUES, Keep, clean, truncate
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = 2
"""Tokens that are added to a sequence: ``<cls>`` before it and ``<eos>`` after it."""


@dataclass(frozen=True)
class SplitCounts:
    """What tokenising one split counted."""

    sequences: int
    residues: int
    sequences_cut: int
    residues_cut: int
    unknown_residues: int
    ambiguous_residues: int


@dataclass(frozen=True)
class TokenizationReport:
    """What tokenising did to each split.

    Attributes:
        splits: split name to counts. ``residues`` are those kept, ``residues_cut`` those dropped by truncation,
            ``unknown_residues`` those kept that became ``<unk>``, ``ambiguous_residues`` those kept that are X, B or Z.
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
                f"{counts.ambiguous_residues:,} ambiguous residues"
            )
        return "\n".join(lines)


def residue_table(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The token id of every single-byte character, int64 of shape (256,); ``<unk>`` where there is none.

    Raises:
        ConfigurationError: the tokenizer lacks one of the 25 residue letters or a special token.
    """
    vocabulary = tokenizer.get_vocab()
    if missing := [residue for residue in RESIDUES if residue not in vocabulary]:
        raise ConfigurationError(
            f"the tokenizer has no token for {', '.join(missing)}: expected the tokenizer of an ESM model, got "
            f"{type(tokenizer).__name__}"
        )
    specials = {name: getattr(tokenizer, name) for name in ("cls_token_id", "eos_token_id", "unk_token_id")}
    if absent := [name for name, value in specials.items() if value is None]:
        raise ConfigurationError(f"the tokenizer has no {', '.join(absent)}")
    table = np.full(256, tokenizer.unk_token_id, dtype=np.int64)
    for token, index in vocabulary.items():
        if len(token) == 1 and ord(token) < 256:
            table[ord(token)] = index
    return table


def encode(sequence: str, table: np.ndarray) -> np.ndarray:
    """Token ids of a cleaned sequence, int64 of shape (residues,), without special tokens.

    Args:
        sequence: upper-case residues without white space.
        table: from `residue_table`.
    """
    # A character outside latin-1 becomes '?', which is no token: one <unk> for one character.
    return table[np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8)]


def tokenize_dataset(
    dataset: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    keep: Keep = "start",
) -> tuple[DatasetDict, TokenizationReport]:
    """Turn sequences into ``input_ids``, ``attention_mask`` and ``labels`` for a transformers Trainer.

    Args:
        dataset: splits with ``sequence`` (str) and, to train or evaluate, ``label``; other columns are dropped.
        tokenizer: of an ESM model.
        max_length: the most *tokens* of a sequence, with the two special ones.
        keep: what stays of a longer sequence: its ``"start"``, its ``"end"``, or ``"both"`` ends.

    Returns:
        The tokenised splits, with ``length`` (tokens) for sampling by length; and the counts of what was cut and of
        unknown residues, which are logged too.

    Raises:
        ConfigurationError: `max_length` leaves no room for a residue, or the tokenizer is not one of an ESM model.
        DataError: a split has no ``sequence`` column, or a sequence is empty.

    Example:
        >>> from datasets import Dataset, DatasetDict
        >>> from transformers import AutoTokenizer
        >>> from esm_efficient.demo import demo_model_path
        >>> tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
        >>> data = DatasetDict(test=Dataset.from_dict({"sequence": ["MKTJ"], "label": [1]}))
        >>> tokenized, report = tokenize_dataset(data, tokenizer)
        >>> tokenized["test"][0]["input_ids"], report.total.unknown_residues
        ([0, 20, 15, 11, 3, 2], 1)
    """
    if max_length <= SPECIAL_TOKENS:
        raise ConfigurationError(f"max_length={max_length} leaves no room for a residue beside {SPECIAL_TOKENS} tokens")
    table = residue_table(tokenizer)
    options: dict[str, Any] = {
        "table": table,
        "special": (tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id),
        "max_residues": max_length - SPECIAL_TOKENS,
        "keep": keep,
    }
    splits, counts = {}, {}
    for name, split in dataset.items():
        if "sequence" not in split.column_names:
            raise DataError(f"split {name!r} has no column 'sequence'; it has {', '.join(split.column_names)}")
        encoded = split.map(
            _encode_batch, batched=True, fn_kwargs=options, remove_columns=_drop(split.column_names), desc=name
        )
        if empty := [f"row {i} of {name}" for i in np.flatnonzero(np.asarray(encoded["length"]) == SPECIAL_TOKENS)]:
            raise DataError(f"{len(empty)} sequence(s) are empty: {listing(empty)}")
        counts[name] = SplitCounts(
            sequences=len(encoded),
            residues=sum(encoded["length"]) - SPECIAL_TOKENS * len(encoded),
            sequences_cut=int(np.count_nonzero(encoded["_cut"])),
            residues_cut=sum(encoded["_cut"]),
            unknown_residues=sum(encoded["_unknown"]),
            ambiguous_residues=sum(encoded["_ambiguous"]),
        )
        encoded = encoded.remove_columns(["_cut", "_unknown", "_ambiguous"])
        splits[name] = encoded.rename_column("label", "labels") if "label" in encoded.column_names else encoded
    report = TokenizationReport(counts)
    total = report.total
    level = logging.WARNING if total.unknown_residues or total.residues_cut else logging.INFO
    logger.log(level, "tokenised\n%s", report)

    from datasets import DatasetDict

    return DatasetDict(splits), report


def _drop(columns: list[str]) -> list[str]:
    return [name for name in columns if name not in ("label", "labels")]


def _encode_batch(
    batch: dict[str, list[Any]], *, table: np.ndarray, special: tuple[int, int, int], max_residues: int, keep: Keep
) -> dict[str, list[Any]]:
    """Encode a batch of rows; the underscored columns count and are removed by the caller."""
    cls, eos, unknown = special
    ambiguous = table[[ord(residue) for residue in AMBIGUOUS_RESIDUES]]
    columns: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "attention_mask", "length", "_cut", "_unknown", "_ambiguous")
    }
    for sequence in batch["sequence"]:
        whole = clean(sequence)
        kept = truncate(whole, max_residues, keep)
        ids = encode(kept, table)
        columns["input_ids"].append(np.concatenate(([cls], ids, [eos])))
        columns["attention_mask"].append(np.ones(len(ids) + SPECIAL_TOKENS, dtype=np.int8))
        columns["length"].append(len(ids) + SPECIAL_TOKENS)
        columns["_cut"].append(len(whole) - len(kept))
        columns["_unknown"].append(int(np.count_nonzero(ids == unknown)))
        columns["_ambiguous"].append(int(np.isin(ids, ambiguous).sum()))
    return columns
