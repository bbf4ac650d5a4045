"""Splits that are read from disk row after row, for tables larger than memory.

The rows are shuffled once, on disk: each goes to a bucket by a hash of its sequence, and each bucket is shuffled in
memory. Equal sequences share a bucket, so that what leaks between splits is seen there too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from esm_efficient.data.splits import (
    SPLITS,
    check_partitions,
    cluster_groups,
    count_repeats,
    hash_sequences,
    read_clusters,
    warn_of_relatives,
    warn_of_repeats,
)
from esm_efficient.errors import ConfigurationError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import IterableDatasetDict

logger = logging.getLogger(__name__)

_BUCKET = 10_000
_MOST_BUCKETS = 128
_BATCH = 1_000


def stream_splits(
    table: Path,
    *,
    clusters: str | Path | None,
    test_partitions: Sequence[int],
    validation_partitions: Sequence[int],
    test_size: float,
    validation_size: float,
    seed: int,
) -> IterableDatasetDict:
    """Shuffled splits of a table, as streams that hold a thousand rows in memory.

    Shuffling holds one bucket: 10,000 rows, or of more than 1.28 million rows a 128th.

    Args:
        table: an Arrow stream of record batches, with ``sequence``, ``accession`` and, if there are any, ``split`` and
            ``partition``. The shuffled splits are made beside it, unless they are there already.
        clusters: as `esm_efficient.load_sequences`, like the rest.
        test_partitions: partitions of the test set.
        validation_partitions: partitions of the validation set.
        test_size: fraction of the rows, or of the clusters, in the test set, on average.
        validation_size: likewise for the validation set.
        seed: of the order and of who is in which split.

    Raises:
        ConfigurationError: the options contradict each other, or leave nothing to train on or to test on.
        DataError: a sequence stands in two splits, or in no cluster.
    """
    import pyarrow as pa
    from pandas.util import hash_array

    known = None if clusters is None else read_clusters(clusters)
    with pa.OSFile(str(table)) as raw, pa.ipc.open_stream(raw) as reader:
        names, rows, partitions = set(reader.schema.names), 0, set[int]()
        for batch in reader:
            rows += batch.num_rows
            if "partition" in names:
                partitions.update(batch.column("partition").to_pylist())
    by_partition = "split" not in names and known is None and "partition" in names
    if by_partition:
        check_partitions(sorted(partitions), test_partitions, validation_partitions)
    elif "split" not in names and known is None:
        warn_of_relatives(stacklevel=4)

    def assign(batch: pa.RecordBatch, chance: np.ndarray) -> np.ndarray:
        if "split" in names:
            return np.array([SPLITS.index(name) for name in batch.column("split").to_pylist()])
        if by_partition:
            where = batch.column("partition").to_numpy()
            cases = [np.isin(where, list(test_partitions)), np.isin(where, list(validation_partitions))]
        else:
            if known is not None and clusters is not None:
                groups = cluster_groups(batch.column("accession").to_pylist(), known, clusters)
                chance = hash_array(groups.astype(np.int64) + 1_000_003 * seed) / 2.0**64
            cases = [chance < test_size, chance < test_size + validation_size]
        return np.select(cases, [SPLITS.index("test"), SPLITS.index("validation")], SPLITS.index("train"))

    partitions_given = [*test_partitions], [*validation_partitions]
    options = (known and sorted(known.items()), partitions_given, test_size, validation_size, seed)
    folder = table.with_name(f"{table.stem}-{hashlib.sha256(repr(options).encode()).hexdigest()[:16]}")
    if not folder.is_dir():
        work = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        try:
            buckets = min(max(-(-rows // _BUCKET), 1), _MOST_BUCKETS)
            sizes = _scatter(table, work, assign, buckets, seed)
            if len(sizes) < 2 or "train" not in sizes:
                raise ConfigurationError(f"all {rows:,} rows fall into {', '.join(sizes)}: expected train and test")
            _shuffle(work, buckets, seed)
            (work / "rows.json").write_text(json.dumps(sizes))
            # Another process may have made the same meanwhile.
            with contextlib.suppress(OSError):
                os.rename(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    streams = _open(folder)
    return streams.remove_columns("split") if "split" in names else streams


def _scatter(
    source: Path, work: Path, assign: Callable[[pa.RecordBatch, np.ndarray], np.ndarray], buckets: int, seed: int
) -> dict[str, int]:
    """Write each row to the file of its split and bucket; returns the rows of each split."""
    import pyarrow as pa

    sizes = np.zeros(len(SPLITS), dtype=np.int64)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(pa.ipc.open_stream(stack.enter_context(pa.OSFile(str(source)))))
        writers: dict[int, pa.RecordBatchWriter] = {}
        for batch in reader:
            hashes = hash_sequences(batch.column("sequence"), seed=seed)
            # The upper half of a hash says the split and the lower half the bucket, neither knowing of the other.
            split = assign(batch, (hashes >> np.uint64(32)).astype(np.float64) / 2.0**32)
            key = split * buckets + ((hashes & np.uint64(2**32 - 1)) % np.uint64(buckets)).astype(np.int64)
            order = np.argsort(key, kind="stable")
            ordered = batch.take(pa.array(order))
            places = np.flatnonzero(np.diff(key[order], prepend=-1))
            for begin, end in zip(places, [*places[1:], len(order)], strict=True):
                name = int(key[order[begin]])
                if name not in writers:
                    path = work / f"{name}.bucket"
                    writers[name] = stack.enter_context(pa.ipc.new_stream(path, batch.schema))
                writers[name].write_batch(ordered.slice(begin, end - begin))
            sizes += np.bincount(split, minlength=len(SPLITS))
    return {name: int(size) for name, size in zip(SPLITS, sizes, strict=True) if size}


def _shuffle(work: Path, buckets: int, seed: int) -> None:
    """Shuffle each bucket, once no sequence of it stands in two splits."""
    import pyarrow as pa
    from datasets import Dataset

    repeated = 0
    for bucket in range(buckets):
        tables = {}
        for place, split in enumerate(SPLITS):
            path = work / f"{place * buckets + bucket}.bucket"
            if path.exists():
                with pa.OSFile(str(path)) as raw, pa.ipc.open_stream(raw) as reader:
                    tables[split] = reader.read_all()
                path.unlink()
        repeated += count_repeats({split: Dataset(table.combine_chunks()) for split, table in tables.items()})
        for split, table in tables.items():
            order = np.random.default_rng((seed, bucket)).permutation(len(table))
            with pa.ipc.new_stream(work / f"{split}-{bucket:05d}.arrow", table.schema) as writer:
                writer.write_table(table.take(pa.array(order)), max_chunksize=_BATCH)
    warn_of_repeats(repeated)


def _open(folder: Path) -> IterableDatasetDict:
    """The splits of a folder that `stream_splits` made."""
    from datasets import SplitDict, SplitInfo, load_dataset

    sizes = json.loads((folder / "rows.json").read_text())
    files = {split: sorted(map(str, folder.glob(f"{split}-*.arrow"))) for split in sizes}
    streams = load_dataset("arrow", data_files=files, streaming=True)
    for name, stream in streams.items():
        stream.info.splits = SplitDict({name: SplitInfo(name, num_examples=sizes[name])})
    logger.info("%s", ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    return streams
