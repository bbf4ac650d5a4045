"""The inputs of `estimate`: the config of a model, and the tokens of its sequences."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from esm_efficient.data.sequences import clean, count_residues
from esm_efficient.errors import ConfigurationError
from esm_efficient.tasks import SPECIAL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ESM2_SIZES: dict[str, tuple[int, int, int]] = {
    "8M": (6, 320, 20),
    "35M": (12, 480, 20),
    "150M": (30, 640, 20),
    "650M": (33, 1280, 20),
    "3B": (36, 2560, 40),
    "15B": (48, 5120, 40),
}
"""The published ESM-2 models: layers, width, attention heads (Lin et al. 2023, "Evolutionary-scale prediction...")."""


def resolve_config(model: str | Path | PreTrainedConfig | PreTrainedModel) -> tuple[str, PreTrainedConfig]:
    """Return the name and the config of a model; the six ESM-2 sizes need no file and no network.

    Args:
        model: as in `estimate`.

    Raises:
        ConfigurationError: no size and no folder has this name, or the config of a model id cannot be loaded.

    Example:
        >>> resolve_config("facebook/esm2_t12_35M_UR50D")[1].hidden_size
        480
    """
    from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

    model = getattr(model, "get_base_model", lambda: model)()
    if isinstance(model, PreTrainedModel):
        return type(model).__name__, model.config
    if isinstance(model, PreTrainedConfig):
        return type(model).__name__, model
    if (Path(model) / "config.json").is_file():
        return Path(model).resolve().name, AutoConfig.from_pretrained(model)
    published = re.fullmatch(r"(?:(?:facebook/)?esm2_t\d+_)?(\d+[MB])(?:_UR50D)?", str(model))
    if published is None and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        try:
            return str(model), AutoConfig.from_pretrained(model)
        except OSError as error:
            raise ConfigurationError(f"the config of {str(model)!r} could not be loaded: {error}") from error
    if published is None or published[1] not in ESM2_SIZES:
        raise ConfigurationError(
            f"model={str(model)!r}: expected a folder with a config.json, a model id, or one of the ESM-2 sizes "
            f"{', '.join(ESM2_SIZES)}"
        )
    return f"ESM-2 {published[1]}", _esm2_config(*ESM2_SIZES[published[1]])


def _esm2_config(layers: int, width: int, heads: int) -> PreTrainedConfig:
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=1026,
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
    )


def token_lengths(tokens: Any) -> int | list[int]:
    """Return the tokens of one sequence or of many, special tokens included.

    Args:
        tokens: a number; many numbers; or a dataset with one of the columns ``tokens``, ``input_ids``, ``residues`` or
            ``sequence``. Two special tokens are added to residues. In a DatasetDict the split ``train`` is read.

    Raises:
        ConfigurationError: there is no sequence, or the dataset has none of these columns.

    Example:
        >>> token_lengths(512), token_lengths([100, 200])
        (512, [100, 200])
    """
    if isinstance(tokens, numbers.Integral):
        return int(tokens)
    data = tokens["train"] if isinstance(tokens, dict) and "train" in tokens else tokens
    columns = getattr(data, "column_names", None)
    if columns is None:
        lengths = [int(n) for n in data]
    elif "tokens" in columns:
        lengths = [int(n) for n in data["tokens"]]
    elif "input_ids" in columns:
        lengths = [len(ids) for ids in data["input_ids"]]
    elif "residues" in columns:
        lengths = [int(n) + SPECIAL_TOKENS for n in data["residues"]]
    elif "sequence" in columns:
        lengths = [count_residues(clean(sequence)) + SPECIAL_TOKENS for sequence in data["sequence"]]
    else:
        raise ConfigurationError(
            f"the dataset has the columns {', '.join(columns)}: expected one of tokens, input_ids, residues, sequence. "
            "Rename a column of lengths to tokens or to residues"
        )
    if not lengths:
        raise ConfigurationError("tokens: got no sequence; expected at least one")
    return lengths


class BatchTokens(NamedTuple):
    """Tokens per sequence in micro-batches, padding included.

    Attributes:
        longest: tokens per sequence in the micro-batch of the longest sequences.
        average: mean tokens per sequence over random micro-batches.
        residues: mean residues per sequence, without padding.
    """

    longest: int
    average: int
    residues: float


def batch_lengths(lengths: Sequence[int], micro_batch: int, padding: str) -> BatchTokens:
    """Return the tokens per sequence of the largest and of the average micro-batch, from the tokens of all sequences.

    A padded sequence takes as many tokens as the longest one in its micro-batch.
    """
    ordered = np.sort(np.asarray(lengths))[::-1]
    residues = float(np.mean(np.maximum(ordered - SPECIAL_TOKENS, 0)))
    if padding == "padding-free":
        return BatchTokens(math.ceil(ordered[:micro_batch].mean()), round(ordered.mean()), residues)
    drawn = np.random.default_rng(0).choice(ordered, size=(1000, micro_batch))
    return BatchTokens(int(ordered[0]), round(drawn.max(axis=1).mean()), residues)
