"""Split rows into training, validation and test sets: by homology partition, by cluster, or at random.

Proteins are related by descent. A model can predict a test protein from memory if it was trained on a relative. A
random split has many such pairs, so its score is not the score on an unseen protein.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from esm_efficient.data.readers import accession_of, open_text
from esm_efficient.data.relatives import shared_words
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

MOST_FOLDS = 20
"""The most partitions of which the highest are taken for test and validation without being named."""

_HASH_BATCH_ROWS = 10_000
_LOOKED_AT = 200
"""The most rows that are looked at for variants of one protein."""

_FEWEST_VARIANTS = 20
_VARIANT = 0.5
"""The share of words of five residues from which two sequences are variants of one protein: an identity of 87 %."""

_CD_HIT_MEMBER = re.compile(r"^\d+\t\S+, >(?P<name>.+?)\.\.\. ")


def split_by_partition(
    dataset: Dataset, test: Sequence[int] | None, validation: Sequence[int] | None
) -> dict[str, Dataset]:
    """Split rows by their column ``partition``; partitions in neither list are for training.

    Args:
        dataset: the rows.
        test: partitions for the test set; None for the highest.
        validation: partitions for the validation set; None for the highest that does not test, if one is left to train.

    Raises:
        ConfigurationError: the lists overlap, name a partition that is not in the table, or leave nothing to test or
            train on; or nothing is named and there are more than `MOST_FOLDS`.
    """
    _check_lists(test, validation)
    partitions = _column(dataset, "partition")
    present = np.unique(partitions).tolist()
    if test is None:
        if len(present) > MOST_FOLDS:
            raise ConfigurationError(
                f"the column of partitions has {len(present):,} different numbers: pass partition=False if they are no "
                "homology partitions, or name those of the test set with test_partitions="
            )
        test = [max(set(present) - set(validation or ()), default=present[-1])]
    if validation is None:
        free = sorted(set(present) - set(test))
        validation = free[-1:] if len(free) > 1 else ()
    check_partitions(present, test, validation)
    return _select_splits(dataset, np.isin(partitions, list(test)), np.isin(partitions, list(validation)))


def _check_lists(test: Sequence[int] | None, validation: Sequence[int] | None) -> None:
    for name, partitions in (("test_partitions", test), ("validation_partitions", validation)):
        if partitions is None:
            continue
        if isinstance(partitions, int | str) or not all(isinstance(p, int | np.integer) for p in partitions):
            raise ConfigurationError(f"{name}={partitions!r}: expected a list of whole numbers")


def check_partitions(present: Sequence[int], test: Sequence[int], validation: Sequence[int]) -> None:
    """Refuse partitions that are absent, that are named twice, or that leave nothing to test or train on.

    Raises:
        ConfigurationError: the partitions do one of these, or a list is not a list of whole numbers.
    """
    _check_lists(test, validation)
    if both := sorted(set(test) & set(validation)):
        raise ConfigurationError(f"partition(s) {both} are named for the test set and for the validation set")
    if absent := sorted((set(test) | set(validation)) - set(present)):
        raise ConfigurationError(f"partition(s) {absent} are not in the table, which has {present}")
    if not test:
        raise ConfigurationError(f"test_partitions is empty; choose from {present}")
    if not set(present) - set(test) - set(validation):
        raise ConfigurationError(f"no partition of {present} is left to train on")


def split_by_group(
    dataset: Dataset,
    groups: np.ndarray,
    *,
    test_size: float,
    validation_size: float,
    seed: int,
    classes: np.ndarray | None = None,
) -> dict[str, Dataset]:
    """Split rows at random, with all rows of a group in one split.

    Groups are drawn in random order for the test set as long as they fit into its share, then for the validation set.
    If one group is larger than the share of the training set, it is for training, and the others are divided between
    test and validation in proportion to their shares.

    Args:
        dataset: the rows.
        groups: int of shape (rows,): the group of each row.
        test_size: fraction of the rows in the test set.
        validation_size: fraction of the rows in the validation set; 0 for none.
        seed: seed of the random order of the groups.
        classes: int of shape (rows,): the class of each row, to give every split the class frequencies of the whole
            (`apportion`). A group counts for the class of its first row. None to ignore classes.

    Raises:
        ConfigurationError: the fractions leave nothing to train on, or there are too few groups for the splits.
    """
    sizes_of(test_size, validation_size)
    _, first_rows, group_of_row, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    rows = len(dataset)
    test_rows = max(round(test_size * rows), 1)
    validation_rows = min(max(round(validation_size * rows), 1), rows - test_rows) if validation_size else 0
    largest, others = int(sizes.argmax()), rows - int(sizes.max())
    dominates = 1 < others < test_rows + validation_rows
    if dominates:
        test_rows = max(round(others * test_size / (test_size + validation_size)), 1)
        validation_rows = others - test_rows
    strata = np.zeros(len(sizes), dtype=np.int64)
    if classes is not None:
        strata = np.unique(classes[first_rows], return_inverse=True)[1]
    stratum_rows = np.bincount(strata, weights=sizes).astype(np.int64)
    quotas = apportion(stratum_rows, (test_rows, validation_rows, rows - test_rows - validation_rows))
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[order != largest] if dominates else order
    counts = np.bincount(strata[order], minlength=len(stratum_rows))
    by_stratum = np.split(order[np.argsort(strata[order], kind="stable")], np.cumsum(counts)[:-1])
    in_test = _draw(by_stratum, sizes, quotas[:, 0])
    in_validation = _draw([stratum[~in_test[stratum]] for stratum in by_stratum], sizes, quotas[:, 1])
    splits = _select_splits(dataset, in_test[group_of_row], in_validation[group_of_row])
    for name, share in (("test", test_size), ("validation", validation_size)):
        size = len(splits.get(name, ()))
        if abs(size - share * rows) > max(1, 0.25 * share * rows):
            logger.warning("%s has %d of %d rows, not %.0f %%: groups are large", name, size, rows, 100 * share)
    wanted = {"train", "test"} | ({"validation"} if validation_size else set())
    if empty := sorted(wanted - {name for name, split in splits.items() if len(split)}):
        raise ConfigurationError(
            f"{rows} row(s) in {len(sizes)} group(s) of equal or related sequences leave nothing for "
            f"{', '.join(empty)} ({test_size:.0%} for test, {validation_size:.0%} for validation). Expected at least "
            f"{len(wanted)} groups: give more sequences that differ, or name the column with each row's split (split=)"
        )
    return splits


def _draw(by_stratum: Sequence[np.ndarray], sizes: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """Mark the groups to take: per stratum, in order, those that fit into its quota of rows.

    Rows that a stratum could not fill are added to the quota of the next. If no group fits, the smallest is taken.

    Returns:
        bool of shape (groups,).
    """
    drawn = np.zeros(len(sizes), dtype=bool)
    free = 0
    for stratum, quota in zip(by_stratum, quotas.tolist(), strict=True):
        free += quota
        for group, size in zip(stratum.tolist(), sizes[stratum].tolist(), strict=True):
            if size <= free:
                drawn[group] = True
                free -= size
    candidates = np.concatenate(by_stratum)
    if quotas.any() and not drawn.any() and len(candidates):
        drawn[candidates[sizes[candidates].argmin()]] = True
    return drawn


def split_at_random(
    dataset: Dataset, *, test_size: float, validation_size: float, seed: int, stacklevel: int = 3
) -> dict[str, Dataset]:
    """Split rows at random, and warn that relatives of training proteins get into the test set.

    Equal sequences are in one split. Where the label is a ClassLabel, every split has the class frequencies of the
    whole, within one row per class if no sequence is repeated.

    Args:
        dataset: rows with ``sequence``.
        test_size: fraction of the rows in the test set.
        validation_size: fraction of the rows in the validation set; 0 for none.
        seed: seed of the draw.
        stacklevel: the caller that the warning names, 1 for this function.

    Returns:
        The splits; their rows are in the order of the dataset.

    Raises:
        ConfigurationError: the fractions leave nothing to train on, or there are too few sequences for the splits.
    """
    splits = split_by_group(
        dataset,
        sequence_groups(dataset),
        test_size=test_size,
        validation_size=validation_size,
        seed=seed,
        classes=_column(dataset, "label") if has_classes(dataset) else None,
    )
    cure = (
        "All sequences seem to be variants of one protein, so clusters cannot divide them: for a figure to report, "
        "split by the position of the mutations, in a column split."
        if are_variants(dataset)
        else "For a figure to report, split by homology partition (a column) or by cluster (clusters=)."
    )
    warnings.warn(
        "A random split puts homologous proteins on both sides: the test score then measures memory as well as "
        f"skill. {cure}",
        UserWarning,
        stacklevel=stacklevel,
    )
    return splits


def are_variants(dataset: Dataset) -> bool:
    """Return whether nearly all of some rows have most of their words in common with the first sequence."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, _LOOKED_AT).astype(int))
    first, *others = dataset.select(rows)["sequence"][:]
    return len(others) >= _FEWEST_VARIANTS and float((shared_words(others, [first]) >= _VARIANT).mean()) >= 0.95


