"""Predictor: equal to plain transformers on one sequence at a time, with the names and thresholds of the training."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import make_model
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from huggingface_hub.errors import RepositoryNotFoundError
from scipy.special import expit, softmax
from sequence_texts import sequences
from transformers import AutoTokenizer, EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification

from esm_efficient import (
    Embedder,
    OutOfMemoryError,
    Predictor,
    apply_lean_encoder,
    demo_model_path,
    export_model,
    finetune,
    load_deeploc,
)
from esm_efficient.costs.devices import native_precision
from esm_efficient.encoder import forward
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.inference import Prediction
from esm_efficient.inference.loading import default_device, place
from esm_efficient.tasks import Task

HEADS = {
    "single_label_classification": EsmForSequenceClassification,
    "multi_label_classification": EsmForSequenceClassification,
    "regression": EsmForSequenceClassification,
    "token_classification": EsmForTokenClassification,
}


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


@pytest.mark.parametrize("kind", HEADS)
def test_the_lean_encoder_is_told_the_lengths_and_reads_no_mask(tokenizer, kind, monkeypatch):
    monkeypatch.setattr(forward, "make_packing", None)
    assert len(Predictor(model_for(kind), tokenizer).predict(sequences(), token_budget=200)) == len(sequences())


def test_the_dict_of_a_prediction_fits_its_task():
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


def test_a_model_in_training_keeps_the_options_of_its_lean_encoder(tokenizer):
    model = apply_lean_encoder(make_model(), recompute="layer", attention="sequences")
    state = model.esm._lean_state
    Predictor(model, tokenizer).predict(["MKTAYI"])
    Embedder(model, tokenizer).embed(["MKTAYI"])
    Embedder(model, tokenizer, layer=1).embed(["MKTAYI"])
    assert model.esm._lean_state is state
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sequences_are_cleaned_and_long_ones_truncated_or_refused(tokenizer):
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
    with pytest.raises(DataError, match="sequence 1 is empty"):
        predictor.predict(["--*"])
    with pytest.raises(DataError, match="are not texts: sequence 2"):
        predictor.predict(["MK", None])
    with pytest.raises(DataError, match="put it into a list"):
        predictor.predict("MKT")


def test_output_that_is_not_finite_is_an_error(tokenizer):
    model = model_for("single_label_classification")
    torch.nn.init.constant_(model.classifier.out_proj.bias, float("nan"))
    with pytest.raises(
        ConfigurationError, match=r"output for 2 of 2 sequence\(s\) is not finite \(sequence 1, sequence 2"
    ):
        Predictor(model, tokenizer).predict(["MKT", "MAL"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_thresholds": {"a": "high"}}, "label_thresholds .*expected a probability by label name"),
        ({"label_thresholds": {"a": 7.0}}, "expected a probability by label name"),
        ({"label_thresholds": [0.5, 0.5, 0.5]}, "expected a probability by label name"),
        ({"id2label": {0: "a", 1: "a", 2: "c"}}, "the label names 'a', 'a', 'c'.*different names"),
        ({"problem_type": "guess"}, "has problem_type 'guess'"),
        ({"vocab_size": 20}, "tokenizer has the id 32, but the model has 20 tokens"),
    ],
)
def test_a_config_that_fits_no_task_is_refused(tokenizer, changes, message):
    model = model_for("multi_label_classification")
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ConfigurationError, match=message):
        Predictor(model, tokenizer)


def test_models_that_cannot_predict_are_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigurationError, match="EsmForMaskedLM has no classification head"):
        Predictor(make_model(EsmForMaskedLM), tokenizer)
    with pytest.raises(ConfigurationError, match="expected room for a residue"):
        Predictor(model_for("regression"), tokenizer, max_tokens=2)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        Predictor.load(tmp_path)
    shutil.copytree(demo_model_path(), tmp_path / "whole", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "whole" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"whole has no safetensors with weights, and pickled ones"):
        Predictor.load(tmp_path / "whole")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="pickled weights are not read"):
        Predictor.load(tmp_path)


def train(recipe, demo_table, output_dir):
    data = load_deeploc(demo_table, max_residues=160, validation_partitions=())
    options = {"max_steps": 2, "precision": "float32", "learning_rate": 1e-2, "disable_tqdm": True}
    result = finetune(demo_model_path(), data, recipe=recipe, output_dir=output_dir, **options)
    given = data["test"]["sequence"][:5]
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    return result, given, softmax(np.stack([logits_of(result.model, tokenizer, s) for s in given]), axis=-1)


@pytest.mark.parametrize("recipe", ["lora", "base"])
def test_an_adapter_and_a_whole_model_load_from_their_folders(tmp_path, demo_table, recipe):
    result, given, expected = train(recipe, demo_table, tmp_path)
    predictor = Predictor.load(result.model_dir, device="cpu")
    assert predictor.task.names == ("non-membrane", "membrane")
    np.testing.assert_allclose([p.values for p in predictor.predict(given)], expected, atol=1e-5)


def test_an_adapter_for_residues_loads_although_the_pretrained_config_names_another_head(tmp_path):
    given = sequences(12)
    rows = {"sequence": given, "label": [[int(letter == "K") for letter in sequence] for sequence in given]}
    split = Dataset.from_dict(
        rows, Features({"sequence": Value("string"), "label": List(ClassLabel(names=["no", "yes"]))})
    )
    data = DatasetDict(train=split, test=split)
    result = finetune(demo_model_path(), data, recipe="lora", output_dir=tmp_path, max_steps=2, disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    exported = export_model(result, tmp_path / "exported", base_model=demo_model_path())
    for folder in (result.model_dir, exported, exported / "adapter"):
        for sequence, logits in zip(given, Predictor.load(folder, device="cpu").logits(given), strict=True):
            np.testing.assert_allclose(logits, logits_of(result.model, tokenizer, sequence), atol=1e-5)


def put_into_cache(cache: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Lay out a model as huggingface_hub does after a download: refs, snapshots, and blobs that they link to."""
    home = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
    for part in ("blobs", "refs"):
        (home / part).mkdir(parents=True, exist_ok=True)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            link = home / "snapshots" / commit / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs" / revision).write_text(commit)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("recipe", ["lora", "base"])
