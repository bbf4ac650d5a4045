"""The version differences, against whatever transformers is installed."""

from __future__ import annotations

import pytest
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

from esm_efficient import _torch, compat


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


@pytest.mark.parametrize("padded", [False, True])
def test_attention_masks_decides_whether_a_mask_is_made(tiny_model, padded):
    import torch
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode

    masks = []

    class Masks(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                masks.append((kwargs or {}).get("attn_mask"))
            return func(*args, **(kwargs or {}))

    model = tiny_model()
    model.set_attn_implementation("sdpa")
    ids = torch.full((2, 6), 5)
    with compat.attention_masks(padded), Masks(), torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert masks
    assert all((mask is not None) == padded for mask in masks)


def test_the_attention_implementation_is_the_one_that_was_set(tiny_model):
    model = tiny_model()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert compat.attention_implementation(model.config) == name
    assert compat.attention_implementation(object()) == "sdpa"


def test_is_checkpointing_follows_the_model_without_a_warning(tiny_model, recwarn):
    model = tiny_model()
    assert compat.is_checkpointing(model) is False
    for layer in model.esm.encoder.layer:
        layer.gradient_checkpointing = True
    assert compat.is_checkpointing(model) is True
    assert compat.is_checkpointing(object()) is False
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


def test_fake_tensors_have_shapes_and_real_tensors_numbers():
    import torch

    with _torch.fake_tensor_mode():
        fake = torch.zeros(2, 3) + 1
        with _torch.real_tensors() as mode:
            real = torch.ones(2)
            assert real.sum().item() == 2
            assert isinstance(mode.from_tensor(real), type(fake))
    assert type(fake) is not torch.Tensor
    assert fake.shape == (2, 3)


def test_run_backward_gives_the_gradient_and_keeps_function_modes():
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils.checkpoint import checkpoint

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    calls = []
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with Functions():
        loss = checkpoint(torch.sin, x, use_reentrant=False).sum()
        calls.clear()
        _torch.run_backward(loss)
    assert torch.sin in calls  # recomputed under the mode
    assert torch.allclose(x.grad, x.detach().cos())


def test_views_are_told_from_copies():
    import torch

    aten = torch.ops.aten
    assert all(map(_torch.is_view, (aten.view.default, aten.transpose.int, aten._unsafe_view.default)))
    assert not any(map(_torch.is_view, (aten.clone.default, aten.mm.default)))


def test_attention_kernels_exist_under_fake_tensors():
    import torch

    with _torch.fake_tensor_mode():
        query, key, value = (torch.empty(2, 4, 24, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        outputs = (
            _torch.math_attention(query, key, value, None, 0.0, 0.25),
            _torch.flash_attention(query, key, value, 0.0, 0.25),
            _torch.efficient_attention(query, key, value, None, 0.0, 0.25),
        )
        assert all(output.shape == (2, 4, 24, 16) for output in outputs)
        for output in outputs:
            assert len(torch.autograd.grad(output.float().sum(), (query, key, value))) == 3
        states, ends = torch.empty(21, 4, 16, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32)
        packed = _torch.varlen_flash_attention(states, states, states, ends, ends, 8, 8, 0.0, False, False, scale=0.25)
        assert packed.shape == (21, 4, 16)


# --- profiling ---


# --- data and inference ---
