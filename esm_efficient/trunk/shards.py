"""Write the states of a split to files, and keep whole files for the next run."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets.utils import tqdm

from esm_efficient.data.download import sha256_of, unfinished
from esm_efficient.errors import DataError
from esm_efficient.reporting import format_bytes
from esm_efficient.trunk.split import Trunk
from esm_efficient.trunk.states import STATES_COLUMN, StateFormat, compute_states, hash_weights

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ABOUT = "about.json"
"""The file that says what the states of a folder are."""
_SHARD_BYTES = 128 * 2**20
"""Bytes of states per shard: what is in memory at most while a shard is made."""
_SHARD_TOKENS = 2**18
"""Tokens of the sequences per shard. Their time is what a kill loses at most."""
WORKING_TOKENS = 8192
"""Tokens of one forward pass of the trunk, padding included."""


@dataclass(frozen=True)
class Plan:
    """The files of one split's states.

    Attributes:
        name: name of the split.
        folder: folder of the files.
        stored: how the states are stored.
        width: width of the states.
        lengths: tokens per sequence, int64.
        order: rows from the longest sequence to the shortest, as they are in the files.
        shards: the part of `order` in each file.
    """

    name: str
    folder: Path
    stored: StateFormat
    width: int
    lengths: np.ndarray
    order: np.ndarray = field(init=False)
    shards: list[slice] = field(init=False)

    def __post_init__(self) -> None:
        order = np.argsort(-self.lengths, kind="stable")
        sizes = self.stored.bytes_for(self.lengths, self.width)[order]
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "shards", _divide(sizes, self.lengths[order]))

    def file(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.folder / f"states-{number:05d}.arrow"

    def lengths_of(self, number: int) -> np.ndarray:
        """Return the tokens per sequence of a shard."""
        return self.lengths[self.order[self.shards[number]]]


def make_shards(split: Dataset, trunk: Trunk, plan: Plan) -> None:
    """Write the shards that are missing or damaged; each rank writes its share.

    Raises:
        DataError: the disk is full, or a file cannot be written.
    """
    rank, ranks = rank_and_ranks()
    failure: BaseException | None = None
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        _note_use(plan, trunk)
        remove_abandoned_parts(plan.folder)
        missing = [number for number in range(rank, len(plan.shards), ranks) if not _is_whole(plan.file(number))]
        _check_free_space(plan)
        tokens = sum(int(plan.lengths_of(number).sum()) for number in missing)
        hidden = True if rank > 0 or not missing else None  # None leaves it to the user's settings
        with tqdm(
            total=tokens, desc=f"states of {plan.name}", unit="token", unit_scale=True, disable=hidden
        ) as progress:
            for number in missing:
                _write_shard(split, trunk, plan, number, progress)
    except OSError as error:
        failure = error
    if not _all_agree(failure is None):
        if failure is None:
            raise DataError(f"another rank could not write states to {plan.folder}; its message names the reason")
        is_full = isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT)
        free = f"; {format_bytes(_free_bytes(plan.folder))} are free there. Free space or give" if is_full else ". Give"
        raise DataError(
            f"the states could not be written to {plan.folder} ({failure}){free} another folder, and run again: "
            "finished files are used again"
        ) from failure


def remove_abandoned_parts(folder: Path) -> None:
    """Delete the unfinished files of processes that were killed; a file that a living process writes is locked."""
    for part in folder.glob("states-*.part"):
        with contextlib.suppress(FileNotFoundError), part.open("r+b") as file:  # another rank may delete it too
            if _lock(file.fileno(), wait=False):
                logger.info("%s is the unfinished file of a process that was killed: it is deleted", part)
                part.unlink()


def is_in_use(folder: Path) -> bool:
    """Whether a living process writes a file in a folder; files of killed processes are deleted."""
    remove_abandoned_parts(folder)
    return any(folder.glob("states-*.part"))


def checksum_file(path: Path) -> Path:
    """Return the path of a shard's checksum."""
    return path.with_suffix(".sha256")


