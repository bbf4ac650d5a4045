"""Labelled splits of whatever holds sequences: a file, a DataFrame, a data set, or lists."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_efficient.data.deeploc import load_deeploc
from esm_efficient.data.in_memory import stored, table_file
from esm_efficient.data.loading import COMMAND_OPTIONS, load_sequences, split_rows
from esm_efficient.data.own_splits import FLAGS
from esm_efficient.data.readers import read_blocks
from esm_efficient.data.schema import USUAL_NAMES, no_column
from esm_efficient.demo import write_demo_table
from esm_efficient.errors import ConfigurationError, DataError, listing, nearest
from esm_efficient.reporting.description import DataDescription, describe
from esm_efficient.tasks import MAX_TOKENS, Task, task_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

logger = logging.getLogger(__name__)

NAMED_TABLES = ("demo", "deeploc")
"""``"demo"`` is the synthetic table of this package, and ``"deeploc"`` the DeepLoc-2.0 table, which is downloaded."""

_OF_SPLITS = (
    *("split", "validation", "partition", "clusters", "test_partitions", "validation_partitions"),
    *("test_size", "validation_size", "seed", "shuffle"),
)
"""The options of `load_sequences` that say how rows are split and ordered."""


def splits_from(data: Any, *, labelled: bool = True, **options: Any) -> DatasetDict:
    """Return labelled splits of what a user has.

    Args:
        data: the path of a file; a pandas DataFrame; a Dataset with the columns of `load_sequences`; a pair of lists,
            sequences and labels; or ``"demo"`` or ``"deeploc"``. They are split as `load_sequences` does. Or a mapping
            from the names of splits to paths, DataFrames, Datasets or pairs of lists. A `DatasetDict` whose labels have
            a feature that tells the task (`is_typed`) is returned as it is.
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
    are_datasets = are_splits and all(isinstance(split, Dataset | IterableDataset) for split in data.values())
    if are_datasets and is_typed(next(iter(data.values()))):
        if options:
            raise ConfigurationError(f"the data have splits already: remove {listing(list(options))}")
        return data if isinstance(data, dict) and type(data) is not dict else DatasetDict(data)
    if isinstance(data, str) and data in NAMED_TABLES:
        return _named_table(data, options)
    _check_names(options)
    if isinstance(data, Dataset) and is_typed(data) and not _tells_splits(data):
        return _split_dataset(data, options)
    if isinstance(data, Mapping) and not data:
        raise ConfigurationError("got no split: expected the path of a file, a DataFrame or a Dataset per split")
    with contextlib.ExitStack() as files:
        given = {name: files.enter_context(table_file(part, name)) for name, part in _parts_of(data).items()}
        splits = load_sequences(given if isinstance(data, Mapping) else given[""], **options)
        if not any("label" in split.features for split in splits.values()):
            problem = _no_labels(next(iter(given.values())))
            if labelled:
                raise DataError(problem)
            logger.warning(problem)
    return splits


def one_split_from(data: Any, **options: Any) -> Dataset:
    """Return all labelled rows of what a user has as one split.

    Args:
        data: the path of a file, a pandas DataFrame, a Dataset whose labels are read, or a pair of lists, sequences and
            labels. Of ``"demo"`` or ``"deeploc"``, the test split is returned.
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
    with table_file(data) as path:
        return splits_from({"test": path}, split=False, partition=False, shuffle=False, **options)["test"]


def is_typed(data: Any) -> bool:
    """Whether a Dataset needs no reading: it is a stream, has token ids, or labels whose feature tells the task.

    Example:
        >>> from datasets import Dataset
        >>> texts = Dataset.from_dict({"sequence": ["MKT", "MAL"], "label": ["yes", "no"]})
        >>> is_typed(texts), is_typed(texts.class_encode_column("label"))
        (False, True)
    """
    from datasets import IterableDataset

    if isinstance(data, IterableDataset) or "input_ids" in data.column_names:
        return True
    if not {"sequence", "label"} <= set(data.column_names):
        return False
    try:
        task_of(data.features)
    except DataError:
        return False
    return True


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
        if name not in COMMAND_OPTIONS or not all(isinstance(entry, str | Path | int | float) for entry in values):
            return ()
        texts = [_place(e) if name in ("clusters", "labels") else "none" if e is False else str(e) for e in values]
        option = f"--{name.replace('_', '-').replace('partitions', 'partition')}"
        words += [word for text in texts for word in (option, text)]
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
    return load_deeploc(stored(content, "demo.csv"), **options)


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


def _tells_splits(data: Dataset) -> bool:
    """Whether a Dataset has a column by which `load_sequences` splits its rows.

    Raises:
        ConfigurationError: it has, and several labels per sequence, which are not read from such a column.
    """
    usual = {name for role in ("split", "partition", *FLAGS) for name in USUAL_NAMES[role]}
    found = [name for name in data.column_names if name.lower() in usual]
    if found and "label" in data.features and isinstance(data.features["label"], Mapping):
        raise ConfigurationError(
            f"the Dataset has the column {found[0]!r}, and several labels per sequence: give a DatasetDict of its "
            "splits, or remove the column to split at random"
        )
    return bool(found)


def _split_dataset(data: Dataset, options: Mapping[str, Any]) -> DatasetDict:
    """Split a Dataset whose labels have a type."""
    from datasets import DatasetDict

    sizes = {"test_size": 0.2, "validation_size": 0.1, "seed": 0}
    if unknown := sorted(set(options) - {*sizes, "clusters"}):
        raise ConfigurationError(
            f"{listing(unknown)}: the labels of this Dataset have a type already, so it is only split. It takes "
            f"{listing([*sizes, 'clusters'])}"
        )
    clusters = options.get("clusters")
    if clusters and "accession" not in data.features:
        raise ConfigurationError(f"clusters={str(clusters)!r} names accessions, and the Dataset has no such column")
    sizes |= {name: value for name, value in options.items() if name in sizes and value is not None}
    return DatasetDict(split_rows(data, clusters, (None, None), sizes))


def _parts_of(data: Any) -> Mapping[str, Any]:
    """Return the parts of data by the names of their splits; those without splits are one part without a name."""
    return data if isinstance(data, Mapping) else {"": data}


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
