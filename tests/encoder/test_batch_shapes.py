"""The arguments of a call: masks, position ids and embeddings, in all configurations of ESM-2."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import tiny_config
from lean_models import build, distance, gradient_of, loss_of, make_batch
from transformers import EsmForSequenceClassification, EsmForTokenClassification, EsmModel

from esm_efficient import apply_lean_encoder, remove_lean_encoder
from esm_efficient.encoder import has_lean_encoder


def test_a_pooler_that_reads_padding_gets_the_tensors_of_the_plain_model():
    model = EsmModel(tiny_config()).eval()
    batch = make_batch([12, 12])
    batch["attention_mask"][0, :4] = 0
    with torch.no_grad():
        expected = model(**batch).pooler_output
        assert torch.allclose(apply_lean_encoder(model)(**batch).pooler_output, expected, atol=1e-6)


def test_tokens_can_be_anywhere_in_a_row():
    model = build(EsmForTokenClassification, "full")
    batch = make_batch([12, 12, 12])
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, 3:6] = 0
    loss, gradient = gradient_of(model, batch)
    found, found_gradient = gradient_of(apply_lean_encoder(model), batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(found_gradient, gradient) < 1e-5


def test_a_row_that_begins_with_padding_runs_the_plain_encoder(caplog):
    model = build(trains="full").eval()
    batch = make_batch([12, 12])
    batch["attention_mask"][0, :4] = 0
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        assert torch.equal(model(**batch).logits, apply_lean_encoder(model)(**batch).logits)
    assert "does not begin at the first column" in caplog.text


def test_the_encoder_of_a_classifier_returns_every_token_when_called_directly():
    model = build(trains="full").eval()
    batch = make_batch([9, 5])
    tokens = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model.esm(**batch).last_hidden_state[tokens]
        apply_lean_encoder(model)(**batch)
        assert torch.allclose(model.esm(**batch).last_hidden_state[tokens], expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding_type": "absolute", "token_dropout": False},
        {"emb_layer_norm_before": True},
        {"token_dropout": False},
        {"position_embedding_type": "absolute", "hidden_size": 36},  # heads of 9 numbers
    ],
    ids=str,
)
def test_other_esm_configurations_are_exact(changes):
    model = build(EsmForTokenClassification, "full", **changes)
    batch = make_batch([9, 5, 12], masked=False)
    loss, gradient = gradient_of(model, batch)
    found, found_gradient = gradient_of(apply_lean_encoder(model), batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(found_gradient, gradient) < 1e-5


MASKS = {
    "one row for all": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    "one row without padding": torch.ones(1, 6, dtype=torch.long),
    "no tokens": torch.zeros(3, 6, dtype=torch.long),
    "a row without tokens": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]),
    "booleans": torch.tensor([[1, 1, 1, 1, 0, 0]] * 3).bool(),
    "numbers": torch.tensor([[1.0, 0.5, 2.0, 1.0, 0.0, 0.0]] * 3),
    "one column for all": torch.ones(3, 1, dtype=torch.long),
    "none": None,
}


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("head", [EsmForSequenceClassification, EsmForTokenClassification, EsmModel])
def test_any_attention_mask_that_the_plain_model_takes(head, name, recompute):
    model = build(head, "full", token_dropout=False).train()
    mask = MASKS[name]
    ids = make_batch([6, 6, 6])["input_ids"]
    tokens = torch.ones(3, 6) if mask is None else (mask != 0).float().expand(3, 6)
    results = []
    for change in (remove_lean_encoder, lambda model: apply_lean_encoder(model, recompute=recompute)):
        change(model).zero_grad()
        # Some versions of transformers take one row for all sequences only if it has no padding.
        plain = not has_lean_encoder(model) and name == "one row for all"
        states = model(input_ids=ids, attention_mask=mask.expand(3, 6) if plain else mask)[0]
        loss = (states * (tokens[..., None] if states.dim() == 3 else tokens[:, :1])).square().sum()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    if name != "no tokens":
        assert distance(results[1][1], results[0][1]) < 1e-5


def test_position_ids_and_embeddings_can_be_given():
    model = build(EsmForTokenClassification, "full")
    batch = make_batch([9, 5, 12])
    batch["inputs_embeds"] = torch.randn(3, 12, 32).requires_grad_()
    del batch["input_ids"]
    batch["position_ids"] = torch.randint(0, 50, (3, 12))
    grads = []
    for change in (remove_lean_encoder, apply_lean_encoder):
        loss_of(change(model), batch).backward()
        grads.append(batch["inputs_embeds"].grad.clone())
        batch["inputs_embeds"].grad = None
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6)
