"""Changes of a model that a user may make: other classes, forwards, settings and modules."""

from __future__ import annotations

import copy
import types

import torch
from torch import nn
from transformers import AttentionInterface, EsmModel
from transformers.models.esm import modeling_esm
from transformers.models.esm.modeling_esm import (
    EsmAttention,
    EsmEncoder,
    EsmIntermediate,
    EsmLayer,
    EsmOutput,
    EsmSelfAttention,
    EsmSelfOutput,
)

from esm_efficient import remove_lean_encoder

WIDTH = 32


def adopt(module, cls):
    """Give a module another class, as if it had been built from it."""
    module.__class__ = cls
    return module


class BottleneckLayer(EsmLayer):
    def forward(self, hidden_states, *args, **kwargs):
        states = super().forward(hidden_states, *args, **kwargs)
        return states + self.up(torch.relu(self.down(states)))


class OtherFeedForwardLayer(EsmLayer):
    def feed_forward_chunk(self, attention_output):
        return attention_output + super().feed_forward_chunk(attention_output)


class CalledLayer(EsmLayer):
    def __call__(self, *args, **kwargs):
        return 0.5 * super().__call__(*args, **kwargs)


class NoisyWrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, *args, **kwargs):
        return 2 * self.layer(hidden_states, *args, **kwargs)


class ReluIntermediate(EsmIntermediate):
    def forward(self, hidden_states):
        return torch.relu(self.dense(hidden_states))


class ForeignIntermediate(nn.Module):
    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def forward(self, hidden_states):
        return torch.relu(self.dense(hidden_states))


class ScaledOutput(EsmOutput):
    def forward(self, hidden_states, input_tensor):
        return 0.5 * self.dense(hidden_states) + input_tensor


class ScaledSelfOutput(EsmSelfOutput):
    def forward(self, hidden_states, input_tensor):
        return 0.5 * self.dense(hidden_states) + input_tensor


class DoubleAttention(EsmAttention):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(super().forward(hidden_states, *args, **kwargs), *args, **kwargs)


class BiasedSelfAttention(EsmSelfAttention):
    def forward(self, hidden_states, *args, **kwargs):
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output + self.extra, weights


