"""The version differences, against whatever transformers is installed."""

from __future__ import annotations

import pytest
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

from esm_efficient import compat


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
    import torch

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


# --- estimation ---


# --- profiling ---


# --- data and inference ---
