"""The training job: read tokenised splits, fine-tune a model, and write a folder to deploy.

SageMaker starts this script, but it also runs on any machine. Hyperparameters are named as in the tutorial; the default
of a missing one comes from the recipe. SageMaker's ``SM_*`` variables give the folders of data and results; checkpoints
are in the parent folder of ``SM_MODEL_DIR`` (``/opt/ml``). An interrupted job resumes from its last complete
checkpoint. The exit status is 0 after the model is written, 143 after a signal and a checkpoint, and 1 after an error,
with the reason in ``output/failure``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import DatasetDict, load_from_disk
from job_metrics import memory_line
from ranges import positive, whole

import esm_efficient
from esm_efficient import (
    RECIPES,
    CheckpointCallback,
    ConfigurationError,
    DataError,
    EsmEfficientError,
    FinetuneResult,
    Recipe,
    Task,
    TrainingInterrupted,
    export_model,
    finetune,
    last_checkpoint,
)

logger = logging.getLogger("train")
MAY_CHANGE = ("logging_steps", "per_device_eval_batch_size", "report_to", "save_steps")
"""Hyperparameters that may change when a run resumes."""
HERE = Path(__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    """Raises an error for wrong arguments, so that the reason is written to ``output/failure``."""

    def error(self, message: str) -> None:
        raise ConfigurationError(message)


def boolean(text: str) -> bool:
    """Parse ``true`` and ``True`` alike: SageMaker's launchers write either."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def layers(text: str) -> str:
    try:
        RECIPES["lora"].replace(layers=text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def steps(text: str) -> int:
    """Parse a number of optimizer steps, or -1 for the default."""
    return -1 if text == "-1" else whole(1)(text)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
    )
    add = parser.add_argument
    add("--model_id", default="facebook/esm2_t33_650M_UR50D", help="Hub name; a channel named model has priority")
    add("--epochs", type=positive, default=1.0)
    add("--max_steps", type=steps, default=-1, help="optimizer steps; if above 0, replaces --epochs")
    add("--lora", type=boolean, default=True, help="true trains adapters, false trains all parameters")
    add("--lora_r", type=whole(1), default=8)
    add("--lora_preset", default="all-linear", choices=["qkv", "attention", "mlp", "all-linear"])
    add("--lora_layers", type=layers, default="top-1/3", help="layers with adapters: all, top-2 or top-1/3")
    add("--per_device_train_batch_size", type=whole(1), default=8, help="sequences per micro-batch")
    add("--per_device_eval_batch_size", type=whole(1), default=16)
    add("--gradient_accumulation_steps", type=whole(1), default=1, help="micro-batches per optimizer step")
    add("--use_gradient_checkpointing", type=boolean, default=False)
    add("--learning_rate", type=positive, help="default: the recipe's, times sqrt(batch size / recipe's batch size)")
    add("--precision", default="auto", choices=["auto", "float32", "bf16"])
    add("--class_weights", type=boolean, default=True, help="weight classes inversely to their frequency")
    add("--token_budget", type=whole(1), help="tokens per micro-batch, instead of a fixed number of sequences")
    add("--save_steps", type=whole(1), default=100, help="optimizer steps between checkpoints")
    add("--logging_steps", type=whole(1), default=20)
    add("--seed", type=whole(0, 2**32 - 1), default=0)
    add("--report_to", default="none", choices=["none", "mlflow"], help="experiment tracking")
    return parser


def make_recipe(options: argparse.Namespace, processes: int) -> Recipe:
    """Return the recipe with these sizes and a learning rate that follows the batch size over all processes."""
    changes = {
        "micro_batch": options.per_device_train_batch_size,
        "accumulation": options.gradient_accumulation_steps,
        "gradient_checkpointing": options.use_gradient_checkpointing,
    }
    if options.lora:
        changes |= {"preset": options.lora_preset, "r": options.lora_r, "layers": options.lora_layers}
    recipe = RECIPES["lora" if options.lora else "base"].replace(**changes)
    rate = options.learning_rate
    return recipe.replace(learning_rate=recipe.learning_rate * math.sqrt(processes) if rate is None else rate)


def identity_of(options: argparse.Namespace, processes: int, data: Path) -> dict[str, Any]:
    """Return everything that determines the final weights of a run."""
    digest = hashlib.sha256()
    for path in sorted(data.rglob("*.json")):
        digest.update(path.read_bytes())
    determining = {name: value for name, value in vars(options).items() if name not in MAY_CHANGE}
    return determining | {"processes": processes, "dataset": digest.hexdigest(), "library": esm_efficient.__version__}


def check_same(folder: Path, now: dict[str, Any], *, resumes: bool) -> None:
    """Check that the checkpoints in a folder are of this run, and record the identity of this run.

    Raises:
        ConfigurationError: the checkpoints are of a run with another identity.
    """
    path = folder / "run.json"
    before = json.loads(path.read_text()) if resumes and path.is_file() else now
    if changed := sorted(name for name in now if before.get(name) != now[name]):
        raise ConfigurationError(
            f"{folder} contains checkpoints of a run with other values of {', '.join(changed)}: restore the earlier "
            "values, or use another folder for checkpoints"
        )
    if int(os.environ.get("RANK", 0)) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(new, path)  # an atomic write: other processes read this file


def read_task(folder: Path) -> tuple[Task, str, int]:
    """Return the task, the name of the dataset and the most tokens, which prepare_data.py wrote beside the splits."""
    if not (folder / "task.json").is_file():
        raise DataError(f"{folder} has no task.json: expected a folder that prepare_data.py wrote")
    record = json.loads((folder / "task.json").read_text())
    return Task(record["kind"], tuple(record["names"])), record["dataset"], record["max_tokens"]


