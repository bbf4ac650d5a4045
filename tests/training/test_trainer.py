"""WeightedTrainer has the same gradient however the accumulated batch is divided, and otherwise works as Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TASK_LOSS, make_dataset, make_model, make_task_dataset, task_loss
from datasets import Value
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from esm_efficient import AuditCallback, WeightedTrainer, compat, lora_config, prepare_model
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.saving import portable_saving

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


def weighted(model, args, data, tokenizer, **options) -> WeightedTrainer:
    options = {"class_weights": WEIGHTS, "data_collator": DataCollatorWithPadding(tokenizer)} | options
    return WeightedTrainer(model, args, train_dataset=data, **options)


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


CUTS = [(16, 1), (8, 2), (4, 4), (1, 16)]


@pytest.mark.parametrize(("micro_batch", "accumulation"), CUTS)
@pytest.mark.parametrize("size", [32, 37], ids=["even", "uneven"])
def test_gradient_equals_the_one_batch_reference(
    tmp_path, tiny_model, tiny_dataset, tokenizer, micro_batch, accumulation, size
):
    data = tiny_dataset(size)
    gradients, losses = Gradients(), Losses()
    trainer = weighted(
        tiny_model(),
        arguments(tmp_path, micro_batch, accumulation),
        data,
        tokenizer,
        callbacks=[gradients, losses],
        audit=False,
    )
    trainer.train()
    assert len(gradients.steps) == -(-size // 16)
    for step, gradient in enumerate(gradients.steps):
        rows = data.select(range(16 * step, min(16 * step + 16, size)))
        expected = reference_gradient(tiny_model(), rows, tokenizer)
        assert relative_error(gradient, expected) <= 1e-5
        assert losses.values[step] == pytest.approx(reference_loss(tiny_model(), rows, tokenizer).item(), rel=1e-5)


def test_mean_of_micro_batch_means_is_far_off(tiny_model, tiny_dataset, tokenizer):
    """The error of the mean of means is much larger than rounding, so the tests above would detect it."""
    data, model = tiny_dataset(32), tiny_model()
    expected = reference_gradient(model, data, tokenizer)
    parts = [reference_gradient(model, data.select(range(i, i + 4)), tokenizer) for i in range(0, 32, 4)]
    assert relative_error(torch.stack(parts).mean(0), expected) > 0.02


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", ["off", "plain", "reentrant"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_exact_with_adapters_checkpointing_and_smoothing(
    tmp_path, tiny_model, tiny_dataset, tokenizer, adapters, checkpointing, smoothing
):
    data = tiny_dataset(13)

    def adapters_of(model):
        torch.manual_seed(1)
        return lora_config(model, r=2, init_lora_weights=False) if adapters else None

    model = tiny_model()
    model = prepare_model(
        model,
        adapters=adapters_of(model),
        gradient_checkpointing=checkpointing != "off",
        use_reentrant=checkpointing == "reentrant",
    )
    gradients = Gradients()
    args = arguments(
        tmp_path,
        4,
        4,
        label_smoothing_factor=smoothing,
        **compat.checkpointing_arguments(checkpointing != "off", use_reentrant=checkpointing == "reentrant"),
    )
    weighted(model, args, data, tokenizer, callbacks=[gradients], audit=False).train()
    # The reference uses neither prepare_model nor checkpointing.
    plain = tiny_model()
    config = adapters_of(plain)
    plain = plain if config is None else get_peft_model(plain, config)
    expected = reference_gradient(plain, data, tokenizer, label_smoothing=smoothing)
    assert relative_error(gradients.steps[0], expected) <= 1e-5


def task_model(kind):
    if kind == "tokens":
        return make_model(EsmForTokenClassification)
    labels = {"focal": 2, "number": 1}.get(kind, 3)
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


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(16, 1), (4, 4), (1, 16)])
@pytest.mark.parametrize("kind", TASK_LOSS)
def test_every_task_is_exact_with_unknown_labels_and_sample_weights(
    tmp_path, tokenizer, kind, micro_batch, accumulation
):
    data, gradients, losses = make_task_dataset(kind, 21), Gradients(), Losses()
    options = task_options(kind, tokenizer) | {"callbacks": [gradients, losses], "audit": False, "eval_dataset": data}
    trainer = weighted(task_model(kind), arguments(tmp_path, micro_batch, accumulation), data, tokenizer, **options)
    trainer.train()
    for step, rows in enumerate((data.select(range(16)), data.select(range(16, 21)))):
        loss, gradient = task_gradient(kind, rows, tokenizer)
        assert relative_error(gradients.steps[step], gradient) <= 1e-5
        assert losses.values[step] == pytest.approx(loss, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task_gradient(kind, data, tokenizer)[0], rel=1e-5)


def test_batches_of_a_token_budget_train_every_sequence_once_and_stay_exact(tmp_path, tiny_model, tokenizer):
    data, gradients = make_dataset(37), Gradients()
    token_counts = []
    collate = DataCollatorWithPadding(tokenizer)

    def count_tokens(rows):
        batch = collate(rows)
        token_counts.append(batch["input_ids"].numel())
        return batch

    options = {"token_budget": 64, "callbacks": [gradients], "audit": False, "data_collator": count_tokens}
    # With more accumulation than micro-batches, one optimizer step contains the whole dataset.
    weighted(tiny_model(), arguments(tmp_path, 1, 100), data, tokenizer, **options).train()
    assert len(gradients.steps) == 1
    assert max(token_counts) <= 64
    assert len(token_counts) < 37 / 2
    assert relative_error(gradients.steps[0], reference_gradient(tiny_model(), data, tokenizer)) <= 1e-5


def test_residues_are_counted_without_padding_and_special_tokens(tmp_path, tiny_model, tokenizer):
    data = make_dataset(37)
    trainer = weighted(tiny_model(), arguments(tmp_path, 4, 2, num_train_epochs=2), data, tokenizer, token_budget=64)
    trainer.train()
    assert trainer.residues_trained == 2 * sum(len(ids) - 2 for ids in data["input_ids"])


def test_residues_are_kept_in_a_checkpoint_and_those_of_aborted_attempts_are_not_counted(
    tmp_path, tiny_model, tokenizer
):
    data = make_dataset(32)
    whole = sum(len(ids) - 2 for ids in data["input_ids"])
    args = arguments(tmp_path, 4, 2, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    weighted(tiny_model(), args, data, tokenizer).train()
    resumed = weighted(tiny_model(), args, data, tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.residues_trained == whole
    assert resumed.residues_resumed == sum(len(ids) - 2 for ids in data["input_ids"][:16])

    class OutOfMemory(TrainerCallback):
        attempts = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.attempts += 1
            if self.attempts == 2:
                raise RuntimeError("CUDA out of memory.")

    args = arguments(tmp_path, 16, auto_find_batch_size=True, train_sampling_strategy="sequential")
    trainer = weighted(tiny_model(), args, data, tokenizer, callbacks=[OutOfMemory()], audit=False)
    trainer.train()
    assert trainer.residues_trained == whole


def test_options_that_a_token_budget_or_regression_would_ignore_are_refused(tmp_path, tiny_model, tokenizer):
    args = arguments(tmp_path, dataloader_drop_last=True)
    with pytest.raises(ConfigurationError, match="dataloader_drop_last"):
        weighted(tiny_model(), args, make_dataset(8), tokenizer, token_budget=64)
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ConfigurationError, match="label_smoothing_factor"):
        weighted(task_model("number"), args, make_task_dataset("number"), tokenizer, class_weights=None)


def test_a_token_budget_refuses_a_stream(tmp_path, tiny_model, tokenizer):
    stream = make_dataset(8).to_iterable_dataset()
    trainer = weighted(tiny_model(), arguments(tmp_path, max_steps=1), stream, tokenizer, token_budget=64)
    with pytest.raises(ConfigurationError, match="with a length"):
        trainer.train()


def test_balanced_weights_of_several_labels_are_negatives_over_positives(tmp_path, tokenizer):
    data = make_task_dataset("several", 40)
    trainer = weighted(task_model("several"), arguments(tmp_path), data, tokenizer, class_weights="balanced")
    labels = np.array(data["labels"][:])
    expected = (labels == 0).sum(0) / (labels == 1).sum(0)
    assert trainer.class_weights == pytest.approx(expected)


# (examples, micro-batch per rank, accumulation, kind): 16 examples per optimizer step over both ranks. With 37 examples
# the last step has 5 real ones; with 17 a rank has none in the last step.
TWO_RANKS = [(size, *cut, "full") for size in (32, 37, 17) for cut in ((8, 1), (4, 2), (1, 8))]
TWO_RANKS += [(37, 4, 2, "lora"), (37, 4, 2, "checkpointing")]
TWO_RANKS += [(37, 4, 2, kind) for kind in TASK_LOSS] + [(37, 1, 100, "budget")]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tokenizer):
    """Run every case on two processes under torchrun with gloo."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for size in {case[0] for case in TWO_RANKS}:
        make_dataset(size).save_to_disk(folder / f"data{size}")
    for kind in TASK_LOSS:
        make_task_dataset(kind, 37).save_to_disk(folder / kind)
    model = make_model()
    with portable_saving(model):
        model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, str(folder), json.dumps([WEIGHTS, TWO_RANKS])],
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(TWO_RANKS, torch.load(folder / "results.pt"), strict=True))


