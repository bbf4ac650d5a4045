"""Script of test_trainer for torchrun: one epoch per case on two ranks; rank 0 writes gradients and losses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from conftest import TASK_LOSS
from datasets import load_from_disk
from test_trainer import Gradients, Losses, arguments, task_model, task_options, weighted
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from esm_efficient import compat, lora_config, prepare_model


def run(folder: Path, size: int, micro_batch: int, accumulation: int, kind: str, weights: list[float]) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    task = kind in TASK_LOSS
    checkpointing = kind in ("lora", "checkpointing")
    model = task_model(kind) if task else AutoModelForSequenceClassification.from_pretrained(folder / "model")
    torch.manual_seed(1)
    model = prepare_model(
        model,
        adapters=lora_config(model, r=2, init_lora_weights=False) if kind == "lora" else None,
        gradient_checkpointing=checkpointing,
    )
    data = load_from_disk(str(folder / (kind if task else f"data{size}")))
    options = task_options(kind, tokenizer) if task else {"class_weights": weights}
    if kind == "budget":
        options["token_budget"] = 64
    gradients, losses = Gradients(), Losses()
    trainer = weighted(
        model,
        arguments(
            folder / "run",
            micro_batch,
            accumulation,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            **compat.checkpointing_arguments(checkpointing),
        ),
        data,
        tokenizer,
        **options,
        eval_dataset=data,
        callbacks=[gradients, losses],
    )
    trainer.train()
    return {"gradients": gradients.steps, "losses": losses.values, "eval_loss": trainer.evaluate()["eval_loss"]}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    weights, cases = json.loads(sys.argv[2])
    results = [run(folder, *case, weights) for case in cases]
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    # Destroying the process group can deadlock: gloo's thread needs the interpreter's lock to free its last tensor,
    # while the main thread has the lock and waits for that thread.
    os._exit(0)


if __name__ == "__main__":
    main()