def test_an_adapter_and_a_whole_model_load_by_their_hub_names(tmp_path, demo_table, offline, monkeypatch, recipe):
    result, given, expected = train(recipe, demo_table, tmp_path / "output")
    cache = tmp_path / "cache"
    if recipe == "lora":
        path = Path(result.model_dir) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "someone/base"}))
    put_into_cache(cache, "someone/membrane", result.model_dir)
    put_into_cache(cache, "someone/membrane", result.model_dir, revision="v2")
    if recipe == "lora":
        with pytest.raises(ConfigurationError, match="the base model 'someone/base' of the adapter"):
            Predictor.load("someone/membrane", cache_dir=cache)
        put_into_cache(cache, "someone/base", demo_model_path())
    for options in ({}, {"revision": "v2"}):
        predictor = Predictor.load("someone/membrane", cache_dir=cache, device="cpu", **options)
        np.testing.assert_allclose([p.values for p in predictor.predict(given)], expected, atol=1e-5)
    with pytest.raises(ConfigurationError, match=r"no complete copy of revision 'v3'.*--revision v3"):
        Predictor.load("someone/membrane", cache_dir=cache, revision="v3")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert Predictor.load("someone/membrane", device="cpu").task == predictor.task


def test_a_pickled_adapter_on_the_hub_is_refused(tmp_path, offline):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    put_into_cache(tmp_path / "cache", "someone/pickled", folder)
    with pytest.raises(ConfigurationError, match="pickled weights are not read"):
        Predictor.load("someone/pickled", cache_dir=tmp_path / "cache")


def test_only_safetensors_and_text_are_downloaded(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        Predictor.load("someone/membrane", revision="v2", cache_dir=tmp_path)
    assert asked == {
        "name": "someone/membrane",
        "revision": "v2",
        "cache_dir": tmp_path,
        "allow_patterns": ["*.safetensors", "*.json", "*.txt"],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "there is no folder nope, and it is not a Hub name of the form owner/name"),
        ("/nope/at/all", "there is no folder /nope/at/all, and"),
        ("output/nope/model", "there is no folder output/nope/model, and"),
        (Path("no-such-output/adapter"), "there is no folder no-such-output/adapter$"),
        (
            "someone/absent",
            "someone/absent, and .*HF_HUB_OFFLINE is set.*hf download someone/absent --local-dir absent",
        ),
        ("8M", "8M is a pretrained model without a trained head, .*such as output/adapter"),
        ("facebook/esm2_t6_8M_UR50D", "is a pretrained model without a trained head"),
        (["demo", "8M"], "demo is a pretrained model without a trained head"),
    ],
)
def test_the_error_for_a_missing_model_says_what_was_looked_for(tmp_path, offline, name, message):
    with pytest.raises(ConfigurationError, match=message):
        Predictor.load(name, cache_dir=tmp_path)


