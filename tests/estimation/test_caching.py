"""The estimate of a recipe with a cache: a step on cached states, and the cache's own costs."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from conftest import make_model, slow_except, tiny_config
from datasets import Dataset, DatasetDict
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, EsmForTokenClassification

from esm_efficient import (
    RECIPES,
    PooledEsmForSequenceClassification,
    StatesCollator,
    apply_lean_encoder,
    cache_states,
    estimate,
    prepare_model,
    recipe_adapters,
    split_model,
)
from esm_efficient.costs.allocations import AllocationTracker, model_tensors, tensors_in
from esm_efficient.costs.throughput import flops_of
from esm_efficient.estimation.inputs import data_lengths
from esm_efficient.trunk.states import StateFormat

LAYERS, ROWS, TOKENS = 5, 3, 20
CACHED = {
    "head": RECIPES["frozen"].replace(pooling="first"),
    "lora": RECIPES["lora"].replace(layers="top-2", cache=True),
    "full": RECIPES["base"].replace(layers="top-2", cache=True),
    "checkpointing": RECIPES["gc"].replace(layers="top-4", cache=True),
    "all": RECIPES["lora"].replace(cache=True),
    "mean": RECIPES["frozen"].replace(pooling="mean"),
    "attention": RECIPES["frozen"].replace(pooling="attention"),
}


def wide_model(kind=None, **changes):
    kinds = () if kind is None else (kind,)
    if changes.get("classifier_pooling", "first") != "first":
        kinds = (PooledEsmForSequenceClassification,)
    return make_model(
        *kinds, **changes, hidden_size=32, intermediate_size=128, num_attention_heads=4, num_hidden_layers=LAYERS
    )


def cached_batch(model, top, pooling, folder):
    """Return the rest, a batch of states that was written and read as in training, and the bytes of the states."""
    trunk, rest = split_model(model, top)
    rows = [{"input_ids": [0, *range(4, 2 + TOKENS), 2], "attention_mask": [1] * TOKENS}] * ROWS
    dataset = cache_states(Dataset.from_list(rows), trunk, folder, pooling=pooling)

    class Tokenizer:  # pads nothing, since the sequences have one length
        def pad(self, features, **_):
            return {name: torch.tensor([row[name] for row in features]) for name in features[0]}

    batch = StatesCollator(DataCollatorWithPadding(Tokenizer()), trunk)(dataset.to_list())
    batch.pop("attention_mask", None)  # the sequences have one length
    return rest, batch, sum(len(row["states"]) for row in dataset)


def counted_step(rest, batch, labels):
    """Run the second of two real steps; return its peak and its FLOPs."""
    trainable = [p for p in rest.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, fused=True)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    flops = []
    tracker = AllocationTracker(observer=lambda *operation: flops.append(flops_of(*operation)))
    tracker.hold([*model_tensors(rest), *tensors_in(optimizer.state), *batch.values(), labels], "other")
    with tracker:
        logits = rest.train()(**batch).logits
        loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
        del logits
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(trainable, 1.0, foreach=False)
        optimizer.step()
    return tracker.peak.total, sum(flops)


@pytest.mark.parametrize(
    ("kind", "name"),
    slow_except(
        [*((None, name) for name in CACHED), (EsmForTokenClassification, "head")],
        (None, "lora"),
        (None, "checkpointing"),
        (None, "mean"),
    ),
)
def test_the_estimated_step_is_the_step_that_runs_on_cached_states(kind, name, tmp_path):
    recipe = CACHED[name]
    model = wide_model(kind, classifier_pooling=recipe.pooling)
    top = len(recipe.trained_layers(LAYERS))
    total = sum(parameter.numel() for parameter in model.parameters())
    pooled = top == 0 and kind is None and recipe.pooling != "attention"
    pooling = recipe.pooling if pooled else "tokens"
    rest, batch, on_disk = cached_batch(model, top, pooling, tmp_path)
    prepared = prepare_model(
        rest,
        adapters=recipe_adapters(recipe, rest),
        head_only=recipe.trains == "head",
        layers=recipe.layers,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    apply_lean_encoder(prepared)
    labels = torch.zeros(ROWS, *([] if kind is None else [TOKENS]), dtype=torch.int64)
    peak, flops = counted_step(prepared, batch, labels)

    result = estimate(
        model,
        recipe=recipe,
        device="cpu",
        micro_batch=ROWS,
        tokens=TOKENS,
        sequences=ROWS,
        head="sequence-classification" if kind is None else "token-classification",
    )
    assert sum(cost.flops for cost in result.phases.values()) == flops
    assert max(cost.peak.total for cost in result.phases.values()) == pytest.approx(peak, rel=0.005)
    assert result.trainable_parameters == sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    adapters = sum(p.numel() for name, p in prepared.named_parameters() if "lora_" in name)
    copied_head = sum(p.numel() for name, p in prepared.named_parameters() if "modules_to_save" in name)
    assert result.total_parameters == total + adapters + copied_head
    assert (result.cache.bytes, result.cache.layers) == (on_disk, LAYERS - top)
    assert result.cache.stored.pooling == pooling


def test_the_pass_that_computes_the_states_is_counted_as_it_runs():
    trunk, _ = split_model(wide_model(), 2)
    flops = []
    tracker = AllocationTracker(observer=lambda *operation: flops.append(flops_of(*operation)))
    tracker.hold(model_tensors(trunk), "weights")
    with tracker:
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
        trunk(ids)
    recipe = CACHED["lora"]
    result = estimate(wide_model(), recipe=recipe, device="cpu", tokens=TOKENS, sequences=ROWS)
    assert result.cache.peak.total == pytest.approx(tracker.peak.total, rel=0.005)
    without = estimate(wide_model(), recipe=recipe.replace(cache=False), device="cpu", tokens=TOKENS, micro_batch=ROWS)
    with_it = estimate(wide_model(), recipe=recipe, device="cpu", tokens=TOKENS, micro_batch=ROWS)
    saved = sum(a.flops - b.flops for a, b in zip(without.phases.values(), with_it.phases.values(), strict=True))
    assert saved == sum(flops)


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "frozen"},
        pytest.param({"recipe": CACHED["lora"], "device": "T4", "precision": "fp16"}, marks=pytest.mark.slow),
        pytest.param({"recipe": RECIPES["lora"].replace(layers="top-4")}, marks=pytest.mark.slow),
        pytest.param({"recipe": RECIPES["gc"].replace(layers="top-6", cache=True)}, marks=pytest.mark.slow),
        pytest.param(
            {"recipe": RECIPES["base"].replace(layers="top-6", micro_batch=3), "padding": "padded"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"recipe": RECIPES["base"].replace(layers=(1, 6, 7), cache=True)}, marks=pytest.mark.slow),
    ],
    ids=lambda options: f"{getattr(options['recipe'], 'layers', 'head')}",
)
def test_extrapolated_figures_equal_those_of_all_layers(options):
    config = wide_model().config
    config.num_hidden_layers = 8
    short, full = (estimate(config, tokens=60, extrapolate=extrapolate, **options) for extrapolate in (True, False))
    assert (short.peak_phase, short.total_parameters) == (full.peak_phase, full.total_parameters)
    for phase, cost in full.phases.items():
        assert short.phases[phase].peak.total == pytest.approx(cost.peak.total, abs=512)
        assert (short.phases[phase].flops, short.phases[phase].kernels) == (cost.flops, cost.kernels)
    assert [(point.phase, point.part) for point in short.timeline] == [(p.phase, p.part) for p in full.timeline]
    assert (short.cache is None) == (full.cache is None)
    if full.cache is not None:
        assert short.cache.peak == full.cache.peak
        assert short.cache.seconds == pytest.approx(full.cache.seconds)
        assert short.cache.epoch_seconds_without == pytest.approx(full.cache.epoch_seconds_without)


def test_the_disk_is_that_of_the_given_lengths():
    config, width = tiny_config(num_hidden_layers=3), 16
    frozen = RECIPES["frozen"].replace(pooling="first")
    one = estimate(config, recipe=frozen, tokens=100)
    assert (one.sequences, one.cache.bytes) == (15_876, 15_876 * (width * 2 + 1))  # bf16, the first token, the format
    lora = RECIPES["lora"].replace(layers="top-1/3", cache=True)
    data = DatasetDict(
        train=Dataset.from_dict({"residues": [8, 28]}), validation=Dataset.from_dict({"residues": [18, 18, 18]})
    )
    many = estimate(config, recipe=lora, tokens=data, precision="float32")
    assert (many.sequences, many.cache.sequences) == (2, 5)
    assert many.cache.bytes == (10 + 30 + 3 * 20) * width * 4 + 5
    sample = estimate(config, recipe=lora, tokens=[10, 30], sequences=1000, precision="float32")
    assert sample.cache.bytes == 500 * ((10 + 30) * width * 4 + 2)
    assert sample.cache.bytes == data_lengths([10, 30], 1000).total(
        lambda tokens: StateFormat("float32").bytes_for(tokens, width)
    )


def test_the_text_and_json_say_what_the_cache_costs_and_when_it_pays():
    recipe = RECIPES["lora"].replace(layers="top-1/3", cache=True)
    result = estimate("35M", recipe=recipe, tokens=200, sequences=1000, accumulation=2)
    cache = result.cache
    without = estimate("35M", recipe=recipe.replace(cache=False), tokens=200, accumulation=2)
    assert cache.epoch_seconds == pytest.approx(63 * result.seconds)  # 1,000 sequences in steps of 16
    assert cache.epoch_seconds_without == pytest.approx(63 * without.seconds)
    epochs = cache.pays_after
    assert cache.seconds + epochs * cache.epoch_seconds == pytest.approx(epochs * cache.epoch_seconds_without)
    assert result.run_seconds(10) == pytest.approx(cache.seconds + 10 * result.seconds)
    record = json.loads(json.dumps(result.to_dict()))["cache"]
    assert (record["bytes"], record["seconds"], record["layers"]) == (cache.bytes, cache.seconds, 8)
    assert record["pays_after_epochs"] == pytest.approx(epochs)
    for text in ("cache: 183 MiB on disk", "after 8 layers", f"the cache pays after {epochs:.2g} epochs"):
        assert text in str(result)
    assert json.loads(json.dumps(without.to_dict()))["cache"] is None
    assert "cache" not in str(without)


@pytest.mark.parametrize(("given", "is_assumed"), [({"tokens": 64}, True), ({"tokens": [64, 70]}, False)])
def test_a_number_of_sequences_that_nobody_gave_is_said_to_be_assumed(given, is_assumed):
    advice = "give sequences=N"
    config = tiny_config()
    assert (advice in str(estimate(config, recipe="frozen", **given).cache)) == is_assumed
    assert advice not in str(estimate(config, recipe="frozen", sequences=15_876, **given).cache)


def test_a_cache_that_saves_nothing_never_pays_and_a_cpu_has_no_times(monkeypatch):
    config = tiny_config()
    cache = estimate(config, recipe=CACHED["all"], tokens=64, sequences=100).cache
    slower = dataclasses.replace(cache, epoch_seconds=2.0, epoch_seconds_without=1.9)
    assert (cache.layers, slower.pays_after, slower.to_dict()["pays_after_epochs"]) == (0, math.inf, None)
    assert "it never pays" in str(slower)
    monkeypatch.delattr("esm_efficient.estimation.caching.simulate_model")  # only times need it
    on_cpu = estimate(config, recipe="frozen", tokens=64, device="cpu")
    assert math.isnan(on_cpu.cache.seconds)
    assert math.isnan(on_cpu.cache.pays_after)
    assert on_cpu.to_dict()["cache"]["pays_after_epochs"] is None
    assert "on disk" in str(on_cpu)


def test_the_pass_that_computes_the_states_can_need_the_most_memory():
    result = estimate("150M", recipe="frozen", tokens=512, device="T4", precision="float32")
    assert result.peak_phase == "caching"
    assert result.peak == result.cache.peak
    assert result.peak.weights > 140e6 * 4
    assert max(cost.peak.total for cost in result.phases.values()) < result.peak.total / 10
    assert "caching" in str(result)


def test_a_model_with_dropout_is_estimated_without_the_cache():
    model = make_model(num_hidden_layers=3, hidden_dropout_prob=0.1)
    result = estimate(model, recipe="frozen", tokens=16)
    assert result.cache is None
    assert result.peak == estimate(model, recipe=RECIPES["frozen"].replace(cache=False), tokens=16).peak
