"""Ensembles: the mean of several adapters over one base model equals the mean of the single predictors."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import each_value, make_model
from datasets import Dataset, Features, Value
from peft import LoraConfig, get_peft_model
from sequence_texts import sequences
from transformers import EsmForSequenceClassification, EsmForTokenClassification, EsmModel

from esm_efficient import PooledEsmForSequenceClassification, Predictor, evaluate, multi_label_metrics, predict_file
from esm_efficient.cli import main
from esm_efficient.encoder import has_lean_encoder
from esm_efficient.errors import ConfigurationError
from esm_efficient.inference.identity import identity_of
from esm_efficient.saving import portable_saving, save_base_config
from esm_efficient.tasks import set_pooling

NAMES = ("a", "b", "c")
WIDTH = 24
KINDS = {
    "single_label_classification": (EsmForSequenceClassification, "SEQ_CLS", "first"),
    "multi_label_classification": (PooledEsmForSequenceClassification, "SEQ_CLS", "attention"),
    "regression": (PooledEsmForSequenceClassification, "SEQ_CLS", "mean"),
    "token_classification": (EsmForTokenClassification, "TOKEN_CLS", "first"),
}


def save_base(folder, tokenizer, seed=0):
    base = make_model(EsmModel, seed=seed, hidden_size=WIDTH, initializer_range=0.3)
    with portable_saving(base):
        base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_member(folder, base, seed, *, kind="single_label_classification", names=NAMES, pooling=None, **options):
    """Save an adapter with its head, as `finetune` does."""
    head, task_type, usual = KINDS[kind]
    pooling = pooling or usual
    head = EsmForSequenceClassification if pooling == "first" and task_type == "SEQ_CLS" else head
    torch.manual_seed(seed)
    config = EsmModel.config_class.from_pretrained(base)
    set_pooling(config, pooling)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = None if kind == "token_classification" else kind
    config.label_thresholds = {"a": 0.1 * seed, "b": 0.5} if kind == "multi_label_classification" else None
    model = head.from_pretrained(base, config=config)
    lora = LoraConfig(r=2 + seed, target_modules=["query", "dense"], task_type=task_type, **options)
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    save_base_config(adapted, folder / "base_config")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return save_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Folders of the members of each kind of task."""
    root = tmp_path_factory.mktemp("members")
    return {kind: [save_member(root / f"{kind}{i}", base, i, kind=kind) for i in (1, 2, 3)] for kind in KINDS}


