"""Packing keeps every token once, unpacking puts it back, and sequences of equal length are neighbours."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_efficient.encoder.attention import CuSeqlens
from esm_efficient.encoder.packing import Packing, make_packing, runs_of

masks = st.integers(1, 6).flatmap(
    lambda columns: st.lists(st.lists(st.integers(0, 1), min_size=columns, max_size=columns), min_size=1, max_size=5)
)


@settings(max_examples=200, deadline=None)
@given(masks)
def test_unpacking_restores_the_tokens_and_puts_zeros_in_place_of_padding(rows):
    mask = torch.tensor(rows)
    states = torch.randn(*mask.shape, 3)
    packing = make_packing(mask, tuple(mask.shape))
    packed = packing.pack(states)
    assert packed.shape[0] == sum(packing.lengths) == int(mask.sum())
    assert torch.equal(packing.unpack(packed), states * mask[..., None])
    assert list(packing.lengths) == sorted(packing.lengths) or packing.index is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=8))
def test_runs_cover_every_token_once(lengths):
    runs = runs_of(lengths)
    assert [length for run in runs for length in [run.length] * run.sequences] == [n for n in lengths if n]
    ends = [run.start + run.sequences * run.length for run in runs]
    assert [run.start for run in runs] == [0, *ends[:-1]][: len(runs)]
    assert all(a.length != b.length for a, b in itertools.pairwise(runs))
    for run in runs_of(lengths, max_tokens=5):
        assert run.sequences == 1 or run.sequences * run.length <= 5


def test_a_token_is_rotated_by_the_angle_of_its_column():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1]])
    angles = torch.arange(4.0)[None, :, None].repeat(1, 1, 2)
    packing = make_packing(mask, (2, 4)).with_rotation((angles.cos(), angles.sin()), torch.float32)
    # The shorter sequence comes first.
    columns = torch.tensor([1.0, 3.0, 0.0, 1.0, 2.0, 3.0])
    assert torch.allclose(packing.rotation.flatten(), torch.polar(torch.ones(6), columns))


def test_a_packing_is_made_on_the_host_whatever_device_is_the_default():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with torch.device("meta"):
        packing = make_packing(mask, (2, 3))
    assert packing.index.tolist() == [3, 0, 1, 2]


def test_unpacking_puts_first_tokens_into_their_rows():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    packing = make_packing(mask, (3, 3))
    states = torch.arange(1.0, 10.0).view(3, 3, 1)
    padded = packing.unpack(packing.pack(states)[packing.first_tokens(mask.device)], first_only=True)
    assert padded[..., 0].tolist() == [[1, 0, 0], [4, 0, 0], [7, 0, 0]]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3)])
def test_packing_a_batch_without_padding_copies_nothing(mask):
    packing = make_packing(mask, (2, 3))
    assert packing.index is None
    assert packing.lengths == (3, 3)
    states = torch.randn(2, 3, 4)
    assert packing.pack(states).data_ptr() == states.data_ptr()


def test_a_packing_is_freed_as_soon_as_its_step_ends():
    """Otherwise the tensors of each batch would stay on the GPU until Python collects garbage."""
    packing = Packing((2, 4), (4, 3))
    gc.disable()
    try:
        assert CuSeqlens.cached(packing, False, torch.device("cpu")).cu_seqlens_k.tolist() == [0, 4, 7]
        freed = weakref.ref(packing)
        del packing
        assert freed() is None
    finally:
        gc.enable()
