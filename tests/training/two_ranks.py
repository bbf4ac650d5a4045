"""Script of test_trainer_ranks: one epoch per case on two ranks; rank 0 writes gradients and losses."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import TASK_LOSS, make_dataset, make_model
from datasets import load_from_disk
from trainer_runs import (
    Gradients,
    Losses,
    Passes,
    Stream,
    arguments,
    resumed_weights,
    task_model,
    task_options,
    weighted,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from esm_efficient import WeightedTrainer, compat, lora_config, prepare_model


def run(folder: Path, size: int, micro_batch: int, accumulation: int, kind: str, weights: list[float]) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if kind == "evaluation":
        return evaluation(folder, size, tokenizer)
    if kind.startswith("resumed"):
        return resume(folder / kind, kind.removeprefix("resumed "), tokenizer)
    task = kind in TASK_LOSS
    checkpointing = kind in ("lora", "checkpointing")
    model = task_model(kind) if task else AutoModelForSequenceClassification.from_pretrained(folder / "model")
    torch.manual_seed(1)
    model = prepare_model(
        model,
        adapters=lora_config(model, r=2, init_lora_weights=False) if kind == "lora" else None,
        gradient_checkpointing=checkpointing,
    )
    data = make_dataset(2).select([0]) if size == 1 else load_from_disk(str(folder / (kind if task else f"data{size}")))
    options = task_options(kind, tokenizer) if task else {"class_weights": weights}
    if kind == "budget":
        options["token_budget"] = 64
    gradients, losses = Gradients(), Losses()
    is_stream = kind == "stream"
    make = weighted if kind != "subclass" else functools.partial(weighted, cls=CallsSuper)
    trainer = make(
        model,
        arguments(
            folder / "run",
            micro_batch,
            accumulation,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            max_steps=3 if is_stream else -1,
            **compat.checkpointing_arguments(checkpointing),
        ),
        Stream([data[i] for i in range(size)]) if is_stream else data,
        tokenizer,
        **options,
        eval_dataset=data,
        callbacks=[gradients, losses],
    )
    trained = trainer.train()
    return {
        "gradients": gradients.steps,
        "losses": losses.values,
        "mean_losses": [trained.training_loss, trainer.mean_loss],
        "residues": trainer.residues_trained,
        "eval_loss": trainer.evaluate()["eval_loss"],
    }


def evaluation(folder: Path, size: int, tokenizer: Any) -> dict:
    """Return the losses, logits and labels of the rows of a stream: evaluated, and predicted from."""
    seen = []
    data = make_dataset(max(size, 2))
    rows = Stream([data[i] for i in range(size)])
    args = arguments(folder, 4, ddp_backend="gloo")  # evaluates 8 rows per rank and batch
    trainer = weighted(make_model(), args, data, tokenizer, compute_metrics=lambda output: seen.append(output) or {})
    loss = trainer.evaluate(rows)["eval_loss"]
    predicted = trainer.predict(rows)
    return {
        "loss": loss,
        "logits": [torch.from_numpy(output.predictions) for output in (seen[0], predicted)],
        "labels": [output.label_ids.tolist() for output in (seen[0], predicted)],
    }


class CallsSuper(WeightedTrainer):
    """Overrides the loss, passes on no number of items, and changes nothing."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)


def resume(folder: Path, order: str, tokenizer: Any) -> dict:
    """Return the weights of a whole run, and of one that resumes in its second epoch or third pass."""
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    results = []
    for step in (None, 3):
        if order != "stream":
            # 29 rows are two optimizer steps per epoch on two ranks.
            results.append(resumed_weights(folder, tokenizer, order, order != "random", True, step, **options))
            continue
        model = prepare_model(make_model())
        args = arguments(
            folder,
            4,
            2,
            learning_rate=1e-2,
            max_steps=5,
            save_strategy="no" if step else "steps",
            save_steps=1,
            **options,
        )
        train = {"resume_from_checkpoint": str(folder / f"checkpoint-{step}")} if step else {}
        data = make_dataset(11)
        weighted(model, args, Passes([data[i] for i in range(11)]), tokenizer).train(**train)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return {"whole": results[0], "resumed": results[1]}


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
