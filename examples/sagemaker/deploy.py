"""Deploy a trained model to an endpoint, and request predictions for three well-known proteins.

    python examples/sagemaker/deploy.py --job JOB --endpoint esm2-membrane --role ROLE_ARN
    python examples/sagemaker/deploy.py --job JOB --endpoint esm2-membrane --role ROLE_ARN --serverless

A real-time endpoint is billed until cleanup.py deletes it. A serverless endpoint is billed per request, has no GPU, and
needs some time to start after a pause.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import boto3
from aws import Place, check_role, client, find_image, region_of, run, tags
from botocore.exceptions import BotoCoreError, ClientError
from cleanup import KINDS, describe, words_of
from ranges import whole

from esm_efficient import ConfigurationError, format_table
from esm_efficient.demo.proteins import KNOWN_PROTEINS

GPU_RESIDUES, CPU_RESIDUES = 200_000, 4_000
"""The most residues of a request. ESM-2 650M needs about 1.3 GFLOP per residue, which a few CPU cores compute at about
100 GFLOP/s, and SageMaker waits 60 s."""

RESIDUES = 5
"""Labels that are shown of a sequence, for a model with a label per residue."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--job", help="name of a completed training job")
    source.add_argument("--model-data", help="s3://.../model.tar.gz of a training job")
    parser.add_argument("--endpoint", required=True, help="name of the new endpoint")
    parser.add_argument("--role", required=True, help="ARN of the role that the endpoint assumes")
    parser.add_argument("--instance-type", help="type of a real-time endpoint (default: ml.g5.xlarge)")
    parser.add_argument("--instances", type=whole(1), help="number of instances of a real-time endpoint (default: 1)")
    parser.add_argument("--serverless", action="store_true")
    parser.add_argument(
        "--memory-mb",
        type=int,
        choices=range(1024, 6145, 1024),
        help="memory of a serverless endpoint (default: 6144)",
    )
    parser.add_argument(
        "--concurrency", type=whole(1, 200), help="simultaneous requests to a serverless endpoint (default: 5)"
    )
    parser.add_argument(
        "--max-tokens", type=whole(3), help="most tokens per sequence in a request (default: as many as in training)"
    )
    parser.add_argument(
        "--max-residues",
        type=whole(1),
        help=f"most residues per request (default: {GPU_RESIDUES:,} with a GPU, {CPU_RESIDUES:,} without, because "
        "SageMaker ends a request after 60 s)",
    )
    parser.add_argument("--image", help="your own inference image")
    parser.add_argument("--region", help="default: the configured one")
    parser.add_argument("--timeout", type=whole(1), default=1800, help="most seconds to wait for the endpoint")
    options = parser.parse_args(arguments)
    of_other = ("instance_type", "instances") if options.serverless else ("memory_mb", "concurrency")
    for name in of_other:
        if getattr(options, name) is not None:
            kind = "a real-time" if options.serverless else "a serverless"
            parser.error(f"--{name.replace('_', '-')} is for {kind} endpoint")
    options.instance_type = options.instance_type or "ml.g5.xlarge"
    return options


def model_of(sagemaker: Any, job: str) -> str:
    """Return the S3 address of a training job's model."""
    record = sagemaker.describe_training_job(TrainingJobName=job)
    if record["TrainingJobStatus"] != "Completed":
        reason = record.get("FailureReason", "")
        raise ConfigurationError(
            f"job {job} has no model: its status is {record['TrainingJobStatus']}{reason and f' ({reason})'}, and "
            "Completed is needed"
        )
    return record["ModelArtifacts"]["S3ModelArtifacts"]


def cleanup_line(name: str, region: str) -> str:
    """Return the command that deletes an endpoint; the region may be another than the configured one."""
    return f"cleanup.py --endpoint {name} --region {region}"


def refuse_existing(sagemaker: Any, name: str) -> None:
    """Raise an error if anything has that name: the SDK would use the old model for the new endpoint."""
    if existing := [words_of(kind) for kind in KINDS if describe(sagemaker, kind, name)]:
        raise ConfigurationError(
            f"{' and '.join(existing)} named {name} exist already: choose another name, or run "
            f"{cleanup_line(name, sagemaker.meta.region_name)}"
        )


def has_gpu(instance_type: str) -> bool:
    """Whether an instance has a GPU of NVIDIA: its family begins with g or p, such as ``ml.g6e.xlarge``."""
    return re.match(r"(ml\.)?[gp]\d", instance_type) is not None


