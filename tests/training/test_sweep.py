"""sweep_layers() on the demo model and table."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import slow_except
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from peft import get_peft_model
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from esm_efficient import (
    RECIPES,
    ConfigurationError,
    DataError,
    demo_model_path,
    finetune,
    load_deeploc,
    lora_config,
    stratified_sample,
    sweep_layers,
    tokenize_dataset,
    truncate,
)
from esm_efficient.reporting import count_of
from esm_efficient.tasks import Task
from esm_efficient.training import sweep as sweep_module
from esm_efficient.training.given import splits_from
from esm_efficient.training.layer_probes import Examples

pytestmark = pytest.mark.usefixtures("drawn_figures")

READINGS = ("first", "mean")
TASK = Task("single_label_classification", ("no", "yes"))


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=220)
    return DatasetDict({name: stratified_sample(split, 60) for name, split in splits.items()})


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def result(data):
    return sweep_layers(demo_model_path(), data)


def load(kind=AutoModelForSequenceClassification):
    return kind.from_pretrained(demo_model_path(), dtype=torch.float32)


def test_each_layer_has_all_metrics_on_the_validation_split(data, result):
    assert result.evaluated_on == "validation"
    assert {(score.layer, score.reading) for score in result.scores} == {(n, r) for n in range(5) for r in READINGS}
    assert all({"mcc", "accuracy", "auroc", "f1_macro"} <= set(score.metrics) for score in result.scores)
    assert result.examples == (len(data["train"]), len(data["validation"]))


def test_the_layer_that_is_enough_is_the_lowest_within_one_standard_error_of_the_best(result):
    best = max(score.metrics["mcc"] for score in result.scores)
    assert result.score(result.best) == best
    assert result.standard_error > 0
    enough = [n for n in range(1, 5) if result.score(n) >= best - result.standard_error]
    assert result.layer == (enough[0] if enough else 1)


def test_scores_of_layers_that_are_no_better_than_the_embeddings_are_no_advice(result):
    gain = result.score(result.best) - result.score(0)
    assert gain > 0
    for error, needed in ((0.99 * gain, True), (1.01 * gain, False)):
        changed = dataclasses.replace(result, standard_error=error)
        text = str(changed)
        assert changed.beats_chance
        assert changed.needs_layers == changed.to_dict()["needs_layers"] == needed
        assert ("No layer is better than the embeddings (layer 0: " in text) != needed
        assert (f"(--keep-layers {result.layer}, or keep_layers=" in text) == needed
        assert (re.search("enough$", text, re.MULTILINE) is not None) == needed
        assert ("enough for a probe" in changed.to_svg()) == needed
    assert not dataclasses.replace(result, best=0, standard_error=0.0).needs_layers


def test_the_report_says_where_it_was_scored_and_what_fewer_layers_cost(result):
    result = dataclasses.replace(result, standard_error=0.0)
    text = str(result)
    assert "of validation" in text
    assert (
        f"(--keep-layers {result.layer}, or keep_layers={result.layer} in Python) saves memory and time, and may "
        in text
    )
    assert "cost accuracy: fine-tuning may rank layers in another order. By default, finetune keeps all layers." in text
    assert "Keep all 4 layers. Layer" in str(dataclasses.replace(result, layer=4))
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == list("01234")
    assert float(rows[2][1]) == pytest.approx(result.score(2, "first"), abs=1e-3)
    assert "after the last norm" in text
    assert max(map(len, text.split("\n\n")[1].splitlines())) < 110  # the width of an output in the documentation
    assert json.loads(json.dumps(result.to_dict()))["layer"] == result.layer


def test_a_best_constant_prediction_is_beside_the_layers_and_no_better_layer_is_no_advice(result):
    rare = result.majority
    assert (rare["mcc"], rare["auroc"]) == (0, 0.5)
    assert 0.5 <= rare["accuracy"] < 1
    [row] = [line.split() for line in str(result).splitlines() if line.endswith("best constant")]
    assert row[1:7] == ["0.000", f"{rare['accuracy']:.3f}", "0.500"] * 2
    best = result.score(result.best)
    for error, is_better in ((0.99 * best, True), (1.01 * best, False)):
        unsure = dataclasses.replace(result, standard_error=error)
        text = str(unsure)
        assert unsure.beats_chance == is_better
        assert ("No layer is better than chance on these 37 proteins: no advice." in text) != is_better


def test_the_plot_marks_the_layer_that_is_enough(result):
    svg = dataclasses.replace(result, standard_error=0.0).to_svg()
    assert svg.startswith("<svg")
    assert f"enough for a probe: {count_of(result.layer, 'layer')}" in svg
    assert "mcc of a linear probe on validation" in svg


@pytest.mark.parametrize(
    "kind", slow_except([AutoModelForSequenceClassification, AutoModelForMaskedLM], AutoModelForMaskedLM)
)
def test_a_loaded_model_with_any_head_and_tokenised_splits_give_the_same(data, tokenizer, result, kind):
    tokenised, _ = tokenize_dataset(data, tokenizer)
    again = sweep_layers(load(kind), tokenised)
    for one, other in zip(result.scores, again.scores, strict=True):
        assert one.metrics == pytest.approx(other.metrics, nan_ok=True)


def test_a_model_without_its_adapters_gives_the_same(data, tokenizer, result):
    model = get_peft_model(load(), lora_config(load()))
    with pytest.raises(ConfigurationError, match="merge_and_unload"):
        sweep_layers(model, data, tokenizer=tokenizer)
    again = sweep_layers(model.unload(), data, tokenizer=tokenizer, readings=["mean"])
    assert [again.score(n, "mean") for n in range(5)] == pytest.approx([result.score(n, "mean") for n in range(5)])


def test_esm_c_is_swept_as_esm_2_is(tmp_path):
    if not hasattr(transformers, "EsmcConfig"):
        pytest.skip("this version of transformers has no ESM C")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    transformers.EsmcForMaskedLM(transformers.EsmcConfig(**sizes)).save_pretrained(tmp_path)
    transformers.EsmcTokenizer().save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    features = Features({"sequence": Value("string"), "label": ClassLabel(names=["few", "many"])})
    splits = {}
    for name, size in (("train", 80), ("validation", 40)):
        proteins = ["".join(rng.choice(list("AKLW"), rng.integers(8, 30))) for _ in range(size)]
        labels = [int(protein.count("W") > len(protein) / 4) for protein in proteins]
        splits[name] = Dataset.from_dict({"sequence": proteins, "label": labels}, features=features)
    swept = sweep_layers(tmp_path, DatasetDict(splits))
    assert swept.layers == 3
    # The mean of the embeddings tells the share of each residue, also if they are random.
    assert swept.score(0, "mean", "auroc") > 0.9
    assert swept.readings == READINGS


def test_without_a_validation_split_it_says_that_it_scores_on_test(data):
    splits = DatasetDict(train=data["train"], test=data["test"])
    found = sweep_layers(demo_model_path(), splits, readings=["mean"])
    assert found.evaluated_on == "test"
    assert "of test" in str(found)


def relabelled(split, make, feature):
    labels = [make(number, sequence) for number, sequence in enumerate(split["sequence"])]
    features = Features({"sequence": Value("string"), "label": feature})
    return Dataset.from_dict({"sequence": split["sequence"][:], "label": labels}, features=features)


def two_labels(number, sequence):
    return {"long": float(len(sequence) > 150), "charged": None if number % 9 == 0 else float("K" in sequence[:9])}


TASKS = {
    "several labels": (
        two_labels,
        {"long": Value("float32"), "charged": Value("float32")},
        "auroc",
    ),
    "a number": (lambda number, sequence: sequence.count("K") / len(sequence), Value("float32"), "spearman"),
    "residues": (
        lambda number, sequence: [None if number % 7 == 0 else int(letter in "DEKR") for letter in sequence],
        List(ClassLabel(names=["neutral", "charged"])),
        "mcc",
    ),
}


@pytest.mark.parametrize("name", slow_except(TASKS, "residues"))
def test_every_task_has_a_probe(data, name):
    make, feature, metric = TASKS[name]
    splits = DatasetDict({key: relabelled(data[key], make, feature) for key in ("train", "validation")})
    found = sweep_layers(demo_model_path(), splits, max_labelled_residues=300)
    assert found.metric == metric
    assert math.isfinite(found.score(found.layer))
    assert str(found.layer) in str(found)
    if name == "residues":
        assert found.examples == (300, 300)
        assert found.readings == ("residues",)
        assert found.score(0) > 0.95  # the embedding of a residue is its letter


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ((0, 1), ClassLabel(names=["no", "yes"]), "the mcc on validation is 0.000 for every layer"),
        ((0.5, 2.5), Value("float32"), "the spearman on validation is undefined for every layer"),
    ],
    ids=["one class", "one number"],
)
def test_validation_that_tells_no_layer_from_another_is_refused(data, labels, feature, message):
    def make(split, low, high):
        return relabelled(data[split].select(range(12)), lambda number, _: high if number % 2 else low, feature)

    low, high = labels
    splits = DatasetDict(train=make("train", low, high), validation=make("validation", low, low))
    with pytest.raises(DataError, match=message):
        sweep_layers(demo_model_path(), splits)


def test_the_standard_error_of_residues_is_that_of_proteins():
    """Residues of a protein are no independent examples: ten copies of each say no more than one."""
    task = Task("token_classification", ("no", "yes"))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 100)
    logits = np.eye(2)[np.where(rng.random(100) < 0.8, labels, 1 - labels)]
    errors = []
    for copies in (1, 10):
        proteins = np.repeat(np.arange(100), copies)
        examples = Examples(np.empty(0), labels[proteins], proteins, None)
        errors.append(sweep_module._standard_error(task, "accuracy", logits[proteins], examples, seed=0))
    assert errors[0] == pytest.approx(0.04, rel=0.25)
    assert errors[1] == pytest.approx(errors[0])


def test_sweep_truncate_and_finetune_work_one_after_the_other(data, tokenizer, tmp_path):
    model = load()
    found = sweep_layers(model, data, tokenizer=tokenizer)
    smaller = truncate(model, found.layer)
    recipe = RECIPES["frozen"]
    trained = finetune(smaller, data, recipe=recipe, tokenizer=tokenizer, output_dir=tmp_path, disable_tqdm=True)
    assert trained.layers == found.layer
    loaded = AutoModelForSequenceClassification.from_pretrained(trained.model_dir)
    assert loaded.config.num_hidden_layers == found.layer


def test_models_and_data_are_given_as_to_finetune(data):
    frame = concatenate_datasets(list(data.values())).to_pandas()[["sequence", "label"]]
    frame = frame.rename(columns={"label": "binds"})
    options = {"label": "binds", "seed": 1, "validation_size": 0.3}
    splits = splits_from(frame, **options)
    named = sweep_layers("demo", frame, data_options=options, readings=["mean"])
    expected = sweep_layers(demo_model_path(), splits, readings=["mean"])
    assert named.scores == expected.scores
    assert named.examples == (len(splits["train"]), len(splits["validation"]))
    other = sweep_layers("demo", frame, data_options=options | {"seed": 0}, readings=["mean"])
    assert other.scores != expected.scores


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda data: sweep_layers("no/such/folder", data), ConfigurationError, "there is no folder"),
        (lambda data: sweep_layers(load(), data), ConfigurationError, "give tokenizer too"),
        (lambda data: sweep_layers(torch.nn.Linear(2, 2), data), ConfigurationError, "expected one"),
        (lambda data: sweep_layers(load(), DatasetDict(train=data["train"])), DataError, "has the splits train: exp"),
        (lambda data: sweep_layers(load(), 3), ConfigurationError, "data of the type int: expected a path"),
        (lambda data: sweep_layers(load(), data, readings=["max"]), ConfigurationError, "list of first and mean"),
        (lambda data: sweep_layers(load(), data, readings="mean"), ConfigurationError, "list of first and mean"),
        (
            lambda data: sweep_layers(demo_model_path(), data.remove_columns("label"), task=TASK),
            DataError,
            "the train Dataset has no column with a usual name of labels",
        ),
        (
            lambda data: sweep_layers(load(), DatasetDict(train=data["train"].select([]), test=data["test"])),
            DataError,
            "'train' is a stream or has no row",
        ),
    ],
)
def test_wrong_inputs_are_refused(data, call, error, message):
    with pytest.raises(error, match=message):
        call(data)
