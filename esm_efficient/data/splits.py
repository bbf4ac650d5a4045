"""Rows into training, validation and test: by homology partition, by cluster, or at random; and what leaks between.

Proteins descend from each other. A test protein with a relative among the training proteins can be told by memory, and
a random split is full of those: its score is not that of a protein nobody has seen.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.data.readers import accession_of, open_text
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

_BLOCK = 10_000
_CD_HIT_MEMBER = re.compile(r"^\d+\t\S+, >(?P<name>.+?)\.\.\. ")


def split_by_partition(dataset: Dataset, test: Sequence[int], validation: Sequence[int]) -> dict[str, Dataset]:
    """Cut rows by their column ``partition``; what is in neither list is for training.

    Raises:
        ConfigurationError: the lists overlap, name a partition that is not there, or leave nothing to test or train on.
    """
    where = _column(dataset, "partition")
    check_partitions(np.unique(where).tolist(), test, validation)
    of_test, of_validation = np.isin(where, list(test)), np.isin(where, list(validation))
    return _parts(dataset, of_test, of_validation)


def check_partitions(present: Sequence[int], test: Sequence[int], validation: Sequence[int]) -> None:
    """Refuse partitions that are not there, that are named twice, or that leave nothing to test or train on.

    Raises:
        ConfigurationError: they do, or a list is no list of whole numbers.
    """
    for name, partitions in (("test_partitions", test), ("validation_partitions", validation)):
        if isinstance(partitions, int | str) or not all(isinstance(p, int | np.integer) for p in partitions):
            raise ConfigurationError(f"{name}={partitions!r}: expected a list of whole numbers")
    if both := sorted(set(test) & set(validation)):
        raise ConfigurationError(f"partition(s) {both} are named for the test set and for the validation set")
    if absent := sorted((set(test) | set(validation)) - set(present)):
        raise ConfigurationError(f"partition(s) {absent} are not in the table, which has {present}")
    if not test:
        raise ConfigurationError(f"test_partitions is empty; choose from {present}")
    if not set(present) - set(test) - set(validation):
        raise ConfigurationError(f"no partition of {present} is left to train on")


def split_by_group(
    dataset: Dataset, groups: np.ndarray, *, test_size: float, validation_size: float, seed: int
) -> dict[str, Dataset]:
    """Cut rows at random, with all rows of a group on one side.

    Groups are taken in random order for the test set as long as they fit into its share, then for the validation set.

    Args:
        dataset: the rows.
        groups: int of shape (rows,): the group of each.
        test_size: fraction of the rows in the test set.
        validation_size: likewise for the validation set; 0 for none.
        seed: of the order of the groups.

    Raises:
        ConfigurationError: the fractions leave nothing to train on, or there are too few groups for the splits.
    """
    check_sizes(test_size, validation_size)
    _, code, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(counts))
    of_test = _take(counts, order, test_size * len(dataset))
    of_validation = _take(counts, order[~of_test[order]], validation_size * len(dataset))
    parts = _parts(dataset, of_test[code], of_validation[code])
    for name, share in (("test", test_size), ("validation", validation_size)):
        found = len(parts.get(name, ()))
        if abs(found - share * len(dataset)) > max(1, 0.25 * share * len(dataset)):
            logger.warning(
                "%s has %d of %d rows, not %.0f %%: groups are large", name, found, len(dataset), 100 * share
            )
    wanted = {"train", "test"} | ({"validation"} if validation_size else set())
    if empty := sorted(wanted - {name for name, part in parts.items() if len(part)}):
        raise ConfigurationError(
            f"{len(counts)} groups of {len(dataset)} rows leave nothing for {', '.join(empty)} with "
            f"test_size={test_size} and validation_size={validation_size}"
        )
    return parts


def _take(counts: np.ndarray, order: np.ndarray, rows: float) -> np.ndarray:
    """Which groups to take so that they have so many rows and no more; the smallest if none fits."""
    taken = np.zeros(len(counts), dtype=bool)
    if rows <= 0 or not len(order):
        return taken
    sizes = counts[order]
    if sizes.max() == 1:
        taken[order[: max(round(rows), 1)]] = True
        return taken
    held = 0
    for group, size in zip(order, sizes, strict=True):
        if held + size <= rows + 0.5:
            taken[group] = True
            held += int(size)
    if not held:
        taken[order[sizes.argmin()]] = True
    return taken


def split_at_random(
    dataset: Dataset, *, test_size: float, validation_size: float, seed: int, stacklevel: int = 3
) -> dict[str, Dataset]:
    """Cut rows at random, with equal frequencies of classes in every part, and warn of what that does.

    Raises:
        ConfigurationError: the fractions leave nothing to train on.
    """
    check_sizes(test_size, validation_size)
    warn_of_relatives(stacklevel=stacklevel + 1)
    # Several labels a sequence cannot be stratified at once.
    options: dict[str, Any] = {"seed": seed, "stratify_by_column": "label" if has_classes(dataset) else None}
    cut = dataset.train_test_split(test_size=test_size, **options)
    parts = {"train": cut["train"], "test": cut["test"]}
    if validation_size:
        rest = cut["train"].train_test_split(test_size=validation_size / (1 - test_size), **options)
        parts = {"train": rest["train"], "validation": rest["test"], "test": cut["test"]}
    return parts


def stratified_sample(dataset: Dataset, size: int, *, seed: int = 0) -> Dataset:
    """A random sample of rows with the label frequencies of the whole.

    Args:
        dataset: rows with ``label``; where that is no ClassLabel, the sample is not stratified.
        size: rows to draw, at least 1; the whole dataset, shuffled, if it has no more.
        seed: of the draw.

    Returns:
        The sample, in random order.

    Raises:
        ConfigurationError: `size` is below 1.
    """
    if size < 1:
        raise ConfigurationError(f"size={size}: a sample has at least one row")
    if not has_classes(dataset):
        return dataset.shuffle(seed=seed).select(range(min(size, len(dataset))))
    labels = np.asarray(dataset["label"][:])
    classes, counts = np.unique(labels, return_counts=True)
    # Each class gets its share rounded down, and those with the largest remainders one more.
    shares = min(size, len(labels)) * counts / len(labels)
    wanted = np.floor(shares).astype(int)
    wanted[np.argsort(wanted - shares, kind="stable")[: min(size, len(labels)) - wanted.sum()]] += 1
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, wanted, strict=True)]
    return dataset.select(rng.permutation(np.concatenate(rows)))


def read_clusters(path: str | Path) -> dict[str, int]:
    """The cluster of each sequence from a file of MMseqs2 or CD-HIT.

    Args:
        path: MMseqs2's two columns of representative and member (``*_cluster.tsv``), or CD-HIT's ``*.clstr``; plain,
            gzip or xz. The name of a CD-HIT member must not have been cut (``-d 0``).

    Returns:
        Name of a sequence, of UniProt's names the accession, to the number of its cluster.

    Raises:
        DataError: a line is neither, or a sequence stands in two clusters.
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
                    f"{path}, line {number}: neither a representative and a member, as of MMseqs2, nor a cluster of "
                    f"CD-HIT: {line!r:.80}"
                )
            if clusters.setdefault(accession_of(name), cluster) != cluster:
                raise DataError(f"{path}, line {number}: {name} stands in two clusters")
    if not clusters:
        raise DataError(f"{path} names no sequence")
    return clusters


