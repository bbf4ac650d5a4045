"""export_model(onnx=True): onnxruntime computes the logits of plain transformers, for every task and any batch."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from conftest import make_model, slow_except
from peft import LoraConfig, get_peft_model
from sequence_texts import sequences
from transformers import AutoTokenizer, EsmForSequenceClassification, EsmForTokenClassification

from esm_efficient import PooledEsmForSequenceClassification, export_model
from esm_efficient.cli import main
from esm_efficient.errors import ConfigurationError

TASKS = {
    "class": (EsmForSequenceClassification, {"problem_type": "single_label_classification"}),
    "several labels": (
        PooledEsmForSequenceClassification,
        {"problem_type": "multi_label_classification", "classifier_pooling": "mean"},
    ),
    "numbers": (
        PooledEsmForSequenceClassification,
        {"problem_type": "regression", "classifier_pooling": "attention"},
    ),
    "residues": (EsmForTokenClassification, {}),
}
BATCHES = [["MKTAYIAKQR"], ["M", "MALWMRLLPLLALLALWGPDPAAA"], sequences(9, longest=60), sequences(2, longest=700)]


def trained(kind):
    """A model of a task whose logits are far from 0; that of one class has an adapter."""
    head, options = TASKS[kind]
    model = make_model(head, num_labels=3, initializer_range=0.5, **options)
    if kind != "class":
        return model
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_onnxruntime_computes_the_logits_of_plain_transformers(tmp_path, tokenizer, kind):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder = export_model(trained(kind), tmp_path / "out", base_model="someone/demo", tokenizer=tokenizer, onnx=True)
    model, reader = TASKS[kind][0].from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [tuple(given.shape) for given in session.get_inputs()] == [("sequences", "tokens")] * 2
    largest = 0.0
    for texts in BATCHES:
        batch = reader(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch).logits.numpy()
        given = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        [found] = session.run(["logits"], given)
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        kept = given["attention_mask"] == 1 if kind == "residues" else slice(None)
        np.testing.assert_allclose(found[kept], expected[kept], atol=1e-4, rtol=0)
        largest = max(largest, np.abs(expected).max())
    assert largest > 0.3


def test_without_the_packages_nothing_is_done(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigurationError, match=r"onnxscript.*, not installed here: pip install 'esm-.*\[onnx\]'"):
        export_model(trained("class"), tmp_path / "out", base_model="someone/demo", tokenizer=tokenizer, onnx=True)
    (tmp_path / "run").mkdir()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--onnx"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --onnx needs ")
    assert ", not installed here: pip install " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_model_does_not_stay(tmp_path, tokenizer, caplog):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_text("of another model")
    export_model(trained("residues"), folder, base_model="someone/demo", tokenizer=tokenizer)
    assert not list(folder.glob("*.onnx*"))
    (told,) = [record.getMessage() for record in caplog.records if "model.onnx" in record.getMessage()]
    assert told.endswith("is removed: give onnx=True to write this model's")
    caplog.clear()
    export_model(trained("residues"), folder, base_model="someone/demo", tokenizer=tokenizer)
    assert "model.onnx" not in caplog.text


@pytest.mark.parametrize("fault", slow_except(["other logits", "no translation"], "no translation"))
def test_a_wrong_file_is_an_error_and_is_removed(tmp_path, tokenizer, monkeypatch, fault):
    """A program of torch that onnxruntime would compute wrongly, or that torch cannot translate."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    real = torch.onnx.export

    def export(network, *rest, **options):
        if fault == "no translation":
            raise torch.onnx.errors.OnnxExporterError("nothing knows the operator") from TypeError("the cause")
        other = copy.deepcopy(network)
        other.model.classifier.out_proj.bias.data += 1e-3
        return real(other, *rest, **options)

    monkeypatch.setattr(torch.onnx, "export", export)
    message = {"other logits": "differ from those of the model by 0.001", "no translation": r"TypeError: the cause"}
    with pytest.raises(ConfigurationError, match=message[fault]):
        export_model(trained("class"), tmp_path / "out", base_model="someone/demo", tokenizer=tokenizer, onnx=True)
    assert not list((tmp_path / "out").glob("*.onnx*"))
