"""Applying and removing the lean encoder: adapters, saving, hooks, checkpointing, threads and ranks."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_dataset, make_model, tiny_config
from lean_models import HEADS, build, distance, gradient_of, loss_of, make_batch, nodes_of
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    DataCollatorWithPadding,
    EsmForSequenceClassification,
    EsmModel,
    Trainer,
    TrainingArguments,
)

from esm_efficient import apply_lean_encoder, lora_config, prepare_model, remove_lean_encoder
from esm_efficient.compat import checkpointing_arguments
from esm_efficient.encoder import has_lean_encoder
from esm_efficient.errors import ConfigurationError


def test_several_active_adapters_and_disabled_adapters_give_the_numbers_of_the_plain_model():
    base = make_model()
    for parameter in base.parameters():
        parameter.data.mul_(4 if parameter.dim() == 2 else 1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value", "output.dense"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query", "key"]))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    batch = make_batch([9, 5, 30])
    loss, gradient = gradient_of(model, batch)
    apply_lean_encoder(model)
    found, found_gradient = gradient_of(model, batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(found_gradient, gradient) < 1e-5
    with model.disable_adapter(), torch.no_grad():
        off = model(**batch).logits
        assert torch.allclose(off, remove_lean_encoder(model)(**batch).logits, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(off, model(**batch).logits, rtol=1e-3, atol=0)


def test_merged_unmerged_and_unloaded_adapters_give_the_same_logits():
    model = apply_lean_encoder(build())
    batch = make_batch([9, 5, 30])
    with torch.no_grad():
        expected = model(**batch).logits
        model.merge_adapter()
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
        merged = model.merge_and_unload()
        assert has_lean_encoder(merged)
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-5)


def test_saved_files_equal_those_of_the_plain_model_and_load_again(tmp_path):
    plain = build()
    lean = apply_lean_encoder(copy.deepcopy(plain))
    assert list(lean.state_dict()) == list(plain.state_dict())
    for name, model in (("plain", plain), ("lean", lean)):
        model.save_pretrained(tmp_path / name)
        model.get_base_model().config.save_pretrained(tmp_path / name / "config")
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.*"))
    assert {file.name for file in files} >= {"adapter_model.safetensors", "adapter_config.json", "config.json"}
    for file in files:
        found, expected = ((tmp_path / name / file).read_bytes() for name in ("lean", "plain"))
        # adapter_config.json lists the target modules of a set in any order.
        same = sorted(found.split()) == sorted(expected.split()) if file.suffix == ".json" else found == expected
        assert same or file.name == "adapter_config.json", file
    configs = [PeftConfig.from_pretrained(tmp_path / name) for name in ("lean", "plain")]
    assert configs[0] == configs[1]
    base = make_model(num_hidden_layers=3, hidden_size=32, num_attention_heads=4)
    base.load_state_dict(
        {n.replace(".base_layer", ""): p for n, p in plain.get_base_model().state_dict().items() if "lora_" not in n},
        strict=False,
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "lean")
    batch = make_batch([9, 5])
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, plain.eval()(**batch).logits, atol=1e-5)

    full = apply_lean_encoder(make_model())
    full.save_pretrained(tmp_path / "full")
    again = EsmForSequenceClassification.from_pretrained(tmp_path / "full")
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, full.eval()(**batch).logits, atol=1e-6)


def test_remove_lean_encoder_restores_every_module():
    model = build()
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    hooks = {path: len(module._forward_hooks) for path, module in model.named_modules()}
    apply_lean_encoder(apply_lean_encoder(model), recompute="layer")
    assert has_lean_encoder(model)
    model(**make_batch([4, 3]))
    remove_lean_encoder(remove_lean_encoder(model))
    assert not has_lean_encoder(model)
    for path, module in model.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
        assert len(module._forward_hooks) == hooks[path]


def test_copies_and_pickles_compute_with_their_own_weights():
    model = apply_lean_encoder(build())
    batch = make_batch([9, 5])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            expected = model.eval()(**batch).logits
            assert torch.allclose(copied.eval()(**batch).logits, expected)
            for parameter in copied.parameters():
                parameter.mul_(1.5)
            assert not torch.allclose(copied(**batch).logits, expected)
            assert not any(m._forward_hooks or "_lean" in m.__dict__ for m in remove_lean_encoder(copied).modules())
            assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_encoder_of_a_classifier_can_be_copied_without_the_classifier(copied):
    classifier = apply_lean_encoder(build(trains="full").eval())
    batch, esm = make_batch([9, 5]), classifier.esm
    with torch.no_grad():
        expected = esm(**batch).last_hidden_state
        del classifier
        gc.collect()
        found = copied(esm)
        assert has_lean_encoder(found)
        assert torch.equal(found(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("head", [EsmForSequenceClassification, EsmModel])
def test_a_model_that_accelerate_prepared_in_bf16_can_be_copied_and_pickled(head):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(apply_lean_encoder(build(head, "full").eval()))
    batch = make_batch([9, 5])
    tokens = ... if head is EsmForSequenceClassification else batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch)[0][tokens]
        assert torch.equal(copy.deepcopy(model)(**batch)[0][tokens], expected)
        found = pickle.loads(pickle.dumps(model))
        # A pickle of a prepared model computes without autocast; that of a plain model does so too.
        assert torch.allclose(found(**batch)[0][tokens], expected, atol=0.05)
        assert has_lean_encoder(found)
        assert torch.equal(apply_lean_encoder(found)(**batch)[0][tokens], found(**batch)[0][tokens])
        removed = remove_lean_encoder(copy.deepcopy(model))(**batch)[0][tokens]
        assert torch.allclose(removed, expected, atol=0.05)
        assert not torch.allclose(removed, remove_lean_encoder(found)(**batch)[0][tokens], atol=1e-5)  # autocast is on
        unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert torch.allclose(unwrapped(**batch)[0][tokens], found(**batch)[0][tokens], atol=1e-5)
    AcceleratorState._reset_state(True)


class Traced(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.mark.parametrize(
    ("export", "error", "message"),
    [
        (torch.jit.trace, ConfigurationError, r"torch\.jit\.trace .* remove_lean_encoder\(model\)"),
        (torch.export.export, ConfigurationError, r"torch\.export .* remove_lean_encoder\(model\)"),
        (partial(torch.export.export, strict=True), Exception, r"remove_lean_encoder\(model\) before torch\.export"),
    ],
)
def test_exporting_is_refused_by_name(export, error, message):
    model = apply_lean_encoder(build(trains="full").eval())
    if export is torch.export.export:
        export = partial(export, strict=False)
    with pytest.raises(error, match=message):
        export(Traced(model), tuple(make_batch([9, 5]).values()))
    batch = make_batch([30, 2, 7])
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, remove_lean_encoder(model)(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_requested_hidden_states_and_attentions_equal_those_of_the_plain_model(head, caplog):
    model = build(head, "full").eval()
    batch = make_batch([9, 5, 12])
    wanted = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        expected = model(**batch, **wanted)
        found = apply_lean_encoder(model)(**batch, **wanted)
        again = model(**batch)
    assert len(found.hidden_states) == 4
    for name in ("hidden_states", "attentions"):
        for a, b in zip(found[name], expected[name], strict=True):
            assert torch.equal(a, b)
    assert "output_hidden_states was requested" in caplog.text
    tokens = batch["attention_mask"].bool()
    states = [out.logits if head is not EsmModel else out.last_hidden_state for out in (again, expected)]
    a, b = (s if s.dim() == 2 else s[tokens] for s in states)
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("path", ["encoder.layer.1", "encoder.layer.0.attention.self.query", "encoder.layer.2.output"])
def test_a_hook_in_a_layer_gets_the_tensors_of_the_plain_model(path, caplog):
    model = build(trains="full").eval()
    seen = []
    batch = make_batch([9, 5, 12])
    model.esm.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        model(**batch)
        apply_lean_encoder(model)(**batch)
    assert torch.equal(*seen)
    assert f"layer {path.removeprefix('encoder.layer.')} has hooks" in caplog.text


def test_a_hook_for_all_modules_gets_the_tensors_of_the_plain_model(caplog):
    model, seen = build(trains="full").eval(), []
    batch = make_batch([9, 5, 12])

    def note(module, inputs, output):
        if isinstance(module, nn.Linear):
            seen.append(output)

    handle = register_module_forward_hook(note)
    try:
        with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
            model(**batch)
            plain = list(seen)
            seen.clear()
            apply_lean_encoder(model)(**batch)
    finally:
        handle.remove()
    assert len(seen) == len(plain) > 10
    assert all(map(torch.equal, seen, plain))
    assert "there are hooks for all modules" in caplog.text


def test_a_transformation_of_torch_func_gives_the_gradient(caplog):
    model = apply_lean_encoder(build(trains="full").eval())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch = make_batch([9, 5, 12])

    def loss(values):
        return torch.func.functional_call(model, values, kwargs=batch).logits.square().sum()

    with caplog.at_level(logging.INFO, "esm_efficient"):
        found = torch.func.grad(loss)(parameters)
    assert "runs under torch.func" in caplog.text
    expected = dict(zip(parameters, torch.autograd.grad(loss(parameters), parameters.values()), strict=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", ["esm", "esm.encoder", "classifier", "classifier.dense"])
def test_a_hook_on_the_encoder_or_head_of_a_classifier_gets_every_token(path):
    model = apply_lean_encoder(build(trains="full").eval())
    batch = make_batch([9, 5, 12])
    tokens = batch["attention_mask"].bool()
    seen = []
    module = model.get_submodule(path)
    module.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0] if "classifier" in path else output[0])
    )
    with torch.no_grad():
        model(**batch)
        expected = remove_lean_encoder(model).esm(**batch).last_hidden_state
    if path == "classifier.dense":
        assert torch.allclose(seen[0], expected[:, 0], atol=1e-5)
    else:
        assert torch.allclose(seen[0][tokens], expected[tokens], atol=1e-5)


def test_a_head_that_replaces_the_first_one_gets_every_token():
    class MeanPool(nn.Module):
        def forward(self, features, **kwargs):
            return features.mean(1)

    model = apply_lean_encoder(build(trains="full").eval())
    model.classifier = MeanPool()
    batch = make_batch([12, 12])
    with torch.no_grad():
        found = model(**batch).logits
        assert torch.allclose(found, remove_lean_encoder(model)(**batch).logits, atol=1e-5)


def test_calls_with_unsupported_arguments_run_the_plain_encoder(caplog):
    model = apply_lean_encoder(build(trains="full").eval())
    ends = torch.tensor([0, 5, 9], dtype=torch.int32)
    plain = build(trains="full").eval()
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        found = model.esm(**make_batch([9]), cu_seq_lens_q=ends).last_hidden_state
        assert torch.equal(found, plain.esm(**make_batch([9]), cu_seq_lens_q=ends).last_hidden_state)
    assert "the argument cu_seq_lens_q is not supported" in caplog.text


def test_a_call_that_runs_plainly_uses_the_checkpointing_of_transformers():
    options = {
        "gradient_checkpointing": True,
        "use_reentrant": True,
    }  # it adds a node to the graph
    model = prepare_model(make_model(), adapters=lora_config(make_model()), **options).train()
    batch = make_batch([9, 5])
    expected = nodes_of(loss_of(model, batch, output_hidden_states=True))
    assert expected.count("CheckpointFunctionBackward") == 2
    apply_lean_encoder(model)
    for _ in range(2):
        assert nodes_of(loss_of(model, batch)).count("RecomputedLayerBackward") == 2
        assert sorted(nodes_of(loss_of(model, batch, output_hidden_states=True))) == sorted(expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_the_trainer_recomputes_layers(reentrant, tokenizer, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch's checkpointing was used")

    weights = []
    for checkpointing in (False, True):
        model = apply_lean_encoder(build(num_hidden_layers=2))
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **checkpointing_arguments(checkpointing, use_reentrant=reentrant),
        )
        collate = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model, args, train_dataset=make_dataset(8), data_collator=collate)
        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.checkpoint, "checkpoint", refuse)
            trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        recomputed = nodes_of(loss_of(model.train(), make_batch([5, 4]))).count("RecomputedLayerBackward")
        assert recomputed == (2 if checkpointing else 0)
    assert torch.allclose(*weights, atol=1e-6)
    # Removing the lean encoder restores transformers' own checkpointing.
    nodes = nodes_of(loss_of(remove_lean_encoder(model).train(), make_batch([5, 4])))
    assert any(name.startswith("CheckpointFunction") for name in nodes) == reentrant


def test_calls_in_several_threads_do_not_affect_each_other():
    classifier, tagger = (apply_lean_encoder(build(head, "full").eval()) for head in HEADS[:2])
    batches = [make_batch(lengths, seed=seed) for seed, lengths in enumerate([[9, 5], [30, 2, 7], [12], [4, 4, 4]])]

    def run(number):
        with torch.no_grad():
            model = (classifier, tagger, classifier.esm)[number % 3]
            return next(iter(model(**batches[number % 4]).values()))

    expected = [run(number) for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(run, list(range(12)) * 20)):
            assert torch.allclose(found, expected[number % 12], atol=1e-6)


def test_a_failed_call_does_not_affect_the_next_call():
    model = apply_lean_encoder(build(trains="full").eval())
    batch = make_batch([9, 5])
    with torch.no_grad():
        expected = model.esm(**batch).last_hidden_state
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 3), 99))
        assert torch.equal(model.esm(**batch).last_hidden_state, expected)


def test_torch_compile_keeps_the_loss_and_the_gradient():
    model = apply_lean_encoder(build(num_hidden_layers=2))
    batch = make_batch([9, 5, 12])
    loss, gradient = gradient_of(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    found = loss_of(compiled, batch)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance(grads, gradient) < 1e-5


def test_unsupported_models_are_refused():
    with pytest.raises(ConfigurationError, match="recompute='full'"):
        apply_lean_encoder(make_model(), recompute="full")
    with pytest.raises(ConfigurationError, match="attention='fast'"):
        apply_lean_encoder(make_model(), attention="fast")
    with pytest.raises(ConfigurationError, match="Linear has no EsmModel"):
        apply_lean_encoder(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="decoder"):
        apply_lean_encoder(EsmModel(tiny_config(is_decoder=True)))
    model = apply_lean_encoder(build())
    replaced = make_model()
    replaced.esm.forward = replaced.esm.forward
    with pytest.raises(ConfigurationError, match="EsmModel has been replaced"):
        apply_lean_encoder(replaced)
    model = apply_lean_encoder(build())
    trainable, loss = [p for p in model.parameters() if p.requires_grad], loss_of(model, make_batch([5, 3]))
    with pytest.raises(ConfigurationError, match=r"remove_lean_encoder\(model\)"):
        torch.autograd.grad(loss, trainable, create_graph=True)


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one_process(tmp_path):
    """torchrun starts two processes. Each writes the relative error of its gradient to a file."""
    script = Path(__file__).parent / "lean_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240)
    files = sorted(tmp_path.glob("rank*.txt"))
    assert len(files) == 2, result.stderr[-3000:]
    for file in files:
        lines = [line.split() for line in file.read_text().splitlines()]
        assert len(lines) >= 8
        assert all(float(error) < 1e-5 for *_, error in lines), lines
