"""The training job: tokenised splits in, a model to deploy out. SageMaker starts it; so can anybody, with any folder.

Hyperparameters are the tutorial's; what is not given is the recipe's. Data, checkpoints and results lie where SageMaker
says in its ``SM_*`` variables, and below the folder that holds ``SM_MODEL_DIR`` (``/opt/ml``). A job that was
interrupted goes on from its last whole checkpoint. The exit status is 0 when the model is written, 143 when a signal
ended the run after a checkpoint, and 1 with a reason in ``output/failure`` when something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_from_disk

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
INDIFFERENT = ("logging_steps", "per_device_eval_batch_size", "report_to", "save_steps")
"""Hyperparameters that may change between a run and its continuation."""
HERE = Path(__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    """Arguments that are wrong are an error like any other, so that it reaches ``output/failure``."""

    def error(self, message: str) -> None:
        raise ConfigurationError(message)


def boolean(text: str) -> bool:
    """``true`` and ``True`` alike: SageMaker's launchers write either."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
    )
    add = parser.add_argument
    add("--model_id", default="facebook/esm2_t33_650M_UR50D", help="Hub name; a channel named model wins")
    add("--epochs", type=float, default=1.0)
    add("--max_steps", type=int, default=-1, help="optimizer steps; ends earlier than --epochs if above 0")
    add("--lora", type=boolean, default=True, help="adapters on every linear layer, or all parameters")
    add("--lora_r", type=int, default=8)
    add("--lora_preset", default="all-linear", help="qkv, attention, mlp or all-linear")
    add("--per_device_train_batch_size", type=int, default=8)
    add("--per_device_eval_batch_size", type=int, default=16)
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--use_gradient_checkpointing", type=boolean, default=False)
    add("--learning_rate", type=float, help="default: the recipe's, times the root of the batch over the recipe's")
    add("--precision", default="auto", choices=["auto", "float32", "bf16"])
    add("--class_weights", type=boolean, default=True, help="weigh classes inversely to their frequency")
    add("--token_budget", type=int, help="tokens of a batch, instead of sequences")
    add("--save_steps", type=int, default=100, help="optimizer steps between two checkpoints")
    add("--logging_steps", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--report_to", default="none", choices=["none", "mlflow"], help="experiment tracking")
    return parser


def make_recipe(options: argparse.Namespace, processes: int) -> Recipe:
    """The library's recipe with these sizes; its learning rate follows the batch of all processes."""
    changes = {
        "micro_batch": options.per_device_train_batch_size,
        "accumulation": options.gradient_accumulation_steps,
        "checkpointing": options.use_gradient_checkpointing,
    }
    if options.lora:
        changes |= {"preset": options.lora_preset, "r": options.lora_r}
    recipe = RECIPES["lora" if options.lora else "base"].replace(**changes)
    rate = options.learning_rate or recipe.learning_rate * math.sqrt(processes)
    return recipe.replace(learning_rate=rate)


def identity_of(options: argparse.Namespace, processes: int, data: Path) -> dict[str, Any]:
    """What decides the weights that a run ends with."""
    digest = hashlib.sha256()
    for path in sorted(data.rglob("*.json")):
        digest.update(path.read_bytes())
    decisive = {name: value for name, value in vars(options).items() if name not in INDIFFERENT}
    return decisive | {"processes": processes, "dataset": digest.hexdigest(), "library": esm_efficient.__version__}


def check_same(folder: Path, now: dict[str, Any], *, resumes: bool) -> None:
    """Refuse checkpoints of another run: what came of going on with them would be neither."""
    path = folder / "run.json"
    before = json.loads(path.read_text()) if resumes and path.is_file() else now
    if changed := sorted(name for name in now if before.get(name) != now[name]):
        raise ConfigurationError(
            f"{folder} holds checkpoints of a run with other values of {', '.join(changed)}: give them as they were, "
            "or another place for checkpoints"
        )
    if int(os.environ.get("RANK", 0)) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(new, path)  # another process never reads half of it


def read_task(folder: Path) -> tuple[Task, str]:
    """What the labels are, and the name of the data, as prepare_data.py has written it beside the splits."""
    if not (folder / "task.json").is_file():
        raise DataError(f"{folder} has no task.json: expected what prepare_data.py writes")
    record = json.loads((folder / "task.json").read_text())
    return Task(record["kind"], tuple(record["names"])), record["dataset"]


def tracked(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """One run of the tracker around everything; the Trainer alone would end it before the last figures."""
    if options.report_to != "mlflow" or int(os.environ.get("RANK", 0)) > 0:
        return contextlib.nullcontext()
    import mlflow

    return mlflow.start_run(run_name=os.environ.get("TRAINING_JOB_NAME"))


def add_code(folder: Path) -> None:
    """What the serving container needs beside the model: the handler, the library, and what that needs."""
    code = folder / "code"
    code.mkdir(exist_ok=True)
    for name in ("inference.py", "requirements.txt"):
        shutil.copy(HERE / name, code)
    package = Path(esm_efficient.__file__).parent
    shutil.copytree(package, code / package.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def run(arguments: list[str], root: Path) -> None:
    options = make_parser().parse_args(arguments)
    if "SM_CHANNEL_DATASET" not in os.environ:
        raise ConfigurationError("there is no channel named dataset (SM_CHANNEL_DATASET is not set)")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    logger.info(
        "host %s of %s, %s GPU(s), %d process(es)",
        os.environ.get("SM_CURRENT_HOST", "localhost"),
        os.environ.get("SM_HOSTS", '["localhost"]'),
        os.environ.get("SM_NUM_GPUS", "0"),
        processes,
    )
    data_folder = Path(os.environ["SM_CHANNEL_DATASET"])
    task, name = read_task(data_folder)
    data = load_from_disk(str(data_folder))
    recipe = make_recipe(options, processes)
    logger.info(
        "%d sequences an optimizer step, learning rate %.3g", recipe.batch_size * processes, recipe.learning_rate
    )
    checkpoints = root / "checkpoints"
    resumed = last_checkpoint(checkpoints)
    check_same(checkpoints, identity_of(options, processes, data_folder), resumes=resumed is not None)
    if resumed is not None:
        logger.info("going on from %s", resumed)
    base = os.environ.get("SM_CHANNEL_MODEL", options.model_id)
    with tracked(options) as tracker:
        result = train(options, base, data, task, recipe, checkpoints, resumed)
        if int(os.environ.get("RANK", 0)) == 0:
            publish(result, options.model_id, name)
        if tracker is not None:
            import mlflow

            mlflow.log_metrics({f"{result.evaluated_on}_{name}": value for name, value in result.metrics.items()})


def train(
    options: argparse.Namespace,
    base: str,
    data: DatasetDict,
    task: Task,
    recipe: Recipe,
    checkpoints: Path,
    resumed: Path | None,
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
        task=task,
        callbacks=[CheckpointCallback()],
        resume_from_checkpoint=resumed,
        profile=True,
        num_train_epochs=options.epochs,
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
    """Write the artifact, and the figures beside it."""
    # In the form of the Trainer's own lines, which the job's metric definitions read.
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
    try:
        run(sys.argv[1:], root)
    except TrainingInterrupted as interruption:
        logger.warning("%s", interruption)
        return 143
    except Exception as error:
        # The reason that a job failed is what stands in this file; SageMaker shows its first 1,024 characters.
        failure = root / "output" / "failure"
        failure.parent.mkdir(parents=True, exist_ok=True)
        if not failure.exists():
            failure.write_text(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
        if not isinstance(error, EsmEfficientError):
            raise
        logger.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
