"""train.py without AWS's driver: hyperparameters, failures and tracking."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from aws_on_loopback import SCRIPTS

from esm_efficient import demo_model_path


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import train

    return train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    options = ["--place", folder, "--data", "demo", "--max-residues", "150", "--limit", "24", "--max-tokens", "160"]
    done = subprocess.run([sys.executable, SCRIPTS / "prepare_data.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dataset"


@pytest.fixture
def job(tmp_path, monkeypatch, dataset):
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "model"))
    monkeypatch.setenv("SM_OUTPUT_DATA_DIR", str(tmp_path / "output" / "data"))
    monkeypatch.setenv("SM_CHANNEL_DATASET", str(dataset))
    monkeypatch.setenv("SM_CHANNEL_MODEL", demo_model_path())
    return tmp_path


def run(monkeypatch, train, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return train.main()


def longest_request(model: Path, **environment: str) -> int:
    """Return the residues of the longest sequence that the handler takes, which its error for a longer one names."""
    script = f"import inference, sys; inference.model_fn({str(model)!r}); inference.input_fn(sys.stdin.read(), None)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        input=json.dumps({"inputs": "M" * 2000}),
        cwd=SCRIPTS,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return int(re.findall(r"at most ([0-9,]+)", done.stderr)[-1].replace(",", ""))


@pytest.mark.parametrize("text", ["true", "True", "1", "yes"])
def test_booleans_of_both_launchers_are_accepted(train, text):
    false = {"true": "false", "True": "False", "1": "0", "yes": "no"}[text]
    options = train.make_parser().parse_args(["--lora", text, "--use_gradient_checkpointing", false])
    assert options.lora is True
    assert options.use_gradient_checkpointing is False


def test_the_recipe_has_the_hyperparameters(train):
    arguments = ["--use_gradient_checkpointing", "true", "--lora_r", "4", "--lora_preset", "qkv"]
    recipe = train.make_recipe(train.make_parser().parse_args(arguments), 1)
    assert (recipe.gradient_checkpointing, recipe.r, recipe.preset) == (True, 4, "qkv")
    assert recipe.trained_layers(6) == (4, 5)
    whole = train.make_recipe(train.make_parser().parse_args(["--lora_layers", "all"]), 1)
    assert whole.trained_layers(6) == (0, 1, 2, 3, 4, 5)


def test_the_learning_rate_follows_the_batch_size_over_all_processes(train):
    parse = train.make_parser().parse_args
    assert train.make_recipe(parse([]), 1).learning_rate == pytest.approx(1e-3)
    assert train.make_recipe(parse(["--gradient_accumulation_steps", "4"]), 1).learning_rate == pytest.approx(2e-3)
    assert train.make_recipe(parse([]), 4).learning_rate == pytest.approx(2e-3)
    full = train.make_recipe(parse(["--lora", "false", "--per_device_train_batch_size", "2"]), 4)
    assert (full.trains, full.learning_rate) == ("full", pytest.approx(1e-4))
    assert train.make_recipe(parse(["--learning_rate", "3e-5"]), 4).learning_rate == 3e-5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, ["0", "-1", "nan", "inf", "1,5", ""]) for name in ("epochs", "learning_rate")),
        *(
            (name, ["0", "-2", "1.5", "nan", "1e2", "1_0", "²"])
            for name in (
                *("max_steps", "lora_r", "per_device_train_batch_size", "per_device_eval_batch_size", "save_steps"),
                *("gradient_accumulation_steps", "token_budget", "logging_steps"),
            )
        ),
        ("seed", ["-1", "0.5", str(2**32)]),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_paid_for(train, name, values):
    parser = train.make_parser()
    for value in values:
        with pytest.raises(train.ConfigurationError, match=f"argument --{name}: {re.escape(repr(value))}: expected"):
            parser.parse_args([f"--{name}={value}"])


def test_the_defaults_and_the_smallest_numbers_are_accepted(train):
    parser = train.make_parser()
    defaults = {name: str(value) for name, value in vars(parser.parse_args([])).items() if value is not None}
    assert parser.parse_args([f"--{name}={value}" for name, value in defaults.items()]) == parser.parse_args([])
    least = parser.parse_args(["--epochs=0.01", "--seed=0", "--save_steps=1", "--max_steps=1", "--learning_rate=1e-9"])
    assert (least.epochs, least.seed, least.save_steps, least.max_steps) == (0.01, 0, 1, 1)
    assert train.make_recipe(least, 4).learning_rate == 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "1"], "unrecognized arguments: --epoch 1"),
        (["--lora", "perhaps"], "'perhaps' is neither true nor false"),
        (["--epochs", "many"], "'many': expected a number above 0"),
        (["--lora_preset", "everything"], "invalid choice: 'everything'"),
        (["--lora_layers", "upper"], "layers='upper'"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_wrong_hyperparameters_are_written_to_the_failure_file(train, job, monkeypatch, arguments, message):
    assert run(monkeypatch, train, *arguments) == 1
    failure = (job / "output" / "failure").read_text()
    assert message in failure[:1024]
    assert "Traceback" in failure
    assert not (job / "model").exists()


def test_a_missing_channel_and_a_folder_without_splits_are_reported(train, job, monkeypatch, tmp_path):
    monkeypatch.delenv("SM_CHANNEL_DATASET")
    assert run(monkeypatch, train) == 1
    assert "no channel named dataset" in (job / "output" / "failure").read_text()
    (job / "output" / "failure").unlink()
    monkeypatch.setenv("SM_CHANNEL_DATASET", str(tmp_path))
    assert run(monkeypatch, train) == 1
    assert "has no task.json" in (job / "output" / "failure").read_text()


def test_an_unexpected_error_is_raised_and_written_to_the_failure_file(train, job, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(train, "finetune", broken)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        run(monkeypatch, train)
    assert (job / "output" / "failure").read_text().startswith("RuntimeError: the disk is gone")


def test_a_tracked_run_logs_its_metrics_and_another_seed_must_not_resume_it(job):
    """Runs in separate processes, because a tracker lives as long as its process."""
    store = f"sqlite:///{job}/mlflow.db"
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "MLFLOW_EXPERIMENT_NAME": "proteins"}
    command = [sys.executable, "-W", "ignore", SCRIPTS / "train.py", "--max_steps", "3", "--lora", "false"]
    command += ["--save_steps", "2", "--logging_steps", "1", "--report_to", "mlflow"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((job / "model" / "metrics.json").read_text())
    assert record["recipe"] == "base"
    assert record["trained_layers"] == [0, 1, 2, 3]
    assert not (job / "model" / "adapter").exists()
    assert longest_request(job / "model") == 158  # the tokens of the training without the two special ones
    assert longest_request(job / "model", ESM_EFFICIENT_MAX_TOKENS="62") == 60

    client = pytest.importorskip("mlflow").MlflowClient(store)
    experiment = client.get_experiment_by_name("proteins")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(tracked.info.run_id, "loss")] == [1, 2, 3]
    assert tracked.data.metrics["test_accuracy"] == record["metrics"]["accuracy"]

    again = subprocess.run([*command, "--seed", "1"], env=environment, capture_output=True, text=True)
    assert again.returncode == 1
    assert "other values of seed" in (job / "output" / "failure").read_text()


def test_names_and_errors_of_mlflow_fail_no_job_that_has_written_its_model(train, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow")
    logged = []
    monkeypatch.setattr(mlflow, "log_metrics", logged.append)
    result = SimpleNamespace(evaluated_on="test", metrics={"mcc": 0.5, "f1_K+ channel (GO:1)": 0.25})
    train.track_metrics(result)
    assert logged == [{"test_mcc": 0.5, "test_f1_K_ channel _GO:1_": 0.25}]

    def refuse(metrics):
        raise mlflow.exceptions.MlflowException("the server is away")

    monkeypatch.setattr(mlflow, "log_metrics", refuse)
    train.track_metrics(result)
    assert "the last metrics are not in MLflow: the server is away" in caplog.text


def test_only_checkpoints_of_the_same_run_are_resumed(train, job, tmp_path, dataset):
    parse = train.make_parser().parse_args
    now = train.identity_of(parse([]), 2, dataset)
    train.check_same(tmp_path / "run", now, resumes=False)
    same = train.identity_of(parse(["--logging_steps", "7", "--save_steps", "9", "--report_to", "mlflow"]), 2, dataset)
    train.check_same(tmp_path / "run", same, resumes=True)
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    (other / "task.json").write_text("{}")
    for changed, name in [
        (train.identity_of(parse(["--epochs", "2"]), 2, dataset), "epochs"),
        (train.identity_of(parse([]), 4, dataset), "processes"),
        (train.identity_of(parse([]), 2, other), "dataset"),
    ]:
        with pytest.raises(train.ConfigurationError, match=f"other values of {name}"):
            train.check_same(tmp_path / "run", changed, resumes=True)
        # Without a checkpoint to resume from, any identity is allowed.
        train.check_same(tmp_path / name, changed, resumes=False)
