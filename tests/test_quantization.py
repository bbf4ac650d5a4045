"""Adapters on a base that bitsandbytes holds in 4 or 8 bits: training, exactness, memory, saving and merging."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from conftest import make_model as make_random_model
from conftest import slow_except, tiny_config
from datasets import DatasetDict
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, EsmForSequenceClassification

from esm_efficient import (
    RECIPES,
    Predictor,
    apply_lean_encoder,
    demo_model_path,
    estimate,
    export_model,
    finetune,
    load_deeploc,
    lora_config,
    prepare_model,
    quantization_config,
    remove_lean_encoder,
    resolve_targets,
    stratified_sample,
)
from esm_efficient.adapters.quantization import count_parameters, merge_quantized
from esm_efficient.costs.allocations import model_tensors
from esm_efficient.encoder.plan import plan_as
from esm_efficient.errors import ConfigurationError

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
BITS = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a trained head."""
    folder = tmp_path_factory.mktemp("whole")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
    make_random_model(EsmForSequenceClassification, **sizes).save_pretrained(folder)
    return folder


def load(folder, bits, dtype=torch.float32):
    config = quantization_config(bits, dtype=dtype)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )


def adapted(model, **options):
    """Return the model with LoRA that changes its outputs, in training mode."""
    model = prepare_model(model, adapters=lora_config(model, **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch():
    torch.manual_seed(2)
    mask = (torch.arange(30) < torch.tensor([30, 17, 22])[:, None]).long()
    return {"input_ids": torch.randint(4, 24, mask.shape).where(mask.bool(), 1), "attention_mask": mask}


def gradients(model):
    model.zero_grad()
    logits = model(**batch()).logits
    logits.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return logits.detach(), torch.cat([found[name].flatten().double() for name in sorted(found)])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"quantization": "2bit"}, "expected '4bit', '8bit' or None"),
        ({"quantization": "4bit", "cache": True}, "without a cache"),
        ({"quantization": "4bit", "trains": "full", "preset": None, "r": None}, "only adapters train"),
    ],
)
def test_a_recipe_refuses_what_cannot_be_quantised(changes, expected):
    with pytest.raises(ConfigurationError, match=expected):
        RECIPES["lora"].replace(**changes)


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"esm-efficient-finetuning\[quantized\]"):
        quantization_config("4bit")


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_the_registry_finds_quantised_layers_and_heads_stay_whole(folder, bits):
    model = load(folder, bits)
    assert resolve_targets(model).modules == resolve_targets(make_random_model(num_hidden_layers=3)).modules
    kinds = {path: type(module).__name__ for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = {path for path, kind in kinds.items() if kind != "Linear"}
    assert quantised == set(resolve_targets(model).modules)
    whole = EsmForSequenceClassification.from_pretrained(folder)
    assert count_parameters(model.parameters()) == sum(p.numel() for p in whole.parameters())


@needs_bitsandbytes
@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bits", BITS)
def test_the_lean_encoder_computes_the_gradient_of_bitsandbytes_itself(folder, bits, device, recompute):
    model = adapted(load(folder, bits), lora_alpha=4)
    expected_logits, expected = gradients(model)
    apply_lean_encoder(model, recompute=recompute)
    with plan_as(device):
        logits, found = gradients(model)
    assert relative(logits, expected_logits) < 1e-5
    assert relative(found, expected) < 1e-5


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_the_lean_encoder_trains_after_a_prediction_of_bitsandbytes(folder, bits):
    """On some CPUs bitsandbytes repacks weights when they predict, and does not train with them any more."""
    model = adapted(load(folder, bits))
    expected_logits, expected = gradients(model)
    with torch.no_grad():
        model.eval()(**batch())
    logits, found = gradients(apply_lean_encoder(model).train())
    assert relative(logits, expected_logits) < 1e-5
    assert relative(found, expected) < 1e-5


@needs_bitsandbytes
def test_the_gradient_in_4_bits_is_that_of_the_restored_weights(folder):
    from bitsandbytes.functional import dequantize_4bit

    model = adapted(load(folder, "4bit"))
    whole = EsmForSequenceClassification.from_pretrained(folder)
    for path, module in model.get_base_model().named_modules():
        if type(module).__name__ == "Linear4bit" and path.endswith("base_layer"):
            linear = whole.get_submodule(path.removesuffix(".base_layer"))
            linear.weight.data = dequantize_4bit(module.weight, module.weight.quant_state)
    whole = adapted(whole)
    whole.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k or "modules_to" in k}, strict=False
    )
    for lean in (whole, model):
        apply_lean_encoder(lean)
    (expected_logits, expected), (logits, found) = gradients(whole), gradients(model)
    assert relative(logits, expected_logits) < 1e-5
    assert relative(found, expected) < 1e-5


