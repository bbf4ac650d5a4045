"""The states of a frozen trunk: how they are stored, computed, pooled, and given to a model."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.out_of_memory import explained_batch
from esm_efficient.tasks import SPECIAL_TOKENS
from esm_efficient.trunk.split import Trunk, embeddings_of, layers_of

if TYPE_CHECKING:
    from datasets import Dataset

STATES_COLUMN = "states"
"""The column of the cached states: per sequence the bytes of an array of shape (states, width), and its format's."""

StateDtype = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["tokens", "first", "mean", "both"]
_PLACES: Mapping[Pooling, tuple[int, ...]] = {"first": (0,), "mean": (1,), "both": (0, 1)}
"""Where pooled states are in a model's input: it looks like a protein of one residue, the mean, after a first token."""


@dataclass(frozen=True)
class StateFormat:
    """How states are stored.

    Attributes:
        dtype: number format on disk. float32 is exact; a half precision needs half the space and rounds.
        pooling: ``"tokens"`` for the states of all tokens. If no layer trains, a head may need less: ``"first"`` for
            the state of the first token, which transformers' classification head reads; ``"mean"`` for the mean over
            residues, without the special tokens; ``"both"`` for these two.
    """

    dtype: StateDtype = "float32"
    pooling: Pooling = "tokens"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, ("float32", "bfloat16", "float16")),
            ("pooling", self.pooling, ("tokens", *_PLACES)),
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
        states = tokens if self.pooling == "tokens" else np.full_like(tokens, len(_PLACES[self.pooling]))
        return states * width * self.torch_dtype.itemsize + len(self.mark)

    @property
    def mark(self) -> bytes:
        """The byte that ends the bytes of each sequence, so that they are read as they were written.

        It is never zero: numpy drops zeros at the end of bytes, as a dataset of the format ``"numpy"`` or ``"torch"``
        returns them.
        """
        return bytes([_FORMATS.index((self.dtype, self.pooling)) + 1])

    @classmethod
    def of(cls, stored: bytes) -> StateFormat:
        """Return the format of the bytes of a sequence.

        Raises:
            DataError: they end with the mark of no format.
        """
        mark = stored[-1] if stored else 0
        if not 0 < mark <= len(_FORMATS):
            raise DataError(
                f"states end with the byte {mark}: expected 1 to {len(_FORMATS)}. They are damaged, or of another "
                "version: call cache_states again"
            )
        return cls(*_FORMATS[mark - 1])


_FORMATS = tuple(itertools.product(get_args(StateDtype), get_args(Pooling)))
"""Number formats and poolings; what is stored has their number, counted from 1."""


