"""Run a model over sequences in batches of similar length, and give the results in the order of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from esm_efficient.costs.devices import native_precision
from esm_efficient.data.batching import TokenBudgetBatchSampler
from esm_efficient.data.encoding import ResidueEncoder
from esm_efficient.encoder.packing import attach_packing, describe_batch, sent
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.inference.inputs import name_of
from esm_efficient.inference.windows import LongReading, Pieces, plan_windows, windows_for, windows_per_residue
from esm_efficient.out_of_memory import explained_batch
from esm_efficient.recipes import Precision
from esm_efficient.tasks import SPECIAL_TOKENS

_HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

Compute = Callable[..., torch.Tensor]
"""Takes ``input_ids`` and ``attention_mask``, int64 of shape (sequences, tokens); returns a row per sequence."""

Result = Literal["sequence", "residues", "mean", "weights"]
"""What is computed: numbers of a ``"sequence"``, whose mean over the windows is taken; numbers of each token, which are
returned for the ``"residues"``, as the mean where windows overlap, or as the ``"mean"`` over the residues of that; or
``"weights"`` of the tokens with the sum 1, which is also that of the mean over the windows."""


def run_in_batches(
    compute: Compute,
    encoder: ResidueEncoder,
    sequences: list[str],
    *,
    result: Result,
    half: torch.dtype | None = None,
    padding: int,
    device: torch.device,
    max_tokens: int,
    keep: LongReading | None,
    token_budget: int,
) -> list[np.ndarray]:
    """Return what a model computes from each sequence, float64.

    Args:
        compute: the model; it is called without gradient.
        encoder: makes the tokens.
        sequences: at least one, each a protein sequence.
        result: what the model computes; what it computes for special tokens and padding is left out.
        half: the number format of autocast; None for float32.
        padding: the id of the padding token.
        device: the device of the tokens.
        max_tokens: the most tokens per sequence, special tokens included.
        keep: as `Predictor.predict`.
        token_budget: as `Predictor.predict`.

    Raises:
        DataError: a sequence is too long.
        ConfigurationError: a result is not finite, or `keep` is unknown.
        OutOfMemoryError: the device has too little memory for a batch.
    """
    ids, offsets, pieces = _encode(encoder, sequences, max_tokens - SPECIAL_TOKENS, keep)
    lengths = pieces.residues + SPECIAL_TOKENS
    means = _Means(pieces, result)
    for batch in TokenBudgetBatchSampler(lengths, max(token_budget, int(lengths.max())), shuffle=False):
        tokens = np.full((len(batch), lengths[batch].max()), padding, dtype=np.int64)
        for row, piece in enumerate(batch):
            start = offsets[pieces.owner[piece]] + pieces.start[piece]
            tokens[row, : lengths[piece]] = ids[start : start + lengths[piece]]
            tokens[row, 0], tokens[row, lengths[piece] - 1] = encoder.cls, encoder.eos
        mask = torch.from_numpy((np.arange(tokens.shape[1]) < lengths[batch][:, None]).astype(np.int64))
        described, mask = describe_batch(mask), sent(mask, device)
        attach_packing(mask, described)  # so that the lean encoder need not read the mask from the device
        advice = {
            "several": f"Give a smaller budget than token_budget={token_budget}",
            "single": "use a smaller model, read only a part of long sequences with keep=",
        }
        with torch.inference_mode(), _autocast(device, half), explained_batch(tokens.shape, **advice):
            found: Any = compute(input_ids=sent(torch.from_numpy(tokens), device), attention_mask=mask)
            if result == "mean":
                shares = torch.from_numpy(means.shares(batch, tokens.shape[1]))
                found = (found * sent(shares, device).unsqueeze(-1)).sum(1)  # in float32 at least
            found = found.cpu().double().numpy()  # not on the device: an Apple GPU has no float64
        for piece, numbers in zip(batch, found, strict=True):
            means.add(piece, numbers)
    if bad := [name_of(sequences, i) for i in range(len(sequences)) if not np.isfinite(means.found[i]).all()]:
        raise ConfigurationError(
            f"the model's output for {len(bad)} of {len(sequences)} sequence(s) is not finite ({listing(bad)}): "
            "its training diverged, or its weights are damaged. Use another checkpoint"
            + (', or precision="float32" if float16 overflows' if half == torch.float16 else "")
        )
    return [means.found[index] for index in range(len(sequences))]


def half_of(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast for a precision of inference; None for float32.

    Raises:
        ConfigurationError: the precision is unknown, or is one of estimates alone.
    """
    if precision not in ("auto", "float32", *_HALF):
        raise ConfigurationError(f'precision={precision!r}: expected "auto", "float32", "bf16" or "fp16"')
    return _HALF.get(native_precision(device) if precision == "auto" else precision)


