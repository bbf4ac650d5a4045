"""What a run is compared with: the majority class, and a linear probe on the frozen encoder that disturbs nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import AutoModelForSequenceClassification, EvalPrediction

from esm_efficient import (
    RECIPES,
    Task,
    compute_metrics_for,
    demo_model_path,
    finetune,
    load_deeploc,
    load_result,
    split_model,
    stratified_sample,
    sweep_layers,
    tokenize_dataset,
    tune_thresholds,
)
from esm_efficient.training.arguments import recipe_arguments
from esm_efficient.training.baselines import FrozenProbe, majority_metrics, probe_frozen
from esm_efficient.training.cached import cache_for_training
from esm_efficient.training.intervals import intervals_of
from esm_efficient.training.outcome import probe_verdict
from esm_efficient.training.probes import probe
from esm_efficient.trunk.layer_states import LayerReader

CLASSES = Task("single_label_classification", ("non-membrane", "membrane"))
TOP = RECIPES["lora"].replace(layers="top-2", cache=True)


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=220)
    return DatasetDict({name: stratified_sample(split, 60) for name, split in splits.items()})


@pytest.fixture(scope="module")
def tokenized(data, tokenizer):
    return tokenize_dataset(data, tokenizer)[0]


def load():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=2)


def measure(splits, task=CLASSES, *, model=None, recipe="lora", folder="unused", **options):
    chosen = RECIPES.get(recipe, recipe)
    args = recipe_arguments(chosen, folder)
    return probe_frozen(model or load(), splits, task, recipe=chosen, args=args, **options)


def states_of(split, layer):
    """The mean over residues of the states of a layer, by transformers alone."""
    model, rows = load().esm.eval(), []
    with torch.no_grad():
        for ids in split["input_ids"]:
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
            rows.append(states[0, 1:-1].mean(0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("lora", "bf16"),
        ("frozen", "float32"),  # with pooled cached states
        (RECIPES["base"].replace(layers="top-1", cache=True, pooling="mean"), "bf16"),
    ],
    ids=["lora", "frozen", "cached in half precision"],
)
@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_the_probe(tmp_path, data, recipe, precision):
    rows = {name: sorted(range(len(split)), key=lambda row: split[row]["residues"]) for name, split in data.items()}
    small = DatasetDict({name: split.select(rows[name][:8]) for name, split in data.items()})
    with_it, without = (
        finetune(
            demo_model_path(),
            small,
            recipe=recipe,
            output_dir=tmp_path / str(probed),
            probe=probed,
            profile=True,
            precision=precision,
            logging_steps=1,
            max_steps=2,
            disable_tqdm=True,
        )
        for probed in (True, False)
    )
    assert with_it.probe is not None
    assert without.probe is None
    assert with_it.metrics == without.metrics
    assert with_it.profile.peak == without.profile.peak
    losses = [[entry.get("loss") for entry in result.history] for result in (with_it, without)]
    assert losses[0] == losses[1]
    weights = without.model.state_dict()
    assert with_it.model.state_dict().keys() == weights.keys()
    for name, tensor in with_it.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_it_reads_the_layer_that_is_best_on_validation_and_is_measured_on_test(data, tokenized):
    found = measure(tokenized)
    swept = sweep_layers(demo_model_path(), data, readings=["mean"])
    assert (found.layer, found.layers, found.picked) == (swept.best, 4, True)
    train, test = tokenized["train"], tokenized["test"]
    logits = probe(CLASSES, states_of(train, found.layer), np.array(train["labels"]), states_of(test, found.layer))
    expected = compute_metrics_for(CLASSES)(EvalPrediction(logits, np.array(test["labels"])))
    assert found.metrics == pytest.approx({name: expected[name] for name in found.metrics}, abs=1e-3)
    assert found.examples == len(train)


def test_its_intervals_are_those_that_a_model_with_the_same_predictions_gets(tokenized):
    """The draws of proteins are the same for the model and for the probe."""
    found = measure(tokenized)
    train, test = tokenized["train"], tokenized["test"]
    logits = probe(CLASSES, states_of(train, found.layer), np.array(train["labels"]), states_of(test, found.layer))
    expected = intervals_of(EvalPrediction(logits, np.array(test["labels"])), compute_metrics_for(CLASSES))
    assert set(found.intervals) == set(found.intervals) & set(found.metrics) >= {"accuracy", "mcc", "auroc"}
    for name, ends in found.intervals.items():
        assert ends == pytest.approx(expected[name], abs=1e-3), name


def test_intervals_of_residues_are_those_of_whole_proteins(data, tokenizer):
    """Residues of a protein are drawn together: a protein counts once, however many residues it has."""
    feature, label, task, _ = LABELS["residues"]
    splits = DatasetDict()
    for name, split in data.items():
        few = split["sequence"][:16]
        rows = {"sequence": few, "label": [label(s) for s in few]}
        splits[name] = Dataset.from_dict(rows, features=Features({"sequence": Value("string"), "label": feature}))
    tokenized, _ = tokenize_dataset(splits, tokenizer)
    one = DatasetDict(tokenized)
    one["test"] = tokenized["test"].select([0])
    assert measure(one, task).intervals == {}
    two = DatasetDict(tokenized)
    two["test"] = tokenized["test"].select([0, 0, 0])
    found = measure(two, task)
    assert found.intervals["accuracy"] == pytest.approx([found.metrics["accuracy"]] * 2)


def test_without_validation_it_reads_the_middle_layer(tokenized):
    found = measure({name: tokenized[name] for name in ("train", "test")})
    assert (found.layer, found.picked) == (2, False)
    assert "layer 2 of 4" in found.describe()
    assert "nearest to the middle" in found.describe()


def test_cached_states_are_not_computed_twice(tmp_path, tokenized, tokenizer):
    from transformers import DataCollatorWithPadding

    args = recipe_arguments(TOP, tmp_path)
    splits = {name: tokenized[name] for name in ("train", "validation")}
    collator = DataCollatorWithPadding(tokenizer)
    states = cache_for_training(load(), splits, TOP, tmp_path, args=args, collator=collator)
    seen = []
    states.trunk.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    found = measure(tokenized, model=states.rest, recipe=TOP, states=states)
    assert sum(seen) == len(tokenized["test"])
    assert found.layer in (2, 3, 4)  # the top two layers train
    plain = measure(tokenized, model=load())
    assert plain.layer == found.layer  # of these data
    assert found.metrics == pytest.approx(plain.metrics, abs=1e-3)
    only = measure({name: tokenized[name] for name in ("train", "test")}, model=states.rest, recipe=TOP, states=states)
    assert (only.layer, only.picked) == (2, False)
    expected = measure({name: tokenized[name] for name in ("train", "test")})
    assert only.metrics == pytest.approx(expected.metrics, abs=1e-3)


def test_the_weights_of_the_trunk_are_not_copied():
    trunk, rest = split_model(load(), layers=1)
    reader = LayerReader(rest, trunk=trunk)
    skipped = reader.encoder.embeddings._skipped[0]
    assert skipped.word_embeddings.weight is trunk.esm.embeddings.word_embeddings.weight


LABELS = {
    "residues": (
        List(ClassLabel(names=["other", "sticky"])),
        lambda s: [None if r == "C" else int(r in "AILVFMWG") for r in s],
        Task("token_classification", ("other", "sticky")),
        "mcc",
    ),
    "numbers": (
        {"value": Value("float32")},
        lambda s: sum(r in "AILVFMWG" for r in s) / len(s),
        Task("regression", ("label",)),
        "spearman",
    ),
    "several": (
        {"sticky": Value("float32"), "long": Value("float32")},
        lambda s: {"sticky": float(sum(r in "AILVFMWG" for r in s) > len(s) / 2), "long": float(len(s) > 150)},
        Task("multi_label_classification", ("sticky", "long")),
        "auroc",
    ),
}


@pytest.mark.parametrize("kind", LABELS)
def test_every_task_has_a_probe(data, tokenizer, kind):
    found, tokenized = measured_with(data, tokenizer, kind)
    metric = LABELS[kind][3]
    assert found.metrics[metric] > 0.6
    assert found.reading == ("residues" if kind == "residues" else "mean")
    ends = found.intervals[metric]
    assert ends[0] <= found.metrics[metric] <= ends[1]
    assert ends[1] > ends[0] or found.metrics[metric] == 1
    if kind == "residues":  # the embedding of a residue is its letter, and all residues of test are scored
        assert found.metrics["accuracy"] > 0.95
        labelled = sum(label >= 0 for row in tokenized["train"]["labels"] for label in row)
        assert found.examples == min(labelled, 20_000)


def test_thresholds_that_cannot_be_tuned_are_warned_of_by_the_model_alone(data, tokenizer, caplog):
    """A run warns of them once, for the model; the probe has the same labels."""
    few = data["validation"].filter(lambda row: row["residues"] <= 150)
    found, tokenized = measured_with(DatasetDict({**data, "validation": few}), tokenizer, "several")
    assert found is not None
    assert "stays at 0.5" not in caplog.text
    tune_thresholds(np.array(tokenized["validation"]["labels"]), np.zeros((len(few), 2)), ["sticky", "long"])
    assert "long: no example, or every one, has the label: its threshold stays at 0.5" in caplog.text


def measured_with(data, tokenizer, kind):
    """The probe on the labels of a kind, and the tokens that it is measured on."""
    feature, label, task, _ = LABELS[kind]
    feature = feature["value"] if kind == "numbers" else feature
    splits = DatasetDict()
    for name, split in data.items():
        rows = {"sequence": split["sequence"][:], "label": [label(s) for s in split["sequence"]]}
        splits[name] = Dataset.from_dict(rows, features=Features({"sequence": Value("string"), "label": feature}))
    tokenized, _ = tokenize_dataset(splits, tokenizer)
    return measure(tokenized, task), tokenized


def test_with_one_class_in_validation_it_reads_the_middle_layer(tokenized):
    one = tokenized["validation"].filter(lambda row: row["labels"] == 0)
    found = measure({**tokenized, "validation": one})
    assert (found.layer, found.picked) == (2, False)
    assert "nearest to the middle" in found.describe()


def one_class(splits):
    rows = splits["train"].filter(lambda row: row["labels"] == 0)
    return {**splits, "train": rows}


@pytest.mark.parametrize(
    ("change", "recipe", "reason"),
    [
        (lambda splits: {"train": splits["train"], "validation": splits["test"]}, "lora", "there is no test split"),
        (lambda splits: {**splits, "train": splits["train"].to_iterable_dataset()}, "lora", "train are streams"),
        (lambda splits: splits, RECIPES["frozen"].replace(pooling="mean"), "trains only a head"),
        (one_class, "lora", "expected two classes"),
    ],
    ids=["no test split", "a stream", "the head alone", "one class"],
)
def test_where_it_makes_no_sense_one_line_of_log_says_why(tokenized, change, recipe, reason, caplog):
    with caplog.at_level(logging.INFO, logger="esm_efficient.training.baselines"):
        assert measure(change(tokenized), recipe=recipe) is None
    [line] = [record.getMessage() for record in caplog.records if record.name.endswith("baselines")]
    assert line.startswith("no linear probe beside the model: ")
    assert reason in line


@pytest.mark.parametrize("fault", ["infinite", "memory"])
def test_a_probe_that_cannot_be_fitted_ends_no_run(tokenized, monkeypatch, caplog, fault):
    real = LayerReader.pool

    def pool(*given, **options):
        if fault == "memory":
            raise torch.OutOfMemoryError("no memory for the states")
        states = real(*given, **options)
        states[..., 3, 5] = np.inf  # one value of one sequence
        return states

    monkeypatch.setattr(LayerReader, "pool", pool)
    with caplog.at_level(logging.INFO, logger="esm_efficient.training.baselines"):
        assert measure(tokenized) is None
    expected = {
        "infinite": "training examples are not finite: with fp16 use bf16",
        "memory": "no memory for the states",
    }
    assert expected[fault] in caplog.text


def test_with_several_ranks_there_is_none(tokenized, caplog):
    class Args:
        world_size = 2
        deepspeed = bf16 = fp16 = None

    with caplog.at_level(logging.INFO, logger="esm_efficient.training.baselines"):
        assert probe_frozen(load(), tokenized, CLASSES, recipe=RECIPES["lora"], args=Args()) is None
    assert "2 ranks train" in caplog.text


def test_the_table_the_page_and_the_record_show_both_and_name_the_cheaper_way(tmp_path, data):
    """With a learning rate of 0 the model stays as it was, so that the probe is better."""
    result = finetune(
        demo_model_path(),
        data,
        recipe="lora",
        output_dir=tmp_path,
        probe=True,
        learning_rate=0.0,
        max_steps=1,
        disable_tqdm=True,
    )
    assert result.probe.metrics["mcc"] > result.metrics["mcc"]
    table, page = str(result), result.page.read_text()
    header = table.splitlines()[0].split("  ")
    assert [cell.strip() for cell in header if cell][-3:] == ["majority class", "linear probe", "minus linear probe"]
    [line] = [line for line in table.splitlines() if line.startswith("mcc")]
    probed, (low, high), gains = result.probe.metrics["mcc"], result.probe.intervals["mcc"], result.evaluation.gains
    gain = "{:+.3f} ({:+.3f} to {:+.3f})".format(result.metrics["mcc"] - probed, *gains["mcc"])
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[-2:] == [f"{probed:.3f} ({low:.3f} to {high:.3f})", gain]
    assert f"<td>{result.probe.metrics['mcc']:.3f} ({low:.3f} to {high:.3f})</td>" in page
    # The data are no file, which a command could read.
    assert "no training: sweep_layers(model, dataset)  # and the tokenizer" in table
    assert "<pre>sweep_layers(model, dataset)  # and the tokenizer" in page
    assert f"Recipe lora ({RECIPES['lora'].description}), seed" in page
    assert "Recipe lora, seed" in dataclasses.replace(result, recipe_description="").to_html()
    headings = [heading for heading in re.findall("<h2>(.*?)</h2>", page) if heading != "Warnings"]
    assert headings[:3] == ["Result", "What ran", "By class"]
    assert "Training" not in headings  # one step has no curve
    assert 'majority class</th><th scope="col">linear probe</th><th scope="col">minus linear probe</th>' in page
    assert result.probe.describe() in page
    loaded = load_result(tmp_path)
    assert loaded.probe == result.probe
    assert loaded.evaluation.baselines == result.evaluation.baselines
    assert loaded.evaluation.baseline_intervals == result.evaluation.baseline_intervals
    assert loaded.evaluation.gains == gains
    record = json.loads(result.result_path.read_text())
    assert record["probe"]["intervals"]["mcc"] == [low, high]
    assert record["gains"]["mcc"] == list(gains["mcc"])
    assert str(loaded) == table

    better = {**result.metrics, "mcc": 1.0}
    for ends, said in (((0.001, 0.5), ""), ((-0.1, 0.5), "difference in mcc, -0.100 to +0.500, contains 0.")):
        evaluation = dataclasses.replace(result.evaluation, gains={"mcc": ends})
        assert probe_verdict(dataclasses.replace(result, metrics=better, evaluation=evaluation)).endswith(said)
        assert (probe_verdict(dataclasses.replace(result, metrics=better, evaluation=evaluation)) == "") == (not said)
    as_good = dataclasses.replace(evaluation, gains={"mcc": (-0.1, 0.08)})
    tied = {**result.metrics, "mcc": probed}
    told = probe_verdict(dataclasses.replace(result, metrics=tied, evaluation=as_good))
    assert told.startswith("It is not certain that the fine-tuned model is better than the linear probe: ")
    assert "contains 0. The linear probe needs no training: sweep_layers" in told
    undefined = dataclasses.replace(result, metrics={**result.metrics, "mcc": float("nan")})
    assert "against -" in probe_verdict(undefined)
    assert probe_verdict(dataclasses.replace(result, probe=None)) == ""


@pytest.mark.parametrize(
    ("kind", "labels", "name", "expected"),
    [
        (
            "single_label_classification",
            [1, 1, 0, -100],
            "majority class",
            {"accuracy": 2 / 3, "mcc": 0.0, "auroc": 0.5},
        ),
        ("token_classification", [[-100, 1, 1], [-100, 0, -100]], "majority class", {"accuracy": 2 / 3, "f1_b": 0.8}),
        (
            "multi_label_classification",
            [[1, 0], [1, np.nan], [0, 1], [1, 0]],
            "majority of each label",
            {"subset_accuracy": 0.75, "auroc": 0.5, "f1_b": 0.0},
        ),
        ("regression", [[1.0, 2.0], [3.0, np.nan], [5.0, 4.0]], "mean of the labels", {"r2": 0.0}),
        ("regression", [[-100.0, 2.0], [-100.0, 4.0], [200.0, 6.0]], "mean of the labels", {"r2": 0.0}),
    ],
)
def test_the_majority_is_the_best_constant_prediction(kind, labels, name, expected):
    found = majority_metrics(Task(kind, ("a", "b")), np.array(labels))
    assert list(found) == [name]
    for metric, value in expected.items():
        assert found[name][metric] == pytest.approx(value), metric
    if kind == "regression":
        assert np.isnan(found[name]["spearman"])
    unknown = np.full(np.shape(labels), -100 if "class" in name else np.nan)
    assert majority_metrics(Task(kind, ("a", "b")), unknown) == {}


def test_a_probe_says_what_it_reads():
    found = FrozenProbe(3, 6, "residues", True, 2400, {"mcc": 0.5}, 9.0)
    assert found.describe() == (
        "The linear probe reads each residue of layer 3 of 6 of the frozen encoder, the best on validation."
    )
    assert "metrics" not in found.to_dict()
