"""export_model(): plain transformers and peft load the folder, and its card contains the metrics."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from esm_efficient import demo_model_path, export_model, finetune, load_deeploc
from esm_efficient.errors import ConfigurationError

SEQUENCES = ["MKTAYIAKQR", "MALWMRLLPLLALLALWGPDPAAA"]


@pytest.fixture(scope="module", params=["lora", "base", "several labels", "bf16"])
def run(request, tmp_path_factory, demo_table):
    folder = tmp_path_factory.mktemp("run")
    several = request.param == "several labels"
    data = load_deeploc(demo_table, task="location" if several else "membrane", max_residues=180)
    result = finetune(
        demo_model_path(),
        data,
        recipe="base" if request.param == "base" else "lora",
        output_dir=folder,
        class_weights=None,
        precision="bf16" if request.param == "bf16" else "float32",
        max_steps=3,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    return result, export_model(result, folder / "out", base_model="someone/demo", dataset="the demo's table")


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(SEQUENCES, return_tensors="pt", padding=True)).logits


def test_plain_transformers_and_peft_load_it_and_compute_the_same(run):
    result, folder = run
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Weights that were bfloat16 during training are exported with their rounding; accelerate's autocast is removed.
    trained = extract_model_from_parallel(copy.deepcopy(result.model), keep_fp32_wrapper=False)
    expected = logits_of(trained.float(), tokenizer)
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.allclose(logits_of(merged, tokenizer), expected, atol=1e-5)
    assert merged.config.id2label == dict(enumerate(result.task.names))
    assert getattr(merged.config, "label_thresholds", None) == result.thresholds
    if (folder / "adapter").exists():
        torch.manual_seed(5)
        base = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=len(result.task.names))
        adapted = logits_of(PeftModel.from_pretrained(base, folder / "adapter"), tokenizer)
        # The base model's weights are not rounded to bfloat16 here.
        assert torch.allclose(adapted, expected, atol=0.1)
    else:
        assert result.recipe == "base"


def test_no_file_is_pickled_or_contains_a_path_of_the_machine(run):
    result, folder = run
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} if result.recipe != "base" else set()
    wanted = {"config.json", "model.safetensors", "metrics.json", "README.md", "vocab.txt", "tokenizer_config.json"}
    assert wanted | adapter <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    for name in names:
        if not name.endswith(".safetensors"):
            text = (folder / name).read_text()
            assert str(result.model_dir) not in text, name
            assert str(demo_model_path()) not in text, name


def test_the_card_loads_with_the_hubs_library_and_contains_the_metrics(run):
    result, folder = run
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/demo"
    metrics = {e.metric_type: e.metric_value for e in card.data.eval_results}
    finite = {name: value for name, value in result.metrics.items() if value == value}
    assert metrics == pytest.approx(finite, abs=1e-6)
    assert {e.dataset_name for e in card.data.eval_results} == {"the demo's table"}
    for name in result.task.names:
        assert name in card.content
    assert ("A label is positive from this probability on:" in card.content) == (result.thresholds is not None)
    assert "Predictions are estimates: they do not replace an experiment." in card.content
    record = json.loads((folder / "metrics.json").read_text())
    assert record["metrics"] == result.to_dict()["metrics"]


def test_a_file_in_place_of_the_folder_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        export_model(run[0], tmp_path / "file", base_model="someone/demo")