@pytest.mark.parametrize(("kind", "budget"), each_value(KINDS, [60, 8192]))
def test_an_ensemble_is_the_mean_of_the_single_predictors(folders, kind, budget):
    texts = sequences(12)
    ensemble = Predictor.load(folders[kind], device="cpu")
    assert has_lean_encoder(ensemble.model)
    singles = [Predictor.load(folder, device="cpu").predict(texts) for folder in folders[kind]]
    for index, found in enumerate(ensemble.predict(texts, token_budget=budget)):
        values = np.stack([single[index].values for single in singles])
        np.testing.assert_allclose(found.values, values.mean(axis=0), atol=2e-6)
        np.testing.assert_allclose(found.spread, values.std(axis=0), atol=2e-6)
        assert found.spread.max() > 1e-3
        assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
        assert "spreads" in found.to_dict()
        assert singles[0][index].spread is None
        if kind == "multi_label_classification":
            assert found.labels == tuple(
                n for n, v, t in zip(NAMES, found.values, (0.2, 0.5, 0.5), strict=True) if v >= t
            )
        elif kind != "regression":
            assert found.labels == tuple(NAMES[i] for i in np.atleast_1d(found.values.argmax(-1)))
    if kind == "token_classification":
        assert len(found.to_dict()["spreads"]) == len(texts[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_mean(folders, kind):
    """So that `evaluate` measures what `predict` returns."""
    texts = sequences(5)
    ensemble = Predictor.load(folders[kind], device="cpu")
    for logits, found in zip(ensemble.logits(texts), ensemble.predict(texts), strict=True):
        values = {
            "regression": lambda x: x,
            "multi_label_classification": lambda x: 1 / (1 + np.exp(-x)),
        }.get(kind, np.exp)(logits)
        np.testing.assert_allclose(values, found.values, atol=1e-9)


def test_the_weights_of_residues_are_the_mean_of_the_members(folders):
    paths, texts = folders["multi_label_classification"], sequences(4)
    singles = [Predictor.load(path, device="cpu").residue_weights(texts) for path in paths]
    for index, found in enumerate(Predictor.load(paths, device="cpu").residue_weights(texts)):
        np.testing.assert_allclose(found, np.mean([single[index] for single in singles], axis=0), atol=1e-6)


def test_windows_are_averaged_before_the_members(folders):
    paths, texts = folders["single_label_classification"], sequences(3, longest=200)
    options = {"device": "cpu", "max_tokens": 30}
    singles = [Predictor.load(path, **options).predict(texts, keep="windows") for path in paths]
    for index, found in enumerate(Predictor.load(paths, **options).predict(texts, keep="windows")):
        np.testing.assert_allclose(found.values, np.mean([s[index].values for s in singles], axis=0), atol=2e-6)


def test_an_ensemble_reads_as_much_as_the_member_that_reads_least(base, tmp_path, tokenizer):
    paths = [save_member(tmp_path / f"m{i}", base, i) for i in (1, 2)]
    bounded = copy.copy(tokenizer)
    bounded.model_max_length = 30
    bounded.save_pretrained(paths[1])
    assert Predictor.load(paths, device="cpu").max_tokens == 30
    assert Predictor.load(paths[::-1], device="cpu").max_tokens == 30
    assert Predictor.load(paths[0], device="cpu").max_tokens == 1024


def test_the_base_model_is_in_memory_once(base, folders):
    def embeddings():
        gc.collect()
        shape = make_model(EsmModel, hidden_size=WIDTH).embeddings.word_embeddings.weight.shape
        found = [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and o.shape == shape]
        return len({parameter.data_ptr() for parameter in found})

    def bytes_of(model):
        return sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())

    before = embeddings()
    ensemble = Predictor.load(folders["single_label_classification"], device="cpu")
    assert embeddings() == before + 1
    ensemble.predict(sequences(3))
    assert embeddings() == before + 1
    whole = bytes_of(Predictor.load(folders["single_label_classification"][0], device="cpu").model)
    adapters = sum(
        tensor.nbytes for path in folders["single_label_classification"] for tensor in adapter_weights(path).values()
    )
    # The classifier of the base model stays beside those of the adapters.
    assert bytes_of(ensemble.model) <= whole + adapters


def adapter_weights(path):
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


def test_members_that_do_not_fit_are_refused(base, folders, tokenizer, tmp_path):
    first = folders["single_label_classification"][0]
    other_base = save_base(tmp_path / "base", tokenizer, seed=1)
    cases = {
        "must have the same base model: .*base": save_member(tmp_path / "1", other_base, 1),
        "must have the same task: .* has single_.*, 1 b, 2 c, and .* has single_.*, 1 b, 2 d$": save_member(
            tmp_path / "2", base, 1, names=("a", "b", "d")
        ),
        "same task: .* has regression": folders["regression"][0],
        "same task: .* has token-classification": folders["token_classification"][0],
        "must have the same head: .*pooling='first'.*pooling='mean'": save_member(
            tmp_path / "3", base, 1, pooling="mean"
        ),
        "has bias='lora_only', which changes weights of the base": save_member(
            tmp_path / "4", base, 1, bias="lora_only"
        ),
        "is given twice": first,
        "has no adapter_config.json: expected the folder of an adapter": base,
        "there is no folder": tmp_path / "nowhere",
    }
    names = [f"class {number}" for number in range(30)]
    many = save_member(tmp_path / "5", base, 1, names=names)
    turned = save_member(tmp_path / "6", base, 1, names=[*names[:-2], names[-1], names[-2]])
    with pytest.raises(ConfigurationError, match=r"same task: .*28 class 28, .*, and .*28 class 29"):
        Predictor.load([many, turned], device="cpu")
    (tmp_path / "proteins.fasta").write_text(">a\nMKT\n")
    cases["proteins.fasta: a file, where the folder of a model was expected"] = tmp_path / "proteins.fasta"
    for message, path in cases.items():
        with pytest.raises(ConfigurationError, match=message):
            Predictor.load([first, path], device="cpu")
    with pytest.raises(ConfigurationError, match="empty list of models"):
        Predictor.load([])
    model = Predictor.load(first, device="cpu").model
    with pytest.raises(ConfigurationError, match="has no adapters x"):
        Predictor(model, tokenizer, members=("x",))


def test_a_list_of_one_is_that_model(folders):
    paths = folders["single_label_classification"]
    found, expected = (Predictor.load(given, device="cpu").predict(["MKTAYI"])[0] for given in (paths[:1], paths[0]))
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.spread is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_takes_several_models(folders, tmp_path, kind):
    texts = sequences(5)
    source, output = tmp_path / "p.fasta", tmp_path / "p.jsonl"
    source.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    assert main(["predict", *map(str, folders[kind]), str(source), "-o", str(output)]) == 0
    found = pd.read_json(output, lines=True)
    expected = Predictor.load(folders[kind]).predict(texts)
    assert found["accession"].tolist() == [f"p{i}" for i in range(5)]
    if kind == "token_classification":
        for row, prediction in zip(found["spreads"], expected, strict=True):
            np.testing.assert_allclose(row, prediction.to_dict()["spreads"], atol=1e-6)
        return
    columns = [f"spread_{name}" for name in NAMES]
    np.testing.assert_allclose(found[columns], [p.spread for p in expected], atol=1e-6)
    columns = [name if kind == "regression" else f"probability_{name}" for name in NAMES]
    np.testing.assert_allclose(found[columns], [p.values for p in expected], atol=1e-6)


def test_an_ensemble_is_evaluated_and_computed_again_when_a_member_changes(folders, tmp_path, monkeypatch):
    from esm_efficient.inference import predictions

    identities = []
    real = predictions.map_file
    monkeypatch.setattr(
        predictions,
        "map_file",
        lambda *rest, **options: identities.append(options["identity"]) or real(*rest, **options),
    )
    source = tmp_path / "p.fasta"
    source.write_text(">a\nMKTAYI\n")
    for paths in (folders["regression"], folders["regression"][:2], folders["regression"][0]):
        predict_file(paths, source, tmp_path / "out.csv")
    assert len(set(identities)) == 3
    rows = {"sequence": sequences(6), "label": [{name: 0.0 for name in NAMES}] * 6}
    features = Features({"sequence": Value("string"), "label": {name: Value("float32") for name in NAMES}})
    data = Dataset.from_dict(rows, features=features)
    ensemble = Predictor.load(folders["multi_label_classification"])
    logits, labels = np.stack(ensemble.logits(rows["sequence"])), np.zeros((6, len(NAMES)))
    expected = multi_label_metrics(labels, logits, NAMES, thresholds=ensemble.thresholds)
    found = evaluate(ensemble, data)
    assert found["subset_accuracy"] == expected["subset_accuracy"] < 1
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_the_command_evaluates_an_ensemble_and_its_page_names_the_members(folders, tmp_path, capsys):
    table, page = tmp_path / "other.csv", tmp_path / "page.html"
    texts, labels = sequences(6), ["a|b", "b", "c", "a", "a|b|c", "c|b"]
    table.write_text("sequence,label\n" + "".join(f"{t},{label}\n" for t, label in zip(texts, labels, strict=True)))
    members = list(map(str, folders["multi_label_classification"]))
    assert main(["evaluate", *members, str(table), "--report", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    ensemble = Predictor.load(members)
    truth = np.array([[name in label.split("|") for name in NAMES] for label in labels], dtype=float)
    expected = multi_label_metrics(truth, np.stack(ensemble.logits(texts)), NAMES, thresholds=ensemble.thresholds)
    assert found["f1_macro"] == pytest.approx(expected["f1_macro"])
    assert found["auroc"] == pytest.approx(expected["auroc"])
    assert all(Path(member).name in page.read_text() for member in members)


@pytest.mark.parametrize(
    ("kind", "names", "labels", "metric"),
    [("multi_label_classification", NAMES, "abcabc", "f1_macro"), ("regression", ["x"], "010110", "spearman")],
)
def test_the_command_reads_labels_as_those_of_the_model(base, tmp_path, capsys, kind, names, labels, metric):
    table, member = tmp_path / "other.csv", save_member(tmp_path / "member", base, 1, kind=kind, names=names)
    table.write_text("sequence,label\n" + "".join(f"{t},{x}\n" for t, x in zip(sequences(6), labels, strict=True)))
    command = ["evaluate", str(member), str(table), "--json"]
    assert main(command) == 0
    assert metric in json.loads(capsys.readouterr().out)["metrics"]
    assert main([*command, "--label-kind", "class"]) == 1  # which is what these cells look like
    assert "but the model predicts" in capsys.readouterr().err


def test_the_folder_of_a_run_is_not_a_member(folders, tmp_path):
    shutil.copytree(folders["regression"][0], tmp_path / "run" / "adapter")
    with pytest.raises(ConfigurationError, match=r"run is the folder of a run: give .*adapter"):
        Predictor.load([tmp_path / "run", folders["regression"][1]])


def test_members_leave_the_active_adapter_and_what_trains_as_they_were(folders):
    predictor = Predictor.load(folders["regression"])
    model = predictor.model
    model.set_adapter("member002")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(flags.values())
    predictor.predict(sequences(2))
    assert model.active_adapter == "member002"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_the_identity_of_a_model_has_its_active_adapter_and_the_scale(folders):
    model = Predictor.load(folders["regression"]).model
    before = identity_of(model, model.config)
    assert identity_of(model, model.config) == before
    model.set_adapter("member002")
    assert identity_of(model, model.config) != before
    model.set_adapter("member001")
    assert identity_of(model, model.config) == before
    layer = next(module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict))
    layer.scaling["member001"] *= 2
    assert identity_of(model, model.config) != before


def test_the_identity_of_a_model_has_what_its_hooks_hold(folders):
    model = Predictor.load(folders["regression"]).model
    found = [identity_of(model, model.config)]
    for factor in (1.0, 2.0, 2.0):
        handle = model.register_forward_hook(lambda module, given, output, *, by=factor: None)
        found.append(identity_of(model, model.config))
        handle.remove()
    assert len(set(found)) == 3
    assert found[2] == found[3]
    assert identity_of(model, model.config) == found[0]