class ReversedEncoder(EsmEncoder):
    def forward(self, hidden_states, *args, **kwargs):
        output = super().forward(hidden_states, *args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output


class OtherMaskModel(EsmModel):
    def _create_attention_masks(self, *args, attention_mask=None, **kwargs):
        return super()._create_attention_masks(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)


class LastTwiceModel(EsmModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output


class NeighbourLinear(nn.Linear):
    """Reads a token's neighbour, which packing may take from another sequence."""

    def forward(self, inputs):
        return super().forward(inputs + inputs.roll(1, -2))


class TimesTwo(nn.Module):
    def forward(self, inputs):
        return 2 * inputs


def replace(path, make):
    """A change that puts another module at a path in the model's second layer."""

    def change(esm):
        parent, _, name = f"encoder.layer.1.{path}".rpartition(".")
        owner = esm.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def of_class(path, cls):
    return replace(path, lambda module: adopt(module, cls)) if path else lambda esm: adopt(esm.encoder.layer[1], cls)


def bottleneck(esm):
    layer = adopt(esm.encoder.layer[1], BottleneckLayer)
    layer.down, layer.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)


def biased_attention(esm):
    inner = adopt(esm.encoder.layer[0].attention.self, BiasedSelfAttention)
    inner.extra = nn.Parameter(torch.ones(WIDTH))


def neighbour(module):
    result = NeighbourLinear(module.in_features, module.out_features)
    result.load_state_dict(module.state_dict())
    return result


def wrap_layer(esm):
    esm.encoder.layer[1] = NoisyWrapper(esm.encoder.layer[1])


def forward_on_instance(path):
    def change(esm):
        module = esm.get_submodule(path)
        original = type(module).forward
        module.forward = types.MethodType(
            lambda self, *args, **kwargs: _doubled(original(self, *args, **kwargs)), module
        )

    return change


def _doubled(output):
    if isinstance(output, torch.Tensor):
        return 2 * output
    output.last_hidden_state = 2 * output.last_hidden_state
    return output


def softer_attention(esm):
    esm.encoder.layer[0].attention.self.scaling = 0.3


def learned_scaling(esm):
    esm.set_attn_implementation("eager")  # torch's fused attention takes a number only
    esm.encoder.layer[0].attention.self.scaling = nn.Parameter(torch.tensor(0.3))


def negated_attention(module, query, key, value, attention_mask, **kwargs):
    output, weights = modeling_esm.eager_attention_forward(
        module, query, key, value, attention_mask, **(kwargs | {"scaling": -1.0})
    )
    return output, weights


def registered_attention(esm):
    AttentionInterface.register("negated_attention", negated_attention)
    esm.config._attn_implementation = "negated_attention"


def absolute_layer(esm):
    esm.encoder.layer[1].attention.self.position_embedding_type = "absolute"


def other_frequencies(esm):
    owner = esm if hasattr(esm, "rotary_embeddings") else esm.encoder.layer[1].attention.self
    owner.rotary_embeddings.inv_freq.mul_(0.5)


def learned_frequencies(esm):
    owner = esm if hasattr(esm, "rotary_embeddings") else esm.encoder.layer[0].attention.self
    frequencies = owner.rotary_embeddings.inv_freq
    del owner.rotary_embeddings.inv_freq
    owner.rotary_embeddings.inv_freq = nn.Parameter(frequencies)


def other_rotary(esm):
    owner = esm if hasattr(esm, "rotary_embeddings") else esm.encoder.layer[1].attention.self
    rotary = owner.rotary_embeddings

    class Rotary(type(rotary)):
        def forward(self, *args, **kwargs):
            return [2 * part for part in super().forward(*args, **kwargs)]

    adopt(rotary, Rotary)


def new_layer(esm):
    esm.encoder.layer.append(copy.deepcopy(remove_lean_encoder(copy.deepcopy(esm)).encoder.layer[0]))


def new_encoder(esm):
    esm.encoder = remove_lean_encoder(copy.deepcopy(esm)).encoder
    with torch.no_grad():
        for parameter in esm.encoder.parameters():
            parameter.mul_(1.1)


def copied_layer(esm):
    copied = copy.copy(esm.encoder.layer[0])
    copied._modules = dict(copied._modules)
    copied.intermediate = copy.deepcopy(copied.intermediate)
    with torch.no_grad():
        copied.intermediate.dense.weight.mul_(2)
    esm.encoder.layer[0] = copied


def dictionary_copied_layer(esm):
    layer = esm.encoder.layer[0]
    copied = type(layer).__new__(type(layer))
    copied.__dict__ = layer.__dict__ | {"_modules": dict(layer._modules)}
    copied.intermediate = copy.deepcopy(copied.intermediate)
    with torch.no_grad():
        copied.intermediate.dense.weight.mul_(2)
    esm.encoder.layer[0] = copied


def no_last_norm(esm):
    esm.encoder.emb_layer_norm_after = None


def same_layer_twice(esm):
    esm.encoder.layer[2] = esm.encoder.layer[0]


CHANGES = {
    "layer with a bottleneck adapter": bottleneck,
    "layer with another feed-forward part": of_class("", OtherFeedForwardLayer),
    "layer with another __call__": of_class("", CalledLayer),
    "wrapper of a layer": wrap_layer,
    "subclass of EsmIntermediate": of_class("intermediate", ReluIntermediate),
    "replaced intermediate": replace("intermediate", lambda module: ForeignIntermediate(module.dense)),
    "subclass of EsmOutput": of_class("output", ScaledOutput),
    "subclass of EsmSelfOutput": of_class("attention.output", ScaledSelfOutput),
    "subclass of EsmAttention": of_class("attention", DoubleAttention),
    "self-attention with a bias": biased_attention,
    "subclass of EsmEncoder": lambda esm: adopt(esm.encoder, ReversedEncoder),
    "subclass of EsmModel with other masks": lambda esm: adopt(esm, OtherMaskModel),
    "subclass of EsmModel with another forward": lambda esm: adopt(esm, LastTwiceModel),
    "linear layer that reads neighbours": replace("attention.self.query", neighbour),
    "linear layer that reads neighbours in the MLP": replace("output.dense", neighbour),
    "foreign layer norm": replace("LayerNorm", lambda module: TimesTwo()),
    "foreign dropout": replace("output.dropout", lambda module: TimesTwo()),
    "identity for dropout": replace("output.dropout", lambda module: nn.Identity()),
    "sequence of linear layers": replace("output.dense", lambda module: nn.Sequential(module, nn.Tanh())),
    "root mean square norm": replace("LayerNorm", lambda module: nn.RMSNorm(WIDTH)),
    "forward on a layer": forward_on_instance("encoder.layer.1"),
    "forward on an intermediate": forward_on_instance("encoder.layer.1.intermediate"),
    "forward on the encoder": forward_on_instance("encoder"),
    "changed scaling": softer_attention,
    "learned scaling": learned_scaling,
    "registered attention": registered_attention,
    "layer without rotary positions": absolute_layer,
    "changed rotary frequencies": other_frequencies,
    "learned rotary frequencies": learned_frequencies,
    "subclass of the rotary module": other_rotary,
    "appended layer": new_layer,
    "replaced encoder": new_encoder,
    "shallow copy of a layer": copied_layer,
    "copy of a layer's dictionary": dictionary_copied_layer,
    "no last layer norm": no_last_norm,
    "one layer used twice": same_layer_twice,
}
