"""The runs of reliability.py, each in a process of its own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKR"
TRAINING = {
    "recipe": "lora",
    "max_steps": 8,
    "probe": False,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "disable_tqdm": True,
    "use_cpu": True,
}


def quiet() -> None:
    import datasets
    import torch
    import transformers

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    if multiprocessing.parent_process() is not None:  # a run, whose losses nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        transformers.utils.logging.disable_progress_bar()


def train(folder: str, *, kill: tuple[str, int, float] | None = None, full: int | None = None, **changes: Any) -> None:
    """Train in a folder, from its last checkpoint on.

    Args:
        folder: the folder of the run.
        kill: the moment, the first step and the delay in seconds of a SIGKILL by the process itself.
        full: the largest file in bytes from the fourth step on.
        **changes: options of `finetune`.
    """
    from datasets import DatasetDict
    from transformers import TrainerCallback

    from esm_efficient import CheckpointCallback, demo_model_path, finetune, last_checkpoint, load_deeploc

    class Event(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saves = state.global_step % TRAINING["save_steps"] == 0
            if (
                kill is not None
                and state.global_step >= kill[1]
                and (kill[0] == "training" or (kill[0] == "save" and saves))
            ):
                threading.Timer(kill[2], os.kill, (os.getpid(), signal.SIGKILL)).start()
            if full is not None and state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (full, full))

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if kill is not None and kill[0] == "evaluation" and state.global_step >= kill[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    quiet()
    data = load_deeploc(Path(folder).parent / "demo.csv", max_residues=150)
    small = DatasetDict({name: rows.select(range(min(len(rows), 32))) for name, rows in data.items()})
    finetune(
        demo_model_path(),
        small,
        output_dir=folder,
        callbacks=[CheckpointCallback(), Event()],
        resume_from_checkpoint=last_checkpoint(folder),
        **(TRAINING | changes),
    )


def train_on_rank(rank: int, ranks: int, port: int, folder: str, kill: tuple[str, int, float] | None) -> None:
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    train(folder, kill=kill if rank == ranks - 1 else None, ddp_backend="gloo" if ranks > 1 else None)
    if ranks > 1:
        os._exit(0)  # gloo can wait for ever when it is destroyed


def fill_disk(folder: str, limit: int | None, answers: Any) -> None:
    """Train until a file cannot be written; answer with the error."""
    try:
        train(folder, full=limit, save_total_limit=None)
        answers.put(("finished", ""))
    except Exception as error:  # the parent process judges it
        answers.put((type(error).__name__, str(error)))


def train_long(folder: str, steps: int, answers: Any) -> None:
    from transformers import TrainerCallback

    from esm_efficient import demo_model_path, finetune, load_deeploc

    class Memory(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step * 4 % steps < 4:
                answers.put(resident_bytes())

    keep_no_kernels()
    quiet()
    data = load_deeploc(Path(folder).parent / "demo.csv", max_residues=150)
    options = {"recipe": "lora", "max_steps": steps, "logging_steps": 50, "disable_tqdm": True, "use_cpu": True}
    options |= {"early_stopping": None}  # all steps are wanted
    finetune(demo_model_path(), data, output_dir=folder, callbacks=[Memory()], probe=False, **options)


def predict_long(folder: str, predictions: int, answers: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from esm_efficient import Predictor, demo_model_path

    keep_no_kernels()
    quiet()
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=2)
    predictor = Predictor(model, AutoTokenizer.from_pretrained(demo_model_path()))
    rng = random.Random(0)
    for _quarter in range(4):
        for _ in range(0, predictions // 4, 50):
            predictor.predict([PROTEIN[: rng.randrange(5, len(PROTEIN))] for _ in range(50)])
        answers.put(resident_bytes())


def keep_no_kernels() -> None:
    """Let oneDNN keep no compiled kernels; it reads this when it compiles the first one."""
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"


def resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
