"""Every kind of adapter of peft: the gradient of the plain model, without padding where the adapter allows it."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from conftest import make_model
from lean_models import distance, gradient_of, make_batch
from torch import nn
from transformers import EsmForTokenClassification

from esm_efficient import apply_lean_encoder
from esm_efficient.encoder.origins import PER_TOKEN_ADAPTERS

LINEARS = ["query", "value", "intermediate.dense", "output.dense"]
ATTENTION = ["query", "key", "value"]
CONFIGS = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": LINEARS}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": LINEARS}),
    "ia3": ("IA3Config", {"target_modules": LINEARS, "feedforward_modules": ["output.dense"]}),
    "loha": ("LoHaConfig", {"r": 4, "target_modules": LINEARS}),
    "lokr": ("LoKrConfig", {"r": 4, "target_modules": LINEARS}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ATTENTION}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": LINEARS}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": LINEARS}),
    "hra": ("HRAConfig", {"r": 4, "target_modules": LINEARS}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 10, "target_modules": LINEARS}),
    "randlora": ("RandLoraConfig", {"r": 4, "randlora_alpha": 8, "target_modules": ATTENTION}),
    "shira": ("ShiraConfig", {"r": 4, "target_modules": LINEARS}),
    "miss": ("MissConfig", {"r": 4, "target_modules": LINEARS}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "delora": ("DeloraConfig", {"r": 4, "target_modules": LINEARS}),
    "waveft": ("WaveFTConfig", {"n_frequency": 10, "target_modules": LINEARS}),
    "c3a": ("C3AConfig", {"block_size": 4, "target_modules": LINEARS}),
    "road": ("RoadConfig", {"group_size": 4, "target_modules": LINEARS}),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2, "target_modules": LINEARS}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 4, "topk": 2, "target_modules": LINEARS}),
}


def test_the_table_has_every_adapter_that_is_known_to_compute_each_token_by_itself():
    assert set(CONFIGS) == set(PER_TOKEN_ADAPTERS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_has_the_gradient_of_the_plain_model(kind, caplog):
    name, options = CONFIGS[kind]
    if not hasattr(peft, name):
        pytest.skip(f"peft {peft.__version__} has no {name}")
    torch.manual_seed(0)
    base = make_model(EsmForTokenClassification, hidden_size=32, num_attention_heads=4, num_labels=2)
    for parameter in base.parameters():
        parameter.data.mul_(4 if parameter.dim() == 2 else 1)
    model = peft.get_peft_model(base, getattr(peft, name)(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    batch = make_batch([9, 5, 30])
    loss, gradient = gradient_of(model, batch)
    with caplog.at_level(logging.INFO, "esm_efficient"):
        for recompute in ("none", "layer"):
            found, found_gradient = gradient_of(apply_lean_encoder(model, recompute=recompute), batch)
            assert found == pytest.approx(loss, rel=1e-5)
            assert distance(found_gradient, gradient) < 1e-5
    assert "not used in this call" not in caplog.text
    assert any(norm > 0 for norm in map(torch.Tensor.norm, gradient.values()))


class ConvolutionAdapter(nn.Module):
    """An adapter of a user's own that reads neighbouring tokens."""

    def __init__(self, base):
        super().__init__()
        self.base, self.mix = base, nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, inputs):
        return self.base(inputs) + self.mix(inputs.transpose(1, 2)).transpose(1, 2)


def test_an_adapter_around_a_module_that_reads_other_tokens_runs_with_padding(caplog):
    model = make_model(EsmForTokenClassification, hidden_size=32, num_attention_heads=4)
    for layer in model.esm.encoder.layer:
        layer.attention.self.query = ConvolutionAdapter(layer.attention.self.query)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query.base", "value"], init_lora_weights=False))
    batch = make_batch([9, 5, 30])
    loss, gradient = gradient_of(model, batch)
    with caplog.at_level(logging.INFO, "esm_efficient"):
        found, found_gradient = gradient_of(apply_lean_encoder(model), batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert distance(found_gradient, gradient) < 1e-6
    assert "query (ConvolutionAdapter) is not known to compute each token by itself" in caplog.text
