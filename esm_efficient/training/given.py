"""Labelled splits of whatever holds sequences: a file, a DataFrame, a data set, or lists."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_efficient.data.deeploc import load_deeploc
from esm_efficient.data.download import cache_folder, unfinished
from esm_efficient.data.loading import load_sequences
from esm_efficient.data.readers import read_blocks
from esm_efficient.data.schema import no_column
from esm_efficient.data.splits import split_at_random
from esm_efficient.demo import write_demo_table
from esm_efficient.errors import ConfigurationError, DataError, listing, nearest
from esm_efficient.reporting.description import DataDescription, describe
from esm_efficient.tasks import MAX_TOKENS, Task, task_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset, DatasetDict, Features

logger = logging.getLogger(__name__)

NAMED_TABLES = ("demo", "deeploc")
"""``"demo"`` is the synthetic table of this package, and ``"deeploc"`` the DeepLoc-2.0 table, which is downloaded."""

_OF_SPLITS = (
    *("split", "validation", "partition", "clusters", "test_partitions", "validation_partitions"),
    *("test_size", "validation_size", "seed", "shuffle"),
)
"""The options of `load_sequences` that say how rows are split and ordered."""

COMMAND_OPTIONS = (
    *("sequence", "label", "label_kind", "labels", "unlabelled", "accession", "split", "partition", "clusters"),
    *("min_residues", "max_residues", "on_error", "seed"),
)
"""The options of `load_sequences` that the commands have too, under the same names."""


def splits_from(data: Any, *, labelled: bool = True, **options: Any) -> DatasetDict:
    """Return labelled splits of what a user has.

    Args:
        data: the path of a file, or one path per split; a pandas DataFrame; a Dataset with the columns of
            `load_sequences`; a pair of lists, sequences and labels; ``"demo"`` or ``"deeploc"``; or a `DatasetDict`,
            which is returned as it is. What has no splits is split as `load_sequences` does.
        labelled: whether a file, a DataFrame or lists without labels are an error; otherwise they are a warning.
        **options: of `load_sequences`; of `load_deeploc` for the named tables.

    Raises:
        DataError: as `load_sequences`; or there is no column of labels.
        ConfigurationError: the data are of another type, or there are options for splits that exist already.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"sequence": ["MKT", "MAL", "MKK", "MLL"] * 5, "label": ["a", "b"] * 10})
        >>> splits_from(frame)["train"].features["label"].names  # doctest: +SKIP
        ['a', 'b']
    """
    from datasets import Dataset, DatasetDict, IterableDataset

    are_splits = isinstance(data, Mapping) and len(data) > 0
    if are_splits and all(isinstance(split, Dataset | IterableDataset) for split in data.values()):
        if options:
            raise ConfigurationError(f"the data have splits already: remove {listing(list(options))}")
        return data if isinstance(data, dict) and type(data) is not dict else DatasetDict(data)
    if isinstance(data, str) and data in NAMED_TABLES:
        return _named_table(data, options)
    _check_names(options)
    if isinstance(data, Mapping) and not (data and all(isinstance(part, str | Path) for part in data.values())):
        kinds = listing([f"{name}: {type(part).__name__}" for name, part in data.items()]) or "nothing"
        raise ConfigurationError(f"got splits of {kinds}: expected the path of a file, or a Dataset, per split")
    if isinstance(data, str | Path | Mapping):
        splits = load_sequences(data, **options)
        if not any("label" in split.features for split in splits.values()):
            path = next(iter(data.values())) if isinstance(data, Mapping) else data
            problem = _no_labels(path)
            if labelled:
                raise DataError(problem)
            logger.warning(problem)
        return splits
    if isinstance(data, Dataset):
        return _split_dataset(data, labelled, options)
    return _load_frame(*_frame_of(data), labelled, options)


def one_split_from(data: Any, **options: Any) -> Dataset:
    """Return all labelled rows of what a user has as one split.

    Args:
        data: the path of a file, a pandas DataFrame, or a pair of lists, sequences and labels. Of ``"demo"`` or
            ``"deeploc"``, the test split is returned.
        **options: of `load_sequences`, without those of splits; of `load_deeploc` for the named tables.

    Returns:
        The rows in their order; those of the named tables are shuffled.

    Raises:
        DataError: as `splits_from`.
        ConfigurationError: the data are of another type, or there are options of splits.
    """
    if isinstance(data, str) and data in NAMED_TABLES:
        return splits_from(data, **options)["test"]
    if unused := [f"{name}=" for name in _OF_SPLITS if name in options]:
        raise ConfigurationError(f"all rows are one split, so {listing(unused)} would not be used: leave it out")
    if isinstance(data, str | Path):
        return splits_from({"test": data}, split=False, partition=False, shuffle=False, **options)["test"]
    with _as_file(*_frame_of(data)) as path:
        return one_split_from(path, **options)


def name_of(data: Any) -> str:
    """Return the name of what `splits_from` takes: that of a named table or of its files; empty for anything else.

    Example:
        >>> name_of("tables/proteins.csv"), name_of([["MKT"], [0]])
        ('proteins.csv', '')
    """
    if isinstance(data, str | Path):
        return Path(data).name
    paths = list(data.values()) if isinstance(data, Mapping) else []
    return ", ".join(Path(path).name for path in paths if isinstance(path, str | Path))


def command_words(
    data: Any, options: Mapping[str, Any], model: str, *, max_tokens: int = MAX_TOKENS
) -> tuple[str, ...]:
    """Return the words after ``esm-efficient probe`` that read the same data and model, from any folder.

    Args:
        data: what `splits_from` takes.
        options: its options.
        model: the Hub name or the folder of the model.
        max_tokens: the most tokens per sequence.

    Returns:
        The words; none if the command cannot name the data, one of the options or the model.

    Example:
        >>> command_words("demo", {"max_residues": 300, "label": None}, "facebook/esm2_t6_8M_UR50D")
        ('demo', '--max-residues', '300', '--model', 'facebook/esm2_t6_8M_UR50D')
    """
    if not isinstance(data, str | Path) or not model:
        return ()
    words = [_place(data)]
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        known = signature(load_sequences).parameters
        if value is None or (name in known and value == known[name].default):
            continue
        if name not in COMMAND_OPTIONS or not all(isinstance(entry, str | Path | int) for entry in values):
            return ()
        texts = [_place(e) if name in ("clusters", "labels") else "none" if e is False else str(e) for e in values]
        words += [word for text in texts for word in (f"--{name.replace('_', '-')}", text)]
    words += [] if max_tokens == MAX_TOKENS else ["--max-tokens", str(max_tokens)]
    return (*words, "--model", _place(model))


def _place(name: str | Path) -> str:
    """Return the whole path of a file or folder; any other name as it is."""
    return str(name) if str(name) in NAMED_TABLES or not Path(name).exists() else str(Path(name).absolute())


def _named_table(name: str, options: Mapping[str, Any]) -> DatasetDict:
    if unknown := sorted(set(options) - set(signature(load_deeploc).parameters)):
        raise ConfigurationError(
            f"{listing([f'{option}=' for option in unknown])}: the table {name!r} has its own columns and splits: "
            "expected none of these options"
        )
    if name == "deeploc":
        return load_deeploc(**options)
    with tempfile.TemporaryDirectory() as folder:
        content = write_demo_table(Path(folder) / "demo.csv").read_bytes()
    return load_deeploc(_stored(content, "demo.csv"), **options)


def _no_labels(path: str | Path) -> str:
    """Return what to say of a file without a column of labels."""
    advice = 'Name the column with data_options={"label": ...}'
    return no_column("label", next(read_blocks(path)).columns, path, advice)


def _check_names(options: Mapping[str, Any]) -> None:
    """Refuse options that `load_sequences` does not have, with a ConfigurationError."""
    known = signature(load_sequences).parameters.keys() - {"path"}
    for name in options:
        if name not in known:
            advice = nearest(name, known, "an option of load_sequences")
            raise ConfigurationError(f"data_options has the unknown option {name!r}{advice}")


def _split_dataset(data: Dataset, labelled: bool, options: Mapping[str, Any]) -> DatasetDict:
    """Split a Dataset whose labels have their feature already; any other is read as a table is."""
    from datasets import DatasetDict

    is_labelled = {"sequence", "label"} <= set(data.column_names) and not _is_text(data.features["label"])
    if not is_labelled:
        return _load_frame(data.to_pandas(), "the Dataset", labelled, options)
    sizes = {"test_size": 0.2, "validation_size": 0.1, "seed": 0}
    if unknown := sorted(set(options) - set(sizes)):
        raise ConfigurationError(
            f"{listing(unknown)}: the labels of this Dataset have a type already, so it is only split. It takes "
            f"{listing(list(sizes))}"
        )
    return DatasetDict(split_at_random(data, **(sizes | dict(options))))


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _frame_of(data: Any) -> tuple[pd.DataFrame, str]:
    """Return a DataFrame, and its name in messages."""
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        return data, "the DataFrame"
    if isinstance(data, tuple) and len(data) == 2:
        sequences, labels = (list(column) for column in data)
        if len(sequences) != len(labels):
            raise DataError(f"{len(sequences)} sequences and {len(labels)} labels: expected the same number of both")
        return pd.DataFrame({"sequence": sequences, "label": labels}), "the lists"
    raise ConfigurationError(
        f"got data of the type {type(data).__name__}: expected a path, a DataFrame, a Dataset, a DatasetDict, or a "
        "pair of lists, (sequences, labels)"
    )


def _load_frame(frame: pd.DataFrame, name: str, labelled: bool, options: Mapping[str, Any]) -> DatasetDict:
    """Read a DataFrame as a Parquet file is read, so that every check is the same."""
    with _as_file(frame, name) as path:
        return splits_from(path, labelled=labelled, **options)


@contextlib.contextmanager
def _as_file(frame: pd.DataFrame, name: str) -> Iterator[Path]:
    """Give the path of a Parquet file with a DataFrame; messages about the file say the name of the DataFrame."""
    import pyarrow as pa
    from pyarrow import parquet

    names = [str(column) for column in frame]
    if repeated := sorted({column for column in names if names.count(column) > 1}):
        raise DataError(f"{name} has several columns of the name {listing(repeated)}. Rename them")
    columns = {column: _column_of(cells) for column, (_, cells) in zip(names, frame.items(), strict=True)}
    content = io.BytesIO()
    parquet.write_table(pa.table(columns), content)
    path = _stored(content.getvalue(), f"{name.removeprefix('the ')}.parquet")
    try:
        with _called(path, name):
            yield path
    except DataError as error:
        raise DataError(str(error).replace(str(path), name)) from error


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


@contextlib.contextmanager
def _called(path: Path, name: str) -> Iterator[None]:
    """Say the name of a table in place of the path of the file that it was written to, in what is logged."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(str(path), name), ()
        return True

    loggers = [logger, logging.getLogger("esm_efficient.data.arrow_tables")]
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