@needs_bitsandbytes
def test_one_weight_at_a_time_is_restored(folder, monkeypatch):
    import weakref

    from bitsandbytes import functional

    alive, most, restore = [], [], functional.dequantize_4bit

    def watched(*args, **options):
        result = restore(*args, **options)
        alive[:] = [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(result))
        most.append(len(alive))
        return result

    model = apply_lean_encoder(adapted(load(folder, "4bit")))
    with plan_as("cuda"):
        monkeypatch.setattr(functional, "dequantize_4bit", watched)
        gradients(model)
    # Six per layer forward and backward. The first layer's inputs need no gradient.
    assert len(most) == 2 * 3 * 6 - 3
    assert set(most) == {1}


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=220, validation_partitions=())
    return DatasetDict(train=stratified_sample(splits["train"], 16), test=stratified_sample(splits["test"], 8))


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("bits", "precision"), slow_except([("4bit", "float32"), ("8bit", "float32"), ("4bit", "bf16")], ("4bit", "bf16"))
)
def test_finetune_trains_adapters_on_a_quantised_base_that_plain_peft_loads(tmp_path, data, bits, precision):
    options = {"quantization": bits, "precision": precision, "output_dir": tmp_path, "disable_tqdm": True}
    result = finetune(demo_model_path(), data, recipe="lora", **options)
    assert result.trained_layers == (0, 1, 2, 3)
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}
    assert not (tmp_path / "model").exists()
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    base = AutoModelForSequenceClassification.from_pretrained(
        demo_model_path(), quantization_config=quantization_config(bits, dtype=dtype), dtype=dtype, num_labels=2
    )
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    model = remove_lean_encoder(result.model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found, expected = plain(**batch()).logits, model(**batch()).logits
    # On some CPUs bitsandbytes rounds the scales of 4 bits when it predicts.
    assert relative(found.float(), expected.float()) < (1e-5 if bits == "8bit" else 1e-2)
    folder = export_model(result, tmp_path / "merged", base_model="demo")
    merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        assert relative(merged(**batch()).logits, expected.float()) < (
            1e-5 if (bits, precision) == ("4bit", "float32") else 2e-2
        )
    predicted = Predictor.load(tmp_path / "adapter", precision="float32").predict(["MKTAYIAKQRQISFVK"])[0].values
    assert predicted == pytest.approx(Predictor.load(folder).predict(["MKTAYIAKQRQISFVK"])[0].values, abs=0.01)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_a_merged_model_computes_what_its_quantised_base_and_adapters_do(folder, bits):
    model = adapted(load(folder, bits)).eval()
    with torch.no_grad():
        expected = model(**batch()).logits
        merged = merge_quantized(copy.deepcopy(model)).merge_and_unload()
        assert all(type(m) is nn.Linear for m in merged.modules() if isinstance(m, nn.Linear))
        # LLM.int8 rounds the inputs of products, and products with the restored weight do not.
        assert relative(merged(**batch()).logits, expected) < (1e-5 if bits == "4bit" else 2e-2)


def test_a_loaded_model_that_is_not_quantised_is_refused(data, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=2)
    with pytest.raises(ConfigurationError, match="not quantised"):
        finetune(model, data, recipe="lora", quantization="4bit", tokenizer=tokenizer)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_the_estimate_counts_the_bytes_of_quantised_weights(tmp_path, bits):
    config = tiny_config(hidden_size=320, intermediate_size=1280, num_attention_heads=20, num_hidden_layers=3)
    EsmForSequenceClassification(config).save_pretrained(tmp_path)
    real = prepare_model(load(tmp_path, bits), adapters=lora_config(load(tmp_path, bits)))
    sizes = {t.data_ptr(): t.nbytes for t in model_tensors(real)}
    scales = [getattr(p, "quant_state", None) for p in real.parameters()]
    for state in filter(None, scales):
        sizes |= {t.data_ptr(): t.nbytes for t in (state.absmax, state.state2.absmax)}
    sizes |= {p.SCB.data_ptr(): p.SCB.nbytes for p in real.parameters() if getattr(p, "SCB", None) is not None}
    recipe = RECIPES["lora"].replace(quantization=bits)
    predicted = estimate(config, recipe=recipe, device="cpu", precision="float32", tokens=30)
    assert predicted.peak.weights == pytest.approx(sum(sizes.values()), rel=0.01)
    assert predicted.total_parameters == count_parameters(real.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "device", "whole"), [("3B", "T4", True), ("15B", "A10G", False)])
def test_a_quantised_base_lets_large_models_train_on_small_gpus(size, device, whole):
    results = {
        bits: estimate(size, recipe=RECIPES["all"].replace(quantization=bits), device=device) for bits in (None, "4bit")
    }
    assert results["4bit"].fits()
    assert results[None].fits() == whole
    assert results["4bit"].peak.total < 0.4 * results[None].peak.total
    assert results["4bit"].total_parameters == results[None].total_parameters
    assert "base in 4 bits" in str(results["4bit"])
