"""submit.py sends the right request to SageMaker, and refuses wrong options before anything is billed."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from aws_on_loopback import BUCKET, ROLE, SCRIPTS
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from packaging.version import Version

IMAGE = (
    "763104351884.dkr.ecr.us-east-1.amazonaws.com/huggingface-pytorch-training:"
    "2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04"
)
MODEL = ("--model_id", "facebook/esm2_t6_8M_UR50D")
ONE = ("--per_device_train_batch_size", "1")
"""One sequence per step, for which a recommendation tries few settings."""


def submit(aws, place, *options, hyperparameters=MODEL, **environment):
    return aws.run("submit.py", "--place", place, "--role", ROLE, *options, "--", *hyperparameters, **environment)


def channel(name, uri):
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


def check(aws, request):
    """Check the request against SageMaker's service model."""
    shape = aws.client("sagemaker").meta.service_model.operation_model("CreateTrainingJob").input_shape
    assert not ParamValidator().validate(request, shape).has_errors()


def test_every_field_of_the_request_is_right(aws, place, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from job_metrics import METRIC_DEFINITIONS

    arn = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/proteins"
    done = submit(
        aws, place, "--name", "membrane", "--run", "first", "--spot", "--max-hours", 2, "--volume-gb", 80,
        "--tag", "team=structure", "--tracking", arn, "--experiment", "esm", "--instance-count", 2,
        hyperparameters=[*MODEL, "--epochs", "3", "--lora", "True", "--use_gradient_checkpointing", "false"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    request = aws.sent("create_training_job")
    check(aws, request)
    name = request["TrainingJobName"]
    assert re.fullmatch(r"membrane-\d{14}", name)
    assert request == {
        "TrainingJobName": name,
        "HyperParameters": {
            "model_id": "facebook/esm2_t6_8M_UR50D",
            "epochs": "3.0",
            "max_steps": "-1",
            "lora": "true",
            "lora_r": "8",
            "lora_preset": "all-linear",
            "lora_layers": "top-1/3",
            "per_device_train_batch_size": "8",
            "per_device_eval_batch_size": "16",
            "gradient_accumulation_steps": "1",
            "use_gradient_checkpointing": "false",
            "precision": "auto",
            "class_weights": "true",
            "save_steps": "100",
            "logging_steps": "20",
            "seed": "0",
            "report_to": "mlflow",
        },
        "AlgorithmSpecification": {
            "TrainingImage": IMAGE,
            "TrainingInputMode": "File",
            "MetricDefinitions": list(METRIC_DEFINITIONS),
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": request["AlgorithmSpecification"]["ContainerArguments"],
        },
        "RoleArn": ROLE,
        "InputDataConfig": [
            channel("dataset", f"{place}/dataset/"),
            channel("code", f"{place}/jobs/{name}/input/code"),
            channel("sm_drivers", f"{place}/jobs/{name}/input/sm_drivers"),
        ],
        "OutputDataConfig": {"S3OutputPath": f"{place}/output", "CompressionType": "GZIP"},
        "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 2, "VolumeSizeInGB": 80},
        "StoppingCondition": {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400},
        "Tags": [
            {"Key": "created-by", "Value": "esm-efficient"},
            {"Key": "run", "Value": "first"},
            {"Key": "team", "Value": "structure"},
        ],
        "EnableManagedSpotTraining": True,
        "CheckpointConfig": {"S3Uri": f"{place}/checkpoints/first", "LocalPath": "/opt/ml/checkpoints"},
        "Environment": {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MLFLOW_TRACKING_URI": arn,
            "MLFLOW_EXPERIMENT_NAME": "esm",
        },
    }
    assert aws.client("sagemaker").describe_training_job(TrainingJobName=name)["RoleArn"] == ROLE
    code = f"work/jobs/{name}/input/code"
    staged = {key.removeprefix(f"{code}/") for key in aws.keys(code)}
    assert {
        "train.py",
        "job_metrics.py",
        "ranges.py",
        "inference.py",
        "requirements.txt",
        "esm_efficient/demo/model/config.json",
    } <= staged
    assert not [key for key in staged if "__pycache__" in key]
    body = aws.client("s3").get_object(Bucket=BUCKET, Key=f"{code}/requirements.txt")["Body"].read().decode()
    assert "\nsagemaker-mlflow" in body
    sources = json.loads(
        aws.client("s3")
        .get_object(Bucket=BUCKET, Key=f"work/jobs/{name}/input/sm_drivers/sourcecode.json")["Body"]
        .read()
    )
    assert (sources["entry_script"], sources["requirements"]) == ("train.py", "requirements.txt")


def test_a_dry_run_prints_the_request_and_sends_nothing(aws, place):
    before = (len(aws.requests), aws.keys())
    options = ["--dry-run", "--warm-pool-minutes", 20]
    done = submit(aws, place, *options, hyperparameters=[*MODEL, *ONE], AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (len(aws.requests), aws.keys()) == before
    request = json.loads(done.stdout[done.stdout.index("\n{") :])
    check(aws, request)
    assert request["AlgorithmSpecification"]["TrainingImage"] == IMAGE
    assert request["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 1200
    assert "EnableManagedSpotTraining" not in request or request["EnableManagedSpotTraining"] is False
    assert "MaxWaitTimeInSeconds" not in request["StoppingCondition"]
    assert "fits A10G" in done.stdout
    assert "recommended:" in done.stdout


def test_a_job_too_large_for_its_instance_is_refused_with_a_recommendation(aws, place):
    before = len(aws.requests)
    big = ["--model_id", "facebook/esm2_t36_3B_UR50D", "--lora", "false", *ONE]
    done = submit(aws, place, "--instance-type", "ml.g4dn.xlarge", hyperparameters=big)
    assert done.returncode == 1
    assert "does not fit T4" in done.stdout
    assert "LoRA on all-linear" in done.stdout
    assert "ml.g4dn.xlarge is predicted to run out of memory" in done.stderr
    assert len(aws.requests) == before


def test_the_name_of_a_run_is_printed_before_its_job_can_fail(aws, place, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("submit")

    def fail(**_):
        raise RuntimeError("the job failed")

    monkeypatch.setattr(script, "make_trainer", lambda *_: SimpleNamespace(train=fail))
    monkeypatch.setattr(script, "claim", lambda *_: None)
    monkeypatch.setattr(script, "client", lambda *_: None)
    monkeypatch.setattr(script, "predict_memory", lambda *_: ("it fits", True))
    monkeypatch.setattr(script, "make_session", lambda *_: None)
    options = ["--place", "s3://bucket/work", "--role", ROLE, "--region", "us-east-1", "--tokens", "514", "--wait"]
    with pytest.raises(RuntimeError, match="the job failed"):
        script.main([*options, "--name", "mine", "--", *MODEL])
    assert re.search(r"a new job with --run mine-\d{8}-\d{6} resumes from its checkpoints", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "hyperparameters", "message"),
    [
        ([], ["--model_id", "somebody's/model"], "model_id: an apostrophe breaks"),
        ([], ["--epoch", "3"], "unrecognized arguments: --epoch"),
        ([], ["--learning_rate", "nan"], "argument --learning_rate: 'nan': expected a number above 0"),
        ([], ["--lora", "maybe"], "'maybe' is neither true nor false"),
        (["--spot", "--warm-pool-minutes", "5"], MODEL, "--spot and --warm-pool-minutes exclude each other"),
        (["--max-wait-hours", "5"], MODEL, "--max-wait-hours needs --spot"),
        (["--tag", "team"], MODEL, "expected KEY=VALUE"),
        (["--model", "s3://bucket/model"], ["--epochs", "2"], "--model needs --model_id"),
        (["--place", "s3://bucket-alone"], MODEL, "expected s3://bucket/prefix"),
        (["--instance-type", "ml.unknown.large"], MODEL, "no device or instance type is named"),
        (["--role", "SageMakerRole"], MODEL, "--role 'SageMakerRole': expected the ARN of a role"),
        (["--region", "frankfurt"], MODEL, "the AWS region is 'frankfurt': expected one such as us-east-1"),
    ],
)
def test_wrong_options_are_refused_before_the_upload(monkeypatch, capsys, options, hyperparameters, message):
    monkeypatch.syspath_prepend(SCRIPTS)
    import submit as script

    given = ["--place", "s3://bucket/prefix", "--role", ROLE, "--region", "us-east-1", *options, "--dry-run"]
    arguments = [*given, "--", *hyperparameters]
    with pytest.raises(script.ConfigurationError, match=re.escape(message)):
        script.main(arguments)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--instance-count", "0", "'0': expected a whole number, at least 1"),
        ("--max-hours", "-1", "'-1': expected a number above 0"),
        ("--warm-pool-minutes", "1.5", "'1.5': expected a whole number, at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_usage(monkeypatch, capsys, option, value, message):
    monkeypatch.syspath_prepend(SCRIPTS)
    import submit as script

    with pytest.raises(SystemExit):
        script.main(["--place", "s3://bucket/prefix", "--role", ROLE, option, value, "--dry-run"])
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_memory_is_predicted_for_the_longest_protein_of_the_data(aws, place):
    record = {"kind": "regression", "names": ["tm"], "dataset": "mine", "longest_tokens": 1022}
    aws.client("s3").put_object(Bucket=BUCKET, Key="long/dataset/task.json", Body=json.dumps(record).encode())
    budget = [*MODEL, "--token_budget", "20500"]
    done = submit(aws, place, "--dataset", f"s3://{BUCKET}/long/dataset", hyperparameters=budget)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "micro-batch 20 x 1, 1,022 tokens" in done.stdout
    (channel,) = [c for c in aws.sent("create_training_job")["InputDataConfig"] if c["ChannelName"] == "dataset"]
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == f"s3://{BUCKET}/long/dataset/"
    done = submit(aws, place, "--dataset", f"s3://{BUCKET}/nothing")
    assert "run prepare_data.py first" in done.stderr


def test_a_prefix_with_foreign_objects_is_refused(aws, place):
    aws.client("s3").put_object(Bucket=BUCKET, Key="other/paper.txt", Body=b"not ours")
    done = submit(aws, f"s3://{BUCKET}/other", "--dataset", f"{place}/dataset")
    assert done.returncode == 1
    assert "contains 1 object(s) that these scripts did not create" in done.stderr
    assert aws.keys("other") == ["other/paper.txt"]


def test_the_requirements_are_those_of_the_library_without_torch():
    lines = (SCRIPTS / "requirements.txt").read_text().splitlines()
    listed = sorted(line for line in lines if not line.startswith("#"))
    needed = [r for r in importlib.metadata.requires("esm-efficient-finetuning") if "extra" not in r]
    assert listed == sorted(line for line in needed if Requirement(line).name != "torch")


@pytest.mark.parametrize("scope", ["training", "inference"])
def test_the_newest_image_that_the_library_supports_is_chosen(monkeypatch, scope):
    monkeypatch.syspath_prepend(SCRIPTS)
    import aws

    image = aws.find_image(scope, "eu-west-1", "ml.g5.2xlarge")
    assert "eu-west-1" in image.uri
    assert f"transformers{image.transformers}" in image.uri
    assert Version(image.transformers) >= Version("5.3")
    assert Version(image.torch) >= Version("2.6")
    required = {"transformers": Requirement("transformers>=99").specifier, "torch": Requirement("torch>=2.6").specifier}
    monkeypatch.setattr(aws, "library_requirements", lambda: required)
    with pytest.raises(aws.ConfigurationError, match=r"newest .* image has transformers 5.* needs transformers>=99"):
        aws.find_image(scope, "eu-west-1", "ml.g5.2xlarge")


@pytest.mark.parametrize("script", ["submit", "deploy"])
def test_a_missing_region_and_the_name_of_a_role_are_seen_before_torch_and_the_sdk_are_imported(script):
    given = ["--place", "s3://b/p"] if script == "submit" else ["--job", "job", "--endpoint", "endpoint"]
    code = (
        f"import sys, {script}\n"
        "try:\n"
        f"    {script}.main(sys.argv[1:])\n"
        "except Exception as error:\n"
        "    print(error, [name for name in ('torch', 'sagemaker') if name in sys.modules])\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env |= {"PYTHONPATH": str(SCRIPTS), "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for role, region, message in ((ROLE, "", "no AWS region is configured"), ("Name", "us-east-1", "--role 'Name'")):
        command = [sys.executable, "-c", code, *given, "--role", role]
        done = subprocess.run(
            command, env=env | {"AWS_DEFAULT_REGION": region}, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(message)
        assert done.stdout.endswith("[]\n")
