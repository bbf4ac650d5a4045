"""The tutorial's own methods, rebuilt in plain transformers and peft, faults included, to be compared with.

The tutorial is *Efficiently fine-tune the ESM-2 protein language model with Amazon SageMaker*. ``"base"`` is full
fine-tuning. ``"all"`` adds LoRA, gradient accumulation and gradient checkpointing, with three faults that give no
error: six of nine LoRA targets match no layer; checkpointing gives the adapters no gradient, so that the head trains
alone; and accumulation takes a quarter of the optimizer steps at the same learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.utils.class_weight import compute_class_weight
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from esm_efficient import ProfilerCallback, classification_metrics, tokenize_dataset

TARGETS = [
    "query",
    "key",
    "value",
    "EsmSelfOutput.dense",
    "EsmIntermediate.dense",
    "EsmOutput.dense",
    "EsmContactPredictionHead.regression",
    "EsmClassificationHead.dense",
    "EsmClassificationHead.out_proj",
]
"""The targets of the tutorial; those with the name of a class match no layer."""


class TutorialTrainer(Trainer):
    """A Trainer whose loss is the weighted mean of each micro-batch."""

    class_weights: torch.Tensor

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=self.class_weights)
        return (loss, outputs) if return_outputs else loss


def train_as_the_tutorial(
    kind: str,
    model_name: str | Path,
    data: datasets.DatasetDict,
    *,
    seed: int,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> dict[str, Any]:
    """Train for one epoch and evaluate.

    Args:
        kind: ``"base"`` or ``"all"``.
        model_name: folder or Hub name of an ESM-2 model.
        data: splits ``train`` and ``test`` with the columns ``sequence`` and ``label``.
        seed: seed of the head, the adapters and the order of the batches.
        folder: folder for the Trainer's files.
        callbacks: further callbacks.

    Returns:
        ``metrics`` on the test split, ``steps``, ``train_seconds``, ``peak_activation_bytes``,
        ``trainable_parameters``, and ``moved_parameters``, those of them that training changed.
    """
    everything = kind == "all"
    set_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        model_name, num_labels=2, attn_implementation="eager", ignore_mismatched_sizes=True, dtype=torch.float32
    )
    model.esm.contact_head.requires_grad_(False)
    trained = model
    if everything:
        trained = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=TARGETS))
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenized, _ = tokenize_dataset(data, tokenizer)
    profiler = ProfilerCallback()
    trainer = TutorialTrainer(
        trained,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4 if everything else 1,
            num_train_epochs=1,
            learning_rate=1e-4,
            seed=seed,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=tokenized["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[profiler, *callbacks],
    )
    labels = {split: np.asarray(tokenized[split]["labels"]) for split in tokenized}
    weights = compute_class_weight("balanced", classes=np.unique(labels["train"]), y=labels["train"])
    trainer.class_weights = torch.tensor(weights, dtype=torch.float32, device=trainer.args.device)
    if everything:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.disable_input_require_grads()  # transformers enables them by itself since version 5
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    result = trainer.train()
    moved = [not torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True)]
    logits = trainer.predict(tokenized["test"]).predictions
    names = data["test"].features["label"].names
    return {
        "metrics": classification_metrics(labels["test"], np.asarray(logits), names),
        "steps": result.global_step,
        "train_seconds": result.metrics["train_runtime"],
        "peak_activation_bytes": max(phase.peak.activations for phase in profiler.report.phases.values()),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "moved_parameters": sum(p.numel() for p, has_moved in zip(parameters, moved, strict=True) if has_moved),
    }
