"""Runs of WeightedTrainer on tiny models, and the expected loss and gradient, computed with torch alone."""

from __future__ import annotations

import numpy as np
import torch
from conftest import TASK_LOSS, make_dataset, make_model, task_loss
from torch.nn import functional as F
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EsmForTokenClassification,
    TrainerCallback,
    TrainingArguments,
)

from esm_efficient import WeightedTrainer, prepare_model

WEIGHTS = [0.3, 2.5]


class Gradients(TrainerCallback):
    """Stores the whole gradient vector of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        gradients = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
        self.steps.append(torch.cat(gradients).clone())


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


def arguments(folder, micro_batch=16, accumulation=1, **changes) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 8,
        "max_grad_norm": 0.0,
        "learning_rate": 0.0,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **(options | changes))


def weighted(model, args, data, tokenizer, cls=WeightedTrainer, **options) -> WeightedTrainer:
    options = {"class_weights": WEIGHTS, "data_collator": DataCollatorWithPadding(tokenizer)} | options
    return cls(model, args, train_dataset=data, **options)


def reference_loss(model, rows, tokenizer, weights=WEIGHTS, label_smoothing=0.0) -> torch.Tensor:
    """Return the weighted mean over all rows in one batch, computed with torch alone."""
    batch = DataCollatorWithPadding(tokenizer)([rows[i] for i in range(len(rows))])
    labels = batch.pop("labels")
    table = None if weights is None else torch.tensor(weights)
    return F.cross_entropy(model(**batch).logits, labels, weight=table, label_smoothing=label_smoothing)


def reference_gradient(model, rows, tokenizer, **options) -> torch.Tensor:
    model.zero_grad()
    reference_loss(model, rows, tokenizer, **options).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def task_model(kind):
    if kind == "tokens":
        return make_model(EsmForTokenClassification)
    labels = {"focal": 2, "number": 1, "whole number": 1}.get(kind, 3)
    return make_model(num_labels=labels, problem_type=TASK_LOSS[kind])


def task_options(kind, tokenizer):
    """Return the trainer's options for a task."""
    if kind == "tokens":
        return {"class_weights": WEIGHTS, "data_collator": DataCollatorForTokenClassification(tokenizer)}
    weights = {"several, weighted": [1.0, 3.0, 0.5], "focal": WEIGHTS}.get(kind)
    return {"class_weights": weights, "focal_gamma": 2.0 if kind == "focal" else 0.0}


def task_gradient(kind, rows, tokenizer):
    """Return the loss and the gradient of the rows in one batch."""
    model = task_model(kind)
    collate = task_options(kind, tokenizer).get("data_collator", DataCollatorWithPadding(tokenizer))
    batch = dict(collate([rows[i] for i in range(len(rows))]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = task_loss(kind, model(**inputs).logits, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def resumed_weights(folder, tokenizer, strategy, seedable, drop_last, step, **changes):
    """Return the weights after two epochs of a run that is whole, or that resumes after a step."""
    model = prepare_model(make_model())
    args = arguments(
        folder,
        4,
        2,
        learning_rate=1e-2,
        num_train_epochs=2,
        train_sampling_strategy=strategy,
        accelerator_config={"use_seedable_sampler": seedable},
        dataloader_drop_last=drop_last,
        save_strategy="no" if step else "steps",
        save_steps=1,
        **changes,
    )
    train = {"resume_from_checkpoint": str(folder / f"checkpoint-{step}")} if step else {}
    torch.manual_seed(step or 0)  # a run that resumes has drawn other random numbers
    trainer = weighted(model, args, make_dataset(29), tokenizer)
    trainer.train(**train)
    assert trainer.steps_resumed == (step or 0)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Passes(Stream):
    """A stream with another order in each pass."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.rows)).tolist()
        return iter([self.rows[i] for i in order])
