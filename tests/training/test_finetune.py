"""finetune(): every recipe and every task end to end on a small part of the demo, and the result that it returns."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import slow_except
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDatasetDict, List, Value
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from esm_efficient import (
    RECIPES,
    Predictor,
    WeightedTrainer,
    demo_model_path,
    export_model,
    finetune,
    load_deeploc,
    load_result,
    multi_label_metrics,
    stratified_sample,
    task_of,
    tokenize_dataset,
    tune_thresholds,
)
from esm_efficient.errors import CheckpointError, ConfigurationError, DataError
from esm_efficient.heads import model_class
from esm_efficient.tasks import Task
from esm_efficient.training import calibration
from esm_efficient.training.residue_page import residue_strips


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=220, validation_partitions=())
    return DatasetDict(train=stratified_sample(splits["train"], 32), test=stratified_sample(splits["test"], 32))


def plain(result):
    """Return the saved model, loaded with ``from_pretrained`` of its class and of peft."""
    if not (result.model_dir / "adapter_config.json").exists():
        pooling = RECIPES[result.recipe].pooling
        return model_class("sequence-classification", pooling).from_pretrained(result.model_dir)
    base = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=2)
    return PeftModel.from_pretrained(base, result.model_dir)


@pytest.mark.parametrize("recipe", slow_except(RECIPES, "base", "all", "top"))
def test_every_recipe_trains_its_part_of_the_model_and_reloads(tmp_path, data, recipe):
    result = finetune(demo_model_path(), data, recipe=recipe, output_dir=tmp_path, disable_tqdm=True)
    chosen = RECIPES[recipe]
    assert result.steps == 4
    assert result.recipe == recipe
    trains = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert result.trained_layers == {"frozen": (), "top": (3,)}.get(recipe, (0, 1, 2, 3))
    if chosen.trains == "head":
        assert all(name.startswith("classifier") for name in trains)
    assert result.trainable_parameters == sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    assert (result.trainable_parameters < 0.2 * result.total_parameters) == (chosen.trains != "full")
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in result.model.modules())
    assert checkpointed == chosen.gradient_checkpointing

    assert set(result.metrics) == {
        "loss", "accuracy", "mcc", "auroc", "f1_non-membrane", "f1_membrane", "f1_macro", "majority_accuracy"
    }  # fmt: skip
    assert result.residues_per_second > 0
    assert result.peak_memory_bytes > 0
    assert json.loads(result.result_path.read_text()) == result.to_dict()

    beside = "base_config/config.json" if chosen.trains == "adapters" else "config.json"
    config = json.loads((result.model_dir / beside).read_text())
    assert config["id2label"] == {"0": "non-membrane", "1": "membrane"}
    assert config["problem_type"] == "single_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    batch = tokenizer(data["test"][:4]["sequence"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.allclose(plain(result).eval()(**batch).logits, result.model(**batch).logits, atol=1e-5)


@pytest.mark.slow
def test_it_learns_an_easy_task_and_the_seed_determines_the_result(tmp_path):
    """The two classes differ in composition: hydrophobic or charged residues."""
    rng = np.random.default_rng(0)
    labels = [0, 1] * 16
    sequences = ["".join(rng.choice(list(("DEKRNQSG", "AILVFMWG")[label]), size=30)) for label in labels]
    features = Features({"sequence": Value("string"), "label": ClassLabel(names=["charged", "hydrophobic"])})
    rows = Dataset.from_dict({"sequence": sequences, "label": labels}, features=features)
    easy = DatasetDict(train=rows.select(range(24)), test=rows.select(range(24, 32)))

    def run(seed, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return finetune(
            demo_model_path(), easy, recipe="lora", output_dir=folder, seed=seed, disable_tqdm=True, **options
        )

    first, again, other = (run(seed, num_train_epochs=8) for seed in (0, 0, 1))
    assert first.metrics == again.metrics
    assert first.metrics != other.metrics
    assert first.metrics["accuracy"] == first.metrics["auroc"] == 1.0
    assert first.train_loss < 0.8 * run(0, learning_rate=0.0, num_train_epochs=1).train_loss


@pytest.mark.slow
def test_a_profiled_run_returns_its_profile(tmp_path, data):
    result = finetune(demo_model_path(), data, recipe="lora", output_dir=tmp_path, profile=True, disable_tqdm=True)
    assert result.profile.steps == result.steps
    assert result.profile.peak.total > result.profile.peak.weights > 3e6
    assert json.loads(result.result_path.read_text())["profile"]["peak_bytes"] == result.profile.peak.total


def test_with_bf16_the_frozen_weights_are_bfloat16_and_every_layer_trains(tmp_path, data):
    options = {"recipe": "all", "precision": "bf16", "disable_tqdm": True}
    few = DatasetDict({name: split.select(range(8)) for name, split in data.items()})
    result = finetune(demo_model_path(), few, output_dir=tmp_path, **options)
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in result.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert result.trained_layers == (0, 1, 2, 3)
    # accelerate's autocast is off again: the model computes in the precision that its user asks for.
    predictor = Predictor(result.model.float(), AutoTokenizer.from_pretrained(result.model_dir), precision="float32")
    found = predictor.logits(few["test"]["sequence"])
    vars(result.model).pop("forward", None)
    np.testing.assert_array_equal(found, predictor.logits(few["test"]["sequence"]))


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_metrics_of_a_whole_run(tmp_path, data):
    options = {"recipe": "all", "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "disable_tqdm": True}
    whole = finetune(demo_model_path(), data, output_dir=tmp_path, **options)
    # The head starts with other values: the results agree only if the checkpoint is read.
    torch.manual_seed(7)
    other = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=2)
    options |= {"tokenizer": AutoTokenizer.from_pretrained(demo_model_path())}
    resumed = finetune(
        other, data, output_dir=tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"), **options
    )
    assert resumed.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-6)


def test_a_missing_split_class_feature_or_tokenizer_is_named(tmp_path, data):
    with pytest.raises(DataError, match="expected train, and test or validation"):
        finetune(demo_model_path(), DatasetDict(train=data["train"]), output_dir=tmp_path)
    unnamed = Dataset.from_dict({"input_ids": [[0, 4, 2]], "labels": [0]})
    with pytest.raises(DataError, match="class_encode_column"):
        finetune(demo_model_path(), DatasetDict(train=unnamed, test=unnamed), output_dir=tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=2)
    with pytest.raises(ConfigurationError, match="give tokenizer too"):
        finetune(model, data, output_dir=tmp_path)


@pytest.mark.slow
def test_a_real_backbone_trains_in_every_layer(tmp_path, checkpoint, deeploc_csv):
    splits = load_deeploc(deeploc_csv, max_residues=120, validation_partitions=())
    small = DatasetDict(train=stratified_sample(splits["train"], 16), test=stratified_sample(splits["test"], 8))
    result = finetune(checkpoint, small, recipe="all", output_dir=tmp_path, disable_tqdm=True)
    assert result.trained_layers == (0, 1, 2, 3, 4, 5)
    assert result.trainable_parameters == 6 * 8 * (4 * (320 + 320) + 2 * (320 + 1280)) + 320 * 321 + 321 * 2


@pytest.mark.cuda
def test_on_cuda_the_default_is_bf16(tmp_path, data):
    result = finetune(demo_model_path(), data, output_dir=tmp_path, disable_tqdm=True)
    assert result.peak_memory_kind == "CUDA tensors"
    assert {p.dtype for p in result.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert result.trained_layers == (0, 1, 2, 3)


HYDROPHOBIC = set("AILVFMWG")
CLASSES = ClassLabel(names=["charged", "hydrophobic"])


def hydrophobic_share(sequence):
    return sum(residue in HYDROPHOBIC for residue in sequence) / len(sequence)


# For each task: the feature of the label, the label of a demo sequence, the head, and some of the metrics.
TASKS = {
    "several labels": (
        {"hydrophobic": Value("float32"), "long": Value("float32")},
        lambda s: {
            "hydrophobic": float(hydrophobic_share(s) > 0.5),
            "long": float(len(s) > 160) if len(s) % 7 else None,
        },
        AutoModelForSequenceClassification,
        {"f1_macro", "f1_micro", "jaccard", "subset_accuracy", "auroc", "mcc_long", "f1_hydrophobic"},
    ),
    "one class per residue": (
        List(CLASSES),
        lambda s: [None if r == "C" else int(r in HYDROPHOBIC) for r in s],
        AutoModelForTokenClassification,
        {"accuracy", "mcc", "auroc", "f1_hydrophobic", "f1_charged", "f1_macro", "majority_accuracy"},
    ),
    "a number": (
        Value("float32"),
        lambda s: hydrophobic_share(s) if len(s) % 7 else None,
        AutoModelForSequenceClassification,
        {"spearman", "pearson", "rmse", "mae", "r2"},
    ),
}


@pytest.mark.usefixtures("drawn_figures")
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.slow
def test_every_task_trains_has_metrics_and_reloads(tmp_path, demo_table, name):
    feature, label, auto, metrics = TASKS[name]
    splits = load_deeploc(demo_table, max_residues=220)
    data = DatasetDict()
    for split, rows in splits.items():
        sequences = rows["sequence"][: 48 if split == "train" else 24]
        data[split] = Dataset.from_dict(
            {"sequence": sequences, "label": [label(s) for s in sequences], "sample_weight": [1.0] * len(sequences)},
            features=Features({"sequence": Value("string"), "label": feature, "sample_weight": Value("float32")}),
        )
    options = {
        "recipe": "lora",
        "class_weights": None,
        "token_budget": 1000,
        "num_train_epochs": 8 if name == "a number" else 4,
        "disable_tqdm": True,
    }
    result = finetune(demo_model_path(), data, output_dir=tmp_path, **options)
    still = options | {"learning_rate": 0.0, "num_train_epochs": 1}
    untrained = finetune(demo_model_path(), data, output_dir=tmp_path / "untrained", **still)
    assert result.train_loss < untrained.train_loss
    assert metrics <= set(result.metrics)
    assert result.trained_layers == (0, 1, 2, 3)
    record = json.loads(result.result_path.read_text())
    assert record["task"] == {"kind": result.task.kind, "names": list(result.task.names)}
    assert record == result.to_dict()
    if name == "one class per residue":
        assert result.metrics["accuracy"] > result.metrics["majority_accuracy"]

    config = AutoConfig.from_pretrained(result.model_dir / "base_config")
    assert list(config.id2label.values()) == list(result.task.names)
    assert config.problem_type == result.task.problem_type
    assert getattr(config, "label_thresholds", None) == result.thresholds
    assert (result.thresholds is not None) == (name == "several labels")
    model = PeftModel.from_pretrained(auto.from_pretrained(demo_model_path(), config=config), result.model_dir)
    batch = AutoTokenizer.from_pretrained(result.model_dir)(
        data["test"][:3]["sequence"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        reloaded, expected = model.eval()(**batch).logits, result.model(**batch).logits
    # The logits of padding tokens are arbitrary.
    compared = batch["attention_mask"].bool() if name == "one class per residue" else slice(None)
    assert torch.allclose(reloaded[compared], expected[compared], atol=1e-5)


def test_thresholds_are_tuned_on_validation_alone(tmp_path, demo_table, monkeypatch):
    """One prediction of validation serves the temperature and the thresholds, which are those of the saved model."""
    splits = load_deeploc(demo_table, task="location", max_residues=180)
    data = DatasetDict({name: split.select(range(min(40, len(split)))) for name, split in splits.items()})
    options = {"recipe": "frozen", "class_weights": None, "disable_tqdm": True}
    monkeypatch.setattr(calibration, "MIN_EXAMPLES", 20)
    predicted = []
    real = WeightedTrainer.predict
    monkeypatch.setattr(
        WeightedTrainer, "predict", lambda *given, **named: predicted.append(len(given[1])) or real(*given, **named)
    )
    result = finetune(demo_model_path(), data, output_dir=tmp_path / "both", **options)
    assert result.temperature is not None
    assert predicted == [len(data["validation"]), len(data["test"])]
    assert set(result.thresholds) == set(result.task.names)
    assert set(result.thresholds.values()) != {0.5}
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)

    def logits_and_labels(split):
        with torch.no_grad():
            rows = [result.model(**tokenizer(s, return_tensors="pt")).logits[0].numpy() for s in split["sequence"]]
        return np.array(rows), np.array([list(row.values()) for row in split["label"]], dtype=float)

    logits, labels = logits_and_labels(data["validation"])
    tuned = tune_thresholds(labels, logits, result.task.names)
    assert list(result.thresholds.values()) == pytest.approx(tuned.tolist(), abs=1e-4)
    rows, labels = logits_and_labels(data["test"])
    scored = [
        multi_label_metrics(labels, rows, result.task.names, thresholds=thresholds)["f1_macro"]
        for thresholds in (np.array(list(result.thresholds.values())), None)
    ]
    assert result.metrics["f1_macro"] == pytest.approx(scored[0], abs=1e-6)
    assert scored[0] != scored[1]
    other = DatasetDict(train=data["train"], validation=data["test"])
    without = finetune(demo_model_path(), other, output_dir=tmp_path / "one", **options)
    assert without.evaluated_on == "validation"
    assert without.thresholds is None


def test_class_weights_are_refused_for_numbers(tmp_path):
    rows = Dataset.from_dict({"sequence": ["MKTV"] * 8, "label": [0.5, 1.5] * 4})
    data = DatasetDict(train=rows, test=rows)
    with pytest.raises(ConfigurationError, match="regression"):
        finetune(demo_model_path(), data, output_dir=tmp_path, class_weights=[1.0], disable_tqdm=True)


def test_a_loaded_model_gets_the_task_of_the_labels_or_is_refused(tmp_path):
    rows = Dataset.from_dict(
        {"sequence": ["MKTV", "MKAA", "MVVV", "MGGG"] * 4, "label": [[5.0, 6.0, 7.0], [5.0, 6.0, 8.0]] * 8}
    )
    rows = rows.cast_column("label", List(Value("float32"), length=3))
    data = DatasetDict(train=rows, test=rows)
    options = {"tokenizer": AutoTokenizer.from_pretrained(demo_model_path()), "recipe": "frozen", "disable_tqdm": True}
    loaded = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=3)
    result = finetune(loaded, data, output_dir=tmp_path, **options)
    assert result.model.config.problem_type == "regression"
    assert result.train_loss < 1  # two of the numbers are constant: standardised, they are 0
    assert result.metrics["rmse"] < 1  # from 5, 6 and 7
    loaded.config.problem_type = "multi_label_classification"
    with pytest.raises(ConfigurationError, match="multi_label_classification, but the labels are numbers"):
        finetune(loaded, data, output_dir=tmp_path, **options)
    tokens = AutoModelForTokenClassification.from_pretrained(demo_model_path(), num_labels=3)
    bare = AutoModel.from_pretrained(demo_model_path())
    filling = AutoModelForMaskedLM.from_pretrained(demo_model_path())
    for model in (tokens, bare, filling):
        expected = r"no head for numbers.*AutoModelForSequenceClassification\.from_pretrained\(.*num_labels=3\)"
        with pytest.raises(ConfigurationError, match=expected):
            finetune(model, data, output_dir=tmp_path, **options)


@pytest.mark.slow
def test_a_stream_trains_as_the_same_rows_in_memory(tmp_path, demo_table):
    mapped = load_deeploc(demo_table, task={"sticky": "Membrane", "nuclear": "Nucleus"}, max_residues=160)
    tokenized, _ = tokenize_dataset(mapped, AutoTokenizer.from_pretrained(demo_model_path()))
    streams = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in tokenized.items()})
    task = task_of(mapped["train"].features)
    options = {"recipe": "lora", "class_weights": None, "max_steps": 3, "disable_tqdm": True}
    streamed = finetune(demo_model_path(), streams, output_dir=tmp_path, task=task, **options)
    in_order = mapped.copy() | {"train": mapped["train"].select(range(24))}
    expected = finetune(
        demo_model_path(), DatasetDict(in_order), output_dir=tmp_path, train_sampling_strategy="sequential", **options
    )
    assert streamed.trained_layers == (0, 1, 2, 3)
    assert streamed.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
    assert streamed.thresholds == pytest.approx(expected.thresholds, rel=1e-4)
    with pytest.raises(ConfigurationError, match="cannot count the labels of a stream"):
        finetune(demo_model_path(), streams, output_dir=tmp_path, task=task, max_steps=3)


def test_the_model_is_saved_before_the_evaluation_can_fail(tmp_path, data, monkeypatch):
    from esm_efficient.training import finishing as module

    monkeypatch.setattr(
        module, "evaluate_split", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("the evaluation failed"))
    )
    (tmp_path / "result.json").write_text("{}")  # of a former run, whose model is replaced
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        finetune(demo_model_path(), data, recipe="frozen", output_dir=tmp_path, max_steps=2, disable_tqdm=True)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert saved.config.id2label == {0: "non-membrane", 1: "membrane"}
    assert not (tmp_path / "result.json").exists()


def test_without_a_report_there_is_the_record_and_the_report_can_follow(tmp_path, data):
    options = {"recipe": "frozen", "max_steps": 1, "disable_tqdm": True, "seed": np.int64(3)}
    former = finetune(demo_model_path(), data, output_dir=tmp_path, **options)
    assert former.page.exists()
    assert (former.model_dir / "README.md").exists()
    result = finetune(demo_model_path(), data, output_dir=tmp_path, report=False, **options)
    assert json.loads(result.result_path.read_text()) == result.to_dict()
    assert not result.page.exists()
    assert not (result.model_dir / "README.md").exists()
    assert result.save_page().read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("drawn_figures")
def test_an_evaluation_set_without_known_labels_gives_nan_and_not_an_error(tmp_path, data, caplog):
    tokenized, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(demo_model_path()))
    names = tokenized["test"].features["labels"]
    tokenized["test"] = tokenized["test"].cast_column("labels", Value("int64")).map(lambda _: {"labels": -100})
    options = {"task": task_of(Features({"label": names})), "recipe": "frozen", "max_steps": 2, "disable_tqdm": True}
    result = finetune(demo_model_path(), tokenized, output_dir=tmp_path, **options)
    assert all(np.isnan(value) for value in result.metrics.values())
    assert json.loads(result.result_path.read_text())["metrics"]["mcc"] is None
    assert (result.model_dir / "model.safetensors").is_file()
    assert "no label of the evaluated examples is known" in caplog.text


@pytest.mark.parametrize(("split", "named"), [("train", "training set"), ("validation", "validation split")])
@pytest.mark.parametrize("wrong", [7, -1, None])
def test_a_wrong_label_of_tokenised_splits_is_named_before_anything_is_fitted(tmp_path, data, split, named, wrong):
    tokenized, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(demo_model_path()))
    tokenized["validation"] = tokenized["test"]
    task = Task("single_label_classification", tuple(tokenized["train"].features["labels"].names))
    tokenized = tokenized.cast_column("labels", Value("int64"))
    rows = tokenized[split]
    labels = [wrong if row == 3 else label for row, label in enumerate(rows["labels"])]
    tokenized[split] = rows.remove_columns("labels").add_column("labels", labels, feature=Value("int64"))
    shown = "null" if wrong is None else wrong
    with pytest.raises(DataError, match=f"row 3 of the {named} has the label {shown}: expected a class id from 0 to 1"):
        finetune(demo_model_path(), tokenized, task=task, recipe="lora", output_dir=tmp_path, class_weights=None)


def test_one_class_is_refused_before_training(tmp_path):
    table = tmp_path / "one.csv"
    table.write_text("sequence,Membrane\n" + "".join(f"MKT{'AG' * (4 + row)},0\n" for row in range(20)))
    with pytest.raises(DataError, match=r"Membrane is '0' in all \d+ training rows: a class needs at least two values"):
        finetune("demo", table, data_options={"label": "Membrane"}, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_report_shows_the_residues_that_were_read_with_their_own_labels(tmp_path, demo_table):
    rows = load_deeploc(demo_table, max_residues=220)
    data = DatasetDict()
    for split in ("train", "test"):
        texts = rows[split]["sequence"][:24]
        labels = [[int(letter in "AVIL") for letter in text] for text in texts]
        written = [f"{text[:3]} {text[3:7]}--<mask>{text[8:]}*" for text in texts]
        data[split] = Dataset.from_dict(
            {"sequence": written, "label": labels},
            features=Features({"sequence": Value("string"), "label": List(ClassLabel(names=["other", "aliphatic"]))}),
        )
    result = finetune(demo_model_path(), data, recipe="lora", output_dir=tmp_path, max_steps=2, max_tokens=22)
    assert Predictor.load(result.model_dir).max_tokens == 22
    assert Predictor.load(export_model(result, tmp_path / "published", base_model="demo")).max_tokens == 22
    strips = residue_strips(result.evaluation, 12)[1:]
    assert strips
    for strip in strips:
        letters = "".join(residue.letter for residue in strip.residues)
        assert len(letters) == 20
        assert letters[7] == "?"
        true = [residue.true for residue in strip.residues if residue.letter != "?"]
        assert true == ["A" if letter in "AVIL" else "O" for letter in letters if letter != "?"]
        assert strip.heading.endswith("residues 1 to 20 of 20")


@pytest.mark.parametrize("file", ["result.json", "predictions.parquet"])
def test_a_run_whose_record_is_not_written_whole_is_not_finished(tmp_path, demo_table, monkeypatch, file):
    """Its metrics are computed again by resuming."""
    data = load_deeploc(demo_table, max_residues=150)
    options = {"recipe": "lora", "output_dir": tmp_path, "max_steps": 2, "probe": False, "save_strategy": "epoch"}
    replace = os.replace

    def full(source, target):
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="full"):
        finetune(demo_model_path(), data, **options)
    assert not list(tmp_path.glob("result.json*"))
    assert not list(tmp_path.glob(f"{file}*"))
    monkeypatch.setattr(os, "replace", replace)
    result = finetune(demo_model_path(), data, resume_from_checkpoint=True, **options)
    assert (result.steps, result.steps_resumed) == (2, 2)
    assert load_result(tmp_path).metrics == result.metrics


@pytest.mark.parametrize("empty", ["train", "validation", "test"])
def test_an_empty_split_of_tokens_is_refused_before_a_model_is_loaded(tmp_path, demo_table, empty):
    data = load_deeploc(demo_table, max_residues=150)
    tokens, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(demo_model_path()))
    tokens[empty] = tokens[empty].select([])
    with pytest.raises(DataError, match=f"split '{empty}' has no row"):
        finetune("no/model", tokens, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_home_directory_is_one_folder(tmp_path, data, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    result = finetune(demo_model_path(), data, recipe="frozen", output_dir="~/run", max_steps=1, disable_tqdm=True)
    assert result.model_dir == tmp_path / "home" / "run" / "model"
    assert (tmp_path / "home" / "run" / "states").is_dir()
    export_model(result, "~/exported", base_model="a/demo")
    assert (tmp_path / "home" / "exported" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path, data, seed):
    with pytest.raises(ConfigurationError, match=f"seed={seed}: expected a whole number from 0 to 4,294,967,295"):
        finetune("no/model", data, output_dir=tmp_path, seed=seed)
