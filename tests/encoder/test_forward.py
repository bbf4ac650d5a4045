"""The lean encoder against the plain model: loss, gradient, what is kept, what anyone sees."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import make_dataset, make_model, tiny_config
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DataCollatorWithPadding,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.esm import modeling_esm

from esm_efficient import apply_lean_encoder, lora_config, prepare_model, remove_lean_encoder
from esm_efficient.compat import checkpointing_arguments
from esm_efficient.encoder import has_lean_encoder
from esm_efficient.encoder.linear import Adapter, dropout_mask
from esm_efficient.errors import ConfigurationError

HEADS = (EsmForSequenceClassification, EsmForTokenClassification, EsmForMaskedLM, EsmModel)
RECOMPUTES = ("none", "mlp", "layer")
TRAINS = ("full", "qkv", "attention", "mlp", "all-linear", "head")
BATCHES = {"padded": [9, 5, 2, 9, 30], "of one length": [7, 7, 7], "of one": [11], "of special tokens": [2, 2, 6]}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
SEEDS, NO_FURTHER = 20, 1.3
"""In half precision one seed's error over the plain model's scatters by 1.5x around a mean of 1: by 1.1x over these."""


def build(head=EsmForSequenceClassification, trains="all-linear", *, dtype=torch.float32, adapters=None, **changes):
    """A model whose parts all matter to its output."""
    model = make_model(head, **({"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4} | changes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    if adapters is None and trains not in ("full", "head"):
        adapters = lora_config(model, preset=trains, r=4, lora_dropout=0.0)
    model = prepare_model(model, adapters=adapters, head_only=trains == "head")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).train()


def make_batch(lengths, *, seed=0, masked=True):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(4, 24, mask.shape, generator=generator)
    ids[:, 0] = 0
    if masked:
        ids[:, 2::5] = 32
    ids = ids.scatter(1, (lengths - 1).clamp(min=1)[:, None] % mask.shape[1], 2) if mask.shape[1] > 1 else ids
    return {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask}


def loss_of(model, batch, **options):
    """A loss that reads what the head gives for tokens, and nothing of padding."""
    output = model(**batch, **options)
    states = output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits
    weights = torch.linspace(0.5, 1.5, states.shape[-1], dtype=states.dtype)
    if states.dim() == 3:
        states = states * batch["attention_mask"][..., None]
    return ((states * weights).sum(-1).square()).sum() / batch["attention_mask"].sum()


def gradient_of(model, batch, **options):
    model.zero_grad()
    loss = loss_of(model, batch, **options)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(found, expected):
    """Relative error of the whole gradient."""
    missing = {name for name in found.keys() ^ expected.keys() if (found | expected)[name].abs().max() > 0}
    assert not missing
    pairs = [(found[n].double(), expected[n].double()) for n in found.keys() & expected.keys()]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


@contextlib.contextmanager
def exact_rotary(monkeypatch, dtype):
    """The plain model with rotary positions in float64, where transformers rotates in float32 whatever the model."""
    with monkeypatch.context() as patch:
        if dtype == torch.float64 and hasattr(modeling_esm, "EsmRotaryEmbedding"):

            def rotate(q, k, cos, sin, unsqueeze_dim=1):
                cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
                return tuple(x * cos + modeling_esm.rotate_half(x) * sin for x in (q, k))

            patch.setattr(modeling_esm, "apply_rotary_pos_emb", rotate)
        yield


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradient_are_the_plain_models(head, trains, dtype, monkeypatch):
    if head is EsmModel and trains == "head":
        pytest.skip("a bare model has no head")
    if head is EsmForMaskedLM and trains == "head":
        pytest.skip("the head's matrix is that of the embeddings")
    if head is EsmModel and trains not in ("full", "all-linear"):
        pytest.skip("which layers train is tested with the heads")
    model = build(head, trains, dtype=dtype)
    for lengths in BATCHES.values():
        batch = make_batch(lengths)
        with exact_rotary(monkeypatch, dtype):
            loss, gradient = gradient_of(remove_lean_encoder(model), batch)
        for recompute in RECOMPUTES:
            found, found_gradient = gradient_of(apply_lean_encoder(model, recompute=recompute), batch)
            assert found == pytest.approx(loss, rel=LIMITS[dtype])
            assert distance(found_gradient, gradient) < LIMITS[dtype], (lengths, recompute)


@pytest.mark.parametrize("trains", ["full", "all-linear"])
def test_lengths_from_one_to_the_longest(trains):
    model = build(trains=trains, num_hidden_layers=2)
    for lengths in ([1], [1, 2, 3], [1022 + 2, 1, 515], [1024]):
        batch = make_batch(lengths)
        loss, gradient = gradient_of(remove_lean_encoder(model), batch)
        for recompute in RECOMPUTES:
            found, found_gradient = gradient_of(apply_lean_encoder(model, recompute=recompute), batch)
            assert found == pytest.approx(loss, rel=1e-5)
            assert distance(found_gradient, gradient) < 1e-5


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trains", ["full", "all-linear"])
def test_half_precision_is_no_further_from_the_truth_than_the_plain_model(trains, autocast):
    head = EsmForTokenClassification
    ratios = []
    for seed in range(SEEDS):
        batch = make_batch([40, 9, 33, 17], seed=seed)
        model = build(head, trains, seed=seed)
        truth = gradient_of(model, batch)[1]
        for parameter in model.parameters():
            if autocast is None or not parameter.requires_grad:
                parameter.data = parameter.data.to(autocast or torch.bfloat16)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            plain = distance(gradient_of(model, batch)[1], truth)
            lean = distance(gradient_of(apply_lean_encoder(model), batch)[1], truth)
        ratios.append(lean / plain)
    assert statistics.geometric_mean(ratios) < NO_FURTHER, ratios


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_a_bfloat16_base_with_float32_adapters_outside_autocast(recompute):
    ratios = []
    for seed in range(SEEDS):
        batch = make_batch([40, 9, 33], seed=seed)
        model = build(seed=seed)
        truth = gradient_of(model, batch)[1]
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or "classifier" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        plain = distance(gradient_of(model, batch)[1], truth)
        lean = distance(gradient_of(apply_lean_encoder(model, recompute=recompute), batch)[1], truth)
        ratios.append(lean / plain)
    assert statistics.geometric_mean(ratios) < NO_FURTHER, ratios


def test_two_hundred_steps_end_at_the_plain_models_weights():
    plain = build(trains="full", num_hidden_layers=2)
    lean = apply_lean_encoder(copy.deepcopy(plain))
    batches = [make_batch([12, 5, 9, 20], seed=seed) for seed in range(5)]
    labels = torch.tensor([0, 1, 1, 0])
    for model in (plain, lean):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for step in range(200):
            loss = nn.functional.cross_entropy(model(**batches[step % 5]).logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = (torch.cat([p.flatten() for p in model.parameters()]) for model in (lean, plain))
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_lora_dropout_drops_what_the_seeds_say(recompute, monkeypatch):
    model = build(adapters=None, trains="all-linear", dtype=torch.float64)  # the loss may be near zero
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "default" in module and isinstance(module["default"], nn.Identity):
            module["default"] = nn.Dropout(0.4)
    batch = make_batch([13])  # one sequence, whose packed tokens are its padded ones
    apply_lean_encoder(model, recompute=recompute)
    torch.manual_seed(5)
    loss, gradient = gradient_of(model, batch)

    remove_lean_encoder(model)
    torch.manual_seed(5)
    for layer in model.base_model.model.esm.encoder.layer:
        inner = layer.attention
        parts = (inner.self.query, inner.self.key, inner.self.value, inner.output.dense)
        for part in (*parts, layer.intermediate.dense, layer.output.dense):
            part.lora_dropout["default"] = SeededDropout(0.4, int(torch.randint(2**62, ())), last=False)
    # The last layer computes the first token alone behind keys and values, and draws for that.
    last = model.base_model.model.esm.encoder.layer[-1]
    for part in (last.attention.self.query, last.attention.output.dense, last.intermediate.dense, last.output.dense):
        part.lora_dropout["default"].last = True
    expected, expected_gradient = gradient_of(model, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(gradient, expected_gradient) < 1e-5
    model.eval()
    assert torch.equal(*(model(**batch).logits for _ in range(2)))


class SeededDropout(nn.Module):
    """The lean encoder's dropout in the plain model."""

    def __init__(self, p, seed, *, last):
        super().__init__()
        self.p, self.seed, self.last = p, seed, last

    def forward(self, inputs):
        adapter = Adapter(None, None, 1.0, self.p, self.seed)
        tokens = 1 if self.last else inputs.shape[-2]
        mask = dropout_mask((tokens, inputs.shape[-1]), adapter, "cpu", inputs.dtype)
        return inputs * mask if self.training else inputs


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["LayerNorm"]},
        {"layers_to_transform": [1]},
        {"target_modules": ["key", "output.dense"]},
        {"init_lora_weights": "gaussian", "lora_alpha": 32},
        {"bias": "lora_only"},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_every_kind_of_lora_has_the_same_gradient(options):
    config = LoraConfig(
        **({"r": 4, "target_modules": ["query", "value", "intermediate.dense", "output.dense"]} | options)
    )
    model = get_peft_model(make_model(num_hidden_layers=3), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.2)
    batch = make_batch([9, 5, 30])
    loss, gradient = gradient_of(model, batch)
    for recompute in RECOMPUTES:
        found, found_gradient = gradient_of(apply_lean_encoder(model, recompute=recompute), batch)
        assert found == pytest.approx(loss, rel=1e-5)
        assert distance(found_gradient, gradient) < 1e-5


