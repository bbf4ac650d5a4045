"""A second table of labels, in memory, to be joined by accession."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esm_efficient.data.fasta import accession_of
from esm_efficient.data.readers import kind_of, read_rows
from esm_efficient.data.schema import Column, find_column, refuse_cells, texts_of
from esm_efficient.errors import DataError


class SecondTable:
    """A table of labels and other columns, or a FASTA file whose records have labels of residues.

    Attributes:
        names: the columns, without the accession.
        names_accession: whether the column that the user named as that of the accessions is here.
        rows: accession to the cells of these columns.
        unused: accessions that have not been joined.
    """

    def __init__(self, path: str | Path, accession: Column) -> None:
        columns, places = read_rows(path)
        if kind_of(path) == "fasta":
            columns = {"label": columns["sequence"]} | columns
            del columns["header"], columns["sequence"]
            accession = None
        self.names_accession = accession in columns
        # The user may have named the column of the first table.
        key = find_column("accession", columns, accession if self.names_accession else None, path)
        self.names = [name for name in columns if name != key]
        if key is None or not self.names:
            raise DataError(
                f"{path} has the columns {', '.join(columns)}: expected one of accessions and one of labels. "
                "Name them with accession= and label="
            )
        self.rows: dict[str, tuple[Any, ...]] = {}
        cells = zip(*(columns[name] for name in self.names), strict=True)
        for place, name, row in zip(places, texts_of(columns[key]), cells, strict=True):
            if self.rows.setdefault(accession_of(name), row) is not row:
                raise DataError(f"{path}, {place}: {name} is in the table more than once")
        self.unused = set(self.rows)

    def columns_for(self, accessions: Sequence[str], places: Sequence[str]) -> dict[str, list[Any]]:
        """Return the columns for some sequences; a sequence without a row is a CellError."""
        keys = [accession_of(accession) for accession in accessions]
        refuse_cells(accessions, places, [key not in self.rows for key in keys], "the second table has no label")
        self.unused -= set(keys)
        return {name: [self.rows[key][index] for key in keys] for index, name in enumerate(self.names)}
