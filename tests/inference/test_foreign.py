"""Model folders by strangers are refused before anything is built, and heads that were not saved are never drawn."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import make_model
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from transformers import (
    AutoTokenizer,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
)

from esm_efficient import Predictor, Task, demo_model_path
from esm_efficient.errors import ConfigurationError
from esm_efficient.inference import loading
from esm_efficient.saving import portable_saving

SEQUENCES = ["MKTAYIAKQR", "MALWMRLLPLLALLALWGPDPAAA"]
TASK = Task("single_label_classification", ("no", "yes"))
BOMB = r"(([a-z]+\.?)+)+\d*!"


def save(model, folder, tokenizer):
    with portable_saving(model):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path, tokenizer):
    """A pretrained model without a head."""
    return save(make_model(EsmForMaskedLM), tmp_path / "base", tokenizer)


@pytest.fixture
def whole(tmp_path, tokenizer):
    """A fine-tuned classifier."""
    return save(make_model(seed=1), tmp_path / "whole", tokenizer)


def adapter_of(base, folder, head=EsmForSequenceClassification, **options):
    """Save an adapter with peft alone, and return the model."""
    torch.manual_seed(3)
    model = head.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
    adapted = get_peft_model(model, LoraConfig(**(settings | options)))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "magnitude" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted.eval()


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@torch.no_grad()
def probabilities(model, tokenizer):
    logits = [model(**tokenizer(s, return_tensors="pt")).logits[0].double().numpy() for s in SEQUENCES]
    return [softmax(row, -1) for row in logits]


# --- heads ---


@pytest.mark.parametrize("head", [EsmForMaskedLM, EsmModel])
def test_a_pretrained_model_without_a_head_is_refused(tmp_path, tokenizer, head):
    folder = save(make_model(head), tmp_path / "base", tokenizer)
    with pytest.raises(
        ConfigurationError, match=r"lacks 4 weights of EsmForSequenceClassification \(classifier\.dense"
    ):
        Predictor.load(folder)
    with pytest.raises(ConfigurationError, match="without a trained head"):
        Predictor.load(demo_model_path())


def test_an_adapter_whose_head_was_not_saved_is_refused(tmp_path, base):
    adapter_of(base, tmp_path / "adapter", task_type=None)
    with pytest.raises(ConfigurationError, match=r'lacks 4 weights.*modules_to_save=\["classifier"\]'):
        Predictor.load(tmp_path / "adapter", task=TASK)
    adapter_of(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    del weights["base_model.model.classifier.out_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lacks 1 weights .*\(classifier\.out_proj\.weight\)"):
        Predictor.load(tmp_path / "adapter", task=TASK)


def test_an_adapter_without_a_head_on_a_trained_classifier_loads(tmp_path, whole, tokenizer):
    model = adapter_of(whole, tmp_path / "adapter", task_type=None)
    found = Predictor.load(tmp_path / "adapter", task=TASK, device="cpu").predict(SEQUENCES)
    np.testing.assert_allclose([p.values for p in found], probabilities(model, tokenizer), atol=1e-5)


def test_a_contact_head_that_was_not_saved_does_not_matter(whole):
    path = whole / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "contact" not in k}, path, metadata={"format": "pt"})
    assert Predictor.load(whole, device="cpu").predict(SEQUENCES)


# --- adapters that peft saved ---

OPTIONS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bias": {"lora_bias": True},
    "one pattern": {"target_modules": r".*\.attention\.self\.(query|key)"},
    "patterns": {
        "rank_pattern": {"query": 2, r"^esm\.encoder\.layer\.1\.output\.dense": 3},
        "alpha_pattern": {r"layer\.0\.output\.dense": 5},
    },
    "some layers": {"layers_to_transform": [1], "target_modules": ["query"]},
    "excluded": {"exclude_modules": r".*attention\.output\.dense"},
    "embeddings": {"target_modules": ["word_embeddings", "query"]},
    "another saved module": {"modules_to_save": ["emb_layer_norm_after"]},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapter_that_peft_saved_predicts_as_in_peft(tmp_path, base, tokenizer, options):
    model = adapter_of(base, tmp_path / "adapter", **options)
    predictor = Predictor.load(tmp_path / "adapter", task=TASK, device="cpu")
    assert predictor.task == TASK
    found = [p.values for p in predictor.predict(SEQUENCES)]
    np.testing.assert_allclose(found, probabilities(model, tokenizer), atol=1e-5)


def test_an_adapter_for_residues_predicts_as_in_peft(tmp_path, base, tokenizer):
    model = adapter_of(base, tmp_path / "adapter", EsmForTokenClassification, task_type="TOKEN_CLS")
    task = Task("token_classification", ("free", "bound"))
    found = Predictor.load(tmp_path / "adapter", task=task, device="cpu").predict(SEQUENCES)
    for prediction, expected in zip(found, probabilities(model, tokenizer), strict=True):
        np.testing.assert_allclose(prediction.values, expected[1:-1], atol=1e-5)


def test_an_adapter_without_label_names_says_how_to_give_them(tmp_path, base):
    adapter_of(base, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"no base_config/ with the task and the label names.*task=Task\("):
        Predictor.load(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="does not fit its base model"):
        Predictor.load(tmp_path / "adapter", task=Task("regression", ("tm",)))


def test_an_adapter_without_its_base_model_says_where_to_write_its_name(tmp_path, base):
    adapter_of(base, tmp_path / "adapter")
    shutil.rmtree(base)
    with pytest.raises(
        ConfigurationError, match=r"the base model .*base' of the adapter .*is not available.*Write its"
    ):
        Predictor.load(tmp_path / "adapter", task=TASK)
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ConfigurationError, match="does not name its base model"):
        Predictor.load(tmp_path / "adapter", task=TASK)


# --- folders by strangers ---

ADAPTER_CHANGES = {
    "a rank of a billion": ({"r": 10**9}, "rank 1000000000 for .*but its weights have rank 4"),
    "a rank by pattern": ({"rank_pattern": {"query": 10**9}}, "rank 1000000000 for .*weights have rank 4"),
    "a rank of text": ({"r": "8"}, "r='8', which is not a value"),
    "a negative rank": ({"r": -1}, "not a value of this option"),
    "an infinite scale": ({"lora_alpha": float("inf")}, "not a value of this option"),
    "an unknown type": ({"peft_type": "EVIL"}, "adapters of type 'EVIL': expected LORA"),
    "another type": ({"peft_type": "VERA"}, "adapters of type 'VERA': expected LORA"),
    "no type": ({"peft_type": None}, "adapters of type 'None'"),
    "a bomb among the ranks": ({"rank_pattern": {BOMB: 8}}, "Regular expressions of other people are not evaluated"),
    "a bomb among the scales": ({"alpha_pattern": {BOMB: 8}}, "Regular expressions of other people"),
    "copied layers": ({"layer_replication": [[0, 10**9]]}, "options layer_replication, which are not read"),
    "an import": ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "options megatron_config"),
    "a random base": ({"init_lora_weights": "pissa_niter_1000000000"}, "changes the base model's weights at random"),
    "an unknown option": ({"brand_new": {"x": 1}}, "options brand_new"),
    "saved modules of numbers": ({"modules_to_save": [1]}, "modules_to_save=\\[1\\]"),
}


@pytest.mark.parametrize(("changes", "message"), ADAPTER_CHANGES.values(), ids=ADAPTER_CHANGES)
def test_an_adapters_config_is_checked_before_anything_is_built(tmp_path, base, monkeypatch, changes, message):
    adapter_of(base, tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", **changes)
    built = []
    monkeypatch.setattr(EsmModel, "__init__", lambda *args, **options: built.append(args))
    with pytest.raises(ConfigurationError, match=message):
        Predictor.load(tmp_path / "adapter", task=TASK)
    assert built == []


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "layers_pattern"])
def test_patterns_for_layers_are_not_evaluated(tmp_path, base, tokenizer, name):
    model = adapter_of(base, tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", **{name: BOMB})
    start = time.monotonic()
    found = Predictor.load(tmp_path / "adapter", task=TASK, device="cpu").predict(SEQUENCES)
    assert time.monotonic() - start < 10
    np.testing.assert_allclose([p.values for p in found], probabilities(model, tokenizer), atol=1e-5)


def test_an_adapter_for_another_model_or_without_lora_is_refused(tmp_path, base):
    adapter_of(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({k.replace("layer.1.", "layer.7."): v for k, v in weights.items()}, path)
    with pytest.raises(ConfigurationError, match=r"for layers that .*base does not have: esm\.encoder\.layer\.7"):
        Predictor.load(tmp_path / "adapter", task=TASK)
    save_file({k: v for k, v in weights.items() if "lora" not in k}, path)
    with pytest.raises(ConfigurationError, match="has no weights of LoRA"):
        Predictor.load(tmp_path / "adapter", task=TASK)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigurationError, match="cannot be read as safetensors"):
        Predictor.load(tmp_path / "adapter", task=TASK)


def test_other_adapters_are_refused_with_the_way_to_merge_them(tmp_path, base):
    model = EsmForSequenceClassification.from_pretrained(base)
    settings = {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]}
    get_peft_model(model, IA3Config(task_type="SEQ_CLS", **settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ConfigurationError, match=r"type 'IA3': expected LORA. Merge other adapters with merge_and_unload"
    ):
        Predictor.load(tmp_path / "adapter", task=TASK)


CONFIG_CHANGES = {
    "a billion layers": ({"num_hidden_layers": 10**9}, "describes 1,000,000,000 layers"),
    "a wide layer": ({"hidden_size": 10**6}, "of width 1,000,000 .*but the files have"),
    "a large vocabulary": ({"vocab_size": 10**9}, "vocabulary of 1,000,000,000"),
    "a wide MLP": ({"intermediate_size": 10**9}, "the config and the weights are not of the same model"),
    "sizes of text": (
        {"hidden_size": "16"},
        "hidden_size='16': expected positive whole numbers|not the config of an ESM",
    ),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected positive whole numbers"),
    "heads that do not divide": ({"num_attention_heads": 3}, "width 16 with 3 heads"),
    "another kind of model": ({"model_type": "llama"}, "model of type 'llama': expected esm"),
    "an unknown kind": ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "type 'evil': expected esm"),
    "quantized weights": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized weights"),
    "labels with holes": ({"id2label": {"0": "no", "5": "yes"}}, "does not name each label once|not the config"),
    "labels that repeat": ({"id2label": {"0": "no", "1": "no"}}, "does not name each label once"),
    "a larger head": ({"id2label": {str(i): f"c{i}" for i in range(5)}}, "cannot be loaded"),
    "names of a billion labels": ({"num_labels": 10**9}, "num_labels=1,000,000,000: expected at most 100,000"),
    "a billion positions": (
        {"max_position_embeddings": 10**9},
        "max_position_embeddings=1,000,000,000: expected",
    ),
    "an unknown dtype": ({"dtype": "float33"}, "not the config of an ESM model|cannot be loaded"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIG_CHANGES.values(), ids=CONFIG_CHANGES)
def test_a_models_config_is_compared_with_its_weights(whole, changes, message):
    change(whole / "config.json", **changes)
    with pytest.raises(ConfigurationError, match=message):
        Predictor.load(whole)


def test_the_layers_of_a_base_model_are_compared_with_its_weights_before_they_are_built(tmp_path, base, monkeypatch):
    """The config beside the adapter is right: the base model may have more layers than were trained."""
    adapter_of(base, tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "adapter" / "base_config")
    change(base / "config.json", num_hidden_layers=10**9)
    monkeypatch.delattr(loading, "load_pretrained")
    with pytest.raises(ConfigurationError, match=r"base describes 1,000,000,000 layers"):
        Predictor.load(tmp_path / "adapter", task=TASK)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\x00"])
@pytest.mark.parametrize("name", ["config.json", "base_config/config.json", "adapter_config.json"])
def test_a_damaged_config_is_an_error_of_ours(tmp_path, base, whole, name, content):
    folder = whole
    if name != "config.json":
        folder = tmp_path / "adapter"
        adapter_of(base, folder)
        shutil.copytree(whole, folder / "base_config")
    (folder / name).write_text(content)
    with pytest.raises(ConfigurationError, match=r"cannot be read as JSON|expected a JSON object"):
        Predictor.load(folder)


def test_no_code_of_a_folder_runs(whole, tmp_path):
    marker = tmp_path / "ran"
    (whole / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n")
    change(whole / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    change(whole / "config.json", attn_implementation="stranger/kernel")
    change(whole / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    predictor = Predictor.load(whole, device="cpu")
    assert predictor.predict(SEQUENCES)
    assert not marker.exists()


def test_a_tokenizer_that_cannot_be_loaded_is_an_error_of_ours(whole):
    (whole / "vocab.txt").unlink()
    (whole / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"has no tokenizer that can be loaded|the tokenizer has no token"):
        Predictor.load(whole)


def test_the_tokenizer_may_be_beside_the_adapter_or_the_base(tmp_path, base, tokenizer):
    adapter_of(base, tmp_path / "adapter")
    expected = Predictor.load(tmp_path / "adapter", task=TASK, device="cpu").predict(SEQUENCES)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    (base / "vocab.txt").unlink()
    found = Predictor.load(tmp_path / "adapter", task=TASK, device="cpu").predict(SEQUENCES)
    np.testing.assert_array_equal([p.values for p in found], [p.values for p in expected])
