"""Version differences and private names, tested with the installed releases."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils import flop_counter
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EsmForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from esm_efficient import _torch, compat, demo_model_path

# --- training ---


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_arguments_switch_checkpointing_on(tmp_path, recwarn, reentrant):
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, **compat.checkpointing_arguments(True, use_reentrant=reentrant)
    )
    assert compat.asks_for_checkpointing(args)
    assert not [w for w in recwarn if "deprecated" in str(w.message)]
    off = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **compat.checkpointing_arguments(False))
    assert not compat.asks_for_checkpointing(off)


def trainer_of(folder, model, data, tokenizer, **options) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        **options,
    )
    return Trainer(model, args, train_dataset=data, processing_class=tokenizer)


def test_a_declared_loss_is_not_divided_by_the_accumulation(tmp_path, tiny_model, tiny_dataset, tokenizer):
    trainer = trainer_of(tmp_path, tiny_model(), tiny_dataset(4), tokenizer, gradient_accumulation_steps=4)
    trainer.current_gradient_accumulation_steps = 4
    batch = next(iter(trainer.get_train_dataloader()))
    compat.declare_loss_normalised(trainer)
    loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=torch.tensor(4))
    assert loss.item() == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-5)


def test_weights_are_saved_under_the_names_of_their_modules(tmp_path, tiny_model):
    model = tiny_model()
    compat.save_under_own_names(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert set(handle.keys()) == set(model.state_dict())


def test_tied_weights_are_those_that_a_checkpoint_leaves_out(tmp_path, tiny_model):
    model = tiny_model(EsmForMaskedLM)
    model.tie_weights()
    compat.save_under_own_names(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert set(model.state_dict()) - set(handle.keys()) == {"lm_head.decoder.weight"}
    assert "lm_head.decoder.weight" in compat.tied_weights(model)
    assert compat.tied_weights(torch.nn.Linear(2, 2)) == ()


def test_a_kept_column_reaches_the_batches(tmp_path, tiny_model, tiny_dataset, tokenizer):
    data = tiny_dataset(4).add_column("sample_weight", [1.0, 2.0, 3.0, 4.0])
    trainer = trainer_of(tmp_path, tiny_model(), data, tokenizer)
    assert "sample_weight" not in next(iter(trainer.get_train_dataloader()))
    kept = trainer_of(tmp_path, tiny_model(), data, tokenizer)
    compat.keep_column(kept, "sample_weight")
    assert "sample_weight" in next(iter(kept.get_train_dataloader()))


@pytest.mark.parametrize("mapped", [True, False])
def test_columns_that_forward_does_not_take_are_removed(tmp_path, tiny_model, tiny_dataset, tokenizer, mapped):
    data = tiny_dataset(4).add_column("name", list("abcd"))
    trainer = trainer_of(tmp_path, tiny_model(), data, tokenizer)
    rows = data if mapped else [data[index] for index in range(4)]
    dataset, collate = compat.without_unused_columns(trainer, rows, trainer.data_collator)
    assert set(collate([dataset[0], dataset[1]])) == {"input_ids", "attention_mask", "labels"}


def test_missing_weights_are_checked_when_a_checkpoint_is_loaded(tmp_path, tiny_model, tiny_dataset, tokenizer, caplog):
    model = tiny_model()
    compat.save_under_own_names(model)
    model.save_pretrained(tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    del weights["classifier.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    missing: list[str] = []
    trainer = trainer_of(tmp_path, model, tiny_dataset(4), tokenizer, max_steps=1)
    compat.check_loaded_weights(trainer, missing.extend)
    # There is no optimizer to resume: the Trainer loads the weights, and then looks for its state.
    with pytest.raises(FileNotFoundError, match="trainer_state"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert missing == ["classifier.dense.weight"]


# --- adapters ---


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_enabled_on_every_layer_of_a_model(tiny_model, reentrant):
    model = tiny_model()
    compat.enable_checkpointing(model, use_reentrant=reentrant)
    layers = list(model.esm.encoder.layer)
    assert [layer.gradient_checkpointing for layer in layers] == [True] * len(layers)
    assert layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


def test_the_embeddings_output_requires_a_gradient_and_has_one_hook_for_it(tiny_model):
    model = tiny_model()
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    assert not embeddings(torch.tensor([[0, 5, 2]])).requires_grad
    compat.require_input_gradients(model)
    compat.require_input_gradients(model)
    assert embeddings(torch.tensor([[0, 5, 2]])).requires_grad
    model.disable_input_require_grads()
    assert not embeddings(torch.tensor([[0, 5, 2]])).requires_grad


# --- encoder ---


# --- costs ---


def test_tensors_that_share_memory_have_one_storage_key():
    x, other = torch.zeros(4), torch.zeros(4)
    keys = {_torch.storage_key(tensor.untyped_storage()) for tensor in (x, x[1:], x.view(2, 2), x.detach())}
    assert len(keys) == 1
    assert _torch.storage_key(other.untyped_storage()) not in keys


def test_torchs_flop_formulas_are_found_by_operation():
    assert _torch.operation_of(torch.ops.aten.mm.default) in flop_counter.flop_registry


def test_a_dispatch_mode_sees_the_cpus_attention_kernels():
    seen = []

    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(_torch.operation_of(func))
            return func(*args, **(kwargs or {}))

    q = torch.zeros(1, 2, 4, 8, requires_grad=True)
    with Mode():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert set(_torch.cpu_attention_operations()) <= set(seen)


# --- estimation ---


# --- profiling ---


def test_a_function_is_called_after_the_backward_pass():
    events = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2

    def first(*_):
        events.append("begun")
        _torch.call_after_backward(lambda: events.append(f"ended, gradient {x.grad.tolist()}"))

    y.grad_fn.register_prehook(first)
    y.sum().backward()
    assert events == ["begun", "ended, gradient [2.0, 2.0]"]


def test_the_running_trainer_and_its_guarded_methods_are_found(tmp_path, tiny_model, tiny_dataset):
    """Every event from the first epoch to the end must lie in a guard, but for those between two guarded methods."""
    seen, depth, trainers = [], 0, []

    @contextmanager
    def guard():
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    class Callback(TrainerCallback):
        def on_train_begin(self, *_, **__):
            trainers.append(compat.running_trainer())
            self.restore = compat.guard_training(trainers[-1], guard)

        def on_epoch_begin(self, *_, **__):
            seen.append(("epoch begins", depth))

        def on_step_end(self, *_, **__):
            seen.append(("step", depth))

        def on_evaluate(self, *_, **__):
            seen.append(("evaluation", depth))

        def on_train_end(self, *_, **__):
            seen.append(("end", depth))
            self.restore()

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, eval_on_start=True)
    data = tiny_dataset(8)
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(demo_model_path()))
    trainer = Trainer(
        tiny_model(), args, train_dataset=data, eval_dataset=data, data_collator=collator, callbacks=[Callback()]
    )
    own = set(vars(trainer))
    assert compat.running_trainer() is None
    trainer.train()
    assert trainers == [trainer]
    assert seen == [("evaluation", 1), ("epoch begins", 1), ("step", 1), ("end", 1)]
    assert not set(compat.GUARDED_METHODS) & (set(vars(trainer)) - own)


# --- data and inference ---