class StatesCollator:
    """A data collator that gives a model the cached states instead of token ids.

    It takes the column ``states`` away, lets another collator make the batch, and replaces ``input_ids`` by
    ``inputs_embeds`` of shape (rows, columns, width); states of tokens are where ``attention_mask`` is 1. With pooled
    states, the columns are those of a protein of one residue: the state of the first token, the mean over residues, and
    a last token. What is not stored is zero. So a head that reads the first token, or the mean over residues, finds
    what it reads at the usual place. ``"first"`` has one column and no ``attention_mask``.

    Args:
        collator: the collator of the other columns.
        trunk: the trunk that computed the states. The model gets them in the dtype of its weights, so that the numbers
            are those of a run without a cache.

    Raises:
        DataError: in a call, if an example has no states, or states of another format, width or number of tokens.
    """

    def __init__(self, collator: Any, trunk: Trunk) -> None:
        self.collator, self.width, self.dtype = collator, trunk.width, next(trunk.parameters()).dtype

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch with ``inputs_embeds`` and without ``input_ids``."""
        if any(STATES_COLUMN not in row for row in features):
            raise DataError(
                f"an example has no column {STATES_COLUMN}: expected what cache_states returned. transformers' "
                "Trainer drops the column: use WeightedTrainer, or TrainingArguments(remove_unused_columns=False)"
            )
        formats = {StateFormat.of(row[STATES_COLUMN]) for row in features}
        if len(formats) > 1:
            raise DataError(f"a batch has states of {len(formats)} formats: expected those of one call of cache_states")
        [stored], pooling = formats, next(iter(formats)).pooling
        rest = [{name: value for name, value in row.items() if name != STATES_COLUMN} for row in features]
        batch = dict(self.collator(rest))
        ids = batch["input_ids"]
        columns = {"tokens": ids.shape[1], "first": 1}.get(pooling, SPECIAL_TOKENS + 1)
        padded = np.zeros((len(ids), columns, self.width * stored.torch_dtype.itemsize), dtype=np.uint8)
        for number, row in enumerate(features):
            places = _places_of(pooling, batch, number)
            states = np.frombuffer(row[STATES_COLUMN], dtype=np.uint8)[:-1]
            if states.size != len(places) * padded.shape[-1]:
                raise DataError(
                    f"an example has {states.size} bytes of states: expected {len(places)} states of width "
                    f"{self.width}. They are those of other tokens or of another model"
                )
            padded[number, places] = states.reshape(len(places), -1)
        del batch["input_ids"]
        batch["inputs_embeds"] = torch.from_numpy(padded).view(stored.torch_dtype).to(self.dtype)
        if pooling == "first":
            batch.pop("attention_mask", None)  # it is that of all tokens
        elif pooling != "tokens":
            batch["attention_mask"] = torch.ones(padded.shape[:2], dtype=torch.long)
        return batch


def _places_of(pooling: Pooling, batch: Mapping[str, Any], row: int) -> list[int]:
    """Return the columns of a row's states in a model's input."""
    if pooling != "tokens":
        return list(_PLACES[pooling])
    mask = batch.get("attention_mask")  # a collator of sequences of one length may give none
    places: list[int] = np.flatnonzero(np.ones(batch["input_ids"].shape[1]) if mask is None else mask[row]).tolist()
    return places


def compute_states(split: Dataset, trunk: Trunk, rows: np.ndarray, stored: StateFormat) -> list[bytes]:
    """Return the states of some rows as bytes.

    Args:
        split: the tokenised split.
        trunk: the trunk.
        rows: indices of the rows; they make one batch.
        stored: how the states are stored.

    Raises:
        DataError: a state is not finite, or is too large for float16.
        OutOfMemoryError: the device has too little memory for the batch.
    """
    ids, offsets = ids_of(split.with_format("arrow")[rows])
    inputs = pad_batch(ids, offsets, trunk.esm.config.pad_token_id, next(trunk.parameters()).device)
    advice = "use a smaller model, or fewer tokens per sequence (max_tokens)"
    with explained_batch(inputs[0].shape, several=f"To cache states, {advice}", single=advice):
        states, lengths = trunk(*inputs, first_only=stored.pooling == "first"), np.diff(offsets)
    if stored.pooling != "tokens":
        pooled = [] if stored.pooling == "mean" else [states[:, 0].float()]
        pooled += [] if stored.pooling == "first" else [mean_over_residues(states, lengths)]
        states, lengths = torch.stack(pooled, dim=1), np.full_like(lengths, len(pooled))
    rounded = states.to(stored.torch_dtype).cpu()
    kept = [row[:length] for row, length in zip(rounded, lengths.tolist(), strict=True)]
    if wrong := [f"row {index}" for index, row in zip(rows.tolist(), kept, strict=True) if not row.isfinite().all()]:
        cure = "use bf16 or float32" if stored.dtype == "float16" else "the weights of the model are damaged"
        raise DataError(f"not finite in {stored.dtype} are the states of {listing(wrong)}: {cure}")
    return [bytes_of(row).tobytes() + stored.mark for row in kept]


def pad_batch(ids: np.ndarray, offsets: np.ndarray, padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the token ids of sequences and their attention mask, int64 of shape (sequences, longest).

    Args:
        ids: the token ids of all sequences, joined.
        offsets: the start of each sequence in `ids`, and the end of the last.
        padding: the id of padding.
        device: the device of the result.
    """
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, padding, dtype=np.int64)
    padded[mask] = ids
    return torch.from_numpy(padded).to(device), torch.from_numpy(mask.astype(np.int64)).to(device)


def mean_over_residues(states: Tensor, lengths: np.ndarray) -> Tensor:
    """Return the mean over the residues of each sequence, without its first and its last token, in float32.

    Args:
        states: shape (sequences, columns, width).
        lengths: tokens per sequence, special tokens included.

    Raises:
        DataError: a sequence has no residue.
    """
    if (lengths <= SPECIAL_TOKENS).any():
        raise DataError(
            f"a sequence has {lengths.min()} tokens: expected {SPECIAL_TOKENS} special tokens and at least one residue "
            "to take the mean over"
        )
    counts = torch.from_numpy(lengths).to(states.device)[:, None] - SPECIAL_TOKENS
    place = torch.arange(states.shape[1], device=states.device)
    is_residue = (place >= 1) & (place <= counts)
    return states.float().masked_fill(~is_residue[..., None], 0).sum(dim=1) / counts


def ids_of(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of an Arrow table's rows, joined, and the offsets of the rows."""
    import pyarrow as pa

    column = table["input_ids"].combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    offsets = column.offsets.to_numpy()
    return column.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]], offsets - offsets[0]


def bytes_of(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor as uint8."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def hash_weights(encoder: Any, layers: int, rounded: torch.dtype = torch.bfloat16) -> str:
    """Return a hash of the weights of an encoder's embeddings and lowest layers.

    They are rounded to bfloat16 for that, so that a model and its copy in bfloat16 have the same hash.

    Args:
        encoder: the encoder.
        layers: number of layers.
        rounded: what the weights are rounded to before; float16 gives the hash of a copy in float16.
    """
    digest = hashlib.sha256()
    for module in (embeddings_of(encoder), *list(layers_of(encoder))[:layers]):
        for name, parameter in module.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(bytes_of(parameter.to(rounded).to(torch.bfloat16)).data)
    return digest.hexdigest()[:16]
