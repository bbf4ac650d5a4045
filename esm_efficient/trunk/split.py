"""Split an ESM-2 or ESM C model into the frozen trunk and the rest, join them again, and cut layers off."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from esm_efficient.encoder import apply_lean_encoder, remove_lean_encoder
from esm_efficient.encoder.forward import esm_models, first_tokens_alone
from esm_efficient.errors import ConfigurationError

Model = TypeVar("Model", bound=nn.Module)


class _Parts(NamedTuple):
    """Paths in an encoder, and what its forward takes.

    Attributes:
        embeddings: what makes states of tokens.
        layers: the list of layers.
        norm: the layer norm after the last layer.
        takes_states: whether the forward takes states as ``inputs_embeds``.
    """

    embeddings: str
    layers: str
    norm: str
    takes_states: bool


_ENCODERS = {
    "EsmModel": _Parts("embeddings", "encoder.layer", "encoder.emb_layer_norm_after", takes_states=True),
    "EsmcModel": _Parts("embed_tokens", "layers", "norm", takes_states=False),
}
"""The encoders of transformers that can be split, by the name of their class."""


class SkippedModule(nn.Identity):
    """Stands at the place of a module that another module computes, and returns its input.

    It keeps the numbers of the other layers, and so the names of their parameters. The state dict contains the module's
    weights, so that a checkpoint is that of an ordinary model; when a state dict is loaded they are left alone.

    Args:
        skipped: the module that another module computes.
    """

    def __init__(self, skipped: nn.Module) -> None:
        super().__init__()
        self._skipped = (skipped,)  # in a tuple, so that its parameters are not those of this module
        self.register_state_dict_post_hook(_add_weights)
        self.register_load_state_dict_pre_hook(_leave_weights_out)


class SkippedLayer(SkippedModule):
    """Stands at the place of a layer that another module computes.

    Args:
        skipped: the layer.
    """

    takes_packed_tokens = True
    """Read by the lean encoder, which otherwise would run as in transformers."""

    def forward(self, input: Tensor, packing: Any = None, first_only: bool = False, **kwargs: Any) -> Tensor:
        """Return the states; with `first_only`, as the last layer of the lean encoder does, those of first tokens."""
        return input[packing.first_tokens(input.device)] if first_only else input


def _add_weights(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    state_dict.update({prefix + name: value for name, value in module._skipped[0].state_dict().items()})


def _leave_weights_out(module: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]


class SkippedEmbeddings(SkippedModule):
    """Stands at the place of the embeddings, which another module computes, and returns the states that it is given."""

    # EsmModel gives the embeddings these names, and Identity's forward has another.
    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the states.

        Raises:
            ConfigurationError: there are token ids instead of states.
        """
        states = input_ids if inputs_embeds is None else inputs_embeds
        if states is None or not states.is_floating_point():
            raise ConfigurationError(
                "got token ids, but the model is the rest that split_model returned: expected "
                "inputs_embeds=trunk(input_ids, attention_mask). join_model makes a model that takes token ids"
            )
        return states

    @property
    def word_embeddings(self) -> nn.Module:
        """The word embeddings, for `get_input_embeddings` of an ``EsmModel``."""
        return cast(nn.Module, self._skipped[0].word_embeddings)


