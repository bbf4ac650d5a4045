"""Compute the states of every layer in one pass, and keep of them what a probe reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from datasets.utils import tqdm
from torch import Tensor, nn

from esm_efficient.data.batching import TokenBudgetBatchSampler
from esm_efficient.encoder import apply_lean_encoder
from esm_efficient.encoder.forward import esm_models
from esm_efficient.errors import ConfigurationError
from esm_efficient.out_of_memory import explained_batch
from esm_efficient.trunk.cache import measure_ids
from esm_efficient.trunk.split import Trunk, copy_modules, has_adapters, layers_of, only_encoder
from esm_efficient.trunk.states import STATES_COLUMN, StatesCollator, ids_of, mean_over_residues, pad_batch

if TYPE_CHECKING:
    from datasets import Dataset

Reading = Literal["first", "mean"]
"""What a probe reads of a sequence: the state of the first token, or the mean over residues."""

_ADVICE = {"several": "Give a smaller token_budget", "single": "use a smaller model, or a smaller max_tokens"}
"""What to do if a batch is too large for the device."""


class _Recorder(nn.Module):
    """Stands around a layer, and shows the states that enter the layer to a function.

    Args:
        layer: the layer.
        show: called with the states, of shape (rows, columns, width).
    """

    takes_packed_tokens = True
    """Read by the lean encoder, which otherwise would run as in transformers."""

    def __init__(self, layer: nn.Module, show: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.layer, self._show = layer, show

    def forward(self, input: Tensor, *args: Any, packing: Any = None, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        self._show(input if packing is None else packing.unpack(input))
        return self.layer(input, *args, **kwargs | ({} if packing is None else {"packing": packing}))


class LayerReader:
    """Runs an encoder once per batch, and reads the states of its layers.

    The states are those that transformers names ``hidden_states``: those of the embeddings (layer 0), those after each
    layer, and of the last layer those after the last layer norm.

    Args:
        model: a model of transformers that `split_model` splits, on the device to compute on. It stays as it is.
        trunk: if `model` is the rest that `split_model` returned, its trunk, on the same device. The states are then
            read from the layer on that the trunk ends with.
        collator: the `StatesCollator` of splits with cached states of all tokens. The trunk does not run for these.

    Attributes:
        layers: number of layers of the encoder.
        numbers: the layers that are read.

    Raises:
        ConfigurationError: the model has no such encoder, several, or adapters.
    """

    def __init__(self, model: nn.Module, *, trunk: Trunk | None = None, collator: StatesCollator | None = None) -> None:
        if has_adapters(model):
            raise ConfigurationError(
                "the model has adapters: give model.merge_and_unload(), or the model without them (model.unload())"
            )
        encoder = copy_modules(only_encoder(model)[0], *([] if trunk is None else [trunk])).eval()
        encoder.pooler = None
        layers, self._trunk, self._collator = layers_of(encoder), trunk, collator
        self.layers = len(layers)
        self.numbers = tuple(range(0 if trunk is None else len(trunk.layers), self.layers + 1))
        for number in self.numbers[:-1]:
            layers[number] = _Recorder(layers[number], self._read)
        self.encoder = apply_lean_encoder(encoder) if any(True for _ in esm_models(encoder)) else encoder
        self._reduce: Callable[[Tensor], Tensor] = lambda states: states
        self._found: list[Tensor | None] = []
        self._wanted: Sequence[int] = self.numbers

    def pool(
        self,
        split: Dataset,
        readings: Sequence[Reading],
        *,
        token_budget: int,
        name: str,
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Read the state of the first token, or the mean over residues, of each sequence.

        Args:
            split: a tokenised split.
            readings: what to read.
            token_budget: the most tokens per batch, padding included.
            name: name of the split, for the progress bar.
            layers: the layers whose states are kept, in ascending order, of `numbers`; None for all of these.

        Returns:
            float32 of shape (layers, readings, sequences, width).

        Raises:
            OutOfMemoryError: the device has too little memory for a batch.
        """
        self._wanted = self.numbers if layers is None else layers
        result: np.ndarray | None = None
        for rows, lengths, batch in self._batches(split, token_budget, name):
            found = self._run(batch, partial(_pool, lengths=lengths, readings=readings))
            if result is None:
                result = np.empty((*found.shape[:2], len(split), found.shape[-1]), dtype=np.float32)
            result[:, :, rows] = found
        assert result is not None  # a split has rows
        return result

    def select(
        self,
        split: Dataset,
        rows: np.ndarray,
        columns: np.ndarray,
        *,
        token_budget: int,
        name: str,
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Read the states of some tokens; the other arguments are those of `pool`.

        Args:
            split: a tokenised split.
            rows: the sequence of each token, in ascending order.
            columns: the place of each token in its sequence.
            token_budget: as in `pool`.
            name: as in `pool`.
            layers: as in `pool`.

        Returns:
            float32 of shape (layers, 1, tokens, width).
        """
        self._wanted = self.numbers if layers is None else layers
        chosen, starts = np.unique(rows, return_index=True)
        ends = np.append(starts[1:], len(rows))
        result: np.ndarray | None = None
        for batch_rows, _, batch in self._batches(split.select(chosen), token_budget, name):
            places = np.concatenate([np.arange(starts[row], ends[row]) for row in batch_rows])
            sequences = np.repeat(np.arange(len(batch_rows)), (ends - starts)[batch_rows])
            found = self._run(batch, partial(_select, sequences=sequences, columns=columns[places]))
            if result is None:
                result = np.empty((*found.shape[:2], len(rows), found.shape[-1]), dtype=np.float32)
            result[:, :, places] = found
        assert result is not None  # there are tokens
        return result

    def tokens(
        self, split: Dataset, layer: int, *, token_budget: int, name: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the states of all tokens of one layer, batch by batch; the arguments are those of `pool`.

        Yields:
            The rows of a batch, and float32 of shape (tokens, width): the tokens of these rows, one row after the
            other.
        """
        for rows, lengths, batch in self._batches(split, token_budget, name):
            self._wanted = (layer,)
            sequences = np.repeat(np.arange(len(rows)), lengths)
            columns = np.concatenate([np.arange(length) for length in lengths])
            yield rows, self._run(batch, partial(_select, sequences=sequences, columns=columns))[0, 0]

    def _batches(self, split: Dataset, token_budget: int, name: str) -> Any:
        """Yield the rows, the lengths, and the encoder's inputs of each batch, from the longest sequence on."""
        lengths, _ = measure_ids(split)
        sampler = TokenBudgetBatchSampler(lengths, max(token_budget, int(lengths.max())), shuffle=False)
        with tqdm(total=int(lengths.sum()), desc=f"layers of {name}", unit="token", unit_scale=True) as progress:
            for batch in sampler:
                rows = np.array(batch)
                yield rows, lengths[rows], self._inputs(split, rows)
                progress.update(int(lengths[rows].sum()))

    @torch.no_grad()
    def _inputs(self, split: Dataset, rows: np.ndarray) -> dict[str, Tensor]:
        """Return what the encoder takes: tokens, or states of a trunk."""
        device = next(self.encoder.parameters()).device
        if self._collator is not None and STATES_COLUMN in split.column_names:
            names = [name for name in ("input_ids", "attention_mask", STATES_COLUMN) if name in split.column_names]
            chosen = split.select_columns(names).select(rows)
            return {key: value.to(device) for key, value in self._collator(list(chosen)).items()}
        ids, offsets = ids_of(split.with_format("arrow")[rows])
        tokens, mask = pad_batch(ids, offsets, self.encoder.config.pad_token_id, device)
        if self._trunk is None:
            return {"input_ids": tokens, "attention_mask": mask}
        with explained_batch(tokens.shape, **_ADVICE):
            return {"inputs_embeds": self._trunk(tokens, mask), "attention_mask": mask}

    @torch.no_grad()
    def _run(self, inputs: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Return what a function reads of the states of each layer that is wanted, stacked."""
        self._reduce, self._found = reduce, []
        with explained_batch(inputs["attention_mask"].shape, **_ADVICE):
            self._read(self.encoder(**inputs).last_hidden_state)
        return torch.stack([found for found in self._found if found is not None]).cpu().numpy()

    def _read(self, states: Tensor) -> None:
        wanted = self.numbers[len(self._found)] in self._wanted
        self._found.append(self._reduce(states) if wanted else None)


def _pool(states: Tensor, lengths: np.ndarray, readings: Sequence[Reading]) -> Tensor:
    """Return pooled states in float32, of shape (readings, sequences, width)."""
    return torch.stack(
        [states[:, 0].float() if reading == "first" else mean_over_residues(states, lengths) for reading in readings]
    )


def _select(states: Tensor, sequences: np.ndarray, columns: np.ndarray) -> Tensor:
    """Return the states of some tokens in float32, of shape (1, tokens, width)."""
    return states[sequences, columns][None].float()
