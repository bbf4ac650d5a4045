"""Put a trained model behind an endpoint, and ask it about three well-known proteins.

    python examples/sagemaker/deploy.py --job JOB --endpoint esm2-membrane --role ROLE_ARN
    python examples/sagemaker/deploy.py --job JOB --endpoint esm2-membrane --role ROLE_ARN --serverless

A real-time endpoint costs until cleanup.py deletes it. A serverless one costs by request, has no GPU, and needs a
moment to start after it was idle.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

import boto3
from aws import Place, client, find_image, run, tags
from botocore.exceptions import BotoCoreError, ClientError
from cleanup import KINDS, describe, words_of

from esm_efficient import ConfigurationError
from esm_efficient.costs.devices import get_device
from esm_efficient.demo.proteins import KNOWN_PROTEINS
from esm_efficient.reporting import format_table


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--job", help="name of a training job that has ended")
    source.add_argument("--model-data", help="s3://.../model.tar.gz of one")
    parser.add_argument("--endpoint", required=True, help="name to give it")
    parser.add_argument("--role", required=True, help="ARN of the role that the endpoint assumes")
    parser.add_argument(
        "--instance-type", default="ml.g5.xlarge", help="of a real-time endpoint (default: %(default)s)"
    )
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--serverless", action="store_true")
    parser.add_argument("--memory-mb", type=int, default=6144, help="of a serverless one (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=5, help="requests at once, of a serverless one")
    parser.add_argument("--max-tokens", type=int, default=1024, help="the most tokens of a sequence that it takes")
    parser.add_argument("--image", help="an inference image of yours")
    parser.add_argument("--region", help="default: the configured one")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds to wait until it is in service")
    return parser.parse_args(arguments)


def model_of(sagemaker: Any, job: str) -> str:
    """Where a training job has put its model."""
    record = sagemaker.describe_training_job(TrainingJobName=job)
    if record["TrainingJobStatus"] != "Completed":
        reason = record.get("FailureReason", "")
        raise ConfigurationError(f"{job} is {record['TrainingJobStatus']}{reason and f' ({reason})'}: it has no model")
    return record["ModelArtifacts"]["S3ModelArtifacts"]


def refuse_existing(sagemaker: Any, name: str) -> None:
    """Nothing of that name must be there: the SDK would put an old model behind the new endpoint."""
    if there := [words_of(kind) for kind in KINDS if describe(sagemaker, kind, name)]:
        raise ConfigurationError(
            f"{' and '.join(there)} named {name} exist already: choose another name, or run cleanup.py --endpoint "
            f"{name}"
        )


def has_gpu(instance_type: str) -> bool:
    try:
        return get_device(instance_type).backend == "cuda"
    except ConfigurationError:
        return False


def create(options: argparse.Namespace, model_data: str, region: str) -> Any:
    """A model, an endpoint configuration and an endpoint, all of one name."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.inference_config import ServerlessInferenceConfig
    from sagemaker.serve import ModelBuilder

    place = Place.parse(model_data)
    session = Session(boto_session=boto3.Session(region_name=region), default_bucket=place.bucket)
    # Serverless endpoints have no GPU: the image is that of an instance without one.
    instance = "ml.m5.xlarge" if options.serverless else options.instance_type
    builder = ModelBuilder(
        image_uri=options.image or find_image("inference", region, instance).uri,
        s3_model_data_url=model_data,
        role_arn=options.role,
        sagemaker_session=session,
        instance_type=instance,
        env_vars={
            "SAGEMAKER_PROGRAM": "inference.py",
            "ESM_EFFICIENT_MAX_TOKENS": str(options.max_tokens),
            # Without a GPU the server would start a worker, with a model of its own, for each core.
            **({} if has_gpu(instance) else {"SAGEMAKER_MODEL_SERVER_WORKERS": "1"}),
        },
        log_level=logging.WARNING,
    )
    builder.build(model_name=options.endpoint, tags=tags())
    if options.serverless:
        config = ServerlessInferenceConfig(memory_size_in_mb=options.memory_mb, max_concurrency=options.concurrency)
        return builder.deploy(endpoint_name=options.endpoint, inference_config=config, wait=False)
    return builder.deploy(
        endpoint_name=options.endpoint,
        instance_type=instance,
        initial_instance_count=options.instances,
        wait=False,
    )


def ask(endpoint: Any) -> list[dict[str, Any]]:
    """What it says of well-known proteins."""
    inputs = [{"name": name, "sequence": sequence} for name, sequence in KNOWN_PROTEINS.items()]
    response = endpoint.invoke(
        body=json.dumps({"inputs": inputs}), content_type="application/json", accept="application/json"
    )
    return json.loads(response.body.read())


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    region = options.region or boto3.Session().region_name
    if region is None:
        raise ConfigurationError("no AWS region is configured: give --region")
    sagemaker = client("sagemaker", region)
    refuse_existing(sagemaker, options.endpoint)
    model_data = options.model_data or model_of(sagemaker, options.job)
    endpoint = create(options, model_data, region)
    print(f"waiting for {options.endpoint}, which serves {model_data}")
    attempts = {"Delay": 15, "MaxAttempts": max(1, options.timeout // 15)}
    try:
        sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=options.endpoint, WaiterConfig=attempts)
        answers = ask(endpoint)
    except (BotoCoreError, ClientError) as error:
        record = sagemaker.describe_endpoint(EndpointName=options.endpoint)
        raise ConfigurationError(
            f"{options.endpoint} is {record['EndpointStatus']} ({record.get('FailureReason') or error}). It is there, "
            f"and may be billed, until cleanup.py --endpoint {options.endpoint} --yes deletes it"
        ) from error
    rows = [
        (
            answer["name"],
            answer.get("label") or ", ".join(answer.get("labels", [])),
            f"{answer['score']:.2f}" if "score" in answer else "",
        )
        for answer in answers
    ]
    print(format_table(rows, ("protein", "prediction", "probability")))
    print(f"in service: cleanup.py --endpoint {options.endpoint} --yes deletes it")


if __name__ == "__main__":
    run(main)
