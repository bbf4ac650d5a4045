"""What people call a model, as the config that it stands for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from esm_efficient.errors import ConfigurationError

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
    """The name and the config of what a user calls a model; the six ESM-2 sizes need no file and no network.

    Raises:
        ConfigurationError: no size and no folder has that name, or the config of a model id cannot be loaded.

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
            f"{str(model)!r} is no folder with a config.json and no ESM-2 size; there are {', '.join(ESM2_SIZES)}"
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
