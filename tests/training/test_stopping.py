"""Early stopping: a run ends without a better result on validation, and the best checkpoint is kept."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from esm_efficient import demo_model_path, evaluate, finetune, load_deeploc, tokenize_dataset
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.reporting.description import describe
from esm_efficient.tasks import Task
from esm_efficient.training.stopping import EarlyStopping

CLASSES = Task("single_label_classification", ("no", "yes"))


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_a_run_ends_and_the_best_checkpoint_is_kept(tmp_path, demo_table, kind):
    data = load_deeploc(demo_table, max_residues=300)
    data = DatasetDict({name: data[name].select(range(24)) for name in ("train", "validation", "test")})
    if kind == "numbers":
        data = data.remove_columns("label").map(lambda row: {"label": 100.0 + row["residues"]})
    # Such a rate makes a head worse with every epoch.
    options = {"learning_rate": 3.0, "epochs": 12, "batch_size": 8, "lr_scheduler_type": "constant"}
    result = finetune(
        demo_model_path(), data, recipe="frozen", output_dir=tmp_path, early_stopping=2, disable_tqdm=True, **options
    )
    metric, better = ("rmse", min) if kind == "numbers" else ("mcc", max)
    seen = [entry[f"eval_{metric}"] for entry in result.history if f"eval_{metric}" in entry]
    best = better(seen)
    assert len(seen) < 12
    assert seen.index(best) == len(seen) - 3
    measured = evaluate(result.model_dir, data["validation"])[metric]
    assert measured == pytest.approx(best, rel=1e-3, abs=1e-5)


class Killed(TrainerCallback):
    """Ends the process, as it were, after the checkpoint of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_save(self, args, state, control, **kwargs):
        if state.epoch >= self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_run_that_resumes_counts_on_the_epochs_without_a_better_result(tmp_path, killed_after):
    """Killed after one of two epochs that are allowed, and after both, when only the end was missing."""
    rows = {"sequence": [f"MK{'ACDEFGHI'[row % 8]}{'W' * (row % 5)}" for row in range(16)], "label": [0, 1] * 8}
    split = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["no", "yes"]))
    # This metric is the same in each epoch, so that none is better than the first.
    options = {"metric_for_best_model": "majority_accuracy", "greater_is_better": True, "early_stopping": 2}
    options |= {"recipe": "frozen", "epochs": 9, "batch_size": 8, "output_dir": tmp_path, "disable_tqdm": True}
    options |= {"probe": False, "report": False}
    data = DatasetDict(train=split, validation=split, test=split)
    with pytest.raises(KeyboardInterrupt):
        finetune(demo_model_path(), data, callbacks=[Killed(1 + killed_after)], **options)
    options["resume_from_checkpoint"] = True
    assert finetune(demo_model_path(), data, **options).steps == 3 * 2
    with pytest.raises(ConfigurationError, match=r"is finished: early stopping ended it after step 6\. Train without"):
        finetune(demo_model_path(), data, **options)
    assert finetune(demo_model_path(), data, **options | {"early_stopping": 3}).steps == 4 * 2


@pytest.mark.parametrize("labels", ["classes", "numbers"])
def test_a_validation_split_without_a_known_label_is_refused(tmp_path, labels):
    kind = Value("float32") if labels == "numbers" else ClassLabel(names=["no", "yes"])
    features = Features({"sequence": Value("string"), "label": kind})
    train, validation = (
        Dataset.from_dict({"sequence": ["MKT", "MAL"] * 4, "label": cells * 4}, features=features)
        for cells in ([0, 1], [None, None])
    )
    data = DatasetDict(train=train, validation=validation, test=train)
    with pytest.raises(DataError, match="validation has no known label, so that early stopping cannot"):
        finetune("no/model", data, output_dir=tmp_path, early_stopping="auto")
    with pytest.raises(ConfigurationError, match="no/model"):  # the data are not refused
        finetune("no/model", data, output_dir=tmp_path, early_stopping=None)


def test_options_and_callbacks():
    assert EarlyStopping.check(None, ["train"], CLASSES).options({"epochs": 3}) == {"epochs": 3}
    assert EarlyStopping.check(None, ["train"], CLASSES).callbacks() == []
    stopping = EarlyStopping.check(2, ["train", "validation"], CLASSES)
    options = stopping.options({"save_total_limit": 5})
    assert options["metric_for_best_model"] == "mcc"
    assert options["load_best_model_at_end"]
    assert options["save_total_limit"] == 5
    assert stopping.callbacks()[0].early_stopping_patience == 2
    for given in ({"eval_strategy": "steps", "eval_steps": 50}, {"save_strategy": "steps", "save_steps": 50}):
        options = stopping.options(given)
        assert (options["eval_strategy"], options["save_strategy"]) == ("steps", "steps")
        assert options["eval_steps"] == options["save_steps"] == 50
    assert stopping.options({"eval_strategy": "steps", "save_strategy": "no"})["save_strategy"] == "no"
    assert stopping.options({"save_strategy": "no"})["eval_strategy"] == "epoch"