def test_unknown_adapters_run_without_padding_and_the_log_says_so(caplog):
    config = IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
    model = get_peft_model(make_model(), config)
    batch = make_batch([9, 5, 30])
    loss, gradient = gradient_of(model, batch)
    with caplog.at_level(logging.INFO, "esm_efficient"), FlopCounterMode(display=False) as counter:
        found, found_gradient = gradient_of(apply_lean_encoder(model), batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(found_gradient, gradient) < 1e-5
    assert [m for m in caplog.messages if "its own forward" in m] == [
        "runs through its own forward, without padding: peft's Linear"
    ]
    with FlopCounterMode(display=False) as padded:
        gradient_of(remove_lean_encoder(model), batch)
    assert counter.get_total_flops() < 0.6 * padded.get_total_flops()


def test_several_adapters_and_switching_them_off():
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


def test_merging_unmerging_and_unloading():
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


def test_saving_and_loading_are_as_without_it(tmp_path):
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
        # A set of target modules is written in no order.
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


def test_the_undo_leaves_nothing_behind():
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


def test_a_copy_and_a_pickle_compute_on_their_own_weights():
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


@pytest.mark.parametrize("head", HEADS)
def test_hidden_states_and_attentions_are_the_plain_models(head, caplog):
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
    a, b = (s if head is EsmForSequenceClassification else s[tokens] for s in states)
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("path", ["encoder.layer.1", "encoder.layer.0.attention.self.query", "encoder.layer.2.output"])
def test_a_hook_sees_what_it_would_see_without_it(path, caplog):
    model = build(trains="full").eval()
    seen = []
    batch = make_batch([9, 5, 12])
    model.esm.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        model(**batch)
        apply_lean_encoder(model)(**batch)
    assert torch.equal(*seen)
    assert f"layer {path.removeprefix('encoder.layer.')} has hooks" in caplog.text


@pytest.mark.parametrize("path", ["esm", "esm.encoder", "classifier", "classifier.dense"])
def test_whoever_looks_at_a_classifiers_encoder_sees_every_token(path):
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


def test_a_head_that_is_put_there_later_reads_every_token():
    class MeanPool(nn.Module):
        def forward(self, features, **kwargs):
            return features.mean(1)

    model = apply_lean_encoder(build(trains="full").eval())
    model.classifier = MeanPool()
    batch = make_batch([12, 12])
    with torch.no_grad():
        found = model(**batch).logits
        assert torch.allclose(found, remove_lean_encoder(model)(**batch).logits, atol=1e-5)


def test_a_pooler_that_reads_padding_is_given_what_it_was_given_before():
    model = EsmModel(tiny_config()).eval()
    batch = make_batch([12, 12])
    batch["attention_mask"][0, :4] = 0
    with torch.no_grad():
        expected = model(**batch).pooler_output
        assert torch.allclose(apply_lean_encoder(model)(**batch).pooler_output, expected, atol=1e-6)


def test_what_is_not_known_to_be_harmless_is_left_to_transformers(caplog):
    model = apply_lean_encoder(build(trains="full").eval())
    ends = torch.tensor([0, 5, 9], dtype=torch.int32)
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        model.esm(**make_batch([9]), cu_seq_lens_q=ends)
    assert "the argument cu_seq_lens_q is not supported" in caplog.text


def test_a_call_that_is_left_to_transformers_is_checkpointed_by_it():
    options = {"gradient_checkpointing": True, "use_reentrant": True}  # which has a node of its own in the graph
    model = prepare_model(make_model(), adapters=lora_config(make_model()), **options).train()
    batch = make_batch([9, 5])
    expected = nodes_of(loss_of(model, batch, output_hidden_states=True))
    assert expected.count("CheckpointFunctionBackward") == 2
    apply_lean_encoder(model)
    for _ in range(2):
        assert nodes_of(loss_of(model, batch)).count("RecomputedLayerBackward") == 2
        assert sorted(nodes_of(loss_of(model, batch, output_hidden_states=True))) == sorted(expected)


def test_a_layer_of_which_nothing_trains_in_fact_may_be_recomputed():
    model = apply_lean_encoder(build(), recompute="layer")
    model.merge_adapter()
    loss, gradient = gradient_of(model, make_batch([9, 5]))
    assert gradient.keys() == {name for name, p in model.named_parameters() if "classifier.modules_to_save" in name}
    assert loss > 0


def test_tokens_may_lie_anywhere_in_a_row():
    model = build(EsmForTokenClassification, "full")
    batch = make_batch([12, 12, 12])
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, 3:6] = 0
    loss, gradient = gradient_of(model, batch)
    found, found_gradient = gradient_of(apply_lean_encoder(model), batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(found_gradient, gradient) < 1e-5


def test_a_first_token_that_is_padding_is_computed_as_before(caplog):
    model = build(trains="full").eval()
    batch = make_batch([12, 12])
    batch["attention_mask"][0, :4] = 0
    with torch.no_grad(), caplog.at_level(logging.INFO, "esm_efficient"):
        assert torch.equal(model(**batch).logits, apply_lean_encoder(model)(**batch).logits)
    assert "does not begin at the first column" in caplog.text


def test_the_encoder_of_a_classifier_gives_every_token_when_it_is_called_itself():
    model = build(trains="full").eval()
    batch = make_batch([9, 5])
    tokens = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model.esm(**batch).last_hidden_state[tokens]
        apply_lean_encoder(model)(**batch)
        assert torch.allclose(model.esm(**batch).last_hidden_state[tokens], expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding_type": "absolute", "token_dropout": False},
        {"emb_layer_norm_before": True},
        {"token_dropout": False},
    ],
    ids=str,
)
def test_other_members_of_the_family(changes):
    model = build(EsmForTokenClassification, "full", **changes)
    batch = make_batch([9, 5, 12], masked=False)
    loss, gradient = gradient_of(model, batch)
    found, found_gradient = gradient_of(apply_lean_encoder(model), batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(found_gradient, gradient) < 1e-5


def test_position_ids_and_embeddings_may_be_given():
    model = build(EsmForTokenClassification, "full")
    batch = make_batch([9, 5, 12])
    batch["inputs_embeds"] = torch.randn(3, 12, 32).requires_grad_()
    del batch["input_ids"]
    batch["position_ids"] = torch.randint(0, 50, (3, 12))
    grads = []
    for change in (remove_lean_encoder, apply_lean_encoder):
        loss_of(change(model), batch).backward()
        grads.append(batch["inputs_embeds"].grad.clone())
        batch["inputs_embeds"].grad = None
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hidden", [0.3, 0.0])
def test_dropout_is_replayed_when_a_layer_is_recomputed(hidden, caplog):
    model = build(hidden_dropout_prob=hidden, attention_probs_dropout_prob=0.2)
    batch = make_batch([9, 5, 12])
    results = []
    with caplog.at_level(logging.INFO, "esm_efficient"):
        for recompute in ("none", "layer"):
            apply_lean_encoder(model, recompute=recompute)
            torch.manual_seed(3)
            results.append(gradient_of(model, batch))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert distance(results[1][1], results[0][1]) < 1e-6
    assert ("dropout of hidden states" in caplog.text) == bool(hidden)
    torch.manual_seed(4)
    assert gradient_of(model, batch)[0] != pytest.approx(results[0][0], rel=1e-3)


def nodes_of(tensor):
    """Names of the nodes of a tensor's graph, each as often as it is there."""
    seen, wanted, names = set(), [tensor.grad_fn], []
    while wanted:
        node = wanted.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        wanted += [function for function, _ in node.next_functions]
    return names


def test_no_gradient_goes_below_the_lowest_layer_that_trains():
    batch = make_batch([9, 5])
    upper = build(adapters=LoraConfig(r=2, target_modules=["key"], layers_to_transform=[2]), num_hidden_layers=4)
    nodes = nodes_of(loss_of(apply_lean_encoder(upper), batch))
    assert nodes.count("NormMLPBackward") == 2  # layers 2 and 3
    assert not any(name.startswith("Embedding") for name in nodes)
    head = nodes_of(loss_of(apply_lean_encoder(build(trains="head")), batch))
    assert not any("MLP" in name or "Norm" in name for name in head)

    # transformers makes the embeddings' output require a gradient for checkpointing.
    checkpointed = prepare_model(
        make_model(), adapters=lora_config(make_model(), preset="qkv"), gradient_checkpointing=True
    )
    nodes = nodes_of(loss_of(apply_lean_encoder(checkpointed.train()), batch))
    assert nodes.count("RecomputedLayerBackward") == 2
    assert nodes_of(loss_of(remove_lean_encoder(checkpointed), batch)).count("MaskedFillBackward0") == 1
    assert nodes.count("MaskedFillBackward0") == 0


def test_the_last_layer_computes_what_the_first_token_needs_and_no_more():
    batch, layers, width, inner = make_batch([40, 25, 33]), 3, 32, 32
    model = apply_lean_encoder(build(trains="head", num_hidden_layers=layers))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    products = {str(op): count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op)}
    tokens, rows = int(batch["attention_mask"].sum()), 3
    every = 4 * width * width + 2 * width * inner
    last = tokens * 2 * width * width + rows * (2 * width * width + 2 * width * inner)
    head = rows * (width * width + 2 * width)
    assert sum(products.values()) == 2 * ((layers - 1) * tokens * every + last + head)


