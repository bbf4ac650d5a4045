"""The DeepLoc-2.0 table: where it is, its checksum, its columns, and its labels.

Thumuluri et al. (2022), "DeepLoc 2.0: multi-label subcellular localization prediction using protein language models",
Nucleic Acids Research 50, W228-W234. The authors state no licence for the table, so the library ships no row of it.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlparse

import numpy as np

from esm_efficient.data.download import cache_folder, fetch, sha256_of
from esm_efficient.data.loading import shuffled_splits
from esm_efficient.data.readers import read_rows
from esm_efficient.data.schema import (
    binary_labels,
    refuse_cells,
    sequences_of,
    texts_of,
    whole_numbers,
    zeros_and_ones,
)
from esm_efficient.data.sequences import NucleotideCount, count_residues
from esm_efficient.data.splits import sizes_of, split_at_random, split_by_partition
from esm_efficient.errors import ConfigurationError, DataError, listing

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

DEEPLOC_URL = "https://services.healthtech.dtu.dk/services/DeepLoc-2.0/data/Swissprot_Train_Validation_dataset.csv"
DEEPLOC_SHA256 = "29a07b293fed2994a966b70bdcd6bacc59915b8b01fa200cb2b07d8db18384a2"

LABEL_NAMES = ("non-membrane", "membrane")
LABEL_COLUMN = "Membrane"
"""The column of the label. ``Cell membrane`` is another column: one of the ten locations; neither implies the other."""

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
COLUMNS = ("ACC", "Kingdom", "Partition", LABEL_COLUMN, *LOCATIONS, "Sequence")


def load_deeploc(
    source: str | Path | None = None,
    *,
    task: str | Mapping[str, str] = "membrane",
    min_residues: int | None = 100,
    max_residues: int | None = 512,
    split: Literal["partition", "random"] = "partition",
    test_partitions: Sequence[int] | None = None,
    validation_partitions: Sequence[int] | None = None,
    test_size: float | None = None,
    validation_size: float | None = None,
    seed: int = 0,
    sha256: str | None = None,
) -> DatasetDict:
    """Load the DeepLoc-2.0 table as a labelled, split `DatasetDict`.

    The file is sorted by sequence. The rows of each split are shuffled, so that its first n rows are a fair sample.

    Args:
        source: a path (plain, ``.gz`` or ``.xz``) or an http(s) address of a table in the DeepLoc-2.0 format; None for
            the authors' address. Downloads are kept in ``$ESM_EFFICIENT_CACHE``, or else in ``~/.cache/esm_efficient``.
        task: what to predict: ``"membrane"``, one of two classes; ``"location"``, one or more of ten locations; or
            a mapping of label names to columns of 0 and 1, such as
            ``{"nuclear": "Nucleus", "golgi": "Golgi apparatus"}``, in which an empty cell is unknown. A single label
            makes the two classes ``"not <name>"`` and ``"<name>"``, and then no cell may be empty.
        min_residues: the fewest residues of a protein to keep; None for no bound.
        max_residues: the most residues of a protein to keep; None for no bound.
        split: ``"partition"`` uses the homology partitions of the table (at most 30 % identity between two of them);
            ``"random"`` is stratified by class and puts relatives of training proteins into the test set, with a
            warning.
        test_partitions: partitions of the test set, with ``split="partition"``; None for partition 4.
        validation_partitions: partitions of the validation set, likewise; empty for none; None for partition 3, so give
            it too if partition 3 is for testing.
        test_size: fraction of the proteins in the test set, with ``split="random"``; None for 0.2.
        validation_size: fraction of the proteins in the validation set, likewise; 0 for none; None for 0.1.
        seed: of the shuffling and of the random split.
        sha256: the expected SHA-256 of the file. The authors' file is always checked.

    Returns:
        Splits ``train``, ``validation`` (unless empty) and ``test``, with the columns ``sequence`` (str), ``label``
        (ClassLabel; for several labels a struct of float32, null where unknown), ``kingdom`` (str), ``accession``
        (str), ``partition`` (int) and ``residues`` (int, the length of the sequence).

    Raises:
        DownloadError: the file cannot be fetched, or a downloaded file has another SHA-256 than expected.
        DataError: a local file is missing or has another SHA-256 than expected; a column is missing; a label,
            partition, accession or sequence is wrong; the sequences are nucleotides; no protein has a length within
            the bounds; a sequence is in two splits.
        ConfigurationError: the options are unknown or contradict each other.

    Example:
        >>> from esm_efficient.demo import write_demo_table
        >>> data = load_deeploc(write_demo_table("demo.csv"))  # doctest: +SKIP
        >>> data["train"].features["label"].names  # doctest: +SKIP
        ['non-membrane', 'membrane']
    """
    if split not in ("partition", "random"):
        raise ConfigurationError(f'split={split!r}: expected "partition" or "random"')
    is_random = split == "random"
    sizes: dict[str, Any] = sizes_of(test_size, validation_size)
    for name, value, is_used in (
        ("test_partitions", test_partitions, not is_random),
        ("validation_partitions", validation_partitions, not is_random),
        ("test_size", test_size, is_random),
        ("validation_size", validation_size, is_random),
    ):
        if value is not None and not is_used:
            raise ConfigurationError(f'{name}= would not be used with split="{split}": remove one of the two')
    whole = _read(_local_path(source, sha256), task)
    residues = np.asarray(whole["residues"][:])
    keep = (residues >= (min_residues or 0)) & (residues <= (math.inf if max_residues is None else max_residues))
    if not keep.any():
        raise DataError(f"no protein of the table has between {min_residues} and {max_residues} residues")
    whole = whole.select(np.flatnonzero(keep))
    if is_random:
        parts = split_at_random(whole, seed=seed, **sizes)
    else:
        test = (4,) if test_partitions is None else test_partitions
        parts = split_by_partition(whole, test, (3,) if validation_partitions is None else validation_partitions)
    return shuffled_splits(parts, seed)


def _local_path(source: str | Path | None, sha256: str | None) -> Path:
    """The path of the table, downloaded if necessary."""
    if source is None:
        return fetch(DEEPLOC_URL, cache_folder() / Path(urlparse(DEEPLOC_URL).path).name, sha256=DEEPLOC_SHA256)
    if isinstance(source, str) and urlparse(source).scheme in ("http", "https"):
        # Two addresses may end in the same name, so the cached name contains a hash of the whole address.
        name = f"{hashlib.sha256(source.encode()).hexdigest()[:16]}_{Path(unquote(urlparse(source).path)).name}"
        return fetch(source, cache_folder() / name, sha256=sha256)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"no file at {path}. Give a path, an http(s) address, or None for the authors' table")
    if sha256 is not None and (actual := sha256_of(path)) != sha256:
        raise DataError(f"{path} has SHA-256 {actual}, expected {sha256}")
    return path


def _label_columns(task: str | Mapping[str, str]) -> dict[str, str]:
    """Label name to column."""
    tasks = {"membrane": {LABEL_NAMES[1]: LABEL_COLUMN}, "location": {name: name for name in LOCATIONS}}
    if isinstance(task, str) and task in tasks:
        return tasks[task]
    if isinstance(task, Mapping) and task and all(isinstance(name, str) for pair in task.items() for name in pair):
        return dict(task)
    raise ConfigurationError(f"task={task!r}: expected {' or '.join(tasks)}, or a mapping of label names to columns")


def _read(path: Path, task: str | Mapping[str, str]) -> Dataset:
    """All rows of the table, checked, in the order of the file."""
    from datasets import ClassLabel, Dataset, Features, Value

    label_columns = _label_columns(task)
    columns, places = read_rows(path)
    wanted = ("ACC", "Kingdom", "Partition", "Sequence", *label_columns.values())
    if missing := [repr(name) for name in dict.fromkeys(wanted) if name not in columns]:
        raise DataError(
            f"{path} has no column {listing(missing)}. A DeepLoc-2.0 table has {', '.join(COLUMNS)}; this one has "
            f"{', '.join(columns)}"
        )
    accessions = texts_of(columns["ACC"])
    places = [f"{path}, {place} ({name or 'no accession'})" for place, name in zip(places, accessions, strict=True)]
    refuse_cells(accessions, places, [not name for name in accessions], "the accession (ACC) is empty")
    counts = Counter(accessions)
    repeated = [counts[name] > 1 for name in accessions]
    refuse_cells(accessions, places, repeated, "the accession (ACC) is in the table more than once")
    sequences = sequences_of(columns["Sequence"], places)
    nucleotides = NucleotideCount()
    nucleotides.add(sequences, accessions)
    if warning := nucleotides.warning(str(path)):
        logger.warning("%s", warning)
    if len(label_columns) == 1:
        ((name, column),) = label_columns.items()
        labels: Any = zeros_and_ones(columns[column], column, places, required=True).astype(int)
        feature: Any = ClassLabel(names=list(LABEL_NAMES if task == "membrane" else (f"not {name}", name)))
    else:
        labels = binary_labels(columns, label_columns, path, places).to_pylist()
        feature = {name: Value("float32") for name in label_columns}
    rows = {
        "sequence": (sequences, Value("string")),
        "label": (labels, feature),
        "kingdom": (texts_of(columns["Kingdom"]), Value("string")),
        "accession": (accessions, Value("string")),
        "partition": (whole_numbers(columns["Partition"], "Partition", places), Value("int32")),
        "residues": (list(map(count_residues, sequences)), Value("int32")),
    }
    features = Features({name: feature for name, (_, feature) in rows.items()})
    return Dataset.from_dict({name: values for name, (values, _) in rows.items()}, features=features)
