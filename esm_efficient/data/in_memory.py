"""Tables in memory, read as files are, so that every check is the same whatever holds the sequences."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_efficient.data.download import cache_folder, made_folder, unfinished
from esm_efficient.data.schema import USUAL_NAMES
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset

_GIVEN = "given"


@contextlib.contextmanager
def table_file(data: Any, split: str = "") -> Iterator[str | Path]:
    """Give the path of a file with these data, which is read so that every check is the same whatever the data are.

    Messages about a file that is written here say what was given, such as "the DataFrame" or "the train lists".

    Args:
        data: a path, which is returned; a DataFrame, a Dataset, or a pair of lists.
        split: the name of the split, if the data are one of several.

    Raises:
        ConfigurationError: the data are of another type.
        DataError: the lists differ in their lengths, or two columns have the same name.

    Example:
        >>> with table_file("proteins.csv") as path:
        ...     print(path)
        proteins.csv
    """
    import pandas as pd
    from datasets import Dataset

    if isinstance(data, str | Path):
        yield data
        return
    if isinstance(data, pd.DataFrame):
        frame, kind = data.reset_index() if _is_column(data.index.name, data) else data, "DataFrame"
    elif isinstance(data, Dataset):
        frame, kind = _cells_of(data), "Dataset"
    elif isinstance(data, tuple) and len(data) == 2:
        sequences, labels = (c.tolist() if hasattr(c, "tolist") else list(c) for c in data)  # of numpy, pandas, torch
        if len(sequences) != len(labels):
            raise DataError(f"{len(sequences)} sequences and {len(labels)} labels: expected the same number of both")
        frame, kind = pd.DataFrame({"sequence": sequences, "label": labels}), "lists"
    else:
        named = f"the split {split!r}" if split else "data"
        raise ConfigurationError(
            f"got {named} of the type {type(data).__name__}: expected a path, a DataFrame, a Dataset"
            f"{'' if split else ', a DatasetDict'}, or a pair of lists, (sequences, labels)"
        )
    with frame_file(frame, " ".join(["the", *([split] if split else []), kind])) as path:
        yield path


def _is_column(index: Any, frame: pd.DataFrame) -> bool:
    """Whether the named index of a DataFrame is a column that it does not have yet."""
    usual = USUAL_NAMES["accession"]
    has_accession = any(isinstance(name, str) and name.lower() in usual for name in frame.columns)
    return isinstance(index, str) and index not in frame.columns and not (index.lower() in usual and has_accession)


def _cells_of(data: Dataset) -> pd.DataFrame:
    """Return a Dataset as a DataFrame, with the names of classes in place of their numbers."""
    from datasets import ClassLabel

    data = data.with_format(None)
    frame: Any = data.to_pandas()
    for column, feature in data.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, ClassLabel):
            frame[column] = [None if code is None or code < 0 else feature.names[code] for code in data[column]]
        elif isinstance(inner, ClassLabel):
            frame[column] = [None if row is None else [inner.names[code] for code in row] for row in data[column]]
    return frame


@contextlib.contextmanager
def frame_file(frame: pd.DataFrame, name: str) -> Iterator[Path]:
    """Give the path of a Parquet file with a DataFrame; messages about the file say its name, such as "the list".

    Raises:
        DataError: two columns have the same name.
    """
    import pyarrow as pa
    from pyarrow import parquet

    names = [str(column) for column in frame]
    if repeated := sorted({column for column in names if names.count(column) > 1}):
        raise DataError(f"{name} has several columns of the name {listing(repeated)}. Rename them")
    columns = {column: _column_of(cells) for column, (_, cells) in zip(names, frame.items(), strict=True)}
    content = io.BytesIO()
    parquet.write_table(pa.table(columns), content)
    path = stored(content.getvalue(), name.removeprefix("the "))  # the file is known by its first bytes
    try:
        with _renamed():
            yield path
    except (ConfigurationError, DataError) as error:
        kind = DataError if isinstance(error, DataError) else ConfigurationError  # not a subclass with other arguments
        raise kind(as_given(str(error))) from error


def _column_of(cells: pd.Series) -> pa.Array:
    """Return the cells of a column as Parquet can have them; any others become text."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        column = pa.array(cells, from_pandas=True)
        values = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not isinstance(values, pa.BaseExtensionType):
            parquet.write_table(pa.table({"column": column[:0]}), io.BytesIO())
            return column
    except (pa.ArrowException, OverflowError):  # cells of several types, such as 10 and "10A", or of 128 bits
        pass
    return pa.array([_as_text(cell) for cell in cells], pa.string())


def as_given(text: str) -> str:
    """Return a text with the name of a table in memory, such as "the DataFrame", for the path of its file."""
    return re.sub(re.escape(f"{cache_folder() / _GIVEN}{os.sep}") + f"[0-9a-f]{{16}}{re.escape(os.sep)}", "the ", text)


@contextlib.contextmanager
def _renamed() -> Iterator[None]:
    """Say the name of a table in place of the path of its file in what is logged."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = as_given(record.getMessage()), ()
        return True

    # A filter of the package's logger would not see what the loggers of its modules write.
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "esm_efficient"]
    loggers = list(map(logging.getLogger, names))
    for each in loggers:
        each.addFilter(rename)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(rename)


def _as_text(cell: Any) -> str | None:
    """Return a cell as a CSV file would have it; None for an empty one."""
    is_empty = cell is None or (isinstance(cell, float) and math.isnan(cell))
    return None if is_empty else str(cell)


def stored(content: bytes, name: str) -> Path:
    """Return a file with this content in the cache folder, so that the tables that are made from it are found again."""
    path = made_folder(_GIVEN, hashlib.sha256(content).hexdigest()[:16]) / name
    if not path.is_file():
        partial = unfinished(path)
        partial.write_bytes(content)
        os.replace(partial, path)
    return path
