"""Compute the states of a frozen trunk once per sequence, and keep them on disk."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from datasets.utils import tqdm
from torch import Tensor

from esm_efficient.data.download import sha256_of
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.reporting import format_bytes
from esm_efficient.trunk.split import Trunk

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Data = TypeVar("Data", bound="Dataset | DatasetDict")
logger = logging.getLogger(__name__)

STATES_COLUMN = "states"
"""The column of the cached states: the bytes of an array of shape (states, width) per sequence."""

StateDtype = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["tokens", "first"]
_IRRELEVANT = (
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "label_thresholds", "problem_type"),
    *("num_hidden_layers", "output_attentions", "output_hidden_states", "return_dict", "transformers_version"),
)
"""Settings of a config that do not change the states."""
_FORMAT = 1
"""Number of the cache's format. Another number makes the states again."""
_SHARD_BYTES = 128 * 2**20
"""Bytes of states per shard: what a kill loses at most, and what is in memory while a shard is made."""
_WORKING_TOKENS = 8192
"""Tokens of one forward pass of the trunk, padding included."""


@dataclass(frozen=True)
class StateFormat:
    """How states are stored.

    Attributes:
        dtype: number format on disk. float32 is exact; a half precision needs half the space and rounds.
        pooling: ``"tokens"`` for the states of all tokens, ``"first"`` for those of the first token, which is all that
            transformers' classification head reads if no layer trains.
    """

    dtype: StateDtype = "float32"
    pooling: Pooling = "tokens"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, ("float32", "bfloat16", "float16")),
            ("pooling", self.pooling, ("tokens", "first")),
        ):
            if value not in known:
                raise ConfigurationError(f"{name}={value!r}: expected one of {', '.join(known)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of torch."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def bytes_for(self, tokens: np.ndarray, width: int) -> np.ndarray:
        """Return the bytes per sequence.

        Args:
            tokens: tokens per sequence.
            width: width of the states.
        """
        states = np.ones_like(tokens) if self.pooling == "first" else tokens
        return states * width * self.torch_dtype.itemsize


def cache_states(
    dataset: Data,
    trunk: Trunk,
    folder: str | Path,
    *,
    dtype: StateDtype = "float32",
    pooling: Pooling = "tokens",
) -> Data:
    """Compute what enters the first trainable layer, once per sequence, and add it to a dataset.

    The states are written to memory-mapped Arrow files, in a subfolder named after a hash of everything that they
    depend on: the trunk's weights, config and number of layers, the dtype, the pooling, and the token ids. A changed
    model, file or option therefore has another subfolder. Files that exist and have the right checksum are used again;
    so a run that was killed goes on where it stopped. Under torch.distributed, each rank computes its share of the
    files, and `folder` must be the same for all.

    Args:
        dataset: splits, or one split, that `tokenize_dataset` returned.
        trunk: the trunk of `split_model`, on the device to compute on.
        folder: folder for the files.
        dtype: number format on disk: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        pooling: ``"tokens"``, or ``"first"`` for the first token alone.

    Returns:
        The dataset with the column ``states`` (bytes), in the same order of rows.

    Raises:
        DataError: the dataset is not tokenised or empty, the disk is full, or a file cannot be written.
        ConfigurationError: an option is unknown.

    Example:
        >>> trunk, rest = split_model(model, layers=2)  # doctest: +SKIP
        >>> data = cache_states(tokenize_dataset(data, tokenizer)[0], trunk, "states")  # doctest: +SKIP
    """
    from datasets import DatasetDict

    stored = StateFormat(dtype, pooling)
    model_key = _hash_model(trunk)
    if isinstance(dataset, DatasetDict):
        return DatasetDict(
            {name: _cache_split(split, trunk, Path(folder), stored, model_key, name) for name, split in dataset.items()}
        )
    return _cache_split(dataset, trunk, Path(folder), stored, model_key, "states")


class StatesCollator:
    """A data collator that gives a model the cached states instead of token ids.

    It takes the column ``states`` away, lets another collator make the batch, and replaces ``input_ids`` by
    ``inputs_embeds`` of shape (rows, columns, width).

    Args:
        collator: the collator of the other columns.
        trunk: the trunk that computed the states. The model gets them in the dtype of its weights, so that the numbers
            are those of a run without a cache.
        dtype: as in `cache_states`.
        pooling: as in `cache_states`.
    """

    def __init__(
        self, collator: Any, trunk: Trunk, *, dtype: StateDtype = "float32", pooling: Pooling = "tokens"
    ) -> None:
        self.collator, self.stored = collator, StateFormat(dtype, pooling)
        self.width, self.dtype = trunk.width, next(trunk.parameters()).dtype

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch with ``inputs_embeds`` and without ``input_ids``."""
        rest = [{name: value for name, value in row.items() if name != STATES_COLUMN} for row in features]
        batch = dict(self.collator(rest))
        ids = batch.pop("input_ids")
        columns = 1 if self.stored.pooling == "first" else ids.shape[1]
        padded = np.zeros((len(ids), columns, self.width * self.stored.torch_dtype.itemsize), dtype=np.uint8)
        for place, row in zip(padded, features, strict=True):
            states = np.frombuffer(row[STATES_COLUMN], dtype=np.uint8).reshape(-1, padded.shape[-1])
            place[: len(states)] = states
        batch["inputs_embeds"] = torch.from_numpy(padded).view(self.stored.torch_dtype).to(self.dtype)
        if self.stored.pooling == "first":
            del batch["attention_mask"]  # it is that of all tokens
        return batch


def _cache_split(split: Dataset, trunk: Trunk, folder: Path, stored: StateFormat, model_key: str, name: str) -> Dataset:
    """Add the states to one split."""
    from datasets import Dataset, concatenate_datasets

    if "input_ids" not in split.column_names or not len(split):
        raise DataError(
            f"{name} has {len(split)} rows and the columns {', '.join(split.column_names)}: expected rows with "
            "input_ids; call tokenize_dataset first"
        )
    if STATES_COLUMN in split.column_names:
        split = split.remove_columns(STATES_COLUMN)
    lengths, ids_key = measure_ids(split)
    key = hashlib.sha256(repr((model_key, ids_key, stored)).encode()).hexdigest()[:16]
    plan = _Plan(name, folder / key, stored, trunk.width, lengths)
    _make_shards(split, trunk, plan)
    states = concatenate_datasets([Dataset.from_file(str(plan.file(number))) for number in range(len(plan.shards))])
    in_order_of_shards = split.select(plan.order).flatten_indices()
    return concatenate_datasets([in_order_of_shards, states], axis=1).select(np.argsort(plan.order, kind="stable"))


@dataclass(frozen=True)
class _Plan:
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
        object.__setattr__(self, "order", np.argsort(-self.lengths, kind="stable"))
        object.__setattr__(self, "shards", _divide(self.stored.bytes_for(self.lengths, self.width)[self.order]))

    def file(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}.arrow"

    def bytes_of(self, number: int) -> int:
        return int(self.stored.bytes_for(self.lengths[self.order[self.shards[number]]], self.width).sum())


def _hash_model(trunk: Trunk) -> str:
    """Hash everything that the trunk's states depend on, except the tokens."""
    config = {name: value for name, value in trunk.esm.config.to_dict().items() if name not in _IRRELEVANT}
    device = next(trunk.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.sha256(repr((_FORMAT, sorted(config.items()), len(trunk.layers), autocast)).encode())
    for name, tensor in [*trunk.named_parameters(), *trunk.named_buffers()]:
        if not name.startswith("esm.contact_head."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor).data)
    return digest.hexdigest()


def measure_ids(split: Dataset) -> tuple[np.ndarray, str]:
    """Return the tokens per sequence, int64, and a hash of all token ids."""
    digest, lengths = hashlib.sha256(), []
    for block in split.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        ids, offsets = _ids_of(block)
        lengths.append(np.diff(offsets))
        digest.update(lengths[-1].astype(np.int64).data)
        digest.update(ids.astype(np.int32).data)
    return np.concatenate(lengths), digest.hexdigest()


def _ids_of(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of an Arrow table's rows, joined, and the offsets of the rows."""
    column = table["input_ids"].combine_chunks()
    offsets = column.offsets.to_numpy()
    return column.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]], offsets - offsets[0]


