"""Flash attention of any package and version, played by functions with their signatures, and what is done without."""

from __future__ import annotations

import itertools
import logging
import types

import pytest
import torch
from torch.nn import functional as F

from esm_efficient.encoder import attention, flash
from esm_efficient.encoder.attention import choose_backend
from esm_efficient.errors import ConfigurationError

BOUNDS = torch.tensor([0, 2, 3, 8], dtype=torch.int32)
BOUNDARIES = BOUNDS, BOUNDS, 5, 5
MODULES = {package.name: package.module for package in flash.PACKAGES}


def reference(q, k, v, cu_q, cu_k, scale):
    parts = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        turned = (t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d]))
        parts.append(F.scaled_dot_product_attention(*turned, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)


def version_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert (max_seqlen_q, max_seqlen_k, dropout_p, causal) == (5, 5, 0.0, False)
    return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


def version_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert (max_seqlen_q, max_seqlen_k, seqused_q, causal) == (5, 5, None, False)
    return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), "logsumexp"


def version_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None,
    causal=False,
):  # fmt: skip
    assert (seqused_q, page_table, causal) == (None, None, False)
    return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), None


def of_vllm(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, softmax_scale=None):
    return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


def without_scale(q, k, v, cu_seqlens_q, cu_seqlens_k):
    raise AssertionError("not called")


PLAYED = {"flash-attn-3": version_3, "flash-attn-4": version_4, "flash-attn": version_2}


