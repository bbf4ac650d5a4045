"""The user's own CSV, TSV, Parquet and FASTA files, loaded with the same features as the DeepLoc table.

Files are read in blocks and written to a memory-mapped Arrow file, so neither has to fit into memory. The cells of the
label column tell what kind of label it holds; if they fit two kinds, an error says how to choose.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from esm_efficient.data.arrow_tables import OnError, TablePlan, mapped_table
from esm_efficient.data.clustering import OPTIONS, cluster_rows
from esm_efficient.data.label_kinds import LABEL_KINDS, LabelKind
from esm_efficient.data.label_names import refuse_bars
from esm_efficient.data.leaks import check_leaks
from esm_efficient.data.own_splits import FLAGS
from esm_efficient.data.schema import ONE_NUMBER, WEIGHT_COLUMN, Column
from esm_efficient.data.splits import (
    SPLITS,
    are_variants,
    cluster_groups,
    read_clusters,
    sizes_of,
    split_at_random,
    split_by_group,
    split_by_partition,
)
from esm_efficient.errors import ConfigurationError, listing

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

COMMAND_OPTIONS = (
    *("sequence", "label", "label_kind", "labels", "unlabelled", "accession", "split", "partition", "clusters"),
    *("test_size", "validation_size", "test_partitions", "header", "min_residues", "max_residues", "on_error", "seed"),
)
"""The options of `load_sequences` that the commands have too, under the same names."""


def load_sequences(
    path: str | Path | Mapping[str, str | Path],
    *,
    sequence: str | None = None,
    label: Column | Sequence[str] | Mapping[str, str] = None,
    label_kind: LabelKind | None = None,
    unlabelled: str | None = None,
    accession: str | None = None,
    partition: Column = None,
    split: Column = None,
    validation: Column = None,
    sample_weight: Column = None,
    labels: str | Path | None = None,
    header: str | None = None,
    clusters: str | Path | Literal[False] | None = None,
    test_partitions: Sequence[int] | None = None,
    validation_partitions: Sequence[int] | None = None,
    test_size: float | None = None,
    validation_size: float | None = None,
    min_residues: int | None = None,
    max_residues: int | None = None,
    on_error: OnError = "raise",
    seed: int = 0,
    shuffle: bool = True,
) -> DatasetDict:
    r"""Load your own files of sequences as a labelled, split `DatasetDict`.

    The splits are those of the files or of their columns, if there are any; else they are made from clusters, from
    homology partitions, from clusters that MMseqs2 finds, or at random with a UserWarning, in this order. The table is
    written once as an Arrow file into ``$ESM_EFFICIENT_CACHE/tables``, or else ``~/.cache/esm_efficient/tables``.

    Args:
        path: a CSV, TSV, Excel, Parquet, JSON lines or FASTA file, text plain, gzip or xz; or one file per split, by
            the names ``train``, ``validation`` and ``test``. A FASTA file may have a line of labels below each
            sequence.
        sequence: the column of the sequences. Any column that is not named is found by a usual name
            (`esm_efficient.data.schema.USUAL_NAMES`); False says that there is no such column.
        label: the column of the labels; or several columns of 0, 1 and empty cells (unknown), by their names or as a
            mapping of new names to columns. Without labels, the sequences have no label.
        label_kind: what a single label column holds, where its cells do not tell: ``"class"``, ``"residues"`` (one
            letter or item per residue), ``"positions"`` (of sites, such as ``12,40,77``, from 1 on: residues there are
            labelled 1 and all others 0), ``"several"`` (the labels of the sequence, such as ``Cytoplasm|Nucleus``) or
            ``"number"``.
        unlabelled: the letter or item of residues without a label, such as ``"-"``; an empty text if each is a class.
        accession: the column of the accessions; without one, the place of a row in its file is its accession.
        partition: the column of homology partitions, whole numbers.
        split: the column of ``train``, ``validation`` or ``test``. False ignores all columns that tell the split.
        validation: the column that is true where a row of ``train`` is for validation; False to ignore it.
        sample_weight: the column of weights in the loss.
        labels: a second table, joined by accession, with the labels and other columns of the sequences; or a FASTA
            file of the labels of residues. It is read into memory.
        header: a regular expression for FASTA headers, such as ``r"label=(?P<label>\w+)"``. It may match anywhere in a
            header; its named groups become columns.
        clusters: a file of MMseqs2 or CD-HIT with the cluster of each accession; each cluster is in one split. None
            runs MMseqs2, if it is installed and nothing else says how to split (`esm_efficient.data.clustering`); False
            splits at random then.
        test_partitions: partitions of the test set; None for the highest, which is 4 of DeepLoc-2.0's.
        validation_partitions: partitions of the validation set; empty for none; None for the highest that does not
            test, if at least one more is left to train on.
        test_size: fraction of the rows in the test set, when the split is by cluster or at random; None for 0.2.
        validation_size: fraction of the rows in the validation set, likewise; 0 for none; None for 0.1.
        min_residues: the fewest residues of a sequence to keep; None for no bound.
        max_residues: the most residues of a sequence to keep; None for no bound.
        on_error: ``"skip"`` leaves out rows that are wrong and FASTA records whose header does not match, and logs how
            many and the first of them; ``"raise"`` makes them an error.
        seed: of the splits and of the order of the rows.
        shuffle: shuffle the rows of each split; otherwise they are in the order of the files.

    Returns:
        Splits with the columns ``sequence``, ``accession``, ``residues`` (the length of the sequence) and, where the
        files have them, ``label``, ``partition`` and ``sample_weight``.

    Raises:
        DataError: a file, a row or a cell is wrong, with its place; a column is missing or could be one of several; a
            sequence is in two splits.
        ConfigurationError: the options contradict each other.

    Example:
        >>> data = load_sequences("proteins.tsv", label="binds", clusters="cluster.tsv")  # doctest: +SKIP
    """
    sizes = sizes_of(test_size, validation_size)
    files = dict(path) if isinstance(path, Mapping) else {"": path}
    if unknown := sorted(set(files) - {"", *SPLITS}):
        raise ConfigurationError(f"files for {listing(unknown)}: expected train, validation and test")
    if on_error not in get_args(OnError):
        raise ConfigurationError(f'on_error={on_error!r}: expected "raise" or "skip"')
    flags: dict[str, Column] = dict.fromkeys(FLAGS, False if split is False else None)
    plan = TablePlan(
        columns={
            "sequence": sequence,
            "label": label if isinstance(label, str) or label is False else None,
            "accession": accession,
            "partition": partition,
            "split": split,
            WEIGHT_COLUMN: sample_weight,
            **flags,
            **({} if validation is None else {"validation": validation}),
        },
        label_columns=_label_columns(label, label_kind),
        label_kind=label_kind,
        unlabelled=unlabelled,
        bounds=(min_residues or 0, math.inf if max_residues is None else max_residues),
        header=header,
        second_table=labels,
        on_error=on_error,
    )

    from datasets import Dataset

    whole = Dataset.from_file(str(mapped_table(files, plan)))
    named = {"test_partitions": test_partitions, "validation_partitions": validation_partitions}
    chosen = [name for name, value in named.items() if value is not None]
    fractions = [name for name, v in (("test_size", test_size), ("validation_size", validation_size)) if v is not None]
    if "split" in whole.features and (
        unused := [*(n for n, v in (("clusters", clusters), ("partition", partition)) if v), *chosen, *fractions]
    ):
        raise ConfigurationError(
            f"the files tell their splits, so {unused[0]}= would not be used. Remove it, or pass split=False to ignore "
            "the splits of the files"
        )
    if chosen and (clusters or "partition" not in whole.features):
        raise ConfigurationError(f"{chosen[0]}= needs a column of partitions, and no clusters: name it with partition=")
    if fractions and not clusters and "partition" in whole.features:
        raise ConfigurationError(
            f"the split is by the column of partitions, so {fractions[0]}= would not be used. Remove it, or pass "
            "partition=False to split at random"
        )
    parts = split_rows(whole, clusters, (test_partitions, validation_partitions), sizes | {"seed": seed})
    return shuffled_splits(parts, seed if shuffle else None)


def _label_columns(label: Column | Sequence[str] | Mapping[str, str], kind: LabelKind | None) -> dict[str, str]:
    """Label name to column, where there are several; empty for a single label column or none."""
    if kind not in (None, *LABEL_KINDS):
        raise ConfigurationError(f"label_kind={kind!r}: expected one of {', '.join(LABEL_KINDS)}")
    if label is None or label is False or isinstance(label, str):
        return {}
    columns = dict(label) if isinstance(label, Mapping) else {name: name for name in label}
    if not columns or kind is not None:
        advice = f". {ONE_NUMBER}" if kind == "number" else ""
        raise ConfigurationError(f"label={label!r}: expected columns of 0 and 1, without a label_kind{advice}")
    refuse_bars(list(columns))
    return columns


def shuffled_splits(parts: Mapping[str, Dataset], seed: int | None) -> DatasetDict:
    """Return splits with their rows shuffled, and log their sizes.

    Args:
        parts: the splits.
        seed: of the shuffling; None to leave the rows as they are.

    Raises:
        DataError: a sequence is in two splits.
    """
    from datasets import DatasetDict

    check_leaks(dict(parts))
    logger.info("%s", ", ".join(f"{name} {len(part):,}" for name, part in parts.items()))
    return DatasetDict({name: part if seed is None else part.shuffle(seed=seed) for name, part in parts.items()})


def split_rows(
    whole: Dataset,
    clusters: str | Path | Literal[False] | None,
    partitions: tuple[Sequence[int] | None, Sequence[int] | None],
    sizes: Mapping[str, Any],
) -> dict[str, Dataset]:
    """Return the splits that rows name; else by cluster, by partition or at random, whichever is possible first.

    Args:
        whole: rows with ``sequence``, with ``accession`` for a file of clusters, and ``split`` or ``partition`` if they
            tell the splits.
        clusters: as `load_sequences`.
        partitions: the partitions to test and to validate on, as `load_sequences`.
        sizes: `test_size`, `validation_size` and `seed` of `load_sequences`.

    Raises:
        ConfigurationError: the rows cannot be split so.
        DataError: the clusters do not have all rows.
    """
    if "split" in whole.features:
        row_splits = np.asarray(whole["split"][:])
        rows = {name: np.flatnonzero(row_splits == name) for name in SPLITS}
        return {name: whole.select(found).remove_columns("split") for name, found in rows.items() if len(found)}
    if clusters:
        own = cluster_groups(whole["accession"][:], read_clusters(clusters), clusters)
        return split_by_group(whole, own, **sizes)
    if "partition" in whole.features:
        return split_by_partition(whole, *partitions)
    if clusters is None and not are_variants(whole) and (found := cluster_rows(whole)) is not None:
        try:
            parts = split_by_group(whole, found, **sizes)
        except ConfigurationError as error:
            logger.warning("clusters of MMseqs2 cannot divide the sequences, so the split is random: %s", error)
        else:
            logger.warning(
                "no column says how to split, so the split is by %s clusters of MMseqs2 (%s); clusters=False splits at "
                "random",
                *(f"{len(np.unique(found)):,}", " ".join(OPTIONS)),
            )
            return parts
    return split_at_random(whole, **sizes, stacklevel=4)