def tracked(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Start one tracker run for the whole job; the Trainer would end its own run before the last figures."""
    if options.report_to != "mlflow" or int(os.environ.get("RANK", 0)) > 0:
        return contextlib.nullcontext()
    import mlflow

    return mlflow.start_run(run_name=os.environ.get("TRAINING_JOB_NAME"))


def add_code(folder: Path) -> None:
    """Add the handler, the library and its requirements for the serving container."""
    code = folder / "code"
    code.mkdir(exist_ok=True)
    for name in ("inference.py", "requirements.txt"):
        shutil.copy(HERE / name, code)
    package = Path(esm_efficient.__file__).parent
    shutil.copytree(package, code / package.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def gpu_bytes_used(result: FinetuneResult) -> int:
    """Return the bytes in use on the GPUs of all ranks at the end of training; 0 without a GPU.

    Every rank must call this function.
    """
    profile = result.profile
    on_gpu = profile is not None and profile.device.startswith("cuda")
    return sum(gather_object([(profile.driver_bytes or 0) if on_gpu else 0]))


def run(arguments: list[str], root: Path) -> None:
    """Train and write the model; checkpoints go to ``root / "checkpoints"``."""
    options = make_parser().parse_args(arguments)
    if "SM_CHANNEL_DATASET" not in os.environ:
        raise ConfigurationError("no channel named dataset: expected its folder in SM_CHANNEL_DATASET")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    logger.info(
        "host %s of %s, %s GPU(s), %d process(es)",
        os.environ.get("SM_CURRENT_HOST", "localhost"),
        os.environ.get("SM_HOSTS", '["localhost"]'),
        os.environ.get("SM_NUM_GPUS", "0"),
        processes,
    )
    data_folder = Path(os.environ["SM_CHANNEL_DATASET"])
    task, name, max_tokens = read_task(data_folder)
    data = load_from_disk(str(data_folder))
    recipe = make_recipe(options, processes)
    logger.info(
        "%d sequences per optimizer step, learning rate %.3g", recipe.batch_size * processes, recipe.learning_rate
    )
    checkpoints = root / "checkpoints"
    resumed = last_checkpoint(checkpoints)
    check_same(checkpoints, identity_of(options, processes, data_folder), resumes=resumed is not None)
    if resumed is not None:
        logger.info("resuming from %s", resumed)
    base = os.environ.get("SM_CHANNEL_MODEL", options.model_id)
    with tracked(options) as tracker:
        result = train(options, base, data, task, recipe, checkpoints, resumed, max_tokens)
        used_bytes = gpu_bytes_used(result)
        if int(os.environ.get("RANK", 0)) == 0:
            logger.info("%s", memory_line(used_bytes))
            publish(result, options.model_id, name)
        if tracker is not None:
            track_metrics(result)


def track_metrics(result: FinetuneResult) -> None:
    """Log the last metrics to MLflow; the model is written already, so that an error here fails no job."""
    import mlflow

    # Names of labels may have characters that MLflow refuses; transformers replaces them in its own metrics.
    named = {re.sub(r"[^0-9A-Za-z_./: -]", "_", f"{result.evaluated_on}_{n}"): v for n, v in result.metrics.items()}
    try:
        mlflow.log_metrics(named)
    except mlflow.exceptions.MlflowException as error:
        logger.warning("the last metrics are not in MLflow: %s", error)


def train(
    options: argparse.Namespace,
    base: str,
    data: DatasetDict,
    task: Task,
    recipe: Recipe,
    checkpoints: Path,
    resumed: Path | None,
    max_tokens: int,
) -> FinetuneResult:
    return finetune(
        base,
        data,
        recipe=recipe,
        output_dir=checkpoints,
        class_weights="balanced" if options.class_weights and task.kind != "regression" else None,
        token_budget=options.token_budget,
        seed=options.seed,
        precision=options.precision,
        max_tokens=max_tokens,
        task=task,
        callbacks=[CheckpointCallback()],
        resume_from_checkpoint=resumed,
        profile=True,
        num_train_epochs=options.epochs,
        early_stopping=None,  # a job that was stopped goes on from its newest checkpoint, which is not the best
        max_steps=options.max_steps,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        eval_strategy="epoch" if "validation" in data else "no",
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=options.logging_steps,
        report_to=options.report_to,
        disable_tqdm=True,
    )


def publish(result: FinetuneResult, base_model: str, dataset: str) -> None:
    """Log the metrics, and write the artifact and the figures."""
    # The metric definitions of the job expect the format of the Trainer's log lines.
    logger.info("%s", {f"{result.evaluated_on}_{name}": str(value) for name, value in result.metrics.items()})
    model_dir = Path(os.environ["SM_MODEL_DIR"])
    export_model(result, model_dir, base_model=base_model, dataset=dataset)
    add_code(model_dir)
    if folder := os.environ.get("SM_OUTPUT_DATA_DIR"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(result.result_path, folder)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    os.environ.setdefault("SM_MODEL_DIR", "/opt/ml/model")
    root = Path(os.environ["SM_MODEL_DIR"]).parent
    status = 0
    try:
        run(sys.argv[1:], root)
    except TrainingInterrupted as interruption:
        logger.warning("%s", interruption)
        status = 143
    except Exception as error:
        # SageMaker shows the first 1,024 characters of this file as the reason of the failure.
        failure = root / "output" / "failure"
        failure.parent.mkdir(parents=True, exist_ok=True)
        if not failure.exists():
            failure.write_text(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
        if not isinstance(error, EsmEfficientError):
            raise
        logger.error("error: %s", error)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # without it, gloo sometimes aborts the process (SIGABRT)
    return status


if __name__ == "__main__":
    sys.exit(main())
