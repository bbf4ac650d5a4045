"""The lean encoder against the plain model: loss, gradient and saved memory."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import statistics

import pytest
import torch
from conftest import each_value, make_model, slow_except
from lean_models import (
    HEADS,
    RECOMPUTES,
    AttentionPooling,
    build,
    distance,
    gradient_of,
    loss_of,
    make_batch,
    nodes_of,
    nothing_runs_without_fusion,
)
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    EsmForMaskedLM,
    EsmForTokenClassification,
    EsmModel,
)
from transformers.models.esm import modeling_esm

from esm_efficient import apply_lean_encoder, lora_config, prepare_model, remove_lean_encoder
from esm_efficient.encoder.low_rank import Adapter, dropout_mask
from esm_efficient.encoder.plan import plan_as

TRAINS = ("full", "qkv", "attention", "mlp", "all-linear", "head")
BATCHES = {"padded": [9, 5, 2, 9, 30], "of one length": [7, 7, 7], "of one": [11], "of special tokens": [2, 2, 6]}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
SEEDS, LARGEST_RATIO = 20, 1.3
"""Number of seeds, and the largest mean ratio of the lean encoder's error to the plain model's in half precision.

The ratio of a single seed varies by a factor of 1.5 around 1; the geometric mean over all seeds varies by 1.1.
"""


@contextlib.contextmanager
def exact_rotary(monkeypatch, dtype):
    """Make the plain model rotate in float64 if it is in float64; transformers 5.23 always rotates in float32."""
    with monkeypatch.context() as patch:
        if dtype == torch.float64 and hasattr(modeling_esm, "EsmRotaryEmbedding"):

            def rotate(q, k, cos, sin, unsqueeze_dim=1):
                cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
                return tuple(x * cos + modeling_esm.rotate_half(x) * sin for x in (q, k))

            patch.setattr(modeling_esm, "apply_rotary_pos_emb", rotate)
        yield


PLANS = ("cpu", "cuda")


@pytest.fixture(params=PLANS)
def plan(request):
    """Compute as on a CPU, or as on a GPU."""
    with plan_as(request.param):
        yield request.param


@pytest.fixture(params=slow_except([False, True], False), ids=["eager", "fused"])
def fused(request, caplog):
    """Compute without and with fusion, of which test_fusion.py has a quick case."""
    with nothing_runs_without_fusion(caplog):
        yield request.param


def name_of(value):
    return getattr(value, "__name__", str(value))


# Without a bare model's and a masked model's head: the one has none, and the other's matrix is that of the embeddings.
TRAINED = [
    (head, trains)
    for head, trains in itertools.product(HEADS, TRAINS)
    if not (head in (EsmModel, EsmForMaskedLM) and trains == "head")
    and not (head is EsmModel and trains not in ("full", "all-linear"))  # which layers train is tested with the heads
]


def take_turns(head, trains, turn):
    """Return a case; over the heads and what trains, all pairs of a type and a plan take turns."""
    dtype = HEADS.index(head) + (trains in ("qkv", "all-linear")) + turn
    plan = HEADS.index(head) % 3 + TRAINS.index(trains) // 3 + turn
    return head, trains, (*LIMITS,)[dtype % 2], PLANS[plan % 2]


# Every head with everything that trains, in two cases that have both types and both plans.
QUICK, OTHERS = ([take_turns(*pair, turn) for pair in TRAINED] for turn in range(2))


@pytest.mark.parametrize(
    ("head", "trains", "dtype", "plan"),
    slow_except([*QUICK, *OTHERS], *QUICK),
    indirect=["plan"],
    ids=name_of,
)
@pytest.mark.usefixtures("plan")
def test_loss_and_gradient_equal_those_of_the_plain_model(head, trains, dtype, fused, monkeypatch):
    model = build(head, trains, dtype=dtype)
    for lengths in BATCHES.values():
        batch = make_batch(lengths)
        with exact_rotary(monkeypatch, dtype):
            loss, gradient = gradient_of(remove_lean_encoder(model), batch)
        for recompute in RECOMPUTES:
            found, found_gradient = gradient_of(apply_lean_encoder(model, recompute=recompute, fused=fused), batch)
            # A loss near 0 is a small difference between large numbers.
            assert found == pytest.approx(loss, rel=LIMITS[dtype], abs=1e-3 * LIMITS[dtype])
            assert distance(found_gradient, gradient) < LIMITS[dtype], (lengths, recompute)


@pytest.mark.parametrize("trains", ["full", "all-linear"])
def test_sequences_of_one_token_up_to_the_maximum_have_the_gradient_of_the_plain_model(trains, fused):
    model = build(trains=trains, num_hidden_layers=2)
    for lengths in ([1], [1, 2, 3], [1022 + 2, 1, 515], [1024]):
        batch = make_batch(lengths)
        loss, gradient = gradient_of(remove_lean_encoder(model), batch)
        for recompute in RECOMPUTES:
            found, found_gradient = gradient_of(apply_lean_encoder(model, recompute=recompute, fused=fused), batch)
            assert found == pytest.approx(loss, rel=1e-5)
            assert distance(found_gradient, gradient) < 1e-5


VALUES = (
    *([EsmForTokenClassification, AttentionPooling], ["full", "all-linear"]),
    *([None, torch.bfloat16, torch.float16], PLANS),
)
# Every second combination, so that each pair of values is there.
HALF_PRECISION = [
    tuple(values[place] for values, place in zip(VALUES, places, strict=True))
    for places in itertools.product(*(range(len(values)) for values in VALUES))
    if sum(places) % 2 == 0
]


@pytest.mark.parametrize(
    ("head", "trains", "autocast", "plan"),
    slow_except(
        HALF_PRECISION,  # the quick ones have each value
        (EsmForTokenClassification, "full", None, "cpu"),
        (AttentionPooling, "all-linear", torch.bfloat16, "cuda"),
        (EsmForTokenClassification, "all-linear", torch.float16, "cuda"),
    ),
    indirect=["plan"],
    ids=name_of,
)
@pytest.mark.usefixtures("plan")
def test_the_error_in_half_precision_is_not_larger_than_the_plain_models(head, trains, autocast, fused):
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
            lean = distance(gradient_of(apply_lean_encoder(model, fused=fused), batch)[1], truth)
        ratios.append(lean / plain)
    assert statistics.geometric_mean(ratios) < LARGEST_RATIO, ratios


@pytest.mark.parametrize(("recompute", "plan"), each_value(["none", "layer"], PLANS), indirect=["plan"])
@pytest.mark.usefixtures("plan")
def test_a_bfloat16_base_with_float32_adapters_is_as_exact_as_the_plain_model(recompute, fused):
    ratios = []
    for seed in range(SEEDS):
        batch = make_batch([40, 9, 33], seed=seed)
        model = build(seed=seed)
        truth = gradient_of(model, batch)[1]
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or "classifier" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        plain = distance(gradient_of(model, batch)[1], truth)
        lean = distance(gradient_of(apply_lean_encoder(model, recompute=recompute, fused=fused), batch)[1], truth)
        ratios.append(lean / plain)
    assert statistics.geometric_mean(ratios) < LARGEST_RATIO, ratios


@pytest.mark.slow
def test_two_hundred_training_steps_give_the_weights_of_the_plain_model():
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
@pytest.mark.usefixtures("plan")
def test_lora_dropout_uses_the_masks_of_its_seeds_in_forward_and_backward(recompute, monkeypatch):
    model = build(adapters=None, trains="all-linear", dtype=torch.float64)  # float64, because the loss may be near zero
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "default" in module and isinstance(module["default"], nn.Identity):
            module["default"] = nn.Dropout(0.4)
    batch = make_batch([13])  # one sequence, so that packed and padded tokens are the same
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
    # After keys and values, the last layer computes only the first token, so its masks have one row.
    last = model.base_model.model.esm.encoder.layer[-1]
    for part in (last.attention.self.query, last.attention.output.dense, last.intermediate.dense, last.output.dense):
        part.lora_dropout["default"].last = True
    expected, expected_gradient = gradient_of(model, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(gradient, expected_gradient) < 1e-5
    model.eval()
    assert torch.equal(*(model(**batch).logits for _ in range(2)))


class SeededDropout(nn.Module):
    """Dropout for the plain model with the masks that the lean encoder draws from the same seed."""

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
def test_every_option_of_lora_has_the_gradient_of_the_plain_model(options):
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


def test_unknown_adapters_run_their_own_forward_without_padding_and_are_logged(caplog):
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


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_a_hook_of_a_parameter_is_called_once_with_its_gradient(recompute):
    model = apply_lean_encoder(build(), recompute=recompute)
    batch, calls = make_batch([9, 5]), []
    _, expected = gradient_of(model, batch)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: calls.append(name) or 0.1 * gradient)
    for _ in range(2):
        calls.clear()
        _, found = gradient_of(model, batch)
        assert sorted(calls) == sorted(expected)
        assert distance(found, {name: 0.1 * gradient for name, gradient in expected.items()}) < 1e-6


def test_a_layer_without_trainable_parameters_can_be_recomputed():
    model = apply_lean_encoder(build(), recompute="layer")
    model.merge_adapter()
    loss, gradient = gradient_of(model, make_batch([9, 5]))
    assert gradient.keys() == {name for name, p in model.named_parameters() if "classifier.modules_to_save" in name}
    assert loss > 0


@pytest.mark.parametrize("hidden", [0.3, 0.0])
def test_a_recomputed_layer_draws_the_same_dropout_again(hidden, caplog):
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


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_a_recomputed_layer_draws_the_same_monte_carlo_dropout_again(recompute):
    """Single modules are in training mode, and the model is in evaluation mode."""
    model = build(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout | type(model.base_model.model.esm.encoder.layer[0].attention.self)):
            module.train()
    batch = make_batch([9, 5, 12])
    torch.manual_seed(3)
    loss, gradient = gradient_of(apply_lean_encoder(model, recompute="none"), batch)
    torch.manual_seed(3)
    found, found_gradient = gradient_of(apply_lean_encoder(model, recompute=recompute), batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert distance(found_gradient, gradient) < 1e-6
    torch.manual_seed(4)
    assert gradient_of(model, batch)[0] != pytest.approx(loss, rel=1e-3)


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


def test_the_last_layer_computes_only_what_the_first_token_needs():
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


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_a_backward_pass_inside_of_autocast_has_the_gradient_of_one_outside(recompute):
    batch, gradients = make_batch([12, 9]), []
    model = apply_lean_encoder(build(trains="all-linear"), recompute=recompute)
    for enabled in (False, True):
        model.zero_grad()
        loss = loss_of(model, batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    # The head, which is torch's own, computes in bfloat16.
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-2


def test_with_adapters_the_last_layer_computes_what_the_first_token_needs():
    """Also with releases of peft that call the forward of the model, which runs no hook of it."""
    batch = make_batch([40, 40, 40])
    flops = {}
    for trains in ("head", "all-linear"):
        model = apply_lean_encoder(build(trains=trains, num_hidden_layers=3))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch)
        flops[trains] = counter.get_total_flops()
    assert flops["head"] < flops["all-linear"] < 1.1 * flops["head"]  # 1.3 with all tokens in the last layer


@pytest.mark.parametrize(("recompute", "widths"), [("none", 10), ("mlp", 6), ("layer", 1)])
def test_saved_memory_is_ten_times_the_width_and_less_with_recomputation(recompute, widths):
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
        parameters.clear()  # those of the model before are freed, and activations may have their addresses
        parameters.update(p.untyped_storage().data_ptr() for p in model.parameters())
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = loss_of(model, batch)
        per_layer.append(sum(kept.values()))
        del loss
    numbers = (per_layer[1] - per_layer[0]) / 2 / 4 / int(batch["attention_mask"].sum()) / 64
    # Attention also saves one number per head and token, the logarithm of the sum of its weights.
    assert 0.99 * widths < numbers < widths + 0.1


def test_memory_of_prediction_does_not_grow_with_the_number_of_layers():
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


def test_a_backward_pass_needs_room_for_few_numbers_per_token_beside_what_was_saved():
    from esm_efficient.costs.allocations import AllocationTracker

    # Eight chunks, so that what is as large as a chunk is small against what is as large as the batch.
    batch = make_batch([512] * 8)
    model = build(num_hidden_layers=3, hidden_size=64, intermediate_size=256, trains="all-linear")
    apply_lean_encoder(model)
    with AllocationTracker() as tracker:
        loss = loss_of(model, batch)
        saved = tracker.current.total
        tracker.reset_peak()
        loss.backward()
    numbers = (tracker.peak.total - saved) / 4 / int(batch["attention_mask"].sum()) / 64
    assert numbers < 1.7  # one more tensor of (tokens, width) at the peak would be 2.5
