"""Write the rows of files to one Arrow table, which is cached and memory-mapped.

The rows are written twice: first with the labels as text, then with the labels encoded. The kind of label is known only
after all labels of a column were read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from esm_efficient import __version__
from esm_efficient.data.download import made_folder, unfinished
from esm_efficient.data.label_cells import LabelObservations, labels_at_positions
from esm_efficient.data.label_kinds import LabelEncoding, LabelKind, decide_encoding
from esm_efficient.data.label_names import refuse_bars
from esm_efficient.data.left_out import LeftOut, Notes, RowCounts
from esm_efficient.data.own_splits import FLAGS, are_split_names, same_splits, split_names, splits_of
from esm_efficient.data.readers import Block, block_without, read_blocks
from esm_efficient.data.schema import (
    OPTIONAL_COLUMNS,
    USUAL_NAMES,
    CellError,
    Column,
    binary_labels,
    find_column,
    no_column,
    refuse_cells,
    refuse_column,
    refuse_roles,
    sequences_of,
    texts_of,
)
from esm_efficient.data.second_table import SecondTable
from esm_efficient.data.sequences import GAPS, clean, count_residues
from esm_efficient.errors import DataError, listing

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]

_FORMAT = 7
"""Of the cached tables; raise it when the same files and options give another table."""

_SKIP = 'Correct them, or leave such rows out with on_error="skip"'


@dataclass(frozen=True)
class TablePlan:
    """How files are read. Its text is part of the name of the cached table.

    Attributes:
        columns: role to the column that the user named; None to find the column by its usual names.
        label_columns: label name to column, for several labels per sequence.
        label_kind: what a single label column holds, if the user says so.
        unlabelled: the letter of a residue without a label; None to ask.
        bounds: the fewest and the most residues of a sequence.
        header: a regular expression for FASTA headers.
        second_table: a file of labels to join by accession.
        on_error: whether a wrong row is an error or is left out and counted.
    """

    columns: Mapping[str, Column]
    label_columns: Mapping[str, str]
    label_kind: LabelKind | None
    unlabelled: str | None
    bounds: tuple[float, float]
    header: str | None
    second_table: str | Path | None
    on_error: OnError


def mapped_table(files: Mapping[str, str | Path], plan: TablePlan) -> Path:
    """Return the Arrow file of all rows; write it unless it is in the cache folder.

    What the user should know about the rows is logged each time.

    Args:
        files: split to file; the split is empty if the rows name theirs or have none.
        plan: how the files are read.

    Raises:
        DataError: a file, a row or a cell is wrong, or no row is left.
        ConfigurationError: `plan.header` does not fit the files.
    """
    folder = made_folder("tables")
    name = _cache_name(files, plan)
    table, notes = folder / f"{name}.arrow", folder / f"{name}.json"
    if not (table.is_file() and notes.is_file()):
        raw, encoded, said = (unfinished(folder / f"{name}.{step}") for step in ("raw", "encoded", "notes"))
        try:
            found = _TableWriter(files, plan).write(raw, encoded, folder / f"{name}.left_out.csv")
            if _cache_name(files, plan) != name:
                raise DataError(f"{listing([str(path) for path in files.values()])} changed while it was read")
            said.write_bytes(found.to_json())
            os.replace(said, notes)  # whole or not at all: another process may read them at any moment
            os.replace(encoded, table)
        finally:
            for leftover in (raw, encoded, said):
                leftover.unlink(missing_ok=True)
    Notes.from_json(notes.read_bytes()).log(logger)
    return table


def _cache_name(files: Mapping[str, str | Path], plan: TablePlan) -> str:
    """A name that differs for other files, for changed files and for other options."""
    identities = []
    for split, path in [*files.items(), *([] if plan.second_table is None else [("labels", plan.second_table)])]:
        place = Path(path).resolve()
        if not place.is_file():
            remote = "://" in str(path)
            raise DataError(f"no file at {path}" + (": expected a path, so download the file first" if remote else ""))
        identities.append((split, str(place), place.stat().st_size, place.stat().st_mtime_ns))
    return hashlib.sha256(repr((__version__, _FORMAT, identities, plan)).encode()).hexdigest()[:16]


class _TableWriter:
    """Reads files and writes their rows to an Arrow file."""

    def __init__(self, files: Mapping[str, str | Path], plan: TablePlan) -> None:
        self.files, self.plan = files, plan
        self.observed, self.counts, self.notes = LabelObservations(), RowCounts(), Notes()
        self.label_names = dict(plan.label_columns)
        self.gapped: list[str] = []
        self.left_out = LeftOut() if plan.on_error == "skip" else None
        self.second = None if plan.second_table is None else SecondTable(plan.second_table, plan.columns["accession"])

    def write(self, raw: Path, encoded: Path, left_out_rows: Path) -> Notes:
        """Write the table to `encoded`, by way of `raw`, and return what the user should know about it.

        All rows that are left out, with what is wrong with them, are written to `left_out_rows`.
        """
        import pyarrow as pa

        schema = None
        with contextlib.ExitStack() as stack:
            for columns in self._parsed_blocks():
                keep = self._within_bounds(columns["residues"])
                self.counts.add(columns, keep)
                if not keep.any():
                    continue
                rows = pa.table(columns).filter(pa.array(keep))
                if schema is None:
                    schema = rows.schema
                    writer = stack.enter_context(pa.ipc.new_stream(raw, schema))
                elif rows.schema != schema:
                    raise DataError(
                        f"{columns['accession'][0]} and the rows after it have other columns, or other kinds of cells, "
                        "than the rows before them"
                    )
                writer.write_table(rows)
        left_out = [] if self.left_out is None else self.left_out.notes()
        self.counts.check(self.files, self.notes, left_out)
        if self.second is not None and self.second.unused:
            unused = sorted(self.second.unused)
            message = f"{len(unused)} row(s) of the second table have no sequence: {listing(unused)}"
            self.notes.add(logging.WARNING, message)
        if self.gapped:
            message = f"{len(self.gapped)} sequence(s) with sites have gaps: {listing(self.gapped)}"
            self.notes.add(logging.WARNING, f"{message}. The positions count residues, and no gaps")
        self._encode(raw, encoded)
        if self.left_out is not None and self.left_out.rows:  # with those of wrong labels
            self.left_out.save(left_out_rows)
            for note in self.left_out.notes(left_out_rows):
                self.notes.add(logging.WARNING, note)
        return self.notes

    def _parsed_blocks(self) -> Iterator[dict[str, Any]]:
        """The columns of each block, without the rows that are left out."""
        leave_out = None if self.left_out is None else self.left_out.add
        for split, path in self.files.items():
            roles = None
            for block in read_blocks(path, header=self.plan.header, leave_out=leave_out):
                while block.places:
                    try:
                        joined = self._joined(block, path)
                        if roles is None:
                            roles = self._roles(joined.columns, path, split)
                            refuse_column(joined.columns, roles["sequence"] or "", joined.places, path)
                            self._note_roles(roles, path)
                        columns = self._parsed_columns(joined, roles, path, split)
                    except CellError as error:
                        if leave_out is None:
                            advice = error.advice or _SKIP
                            raise CellError(error.problem, error.rows, error.shown, advice) from None
                        for shown in error.shown:
                            leave_out(shown, error.problem)
                        block = block_without(block, error.rows)
                    else:
                        yield columns
                        break

    def _note_roles(self, roles: Mapping[str, str | None], path: str | Path) -> None:
        """Take note of what each column was read as."""
        found = {role: column for role, column in roles.items() if column is not None}
        if self.plan.label_columns:
            found["label"] = listing(list(self.plan.label_columns.values()))
        self.notes.add(logging.INFO, f"{path}: " + ", ".join(f"{role} from {column}" for role, column in found.items()))

    def _joined(self, block: Block, path: str | Path) -> Block:
        """The block with the columns of the second table."""
        if self.second is None:
            return block
        given = self.plan.columns["accession"]
        # The user may have named the column of the second table.
        is_of_second = given not in block.columns and self.second.names_accession
        key = find_column("accession", block.columns, None if is_of_second else given, path)
        if key is None:
            raise DataError(
                f"{path} has the columns {listing(list(block.columns))}, and none has a usual name of accessions, by "
                f"which {self.plan.second_table} is joined. Name it with accession="
            )
        places = [f"{path}, {place}" for place in block.places]
        joined = self.second.columns_for(texts_of(block.columns[key]), places)
        usual = [name for name in joined if name in block.columns and name.lower() in USUAL_NAMES["sequence"]]
        for name in usual:  # the table may repeat the sequences
            pairs = zip(map(clean, texts_of(joined[name])), map(clean, texts_of(block.columns[name])), strict=True)
            if all(one == other for one, other in pairs):
                del joined[name]
        if both := [name for name in joined if name in block.columns]:
            raise DataError(f"{path} and the second table both have a column {listing(both)}. Remove one of them")
        return block._replace(columns=block.columns | joined)

    def _roles(self, columns: Mapping[str, list[Any]], path: str | Path, split: str) -> dict[str, str | None]:
        """The column of each role, from the first block of a file, which may be that of one split."""
        given = dict(self.plan.columns)
        if self.second is not None and given["accession"] not in columns:
            given["accession"] = None
        taken = {*given.values(), *self.plan.label_columns.values()}
        if self.plan.label_columns:
            given["label"] = False
        roles = {role: find_column(role, columns, name, path, taken) for role, name in given.items()}
        refuse_roles(roles, columns, path, taken)
        if roles["label"] is None and not self.plan.label_columns and given["label"] is not False:
            if self.second is not None:
                raise DataError(no_column("label", self.second.names, f"{self.plan.second_table}"))
            if self.plan.label_kind is not None or self.plan.unlabelled is not None:  # they say that there are labels
                raise DataError(no_column("label", columns, path))
        if given["split"] is None and not any(roles[role] for role in ("split", *FLAGS)):
            free = set(columns) - {column for role, column in roles.items() if role != "partition"} - taken
            words = [name for name in columns if name in free and are_split_names(self._cells_of(name, columns, path))]
            if len(words) > 1:
                raise DataError(f"{path}: the split could be any of {listing(words)}. Name one with split=")
            roles["split"] = words[0] if words else None
        if given["partition"] is None and (split or any(roles[role] for role in ("split", *FLAGS))):
            roles["partition"] = None  # it decides nothing, and may be something else, such as a fold of a protein
        return roles

    def _cells_of(self, name: str, first: Mapping[str, list[Any]], path: str | Path) -> Iterator[list[Any]]:
        """Yield the cells of a column: those of the first block, and then those of the file again, block by block."""
        yield first[name]
        leave_out = None if self.left_out is None else lambda *_: None
        for block in read_blocks(path, header=self.plan.header, leave_out=leave_out):
            if name in block.columns:
                yield block.columns[name]

    def _parsed_columns(
        self, block: Block, roles: Mapping[str, str | None], path: str | Path, split: str
    ) -> dict[str, Any]:
        """The columns of a block as they are first written, with labels of a single column still as text.

        Rows outside the bounds of length have no label.
        """
        import pyarrow as pa

        columns, places = block.columns, [f"{path}, {place}" for place in block.places]
        sequences = sequences_of(columns[roles["sequence"] or ""], places)
        residues = np.fromiter(map(count_residues, sequences), dtype=np.int32, count=len(sequences))
        named = roles["accession"]
        accessions = [f"{Path(path).name}, {p}" for p in block.places] if named is None else texts_of(columns[named])
        parsed: dict[str, Any] = {"sequence": sequences, "accession": accessions, "residues": residues}
        column = roles["split"]
        flags = {role: (name, columns[name]) for role in FLAGS if (name := roles[role]) is not None}
        words = [split] * len(places) if split else None
        if column is not None:
            named_words = split_names(columns[column], column, places)
            words = named_words if words is None else same_splits(words, named_words, column, places)
        if words is not None or flags:
            parsed["split"] = splits_of(words, flags, places)
        for role, (parse, _) in OPTIONAL_COLUMNS.items():
            if (column := roles[role]) is not None:
                parsed[role] = parse(columns[column], column, places)
        # The label comes last: after it no row may be left out, since it has been observed.
        if self.plan.label_columns:
            parsed["label"] = binary_labels(columns, self.plan.label_columns, path, places)
        elif (label := roles["label"]) is not None:
            cells = columns[label]
            if self.label_names or any(isinstance(cell, dict) for cell in cells):
                parsed["label"] = self._struct_labels(cells, path, places)
                return parsed
            if self.plan.label_kind == "positions":
                cells = labels_at_positions(cells, residues, places)
            # A label that only rows outside the bounds have is no class.
            keep = self._within_bounds(residues)
            kept = np.flatnonzero(keep).tolist()
            if kept:
                own, where = [cells[row] for row in kept], [places[row] for row in kept]
                try:
                    found = self.observed.observe(own, residues[keep], where)
                except CellError as error:  # its rows are counted among the kept ones
                    rows = [kept[row] for row in error.rows]
                    raise CellError(error.problem, rows, error.shown, error.advice) from None
                parsed["label"] = found.take(pa.array(np.cumsum(keep) - 1, mask=~keep))
            if self.plan.label_kind == "positions":
                texts = columns[roles["sequence"] or ""]
                self.gapped += [accessions[r] for r in kept if "1" in cells[r] and {*GAPS} & {*str(texts[r])}]
        return parsed

    def _struct_labels(self, cells: Sequence[Any], path: str | Path, places: Sequence[str]) -> Any:
        """Cells of one 0 or 1 per name, as a data set with several labels writes them, as `binary_labels` has them."""
        if self.plan.label_kind not in (None, "several") or self.observed.rows:
            kind = self.plan.label_kind or "text in other rows"
            raise DataError(f"{path}: the label has named values, such as {cells[0]!s:.60}, but is {kind}")
        if not self.label_names:
            self.label_names = {name: name for cell in cells if isinstance(cell, dict) for name in cell}
            refuse_bars(list(self.label_names))
        wrong = [not isinstance(cell, dict) or not self.label_names.keys() >= cell.keys() for cell in cells]
        problem = f"the names of the label are not {', '.join(self.label_names)}"
        refuse_cells(cells, places, wrong, problem)
        columns = {name: [cell.get(name) for cell in cells] for name in self.label_names}
        return binary_labels(columns, self.label_names, path, places)

    def _within_bounds(self, residues: np.ndarray) -> np.ndarray:
        """Which rows have an allowed length, bool of shape (rows,)."""
        return (residues >= self.plan.bounds[0]) & (residues <= self.plan.bounds[1])

    def _encode(self, raw: Path, encoded: Path) -> None:
        """Write the rows again, with the labels encoded."""
        import pyarrow as pa
        from datasets import Features, Value

        with pa.OSFile(str(raw)) as source, pa.ipc.open_stream(source) as reader:
            names = reader.schema.names
            features = {"sequence": Value("string"), "accession": Value("string"), "residues": Value("int32")}
            encoding = None
            if self.label_names:
                features["label"] = {name: Value("float32") for name in self.label_names}
            elif "label" in names:
                skip = self.left_out is not None
                encoding = decide_encoding(
                    self.observed, self.plan.label_kind, unlabelled=self.plan.unlabelled, skip=skip
                )
                features["label"] = encoding.feature()
                for note in encoding.notes:
                    self.notes.add(logging.WARNING, note)
            optional = {"split": "string"} | {role: dtype for role, (_, dtype) in OPTIONAL_COLUMNS.items()}
            features |= {role: Value(dtype) for role, dtype in optional.items() if role in names}
            schema = Features(features).arrow_schema
            kept = 0
            with pa.ipc.new_stream(encoded, schema) as writer:
                for batch in reader:
                    columns = {name: batch.column(name) for name in features}
                    if encoding is not None:
                        columns = self._with_encoded_labels(columns, encoding)
                    arrays = [columns[name].cast(schema.field(name).type) for name in features]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                    kept += len(arrays[0])
        if not kept:
            raise DataError(f"{listing([str(path) for path in self.files.values()])}: no sequence is left")

    def _with_encoded_labels(self, columns: dict[str, Any], encoding: LabelEncoding) -> dict[str, Any]:
        """The columns with the labels encoded, without the rows that are left out because of their label."""
        import pyarrow as pa

        residues = columns["residues"].to_numpy()
        if self.left_out is not None:
            fits = encoding.fits(columns["label"], residues)
            for row in np.flatnonzero(~fits).tolist():
                label = str(columns["label"][row].as_py())
                self.left_out.add(
                    f"{columns['accession'][row]}: {label!r:.40}", f"the label does not fit {encoding.kind!r}"
                )
            columns = {name: column.filter(pa.array(fits)) for name, column in columns.items()}
            residues = residues[fits]
        return columns | {"label": encoding.encode(columns["label"], residues)}