def _autocast(device: torch.device, half: torch.dtype | None) -> torch.autocast:
    """Return autocast to a dtype, if there is one.

    It keeps no copies of weights that require gradient: a forward pass reads each weight once.
    """
    return torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False)


def _encode(
    encoder: ResidueEncoder, sequences: list[str], longest: int, keep: LongReading | None
) -> tuple[np.ndarray, np.ndarray, Pieces]:
    """Return the tokens of all sequences, the place of each in them, and the windows to compute.

    Raises:
        DataError: a sequence is too long.
        ConfigurationError: `keep` is unknown.
    """
    windows = windows_for(keep, longest)
    part: Any = "start" if windows or keep is None else keep
    ids, offsets, residues = encoder(sequences, max_residues=None if windows else longest, keep=part)
    if keep is None and (long := np.flatnonzero(residues > longest)).size:
        named = [f"{name_of(sequences, i)} ({residues[i]})" for i in long.tolist()]
        raise DataError(
            f"{len(long)} sequence(s) have more than {longest} residues: {listing(named)}. Say which part to read with "
            'keep="start", keep="end" or keep="both", or read all of it with keep="windows"'
        )
    read = np.diff(offsets) - SPECIAL_TOKENS
    return ids, offsets, plan_windows(read, longest, 0 if windows is None else windows.overlap or 0)


class _Means:
    """The means over windows, to which each window is added when it is computed.

    Attributes:
        found: index of a sequence to its result.
    """

    def __init__(self, pieces: Pieces, result: Result) -> None:
        self.pieces, self.result = pieces, result
        self.found: dict[int, Any] = {}
        self._numbers = np.bincount(pieces.owner)
        self._overlaps = {
            owner: windows_per_residue(pieces, owner) for owner in np.flatnonzero(self._numbers > 1).tolist()
        }

    def shares(self, batch: list[int], width: int) -> np.ndarray:
        """Return the share of each token in the mean over the residues before their number divides it.

        Args:
            batch: indices of windows.
            width: tokens per row.

        Returns:
            float32 of shape (windows, tokens): 1 for a residue, less if several windows have it, 0 for other tokens.
        """
        shares = np.zeros((len(batch), width), dtype=np.float32)
        for row, piece in enumerate(batch):
            shares[row, 1 : self.pieces.residues[piece] + 1] = 1 / self._windows_of(piece)
        return shares

    def add(self, piece: int, numbers: np.ndarray) -> None:
        """Add what was computed from a window: a row, or a row per token, with special tokens and padding."""
        owner, start, count = (int(column[piece]) for column in self.pieces)
        if self.result in ("sequence", "mean"):
            parts = self._numbers[owner] if self.result == "sequence" else self._residues(owner)
            self.found[owner] = self.found.get(owner, 0) + numbers / parts
            return
        windows = self._numbers[owner] if self.result == "weights" else self._windows_of(piece)
        if owner not in self.found:
            self.found[owner] = np.zeros((self._residues(owner), *numbers.shape[1:]))
        self.found[owner][start : start + count] += (numbers[1 : count + 1].T / windows).T

    def _residues(self, owner: int) -> int:
        last = np.searchsorted(self.pieces.owner, owner, side="right") - 1
        return int(self.pieces.start[last] + self.pieces.residues[last])

    def _windows_of(self, piece: int) -> np.ndarray | int:
        """Return the number of windows with each residue of a window."""
        owner, start, count = (int(column[piece]) for column in self.pieces)
        overlaps = self._overlaps.get(owner)
        return 1 if overlaps is None else overlaps[start : start + count]
