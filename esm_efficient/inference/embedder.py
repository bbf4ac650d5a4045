"""Compute embeddings: the states of one layer, per residue or pooled over a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esm_efficient.data.arrow_tables import OnError
from esm_efficient.data.encoding import ResidueEncoder, longest_input
from esm_efficient.encoder import apply_lean_encoder_if_supported, has_lean_encoder
from esm_efficient.errors import ConfigurationError
from esm_efficient.inference.batches import half_of, run_in_batches
from esm_efficient.inference.files import FileResult, map_file
from esm_efficient.inference.identity import identity_of
from esm_efficient.inference.inputs import sequences_from, source_file
from esm_efficient.inference.loading import default_device, find_folder, load_encoder, load_model, place
from esm_efficient.inference.windows import LongReading, describe_reading, refuse_joined_ends, windows_for
from esm_efficient.published import BASE_CONFIG, hub_name, no_model_in
from esm_efficient.recipes import Precision
from esm_efficient.reporting.files import written_as
from esm_efficient.tasks import SPECIAL_TOKENS, base_model_of
from esm_efficient.trunk.split import copy_modules, split_model

EmbeddingPooling = Literal["mean", "first", "residues"]
"""``"mean"`` over the residues, the ``"first"`` token (``<cls>``), or one embedding for each of the ``"residues"``."""

RESIDUE_BLOCK_ROWS = 64
"""Sequences per block with embeddings per residue: for 650M and 500 residues, 64 have 164 MB."""


class Embedder:
    """Computes embeddings of sequences with the lean encoder.

    Args:
        model: a transformers ESM-2 model, with or without a head. It is put into evaluation mode.
        tokenizer: its tokenizer.
        layer: the layer whose states are the embeddings, from 0 (the token embeddings) to the number of layers. None
            for the last, after the layer norm that follows it, as transformers' ``last_hidden_state``; the others are
            transformers' ``hidden_states[layer]``. The layers above are not computed.
        pooling: ``"mean"`` over the residues without the special tokens, ``"first"`` for the first token, or
            ``"residues"`` for one embedding per residue.
        max_tokens: the most tokens per sequence, special tokens included.
        precision: as `Predictor`; embeddings in half precision differ by about a hundredth of their size.

    Attributes:
        width: numbers per embedding.
        half: the dtype of autocast; None for float32.

    Raises:
        ConfigurationError: the layer does not exist, the pooling or the precision is unknown, or the model or its
            tokenizer is not of ESM-2.

    Example:
        >>> from esm_efficient import demo_model_path
        >>> embedder = Embedder.load(demo_model_path(), layer=2)
        >>> embedder.embed(["MKTAYIAKQR", "MALWMR"])[0].shape
        (128,)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layer: int | None = None,
        pooling: EmbeddingPooling = "mean",
        max_tokens: int | None = None,
        precision: Precision = "auto",
    ) -> None:
        if pooling not in get_args(EmbeddingPooling):
            raise ConfigurationError(f"pooling={pooling!r}: expected one of {', '.join(get_args(EmbeddingPooling))}")
        body: Any = base_model_of(model).base_model.eval()
        layers = body.config.num_hidden_layers
        if layer not in (None, layers) and body is not model.base_model:
            raise ConfigurationError(
                f"layer={layer}: the model has adapters. Load it from its folder with Embedder.load, or give a merged "
                "copy: copy.deepcopy(model).merge_and_unload()"
            )
        if layer is not None and not 0 <= layer <= layers:
            raise ConfigurationError(f"layer={layer}: expected 0 to {layers}; the last is read if no layer is given")
        max_tokens = longest_input(tokenizer) if max_tokens is None else max_tokens
        if max_tokens <= SPECIAL_TOKENS:
            raise ConfigurationError(
                f"max_tokens={max_tokens}: expected room for a residue beside {SPECIAL_TOKENS} special tokens"
            )
        self.pooling, self.max_tokens = pooling, max_tokens
        self.half = half_of(precision, model.device)
        self.encoder, self.padding = ResidueEncoder(tokenizer), tokenizer.pad_token_id
        self.config: Any = body.config
        self.width: int = body.config.hidden_size
        self.model: Any = body
        self._forward: Any
        if layer in (None, layers):
            lean: Any = body if has_lean_encoder(body) else apply_lean_encoder_if_supported(body)
            self._forward = lambda ids, mask: lean(ids, attention_mask=mask).last_hidden_state
        else:
            flags = {parameter: parameter.requires_grad for parameter in body.parameters()}
            self.model = self._forward = split_model(copy_modules(body), layers - layer)[0]
            for parameter, flag in flags.items():  # the split freezes what it shares with the model
                parameter.requires_grad_(flag)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        layer: int | None = None,
        pooling: EmbeddingPooling = "mean",
        device: str | torch.device | None = None,
        max_tokens: int | None = None,
        precision: Precision = "auto",
    ) -> Embedder:
        """Load a model from a folder or from the Hub; an adapter that `finetune` saved is merged with its base model.

        Args:
            name_or_path: the folder or the Hub name of a model or of an adapter, or an ESM-2 size such as ``"650M"``.
            layer: as `Embedder`.
            pooling: as `Embedder`.
            device: as `Predictor.load`.
            max_tokens: as `Embedder`.
            precision: as `Embedder`.

        Raises:
            ConfigurationError: as `Embedder` and `Predictor.load`, or the folder lacks weights of the encoder.
        """
        given = hub_name(name_or_path) if isinstance(name_or_path, str) else name_or_path
        folder = find_folder(given, None, None)
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigurationError(no_model_in(folder))
        model: Any
        if (folder / "adapter_config.json").is_file():
            if not (folder / BASE_CONFIG).is_dir():
                raise ConfigurationError(
                    f"{folder} is an adapter that peft saved, without {BASE_CONFIG}/: merge it into its base model "
                    "(merge_and_unload), save that with its tokenizer, and give its folder"
                )
            model, tokenizer = load_model(folder, revision=None, cache_dir=None, task=None)
        else:
            model, tokenizer = load_encoder(folder)
        on_device = place(model, default_device() if device is None else device)
        return cls(on_device, tokenizer, layer=layer, pooling=pooling, max_tokens=max_tokens, precision=precision)

    def embed(
        self, sequences: Iterable[str], *, keep: LongReading | None = None, token_budget: int = 8192
    ) -> list[np.ndarray]:
        """Return the embedding of each sequence.

        Args:
            sequences: as `Predictor.predict`.
            keep: as `Predictor.predict`. Of ``"windows"``, the states of a residue are averaged over the windows that
                have it, and ``"mean"`` is the mean of that; ``"first"`` is the mean of the windows' first tokens.
            token_budget: as `Predictor.predict`.

        Returns:
            float32 of shape (width,) per sequence, or of shape (residues, width) with ``pooling="residues"``: those
            that `keep` reads, in their order.

        Raises:
            DataError: as `Predictor.predict`.
            ConfigurationError: a result is not finite.
        """
        texts = sequences_from(sequences)
        if not texts:
            return []
        found = run_in_batches(
            self._states,
            self.encoder,
            texts,
            result="sequence" if self.pooling == "first" else self.pooling,
            half=self.half,
            padding=self.padding,
            device=next(self.model.parameters()).device,
            max_tokens=self.max_tokens,
            keep=keep,
            token_budget=token_budget,
        )
        return [embedding.astype(np.float32) for embedding in found]

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the states of the tokens, of shape (sequences, tokens, width), or those of the first tokens."""
        states = self._forward(input_ids, attention_mask)
        return states[:, 0] if self.pooling == "first" else states


def embed_file(
    model: str | Path | Embedder,
    source: Any,
    output: str | Path,
    *,
    layer: int | None = None,
    pooling: EmbeddingPooling = "mean",
    keep: LongReading | None = None,
    token_budget: int = 8192,
    shard: tuple[int, int] = (1, 1),
    sequence: str | None = None,
    accession: str | None = None,
    precision: Precision = "auto",
    on_error: OnError = "raise",
) -> FileResult:
    """Embed every sequence of a file, and write the embeddings in the order of the file.

    A run that was stopped goes on, and ranks share the work, as with `predict_file`. The output has the columns
    ``accession`` and ``embedding``, a list of float32; with ``pooling="residues"`` a list of such lists. An accession
    that a spreadsheet would run as a formula has an apostrophe before it in CSV alone, as with `predict_file`.

    Args:
        model: an `Embedder`, or what `Embedder.load` loads.
        source: as `predict_file`.
        output: as `predict_file`. Parquet is the smallest.
        layer: as `Embedder`; of a model that is loaded.
        pooling: as `Embedder`; of a model that is loaded.
        keep: as `Predictor.predict`.
        token_budget: as `Predictor.predict`.
        shard: as `predict_file`.
        sequence: as `predict_file`.
        accession: as `predict_file`.
        precision: as `Embedder`; of a model that is loaded.
        on_error: as `predict_file`.

    Returns:
        The numbers of rows and residues, and the time.

    Raises:
        DataError: as `predict_file`.
        ConfigurationError: as `predict_file` and `Embedder.load`; embeddings per residue are to be written as CSV; or
            a `layer` or a `precision` is given beside an `Embedder`, or a `pooling` other than ``"mean"`` that is not
            its own.

    Example:
        >>> embed_file("facebook/esm2_t6_8M_UR50D", "proteome.fasta", "embeddings.parquet")  # doctest: +SKIP
    """
    kind = written_as(output, source=source)
    if isinstance(model, Embedder):
        if layer is not None or pooling not in ("mean", model.pooling) or precision != "auto":
            raise ConfigurationError(
                f"layer={layer}, pooling={pooling!r}, precision={precision!r}: the Embedder has its own layer, pooling "
                f"({model.pooling!r}) and precision. Give them to the Embedder alone"
            )
        pooling = model.pooling
    if pooling == "residues":
        refuse_joined_ends(keep)
        if kind == "csv":
            raise ConfigurationError(f"{output}: embeddings per residue do not fit into CSV. Write .parquet or .jsonl")
    embedder = model
    if not isinstance(embedder, Embedder):
        embedder = Embedder.load(embedder, layer=layer, pooling=pooling, precision=precision)

    def compute(sequences: list[str]) -> Mapping[str, Any]:
        import pyarrow as pa

        found = embedder.embed(sequences, keep=keep, token_budget=token_budget)
        values = np.concatenate(found) if embedder.pooling == "residues" else np.stack(found)
        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), embedder.width)
        if embedder.pooling != "residues":
            return {"embedding": embeddings}
        ends = np.cumsum([0, *map(len, found)]).astype(np.int32)
        return {"embedding": pa.ListArray.from_arrays(pa.array(ends), embeddings)}

    longest = embedder.max_tokens - SPECIAL_TOKENS
    options = (embedder.pooling, embedder.half, longest, windows_for(keep, longest) or keep)
    with source_file(source) as path:
        return map_file(
            compute,
            path,
            output,
            identity=identity_of(embedder.model, embedder.config, "embeddings", *options),
            longest=longest if keep is None else None,
            long_sequences=describe_reading(keep, longest),
            shard=shard,
            sequence=sequence,
            accession=accession,
            on_error=on_error,
            description="embeddings",
            block_rows=RESIDUE_BLOCK_ROWS if embedder.pooling == "residues" else None,
        )
