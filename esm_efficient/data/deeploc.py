"""The DeepLoc-2.0 table: fetch, verify, read, label, split.

Thumuluri et al. (2022), "DeepLoc 2.0: multi-label subcellular localization prediction using protein language models",
Nucleic Acids Research 50, W228-W234. The authors state no licence for the table, so the library ships no row of it.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlparse

import numpy as np

from esm_efficient.data.download import cache_folder, fetch, sha256_of
from esm_efficient.data.leaks import check_leaks
from esm_efficient.data.readers import compression_of
from esm_efficient.data.sequences import clean
from esm_efficient.data.splits import split_at_random, split_by_partition
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

DEEPLOC_URL = "https://services.healthtech.dtu.dk/services/DeepLoc-2.0/data/Swissprot_Train_Validation_dataset.csv"
DEEPLOC_SHA256 = "29a07b293fed2994a966b70bdcd6bacc59915b8b01fa200cb2b07d8db18384a2"

LABEL_NAMES = ("non-membrane", "membrane")
LABEL_COLUMN = "Membrane"
"""The column of the label. ``Cell membrane`` is another: one of the ten locations, and neither implies the other."""

LOCATIONS = (
    "Cytoplasm",
    "Nucleus",
    "Extracellular",
    "Cell membrane",
    "Mitochondrion",
    "Plastid",
    "Endoplasmic reticulum",
    "Lysosome/Vacuole",
    "Golgi apparatus",
    "Peroxisome",
)
_LABEL = "label: "
COLUMNS = ("ACC", "Kingdom", "Partition", LABEL_COLUMN, *LOCATIONS, "Sequence")
_READ = ("ACC", "Kingdom", "Partition", "Sequence")


def load_deeploc(
    source: str | Path | None = None,
    *,
    task: str | Mapping[str, str] = "membrane",
    min_residues: int | None = 100,
    max_residues: int | None = 512,
    split: Literal["partition", "random"] = "partition",
    test_partitions: Sequence[int] = (4,),
    validation_partitions: Sequence[int] = (3,),
    test_size: float = 0.2,
    validation_size: float = 0.1,
    seed: int = 0,
    sha256: str | None = None,
) -> DatasetDict:
    """Load the DeepLoc-2.0 table as a labelled, split `DatasetDict`.

    The rows of the file are sorted by sequence; the rows of each split returned here are shuffled, so that the first
    n of them are a fair sample.

    Args:
        source: a path (plain, ``.gz`` or ``.xz``) or an http(s) address of a table in the DeepLoc-2.0 format; None for
            the authors' own address. What is downloaded is kept in the folder that ``$ESM_EFFICIENT_CACHE`` names.
        task: what is to be predicted: ``"membrane"``, one of two classes; ``"location"``, which of ten locations,
            often several; or label names and the columns of 0 and 1 that hold them, such as
            ``{"nuclear": "Nucleus", "golgi": "Golgi apparatus"}``, where an empty cell is unknown. A single name makes
            two classes, ``"not <name>"`` and ``"<name>"``.
        min_residues: the fewest residues to keep a protein; None for no bound.
        max_residues: the most residues to keep a protein; None for no bound.
        split: ``"partition"`` uses the table's own homology partitions (at most 30 % identity between two of them);
            ``"random"`` is stratified by class and lets relatives of training proteins into the test set.
        test_partitions: partitions of the test set, with ``split="partition"``.
        validation_partitions: partitions of the validation set; empty for none.
        test_size: fraction of the proteins in the test set, with ``split="random"``.
        validation_size: likewise for the validation set; 0 for none.
        seed: of the shuffling and of the random split.
        sha256: the expected SHA-256 of the file; the authors' own is always checked.

    Returns:
        Splits ``train``, ``validation`` (unless empty) and ``test``, with the features ``sequence`` (str), ``label``
        (ClassLabel; with several labels a struct of float32, null where unknown), ``kingdom`` (str), ``accession``
        (str), ``partition`` (int) and ``residues`` (their number).

    Raises:
        DownloadError: the file cannot be fetched or is not the expected one.
        DataError: columns are missing; labels, partitions or sequences are broken; a sequence stands in two splits.
        ConfigurationError: the options of the split contradict each other.

    Example:
        >>> from esm_efficient.demo import write_demo_table
        >>> data = load_deeploc(write_demo_table("demo.csv"))  # doctest: +SKIP
        >>> data["train"].features["label"].names  # doctest: +SKIP
        ['non-membrane', 'membrane']
    """
    if split not in ("partition", "random"):
        raise ConfigurationError(f'split={split!r}: expected "partition" or "random"')
    path = _locate(source, sha256)
    columns = _label_columns(task)
    table = _clean_table(_read_table(path, columns), path, columns)
    table = table[table["residues"].between(min_residues or 0, max_residues if max_residues is not None else np.inf)]
    if table.empty:
        raise DataError(f"{path}: no protein has between {min_residues} and {max_residues} residues")
    whole = _to_dataset(table, task)
    if split == "partition":
        parts = split_by_partition(whole, test_partitions, validation_partitions)
        datasets = {name: part.shuffle(seed=seed) for name, part in parts.items()}
    else:
        datasets = split_at_random(whole, test_size=test_size, validation_size=validation_size, seed=seed)
    check_leaks(datasets)

    from datasets import DatasetDict

    logger.info("%s: %s", path, ", ".join(f"{name} {len(dataset):,}" for name, dataset in datasets.items()))
    return DatasetDict(datasets)


def _locate(source: str | Path | None, sha256: str | None) -> Path:
    """The local path of the table, downloaded if need be."""
    if source is None:
        return fetch(DEEPLOC_URL, cache_folder() / Path(urlparse(DEEPLOC_URL).path).name, sha256=DEEPLOC_SHA256)
    if isinstance(source, str) and urlparse(source).scheme in ("http", "https"):
        # Two addresses may end alike: the whole address makes the name.
        name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}_{Path(unquote(urlparse(source).path)).name}"
        return fetch(source, cache_folder() / name, sha256=sha256)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"no file at {path}. Give a path, an http(s) address, or nothing for the authors' own table")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise DataError(f"{path} has SHA-256 {found}, expected {sha256}")
    return path


def _label_columns(task: str | Mapping[str, str]) -> dict[str, str]:
    """Label names and their columns."""
    if isinstance(task, str):
        known = {"membrane": {LABEL_NAMES[1]: LABEL_COLUMN}, "location": {name: name for name in LOCATIONS}}
        if task not in known:
            raise ConfigurationError(f"task={task!r}: expected {' or '.join(known)}, or label names and their columns")
        return known[task]
    if (
        not isinstance(task, Mapping)
        or not task
        or not all(isinstance(name, str) for pair in task.items() for name in pair)
    ):
        raise ConfigurationError(f"task={task!r}: expected label names and the columns that hold them")
    return dict(task)


def _read_table(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read the columns that are needed, as text, so that nothing is guessed."""
    import pandas as pd

    try:
        compression = compression_of(path)
        header = pd.read_csv(path, nrows=0, compression=compression).columns.tolist()
        wanted = list(dict.fromkeys((*_READ, *columns.values())))
        if missing := [name for name in wanted if name not in header]:
            raise DataError(
                f"{path} has no column {listing([repr(name) for name in missing])}. A DeepLoc-2.0 table has "
                f"{', '.join(COLUMNS)}; this one has {', '.join(header)}"
            )
        return pd.read_csv(path, usecols=wanted, dtype=str, keep_default_na=False, compression=compression)
    except (
        *(pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError),
        *(OSError, EOFError, lzma.LZMAError, zlib.error),
    ) as error:
        raise DataError(f"{path} cannot be read as a CSV table ({error})") from error


