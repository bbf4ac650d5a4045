"""Predictor: what plain transformers computes one sequence at a time, with the training's names and thresholds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_model
from scipy.special import expit, softmax
from transformers import AutoTokenizer, EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification

from esm_efficient import Predictor, demo_model_path, finetune, load_deeploc
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.inference import Prediction
from esm_efficient.tasks import Task

RESIDUES = list("ACDEFGHIKLMNPQRSTVWY")
HEADS = {
    "single_label_classification": EsmForSequenceClassification,
    "multi_label_classification": EsmForSequenceClassification,
    "regression": EsmForSequenceClassification,
    "token_classification": EsmForTokenClassification,
}


def sequences(count=30, *, longest=60, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(RESIDUES, int(n))) for n in rng.integers(1, longest, count)]


def model_for(kind, names=("a", "b", "c")):
    problem = None if kind == "token_classification" else kind
    return make_model(
        HEADS[kind],
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type=problem,
        label_thresholds={"a": 0.2, "b": 0.5, "c": 0.8},
    ).eval()


@torch.no_grad()
def logits_of(model, tokenizer, sequence):
    found = model(**tokenizer(sequence, return_tensors="pt")).logits[0].double().numpy()
    return found[1:-1] if found.ndim == 2 else found


@pytest.mark.parametrize("budget", [1, 200, 8192])
@pytest.mark.parametrize("kind", HEADS)
def test_predictions_are_those_of_one_sequence_at_a_time(tokenizer, kind, budget):
    given = sequences()
    expected = [logits_of(model_for(kind), tokenizer, s) for s in given]
    predictor = Predictor(model_for(kind), tokenizer)
    assert predictor.task == Task(kind, ("a", "b", "c"))
    found = predictor.predict(given, token_budget=budget)
    assert len(found) == len(given)
    for prediction, logits in zip(found, expected, strict=True):
        if kind == "regression":
            values, labels = logits, ()
        elif kind == "multi_label_classification":
            values = expit(logits)
            labels = tuple(n for n, v, t in zip("abc", values, (0.2, 0.5, 0.8), strict=True) if v >= t)
        else:
            values = softmax(logits, axis=-1)
            labels = tuple("abc"[i] for i in np.atleast_1d(logits.argmax(-1)))
        np.testing.assert_allclose(prediction.values, values, atol=1e-6)
        assert prediction.labels == labels
        assert json.loads(json.dumps(prediction.to_dict())) == prediction.to_dict()


def test_what_is_told_of_each_task():
    several = Task("multi_label_classification", ("a", "b"))
    assert Prediction(several, np.array([0.9, 0.1]), ("a",)).to_dict() == {
        "labels": ["a"],
        "probabilities": {"a": 0.9, "b": 0.1},
    }
    assert Prediction(Task("regression", ("tm",)), np.array([51.5]), ()).to_dict() == {"values": {"tm": 51.5}}
    residues = Task("token_classification", ("free", "bound"))
    assert Prediction(residues, np.array([[0.25, 0.75], [1, 0]]), ("bound", "free")).to_dict() == {
        "labels": ["bound", "free"],
        "scores": [0.75, 1.0],
    }


def test_sequences_are_cleaned_cut_as_told_or_refused(tokenizer):
    predictor = Predictor(model_for("single_label_classification"), tokenizer, max_tokens=12)
    clean, raw = predictor.predict(["MKTAYI", "mk-ta\nyi*"])
    np.testing.assert_array_equal(clean.values, raw.values)
    long = "ACDEFGHIKLMNPQ"
    with pytest.raises(DataError, match=r"more than 10 residues: sequence 2 \(14\)"):
        predictor.predict(["MK", long])
    for keep, part in (("start", long[:10]), ("end", long[-10:]), ("both", long[:5] + long[-5:])):
        found, expected = predictor.predict([long], keep=keep) + predictor.predict([part])
        np.testing.assert_allclose(found.values, expected.values, atol=1e-7)
    assert predictor.predict([]) == []
    with pytest.raises(DataError, match="hold no residue: sequence 1"):
        predictor.predict(["--*"])
    with pytest.raises(DataError, match="are no text: sequence 2"):
        predictor.predict(["MK", None])
    with pytest.raises(DataError, match="put it into a list"):
        predictor.predict("MKT")


def test_models_that_cannot_predict_are_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigurationError, match="EsmForMaskedLM has no classification head"):
        Predictor(make_model(EsmForMaskedLM), tokenizer)
    with pytest.raises(ConfigurationError, match="expected room for a residue"):
        Predictor(model_for("regression"), tokenizer, max_tokens=2)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        Predictor.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="pickled weights are not read"):
        Predictor.load(tmp_path)


@pytest.mark.parametrize("recipe", ["lora", "base"])
def test_the_folder_of_an_adapter_and_of_a_whole_model_load(tmp_path, demo_table, recipe):
    data = load_deeploc(demo_table, max_residues=160, validation_partitions=())
    options = {"max_steps": 2, "precision": "float32", "learning_rate": 1e-2, "disable_tqdm": True}
    result = finetune(demo_model_path(), data, recipe=recipe, output_dir=tmp_path, **options)
    predictor = Predictor.load(result.model_dir, device="cpu")
    assert predictor.task.names == ("non-membrane", "membrane")
    given = data["test"]["sequence"][:5]
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    expected = softmax(np.stack([logits_of(result.model, tokenizer, s) for s in given]), axis=-1)
    np.testing.assert_allclose([p.values for p in predictor.predict(given)], expected, atol=1e-5)