def rank_and_ranks() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _note_use(plan: Plan, trunk: Trunk) -> None:
    """Write into the folder of states what they are; the file's time is that of the last use."""
    path = plan.folder / ABOUT
    if rank_and_ranks()[0]:
        return
    if path.is_file():
        with contextlib.suppress(OSError):  # states that are whole can be read where nothing can be written
            path.touch()
        return
    about = {
        "split": plan.name,
        "sequences": len(plan.lengths),
        "layers": len(trunk.layers),
        "dtype": plan.stored.dtype,
        "pooling": plan.stored.pooling,
        "weights": hash_weights(trunk.esm, len(trunk.layers)),
    }
    partial = unfinished(path)
    partial.write_text(json.dumps(about, indent=2) + "\n")
    os.replace(partial, path)


def _divide(sizes: np.ndarray, lengths: np.ndarray) -> list[slice]:
    """Divide rows into shards of at most `_SHARD_BYTES` and `_SHARD_TOKENS`, or of one row."""
    shards, start, total, tokens = [], 0, 0, 0
    for row, (size, length) in enumerate(zip(sizes.tolist(), lengths.tolist(), strict=True)):
        if row > start and (total + size > _SHARD_BYTES or tokens + length > _SHARD_TOKENS):
            shards.append(slice(start, row))
            start, total, tokens = row, 0, 0
        total += size
        tokens += length
    return [*shards, slice(start, len(sizes))]


def _write_shard(split: Dataset, trunk: Trunk, plan: Plan, number: int, progress: tqdm) -> None:
    """Compute one shard, and write it under a temporary name until it is whole."""
    import pyarrow as pa

    path = plan.file(number)
    partial = unfinished(path)
    try:
        with _locked(partial):
            with (
                pa.OSFile(str(partial), "wb") as sink,
                pa.ipc.new_stream(sink, pa.schema([(STATES_COLUMN, pa.binary())])) as out,
            ):
                for rows in _batches(plan, number):
                    states = pa.array(compute_states(split, trunk, rows, plan.stored), pa.binary())
                    out.write_table(pa.table({STATES_COLUMN: states}))
                    progress.update(int(plan.lengths[rows].sum()))
            checksum_file(path).write_text(sha256_of(partial))
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create a file, and lock it until the end of the block or of the process.

    Where there are no locks, the file is closed: Windows renames no open file.
    """
    while True:
        with path.open("xb") as file:
            if not _lock(file.fileno(), wait=True):
                break
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return
        # Another process found the file before it was locked, and deleted it.
    yield


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file for this process; False if another process has the lock, or if there are no locks here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by another process, or a file system without locks
        return False
    return True


def _batches(plan: Plan, number: int) -> Iterator[np.ndarray]:
    """Yield the rows of each forward pass of a shard, from the longest sequence to the shortest."""
    rows = plan.order[plan.shards[number]]
    start = 0
    while start < len(rows):
        size = max(1, WORKING_TOKENS // int(plan.lengths[rows[start]]))
        yield rows[start : start + size]
        start += size


def _check_free_space(plan: Plan) -> None:
    """Refuse a disk that is too small for all missing files, also those that other ranks make.

    Raises:
        OSError: it is.
    """
    missing = [number for number in range(len(plan.shards)) if not plan.file(number).is_file()]
    needed = sum(int(plan.stored.bytes_for(plan.lengths_of(number), plan.width).sum()) for number in missing)
    if needed > _free_bytes(plan.folder):
        raise OSError(errno.ENOSPC, f"the missing files need {format_bytes(needed)}")


def _free_bytes(folder: Path) -> int:
    """Free space of the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def _is_whole(path: Path) -> bool:
    """Whether a shard exists with the right checksum; a damaged shard is reported."""
    checksum = checksum_file(path)
    if not path.is_file() or not checksum.is_file():
        return False
    if checksum.read_text() == sha256_of(path):
        return True
    logger.warning("%s is damaged: its checksum differs. It is made again", path)
    return False


def _all_agree(fine: bool) -> bool:
    """Wait for all ranks, and return whether all are fine."""
    if rank_and_ranks()[1] == 1:
        return fine
    answers: list[bool] = [False] * rank_and_ranks()[1]
    torch.distributed.all_gather_object(answers, fine)
    return all(answers)