def _clean_table(raw: pd.DataFrame, path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Check every row; return the labels, sequence, kingdom, accession, partition and residues."""
    import pandas as pd

    names = [f"line {i + 2} ({accession or 'no accession'})" for i, accession in enumerate(raw["ACC"])]

    def complain(bad: pd.Series, what: str) -> None:
        if bad.any():
            rows = [names[i] for i in np.flatnonzero(bad)]
            raise DataError(f"{path}: {what} in {len(rows)} row(s): {listing(rows)}")

    labels = {}
    for name, column in columns.items():
        value = pd.to_numeric(raw[column], errors="coerce")
        unknown = raw[column].str.strip() == "" if len(columns) > 1 else pd.Series(False, index=raw.index)
        complain(value.isna() & ~unknown, f"the {column} label is missing or not a number")
        complain(~value.isin([0, 1]) & ~unknown, f"the {column} label is neither 0 nor 1")
        labels[f"{_LABEL}{name}"] = value
    partition = pd.to_numeric(raw["Partition"], errors="coerce")
    complain(partition.isna() | (partition % 1 != 0), "the Partition is missing or not a whole number")
    sequence = raw["Sequence"].map(clean)
    complain(sequence == "", "the Sequence is empty")
    complain(raw["ACC"].str.strip() == "", "the accession (ACC) is empty")
    complain(raw["ACC"].duplicated(keep=False), "the accession (ACC) stands more than once")
    complain(~sequence.str.fullmatch("[A-Z]+"), "the Sequence holds characters that are not letters")
    return pd.DataFrame(
        {
            "sequence": sequence,
            **labels,
            "kingdom": raw["Kingdom"],
            "accession": raw["ACC"].str.strip(),
            "partition": partition.astype(int),
            "residues": sequence.str.len(),
        }
    )


def _to_dataset(table: pd.DataFrame, task: str | Mapping[str, str]) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Value

    columns = [name for name in table.columns if name.startswith(_LABEL)]
    names = [name.removeprefix(_LABEL) for name in columns]
    if len(names) == 1:
        label: list = table[columns[0]].astype(int).tolist()
        classes = LABEL_NAMES if task == "membrane" else (f"not {names[0]}", names[0])
        feature: Any = ClassLabel(names=list(classes))
    else:
        labels = table[columns].rename(columns=dict(zip(columns, names, strict=True)))
        label = labels.astype(object).where(labels.notna(), None).to_dict("records")
        feature = {name: Value("float32") for name in names}
    features = Features(
        {
            "sequence": Value("string"),
            "label": feature,
            "kingdom": Value("string"),
            "accession": Value("string"),
            "partition": Value("int32"),
            "residues": Value("int32"),
        }
    )
    rows = {name: label if name == "label" else table[name].tolist() for name in features}
    return Dataset.from_dict(rows, features=features)
