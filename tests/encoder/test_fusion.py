"""Compiled elementwise functions against the functions themselves, and the lean encoder with fusion."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from conftest import slow_except
from counting import KernelCounter
from lean_models import build, distance, gradient_of, make_batch, nothing_runs_without_fusion
from torch._dynamo.utils import counters
from torch._inductor import config
from transformers import EsmModel

from esm_efficient import apply_lean_encoder, estimate
from esm_efficient.encoder.elementwise import EAGER, Elementwise, norm
from esm_efficient.encoder.fusion import FUSED, Compiled
from esm_efficient.encoder.plan import plan_as

TOKENS, WIDTH, HEADS = 37, 48, 4


def draw(dtype, *shape):
    return torch.randn(*shape).to(dtype)


def arguments_of(name, dtype, tokens=TOKENS):
    """Return arguments of a function; the weights of layer norms are in float32, as in full fine-tuning."""
    torch.manual_seed(tokens)
    x, other, gradient, weight, bias = (draw(dtype, *shape) for shape in [(tokens, WIDTH)] * 3 + [(WIDTH,)] * 2)
    if name == "norm":
        return [x, weight, bias, 1e-5, dtype]
    if name == "norm_backward":
        _, mean, deviation = norm(x, weight, bias, 1e-5, dtype)
        return [gradient, x, mean, deviation, weight, bias, other, torch.empty_like(x), True, True]
    if name == "gelu_backward":
        return [gradient, x]
    rotation = torch.view_as_real(torch.polar(torch.ones(tokens, WIDTH // 8), torch.randn(tokens, WIDTH // 8)))
    states = [draw(dtype, 2, tokens, HEADS, WIDTH // HEADS), draw(dtype, tokens, HEADS, WIDTH // HEADS)]
    return [states, rotation.contiguous(), True]


def results_of(function, arguments):
    """Return what a function returns and what it wrote, as one vector."""
    arguments = copy.deepcopy(arguments)
    found = function(*arguments)
    tensors = [*(found if isinstance(found, (list, tuple)) else [found]), *filter(torch.is_tensor, arguments)]
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def widened(value):
    """Return the same numbers in float64."""
    if isinstance(value, list):
        return [widened(part) for part in value]
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if torch.is_tensor(value) else value


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def compiled(caplog):
    with nothing_runs_without_fusion(caplog):
        yield


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_except(
        [(name, dtype) for name in Elementwise._fields for dtype in (torch.float32, torch.bfloat16)],
        *[("rotate", torch.float32), ("norm_backward", torch.bfloat16), ("gelu_backward", torch.bfloat16)],
    ),
)
def test_a_compiled_function_is_as_exact_as_the_function_itself(name, dtype):
    arguments = arguments_of(name, dtype)
    truth = results_of(getattr(EAGER, name), widened(arguments))
    with torch.no_grad():
        fused, eager = (relative_error(results_of(getattr(f, name), arguments), truth) for f in (FUSED, EAGER))
    assert fused <= max(1.05 * eager, 1e-7), (fused, eager)
    assert eager > 0


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("plan", "trains", "recompute"),
    slow_except(
        [(p, t, r) for p in ("cpu", "cuda") for t in ("all-linear", "full") for r in ("none", "mlp", "layer")],
        ("cpu", "all-linear", "none"),
    ),
)
def test_twenty_batches_have_the_gradient_of_the_plain_model_and_compile_nothing_new(plan, trains, recompute):
    model = build(EsmModel, trains, num_hidden_layers=2)
    lean = apply_lean_encoder(copy.deepcopy(model), recompute=recompute, fused=True)
    with plan_as(plan):
        for lengths in ([9, 5, 17], [3, 9, 8]):  # torch may learn from the second that a size varies
            gradient_of(lean, make_batch(lengths))
        before = graphs()
        for number in range(20):
            batch = make_batch([2 + number, 9, 5 + 3 * number], seed=number)
            loss, gradient = gradient_of(model, batch)
            found, found_gradient = gradient_of(lean, batch)
            assert found == pytest.approx(loss, rel=1e-5)
            assert distance(found_gradient, gradient) < 1e-5
    assert graphs() == before > 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_modes_that_see_operations_see_each_compiled_function_as_one():
    model = apply_lean_encoder(build(EsmModel, "full", num_hidden_layers=2), fused=True)
    batch = make_batch([9, 5, 17])
    expected, gradient = gradient_of(model, batch)
    before = graphs()
    with KernelCounter() as counter:
        found, found_gradient = gradient_of(model, batch)
    assert found == pytest.approx(expected, rel=1e-6)  # another compilation may sum in another order
    assert distance(found_gradient, gradient) < 1e-6
    assert graphs() > before  # under a mode too they are compiled
    seen = {name: counter.kernels[name] for name in Elementwise._fields}
    assert seen == {"norm": 8, "norm_backward": 4, "gelu_backward": 2, "rotate": 0}


def test_copies_keep_the_fusion():
    model = apply_lean_encoder(build(EsmModel, "full"), fused=True)
    assert copy.deepcopy(model)._lean_state.fused
    assert not apply_lean_encoder(model)._lean_state.fused


def test_the_estimate_counts_fewer_kernels_and_bytes_with_fusion():
    plain, fused = (estimate("8M", recipe="lora", device="A10G", tokens=200, fused=fused) for fused in (False, True))
    for phase in ("forward", "backward"):
        assert fused.phases[phase].kernels < plain.phases[phase].kernels
        assert fused.phases[phase].bytes_moved < plain.phases[phase].bytes_moved
    assert fused.phases["optimizer"] == plain.phases["optimizer"]
    assert fused.peak.total <= plain.peak.total


def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.sin() * weight * 1.25


def test_without_a_compiler_a_function_runs_as_it_is_and_the_log_says_so_once(caplog):
    function = Compiled(scaled)
    x, weight = torch.randn(5, 4), torch.randn(4)
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}), caplog.at_level(logging.INFO):
        for _ in range(3):
            assert torch.equal(function(x, weight), scaled(x, weight))
    messages = [record.getMessage() for record in caplog.records if "without fusion" in record.getMessage()]
    assert len(messages) == 1
    assert "scaled" in messages[0]
    assert "compiler" in messages[0]


def test_an_error_of_the_function_itself_is_raised():
    function = Compiled(scaled)
    with pytest.raises(RuntimeError, match="must match the size"):
        function(torch.randn(5, 4), torch.randn(3))
