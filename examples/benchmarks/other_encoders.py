"""ESM-2 encoders of other packages, with the weights of a transformers ``EsmModel``.

Each encoder takes ``input_ids`` and ``attention_mask`` and returns the last hidden states, of shape (rows, columns,
width).
"""

from __future__ import annotations

import importlib
import re

import torch
from torch import nn
from transformers import AutoModel

OTHERS = ("fair-esm", "faesm", "flex")


def build_other(name: str, model: nn.Module) -> nn.Module:
    """Build the encoder of another package with the weights of a model.

    Args:
        name: one of `OTHERS`: ``"fair-esm"`` for its ``ESM2``, ``"faesm"`` for FAESM, or ``"flex"`` for
            transformers' classes with torch's flex attention, as in FastPLMs.
        model: a transformers ``EsmModel``.

    Raises:
        Exception: the package cannot be imported or built on this machine.
    """
    builders = {"fair-esm": _fair_esm, "faesm": _faesm, "flex": _flex}
    return builders[name](model)


class _States(nn.Module):
    """Adapts fair-esm's encoder to transformers' arguments."""

    def __init__(self, encoder: nn.Module, layers: int) -> None:
        super().__init__()
        self.encoder, self.layers = encoder, layers

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states, of shape (rows, columns, width)."""
        return self.encoder(input_ids, repr_layers=[self.layers])["representations"][self.layers]


def _fair_esm(model: nn.Module) -> nn.Module:
    esm = importlib.import_module("esm")
    config = model.config
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    built = esm.model.esm2.ESM2(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, alphabet)
    parts = {
        "attention.self.query": "self_attn.q_proj",
        "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "attention.LayerNorm": "self_attn_layer_norm",
        "intermediate.dense": "fc1",
        "output.dense": "fc2",
        "LayerNorm": "final_layer_norm",
    }
    weights = {}
    for path, tensor in model.state_dict().items():
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", path)
        if layer:
            weights[f"layers.{layer[1]}.{parts[layer[2]]}.{layer[3]}"] = tensor
        elif path.startswith("encoder.emb_layer_norm_after"):
            weights[path.removeprefix("encoder.")] = tensor
        elif path == "embeddings.word_embeddings.weight":
            weights["embed_tokens.weight"] = tensor
    missing, unknown = built.load_state_dict(weights, strict=False)
    unread = ("contact_head", "lm_head", "rot_emb")
    unmatched = [name for name in missing if not any(part in name for part in unread)] + list(unknown)
    if unmatched:
        raise ValueError(f"these weights have no counterpart in the other model: {unmatched}")
    for part in (built.contact_head, built.lm_head):
        part.requires_grad_(False)
    return _States(built, config.num_hidden_layers)


def _faesm(model: nn.Module) -> nn.Module:
    module = importlib.import_module("faesm.esm")
    config = type(model.config).from_dict(model.config.to_dict())
    config.use_fa = False
    built = module.FAEsmModel(config, add_pooling_layer=False)
    built.load_state_dict(model.state_dict(), strict=False)
    return built


def _flex(model: nn.Module) -> nn.Module:
    built = AutoModel.from_config(model.config, attn_implementation="flex_attention", add_pooling_layer=False)
    built.load_state_dict(model.state_dict())
    return built
