"""One layer of ESM-2 650M runs few kernels on a GPU and moves few bytes; see `counting`."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from conftest import make_model
from counting import KernelCounter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from esm_efficient import lora_config, prepare_model
from esm_efficient.adapters.registry import encoder_layers
from esm_efficient.encoder.attention import use_attention
from esm_efficient.encoder.layer import run_layer
from esm_efficient.encoder.packing import Packing
from esm_efficient.encoder.plan import plan_as
from esm_efficient.estimation.kernels import packed_attention

WIDTH, HEADS = 1280, 20
LENGTHS = (102, 187, 251, 306, 344, 369, 401, 504)
"""Tokens of 8 sequences, 308 on average."""


def make_layers(number, trains):
    """Return layers of 650M: with LoRA on a frozen base in bf16, or with float32 weights that all train."""
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
    with torch.device("meta"):
        model = make_model(num_hidden_layers=number, **sizes)
        if trains == "lora":
            model = prepare_model(model, adapters=lora_config(model, preset="all-linear"), dtype=torch.bfloat16)
    return [layer.train() for layer in encoder_layers(model)]


def make_fake(layer):
    """Replace a layer's parameters by fake tensors on the CPU; modules cannot convert fake parameters themselves."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))


@contextmanager
def layers_of_650m(number, trains, *, fused=False):
    """Play a GPU under fake tensors; yield layers, and a function that runs them."""
    layers = make_layers(number, trains)
    with FakeTensorMode(), use_attention(packed_attention), plan_as("cuda"):
        for layer in layers:
            make_fake(layer)
        rotation = torch.empty(sum(LENGTHS), 1, WIDTH // HEADS // 2, dtype=torch.complex64)
        packing = Packing((len(LENGTHS), max(LENGTHS)), LENGTHS, rotation=rotation)
        dtype = torch.bfloat16 if trains == "lora" else torch.float32

        def run(recompute):
            states = torch.empty(sum(LENGTHS), WIDTH, dtype=dtype, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                for layer in layers:
                    options = {"recompute": recompute, "backend": "auto", "first_only": False, "fused": fused}
                    states, reasons = run_layer(layer, states, packing, **options)
                    assert not reasons
            return states

        yield layers, run


def count(number, trains, recompute, fused):
    """Return what a forward and a backward pass through some layers count."""
    forward, backward = KernelCounter(), KernelCounter()
    with layers_of_650m(number, trains, fused=fused) as (layers, run):
        with forward:
            states = run(recompute)
        gradient = torch.empty_like(states)
        with backward:
            torch.autograd.backward(states, gradient)
        assert all(p.grad is not None for layer in layers for p in layer.parameters() if p.requires_grad)
    return forward, backward


@pytest.mark.parametrize(
    ("trains", "recompute", "fused", "forward", "backward", "elementwise", "megabytes"),
    [
        ("lora", "none", False, 26, 49, 27, 599),
        ("lora", "none", True, 24, 40, 16, 345),
        ("lora", "layer", False, 26, 68, 32, 757),
        ("lora", "layer", True, 24, 57, 19, 402),
        ("full", "none", False, 20, 46, 46, 1310),
        ("full", "none", True, 16, 33, 29, 880),
        ("full", "layer", False, 20, 60, 54, 1552),
        ("full", "layer", True, 16, 44, 34, 995),
    ],
)
def test_a_layer_runs_few_kernels_and_moves_few_bytes(
    trains, recompute, fused, forward, backward, elementwise, megabytes
):
    two, three = (count(number, trains, recompute, fused) for number in (2, 3))
    kernels = [third.total - second.total for second, third in zip(two, three, strict=True)]
    small = sum(third.elementwise - second.elementwise for second, third in zip(two, three, strict=True))
    moved = sum(third.moved - second.moved for second, third in zip(two, three, strict=True)) / 1e6
    assert kernels == [forward, backward]
    assert small == elementwise
    assert megabytes - 1 < moved <= megabytes


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("trains", "numbers"), [("lora", 20), ("full", 24)])
def test_a_layer_keeps_few_bytes_per_token_and_width(trains, numbers, fused):
    """With LoRA ten numbers in bf16; in full fine-tuning the sums before and after attention are in float32."""

    def kept(number):
        sizes = {}
        with layers_of_650m(number, trains, fused=fused) as (layers, run):
            weights = {p.untyped_storage()._cdata for layer in layers for p in layer.parameters()}

            def pack(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    sizes[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                states = run("none")
            del states
        return sum(sizes.values())

    # The logsumexp of attention is one number in float32 per head and token.
    assert (kept(3) - kept(2)) / sum(LENGTHS) == pytest.approx(numbers * WIDTH + 4 * HEADS, rel=1e-3)
