"""Write the rows of files to one Arrow table, which is cached and memory-mapped.

The rows are written twice: first with the labels as text, then with the labels encoded. The kind of label is known only
after all labels of a column were read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm_efficient import __version__
from esm_efficient.data.download import cache_folder
from esm_efficient.data.label_kinds import LabelKind, LabelObservations, decide_encoding
from esm_efficient.data.readers import Block, accession_of, read_blocks, read_rows
from esm_efficient.data.schema import (
    OPTIONAL_COLUMNS,
    USUAL_NAMES,
    binary_labels,
    find_column,
    sequences_of,
    texts_of,
)
from esm_efficient.errors import DataError, listing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TablePlan:
    """How files are read. Its text is part of the name of the cached table.

    Attributes:
        columns: role to the column that the user named; None to find the column by its usual names.
        label_columns: label name to column, for several labels per sequence.
        label_kind: what a single label column holds, if the user says so.
        bounds: the fewest and the most residues of a sequence.
        header: a regular expression for FASTA headers.
        second_table: a file of labels to join by accession.
    """

    columns: Mapping[str, str | None]
    label_columns: Mapping[str, str]
    label_kind: LabelKind | None
    bounds: tuple[float, float]
    header: str | None
    second_table: str | Path | None


def mapped_table(files: Mapping[str, str | Path], plan: TablePlan) -> Path:
    """Return the Arrow file of all rows; write it unless it is in the cache folder.

    Args:
        files: split to file; the split is empty if the rows name theirs or have none.
        plan: how the files are read.

    Raises:
        DataError: a file, a row or a cell is wrong, or no row is left.
        ConfigurationError: `plan.header` does not fit the files.
    """
    folder = cache_folder() / "tables"
    name = _cache_name(files, plan)
    table = folder / f"{name}.arrow"
    if table.is_file():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    raw, encoded = (folder / f"{name}.{os.getpid()}.{step}" for step in ("raw", "encoded"))
    try:
        observed = _write_rows(raw, files, plan)
        _write_encoded(raw, encoded, plan, observed)
        os.replace(encoded, table)
    finally:
        for leftover in (raw, encoded):
            leftover.unlink(missing_ok=True)
    return table


def _cache_name(files: Mapping[str, str | Path], plan: TablePlan) -> str:
    """A name that differs for other files, for changed files and for other options."""
    identities = []
    for split, path in [*files.items(), *([] if plan.second_table is None else [("labels", plan.second_table)])]:
        place = Path(path).resolve()
        if not place.is_file():
            raise DataError(f"no file at {path}")
        identities.append((split, str(place), place.stat().st_size, place.stat().st_mtime_ns))
    return hashlib.sha256(repr((__version__, identities, plan)).encode()).hexdigest()[:16]


def _write_rows(raw: Path, files: Mapping[str, str | Path], plan: TablePlan) -> LabelObservations:
    """Write all rows to an Arrow file, with labels of a single column still as text, and return what they look like."""
    import pyarrow as pa

    second = None if plan.second_table is None else _SecondTable(plan.second_table, plan.columns["accession"])
    counts, observed, schema = _RowCounts(), LabelObservations(), None
    with contextlib.ExitStack() as stack:
        for split, path in files.items():
            for block in read_blocks(path, header=plan.header):
                columns = _parsed_columns(block, path, split, plan, second, observed)
                residues = columns["residues"]
                keep = (residues >= plan.bounds[0]) & (residues <= plan.bounds[1])
                counts.add(columns, keep)
                rows = pa.table(columns).filter(pa.array(keep))
                if schema is None:
                    schema = rows.schema
                    writer = stack.enter_context(pa.ipc.new_stream(raw, schema))
                elif rows.schema != schema:
                    raise DataError(f"{path} has other columns, or other kinds of cells, than the rows before it")
                writer.write_table(rows)
    counts.check(files)
    if second is not None and second.unused:
        unused = sorted(second.unused)
        logger.warning("%d row(s) of the second table have no sequence: %s", len(unused), listing(unused))
    return observed


def _parsed_columns(
    block: Block,
    path: str | Path,
    split: str,
    plan: TablePlan,
    second: _SecondTable | None,
    observed: LabelObservations,
) -> dict[str, Any]:
    """The columns of a block as they are first written, with labels of a single column still as text."""
    columns, places = dict(block.columns), [f"{path}, {place}" for place in block.places]
    given = dict(plan.columns)
    if second is not None and given["accession"] not in columns:
        given["accession"] = None  # the user named the column of the second table
    given["accession"] = find_column("accession", columns, given["accession"], path)
    accessions = places if given["accession"] is None else texts_of(columns[given["accession"]])
    if second is not None:
        joined = second.columns_for(accessions, places)
        if both := [name for name in joined if name in columns]:
            raise DataError(f"{path} and the second table both have a column {listing(both)}. Remove one of them")
        columns |= joined
    found = {role: find_column(role, columns, name, path) for role, name in given.items()}
    if found["sequence"] is None:
        raise DataError(
            f"{path} has no column with a usual name of sequences ({', '.join(USUAL_NAMES['sequence'])}); it has "
            f"{', '.join(columns)}. Name the column with sequence="
        )
    sequences = sequences_of(columns[found["sequence"]], places)
    residues = np.fromiter(map(len, sequences), dtype=np.int32, count=len(sequences))
    parsed: dict[str, Any] = {"sequence": sequences, "accession": accessions, "residues": residues}
    if plan.label_columns:
        parsed["label"] = binary_labels(columns, plan.label_columns, path, places)
    elif (label := found["label"]) is not None:
        parsed["label"] = observed.observe(columns[label], residues, places)
    if split:
        parsed["split"] = [split] * len(places)
    for role, (parse, _) in OPTIONAL_COLUMNS.items():
        if (column := found[role]) is not None and role not in parsed:
            parsed[role] = parse(columns[column], column, places)
    return parsed


def _write_encoded(raw: Path, encoded: Path, plan: TablePlan, observed: LabelObservations) -> None:
    """Write the rows again, with the labels encoded."""
    import pyarrow as pa
    from datasets import Features, Value

    with pa.OSFile(str(raw)) as source, pa.ipc.open_stream(source) as reader:
        names = reader.schema.names
        features = {"sequence": Value("string"), "accession": Value("string"), "residues": Value("int32")}
        encoding = None
        if plan.label_columns:
            features["label"] = {name: Value("float32") for name in plan.label_columns}
        elif "label" in names:
            encoding = decide_encoding(observed, plan.label_kind)
            features["label"] = encoding.feature()
        features |= {role: Value(dtype) for role, (_, dtype) in OPTIONAL_COLUMNS.items() if role in names}
        schema = Features(features).arrow_schema
        with pa.ipc.new_stream(encoded, schema) as writer:
            for batch in reader:
                columns = {name: batch.column(name) for name in features}
                if encoding is not None:
                    columns["label"] = encoding.encode(columns["label"])
                arrays = [columns[name].cast(schema.field(name).type) for name in features]
                writer.write_batch(pa.record_batch(arrays, schema=schema))


class _SecondTable:
    """A table of labels and other columns, in memory, to be joined by accession.

    Attributes:
        names: the columns, without the accession.
        rows: accession to the cells of these columns.
        unused: accessions that have not been joined.
    """

    def __init__(self, path: str | Path, accession: str | None) -> None:
        block = read_rows(path)
        key = find_column("accession", block.columns, accession, path)
        self.names = [name for name in block.columns if name != key]
        if key is None or not self.names:
            raise DataError(
                f"{path} has the columns {', '.join(block.columns)}: expected one of accessions and one of labels. "
                "Name them with accession= and label="
            )
        self.rows: dict[str, tuple[Any, ...]] = {}
        cells = zip(*(block.columns[name] for name in self.names), strict=True)
        for place, name, row in zip(block.places, texts_of(block.columns[key]), cells, strict=True):
            if self.rows.setdefault(accession_of(name), row) is not row:
                raise DataError(f"{path}, {place}: {name} is in the table more than once")
        self.unused = set(self.rows)

    def columns_for(self, accessions: Sequence[str], places: Sequence[str]) -> dict[str, list[Any]]:
        """Return the columns for some sequences; a sequence without a row is a DataError."""
        keys = [accession_of(accession) for accession in accessions]
        if absent := [place for place, key in zip(places, keys, strict=True) if key not in self.rows]:
            raise DataError(f"{len(absent)} sequence(s) have no label in the second table: {listing(absent)}")
        self.unused -= set(keys)
        return {name: [self.rows[key][index] for key in keys] for index, name in enumerate(self.names)}


class _RowCounts:
    """How many rows were read.

    Attributes:
        kept: rows within the bounds of length.
        left_out: rows outside the bounds.
        nucleotides: kept rows with no other letters than A, C, G, T, U and N.
        by_split: split to kept rows; 0 for a split without kept rows.
    """

    def __init__(self) -> None:
        self.kept = self.left_out = self.nucleotides = 0
        self.by_split: Counter[str] = Counter()

    def add(self, columns: Mapping[str, Any], keep: np.ndarray) -> None:
        """Count the rows of a block; `keep`, bool of shape (rows,), marks the kept ones."""
        self.kept += int(keep.sum())
        self.left_out += int((~keep).sum())
        sequences = zip(columns["sequence"], keep, strict=True)
        self.nucleotides += sum(not sequence.strip("ACGTUN") for sequence, kept in sequences if kept)
        for split, kept in zip(columns.get("split", ()), keep, strict=False):
            self.by_split[split] += int(kept)

    def check(self, files: Mapping[str, str | Path]) -> None:
        """Refuse an empty table or split, and log rows that were left out or look like nucleotides."""
        if not self.kept:
            raise DataError(f"{listing([str(path) for path in files.values()])}: no sequence is left")
        if empty := sorted(split for split, kept in self.by_split.items() if not kept):
            raise DataError(f"no sequence of {', '.join(empty)} is within the bounds of length")
        if self.left_out:
            logger.info("%d sequence(s) outside the bounds of length were left out", self.left_out)
        if 2 * self.nucleotides > self.kept:
            message = "%d of %d sequences contain only A, C, G, T, U and N. Are they nucleotides?"
            logger.warning(message, self.nucleotides, self.kept)