def stratified_sample(dataset: Dataset, size: int, *, seed: int = 0) -> Dataset:
    """Draw a random sample of rows with the label frequencies of the whole.

    Args:
        dataset: rows with ``label``; if the label is not a ClassLabel, the sample is not stratified.
        size: rows to draw, at least 1; the whole dataset, shuffled, if it has no more.
        seed: seed of the draw.

    Returns:
        The sample, in random order.

    Raises:
        ConfigurationError: `size` is below 1.

    Example:
        >>> from datasets import ClassLabel, Dataset
        >>> rows = Dataset.from_dict({"label": [0] * 60 + [1] * 20}).cast_column("label", ClassLabel(num_classes=2))
        >>> sorted(stratified_sample(rows, 8)["label"])
        [0, 0, 0, 0, 0, 0, 1, 1]
    """
    if size < 1:
        raise ConfigurationError(f"size={size}: a sample has at least one row")
    size = min(size, len(dataset))
    if not has_classes(dataset):
        return dataset.shuffle(seed=seed).select(range(size))
    labels = _column(dataset, "label")
    classes, counts = np.unique(labels, return_counts=True)
    wanted = apportion(counts, (size, len(labels) - size))[:, 0]
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, wanted, strict=True)]
    return dataset.select(rng.permutation(np.concatenate(rows)))


