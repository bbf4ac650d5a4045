"""Submit the training job to SageMaker.

    python examples/sagemaker/submit.py --place s3://BUCKET/esm2-membrane --role ROLE_ARN --dry-run
    python examples/sagemaker/submit.py --place s3://BUCKET/esm2-membrane --role ROLE_ARN --spot -- --epochs 3

The hyperparameters of train.py follow ``--``. They are checked before anything is sent. ``--dry-run`` prints the
request and the predicted GPU memory, and sends nothing. Run prepare_data.py before: it writes the splits to
PLACE/dataset.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from aws import Place, Unsent, check_role, claim, client, dry_session, find_image, region_of, run, tags
from ranges import positive, whole

import esm_efficient
from esm_efficient import RECIPES, ConfigurationError, get_device

if TYPE_CHECKING:
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.train import ModelTrainer

# torch and the SDK, which take many seconds to import, are imported where they are used: a wrong option is seen first.

HERE = Path(__file__).resolve().parent
SOURCES = ("train.py", "job_metrics.py", "ranges.py", "inference.py", "requirements.txt")
TRACKING = ("mlflow>=3.0", "sagemaker-mlflow>=0.1")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", required=True, help="s3://bucket/prefix for everything of this model")
    parser.add_argument("--role", required=True, help="ARN of the role that the job assumes (role_policy.json)")
    parser.add_argument("--dataset", help="splits of prepare_data.py (default: PLACE/dataset)")
    parser.add_argument("--model", help="s3://... of a model to fine-tune, instead of a model of the Hub")
    parser.add_argument("--name", default="esm2", help="first part of the job's name (default: %(default)s)")
    parser.add_argument("--run", help="name of the run; a later job with the same name resumes from its checkpoints")
    parser.add_argument("--region", help="default: the configured one")
    parser.add_argument("--instance-type", default="ml.g5.2xlarge", help="default: %(default)s")
    parser.add_argument("--instance-count", type=whole(1), default=1)
    parser.add_argument("--processes", type=whole(1), help="processes per instance (default: one per GPU)")
    parser.add_argument("--volume-gb", type=whole(1), default=50)
    parser.add_argument("--max-hours", type=positive, default=24.0, help="longest training time")
    parser.add_argument(
        "--spot", action="store_true", help="spare capacity: cheaper, but the job may be interrupted and resumed"
    )
    parser.add_argument(
        "--max-wait-hours", type=positive, help="with --spot, longest time with waiting (default: twice --max-hours)"
    )
    parser.add_argument("--warm-pool-minutes", type=whole(0), default=0, help="keep the instance for the next job")
    parser.add_argument("--image", help="your own training image")
    parser.add_argument("--tracking", help="ARN of an MLflow tracking server")
    parser.add_argument(
        "--experiment", default="esm2", help="MLflow experiment, with --tracking (default: %(default)s)"
    )
    parser.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--tokens", type=whole(3), help="tokens of the longest protein (default: the data's; dry run: 514)"
    )
    parser.add_argument(
        "--anyway", action="store_true", help="submit even if the instance is predicted to be too small"
    )
    parser.add_argument("--wait", action="store_true", help="wait until the job has ended")
    parser.add_argument("--dry-run", action="store_true", help="print the request and send nothing")
    parser.add_argument("hyperparameters", nargs="*", help="after --: options of train.py")
    return parser.parse_args(arguments)


def hyperparameters_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return all hyperparameters that have a value, after the same checks as in train.py."""
    from train import make_parser

    given = list(options.hyperparameters) + (["--report_to", "mlflow"] if options.tracking else [])
    values = {name: value for name, value in vars(make_parser().parse_args(given)).items() if value is not None}
    if bad := [name for name, value in values.items() if "'" in str(value)]:
        raise ConfigurationError(
            f"{', '.join(bad)}: an apostrophe breaks the quoting of SageMaker's launcher, so remove it"
        )
    return values


