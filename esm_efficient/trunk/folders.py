"""List the cached states of a folder, and delete those that are not needed any more."""

from __future__ import annotations

import json
import logging
import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esm_efficient.errors import ConfigurationError
from esm_efficient.reporting import format_bytes
from esm_efficient.trunk.shards import ABOUT, is_in_use
from esm_efficient.trunk.split import SkippedModule, has_adapters, only_encoder
from esm_efficient.trunk.states import hash_weights

logger = logging.getLogger(__name__)

_FILES = ("states-*.arrow", "states-*.sha256", f"{ABOUT}*")
_DAY = 24 * 60 * 60
_KINDS = {"split": str, "sequences": int, "layers": int, "dtype": str, "pooling": str, "weights": str}
"""What the file that describes states has."""


@dataclass(frozen=True)
class CachedStates:
    """The cached states of one split.

    Attributes:
        folder: their folder.
        split: name of the split.
        sequences: number of sequences.
        layers: number of layers below the states.
        dtype: number format on disk.
        pooling: as in `cache_states`.
        weights: a hash of the weights of these layers, rounded to bfloat16.
        size: bytes of the files.
        used: the time when a run last started to use them.
    """

    folder: Path
    split: str
    sequences: int
    layers: int
    dtype: str
    pooling: str
    weights: str
    size: int
    used: datetime

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.sequences:,} sequences of {self.split}, {self.layers} layers, {self.pooling} in "
            f"{self.dtype}, {format_bytes(self.size)}, last used {self.used:%Y-%m-%d %H:%M}"
        )


def list_states(folder: str | Path) -> list[CachedStates]:
    """Return the cached states in a folder, those that were not used for the longest time first.

    Args:
        folder: the folder that was given to `cache_states` or, as ``states_dir``, to `finetune`.

    Example:
        >>> from esm_efficient.trunk import list_states
        >>> list_states("no-states-yet")
        []
    """
    found = []
    for path in Path(folder).expanduser().glob(f"*/{ABOUT}"):
        if not re.fullmatch("[0-9a-f]{16}", path.parent.name):  # a folder of something else
            continue
        try:
            about = json.loads(path.read_text())
            entry = CachedStates(folder=path.parent, size=0, used=datetime.min, **about)
            is_damaged = any(type(getattr(entry, name)) is not kind for name, kind in _KINDS.items())
        except (ValueError, TypeError):
            is_damaged = True
        except FileNotFoundError:  # another process deletes it
            continue
        if is_damaged:
            logger.warning("%s is damaged: its states are not listed. Delete the folder", path)
            continue
        with suppress(FileNotFoundError):
            size = sum(file.stat().st_size for pattern in _FILES for file in path.parent.glob(pattern))
            used = datetime.fromtimestamp(path.stat().st_mtime)
            found.append(replace(entry, size=size, used=used))
    return sorted(found, key=lambda states: states.used)


def delete_states(
    folder: str | Path, *, unused_days: float | None = None, not_of: nn.Module | None = None
) -> list[CachedStates]:
    """Delete cached states that were not used for some time, or that are those of another model.

    With both options, states are deleted that meet both. States that a living process is computing stay. Nothing but
    the files of `cache_states` is deleted.

    Args:
        folder: as in `list_states`.
        unused_days: delete states that no run has started to use for this number of days.
        not_of: delete states that do not belong to this model, as it is before training, or to its copy in half
            precision: its weights below the states are others. It has no adapters.

    Returns:
        What was deleted.

    Raises:
        ConfigurationError: neither option is given, or the model has adapters, lacks layers, or cannot be split.

    Example:
        >>> from esm_efficient.trunk import delete_states
        >>> delete_states("no-states-yet", unused_days=30)
        []
    """
    if unused_days is None and not_of is None:
        raise ConfigurationError("neither unused_days nor not_of is given: all states would be deleted. Give one")
    states = list_states(folder)
    if unused_days is not None:
        states = [entry for entry in states if entry.used.timestamp() <= time.time() - unused_days * _DAY]
    if not_of is not None:
        encoder = _whole_encoder(not_of)
        own = {
            hash_weights(encoder, layers, dtype)
            for layers in {entry.layers for entry in states}
            for dtype in (torch.bfloat16, torch.float16)
        }
        states = [entry for entry in states if entry.weights not in own]
    deleted = [entry for entry in states if not is_in_use(entry.folder)]
    for entry in deleted:
        for pattern in _FILES:
            for path in entry.folder.glob(pattern):
                path.unlink(missing_ok=True)
        if entry.folder.is_dir() and not any(entry.folder.iterdir()):
            entry.folder.rmdir()
        logger.info("deleted %s", entry)
    return deleted


def _whole_encoder(model: nn.Module) -> Any:
    """Return the encoder of a model, or refuse a model whose weights are not those before training."""
    if has_adapters(model):
        raise ConfigurationError("the model has adapters: give the model that they were added to")
    if any(isinstance(module, SkippedModule) for module in model.modules()):
        raise ConfigurationError("the model is the rest that split_model returned: give the whole model")
    return only_encoder(model)[0]