def _divide(sizes: np.ndarray) -> list[slice]:
    """Divide rows into shards of at most `_SHARD_BYTES`, or of one row."""
    shards, start, total = [], 0, 0
    for row, size in enumerate(sizes.tolist()):
        if row > start and total + size > _SHARD_BYTES:
            shards.append(slice(start, row))
            start, total = row, 0
        total += size
    return [*shards, slice(start, len(sizes))]


def _make_shards(split: Dataset, trunk: Trunk, plan: _Plan) -> None:
    """Write the shards that are missing or damaged; each rank writes its share."""
    rank, ranks = _rank_and_ranks()
    mine = range(rank, len(plan.shards), ranks)
    failure: BaseException | None = None
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number in mine if not _is_whole(plan.file(number))]
        _check_free_space(plan, missing)
        for number in tqdm(missing, desc=f"states of {plan.name}", unit="shard", disable=rank > 0 or None):
            _write_shard(split, trunk, plan, number)
    except OSError as error:
        failure = error
    if not _all_agree(failure is None):
        if failure is None:
            raise DataError(f"another rank could not write states to {plan.folder}; its message names the reason")
        raise DataError(
            f"the states could not be written to {plan.folder} ({failure}); "
            f"{format_bytes(_free_bytes(plan.folder))} are free there. Free space or give another "
            "folder, and run again: finished files are used again"
        ) from failure