def _states_as_tokens(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass ``inputs_embeds`` in the place of the token ids to an encoder whose forward takes no ``inputs_embeds``."""
    states = kwargs.pop("inputs_embeds", None)
    if states is None:
        return args, kwargs
    return (states, *args[1:]), {name: value for name, value in kwargs.items() if name != "input_ids"}


class Trunk(nn.Module):
    """The embeddings and the lowest layers of an ESM-2 or ESM C model, frozen; with all layers, the last norm too.

    Args:
        esm: an ``EsmModel`` or ``EsmcModel`` that has only these layers.
        whole: whether these are all layers of the model.

    Attributes:
        esm: the encoder; an ``EsmModel`` has the lean encoder.
        whole: as given.
    """

    def __init__(self, esm: Any, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        esm = esm.requires_grad_(False).eval()
        self.esm = apply_lean_encoder(esm) if any(True for _ in esm_models(esm)) else esm

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, from the lowest to the highest."""
        return list(layers_of(self.esm))

    @property
    def width(self) -> int:
        """Width of the states."""
        return cast(int, self.esm.config.hidden_size)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, first_only: bool = False) -> Tensor:
        """Compute what enters the lowest layer that is not in the trunk.

        Args:
            input_ids: token ids, int64 of shape (rows, columns).
            attention_mask: 1 for tokens and 0 for padding, of the same shape.
            first_only: only the first token of each sequence is read. The lean encoder then computes most of the last
                layer for these alone, and other tokens are zero.

        Returns:
            The states, of shape (rows, columns, width).
        """
        with first_tokens_alone(self.esm) if first_only else nullcontext():
            return self.esm(input_ids, attention_mask=attention_mask).last_hidden_state

    def train(self, mode: bool = True) -> Trunk:
        """Stay in evaluation mode: a trunk is constant."""
        return super().train(False)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model contains layers of peft; ``unload`` of peft 0.18 leaves their config, but not the layers."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def split_model(model: Model, layers: int) -> tuple[Trunk, Model]:
    """Split a model into its frozen trunk and the rest: its top layers and its head.

    Both share their parameters with the model; those of the trunk no longer train. The trunk takes tokens and returns
    states. The rest has the model's class, config and state dict, but not the parameters of the trunk; it takes
    ``inputs_embeds``, the trunk's states, instead of ``input_ids``. Therefore ``rest(inputs_embeds=trunk(ids, mask),
    attention_mask=mask)`` equals ``model(ids, mask)``.

    Args:
        model: an ESM-1b, ESM-1v, ESM-2 or ESM C model of transformers with any head and without adapters. A lean
            encoder on it is removed.
        layers: number of top layers in the rest; 0 for the head alone. The layer norm after the last layer belongs to
            the rest if it has layers, and to the trunk otherwise.

    Returns:
        The trunk, and the rest.

    Raises:
        ConfigurationError: the model has no ``EsmModel`` or ``EsmcModel`` or several, has adapters or dropout below
            the top layers, or has fewer layers.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> trunk, rest = split_model(model, layers=1)
        >>> type(rest).__name__
        'EsmForSequenceClassification'
    """
    esm, parts = only_encoder(model)
    count = len(layers_of(esm))
    if not 0 <= layers <= count:
        raise ConfigurationError(f"layers={layers}: expected 0 to {count} top layers of this model")
    if has_adapters(model):
        raise ConfigurationError("the model has adapters: split it first, and add adapters to the rest")
    if dropout := encoder_dropout(esm.config):
        raise ConfigurationError(
            "the config has dropout, so the states that enter the top layers differ in every epoch: set "
            f"{' and '.join(dropout)} to 0, as in ESM-2"
        )
    remove_lean_encoder(model)
    body = copy_modules(esm)
    _set(body, parts.layers, layers_of(body)[: count - layers])
    if layers:
        _set(body, parts.norm, nn.Identity())
    if parts.takes_states:
        body.pooler = None
    trunk = Trunk(body, whole=not layers)
    rest = copy_modules(model)
    rest_esm, _ = only_encoder(rest)
    _set(rest_esm, parts.embeddings, SkippedEmbeddings(body.get_submodule(parts.embeddings)))
    for number, layer in enumerate(trunk.layers):
        layers_of(rest_esm)[number] = SkippedLayer(layer)
    if trunk.whole and (norm := _norm_of(body)) is not None:
        _set(rest_esm, parts.norm, SkippedModule(norm))
    if not parts.takes_states:
        rest_esm._states_hook = rest_esm.register_forward_pre_hook(_states_as_tokens, with_kwargs=True)
    return trunk, rest


def join_model(rest: Model, trunk: Trunk) -> Model:
    """Put the trunk's embeddings and layers back into the rest, which then takes tokens again.

    Args:
        rest: the rest that `split_model` returned, also with adapters; it is changed in place.
        trunk: the trunk of the same split.

    Returns:
        The rest, as an ordinary model; with the lean encoder, if the rest has it. The parameters of the trunk stay
        frozen, and the trunk loses its lean encoder: do not use it any more.

    Raises:
        ConfigurationError: the rest has no place for the trunk's layers.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient import demo_model_path, join_model, split_model
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> trunk, rest = split_model(model, layers=1)
        >>> len(join_model(rest, trunk).esm.encoder.layer)
        4
    """
    esm, parts = only_encoder(rest)
    places = [number for number, layer in enumerate(layers_of(esm)) if isinstance(layer, SkippedLayer)]
    if places != list(range(len(trunk.layers))):
        raise ConfigurationError(
            f"the rest lacks {len(places)} layers and the trunk has {len(trunk.layers)}: expected both of one split"
        )
    lean = esm.__dict__.get("_lean_state")
    remove_lean_encoder(trunk.esm)
    remove_lean_encoder(rest)
    if not parts.takes_states:
        vars(esm).pop("_states_hook").remove()
    device = next((parameter.device for parameter in rest.parameters()), None)
    _set(esm, parts.embeddings, trunk.esm.get_submodule(parts.embeddings).to(device))
    for number, layer in enumerate(trunk.layers):
        layers_of(esm)[number] = layer.to(device)
    if trunk.whole and (norm := _norm_of(trunk.esm)) is not None:
        _set(esm, parts.norm, norm.to(device))
    if lean is None:
        return rest
    return apply_lean_encoder(rest, recompute=lean.recompute, attention=lean.attention, fused=lean.fused)