def cluster_groups(names: Sequence[str], clusters: Mapping[str, int], path: str | Path) -> np.ndarray:
    """The cluster of each accession, int64 of shape (accessions,).

    Raises:
        DataError: one is in no cluster of the file at `path`.
    """
    if absent := [name for name in names if accession_of(name) not in clusters]:
        raise DataError(f"{path} has no cluster for {len(absent)} of {len(names)} sequences: {listing(absent)}")
    return np.array([clusters[accession_of(name)] for name in names])


def sequence_groups(dataset: Dataset) -> np.ndarray:
    """A group for each distinct sequence, int64 of shape (rows,)."""
    return np.unique(sequence_hashes(dataset), return_inverse=True)[1]


def check_sizes(test_size: float, validation_size: float) -> None:
    """Refuse fractions that leave nothing.

    Raises:
        ConfigurationError: they are no fractions, or leave nothing to train on.
    """
    if not (0 < test_size < 1 and 0 <= validation_size < 1 and test_size + validation_size < 1):
        raise ConfigurationError(
            f"test_size={test_size} and validation_size={validation_size}: expected fractions that leave something to "
            "train on"
        )


def warn_of_relatives(*, stacklevel: int) -> None:
    """Say what a random split does."""
    warnings.warn(
        "A random split puts homologous proteins on both sides: the test score then measures memory as well as "
        "skill. Split by homology partition or by cluster for a figure to report.",
        UserWarning,
        stacklevel=stacklevel,
    )


def has_classes(dataset: Dataset) -> bool:
    """Whether the label is one class of several."""
    return hasattr(dataset.features.get("label"), "names")


def _parts(dataset: Dataset, test: np.ndarray, validation: np.ndarray) -> dict[str, Dataset]:
    parts = {"train": dataset.select(np.flatnonzero(~test & ~validation))}
    if validation.any():
        parts["validation"] = dataset.select(np.flatnonzero(validation))
    return parts | {"test": dataset.select(np.flatnonzero(test))}


def _column(dataset: Dataset, name: str) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")[name][:])


def sequence_hashes(dataset: Dataset) -> np.ndarray:
    """A 64-bit hash of every sequence, so that millions of them need not be held."""
    blocks = dataset.select_columns("sequence").with_format("arrow").iter(_BLOCK)
    return np.concatenate([np.empty(0, dtype=np.uint64), *(hash_sequences(block["sequence"]) for block in blocks)])


def hash_sequences(sequences: pa.Array | pa.ChunkedArray, *, seed: int = 0) -> np.ndarray:
    """A hash of each sequence, uint64 of shape (rows,); others for another seed."""
    from pandas.util import hash_array

    texts = np.array(sequences.to_pylist(), dtype=object)
    return hash_array(texts, hash_key=f"{seed:016d}"[-16:], categorize=False)