def test_the_error_of_the_hub_is_passed_on(monkeypatch):
    def refuse(name, **options):
        raise RepositoryNotFoundError("404: no such repository", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigurationError, match=r"does not give the model 'someone/absent': 404.*hf auth login"):
        Predictor.load("someone/absent")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_predicts_almost_the_numbers_of_float32(tokenizer, precision, dtype):
    model, given = model_for("single_label_classification"), sequences(8)
    exact = Predictor(model, tokenizer).logits(given)
    predictor = Predictor(model, tokenizer, precision=precision)
    half = predictor.logits(given)
    assert predictor.half is dtype
    error = np.abs(np.stack(half) - np.stack(exact)).max()
    assert 0 < error < 0.02 * np.abs(np.stack(exact)).max()


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), None)],
)
def test_the_device_decides_the_precision_of_predictions(monkeypatch, capability, dtype):
    """torch reports support for bfloat16 on a T4 (7.5) too: it emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability >= (8, 0)
    )
    expected = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    assert native_precision(torch.device("cuda")) == expected
    assert native_precision(torch.device("cpu")) == "float32"


def test_the_precision_is_that_of_the_model_s_device_and_not_of_another_one(monkeypatch):
    current = [0]

    @contextmanager
    def device(chosen):
        before, current[0] = current[0], chosen.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    capabilities = [(8, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capabilities[current[0]] >= (8, 0))
    assert [native_precision(torch.device("cuda", number)) for number in (0, 1)] == ["bf16", "fp16"]


def test_an_unknown_precision_is_refused(tokenizer):
    with pytest.raises(ConfigurationError, match="precision='pure-bf16': expected"):
        Predictor(model_for("regression"), tokenizer, precision="pure-bf16")


@pytest.mark.parametrize(("known", "longest"), [(30, 30), (514.0, 514), (int(1e30), 1024), (0, 1024)])
def test_the_most_tokens_are_those_of_the_tokenizer(tokenizer, known, longest):
    bounded = copy.copy(tokenizer)
    bounded.model_max_length = known
    predictor = Predictor(model_for("regression"), bounded)
    assert predictor.max_tokens == longest
    assert Predictor(model_for("regression"), bounded, max_tokens=99).max_tokens == 99
    with pytest.raises(DataError, match=f"more than {longest - 2} residues"):
        predictor.predict(["M" * (longest - 1)])


@pytest.mark.parametrize(
    ("rank", "devices", "expected"), [(None, 4, "cuda"), ("0", 4, "cuda:0"), ("3", 4, "cuda:3"), ("3", 1, "cuda:0")]
)
def test_each_rank_of_a_machine_has_an_accelerator_of_its_own(monkeypatch, rank, devices, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    if rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert default_device() == torch.device(expected)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_too_little_memory_of_the_device_is_explained(tokenizer, monkeypatch):
    predictor = Predictor(model_for("regression"), tokenizer)

    def full(*args, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predictor.model, "forward", full)
    with pytest.raises(OutOfMemoryError, match=r"2 sequence\(s\) of up to 5 tokens.*than token_budget=99"):
        predictor.predict(["MKT", "MAL"], token_budget=99)
    with pytest.raises(OutOfMemoryError, match="That is one sequence: use a smaller model"):
        predictor.predict(["MKT"])
    model = model_for("regression")
    monkeypatch.setattr(model, "to", full)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="device='cuda': torch finds no CUDA device here"):
            place(model, "cuda")
    with pytest.raises(ConfigurationError, match="device='gpu': Expected one of cpu, cuda"):
        place(model, "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigurationError, match=r"device='cuda:1': torch finds 1 CUDA device\(s\), and counts them"):
        place(model, "cuda:1")
    with pytest.raises(OutOfMemoryError, match="cuda has too little free memory for a model of "):
        place(model, torch.device("cuda"))


def test_the_numbers_of_a_model_leave_the_device_before_they_become_float64(tokenizer, monkeypatch):
    """An Apple GPU has no float64."""
    predictor = Predictor(model_for("regression"), tokenizer)
    order = []

    class Recorded(torch.Tensor):
        def cpu(self):
            order.append("cpu")
            return torch.Tensor.cpu(self).as_subclass(torch.Tensor)

        def double(self):
            order.append("double")
            return torch.Tensor.double(self)

    forward = predictor.model.forward

    def recorded(**inputs):
        found = forward(**inputs)
        found.logits = found.logits.as_subclass(Recorded)
        return found

    monkeypatch.setattr(predictor.model, "forward", recorded)
    predictor.predict(["MKT"])
    assert order == ["cpu"]