@pytest.mark.parametrize(("recompute", "widths"), [("none", 10), ("mlp", 6), ("layer", 1)])
def test_what_is_kept_is_ten_times_the_width_and_less_with_recomputation(recompute, widths):
    kept, parameters = {}, set()

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    per_layer = []
    batch = make_batch([60, 100])
    for layers in (2, 4):
        model = build(
            EsmForTokenClassification,
            num_hidden_layers=layers,
            hidden_size=64,
            intermediate_size=256,
            trains="all-linear",
        )
        apply_lean_encoder(model, recompute=recompute)
        parameters |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = loss_of(model, batch)
        per_layer.append(sum(kept.values()))
        del loss
    numbers = (per_layer[1] - per_layer[0]) / 2 / 4 / int(batch["attention_mask"].sum()) / 64
    # Beside these, one number a head and token: the sums of the attention weights.
    assert 0.99 * widths < numbers < widths + 0.1


def test_prediction_keeps_nothing():
    from esm_efficient.costs.allocations import AllocationTracker

    batch = make_batch([60, 100])
    peaks = []
    for layers in (2, 6):
        model = apply_lean_encoder(build(num_hidden_layers=layers, trains="full").eval())
        with torch.no_grad(), AllocationTracker() as tracker:
            tracker.hold(model.parameters(), "weights")
            model(**batch)
        peaks.append(tracker.peak.total - tracker.peak.weights)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_asked_of_the_trainer_recomputes_layers(reentrant, tokenizer, tmp_path, monkeypatch):
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
    # Undone, transformers' own checkpointing is as it was.
    nodes = nodes_of(loss_of(remove_lean_encoder(model).train(), make_batch([5, 4])))
    assert any(name.startswith("CheckpointFunction") for name in nodes) == reentrant