def truncate(model: Model, layers: int) -> Model:
    """Return a model with the lowest layers alone, an ordinary and smaller model of the same kind.

    For many tasks a middle layer has better features than the last one (Li et al. 2024, "Feature reuse and scaling:
    understanding transfer learning with protein language models"). The layer norm after the last layer now follows
    the last layer that is left. The contact head keeps the weights of the layers that are left. ESM C divides what a
    layer adds by a number that depends on the number of layers, so the weights that are multiplied before this division
    change by the ratio of these numbers.

    Args:
        model: an ESM-1b, ESM-1v, ESM-2 or ESM C model of transformers with any head and without adapters. It is not
            changed, but shares its other parameters with the result.
        layers: number of layers to keep.

    Returns:
        A model of the same class, without the lean encoder, with ``config.num_hidden_layers == layers``, and with the
        former number of layers in ``config.truncated_from``.

    Raises:
        ConfigurationError: the model has no ``EsmModel`` or ``EsmcModel`` or several, has adapters, or has fewer
            layers.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> truncate(model, 2).config.num_hidden_layers
        2
    """
    esm, parts = only_encoder(model)
    count = len(layers_of(esm))
    if has_adapters(model):
        raise ConfigurationError("the model has adapters: merge them, or cut layers off before adding adapters")
    if not 1 <= layers <= count:
        raise ConfigurationError(f"layers={layers}: expected 1 to {count} layers to keep")
    whole = getattr(esm.config, "truncated_from", count)
    shorter: Any = remove_lean_encoder(copy_modules(model))
    shorter_esm, _ = only_encoder(shorter)
    _set(shorter_esm, parts.layers, layers_of(shorter_esm)[:layers])
    for module in shorter.modules():
        if hasattr(module, "config"):
            module.config.num_hidden_layers = layers
            module.config.truncated_from = whole
    if hasattr(shorter_esm, "contact_head"):
        contacts = shorter_esm.contact_head.regression
        contacts.in_features = layers * esm.config.num_attention_heads
        _replace(contacts, contacts.weight[:, : contacts.in_features])
    for layer in layers_of(shorter_esm):
        if hasattr(layer, "scaling_factor"):
            _rescale(layer, math.sqrt(layers / count))
    return shorter


def _rescale(layer: Any, ratio: float) -> None:
    """Multiply the number that a layer of ESM C divides by, and the weights before this division."""
    layer.scaling_factor *= ratio
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        _replace(linear, linear.weight * ratio, None if linear.bias is None else linear.bias * ratio)


def _replace(linear: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give a linear layer parameters of its own."""
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=linear.bias.requires_grad)


def encoder_dropout(config: Any) -> tuple[str, ...]:
    """Return the names of a config's dropout rates in the encoder that are not zero."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
    return tuple(name for name in names if getattr(config, name, 0))


def only_encoder(model: nn.Module) -> tuple[Any, _Parts]:
    """Return the encoder in a model and where its parts are.

    Raises:
        ConfigurationError: the model has no encoder that can be split, several, or a part that reads all its layers.
    """
    found = [(module, parts) for module in model.modules() if (parts := _parts_of(module)) is not None]
    if len(found) != 1:
        raise ConfigurationError(
            f"{type(model).__name__} has {len(found)} modules of transformers' classes {' and '.join(_ENCODERS)}: "
            "expected one. Other encoders train without a cache (cache=False in the recipe)"
        )
    if any(parent.__name__ == "EsmForProteinFolding" for parent in type(model).__mro__):
        raise ConfigurationError(
            "EsmForProteinFolding reads the states of all layers of its encoder, so that none can be split off or "
            "dropped: give the encoder alone, model.esm"
        )
    return found[0]


def _parts_of(module: nn.Module) -> _Parts | None:
    names = (parent.__name__ for parent in type(module).__mro__ if parent.__module__.startswith("transformers."))
    return next((_ENCODERS[name] for name in names if name in _ENCODERS), None)


def embeddings_of(encoder: nn.Module) -> nn.Module:
    """Return what makes states of tokens in an encoder that can be split."""
    return encoder.get_submodule(cast(_Parts, _parts_of(encoder)).embeddings)


def layers_of(encoder: nn.Module) -> Any:
    """Return the list of layers of an encoder that can be split."""
    return encoder.get_submodule(cast(_Parts, _parts_of(encoder)).layers)


def _norm_of(encoder: nn.Module) -> nn.Module | None:
    """Return the layer norm after the last layer; None if the user has removed it."""
    return dict(encoder.named_modules()).get(cast(_Parts, _parts_of(encoder)).norm)


def _set(encoder: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(encoder.get_submodule(parent), name, module)


def copy_modules(model: Model, *others: nn.Module) -> Model:
    """Copy a model's modules, which share the parameters and buffers, also those of other modules that it refers to."""
    modules: tuple[nn.Module, ...] = (model, *others)
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