def create(options: argparse.Namespace, model_data: str, region: str) -> Any:
    """Create a model, an endpoint configuration and an endpoint, all with the same name."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.inference_config import ServerlessInferenceConfig
    from sagemaker.serve import ModelBuilder

    place = Place.parse(model_data)
    session = Session(boto_session=boto3.Session(region_name=region), default_bucket=place.bucket)
    # A serverless endpoint has no GPU, so it needs the image of an instance without a GPU.
    instance = "ml.m5.xlarge" if options.serverless else options.instance_type
    builder = ModelBuilder(
        image_uri=options.image or find_image("inference", region, instance).uri,
        s3_model_data_url=model_data,
        role_arn=options.role,
        sagemaker_session=session,
        instance_type=instance,
        env_vars={
            "SAGEMAKER_PROGRAM": "inference.py",
            **({"ESM_EFFICIENT_MAX_TOKENS": str(options.max_tokens)} if options.max_tokens else {}),
            "ESM_EFFICIENT_MAX_RESIDUES": str(
                options.max_residues or (GPU_RESIDUES if has_gpu(instance) else CPU_RESIDUES)
            ),
            # Without a GPU the server would start one worker per core, each with a copy of the model.
            **({} if has_gpu(instance) else {"SAGEMAKER_MODEL_SERVER_WORKERS": "1"}),
        },
        log_level=logging.WARNING,
    )
    builder.build(model_name=options.endpoint, tags=tags())
    if options.serverless:
        config = ServerlessInferenceConfig(
            memory_size_in_mb=options.memory_mb or 6144, max_concurrency=options.concurrency or 5
        )
        return builder.deploy(endpoint_name=options.endpoint, inference_config=config, wait=False)
    return builder.deploy(
        endpoint_name=options.endpoint,
        instance_type=instance,
        initial_instance_count=options.instances or 1,
        wait=False,
    )


def ask(endpoint: Any) -> list[tuple[str, str, str]]:
    """Request a prediction for each well-known protein, and return the rows of a table.

    A model that was trained on shorter sequences refuses some of them: the row says so.
    """
    rows = []
    for name, sequence in KNOWN_PROTEINS.items():
        body = json.dumps({"inputs": [{"name": name, "sequence": sequence}]})
        try:
            response = endpoint.invoke(body=body, content_type="application/json", accept="application/json")
        except ClientError as error:
            if error.response.get("OriginalStatusCode") not in (400, 413):
                raise
            rows.append((name, f"refused: {error.response.get('OriginalMessage')}", ""))
        else:
            rows += map(row_of, json.loads(response.body.read()))
    return rows


def row_of(prediction: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the name, the prediction and the probability of one answer as text, whatever the task of the model."""
    score = f"{prediction['score']:.2f}" if "score" in prediction else ""
    if "values" in prediction:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in prediction["values"].items())
    elif "scores" in prediction:  # a label per residue
        labels = prediction["labels"]
        shown = f"{', '.join(labels[:RESIDUES])}{', ...' if len(labels) > RESIDUES else ''} ({len(labels)} residues)"
    else:
        shown = prediction.get("label") or ", ".join(prediction["labels"]) or "no label"
    return prediction["name"], shown, score


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    check_role(options.role)
    region = region_of(options.region)
    sagemaker = client("sagemaker", region)
    refuse_existing(sagemaker, options.endpoint)
    model_data = options.model_data or model_of(sagemaker, options.job)
    endpoint = create(options, model_data, region)
    print(f"waiting for endpoint {options.endpoint} with {model_data}")
    attempts = {"Delay": 15, "MaxAttempts": max(1, options.timeout // 15)}
    try:
        sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=options.endpoint, WaiterConfig=attempts)
        rows = ask(endpoint)
    except (BotoCoreError, ClientError) as error:
        record = sagemaker.describe_endpoint(EndpointName=options.endpoint)
        raise ConfigurationError(
            f"endpoint {options.endpoint} is {record['EndpointStatus']} ({record.get('FailureReason') or error}). It "
            f"exists and may be billed: delete it with {cleanup_line(options.endpoint, region)} --yes"
        ) from error
    print(format_table(rows, ("protein", "prediction", "probability")))
    print(f"the endpoint is in service; delete it with {cleanup_line(options.endpoint, region)} --yes")


if __name__ == "__main__":
    run(main)