@pytest.mark.parametrize("case", [case for case in TWO_RANKS if case[3] in TASK_LOSS], ids=str)
def test_two_ranks_equal_one_batch_for_every_task(two_ranks, tokenizer, case):
    size, _, _, kind = case
    result, data = two_ranks[case], make_task_dataset(kind, size)
    assert len(result["gradients"]) == 3
    for step, gradient in enumerate(result["gradients"]):
        loss, expected = task_gradient(kind, data.select(range(16 * step, min(16 * step + 16, size))), tokenizer)
        assert relative_error(gradient, expected) <= 1e-5
        assert result["losses"][step] == pytest.approx(loss, rel=1e-5)
    assert result["eval_loss"] == pytest.approx(task_gradient(kind, data, tokenizer)[0], rel=1e-5)


def test_two_ranks_with_a_token_budget_equal_one_batch(two_ranks, tiny_model, tiny_dataset, tokenizer):
    (gradient,) = two_ranks[TWO_RANKS[-1]]["gradients"]
    assert relative_error(gradient, reference_gradient(tiny_model(), tiny_dataset(37), tokenizer)) <= 1e-5


@pytest.mark.parametrize("case", [c for c in TWO_RANKS if c[3] not in TASK_LOSS and c[3] != "budget"], ids=str)
def test_two_ranks_equal_one_batch(two_ranks, tiny_model, tiny_dataset, tokenizer, case):
    result, data = two_ranks[case], tiny_dataset(case[0])
    assert len(result["gradients"]) == -(-case[0] // 16)
    for step, gradient in enumerate(result["gradients"]):
        rows = data.select(range(16 * step, min(16 * step + 16, case[0])))
        plain = tiny_model()
        if case[3] == "lora":
            torch.manual_seed(1)
            plain = get_peft_model(plain, lora_config(plain, r=2, init_lora_weights=False))
        expected = reference_gradient(plain, rows, tokenizer)
        assert relative_error(gradient, expected) <= 1e-5
        assert result["losses"][step] == pytest.approx(reference_loss(plain, rows, tokenizer).item(), rel=1e-5)
    assert result["eval_loss"] == pytest.approx(reference_loss(plain, data, tokenizer).item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_without_weights_the_loss_of_every_step_is_trainers(
    tmp_path, tiny_model, tiny_dataset, tokenizer, accumulation, adapters, smoothing
):
    losses = {}
    for cls in (Trainer, WeightedTrainer):
        seen = Losses()
        model = tiny_model()
        if adapters:
            torch.manual_seed(1)
            model = get_peft_model(model, lora_config(model, r=2))
        cls(
            model=model,
            args=arguments(
                tmp_path,
                4,
                accumulation,
                learning_rate=1e-2,
                num_train_epochs=2,
                train_sampling_strategy="random",
                label_smoothing_factor=smoothing,
            ),
            train_dataset=tiny_dataset(32),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[seen],
        ).train()
        losses[cls] = seen.values
    assert len(losses[Trainer]) == 2 * 8 // accumulation
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)
    assert losses[Trainer][0] != pytest.approx(losses[Trainer][-1], rel=1e-3)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_custom_model_class_keeps_its_loss_unless_weights_are_given(
    tmp_path, tiny_model, tiny_dataset, tokenizer, weights
):
    class Own(EsmForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask, labels=labels)
            if labels is not None:
                output.loss = output.loss * 0.0 + 5.0
            return output

    seen, data = Losses(), tiny_dataset(8)
    options = {"class_weights": weights, "callbacks": [seen], "audit": False}
    weighted(tiny_model(Own), arguments(tmp_path, 8), data, tokenizer, **options).train()
    expected = 5.0 if weights is None else reference_loss(tiny_model(), data, tokenizer).item()
    assert seen.values == pytest.approx([expected], rel=1e-5)


def test_the_tutorials_call_trains_every_adapter(tmp_path, tiny_model, tiny_dataset, tokenizer):
    """Weights as a tensor, a peft model, accumulation and checkpointing in the arguments, one evaluation per epoch."""
    model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "key", "value"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = WeightedTrainer(
        class_weights=torch.tensor(WEIGHTS),
        model=model,
        args=arguments(
            tmp_path, 4, 2, learning_rate=1e-2, eval_strategy="epoch", **compat.checkpointing_arguments(True)
        ),
        train_dataset=tiny_dataset(32),
        eval_dataset=tiny_dataset(16, seed=1),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    unmoved = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert unmoved == []
    data = tiny_dataset(16, seed=1)
    batch = DataCollatorWithPadding(tokenizer)([data[i] for i in range(16)])
    with torch.no_grad():
        right = model.eval()(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1) == batch["labels"]
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_evaluation_loss_does_not_depend_on_the_batch_size(tmp_path, tiny_model, tiny_dataset, tokenizer, batch_size):
    data, model = tiny_dataset(21), tiny_model()
    trainer = weighted(
        model, arguments(tmp_path, per_device_eval_batch_size=batch_size), data, tokenizer, eval_dataset=data
    )
    expected = reference_loss(tiny_model(), data, tokenizer).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_during_training_does_not_change_the_training_loss(tmp_path, tiny_model, tiny_dataset, tokenizer):
    runs = []
    for strategy in ("no", "steps"):
        seen = Losses()
        args = arguments(tmp_path, 4, 2, learning_rate=1e-2, eval_strategy=strategy, eval_steps=1)
        weighted(
            tiny_model(), args, tiny_dataset(32), tokenizer, eval_dataset=tiny_dataset(9, seed=3), callbacks=[seen]
        ).train()
        runs.append(seen.values)
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_predict_works_without_labels_and_with_tuples(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(10)
    trainer = weighted(tiny_model(), arguments(tmp_path), data, tokenizer)
    unlabelled = trainer.predict(data.remove_columns("labels"))
    assert unlabelled.predictions.shape == (10, 2)
    assert "test_loss" not in unlabelled.metrics
    assert np.allclose(trainer.predict(data).predictions, unlabelled.predictions, atol=1e-6)

    class Tuples(EsmForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask, labels=labels).to_tuple()

    tuples = weighted(tiny_model(Tuples), arguments(tmp_path), data, tokenizer).predict(data)
    assert np.allclose(tuples.predictions, unlabelled.predictions, atol=1e-6)


def test_bf16_autocast_trains_close_to_float32(tmp_path, tiny_model, tiny_dataset, tokenizer):
    seen = {}
    for bf16 in (False, True):
        seen[bf16] = Losses()
        args = arguments(tmp_path, 4, 2, learning_rate=1e-3, bf16=bf16)
        weighted(tiny_model(), args, tiny_dataset(32), tokenizer, callbacks=[seen[bf16]]).train()
    assert seen[True].values == pytest.approx(seen[False].values, rel=2e-2)
    assert seen[True].values != seen[False].values


@pytest.mark.parametrize("budget", [None, 64], ids=["", "budget"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_resumed_run_ends_with_the_weights_of_a_whole_run(
    tmp_path, tiny_model, tiny_dataset, tokenizer, adapters, budget
):
    def run(seed, **train):
        # Another seed starts with other trainable weights: the runs agree only if the checkpoint is read.
        model = tiny_model(seed=0 if adapters else seed)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.out_proj.weight)
        model = prepare_model(model, adapters=lora_config(model, r=2, init_lora_weights=False) if adapters else None)
        args = arguments(
            tmp_path,
            4,
            2,
            learning_rate=1e-2,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=3,
            train_sampling_strategy="random",
        )
        weighted(model, args, tiny_dataset(29), tokenizer, token_budget=budget).train(**train)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])

    whole = run(2)
    for step in (3, 6):  # in the middle of the first epoch, and in the middle of the second
        resumed = run(3, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert relative_error(resumed, whole) <= 1e-6
    assert relative_error(run(3), whole) > 0.1


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, tiny_model, tiny_dataset, tokenizer):
    from safetensors.torch import load_file, save_file

    args = arguments(tmp_path, 4, 2, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    weighted(tiny_model(), args, tiny_dataset(32), tokenizer).train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    del weights["esm.encoder.layer.0.LayerNorm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"esm\.encoder\.layer\.0\.LayerNorm\.weight"):
        weighted(tiny_model(), args, tiny_dataset(32), tokenizer).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_saved_config_has_the_task_and_the_label_names(tmp_path, tiny_model, tiny_dataset, tokenizer, adapters):
    model = tiny_model()
    names = ["non-membrane", "membrane"]
    model = prepare_model(model, adapters=lora_config(model, r=2) if adapters else None, label_names=names)
    trainer = weighted(model, arguments(tmp_path), tiny_dataset(8), tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    folder = tmp_path / "saved" / ("base_config" if adapters else "")
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {"0": "non-membrane", "1": "membrane"}
    assert config["label2id"] == {"non-membrane": 0, "membrane": 1}
    assert (tmp_path / "saved" / "adapter_config.json").exists() == adapters
    # transformers would load a folder with a config.json as a whole model.
    assert (tmp_path / "saved" / "config.json").exists() != adapters
    if not adapters:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert loaded.config.id2label[1] == "membrane"


def test_balanced_weights_are_those_of_scikit_learn(tmp_path, tiny_model, tiny_dataset, tokenizer):
    from sklearn.utils.class_weight import compute_class_weight

    data = tiny_dataset(50)
    trainer = weighted(tiny_model(), arguments(tmp_path), data, tokenizer, class_weights="balanced")
    labels = data["labels"][:]
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=np.array(labels))
    assert trainer.class_weights == pytest.approx(expected)


def test_weights_by_label_name_are_in_the_order_of_the_config(tmp_path, tiny_model, tiny_dataset, tokenizer):
    model = prepare_model(tiny_model(), label_names=["non-membrane", "membrane"])
    trainer = weighted(
        model, arguments(tmp_path), tiny_dataset(8), tokenizer, class_weights={"membrane": 3.0, "non-membrane": 1.0}
    )
    assert trainer.class_weights.tolist() == [1.0, 3.0]


def test_class_weights_are_keyword_only(tmp_path, tiny_model):
    with pytest.raises(TypeError):
        WeightedTrainer(tiny_model(), arguments(tmp_path), *[None] * 11, WEIGHTS, True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one number for each"),
        ([1.0, -1.0], ">= 0"),
        ([0.0, 0.0], "not all of them 0"),
        ([1.0, float("nan")], "finite"),
        ({"LABEL_0": 1.0}, "LABEL_1"),
        ("equal", '"balanced"'),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, tiny_model, tiny_dataset, tokenizer, weights, message):
    with pytest.raises(ConfigurationError, match=message):
        weighted(tiny_model(), arguments(tmp_path), tiny_dataset(8), tokenizer, class_weights=weights)


class TutorialsTrainer(WeightedTrainer):
    """Computes its own weighted mean, as the tutorial does."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor(WEIGHTS))
        return (loss, outputs) if return_outputs else loss


class PlainTutorialsTrainer(Trainer):
    compute_loss = TutorialsTrainer.compute_loss


class MeanTutorialsTrainer(TutorialsTrainer):
    loss_is_scaled_for_ga = False


class PenaltyTrainer(WeightedTrainer):
    """Adds a mean over the micro-batch to the weighted loss, and passes on no number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss + 0.1 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class MeanPenaltyTrainer(PenaltyTrainer):
    loss_is_scaled_for_ga = False


def gradients_of(cls, tmp_path, model, data, tokenizer, accumulation=4, **options):
    gradients, losses = Gradients(), Losses()
    options = {"callbacks": [gradients, losses], "data_collator": DataCollatorWithPadding(tokenizer)} | options
    cls(model, arguments(tmp_path, 16 // accumulation, accumulation), train_dataset=data, **options).train()
    return gradients.steps, losses.values


@pytest.mark.parametrize("cls", [TutorialsTrainer, MeanTutorialsTrainer])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_subclass_with_its_own_loss_has_the_gradient_of_trainer(
    tmp_path, tiny_model, tiny_dataset, tokenizer, cls, accumulation
):
    data = tiny_dataset(21)
    expected = gradients_of(PlainTutorialsTrainer, tmp_path, tiny_model(), data, tokenizer, accumulation)
    gradients, losses = gradients_of(cls, tmp_path, tiny_model(), data, tokenizer, accumulation, audit=False)
    assert losses == pytest.approx(expected[1], rel=1e-6)
    assert all(relative_error(*pair) <= 1e-6 for pair in zip(gradients, expected[0], strict=True))


@pytest.mark.parametrize("cls", [PenaltyTrainer, MeanPenaltyTrainer])
def test_a_subclass_may_add_a_mean_to_the_weighted_loss(tmp_path, tiny_model, tiny_dataset, tokenizer, cls):
    data, model = tiny_dataset(16), tiny_model()
    batch = DataCollatorWithPadding(tokenizer)([data[i] for i in range(16)])
    expected = reference_loss(model, data, tokenizer) + 0.1 * model(**batch).logits.square().mean()
    expected.backward()
    vector = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    gradients, losses = gradients_of(cls, tmp_path, tiny_model(), data, tokenizer, audit=False, class_weights=WEIGHTS)
    assert losses == pytest.approx([expected.item()], rel=1e-5)
    assert relative_error(gradients[0], vector) <= 1e-5


def test_a_subclass_may_have_labels_that_the_weighted_loss_refuses(tmp_path, tiny_model, tiny_dataset, tokenizer):
    class SoftLabels(WeightedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss = F.mse_loss(model(inputs["input_ids"]).logits[:, 0], inputs["labels"])
            return (loss, None) if return_outputs else loss

    data = tiny_dataset(16).cast_column("labels", Value("float32"))
    model = tiny_model(problem_type="single_label_classification")
    _, losses = gradients_of(SoftLabels, tmp_path, model, data, tokenizer, audit=False)
    assert len(losses) == 1


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class StreamWithLength(Stream):
    def __len__(self):
        return len(self.rows)


class Passes(Stream):
    """A stream with another order in each pass."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.rows)).tolist()
        return iter([self.rows[i] for i in order])


def several_labels(size=16):
    data = make_task_dataset("several", size).remove_columns("sample_weight")
    return [row | {"labels": torch.tensor(row["labels"]).nan_to_num(0.0)} for row in data]


def tensor_collator(tokenizer):
    """Return a collator for rows whose labels are tensors."""
    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows):
        rest = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        return dict(pad(rest)) | {"labels": torch.stack([row["labels"] for row in rows])}

    return collate


@pytest.mark.parametrize("cls", [Stream, StreamWithLength, list])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_labels_are_recognised_in_the_first_batch(tmp_path, tokenizer, cls, dtype):
    rows, losses, model = several_labels(), {}, make_model(num_labels=3)
    rows = [row | {"labels": row["labels"].to(dtype)} for row in rows]
    for trainer in (Trainer, WeightedTrainer):
        seen, model = Losses(), make_model(num_labels=3)
        args = arguments(tmp_path, 8, max_steps=2)
        collate = tensor_collator(tokenizer)
        trainer(model, args, train_dataset=cls(rows), data_collator=collate, callbacks=[seen]).train()
        losses[trainer] = seen.values
        assert model.config.problem_type == "multi_label_classification"
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5 if dtype == torch.float32 else 1e-2)


def test_labels_that_the_collator_makes_are_recognised(tmp_path, tokenizer):
    rows, collate = several_labels(), DataCollatorWithPadding(tokenizer)
    labels = {tuple(row["input_ids"]): row.pop("labels") for row in rows}

    def with_labels(batch):
        return collate(batch) | {"labels": torch.stack([labels[tuple(row["input_ids"])] for row in batch])}

    losses = {}
    for cls in (Trainer, WeightedTrainer):
        seen = Losses()
        args = arguments(tmp_path, 8)
        cls(make_model(num_labels=3), args, train_dataset=rows, data_collator=with_labels, callbacks=[seen]).train()
        losses[cls] = seen.values
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)


def test_a_dict_of_evaluation_sets_needs_no_training_set(tmp_path, tokenizer):
    sets = {"a": several_labels(8), "b": several_labels(16)[8:]}
    losses = {}
    for cls in (Trainer, WeightedTrainer):
        trainer = cls(
            make_model(num_labels=3),
            arguments(tmp_path),
            eval_dataset=sets,
            data_collator=tensor_collator(tokenizer),
        )
        losses[cls] = [trainer.evaluate()[f"eval_{name}_loss"] for name in sets]
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)


def test_an_empty_list_is_a_training_set_until_it_is_trained_on(tmp_path, tiny_model):
    assert WeightedTrainer(tiny_model(), arguments(tmp_path), train_dataset=[]).train_dataset == []


def test_a_masked_language_model_with_the_config_of_a_regressor_has_cross_entropy(tmp_path, tokenizer):
    data = make_dataset(8)
    data = data.remove_columns("labels").add_column("labels", data["input_ids"][:])
    losses = {}
    for cls in (Trainer, WeightedTrainer):
        seen, collate = Losses(), DataCollatorForTokenClassification(tokenizer)
        model = make_model(EsmForMaskedLM, num_labels=1, problem_type="regression")
        cls(model, arguments(tmp_path, 8), train_dataset=data, data_collator=collate, callbacks=[seen]).train()
        losses[cls] = seen.values
        assert model.config.problem_type == "regression"
    assert losses[WeightedTrainer] == pytest.approx(losses[Trainer], rel=1e-5)


def test_one_output_trains_on_integers(tmp_path, tiny_model, tiny_dataset, tokenizer):
    losses = []
    for data in (tiny_dataset(16), tiny_dataset(16).cast_column("labels", Value("float32"))):
        model = tiny_model(num_labels=1)
        losses.append(gradients_of(WeightedTrainer, tmp_path, model, data, tokenizer, audit=False)[1])
    assert losses[0] == losses[1]
    assert losses[0][0] > 0


def test_a_model_keeps_a_loss_function_of_its_own(tmp_path, tiny_model, tiny_dataset, tokenizer):
    class Asked(EsmForSequenceClassification):
        """Reads its loss function, as most models of transformers do."""

        def forward(self, input_ids=None, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask)
            output.loss = self.loss_function(output.logits, labels)
            return output

    Asked.forward.__module__ = "transformers.models.esm.modeling_esm"
    model = tiny_model(Asked)
    model.loss_function = lambda logits, labels: logits.sum() * 0 + 3.0
    _, losses = gradients_of(WeightedTrainer, tmp_path, model, tiny_dataset(16), tokenizer, audit=False)
    assert losses == pytest.approx([3.0])


class Own(torch.nn.Module):
    """A custom module; it takes no sample_weight."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(input_ids.float().mean(1, keepdim=True))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return (logits,) if loss is None else (loss, logits)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_sample_weights_do_not_reach_a_custom_module(tmp_path, tiny_dataset, tokenizer, caplog, remove_unused_columns):
    data = tiny_dataset(16).add_column("sample_weight", [2.0] * 16)
    args = arguments(tmp_path, 4, 4, remove_unused_columns=remove_unused_columns)
    trainer = WeightedTrainer(
        Own(), args, train_dataset=data, eval_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(data.remove_columns("labels")).predictions.shape == (16, 2)
    assert "sample_weight has no effect" in caplog.text


def test_sample_weights_do_not_hinder_a_prediction_without_labels(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(8).add_column("sample_weight", [2.0] * 8).remove_columns("labels")
    assert weighted(tiny_model(), arguments(tmp_path), None, tokenizer).predict(data).predictions.shape == (8, 2)


@pytest.mark.parametrize("config", [None, types.SimpleNamespace(num_labels=2), types.SimpleNamespace(hidden_size=4)])
def test_a_custom_module_with_any_config_trains(tmp_path, tiny_dataset, tokenizer, config):
    model = Own()
    if config is not None:
        model.config = config
    trainer = WeightedTrainer(
        model,
        arguments(tmp_path, 4, 4),
        train_dataset=tiny_dataset(16),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    assert trainer.train().global_step == 1
    if not hasattr(config, "num_labels"):
        with pytest.raises(ConfigurationError, match="num_labels"):
            WeightedTrainer(model, arguments(tmp_path), train_dataset=tiny_dataset(8), class_weights=WEIGHTS)


def test_regression_refuses_weights_and_its_loss_is_that_of_transformers(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(8).cast_column("labels", Value("float32"))
    for options in ({"class_weights": WEIGHTS}, {"class_weights": None, "focal_gamma": 2.0}):
        with pytest.raises(ConfigurationError, match="regression"):
            weighted(tiny_model(num_labels=1), arguments(tmp_path), data, tokenizer, **options)
    seen = Losses()
    weighted(
        tiny_model(num_labels=1), arguments(tmp_path, 8), data, tokenizer, class_weights=None, callbacks=[seen]
    ).train()
    plain = tiny_model(num_labels=1)
    batch = DataCollatorWithPadding(tokenizer)([data[i] for i in range(8)])
    assert seen.values[0] == pytest.approx(plain(**batch).loss.item(), rel=1e-5)


def test_a_custom_loss_function_is_used(tmp_path, tiny_model, tiny_dataset, tokenizer):
    def half(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch / 2

    seen = Losses()
    data = tiny_dataset(16)
    options = {"class_weights": None, "compute_loss_func": half, "callbacks": [seen]}
    weighted(tiny_model(), arguments(tmp_path, 4, 4), data, tokenizer, **options).train()
    expected = reference_loss(tiny_model(), data, tokenizer, weights=None).item() / 2
    assert seen.values[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigurationError, match="compute_loss_func"):
        weighted(tiny_model(), arguments(tmp_path), data, tokenizer, compute_loss_func=half)


def test_every_model_of_model_init_has_the_problem_type(tmp_path, tiny_model, tiny_dataset, tokenizer):
    trainer = WeightedTrainer(
        model_init=lambda: tiny_model(),
        args=arguments(tmp_path, 8),
        train_dataset=tiny_dataset(16),
        data_collator=DataCollatorWithPadding(tokenizer),
        class_weights=WEIGHTS,
        audit=False,
    )
    trainer.train()
    assert trainer.model.config.problem_type == "single_label_classification"


def test_a_batch_without_labels_is_an_error(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(8).remove_columns("labels")
    with pytest.raises(DataError, match="no 'labels'"):
        weighted(tiny_model(), arguments(tmp_path), data, tokenizer).train()


def test_an_accumulated_batch_without_labels_changes_no_weight(tmp_path, tiny_model, tiny_dataset, tokenizer):
    class Weights(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.steps.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))

    data = tiny_dataset(16).cast_column("labels", Value("int64"))
    data = data.map(lambda row, index: {"labels": -100 if index < 8 else row["labels"]}, with_indices=True)
    model, seen = tiny_model(), Weights()
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    args = arguments(tmp_path, 4, 2, learning_rate=1e-2, weight_decay=0.0)
    weighted(model, args, data, tokenizer, callbacks=[seen], audit=False).train()
    assert torch.equal(seen.steps[0], before)
    assert not torch.equal(seen.steps[1], before)


def test_the_audit_is_on_unless_it_is_switched_off(tmp_path, tiny_model, tiny_dataset, tokenizer):
    def audits(**options):
        trainer = weighted(tiny_model(), arguments(tmp_path), tiny_dataset(8), tokenizer, **options)
        return [c for c in trainer.callback_handler.callbacks if isinstance(c, AuditCallback)]

    custom = AuditCallback(patience=9)
    assert len(audits()) == 1
    assert audits(callbacks=[custom]) == [custom]
    assert audits(audit=False) == []
