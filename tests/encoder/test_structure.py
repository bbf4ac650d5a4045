"""Models that compute something else than transformers' ESM-2: they must give the numbers of the plain model."""

from __future__ import annotations

import copy
import logging
import types

import pytest
import torch
from lean_models import build, distance, gradient_of, loss_of, make_batch
from torch import nn
from transformers import AttentionInterface, EsmForTokenClassification, EsmModel
from transformers.models.esm import modeling_esm
from transformers.models.esm.modeling_esm import (
    EsmAttention,
    EsmEmbeddings,
    EsmEncoder,
    EsmIntermediate,
    EsmLayer,
    EsmOutput,
    EsmSelfAttention,
    EsmSelfOutput,
)

from esm_efficient import apply_lean_encoder, remove_lean_encoder

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


@pytest.mark.parametrize("first", ["change", "apply"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_has_the_loss_and_gradient_of_the_plain_model(change, first):
    plain = build(EsmForTokenClassification, "full")
    lean = copy.deepcopy(plain)
    batch = make_batch([9, 5, 12])
    original, _ = gradient_of(copy.deepcopy(plain), batch)
    if first == "apply":
        apply_lean_encoder(lean)
        loss_of(lean, batch)  # the structure is known before it changes
    for model in (plain, lean):
        torch.manual_seed(0)
        CHANGES[change](model.esm)
    if first == "change":
        apply_lean_encoder(lean)
    loss, gradient = gradient_of(plain, batch)
    found, found_gradient = gradient_of(lean, batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(found_gradient, gradient) < 1e-5
    removed, _ = gradient_of(remove_lean_encoder(lean), batch)
    assert removed == pytest.approx(loss, rel=1e-5)
    if change not in ("identity for dropout", "learned rotary frequencies"):
        assert abs(loss - original) > 1e-4 * original


def relu(x):
    return torch.relu(x)


def unrotated(*args, **kwargs):
    return (args[0], args[1]) if args[0].shape == args[1].shape else args[0]


def stronger(self, inputs):
    return nn.functional.linear(inputs, 1.1 * self.weight, self.bias)


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [
        (modeling_esm, "gelu", relu),
        (modeling_esm, "gelu", torch.relu),
        (modeling_esm, "apply_rotary_pos_emb", unrotated),
        (EsmIntermediate, "forward", ReluIntermediate.forward),
        (EsmLayer, "feed_forward_chunk", lambda self, attention_output: attention_output),
        (nn.Linear, "forward", stronger),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_function_that_is_replaced_for_all_models_is_noticed(owner, name, replacement, monkeypatch):
    model = build(EsmForTokenClassification, "full").eval()
    batch = make_batch([9, 5, 12])
    lean = apply_lean_encoder(copy.deepcopy(model))
    with torch.no_grad():
        before, tokens = lean(**batch).logits, batch["attention_mask"].bool()
        monkeypatch.setattr(owner, name, replacement)
        expected = model(**batch).logits
        assert torch.allclose(lean(**batch).logits[tokens], expected[tokens], atol=1e-5)
        assert not torch.allclose(before[tokens], expected[tokens], rtol=1e-3, atol=1e-4)
        monkeypatch.undo()
        assert torch.equal(lean(**batch).logits, before)


def test_an_attention_function_that_is_registered_under_a_known_name_is_noticed(monkeypatch):
    model = build(EsmForTokenClassification, "full").eval()
    batch = make_batch([9, 5, 12])
    lean, tokens = apply_lean_encoder(copy.deepcopy(model)), batch["attention_mask"].bool()
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", negated_attention)
    with torch.no_grad():
        assert torch.equal(lean(**batch).logits[tokens], model(**batch).logits[tokens])


def test_parameters_outside_the_embeddings_get_their_gradient():
    outside = nn.Linear(WIDTH, WIDTH)

    class OutsideEmbeddings(EsmEmbeddings):
        def forward(self, *args, **kwargs):
            return outside(super().forward(*args, **kwargs))

    model = build(EsmForTokenClassification, "head")
    adopt(model.esm.embeddings, OutsideEmbeddings)
    batch = make_batch([9, 5, 12])
    loss_of(model, batch).backward()
    expected = outside.weight.grad.clone()
    outside.zero_grad()
    loss_of(apply_lean_encoder(model), batch).backward()
    assert torch.allclose(outside.weight.grad, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_a_shallow_copy_computes_with_its_own_modules():
    model = apply_lean_encoder(build(EsmModel, "full").eval())
    copied = copy.copy(model)
    copied._modules = dict(copied._modules)
    copied.embeddings = copy.deepcopy(copied.embeddings)
    batch = make_batch([9, 5, 12])
    tokens = batch["attention_mask"].bool()
    with torch.no_grad():
        copied.embeddings.word_embeddings.weight.mul_(2)
        found = copied(**batch).last_hidden_state[tokens]
        original = model(**batch).last_hidden_state[tokens]
        expected = remove_lean_encoder(copied)(**batch).last_hidden_state[tokens]
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, original, rtol=1e-2)
        again = apply_lean_encoder(copied)(**batch).last_hidden_state[tokens]
        assert torch.allclose(again, expected, atol=1e-5)


def test_the_log_names_an_unknown_part_once(caplog):
    model = apply_lean_encoder(build(EsmForTokenClassification, "full").eval())
    adopt(model.esm.encoder.layer[1].intermediate, ReluIntermediate)
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        for _ in range(3):
            model(**make_batch([9, 5]))
    assert [message for message in caplog.messages if "not used" in message] == [
        "the lean encoder is not used in this call: encoder.layer.1.intermediate (ReluIntermediate) does not compute "
        "what transformers' EsmIntermediate does"
    ]


class RenamedLinear(nn.Linear):
    """Computes what ``nn.Linear`` does."""

    def __init__(self, *args):
        super().__init__(*args)
        self.note = "mine"


def renamed(module):
    result = RenamedLinear(module.in_features, module.out_features)
    result.load_state_dict(module.state_dict())
    return result


@pytest.mark.parametrize(
    "change",
    [
        lambda esm: adopt(esm.encoder.layer[1], type("NamedLayer", (EsmLayer,), {"purpose": lambda self: "mine"})),
        lambda esm: adopt(esm.encoder.layer[1].intermediate, type("NamedIntermediate", (EsmIntermediate,), {})),
        softer_attention,
        no_last_norm,
        new_layer,
        replace("attention.self.query", renamed),
        replace("output.dense", lambda module: nn.Sequential(module, nn.Tanh())),
        replace("LayerNorm", lambda module: nn.RMSNorm(WIDTH)),
    ],
)
def test_parts_that_compute_each_token_by_itself_run_without_padding(change, caplog):
    model = build(EsmForTokenClassification, "full").eval()
    change(model.esm)
    batch = make_batch([9, 5, 12])
    tokens = batch["attention_mask"].bool()
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        expected = model(**batch).logits[tokens]
        assert torch.allclose(apply_lean_encoder(model)(**batch).logits[tokens], expected, atol=1e-5)
    assert "not used in this call" not in caplog.text
