"""The training job, started by AWS's driver in the container's folder layout: results and interruptions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from aws_on_loopback import BUCKET, ROLE, Container
from safetensors.torch import load_file

HYPERPARAMETERS = [
    "--model_id",
    "facebook/esm2_t6_8M_UR50D",
    "--epochs",
    "0.8",
    "--save_steps",
    "3",
    "--logging_steps",
    "4",
]
"""The model's name determines the predicted memory. The job trains the demo model, from the channel named model."""


def submit(aws, place, *options, hyperparameters=()):
    done = aws.run(
        "submit.py", "--place", place, "--role", ROLE, "--model", f"s3://{BUCKET}/work/model", *options,
        "--", *HYPERPARAMETERS, *hyperparameters,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return aws.sent("create_training_job")


@pytest.fixture(scope="class")
def processes(request):
    return request.cls.PROCESSES


@pytest.fixture(scope="class")
def request_of(aws, place, processes):
    return submit(aws, place, "--processes", processes)


@pytest.fixture(scope="class")
def whole(aws, request_of, processes, tmp_path_factory):
    """A job that ran without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "ml"
    container = Container(folder, aws, request_of, with_dependencies=processes == 1)
    assert container.run() == 0, container.log()[-3000:]
    return container


def weights(container):
    return load_file(container.root / "model" / "model.safetensors")


class Jobs:
    """The tests of a job, with any number of processes."""

    PROCESSES: int

    def test_the_job_writes_a_model_and_its_figures(self, whole, processes):
        log = whole.log()
        assert f"{processes} process(es)" in log
        assert "Training Container Execution Completed" in log
        assert not (whole.root / "output" / "failure").exists()
        model = whole.root / "model"
        names = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
        assert {
            "config.json", "model.safetensors", "tokenizer_config.json", "metrics.json", "README.md",
            "adapter/adapter_model.safetensors", "code/inference.py", "code/requirements.txt",
            "code/esm_efficient/__init__.py",
        } <= names  # fmt: skip
        record = json.loads((model / "metrics.json").read_text())
        assert record["trained_layers"] == [3]
        assert record["base_model"] == "facebook/esm2_t6_8M_UR50D"
        assert json.loads((whole.root / "output" / "data" / "result.json").read_text())["metrics"] == record["metrics"]
        config = json.loads((model / "config.json").read_text())
        assert list(config["id2label"].values()) == ["non-membrane", "membrane"]

    def test_the_log_has_every_metric_of_the_job(self, whole, request_of):
        for definition in request_of["AlgorithmSpecification"]["MetricDefinitions"]:
            values = re.findall(definition["Regex"], whole.log())
            assert values, definition
            assert all(-1 <= float(value) < float("inf") for value in values)
        assert whole.log().count("Max GPU memory use during training") == 1

    def test_an_interrupted_job_resumes_and_ends_with_the_same_weights(self, aws, request_of, whole, tmp_path):
        """SageMaker sends SIGTERM before it takes an instance back."""
        container = Container(tmp_path / "ml", aws, request_of)
        assert container.interrupt(after=3) != 0
        assert "Training Container Execution Completed" not in container.log()
        steps = container.checkpoints()
        last = json.loads((whole.root / "model" / "metrics.json").read_text())["steps"]
        assert 3 <= steps[-1] < last
        assert f"a signal ended the run after optimizer step {steps[-1]}" in container.log()
        # SageMaker keeps the folder of checkpoints and starts a new container.
        again = Container(tmp_path / "again", aws, request_of)
        shutil.copytree(container.root / "checkpoints", again.root / "checkpoints", dirs_exist_ok=True)
        assert again.run() == 0, again.log()[-3000:]
        assert f"resuming from {again.root}/checkpoints/checkpoint-{steps[-1]}" in again.log()
        expected, resumed = weights(whole), weights(again)
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    def test_the_artifact_predicts_with_its_own_code_in_another_folder(self, whole, tmp_path):
        with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
            archive.add(whole.root / "model", arcname=".")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        subprocess.run(["tar", "-xzf", tmp_path / "model.tar.gz", "-C", elsewhere], check=True)
        script = (
            "import json, sys, inference, esm_efficient\n"
            f"assert esm_efficient.__file__.startswith({str(elsewhere)!r}), esm_efficient.__file__\n"
            f"model = inference.model_fn({str(elsewhere)!r})\n"
            "queries = inference.input_fn(sys.stdin.read(), 'application/json')\n"
            "print(inference.output_fn(inference.predict_fn(queries, model), 'application/json'))\n"
        )
        sequences = ["MKTAYIAKQRQISFVKSHFSRQ", "MALLVLLGLLAVLGALLAGAVLL"]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            input=json.dumps({"inputs": sequences}),
            cwd=elsewhere / "code",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(elsewhere).eval()
        tokenizer = AutoTokenizer.from_pretrained(elsewhere)
        for sequence, answer in zip(sequences, json.loads(done.stdout), strict=True):
            with torch.no_grad():
                probabilities = model(**tokenizer(sequence, return_tensors="pt")).logits.softmax(-1)[0]
            assert answer["probabilities"] == pytest.approx(
                dict(zip(["non-membrane", "membrane"], probabilities.tolist(), strict=True)), abs=1e-6
            )


class TestOneProcess(Jobs):
    PROCESSES = 1


class TestTwoProcesses(Jobs):
    PROCESSES = 2
