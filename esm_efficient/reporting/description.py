"""Describe labelled splits: sizes, lengths, labels, and relatives across the splits."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.data.relatives import CLOSE, WORD, close_relatives
from esm_efficient.data.sequences import STANDARD_RESIDUES, check_texts, count_residues
from esm_efficient.data.splits import sequence_hashes
from esm_efficient.errors import DataError, listing
from esm_efficient.tasks import MAX_TOKENS, SPECIAL_TOKENS

if TYPE_CHECKING:
    from datasets import Dataset


MOST_RESIDUES = MAX_TOKENS - SPECIAL_TOKENS
"""The most residues that ESM-2 was trained to read."""

MOST_QUERIES = 2_000
"""The most sequences of a split, drawn at random, whose relatives are looked for."""

MOST_REFERENCES = 100_000
"""The most training sequences that are compared; with more, relatives are not counted."""


@dataclass(frozen=True)
class SplitDescription:
    """One split.

    Attributes:
        sequences: number of sequences.
        residues: shortest, median and longest sequence.
        repeated: sequences that equal an earlier one of the split.
        unusual: sequences with a letter that is not one of the 20 amino acids.
        labels: label name to the number of sequences, or of residues, that have it; empty for numbers.
        labelled: label name to the number of sequences, or of residues, of which it is known whether they have it; the
            share of a label is of these.
        numbers: mean and standard deviation of each number, by its name; empty for other labels.
        relatives: share of the sequences with a close relative in ``train`` (`esm_efficient.data.relatives`), from at
            most `MOST_QUERIES` of them; None for ``train`` itself, and if it has more than `MOST_REFERENCES` sequences.
        long: sequences with more residues than `MOST_RESIDUES`, of which a model reads a part.
    """

    sequences: int
    residues: tuple[int, int, int]
    repeated: int
    unusual: int
    labels: Mapping[str, int]
    labelled: Mapping[str, int]
    numbers: Mapping[str, tuple[float, float]]
    relatives: float | None
    long: int


@dataclass(frozen=True)
class DataDescription:
    """What `describe` found.

    Attributes:
        columns: the columns of the splits.
        splits: the splits by name.
    """

    columns: tuple[str, ...]
    splits: Mapping[str, SplitDescription]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of a table with a column per split, each with its name first."""
        found = list(self.splits.values())
        labels = list(dict.fromkeys(label for split in found for label in split.labels))
        lines: list[tuple[str, ...]] = [
            ("sequences", *(f"{split.sequences:,}" for split in found)),
            ("residues: shortest, median, longest", *("{:,}, {:,}, {:,}".format(*split.residues) for split in found)),
            ("repeated sequences", *(f"{split.repeated:,}" for split in found)),
            ("with unusual letters", *(f"{split.unusual:,}" for split in found)),
            *((f"label {label}", *(self._label(split, label) for split in found)) for label in labels),
        ]
        for number in dict.fromkeys(name for split in found for name in split.numbers):
            shown = ("{:.4g} ± {:.3g}".format(*s.numbers[number]) if number in s.numbers else "-" for s in found)
            lines.append((f"{number}, mean ± standard deviation", *shown))
        if any(split.long for split in found):
            lines.append((f"of more than {MOST_RESIDUES:,} residues", *(f"{split.long:,}" for split in found)))
        relatives = ("-" if s.relatives is None else f"{100 * s.relatives:.1f} %" for s in found)
        return [*lines, ("with a close relative in train", *relatives)]

    def label_gaps(self) -> list[str]:
        """Return a sentence on the labels that a split lacks, per kind of gap and split.

        A label that is in ``train`` alone is never scored; one that is not in ``train`` cannot be learned.
        """
        found = {name: [label for label, n in split.labels.items() if n] for name, split in self.splits.items()}
        train = found.pop("train", None)
        if train is None:
            return []
        gaps = []
        for name, labels in found.items():
            if not any(self.splits[name].labelled.values()):
                continue
            if unscored := [label for label in train if label not in labels]:
                gaps.append(
                    f"{name} has no example of {_named(unscored)}: no score on {name} shows how it is predicted"
                )
            if unknown := [label for label in labels if label not in train]:
                gaps.append(f"train has no example of {_named(unknown)}, but {name} has some: it cannot be learned")
        return gaps

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a dict for JSON; an undefined number becomes None."""
        splits = {}
        for name, split in self.splits.items():
            numbers = {n: [x if np.isfinite(x) else None for x in pair] for n, pair in split.numbers.items()}
            splits[name] = dataclasses.asdict(split) | {"residues": list(split.residues), "numbers": numbers}
        return {"columns": list(self.columns), "splits": splits}

    @staticmethod
    def _label(split: SplitDescription, label: str) -> str:
        count, known = split.labels.get(label, 0), split.labelled.get(label, 0)
        of = f" of {known:,} known" if known < split.sequences else ""
        return f"{count:,} ({100 * count / known:.1f} %{of})" if known else "0"

    def __str__(self) -> str:
        from esm_efficient.reporting.tables import format_table

        table = format_table(self.rows(), ("", *self.splits))
        gaps = "".join(f"\n\nNote: {gap}." for gap in self.label_gaps())
        return (
            f"columns: {', '.join(self.columns)}\n\n{table}{gaps}\n\nA close relative shares at least "
            f"{100 * CLOSE:.0f} % of its words of {WORD} residues: about 60 % identity."
        )


def _named(labels: list[str]) -> str:
    return f"the label {labels[0]}" if len(labels) == 1 else f"any of the labels {listing(labels)}"


def describe(splits: Mapping[str, Dataset]) -> DataDescription:
    """Describe labelled splits, such as those of `load_sequences`.

    Args:
        splits: splits with the column ``sequence``, and ``label`` if they are labelled.

    Raises:
        DataError: a sequence is missing or is not a text, or a split is empty.

    Example:
        >>> print(describe(load_sequences("proteins.csv")))  # doctest: +SKIP
    """
    for name, split in splits.items():
        check_texts(split["sequence"][:], range(len(split)), name)
        if not len(split):
            raise DataError(f"{name} has no sequence: there is nothing to describe")
    train = splits["train"]["sequence"][:] if "train" in splits else []
    described = {}
    for name, split in splits.items():
        sequences = split["sequence"][:]
        lengths = np.sort([count_residues(sequence) for sequence in sequences])
        labels, labelled, numbers = _count_labels(split)
        described[name] = SplitDescription(
            sequences=len(split),
            residues=(int(lengths[0]), int(lengths[len(lengths) // 2]), int(lengths[-1])),
            repeated=len(split) - len(np.unique(sequence_hashes(split))),
            unusual=sum(not set(sequence) <= set(STANDARD_RESIDUES) for sequence in sequences),
            labels=labels,
            labelled=labelled,
            numbers=numbers,
            relatives=None if name == "train" else _relatives(sequences, train),
            long=int((lengths > MOST_RESIDUES).sum()),
        )
    return DataDescription(tuple(next(iter(splits.values())).column_names), described)


def _relatives(sequences: Sequence[str], train: Sequence[str]) -> float | None:
    """Return the share of the sequences with a close relative; None if there are too many to compare with, or none."""
    if not 0 < len(train) <= MOST_REFERENCES or not len(sequences):
        return None
    chosen = np.random.default_rng(0).permutation(len(sequences))[:MOST_QUERIES]
    return close_relatives([sequences[index] for index in chosen], train)


def _count_labels(split: Dataset) -> tuple[dict[str, int], dict[str, int], dict[str, tuple[float, float]]]:
    """Return the count of each label, that of its known cells, and mean and standard deviation of each number."""
    if "label" not in split.column_names:
        return {}, {}, {}
    feature, cells = split.features["label"], split["label"][:]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if isinstance(feature, Mapping):
        # An unknown label is None, NaN or -100; in a row without any label, all are unknown.
        present = [cell for cell in cells if cell is not None]
        known = {
            name: [cell[name] for cell in present if cell[name] is not None and cell[name] >= 0] for name in feature
        }
        counts = {name: sum(value > 0 for value in values) for name, values in known.items()}
        return counts, {name: len(values) for name, values in known.items()}, {}
    if names is None:
        return {}, {}, _mean_and_deviation(cells, max(getattr(feature, "length", -1), 1))
    found = Counter(label for cell in cells for label in (cell if isinstance(cell, list) else [cell]))
    labels = {name: found[index] for index, name in enumerate(names)}
    return labels, dict.fromkeys(labels, sum(labels.values())), {}


def _mean_and_deviation(cells: Sequence[Any], count: int) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of the known values of each number, by its name; NaN if there is none."""
    unknown = [None] * count
    rows = [unknown if cell is None else cell if isinstance(cell, list) else [cell] for cell in cells]
    table = np.array(rows, dtype=np.float64).reshape(len(rows), count)
    names = ["label"] if count == 1 else [f"label_{index}" for index in range(count)]
    columns = (column[~np.isnan(column)] for column in table.T)
    return {
        name: (float(column.mean()), float(column.std())) if column.size else (np.nan, np.nan)
        for name, column in zip(names, columns, strict=True)
    }
