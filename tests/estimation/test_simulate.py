"""simulate(): shared parameters stay shared, and every layer has its segments."""

from __future__ import annotations

import torch

from esm_efficient import RECIPES, get_device
from esm_efficient._torch import fake_tensor_mode
from esm_efficient.estimation.inputs import resolve_config
from esm_efficient.estimation.simulate import _make_fake, simulate
from esm_efficient.estimation.step import Step


def test_shared_parameters_stay_shared_under_fake_tensors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    names = set(model.state_dict())
    with fake_tensor_mode():
        _make_fake(model)
    assert model[1].weight is model[0].weight
    assert not model[1].bias.requires_grad
    assert set(model.state_dict()) == names
    assert all(type(tensor).__name__ != "Tensor" for tensor in model.buffers())


def test_every_layer_has_a_segment_forward_and_backward():
    step = Step(RECIPES["base"], tokens=8, device=get_device("cpu"))
    segments = simulate(resolve_config("8M")[1], step, layers=2).segments
    assert [(s.phase, s.part) for s in segments] == [
        ("forward", "embeddings"),
        ("forward", "layer 0"),
        ("forward", "layer 1"),
        ("forward", "head"),
        ("backward", "head"),
        ("backward", "layer 1"),
        ("backward", "layer 0"),
        ("backward", "embeddings"),
        ("optimizer", "step"),
    ]