def apportion(counts: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Divide the rows of each class among two or three parts in proportion to the sizes of the parts.

    The method is that of largest remainders: shares are rounded down, and the classes with the largest remainders of
    the first part get one row more there. The other parts get the rows that are left.

    Args:
        counts: int of shape (classes,): rows per class.
        sizes: rows per part; they add up to the rows of all classes.

    Returns:
        int of shape (classes, parts), with row sums `counts` and column sums `sizes`. Each entry is within one row of
        the exact share.

    Example:
        >>> apportion(np.array([7, 2, 1]), (5, 2, 3)).tolist()
        [[4, 1, 2], [1, 0, 1], [0, 1, 0]]
    """
    table, remainders = np.divmod(np.outer(counts, sizes), counts.sum())
    unplaced, missing = counts - table.sum(1), np.asarray(sizes) - table.sum(0)
    order = np.argsort(-remainders[:, 0], kind="stable")
    order = order[unplaced[order] > 0]
    for place, index in enumerate(order):
        # A part that lacks as many rows as there are classes left must take one from each of them.
        left = len(order) - place
        parts = sorted(np.flatnonzero(missing), key=lambda part: missing[part] < left)[: unplaced[index]]
        table[index, parts] += 1
        missing[parts] -= 1
    return table


def read_clusters(path: str | Path) -> dict[str, int]:
    """Read the cluster of each sequence from a file of MMseqs2 or CD-HIT.

    Args:
        path: the two columns of MMseqs2, representative and member (``*_cluster.tsv``), or the ``*.clstr`` of CD-HIT;
            plain, gzip or xz. CD-HIT must not have shortened the names (``-d 0``).

    Returns:
        The number of the cluster by the name of the sequence; of a UniProt name, by the accession.

    Raises:
        DataError: a line has neither format, or a sequence is in two clusters.
    """
    clusters: dict[str, int] = {}
    numbers: dict[str, int] = {}
    current = -1
    with open_text(path) as handle:
        for number, line in enumerate(handle, 1):
            line = line.rstrip("\r\n")
            if not line.strip():
                continue
            if line.startswith(">Cluster"):
                current += 1
                continue
            if member := _CD_HIT_MEMBER.match(line):
                name, cluster = member["name"], current
            elif line.count("\t") == 1:
                representative, name = line.split("\t")
                cluster = numbers.setdefault(representative, len(numbers))
            else:
                raise DataError(
                    f"{path}, line {number}: expected a representative and a member (MMseqs2) or a line of a CD-HIT "
                    f"cluster, got {line!r:.80}"
                )
            if clusters.setdefault(accession_of(name), cluster) != cluster:
                raise DataError(f"{path}, line {number}: {name} is in two clusters")
    if not clusters:
        raise DataError(f"{path} names no sequence: expected the clusters of MMseqs2 or CD-HIT")
    return clusters


def cluster_groups(names: Sequence[str], clusters: Mapping[str, int], path: str | Path) -> np.ndarray:
    """Return the cluster of each accession, int64 of shape (accessions,).

    Raises:
        DataError: an accession is in no cluster of the file at `path`.
    """
    absent = [name for name in names if accession_of(name) not in clusters]
    if len(absent) == len(names):
        raise DataError(
            f"{path} has no cluster for any of the {len(names)} sequences: they have names such as {names[0]!r:.80}, "
            f"and the clusters {next(iter(clusters))!r:.80}. Name the column of the accessions with accession="
        )
    if absent:
        raise DataError(f"{path} has no cluster for {len(absent)} of {len(names)} sequences: {listing(absent)}")
    return np.array([clusters[accession_of(name)] for name in names])


def sequence_groups(dataset: Dataset) -> np.ndarray:
    """Return a group number per row, int64 of shape (rows,); rows with equal sequences have the same number."""
    return np.unique(sequence_hashes(dataset), return_inverse=True)[1]


def sizes_of(test_size: float | None, validation_size: float | None) -> dict[str, float]:
    """Return the fractions of the test and validation sets by the names of the arguments; None is 0.2 and 0.1.

    Raises:
        ConfigurationError: a size is not a fraction, or the sizes leave nothing to train on.
    """
    test_size = 0.2 if test_size is None else test_size
    validation_size = 0.1 if validation_size is None else validation_size
    sizes = {"test_size": test_size, "validation_size": validation_size}
    if not (0 < test_size < 1 and 0 <= validation_size < 1 and test_size + validation_size < 1):
        raise ConfigurationError(f"{test_size=}, {validation_size=}: fractions must leave something to train on")
    return sizes


def has_classes(dataset: Dataset) -> bool:
    """Return whether the label is a ClassLabel: one class per sequence."""
    return hasattr(dataset.features.get("label"), "names")


def sequence_hashes(dataset: Dataset) -> np.ndarray:
    """Return a hash per sequence, uint64 of shape (rows,); the sequences themselves need not fit into memory."""
    from pandas.util import hash_array

    batches = dataset.select_columns("sequence").with_format("arrow").iter(_HASH_BATCH_ROWS)
    texts = (np.array(batch["sequence"].to_pylist(), dtype=object) for batch in batches)
    return np.concatenate([np.empty(0, dtype=np.uint64), *(hash_array(text, categorize=False) for text in texts)])


def _select_splits(dataset: Dataset, in_test: np.ndarray, in_validation: np.ndarray) -> dict[str, Dataset]:
    """Select the rows of each split; there is no validation split without rows for it."""
    splits = {"train": dataset.select(np.flatnonzero(~in_test & ~in_validation))}
    if in_validation.any():
        splits["validation"] = dataset.select(np.flatnonzero(in_validation))
    return splits | {"test": dataset.select(np.flatnonzero(in_test))}


def _column(dataset: Dataset, name: str) -> np.ndarray:
    """Return a column of numbers as an array of shape (rows,)."""
    return np.asarray(dataset.with_format("numpy")[name][:])