def _stored(content: bytes, name: str) -> Path:
    """Return a file with this content in the cache folder, so that the tables that are made from it are found again."""
    path = cache_folder() / "given" / hashlib.sha256(content).hexdigest()[:16] / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = unfinished(path)
        partial.write_bytes(content)
        os.replace(partial, path)
    return path


def evaluated_split(dataset: DatasetDict) -> str:
    """Return the name of the split that the metrics are for."""
    name = next((name for name in ("test", "validation") if name in dataset), None)
    if "train" not in dataset or name is None:
        raise DataError(f"the dataset has the splits {', '.join(dataset)}: expected train, and test or validation")
    return name


def describe_if_known(splits: DatasetDict) -> DataDescription | None:
    """Return a description of splits; None if one has no sequences, or no rows to count."""
    known = all(hasattr(split, "__len__") and "sequence" in split.column_names for split in splits.values())
    return describe(splits) if known and all(map(len, splits.values())) else None


def task_of_splits(features: Features, label: Any = None) -> Task:
    """Return the task of raw or of tokenised splits.

    Args:
        features: the features of the splits.
        label: the label column of the user's table, if it was named: a number is called by it.
    """
    if "input_ids" not in features:
        task = task_of(features)
        is_number = task.kind == "regression" and len(task.names) == 1
        return replace(task, names=(label,)) if is_number and isinstance(label, str) else task
    labels = features.get("labels")
    if getattr(labels, "length", -1) > 0:
        raise ConfigurationError(
            f"the labels of the tokenised splits are lists of {labels.length} numbers: their names are lost, and they "
            "may be several labels or numbers to regress. Give task=task_of(features) of the splits before tokenising"
        )
    return task_of(features, "labels")
