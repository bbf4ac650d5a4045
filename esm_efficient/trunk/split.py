"""Split an ESM-2 model into the frozen trunk and the rest, put both together again, and cut layers off."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from esm_efficient.encoder import apply_lean_encoder, remove_lean_encoder
from esm_efficient.encoder.forward import esm_models
from esm_efficient.errors import ConfigurationError

Model = TypeVar("Model", bound=nn.Module)


class SkippedLayer(nn.Module):
    """Stands at the place of a layer that another module computes, and returns its input.

    It keeps the numbers of the other layers, and so the names of their parameters. The state dict contains the layer's
    weights, so that a checkpoint is that of an ordinary model; when a state dict is loaded they are left alone.

    Args:
        layer: the layer that another module computes.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that its parameters are not those of this module
        self.register_state_dict_post_hook(_add_layer)
        self.register_load_state_dict_pre_hook(_leave_layer_out)

    def forward(self, hidden_states: Tensor, packing: Any = None, first_only: bool = False, **kwargs: Any) -> Tensor:
        """Return the states; with `first_only`, as the last layer of the lean encoder does, those of first tokens."""
        if not first_only:
            return hidden_states
        return hidden_states.index_select(0, torch.tensor(packing.first_tokens, device=hidden_states.device))


def _add_layer(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    state_dict.update({prefix + name: value for name, value in module._layer[0].state_dict().items()})


def _leave_layer_out(module: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]


class Trunk(nn.Module):
    """The embeddings and the lowest layers of an ESM-2 model, frozen.

    Args:
        esm: an ``EsmModel`` that has only these layers, and no layer norm after them.

    Attributes:
        esm: the ``EsmModel``, with the lean encoder.
    """

    def __init__(self, esm: Any) -> None:
        super().__init__()
        self.esm = apply_lean_encoder(esm.requires_grad_(False).eval())

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, from the lowest to the highest."""
        return list(self.esm.encoder.layer)

    @property
    def width(self) -> int:
        """Width of the states."""
        return cast(int, self.esm.config.hidden_size)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute what enters the lowest layer that is not in the trunk.

        Args:
            input_ids: token ids, int64 of shape (rows, columns).
            attention_mask: 1 for tokens and 0 for padding, of the same shape.

        Returns:
            The states, of shape (rows, columns, width).
        """
        return self.esm(input_ids, attention_mask=attention_mask).last_hidden_state

    def train(self, mode: bool = True) -> Trunk:
        """Stay in evaluation mode: a trunk is constant."""
        return super().train(False)


def split_model(model: Model, layers: int) -> tuple[Trunk, Model]:
    """Split a model into its frozen trunk and the rest: its top layers and its head.

    Both share their parameters with the model; those of the trunk no longer train. The trunk takes tokens and returns
    states. The rest has the model's class, config and state dict, but not the parameters of the trunk's layers; it
    takes ``inputs_embeds``, the trunk's states, instead of ``input_ids``. Therefore ``rest(inputs_embeds=trunk(ids,
    mask), attention_mask=mask)`` equals ``model(ids, mask)``.

    Args:
        model: a transformers ESM-2 model with any head and without adapters. A lean encoder on it is removed.
        layers: number of top layers in the rest; 0 for the head alone. The layer norm after the last layer belongs to
            the rest.

    Returns:
        The trunk, and the rest.

    Raises:
        ConfigurationError: the model has no ``EsmModel`` or several, has adapters or dropout below the top layers, or
            has fewer layers.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> trunk, rest = split_model(model, layers=1)
        >>> type(rest).__name__
        'EsmForSequenceClassification'
    """
    esm = _only_esm(model)
    count = len(esm.encoder.layer)
    if not 0 <= layers <= count:
        raise ConfigurationError(f"layers={layers}: expected 0 to {count} top layers of this model")
    if hasattr(model, "peft_config"):
        raise ConfigurationError("the model has adapters: split it first, and add adapters to the rest")
    if esm.config.hidden_dropout_prob or esm.config.attention_probs_dropout_prob:
        raise ConfigurationError(
            "the config has dropout, so the states that enter the top layers differ in every epoch: set "
            "hidden_dropout_prob and attention_probs_dropout_prob to 0, as in ESM-2"
        )
    remove_lean_encoder(model)
    body = _copy_modules(esm)
    body.encoder.layer = body.encoder.layer[: count - layers]
    body.encoder.emb_layer_norm_after = None
    body.pooler = None
    rest = _copy_modules(model)
    rest_esm = _only_esm(rest)
    trunk = Trunk(body)
    for number, layer in enumerate(trunk.layers):
        rest_esm.encoder.layer[number] = SkippedLayer(layer)
    return trunk, rest


def join_model(rest: Model, trunk: Trunk) -> Model:
    """Put the trunk's layers back into the rest, which then takes tokens again.

    Args:
        rest: the rest that `split_model` returned, also with adapters; it is changed in place.
        trunk: the trunk of the same split.

    Returns:
        The rest, as an ordinary model; with the lean encoder, if the rest has it.

    Raises:
        ConfigurationError: the rest has no place for the trunk's layers.
    """
    esm = _only_esm(rest)
    places = [number for number, layer in enumerate(esm.encoder.layer) if isinstance(layer, SkippedLayer)]
    if places != list(range(len(trunk.layers))):
        raise ConfigurationError(
            f"the rest lacks {len(places)} layers and the trunk has {len(trunk.layers)}: expected both of one split"
        )
    lean = esm.__dict__.get("_lean_state")
    remove_lean_encoder(trunk.esm)
    remove_lean_encoder(rest)
    device = next(esm.parameters()).device
    for number, layer in enumerate(trunk.layers):
        esm.encoder.layer[number] = layer.to(device)
    return rest if lean is None else apply_lean_encoder(rest, recompute=lean.recompute, attention=lean.attention)


def truncate(model: Model, layers: int) -> Model:
    """Return a model with the lowest layers alone, an ordinary and smaller ESM-2 model.

    For many tasks a middle layer has better features than the last one (Li et al. 2024, "Feature reuse and scaling:
    understanding transfer learning with protein language models"). The layer norm after the last layer now follows
    the last layer that is left. The contact head keeps the weights of the layers that are left.

    Args:
        model: a transformers ESM-2 model with any head and without adapters. It is not changed, but shares its
            parameters with the result.
        layers: number of layers to keep.

    Returns:
        A model of the same class, with ``config.num_hidden_layers == layers``.

    Raises:
        ConfigurationError: the model has no ``EsmModel`` or several, has adapters, or has fewer layers.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> truncate(model, 2).config.num_hidden_layers
        2
    """
    esm = _only_esm(model)
    if hasattr(model, "peft_config"):
        raise ConfigurationError("the model has adapters: merge them, or cut layers off before adding adapters")
    if not 1 <= layers <= len(esm.encoder.layer):
        raise ConfigurationError(f"layers={layers}: expected 1 to {len(esm.encoder.layer)} layers to keep")
    remove_lean_encoder(model)
    shorter: Any = _copy_modules(model)
    shorter_esm = _only_esm(shorter)
    shorter_esm.encoder.layer = shorter_esm.encoder.layer[:layers]
    for module in shorter.modules():
        if hasattr(module, "config"):
            module.config.num_hidden_layers = layers
    contacts = shorter_esm.contact_head.regression
    contacts.in_features = layers * esm.config.num_attention_heads
    contacts.weight = nn.Parameter(
        contacts.weight.detach()[:, : contacts.in_features].clone(), requires_grad=contacts.weight.requires_grad
    )
    return shorter


def _only_esm(model: nn.Module) -> Any:
    models = list(esm_models(model))
    if len(models) != 1:
        raise ConfigurationError(
            f"{type(model).__name__} has {len(models)} modules of transformers' class EsmModel: expected one"
        )
    return models[0]


def _copy_modules(model: Model) -> Model:
    """Copy a model's modules, which share the parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