def clear():
    for cached in (flash._load, flash.hub_attention, choose_backend, attention._kernel_of):
        cached.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Play installed packages: by name a function, or what the import raises; all others are missing."""

    def play(packages):
        def load(module):
            found = next((played for name, played in packages.items() if MODULES.get(name, name) == module), None)
            if found is None:
                raise ModuleNotFoundError(f"No module named {module!r}")
            if isinstance(found, Exception):
                raise found
            return found if isinstance(found, types.SimpleNamespace) else types.SimpleNamespace(**found)

        def version(name):
            if name not in packages:
                raise flash.importlib.metadata.PackageNotFoundError(name)
            return "1"

        present = {MODULES.get(name, name) for name in packages}
        monkeypatch.setattr(flash.importlib, "import_module", load)
        monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name if name in present else None)
        monkeypatch.setattr(flash.importlib.metadata, "version", version)
        clear()

    yield play
    monkeypatch.undo()
    clear()


def as_modules(names):
    return {name: {"flash_attn_varlen_func": PLAYED[name]} for name in names}


@pytest.mark.parametrize("function", [version_2, version_3, version_4, of_vllm])
def test_every_version_gets_its_arguments_by_name(function):
    torch.manual_seed(0)
    states = torch.randn(3, 8, 2, 16, requires_grad=True)
    found = flash._called_by_name(function)(*states, BOUNDARIES, 0.3)
    expected = reference(*states, BOUNDS, BOUNDS, 0.3)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(expected)
    grads = (torch.autograd.grad(result, states, upstream)[0] for result in (found, expected))
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("capability", "width", "installed", "expected"),
    [
        ((7, 5), 64, PLAYED, None),
        ((8, 0), 64, PLAYED, "flash-attn"),
        ((8, 9), 64, {"flash-attn-3", "flash-attn-4"}, None),
        ((9, 0), 64, PLAYED, "flash-attn-3"),
        ((9, 0), 24, PLAYED, "flash-attn-3"),
        ((9, 0), 64, {"flash-attn", "flash-attn-4"}, "flash-attn"),
        ((10, 0), 64, PLAYED, "flash-attn-4"),
        ((10, 0), 24, PLAYED, "flash-attn"),
        ((12, 0), 64, PLAYED, "flash-attn"),
        ((9, 0), 64, (), None),
    ],
)
def test_the_gpu_decides_which_package_is_used(capability, width, installed, expected, install):
    install(as_modules(installed))
    found = flash.flash_attention(capability, width)
    assert (found if found is None else found[0]) == expected


@pytest.mark.parametrize("name", PLAYED)
@pytest.mark.parametrize(
    "broken",
    [
        ImportError("undefined symbol"),
        OSError("no libcudart"),
        RuntimeError("CUDA version"),
        {},
        {"flash_attn_varlen_func": without_scale},
    ],
    ids=["import", "library", "runtime", "no function", "other arguments"],
)
def test_a_package_that_cannot_be_used_falls_to_the_next_with_one_line(name, broken, install, monkeypatch, caplog):
    capability = {"flash-attn-3": (9, 0), "flash-attn-4": (10, 0), "flash-attn": (8, 0)}[name]
    next_one = None if name == "flash-attn" else "flash-attn"
    install(as_modules(PLAYED) | {name: broken})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.INFO, "esm_efficient"):
        found = [flash.flash_attention(capability, width) for width in (64, 96, 128)]
        chosen = choose_backend("auto", torch.device("cuda"), torch.bfloat16, 64)
    assert [each and each[0] for each in found] == [next_one] * 3
    assert (chosen == "flash") == (next_one is not None)
    lines = [message for message in caplog.messages if "cannot be used" in message]
    assert len(lines) == 1
    assert lines[0].startswith(f"{name} is installed but cannot be used (")
    assert (f"flash ({next_one})" in caplog.text) == (next_one is not None)


def test_the_folder_cute_of_version_2_is_not_version_4(install, caplog):
    install(as_modules(["flash-attn"]))
    assert flash.flash_attention((10, 0), 64)[0] == "flash-attn"
    assert not caplog.messages


@pytest.mark.parametrize("function", [version_2, version_4])
def test_deterministic_attention_is_asked_for_or_refused(function, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    query = torch.ones(8, 2, 16)
    if function is version_4:
        with pytest.raises(ConfigurationError, match="deterministic algorithms were asked for"):
            flash._called_by_name(version_4)(query, query, query, BOUNDARIES, 1.0)
        return

    def records(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, deterministic=False):
        asked.append(deterministic)
        return q

    flash._called_by_name(records)(query, query, query, BOUNDARIES, 1.0)
    assert asked == [True]


def test_a_kernel_without_a_backward_pass_cannot_train():
    def forward_only(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale):
        return q.detach()

    compute, query = flash._called_by_name(forward_only), torch.ones(8, 2, 16, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(compute(query, query, query, BOUNDARIES, 1.0), query)
    with pytest.raises(ConfigurationError, match="has no backward pass"):
        compute(query, query, query, BOUNDARIES, 1.0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), [("kernels-community/flash-attn2", 4), ("kernels-community/flash-attn2", 3)]),
        ((9, 0), [("kernels-community/flash-attn3", 1)]),
    ],
)
def test_the_kernel_of_the_hub_is_loaded_only_if_it_is_asked_for(capability, expected, install, monkeypatch):
    asked = []

    def get_kernel(repository, *, version):
        asked.append((repository, version))
        if version == 4:
            raise FileNotFoundError("no build for this torch")
        return types.SimpleNamespace(flash_attn_varlen_func=version_2)

    install({"kernels": {"get_kernel": get_kernel}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    for backend in ("auto", "efficient"):
        assert choose_backend(backend, device, torch.bfloat16, 64) != "hub"
    assert asked == []
    assert choose_backend("hub", device, torch.bfloat16, 64) == "hub"
    states = torch.randn(3, 8, 2, 64)
    cu_seqlens = types.SimpleNamespace(boundaries=BOUNDARIES)
    found = attention._kernel_of("hub", device, 64)(*states, cu_seqlens, 0.3)
    assert torch.equal(found, reference(*states, BOUNDS, BOUNDS, 0.3))
    assert asked == expected


def test_a_kernel_of_the_hub_that_cannot_be_loaded_is_an_error(install):
    install({})
    with pytest.raises(ConfigurationError, match="flash-attn2 cannot be loaded"):
        flash.hub_attention(8)
