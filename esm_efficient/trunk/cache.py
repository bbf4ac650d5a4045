"""Compute the states of a frozen trunk once per sequence, and keep them on disk."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.trunk.settings import matmul_precision, settings_of
from esm_efficient.trunk.shards import Plan, make_shards
from esm_efficient.trunk.split import Trunk
from esm_efficient.trunk.states import STATES_COLUMN, Pooling, StateDtype, StateFormat, bytes_of, ids_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Data = TypeVar("Data", bound="Dataset | DatasetDict")

_IRRELEVANT = (
    *("_name_or_path", "architectures", "classifier_pooling", "dtype", "id2label", "label2id", "label_thresholds"),
    *("num_hidden_layers", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
    *("transformers_version", "truncated_from"),
)
"""Settings of a config that do not change the states."""
_FORMAT = 3
"""Number of the cache's format. Another number makes the states again."""


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
    depend on: the trunk's weights, config, modules and their hooks, the dtype, the pooling, and the token ids. A
    changed model, file or option therefore has another subfolder. Files that exist and have the right checksum are used
    again; so a run that was killed goes on where it stopped. Under torch.distributed, each rank computes its share of
    the files, and `folder` must be the same for all.

    Args:
        dataset: splits, or one split, that `tokenize_dataset` returned.
        trunk: the trunk of `split_model`, on the device to compute on.
        folder: folder for the files.
        dtype: number format on disk: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        pooling: ``"tokens"``. For a trunk with all layers, also ``"first"`` for the first token alone, ``"mean"`` for
            the mean over residues, without special tokens, or ``"both"``. They are taken after the last layer norm.

    Returns:
        The dataset with the column ``states`` (bytes), in the same order of rows.

    Raises:
        DataError: the dataset is not tokenised, empty or padded, the disk is full, or a file cannot be written.
        ConfigurationError: an option is unknown, or `pooling` does not fit the trunk.
        OutOfMemoryError: the device has too little memory.

    Example:
        >>> trunk, rest = split_model(model, layers=2)  # doctest: +SKIP
        >>> data = cache_states(tokenize_dataset(data, tokenizer)[0], trunk, "states")  # doctest: +SKIP
    """
    from datasets import DatasetDict

    stored = StateFormat(dtype, pooling)
    if pooling != "tokens" and not trunk.whole:
        raise ConfigurationError(
            f"pooling={pooling!r}, but layers above the trunk train, which read the states of all tokens: give "
            'pooling="tokens", or split_model(model, layers=0)'
        )
    model_key, folder = _hash_model(trunk), Path(folder).expanduser()
    if isinstance(dataset, DatasetDict):
        return DatasetDict(
            {name: _cache_split(split, trunk, folder, stored, model_key, name) for name, split in dataset.items()}
        )
    return _cache_split(dataset, trunk, folder, stored, model_key, "states")


def _cache_split(split: Dataset, trunk: Trunk, folder: Path, stored: StateFormat, model_key: str, name: str) -> Dataset:
    """Add the states to one split."""
    from datasets import Dataset, Value, concatenate_datasets

    if "input_ids" not in split.column_names or not len(split):
        raise DataError(
            f"{name} has {len(split)} rows and the columns {', '.join(split.column_names)}: expected rows with "
            "input_ids; call tokenize_dataset first"
        )
    if STATES_COLUMN in split.column_names:
        if split.features[STATES_COLUMN] != Value("binary"):
            raise DataError(f"{name} has a column {STATES_COLUMN} that is not of cached states: rename it")
        split = split.remove_columns(STATES_COLUMN)
    if "attention_mask" in split.column_names and _has_padding(split):
        raise DataError(f"{name} has padding: expected sequences of their own length, as tokenize_dataset makes them")
    lengths, ids_key = measure_ids(split)
    plan = Plan(name, folder, stored, trunk.width, lengths)
    key = hashlib.sha256(repr((model_key, ids_key, stored, plan.shards)).encode()).hexdigest()[:16]
    plan = replace(plan, folder=folder / key)
    make_shards(split, trunk, plan)
    states = concatenate_datasets([Dataset.from_file(str(plan.file(number))) for number in range(len(plan.shards))])
    in_order_of_shards = split.select(plan.order).flatten_indices()
    return concatenate_datasets([in_order_of_shards, states], axis=1).select(np.argsort(plan.order, kind="stable"))


def _hash_model(trunk: Trunk) -> str:
    """Hash everything that the trunk's states depend on, except the tokens."""
    config = {name: value for name, value in trunk.esm.config.to_dict().items() if name not in _IRRELEVANT}
    device = next(trunk.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    modules = [settings_of(name, module) for name, module in trunk.named_modules()]
    facts = (_FORMAT, sorted(config.items()), modules, autocast, matmul_precision())
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in [*trunk.named_parameters(), *trunk.named_buffers()]:
        if not name.startswith("esm.contact_head."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor).data)
    return digest.hexdigest()


def _has_padding(split: Dataset) -> bool:
    import pyarrow.compute as pc

    blocks = split.select_columns("attention_mask").with_format("arrow").iter(batch_size=1000)
    return any(pc.min(pc.list_flatten(block["attention_mask"])).as_py() == 0 for block in blocks)


def measure_ids(split: Dataset) -> tuple[np.ndarray, str]:
    """Return the tokens per sequence, int64, and a hash of all token ids."""
    digest, lengths = hashlib.sha256(), []
    for block in split.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        ids, offsets = ids_of(block)
        lengths.append(np.diff(offsets))
        digest.update(lengths[-1].astype(np.int64).data)
        digest.update(ids.astype(np.int32).data)
    return np.concatenate(lengths), digest.hexdigest()
