"""Early stopping: a run ends without a better result on validation, and the best checkpoint is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from esm_efficient import demo_model_path, evaluate, finetune, load_deeploc, load_result, tokenize_dataset
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import Task
from esm_efficient.training.stopping import EarlyStopping

CLASSES = Task("single_label_classification", ("no", "yes"))


def small_split(labels=(0, 1)):
    rows = {"sequence": [f"MK{'ACDEFGHI'[row % 8]}{'W' * (row % 5)}" for row in range(16)], "label": [*labels] * 8}
    return Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["no", "yes"]))


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
    assert result.best_step == 3 * (seen.index(best) + 1)
    measured = evaluate(result.model_dir, data["validation"])[metric]
    assert measured == pytest.approx(best, rel=1e-3, abs=1e-5)


class Killed(TrainerCallback):
    """Ends the process, as it were, after the checkpoint of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_save(self, args, state, control, **kwargs):
        if state.epoch >= self.epoch:
            raise KeyboardInterrupt


class KilledLater(TrainerCallback):
    """Ends the process, as it were, when so many steps are done and their checkpoint is whole."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_run_that_resumes_counts_on_the_epochs_without_a_better_result(tmp_path, killed_after):
    """Killed after one of two epochs that are allowed, and after both, when only the end was missing."""
    split = small_split()
    wrong = small_split(labels=(1, 0))
    # This metric is the same in each epoch, and the loss of wrong labels grows, so that none is better than the first.
    options = {"metric_for_best_model": "majority_accuracy", "greater_is_better": True, "early_stopping": 2}
    options |= {"recipe": "frozen", "epochs": 9, "batch_size": 8, "output_dir": tmp_path, "disable_tqdm": True}
    options |= {"probe": False, "report": False}
    data = DatasetDict(train=split, validation=wrong, test=split)
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
    options = stopping.options({"save_strategy": "steps"})
    assert options["eval_steps"] == options["save_steps"] == 500
    assert "save_total_limit" not in options  # the checkpoints are wanted
    options = stopping.options({"save_strategy": "best"})
    assert (options["save_strategy"], options["save_total_limit"]) == ("epoch", 1)
    assert stopping.options({"eval_strategy": "steps", "save_strategy": "best"})["save_strategy"] == "steps"


@pytest.mark.parametrize("early_stopping", [None, 2])
@pytest.mark.parametrize(
    ("given", "greater"),
    [
        ({"metric_for_best_model": "loss"}, False),
        ({"metric_for_best_model": "eval_rmse"}, False),
        ({"metric_for_best_model": "mae", "greater_is_better": None}, False),
        ({"metric_for_best_model": "spearman"}, True),
        ({"metric_for_best_model": "eval_auroc"}, True),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, True),
    ],
)
def test_the_name_of_a_metric_says_whether_more_of_it_is_better(tmp_path, early_stopping, given, greater):
    for task in (CLASSES, Task("regression", ("x",))):
        stopping = EarlyStopping.check(early_stopping, ["train", "validation"], task)
        kept = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
        args = TrainingArguments(str(tmp_path), use_cpu=True, **stopping.options(given | kept))
        assert args.greater_is_better is greater


def test_a_callback_that_stops_early_takes_the_place_of_what_nobody_asked_for():
    splits, own = ["train", "validation"], EarlyStoppingCallback(early_stopping_patience=9)
    automatic = EarlyStopping.check("auto", splits, CLASSES)
    assert automatic.callbacks([own]) == []
    assert len(automatic.callbacks([TrainerCallback()])) == 1
    assert automatic.options({})["load_best_model_at_end"]
    assert automatic.callbacks([EarlyStoppingCallback]) == []
    assert len(EarlyStopping.check(3, splits, CLASSES).callbacks([own])) == 1


def test_of_epochs_with_the_same_metric_that_with_the_lowest_loss_is_kept(tmp_path):
    """A metric that is the same in each epoch, of a model that learns."""
    split = small_split()
    options = {"metric_for_best_model": "majority_accuracy", "recipe": "frozen", "epochs": 5, "batch_size": 8}
    options |= {"disable_tqdm": True, "probe": False, "report": False, "early_stopping": 2}
    result = finetune(
        demo_model_path(), DatasetDict(train=split, validation=split, test=split), output_dir=tmp_path, **options
    )
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 5
    assert result.best_step == result.steps == 5 * 2


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
        (["train", "validation"], {"eval_strategy": "steps", "eval_steps": 5}, None),
        (["train", "validation"], {"save_strategy": "steps"}, None),
        (["train", "validation"], {"save_strategy": "best"}, 3),
        (["train", "validation"], {"eval_strategy": "epoch", "save_strategy": "best"}, 3),
        (["train", "validation"], {"save_only_model": True}, 3),
        (["train", "validation"], {"save_only_model": True, "save_strategy": "epoch", "fsdp": "full_shard"}, None),
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
    options.pop("fsdp", None)  # it needs several processes
    args = TrainingArguments(str(tmp_path), use_cpu=True, **stopping.options(options))  # transformers takes them
    assert args.load_best_model_at_end is (patience is not None)


def test_the_best_epoch_is_kept_unless_something_else_is_asked_for(tmp_path):
    split = small_split()
    data = DatasetDict(train=split, validation=split, test=split)
    options = {"recipe": "frozen", "epochs": 2, "batch_size": 8, "disable_tqdm": True, "probe": False, "report": False}
    usual = finetune(demo_model_path(), data, output_dir=tmp_path / "usual", **options)
    last = finetune(demo_model_path(), data, output_dir=tmp_path / "last", early_stopping=None, **options)
    scores = [entry["eval_mcc"] for entry in usual.history if "eval_mcc" in entry]
    assert usual.best_step == 2 * (1 + scores.index(max(scores)))
    assert f"4 (the model is that of step {usual.best_step}, the best)" in str(usual)
    assert load_result(tmp_path / "usual").best_step == usual.best_step
    assert last.best_step is None
    options |= {"early_stopping": 2, "load_best_model_at_end": False}
    assert finetune(demo_model_path(), data, output_dir=tmp_path / "end", **options).best_step is None
    del options["early_stopping"], options["load_best_model_at_end"]
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
    ("options", "is_possible"),
    [
        ({"eval_strategy": "no"}, False),
        ({"save_strategy": "no"}, False),
        ({"save_strategy": "no", "load_best_model_at_end": False}, True),
        ({"eval_strategy": "no", "load_best_model_at_end": False}, False),
        ({"eval_strategy": "epoch", "save_strategy": "steps"}, False),
        ({"eval_strategy": "epoch", "save_strategy": "steps", "load_best_model_at_end": False}, True),
        ({"eval_strategy": "steps", "eval_steps": 30, "save_strategy": "steps", "save_steps": 100}, False),
        ({"save_strategy": "steps", "save_steps": 100, "eval_steps": 30}, False),
        ({"eval_strategy": "steps", "eval_steps": 50, "save_strategy": "steps", "save_steps": 100}, False),
        ({"eval_strategy": "steps", "eval_steps": 50, "save_strategy": "steps", "save_steps": 50}, True),
        ({"eval_strategy": None, "save_strategy": None, "metric_for_best_model": None}, True),
        ({"eval_strategy": "steps"}, True),
        ({"save_strategy": "steps", "logging_steps": 30}, True),
    ],
)
def test_what_cannot_be_kept_is_refused_and_all_else_is_taken_by_transformers(tmp_path, options, is_possible):
    splits = ["train", "validation"]
    if not is_possible:
        with pytest.raises(
            ConfigurationError, match=r"early_stopping=2 with .*expected the same for evaluating and sav"
        ):
            EarlyStopping.check(2, splits, CLASSES, options=options)
        return
    stopping = EarlyStopping.check(2, splits, CLASSES, options=options)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **stopping.options(options))
    assert args.eval_strategy != "no"
    if args.load_best_model_at_end:
        assert (args.metric_for_best_model, args.greater_is_better) == ("mcc", True)


def evaluated(callback, state, values, losses):
    """Return the patience that is used up after each of some evaluations."""
    args, counts = SimpleNamespace(greater_is_better=True, load_best_model_at_end=True, metric_for_best_model="mcc"), []
    for value, loss in zip(values, losses, strict=True):
        state.log_history.append({"eval_loss": loss, "eval_mcc": value})
        callback.on_evaluate(args, state, TrainerControl(), metrics={"eval_mcc": value})
        state.best_metric = value if state.best_metric is None else max(value, state.best_metric)
        counts.append(callback.early_stopping_patience_counter)
    return counts


@pytest.mark.parametrize(
    ("values", "losses", "counts"),
    [
        ([0.0, 0.0, 0.0, 0.0], [0.9, 0.8, 0.7, 0.6], [0, 0, 0, 0]),
        ([0.0, 0.0, 0.0, 0.0], [0.9, 0.8, 0.85, 0.7], [0, 0, 1, 0]),
        ([0.0, 0.0, 0.0], [0.9, 0.9, 0.95], [0, 1, 2]),
        ([0.1, -0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.6], [0, 1, 2, 3]),
        ([0.5, 0.4, 0.3], [0.9, 0.8, 0.7], [0, 1, 2]),
        ([0.5, 0.6, 0.55], [0.9, 0.95, 0.5], [0, 0, 1]),
    ],
)
def test_a_lower_loss_is_a_better_result_while_the_metric_stays_the_same(values, losses, counts):
    [callback] = EarlyStopping.check(5, ["train", "validation"], CLASSES).callbacks()
    assert evaluated(callback, TrainerState(), values, losses) == counts


def test_without_a_test_split_the_result_says_that_it_chose_by_its_own_metric(tmp_path):
    split = small_split()
    options = {"recipe": "frozen", "epochs": 1, "batch_size": 8, "disable_tqdm": True, "probe": False, "report": False}
    said = {}
    for early_stopping in ("auto", None):
        result = finetune(
            demo_model_path(),
            DatasetDict(train=split, validation=split),
            output_dir=tmp_path / str(early_stopping),
            early_stopping=early_stopping,
            **options,
        )
        said[early_stopping] = any("the metrics are those of validation" in text for text in result.warnings)
    assert said == {"auto": True, None: False}


def test_a_run_does_not_go_on_by_another_metric_or_other_labels_of_validation(tmp_path):
    split = small_split()
    options = {"recipe": "frozen", "epochs": 3, "batch_size": 8, "output_dir": tmp_path, "disable_tqdm": True}
    options |= {"probe": False, "report": False}
    data = DatasetDict(train=split, validation=split, test=split)
    with pytest.raises(KeyboardInterrupt):
        finetune(demo_model_path(), data, callbacks=[KilledLater(2)], **options)
    options["resume_from_checkpoint"] = True
    with pytest.raises(ConfigurationError, match="metric_for_best_model was mcc and is loss"):
        finetune(demo_model_path(), data, metric_for_best_model="loss", **options)
    with pytest.raises(ConfigurationError, match="rows_of_validation was 16 and is 8"):
        finetune(demo_model_path(), data | {"validation": split.select(range(8))}, **options)
    assert finetune(demo_model_path(), data, **options).steps == 6


@pytest.mark.parametrize("tokenized", [False, True], ids=["texts", "tokens"])
@pytest.mark.parametrize(
    ("labels", "metric"),
    [
        ([0, 0, 0, 0], ("loss", False)),
        ([0, 0, 1, 0], ("mcc", True)),
        ([], ("mcc", True)),
    ],
)
def test_the_loss_decides_where_the_metric_is_the_same_for_every_model(labels, metric, tokenized):
    features = Features({"sequence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = [{"sequence": "MKV", "label": label} for label in labels]
    splits = {"train": Dataset.from_list([{"sequence": "MKV", "label": 1}], features=features)}
    if rows:
        splits["validation"] = Dataset.from_list(rows, features=features)
    if tokenized:
        splits = tokenize_dataset(DatasetDict(splits), AutoTokenizer.from_pretrained(demo_model_path()))[0]
    stopping = EarlyStopping.check("auto", splits, CLASSES)
    assert stopping.metric == metric
    if rows:
        assert stopping.options({})["metric_for_best_model"] == metric[0]