def test_threads_do_not_see_each_others_calls():
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


def test_a_call_that_fails_leaves_nothing_behind():
    model = apply_lean_encoder(build(trains="full").eval())
    batch = make_batch([9, 5])
    with torch.no_grad():
        expected = model.esm(**batch).last_hidden_state
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 3), 99))
        assert torch.equal(model.esm(**batch).last_hidden_state, expected)


def test_torch_compile_neither_breaks_it_nor_changes_it():
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


def test_it_is_refused_where_it_does_not_apply():
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
    replaced.esm.encoder.forward = replaced.esm.encoder.forward
    with pytest.raises(ConfigurationError, match="EsmEncoder has been replaced"):
        apply_lean_encoder(replaced)
    model = apply_lean_encoder(build())
    trainable, loss = [p for p in model.parameters() if p.requires_grad], loss_of(model, make_batch([5, 3]))
    with pytest.raises(ConfigurationError, match=r"remove_lean_encoder\(model\)"):
        torch.autograd.grad(loss, trainable, create_graph=True)


def test_two_ranks_train_as_one(tmp_path):
    """Real processes under torchrun; they write how far their gradient is from that of one process."""
    script = Path(__file__).parent / "lean_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240)
    files = sorted(tmp_path.glob("rank*.txt"))
    assert len(files) == 2, result.stderr[-3000:]
    for file in files:
        lines = [line.split() for line in file.read_text().splitlines()]
        assert len(lines) >= 8
        assert all(float(error) < 1e-5 for *_, error in lines), lines