def processes_of(options: argparse.Namespace) -> int:
    """Return the number of processes per instance."""
    name = options.instance_type.removeprefix("ml.")
    return options.processes or get_device(options.instance_type).instances.get(name, 1)


def predict_memory(options: argparse.Namespace, given: Mapping[str, Any]) -> tuple[str, bool]:
    """Predict the GPU memory of the job.

    Returns:
        A text and whether the job fits. The text has a recommendation if the job does not fit, and in a dry run.
    """
    from train import make_recipe

    from esm_efficient import estimate, recommend

    sizes = argparse.Namespace(**{"learning_rate": None, **given})
    recipe = make_recipe(sizes, processes_of(options) * options.instance_count)
    if given.get("token_budget"):
        recipe = recipe.replace(micro_batch=max(1, given["token_budget"] // options.tokens), learning_rate=1.0)
    settings = {"device": options.instance_type, "tokens": options.tokens, "precision": given["precision"]}
    cost = estimate(given["model_id"], recipe=recipe, **settings)
    if cost.fits() and not options.dry_run:
        return str(cost), True
    try:
        top = [RECIPES[name].replace(layers="top-1/3") for name in ("lora", "all")]
        recipes = ["base", "gc", "lora", "all", *top]
        better = recommend(given["model_id"], batch_size=recipe.batch_size, recipes=recipes, progress=False, **settings)
        advice = f"recommended:\n{better}"
    except ConfigurationError as error:
        advice = str(error)  # nothing fits; the message lists what was tried
    return f"{cost}\n\n{advice}", cost.fits()


def longest_of(s3: Any, dataset: Place) -> int:
    """Return the tokens of the longest protein, which prepare_data.py wrote to task.json."""
    try:
        body = s3.get_object(Bucket=dataset.bucket, Key=dataset.key("task.json"))["Body"].read()
    except s3.exceptions.NoSuchKey as error:
        raise ConfigurationError(f"{dataset.uri()} has no task.json: run prepare_data.py first") from error
    return json.loads(body)["longest_tokens"]


def stage(folder: Path, tracking: bool) -> None:
    """Copy the job's sources: the scripts, the library and its requirements."""
    for name in SOURCES:
        shutil.copy(HERE / name, folder)
    package = Path(esm_efficient.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    if tracking:
        with open(folder / "requirements.txt", "a") as handle:
            handle.write("\n".join(TRACKING) + "\n")


def make_trainer(
    options: argparse.Namespace, given: Mapping[str, Any], sources: Path, session: Session, place: Place
) -> ModelTrainer:
    """Describe the job to the SDK."""
    from job_metrics import METRIC_DEFINITIONS
    from sagemaker.core.training.configs import (
        CheckpointConfig,
        Compute,
        InputData,
        MetricDefinition,
        OutputDataConfig,
        SourceCode,
        StoppingCondition,
    )
    from sagemaker.train import ModelTrainer
    from sagemaker.train.distributed import Torchrun

    seconds = int(options.max_hours * 3600)
    waiting = int((options.max_wait_hours or 2 * options.max_hours) * 3600) if options.spot else None
    region = session.boto_region_name
    image = options.image or find_image("training", region, options.instance_type).uri
    # S3 matches prefixes: without the last slash, dataset-old would match too.
    channels = {"dataset": f"{(options.dataset or place.uri('dataset')).rstrip('/')}/"}
    if options.model:
        channels["model"] = f"{options.model.rstrip('/')}/"
    environment = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.tracking:
        environment |= {"MLFLOW_TRACKING_URI": options.tracking, "MLFLOW_EXPERIMENT_NAME": options.experiment}
    own = dict(pair.split("=", 1) for pair in options.tag)
    processes = processes_of(options)
    trainer = ModelTrainer(
        sagemaker_session=session,
        role=options.role,
        base_job_name=options.name,
        input_s3_key_prefix=place.key("jobs"),
        training_image=image,
        source_code=SourceCode(source_dir=str(sources), entry_script="train.py", requirements="requirements.txt"),
        distributed=Torchrun(process_count_per_node=processes) if processes * options.instance_count > 1 else None,
        compute=Compute(
            instance_type=options.instance_type,
            instance_count=options.instance_count,
            volume_size_in_gb=options.volume_gb,
            enable_managed_spot_training=options.spot,
            keep_alive_period_in_seconds=60 * options.warm_pool_minutes or None,
        ),
        stopping_condition=StoppingCondition(max_runtime_in_seconds=seconds, max_wait_time_in_seconds=waiting),
        input_data_config=[InputData(channel_name=name, data_source=uri) for name, uri in channels.items()],
        output_data_config=OutputDataConfig(s3_output_path=place.uri("output")),
        checkpoint_config=CheckpointConfig(
            s3_uri=place.uri("checkpoints", options.run), local_path="/opt/ml/checkpoints"
        ),
        environment=environment,
        hyperparameters=dict(given),
        tags=[{"key": tag["Key"], "value": tag["Value"]} for tag in tags({"run": options.run, **own})],
    )
    definitions = [MetricDefinition(name=d["Name"], regex=d["Regex"]) for d in METRIC_DEFINITIONS]
    return trainer.with_metric_definitions(definitions)


def make_session(region: str, place: Place) -> Session:
    """Return a session of the SDK."""
    from sagemaker.core.helper.session_helper import Session

    return Session(boto_session=boto3.Session(region_name=region), default_bucket=place.bucket)


def check(options: argparse.Namespace) -> None:
    """Check options before the upload that SageMaker would reject or misread later.

    Raises:
        ConfigurationError: the options contradict each other.
    """
    if options.spot and options.warm_pool_minutes:
        raise ConfigurationError("--spot and --warm-pool-minutes exclude each other: SageMaker keeps no spot instances")
    if options.max_wait_hours is not None and (not options.spot or options.max_wait_hours < options.max_hours):
        raise ConfigurationError("--max-wait-hours needs --spot, and must be at least --max-hours")
    if options.model and not any(word.startswith("--model_id") for word in options.hyperparameters):
        raise ConfigurationError(
            "--model needs --model_id: the base model decides the predicted memory and the model card"
        )
    if bad := [pair for pair in options.tag if "=" not in pair]:
        raise ConfigurationError(f"--tag {bad[0]!r}: expected KEY=VALUE")
    check_role(options.role)


def main(arguments: list[str] | None = None) -> str | None:
    """Submit the job and return its name; None for a dry run."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check(options)
    region = region_of(options.region)
    options.run = options.run or f"{options.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    given, place = hyperparameters_of(options), Place.parse(options.place)
    if options.tokens is None:
        dataset = Place.parse(options.dataset) if options.dataset else Place.parse(place.uri("dataset"))
        options.tokens = 514 if options.dry_run else longest_of(client("s3", options.region), dataset)
    memory, fits = predict_memory(options, given)
    print(memory)
    if not fits and not (options.anyway or options.dry_run):
        raise ConfigurationError(
            f"{options.instance_type} is predicted to run out of memory: choose a setting from above, or add --anyway"
        )
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder), tracking=bool(options.tracking))
        if options.dry_run:
            session = dry_session(region, place.bucket, "CreateTrainingJob")
            try:
                make_trainer(options, given, Path(folder), session, place).train(wait=False, logs=False)
            except Unsent as unsent:
                print(json.dumps(unsent.request, indent=2, default=str))
            return None
        claim(client("s3", region), place)
        session = make_session(region, place)
        trainer = make_trainer(options, given, Path(folder), session, place)
        # Before the job begins: waiting for one that fails ends in an error.
        print(f"if it fails, a new job with --run {options.run} resumes from its checkpoints", flush=True)
        trainer.train(wait=options.wait, logs=options.wait)
    name = trainer._latest_training_job.training_job_name
    print(f"submitted {name}; its model will be below {place.uri('output', name)}")
    return name


if __name__ == "__main__":
    run(main)
