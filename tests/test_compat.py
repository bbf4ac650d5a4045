"""The version differences, against whatever transformers is installed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from torch.utils import flop_counter
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from esm_efficient import _torch, compat, demo_model_path


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_arguments_switch_checkpointing_on(tmp_path, tiny_model, recwarn, reentrant):
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, **compat.checkpointing_arguments(True, use_reentrant=reentrant)
    )
    assert compat.asks_for_checkpointing(args)
    assert not [w for w in recwarn if "deprecated" in str(w.message)]
    off = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **compat.checkpointing_arguments(False))
    assert not compat.asks_for_checkpointing(off)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_enabled_on_every_layer_of_a_model(tiny_model, reentrant):
    model = tiny_model()
    compat.enable_checkpointing(model, use_reentrant=reentrant)
    layers = list(model.esm.encoder.layer)
    assert [layer.gradient_checkpointing for layer in layers] == [True] * len(layers)
    assert layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


def test_a_declared_loss_is_not_divided_by_the_accumulation(tmp_path, tiny_model, tiny_dataset, tokenizer):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=4, report_to="none")
    trainer = Trainer(tiny_model(), args, train_dataset=tiny_dataset(4), processing_class=tokenizer)
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


# --- training ---


# --- adapters ---


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
