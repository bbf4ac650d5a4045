"""The user's own CSV, TSV, Parquet and FASTA files, to the same features as DeepLoc's table.

Files are read a block at a time and written to a memory-mapped Arrow file, so that neither has to fit into memory. What
a label is, a class, a class a residue or a number, is told from its cells; where they could be two things it is an
error that says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient import __version__
from esm_efficient.data.download import cache_folder
from esm_efficient.data.leaks import check_leaks
from esm_efficient.data.readers import Block, accession_of, read_blocks
from esm_efficient.data.schema import (
    NAMES,
    WEIGHT_COLUMN,
    LabelKind,
    LabelScan,
    column_of,
    compile_pattern,
    find_column,
    match_headers,
    sequences_of,
    split_names,
    texts_of,
    weights_of,
    whole_numbers,
    zeros_and_ones,
)
from esm_efficient.data.splits import (
    SPLITS,
    check_sizes,
    cluster_groups,
    read_clusters,
    sequence_groups,
    split_by_group,
    split_by_partition,
    warn_of_relatives,
)
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)


def load_sequences(
    path: str | Path | Mapping[str, str | Path],
    *,
    sequence: str | None = None,
    label: str | Sequence[str] | Mapping[str, str] | None = None,
    label_kind: LabelKind | None = None,
    accession: str | None = None,
    partition: str | None = None,
    split: str | None = None,
    sample_weight: str | None = None,
    labels: str | Path | None = None,
    header: str | None = None,
    clusters: str | Path | None = None,
    test_partitions: Sequence[int] = (4,),
    validation_partitions: Sequence[int] = (3,),
    test_size: float = 0.2,
    validation_size: float = 0.1,
    min_residues: int | None = None,
    max_residues: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    r"""Load sequences of one's own as a labelled, split `DatasetDict`.

    The splits are those of the files or of the column `split`, if there are any; else homology partitions; else
    clusters; else random, with a warning. The rows of each are shuffled.

    Args:
        path: a CSV, TSV, Parquet or FASTA file, plain, gzip or xz; or one for each of ``train``, ``validation`` and
            ``test``.
        sequence: the column of the sequences. A column that is not named is found by a usual name
            (`esm_efficient.data.columns.NAMES`).
        label: the column of the labels; or several columns of 0, 1 and empty cells (unknown), by their names or as new
            names to columns. Without one the sequences have no label.
        label_kind: what the cells of a single label column are, where it cannot be told: ``"class"``, ``"residues"``
            (one letter or list item a residue) or ``"number"``.
        accession: the column of the names; without one a row goes by its place in the file.
        partition: the column of homology partitions, whole numbers.
        split: the column that says ``train``, ``validation`` or ``test``.
        sample_weight: the column of how much each sequence counts.
        labels: a second table, with accessions and whatever else belongs to a sequence, such as its label, for a FASTA
            file. It is held in memory.
        header: a regular expression whose named groups are columns, such as ``r"label=(?P<label>\w+)"``, matched
            anywhere in the header of each FASTA record.
        clusters: MMseqs2's or CD-HIT's clusters of the accessions; no cluster is cut in two.
        test_partitions: partitions of the test set.
        validation_partitions: partitions of the validation set; empty for none.
        test_size: fraction of the rows in the test set, with clusters or at random.
        validation_size: likewise for the validation set; 0 for none.
        min_residues: the fewest residues to keep a sequence.
        max_residues: the most residues to keep a sequence.
        seed: of the splits and of the order of the rows.

    Returns:
        Splits with ``sequence``, ``accession``, ``residues`` (their number) and, where there are any,
        ``label``, ``partition`` and ``sample_weight``.

    Raises:
        DataError: a file, a row or a cell is not what it should be, with its place; a column is not there, or could be
            one of several; a sequence stands in two splits.
        ConfigurationError: the options contradict each other.

    Example:
        >>> data = load_sequences("proteins.tsv", label="binds", clusters="cluster.tsv")  # doctest: +SKIP
    """
    given = {
        "sequence": sequence, "accession": accession, "partition": partition, "split": split,
        WEIGHT_COLUMN: sample_weight,
    }  # fmt: skip
    check_sizes(test_size, validation_size)
    files = dict(path) if isinstance(path, Mapping) else {"": path}
    from datasets import Dataset, DatasetDict

    if strange := sorted(set(files) - {"", *SPLITS}):
        raise ConfigurationError(f"files for {listing(strange)}: expected train, validation and test")
    bounds = (min_residues or 0, math.inf if max_residues is None else max_residues)
    reader = _Reader(label, label_kind, given, bounds, header, labels)
    name = _name_of(files, labels, (label, label_kind, given, bounds, header))
    table = reader.load(files, name)
    whole = Dataset.from_file(str(table))
    groups = None
    if clusters is not None:
        groups = cluster_groups(whole["accession"][:], read_clusters(clusters), clusters)
    parts = _split(whole, groups, test_partitions, validation_partitions, test_size, validation_size, seed)
    check_leaks(parts)

    parts = {name: part.shuffle(seed=seed) for name, part in parts.items()}
    parts = {name: part.remove_columns("split") if "split" in part.features else part for name, part in parts.items()}
    logger.info("%s", ", ".join(f"{name} {len(part):,}" for name, part in parts.items()))
    return DatasetDict(parts)


def _split(
    whole: Dataset,
    groups: np.ndarray | None,
    test_partitions: Sequence[int],
    validation_partitions: Sequence[int],
    test_size: float,
    validation_size: float,
    seed: int,
) -> dict[str, Dataset]:
    """The splits that the data have, or else make them."""
    if "split" in whole.features:
        where = np.asarray(whole["split"][:])
        found = {name: np.flatnonzero(where == name) for name in SPLITS}
        return {name: whole.select(rows) for name, rows in found.items() if len(rows)}
    if groups is not None:
        return split_by_group(whole, groups, test_size=test_size, validation_size=validation_size, seed=seed)
    if "partition" in whole.features:
        return split_by_partition(whole, test_partitions, validation_partitions)
    warn_of_relatives(stacklevel=4)
    same = sequence_groups(whole)
    return split_by_group(whole, same, test_size=test_size, validation_size=validation_size, seed=seed)


def _name_of(files: Mapping[str, str | Path], labels: str | Path | None, options: Any) -> str:
    """A name for what is read: other files, files that have changed, and other options have other names."""
    identity = []
    for split, path in [*files.items(), *([] if labels is None else [("labels", labels)])]:
        place = Path(path).resolve()
        if not place.is_file():
            raise DataError(f"no file at {path}")
        identity.append((split, str(place), place.stat().st_size, place.stat().st_mtime_ns))
    return hashlib.sha256(repr((__version__, identity, options)).encode()).hexdigest()[:16]


class _Reader:
    """Reads files into one data set.

    Args:
        label: column or columns, as `load_sequences`.
        kind: what a label is.
        given: names of other columns that the user gave.
        bounds: fewest and most residues.
        header: pattern for FASTA headers.
        labels: a second table of labels.
    """

    def __init__(
        self,
        label: str | Sequence[str] | Mapping[str, str] | None,
        kind: LabelKind | None,
        given: Mapping[str, str | None],
        bounds: tuple[float, float],
        header: str | None,
        labels: str | Path | None,
    ) -> None:
        self.several: dict[str, str] = {}
        if label is not None and not isinstance(label, str):
            self.several = dict(label) if isinstance(label, Mapping) else {name: name for name in label}
            if not self.several or kind is not None:
                raise ConfigurationError(f"label={label!r}: expected columns of 0 and 1, without a label_kind")
        self.label = label if isinstance(label, str) else None
        self.given, self.bounds = given, bounds
        self.header = compile_pattern(header)
        self.scan = LabelScan(kind)
        self.known = None if labels is None else self._read_labels(labels)
        self.splits: set[str] = set()
        self.kept_splits: set[str] = set()
        self.dropped = self.nucleotides = self.rows = 0

    def load(self, files: Mapping[str, str | Path], name: str) -> Path:
        """All rows of all files, in an Arrow file of that name; with a column ``split`` if files have one."""
        import pyarrow as pa

        folder = cache_folder() / "tables"
        if (folder / f"{name}.arrow").is_file():
            return folder / f"{name}.arrow"
        folder.mkdir(parents=True, exist_ok=True)
        raw, done = (folder / f"{name}.{os.getpid()}.{kind}" for kind in ("raw", "done"))
        try:
            schema = None
            with contextlib.ExitStack() as stack:
                for split, path in files.items():
                    for block in read_blocks(path):
                        table = pa.table(self._columns(block, path, split))
                        if schema is None:
                            schema = table.schema
                            writer = stack.enter_context(pa.ipc.new_stream(raw, schema))
                        elif table.schema != schema:
                            raise DataError(
                                f"{path} has other columns, or other cells in them, than the files before it"
                            )
                        writer.write_table(table)
            if not self.rows:
                raise DataError(f"{listing([str(path) for path in files.values()])}: no sequence is left")
            self._finish(raw, done)
            if lost := self.splits - self.kept_splits:
                raise DataError(f"no sequence of {', '.join(sorted(lost))} is within the bounds of length")
            os.replace(done, folder / f"{name}.arrow")
        finally:
            for leftover in (raw, done):
                leftover.unlink(missing_ok=True)
        if self.known is not None and self.unused:
            unused = sorted(self.unused)
            logger.warning("%d row(s) of the second table have no sequence: %s", len(unused), listing(unused))
        if self.dropped:
            logger.info("%d sequence(s) outside of the bounds of length were left out", self.dropped)
        if 2 * self.nucleotides > self.rows:
            logger.warning(
                "%d of %d sequences hold A, C, G, T, U and N alone: nucleotides?", self.nucleotides, self.rows
            )
        return folder / f"{name}.arrow"

    def _columns(self, block: Block, path: str | Path, split: str) -> dict[str, Any]:
        """The rows of a block as they are written: all but the label in its final form."""
        import pyarrow as pa

        columns = dict(block.columns)
        places = [f"{path}, {place}" for place in block.places]
        if self.header is not None:
            columns |= match_headers(self.header, columns, path, places)
        if self.known is not None:
            # The name of the accession's column may be meant for the second table alone.
            key = self.given["accession"] if self.given["accession"] in columns else None
            key = find_column("accession", list(columns), key, path)
            accessions = places if key is None else texts_of(columns[key])
            columns |= self._join(accessions, places, columns, path)
        names = list(columns)
        given = self.given if self.known is None else {**self.given, "accession": key}
        found = {what: find_column(what, names, column, path) for what, column in given.items()}
        if found["sequence"] is None:
            raise DataError(
                f"{path}: no column is called like a sequence ({', '.join(NAMES['sequence'])}); it has "
                f"{', '.join(names)}. Name it with sequence="
            )
        sequences = sequences_of(columns[found["sequence"]], places)
        lengths = np.fromiter(map(len, sequences), dtype=np.int32, count=len(sequences))
        accessions = places if found["accession"] is None else texts_of(columns[found["accession"]])
        result: dict[str, Any] = {"sequence": sequences, "accession": accessions, "residues": lengths}
        label = None if self.several else find_column("label", names, self.label, path)
        if self.several:
            parts = [zeros_and_ones(column_of(columns, c, path), c, places) for c in self.several.values()]
            result["label"] = pa.StructArray.from_arrays(
                [pa.array(p, from_pandas=True) for p in parts], list(self.several)
            )
        elif label is not None:
            result["label"] = pa.array(self.scan.update(columns[label], lengths, places))
        if (column := found["partition"]) is not None:
            result["partition"] = whole_numbers(columns[column], column, places)
        if split:
            result["split"] = [split] * len(places)
        elif (column := found["split"]) is not None:
            result["split"] = split_names(columns[column], places)
        if (column := found[WEIGHT_COLUMN]) is not None:
            result[WEIGHT_COLUMN] = weights_of(columns[column], column, places)
        keep = (lengths >= self.bounds[0]) & (lengths <= self.bounds[1])
        self.dropped += int((~keep).sum())
        self.rows += int(keep.sum())
        self.nucleotides += sum(not sequence.strip("ACGTUN") for sequence in sequences)
        for number, name in enumerate(result.get("split", ())):
            self.splits.add(name)
            if keep[number]:
                self.kept_splits.add(name)
        if keep.all():
            return result
        mask = pa.array(keep)
        return {column: pa.array(values).filter(mask) for column, values in result.items()}

    def _finish(self, raw: Path, done: Path) -> None:
        """Write the file again with labels in the form that was found for them."""
        import pyarrow as pa
        from datasets import Features, Value

        with pa.OSFile(str(raw)) as source, pa.ipc.open_stream(source) as reader:
            names = reader.schema.names
            features: dict[str, Any] = {
                "sequence": Value("string"),
                "accession": Value("string"),
                "residues": Value("int32"),
            }
            if "label" in names:
                several = {name: Value("float32") for name in self.several}
                features["label"] = several or self.scan.feature()
            features |= {"partition": Value("int32")} if "partition" in names else {}
            features |= {"split": Value("string")} if "split" in names else {}
            features |= {WEIGHT_COLUMN: Value("float32")} if WEIGHT_COLUMN in names else {}
            schema = Features(features).arrow_schema
            with pa.ipc.new_stream(done, schema) as writer:
                for batch in reader:
                    columns = {name: batch.column(name) for name in features}
                    if "label" in names and not self.several:
                        columns["label"] = self.scan.encode(columns["label"])
                    arrays = [columns[name].cast(schema.field(name).type) for name in features]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))

    def _read_labels(self, path: str | Path) -> dict[str, dict[str, Any]]:
        """The other columns of a second table by accession."""
        result: dict[str, dict[str, Any]] = {}
        for block in read_blocks(path):
            names = list(block.columns)
            key = find_column("accession", names, self.given["accession"], path)
            if key is None or len(names) < 2:
                raise DataError(
                    f"{path} has the columns {', '.join(names)}: expected one for the accession and one for the label; "
                    "name them with accession= and label="
                )
            others = [name for name in names if name != key]
            cells = [block.columns[name] for name in others]
            for place, accession, *row in zip(block.places, texts_of(block.columns[key]), *cells, strict=True):
                name = accession_of(accession)
                if name in result:
                    raise DataError(f"{path}, {place}: {accession} stands more than once")
                result[name] = dict(zip(others, row, strict=True))
        self.unused = set(result)
        return result

    def _join(
        self, accessions: list[str], places: list[str], columns: Mapping[str, Any], path: str | Path
    ) -> dict[str, list[Any]]:
        """The columns of the second table for the sequences of a block."""
        known = self.known or {}
        wanted = [accession_of(accession) for accession in accessions]
        if absent := [place for place, name in zip(places, wanted, strict=True) if name not in known]:
            raise DataError(f"{len(absent)} sequence(s) have no label in the second table: {listing(absent)}")
        self.unused -= set(wanted)
        new = list(next(iter(known.values())))
        if both := [name for name in new if name in columns]:
            raise DataError(f"{path} and the table of labels both have a column {listing(both)}: leave one of them out")
        return {column: [known[name][column] for name in wanted] for column in new}
