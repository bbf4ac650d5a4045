"""Frozen weights under autocast: never a stale copy, and advice where every pass converts them."""

from __future__ import annotations

import logging

import pytest
import torch
from lean_models import build, distance, gradient_of, make_batch
from torch import nn

from esm_efficient import apply_lean_encoder, remove_lean_encoder
from esm_efficient.encoder.plan import plan_as
from esm_efficient.encoder.reading import CONVERSION_ADVICE

ADVICE = CONVERSION_ADVICE[:60]


def frozen(model):
    return [p for p in model.base_model.model.esm.encoder.parameters() if not p.requires_grad and p.dim() == 2]


def change_in_place(model):
    for weight in frozen(model):
        weight.data.mul_(1.5)


def change_storage(model):
    for weight in frozen(model):
        weight.data = weight.data * 1.5


def load(model):
    names = {id(weight) for weight in frozen(model)}
    new = {name: 1.5 * value for name, value in model.named_parameters() if id(value) in names}
    model.load_state_dict(new, strict=False)


def move(model):
    model.to("meta")
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.2, generator=generator)


def replace(model):
    for layer in model.base_model.model.esm.encoder.layer:
        base = layer.output.dense.base_layer
        layer.output.dense.base_layer = nn.Linear(base.in_features, base.out_features).requires_grad_(False)


def merge(model):
    model.merge_adapter()


def merge_and_unmerge(model):
    model.merge_adapter()
    change_in_place(model)
    model.unmerge_adapter()


@pytest.mark.parametrize("change", [change_in_place, change_storage, load, move, replace, merge, merge_and_unmerge])
@pytest.mark.parametrize("plan", ["cpu", "cuda"])
def test_weights_that_change_between_two_passes_are_never_stale(change, plan):
    torch.manual_seed(0)
    batch = make_batch([9, 5, 30])
    model = build()

    def measure(chosen):
        with torch.autocast("cpu", torch.bfloat16), plan_as(plan):
            return gradient_of(chosen(model), batch)

    _, before = measure(apply_lean_encoder)
    change(model)
    loss, gradient = measure(apply_lean_encoder)
    expected, expected_gradient = measure(remove_lean_encoder)
    assert loss == pytest.approx(expected, rel=0.05)
    assert distance(gradient, expected_gradient) < 0.05
    if change is not merge:  # which trains only the head
        assert distance(before, expected_gradient) > 0.2


@pytest.mark.parametrize(
    ("trains", "held", "autocast", "training", "advised"),
    [
        ("all-linear", torch.float32, True, True, True),
        ("qkv", torch.float32, True, True, True),
        ("all-linear", torch.bfloat16, True, True, False),
        ("all-linear", torch.float32, False, True, False),
        ("all-linear", torch.float32, True, False, False),
        ("full", torch.float32, True, True, False),
    ],
)
def test_training_on_frozen_float32_weights_under_autocast_is_advised_against_once(
    trains, held, autocast, training, advised, caplog
):
    model = apply_lean_encoder(build(trains=trains)).train(training)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(held)
    with caplog.at_level(logging.INFO, "esm_efficient"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(2):
            model(**make_batch([9, 5]))
    assert sum(message.startswith(ADVICE) for message in caplog.messages) == advised
    assert not advised or "prepare_model(dtype=torch.bfloat16)" in caplog.text
