"""Version differences and private names, tested with the installed releases."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils import flop_counter
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from esm_efficient import _torch, compat, demo_model_path
from esm_efficient.saving import portable_saving

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


@pytest.mark.parametrize("count", [None, torch.tensor(4)], ids=["no count", "count"])
@pytest.mark.parametrize("accepts", [False, True], ids=["no loss arguments", "loss arguments"])
def test_whether_a_trainer_divides_a_loss_is_known(tmp_path, tiny_model, tiny_dataset, tokenizer, accepts, count):
    trainer = trainer_of(tmp_path, tiny_model(), tiny_dataset(4), tokenizer, gradient_accumulation_steps=4)
    trainer.current_gradient_accumulation_steps = 4
    trainer.compute_loss = lambda model, inputs, **kwargs: model(**inputs).loss
    trainer.model_accepts_loss_kwargs = accepts
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=count)
    factor = 4 if compat.divides_loss(trainer, count) else 1
    assert factor * loss.item() == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-5)
    if hasattr(Trainer, "loss_is_scaled_for_ga"):
        trainer.loss_is_scaled_for_ga = True
        assert not compat.divides_loss(trainer, count)


def test_a_loss_function_of_the_users_is_recognised(tiny_model):
    class Own(EsmForSequenceClassification):
        @property
        def loss_function(self):
            return torch.nn.functional.cross_entropy

    given = {name: tiny_model() for name in ("none", "function")}
    given["function"].loss_function = torch.nn.functional.cross_entropy
    given["class"] = tiny_model(Own)
    found = {name: compat.has_own_loss_function(model) for name, model in given.items()}
    assert found == {"none": False, "function": True, "class": True}


def test_tied_weights_are_those_that_a_checkpoint_leaves_out(tmp_path, tiny_model):
    model = tiny_model(EsmForMaskedLM)
    model.tie_weights()
    with portable_saving(model):
        model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        lacking = set(model.state_dict()) - set(handle.keys())
    assert {name for name in lacking if "rotary" not in name} == {"lm_head.decoder.weight"}
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
    with portable_saving(model):
        model.save_pretrained(tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    del weights["classifier.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    missing: list[str] = []
    trainer = trainer_of(tmp_path, model, tiny_dataset(4), tokenizer, max_steps=1)
    compat.check_loaded_weights(trainer, missing.extend)
    # The folder has weights only: the Trainer loads them, and then does not find its own state.
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


def test_the_method_that_makes_attention_masks_is_called_by_every_forward_pass(tiny_model, monkeypatch):
    model, calls = tiny_model(), []
    original = getattr(model.esm, compat.ATTENTION_MASKS_METHOD)

    def count(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(model.esm, compat.ATTENTION_MASKS_METHOD, count)
    model(input_ids=torch.tensor([[0, 5, 2]]))
    assert len(calls) == 1


def test_checkpointing_of_layers_is_bypassed_and_restored(tiny_model, monkeypatch):
    model = tiny_model().train()
    compat.enable_checkpointing(model)
    model.enable_input_require_grads()
    layers, calls = list(model.esm.encoder.layer), []
    for layer in layers:
        original = layer._gradient_checkpointing_func

        def count(*args, original=original, **kwargs):
            calls.append(1)
            return original(*args, **kwargs)

        layer._gradient_checkpointing_func = count
    compat.bypass_checkpointing(layers)
    model(input_ids=torch.tensor([[0, 5, 2]]))
    assert calls == []
    compat.restore_checkpointing(layers)
    model(input_ids=torch.tensor([[0, 5, 2]]))
    assert len(calls) == len(layers)


@pytest.mark.parametrize(
    ("options", "name"), [({}, ""), ({"use_dora": True}, "Dora"), ({"lora_bias": True}, "LoRA with a bias")]
)
def test_extensions_of_lora_are_named(tiny_model, options, name):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"], **options))
    layer = next(module for path, module in model.named_modules() if path.endswith("self.query"))
    found = compat.lora_extension(layer, "default")
    assert found == name if not name else name.lower() in found.lower()


def test_rotary_angles_are_those_of_the_model(tiny_model):
    model = tiny_model().eval()
    states = torch.zeros(1, 4, model.config.hidden_size)
    cos, sin = compat.rotary_table(model.esm, None, states, torch.float32)
    half = cos.shape[-1] // 2
    frequencies = 1 / 10_000 ** (torch.arange(half) / half)
    angles = torch.arange(4.0)[:, None] * frequencies
    assert torch.allclose(cos[0, :, :half], angles.cos(), atol=1e-6)
    assert torch.allclose(sin[0, :, :half], angles.sin(), atol=1e-6)


def test_every_hook_of_a_module_is_found():
    module = torch.nn.Linear(2, 2)
    assert list(_torch.hooks_of(module)) == []
    hooks = [lambda *_: None for _ in range(4)]
    module.register_forward_hook(hooks[0])
    module.register_forward_pre_hook(hooks[1])
    module.register_full_backward_hook(hooks[2])
    module.register_full_backward_pre_hook(hooks[3])
    assert set(_torch.hooks_of(module)) == set(hooks)


def test_the_tree_of_a_module_has_its_names_and_classes_and_names_what_is_changed(tiny_model):
    model = tiny_model()
    tree, changed = _torch.tree_of(model)
    names = [path.rpartition(".")[2] for path, _ in model.named_modules() if path]
    assert sorted(entry for entry in tree if isinstance(entry, str) and entry != "pooler") == sorted(names)
    classes = [type(module).__name__ for module in model.modules() if module is not model]
    found = [entry.__name__ for entry in tree if isinstance(entry, type) and entry is not type(None)]
    assert sorted(found) == sorted(classes)
    assert changed == []
    model.esm.encoder.register_forward_hook(print)
    model.classifier.forward = model.classifier.forward
    assert set(_torch.tree_of(model)[1]) == {model.esm.encoder, model.classifier}
    model.classifier.dense = torch.nn.Identity()
    assert _torch.tree_of(model)[0] != tree


def test_is_fake_distinguishes_fake_and_real_tensors():
    with _torch.fake_tensor_mode():
        fake = torch.zeros(2)
        with _torch.real_tensors():
            real = torch.zeros(2)
    assert _torch.is_fake(fake)
    assert not _torch.is_fake(real)


def test_the_cpu_kernel_computes_attention_and_its_gradient():
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    found, logsumexp = _torch.cpu_attention(query.detach(), key.detach(), value.detach(), 0.3)
    assert torch.allclose(found, expected, atol=1e-6)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    inputs = (tensor.detach() for tensor in (query, key, value))
    gradients = _torch.cpu_attention_backward(upstream, *inputs, found, logsumexp, 0.3)
    for gradient, expected_gradient in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_block_mask_is_made_on_a_cpu():
    mask = _torch.create_block_mask(lambda b, h, q, k: q == k, 128, 256, torch.device("cpu"))
    assert mask.shape[-2:] == (128, 256)
    assert _torch.has_flex_attention() == (tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7))


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


@pytest.mark.parametrize("padded", [False, True])
def test_attention_masks_decides_whether_a_mask_is_made(tiny_model, padded):
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


def test_fake_tensors_have_no_values_and_real_tensors_do():
    with _torch.fake_tensor_mode():
        fake = torch.zeros(2, 3) + 1
        with _torch.real_tensors() as mode:
            real = torch.ones(2)
            assert real.sum().item() == 2
            assert isinstance(mode.from_tensor(real), type(fake))
    assert type(fake) is not torch.Tensor
    assert fake.shape == (2, 3)


def test_run_backward_gives_the_gradient_and_keeps_function_modes():
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


def test_views_allocations_and_questions_run_no_kernel_and_the_rest_does():
    aten = torch.ops.aten
    without = aten.view.default, aten.transpose.int, aten._unsafe_view.default, aten.empty.memory_format
    assert not any(map(_torch.is_kernel, (*without, torch.ops.prim.device.default)))
    assert all(map(_torch.is_kernel, (aten.clone.default, aten.mm.default)))


def test_attention_kernels_exist_under_fake_tensors():
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
    """Events from the first epoch on must occur inside a guarded method, except those between two of them."""
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