def _write_shard(split: Dataset, trunk: Trunk, plan: _Plan, number: int) -> None:
    """Compute one shard, and write it under a temporary name until it is whole."""
    import pyarrow as pa

    path = plan.file(number)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with (
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_stream(sink, pa.schema([(STATES_COLUMN, pa.binary())])) as out,
        ):
            for rows in _batches(plan, number):
                states = pa.array(_compute(split, trunk, rows, plan.stored), pa.binary())
                out.write_table(pa.table({STATES_COLUMN: states}))
        _checksum_file(path).write_text(sha256_of(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _batches(plan: _Plan, number: int) -> Iterator[np.ndarray]:
    """Yield the rows of each forward pass of a shard, from the longest sequence to the shortest."""
    rows = plan.order[plan.shards[number]]
    start = 0
    while start < len(rows):
        size = max(1, _WORKING_TOKENS // int(plan.lengths[rows[start]]))
        yield rows[start : start + size]
        start += size


def _compute(split: Dataset, trunk: Trunk, rows: np.ndarray, stored: StateFormat) -> list[bytes]:
    """Return the states of some rows as bytes."""
    ids, offsets = _ids_of(split.with_format("arrow")[rows])
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, trunk.esm.config.pad_token_id, dtype=np.int64)
    padded[mask] = ids
    device = next(trunk.parameters()).device
    states = trunk(torch.from_numpy(padded).to(device), torch.from_numpy(mask.astype(np.int64)).to(device))
    if stored.pooling == "first":
        states, lengths = states[:, :1], np.ones_like(lengths)
    states = states.to(stored.torch_dtype).cpu()
    return [_bytes_of(row[:length]).tobytes() for row, length in zip(states, lengths.tolist(), strict=True)]


def _check_free_space(plan: _Plan, missing: Sequence[int]) -> None:
    needed = sum(plan.bytes_of(number) for number in missing)
    if needed > _free_bytes(plan.folder):
        raise OSError(errno.ENOSPC, f"the missing files need {format_bytes(needed)}")


def _free_bytes(folder: Path) -> int:
    """Free space of the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def _is_whole(path: Path) -> bool:
    """Whether a shard exists with the right checksum; a damaged shard is reported."""
    checksum = _checksum_file(path)
    if not path.is_file() or not checksum.is_file():
        return False
    if checksum.read_text() == sha256_of(path):
        return True
    logger.warning("%s is damaged: its checksum differs. It is made again", path)
    return False


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor as uint8."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _rank_and_ranks() -> tuple[int, int]:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _all_agree(fine: bool) -> bool:
    """Wait for all ranks, and return whether all are fine."""
    if _rank_and_ranks()[1] == 1:
        return fine
    answers: list[bool] = [False] * _rank_and_ranks()[1]
    torch.distributed.all_gather_object(answers, fine)
    return all(answers)
