"""Groups of linear layers: outputs as their definition says, and gradients as autograd computes them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from esm_efficient.encoder.linear import Group
from esm_efficient.encoder.low_rank import Adapter, dropout_mask
from esm_efficient.encoder.weights import Linear

HEADS, WIDTH = 2, 8


def make_linear(*, outputs=WIDTH, bias=True, adapters=0, dropout=0.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)

    loras = tuple(Adapter(draw(3, WIDTH), draw(outputs, 3), 0.7, dropout, seed + n) for n in range(adapters))
    return Linear(draw(outputs, WIDTH), draw(outputs) if bias else None, loras)


def reference(linear, inputs):
    result = nn.functional.linear(inputs, linear.weight, linear.bias)
    for adapter in linear.adapters:
        mask = dropout_mask(inputs.shape, adapter, "cpu", inputs.dtype) if adapter.dropout else 1.0
        result = result + adapter.scale * (inputs * mask) @ adapter.a.t() @ adapter.b.t()
    return result


def in_group_order(states, rotated):
    """Interleave the two halves of each head, as a group orders the outputs of its rotated layers."""
    if not rotated:
        return states
    return states.view(-1, HEADS, 2, WIDTH // HEADS // 2).transpose(2, 3).reshape(states.shape)


# With 2 tokens, adapters are added to the outputs; with 60 tokens, they are added to the weights.
@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.parametrize(("adapters", "dropout"), [(0, 0.0), (1, 0.0), (2, 0.0), (1, 0.5)])
@pytest.mark.parametrize(("layers", "rotated", "bias"), [(1, 0, True), (3, 2, True), (2, 1, False)])
@pytest.mark.parametrize("apart", [False, True])
def test_a_group_has_the_outputs_and_gradients_of_its_layers(tokens, adapters, dropout, layers, rotated, bias, apart):
    linears = [make_linear(adapters=adapters, dropout=dropout, bias=bias, seed=10 * n) for n in range(layers)]
    group = Group(linears, heads=HEADS, rotated=rotated, apart=apart)
    inputs = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    interleaved = 0 if apart else rotated
    expected = torch.cat([in_group_order(reference(lin, inputs), n < interleaved) for n, lin in enumerate(linears)], 1)
    with torch.no_grad():
        found = group.forward(inputs)
        found = torch.cat(found.unbind(), 1) if apart else found
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)

    gradient = torch.randn_like(expected)
    tensors = group.tensors
    wanted = torch.autograd.grad(expected, [inputs, *tensors], gradient)
    gradients = gradient.split(WIDTH, 1) if apart else [gradient]
    grads = [None] * len(tensors)
    with torch.no_grad():
        to_inputs = group.backward(gradients, inputs, [True] * len(tensors), grads)
    for name, a, b in zip(itertools.count(), [to_inputs, *grads], wanted, strict=False):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11), name
    with torch.no_grad():  # as for a second chunk of the batch, whose gradient is added
        group.backward(gradients, inputs, [True] * len(tensors), grads)
    for a, b in zip(grads, wanted[1:], strict=True):
        assert torch.allclose(a, 2 * b, rtol=1e-11, atol=1e-11)


def test_adapters_are_added_to_the_weights_only_if_that_is_exact_and_less_work():
    def merges(tokens, **options):
        return Group([make_linear(adapters=1, **options)]).prepare(tokens).merged

    assert merges(60, dtype=torch.float32)
    assert not merges(2, dtype=torch.float32)
    assert not merges(60, dtype=torch.bfloat16)
    assert not merges(60, dropout=0.1)


def test_a_dropout_mask_has_mean_one_and_is_the_same_for_the_same_seed():
    adapter = make_linear(adapters=1, dropout=0.25).adapters[0]
    mask = dropout_mask((100, 100), adapter, "cpu", torch.float32)
    assert torch.equal(mask, dropout_mask((100, 100), adapter, "cpu", torch.float32))
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert mask.mean().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(mask, dropout_mask((100, 100), adapter._replace(seed=99), "cpu", torch.float32))


def test_only_the_needed_gradients_are_computed():
    group = Group([make_linear(adapters=1)])
    grads = [None] * 4
    inputs, gradient = torch.randn(4, WIDTH, dtype=torch.float64), torch.randn(4, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        assert group.backward([gradient], inputs, [False, True, False, True], grads, to_inputs=False) is None
    assert [grad is not None for grad in grads] == [False, True, False, True]
