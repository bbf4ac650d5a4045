"""The autograd Functions: their gradients, the memory that they save, and an error if differentiated twice."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from conftest import slow_except
from torch import nn
from torch.autograd import gradcheck

from esm_efficient.encoder import functions, plan
from esm_efficient.encoder.attention import SequenceAttention, attention_override, use_attention
from esm_efficient.encoder.elementwise import EAGER
from esm_efficient.encoder.functions import LinearResidual, Norm, NormLinears, NormMLP, mlp_residual
from esm_efficient.encoder.layer import RecomputedLayer
from esm_efficient.encoder.linear import Group
from esm_efficient.encoder.low_rank import Adapter
from esm_efficient.encoder.weights import Linear
from esm_efficient.errors import ConfigurationError

TOKENS, WIDTH, HEADS = 5, 4, 1


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_group(shapes, *, adapters=1, rotated=0, dropout=0.0, apart=False):
    linears = [
        Linear(
            draw(outputs, inputs),
            draw(outputs),
            tuple(Adapter(draw(2, inputs), draw(outputs, 2), 0.5, dropout, 7) for _ in range(adapters)),
        )
        for outputs, inputs in shapes
    ]
    return Group(linears, heads=HEADS, rotated=rotated, apart=apart)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("apart", "rotates", "dropout"),
    slow_except(
        itertools.product([True, False], [True, False], [0.0, 0.5]),
        (True, True, 0.0),
        (False, True, 0.5),
        (True, False, 0.5),
        (False, False, 0.0),
    ),
)
def test_the_gradient_of_norm_linears(dropout, rotates, apart):
    group = make_group([(WIDTH, WIDTH)] * 3, rotated=2, dropout=dropout, apart=apart)
    rotation = torch.polar(torch.ones(TOKENS, 1, 2), torch.randn(TOKENS, 1, 2)).to(torch.complex128)

    def run(x, weight, bias, *tensors):
        turned = rotation if rotates else None
        return NormLinears.apply(x, weight, bias, 1e-5, turned, False, EAGER, group.with_tensors(tensors), *tensors)

    assert gradcheck(run, (draw(TOKENS, WIDTH), draw(WIDTH), draw(WIDTH), *group.tensors))


def test_the_gradient_of_linear_residual():
    group = make_group([(WIDTH, WIDTH)])
    assert gradcheck(
        lambda inputs, residual, *tensors: LinearResidual.apply(
            inputs, residual, group.with_tensors(tensors), *tensors
        ),
        (draw(TOKENS, WIDTH), draw(TOKENS, WIDTH), *group.tensors),
    )


@pytest.mark.parametrize("mode", ["kept", "recomputed"])
def test_the_gradient_of_norm_mlp_in_chunks(mode, monkeypatch):
    monkeypatch.setattr(plan, "MIN_CHUNK_TOKENS", 2)  # two tokens per chunk
    up, down = make_group([(6, WIDTH)]), make_group([(WIDTH, 6)])

    def run(x, weight, bias, *tensors):
        groups = up.with_tensors(tensors[: len(up.tensors)]), down.with_tensors(tensors[len(up.tensors) :])
        return NormMLP.apply(x, weight, bias, 1e-5, mode, False, EAGER, *groups, *tensors)

    assert gradcheck(run, (draw(TOKENS, WIDTH), draw(WIDTH), draw(WIDTH), *up.tensors, *down.tensors))


@pytest.mark.parametrize("lengths", [(5,), (2, 3), (1, 2, 2)])
def test_the_gradient_of_sequence_attention(lengths):
    assert gradcheck(
        lambda states: SequenceAttention.apply(states, None, lengths, 0.5), (draw(TOKENS, 3, HEADS, WIDTH),)
    )
    assert gradcheck(
        lambda states, query: SequenceAttention.apply(states, query, lengths, 0.5),
        (draw(TOKENS, 2, HEADS, WIDTH), draw(len(lengths), 1, HEADS, WIDTH)),
    )


def test_the_gradient_of_a_recomputed_layer():
    weight = draw(WIDTH, WIDTH)
    assert gradcheck(
        lambda x, w: RecomputedLayer.apply(x, lambda states, *_: (states @ w).tanh(), False, w),
        (draw(TOKENS, WIDTH), weight),
    )


def test_a_recomputed_layer_uses_the_kernel_of_its_forward_pass():
    kernels = []

    def compute(states, keep, without_output):
        kernels.append(attention_override.kernel)
        return states.tanh()

    def kernel(query, key, value, cu_seqlens, scale):
        raise AssertionError("not called")

    with use_attention(kernel):
        result = RecomputedLayer.apply(draw(TOKENS, WIDTH), compute, False)
    result.sum().backward()
    assert kernels == [kernel, kernel]


@pytest.mark.parametrize("function", [NormLinears, NormMLP])
def test_arguments_of_the_layer_norm_come_first_and_parameters_last(function):
    """The backward passes split gradients by this order."""
    _, *arguments = inspect.signature(function.forward).parameters.values()
    first = arguments[: functions._NORM_ARGUMENTS]
    assert [argument.name for argument in first] == ["x", "weight", "bias"]
    assert arguments[-1].kind is inspect.Parameter.VAR_POSITIONAL


def test_an_mlp_without_output_has_the_same_gradient():
    up, down, norm = make_group([(6, WIDTH)]), make_group([(WIDTH, 6)]), nn.LayerNorm(WIDTH, dtype=torch.float64)
    module, norm = norm, Norm.of(norm)
    x, upstream = draw(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    tensors = [x, *up.tensors, *down.tensors, *module.parameters()]
    expected = torch.autograd.grad(mlp_residual(x, norm, up, down), tensors, upstream)
    states = mlp_residual(x, norm, up, down, keep=False, without_output=True)
    assert states.untyped_storage().nbytes() == 8
    for a, b in zip(torch.autograd.grad(states, tensors, upstream), expected, strict=True):
        assert torch.equal(a, b)


def test_dropout_differs_between_the_chunks_of_a_batch(monkeypatch):
    monkeypatch.setattr(plan, "MIN_CHUNK_TOKENS", 2)
    up, down, norm = make_group([(6, WIDTH)], dropout=0.5), make_group([(WIDTH, 6)], dropout=0.5), nn.LayerNorm(WIDTH)
    x = torch.randn(1, WIDTH, dtype=torch.float64).expand(16, WIDTH)
    chunks = mlp_residual(x, Norm.of(norm.double()), up, down).view(8, 2, WIDTH)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(chunks))


def test_gelu_of_torch_equals_gelu_of_transformers_up_to_rounding():
    from transformers.models.esm.modeling_esm import gelu

    x = torch.linspace(-6, 6, 10001)
    truth, rounding = gelu(x.double()), 3 * torch.finfo(torch.float32).eps * x.abs().clamp(min=1)
    for values in (gelu(x), nn.functional.gelu(x)):
        assert ((values - truth).abs() <= rounding).all()


@pytest.mark.parametrize("function", ["norm", "residual", "mlp", "attention", "layer"])
def test_differentiating_twice_is_refused(function):
    group, x = make_group([(WIDTH, WIDTH)]), draw(TOKENS, WIDTH)
    norm = Norm.of(nn.LayerNorm(WIDTH, dtype=torch.float64))
    result = {
        "norm": lambda: functions.norm_linears(x, norm, make_group([(WIDTH, WIDTH)]))[1],
        "residual": lambda: functions.linear_residual(x, x, group),
        "mlp": lambda: mlp_residual(x, norm, group, make_group([(WIDTH, WIDTH)])),
        "attention": lambda: SequenceAttention.apply(
            x.view(TOKENS, 1, 1, WIDTH).expand(-1, 3, -1, -1), None, (5,), 1.0
        ),
        "layer": lambda: RecomputedLayer.apply(x, lambda states, *_: states.tanh(), False),
    }[function]()
    with pytest.raises(ConfigurationError, match="differentiated twice"):
        torch.autograd.grad(result.sum(), x, create_graph=True)
