"""Models that compute something else than transformers' ESM-2: they must give the numbers of the plain model."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from custom_models import (
    CHANGES,
    WIDTH,
    ReluIntermediate,
    adopt,
    negated_attention,
    new_layer,
    no_last_norm,
    replace,
    softer_attention,
)
from lean_models import build, distance, gradient_of, loss_of, make_batch
from torch import nn
from transformers import AttentionInterface, EsmForTokenClassification, EsmModel
from transformers.models.esm import modeling_esm
from transformers.models.esm.modeling_esm import (
    EsmEmbeddings,
    EsmIntermediate,
    EsmLayer,
)

from esm_efficient import apply_lean_encoder, compat, remove_lean_encoder
from esm_efficient.encoder.structure import has_foreign_hooks


@pytest.mark.parametrize("first", ["change", "apply"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_has_the_loss_and_gradient_of_the_plain_model(change, first):
    if change == "learned rotary frequencies" and compat.rotates_per_layer():
        pytest.skip("the plain model of this version keeps the rotary table of its first call, and trains it once only")
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


@pytest.mark.parametrize(
    ("hook", "is_foreign"),
    [
        (print, True),
        (partial(print), True),
        (torch.distributed.barrier, False),
        (partial(partial(torch.distributed.barrier), 1), False),
    ],
)
def test_a_partial_hook_is_known_by_its_function(hook, is_foreign):
    module = nn.Linear(1, 1)
    module.register_forward_hook(hook)
    assert has_foreign_hooks(module) is is_foreign
