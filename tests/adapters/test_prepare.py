"""prepare_model: trainable parameters, their dtypes and their gradients."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification, EsmModel

from esm_efficient import apply_lean_encoder, lora_config, prepare_model
from esm_efficient.errors import ConfigurationError, TargetModuleError


def batch():
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 9, 2, 1]])
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("head", [EsmForSequenceClassification, EsmForTokenClassification, EsmForMaskedLM])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_every_trainable_parameter_gets_a_gradient(tiny_model, head, kind, checkpointing, reentrant):
    model = tiny_model(head)
    model = prepare_model(
        model,
        adapters=lora_config(model, r=2) if kind == "lora" else None,
        head_only=kind == "head",
        gradient_checkpointing=checkpointing,
        use_reentrant=reentrant,
    )
    model.train()
    model(**batch()).logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert not any("contact_head" in name for name in trainable(model))
    if kind == "lora":
        assert all(".lora_" in name or "classifier" in name for name in trainable(model))
    if kind == "head":
        assert all(name.startswith(("classifier", "lm_head")) for name in trainable(model))


def test_checkpointing_is_on_and_changes_no_gradient(tiny_model):
    gradients = []
    for checkpointing in (False, True):
        model = prepare_model(tiny_model(), gradient_checkpointing=checkpointing).train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == checkpointing
        model(**batch()).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_trainable_parameters_are_float32_over_a_bfloat16_base(tiny_model, kind):
    model = tiny_model()
    model = prepare_model(
        model,
        adapters=lora_config(model, r=2) if kind == "lora" else None,
        head_only=kind == "head",
        dtype=torch.bfloat16,
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        model.zero_grad()
        with context:
            logits = model(**batch()).logits
        logits.float().square().sum().backward()
        assert torch.isfinite(logits).all()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_bfloat16_base_runs_after_its_adapters_are_merged(tiny_model):
    model = tiny_model()
    adapters = lora_config(model, r=2, init_lora_weights=False)
    model = prepare_model(model, adapters=adapters, dtype=torch.bfloat16).eval()
    expected = model(**batch()).logits
    with model.disable_adapter():
        without = model(**batch()).logits
    error = (model.merge_and_unload()(**batch()).logits - expected).abs().max()
    assert error < 0.05 * (expected - without).abs().max()


def test_a_model_loaded_in_bfloat16_trains_in_float32(tiny_model):
    model = prepare_model(tiny_model().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_label_names_reach_the_config_and_survive_saving(tiny_model, tmp_path):
    model = prepare_model(tiny_model(num_labels=3), label_names=["a", "b", "c"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert config["label2id"] == {"a": 0, "b": 1, "c": 2}


def test_an_adapter_loads_in_plain_peft_with_the_same_logits(tiny_model, tmp_path):
    model = tiny_model()
    torch.manual_seed(3)
    model = prepare_model(model, adapters=lora_config(model, r=2, init_lora_weights=False), gradient_checkpointing=True)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(model.eval()(**batch()).logits, again(**batch()).logits)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_every_bias_that_trains_gets_a_gradient(tiny_model, bias):
    model = tiny_model()
    model = prepare_model(model, adapters=lora_config(model, r=2, bias=bias, init_lora_weights=False))
    model(**batch(), labels=torch.tensor([0, 1])).loss.backward()
    biases = {name for name in trainable(model) if name.endswith("bias") and "classifier" not in name}
    assert bool(biases) == (bias != "none")
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("encoder", ["lean", "plain"])
def test_biases_train_beside_frozen_weights_in_half_precision(tiny_model, encoder):
    """torch normalises with a weight and a bias of one dtype."""
    model = tiny_model()
    config = lora_config(model, r=2, bias="all", init_lora_weights=False)
    model = prepare_model(model, adapters=config, dtype=torch.bfloat16)
    model = apply_lean_encoder(model) if encoder == "lean" else model
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch(), labels=torch.tensor([0, 1])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = {p.dtype for name, p in model.named_parameters() if not p.requires_grad and "LayerNorm" not in name}
    assert torch.bfloat16 in frozen


def test_contradictions_are_refused(tiny_model):
    model = tiny_model()
    config = lora_config(model, r=2)
    with pytest.raises(ConfigurationError, match="exclude each other"):
        prepare_model(model, adapters=config, head_only=True)
    with pytest.raises(ConfigurationError, match="num_labels=3"):
        prepare_model(tiny_model(), label_names=["a", "b", "c"])
    with pytest.raises(ConfigurationError, match="repeat"):
        prepare_model(tiny_model(), label_names=["a", "a"])
    with pytest.raises(ConfigurationError, match="adapters already"):
        prepare_model(prepare_model(model, adapters=config), adapters=config)
    with pytest.raises(ConfigurationError, match="no head"):
        prepare_model(tiny_model(EsmModel), head_only=True)
    with pytest.raises(TargetModuleError, match="no known encoder"):
        prepare_model(nn.Linear(2, 2))


@pytest.mark.parametrize(("layers", "trained"), [("top-1", {1}), ([0], {0}), ("all", {0, 1})])
def test_without_adapters_the_chosen_layers_the_last_norm_and_the_head_train(tiny_model, layers, trained):
    model = prepare_model(tiny_model(EsmForSequenceClassification), layers=layers)
    for name, parameter in model.named_parameters():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if "contact_head" in name:
            expected = False
        elif "embeddings" in name:
            expected = layers == "all"
        else:
            expected = number is None or number in trained
        assert parameter.requires_grad is expected, name


def test_no_warning_of_a_deprecated_name_reaches_the_user(tiny_model):
    model = tiny_model(EsmForSequenceClassification)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert isinstance(prepare_model(model, adapters=lora_config(model)), PeftModel)