@pytest.mark.parametrize(
    ("task", "name", "is_known"),
    [
        (CLASSES, "mcc", True),
        (CLASSES, "eval_f1_yes", True),
        (CLASSES, "loss", True),
        (CLASSES, "samples_per_second", True),
        (CLASSES, "rmse", False),
        (Task("token_classification", ("H", "E", "C")), "mcc_E", True),
        (Task("multi_label_classification", ("a", "b")), "jaccard", True),
        (Task("multi_label_classification", ("a",)), "accuracy", False),
        (Task("regression", ("x",)), "r2", True),
        (Task("regression", ("x", "y")), "spearman_y", True),
        (Task("regression", ("x",)), "spearman_x", False),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused(tmp_path, task, name, is_known):
    args = TrainingArguments(output_dir=str(tmp_path), metric_for_best_model=name, report_to="none", use_cpu=True)
    stopping = EarlyStopping.check(None, ["train"], task)
    if is_known:
        stopping.check_metric(args, task)
    else:
        with pytest.raises(ConfigurationError, match=f"metric_for_best_model='{name}': no evaluation has"):
            stopping.check_metric(args, task)


def test_a_wrong_metric_is_refused_before_training_with_the_nearest_right_one(tmp_path):
    rows = Dataset.from_dict({"sequence": ["MKT", "MAL"] * 4, "label": [0, 1] * 4})
    rows = rows.cast_column("label", ClassLabel(names=["no", "yes"]))
    with pytest.raises(ConfigurationError, match="'acuracy': no evaluation has this metric: did you mean 'accuracy'"):
        finetune("no/model", DatasetDict(train=rows, test=rows), output_dir=tmp_path, metric_for_best_model="acuracy")


@pytest.mark.parametrize(
    ("splits", "options", "patience"),
    [
        (["train", "validation"], {}, 3),
        (["train", "test"], {}, None),
        (["train", "validation"], {"eval_strategy": "steps", "eval_steps": 5}, 3),
        (["train", "validation"], {"save_strategy": "best"}, 3),
        (["train", "validation"], {"eval_strategy": "epoch", "save_strategy": SaveStrategy.EPOCH}, 3),
        (["train", "validation"], {"save_strategy": "no"}, None),
        (["train", "validation"], {"eval_strategy": "no"}, None),
        (["train", "validation"], {"eval_strategy": "epoch", "save_strategy": "steps"}, None),
        (["train", "validation"], {"load_best_model_at_end": False}, None),
    ],
)
def test_auto_keeps_the_best_where_there_is_a_validation_split_and_the_options_allow_it(
    tmp_path, splits, options, patience
):
    stopping = EarlyStopping.check("auto", splits, CLASSES, options=options)
    assert stopping.patience == patience
    args = TrainingArguments(str(tmp_path), use_cpu=True, **stopping.options(options))  # transformers takes them
    assert args.load_best_model_at_end is (patience is not None)


def test_the_best_epoch_is_kept_unless_something_else_is_asked_for(tmp_path):
    rows = {"sequence": [f"MK{'ACDEFGHI'[row % 8]}{'W' * (row % 5)}" for row in range(16)], "label": [0, 1] * 8}
    split = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["no", "yes"]))
    data = DatasetDict(train=split, validation=split, test=split)
    options = {"recipe": "frozen", "epochs": 2, "batch_size": 8, "disable_tqdm": True, "probe": False, "report": False}
    finetune(demo_model_path(), data, output_dir=tmp_path / "usual", **options)
    finetune(demo_model_path(), data, output_dir=tmp_path / "last", early_stopping=None, **options)
    assert [len(list(folder.glob("checkpoint-*"))) for folder in (tmp_path / "usual", tmp_path / "last")] == [1, 0]
    tokens, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(demo_model_path()))
    stream = dict(tokens) | {"train": tokens["train"].to_iterable_dataset()}
    del options["epochs"]
    finetune(
        demo_model_path(),
        stream,
        output_dir=tmp_path / "stream",
        max_steps=2,
        task=CLASSES,
        class_weights=None,
        **options,
    )
    assert not list((tmp_path / "stream").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("patience", "splits", "message"),
    [
        (0, ["train", "validation"], "early_stopping=0: expected at least 1"),
        (True, ["train", "validation"], "early_stopping=True: expected at least 1"),
        ("3", ["train", "validation"], "early_stopping='3': expected at least 1"),
        (2, ["train", "test"], "needs a validation"),
    ],
)
def test_wrong_options_are_refused(patience, splits, message):
    with pytest.raises(ConfigurationError, match=message):
        EarlyStopping.check(patience, splits, CLASSES)


@pytest.mark.parametrize(
    ("labels", "metric"), [([0, 0, 0, 0], ("loss", False)), ([0, 0, 1, 0], ("mcc", True)), ([], ("mcc", True))]
)
def test_the_loss_decides_where_the_metric_is_the_same_for_every_model(labels, metric):
    features = Features({"sequence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = [{"sequence": "MKV", "label": label} for label in labels]
    splits = {"train": Dataset.from_list([{"sequence": "MKV", "label": 1}], features=features)}
    if rows:
        splits["validation"] = Dataset.from_list(rows, features=features)
    stopping = EarlyStopping.check("auto", splits, CLASSES, data=describe(splits))
    assert stopping.metric == metric
    if rows:
        assert stopping.options({})["metric_for_best_model"] == metric[0]
