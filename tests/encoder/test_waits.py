"""A training step on a GPU waits for it nowhere in the encoder; the meta device plays the GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import each_value
from lean_models import HEADS, build, make_batch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EsmForSequenceClassification

from esm_efficient import apply_lean_encoder, compat
from esm_efficient._torch import run_backward
from esm_efficient.encoder.attention import use_attention
from esm_efficient.encoder.packing import attach_packing, attached_packing, describe_batch, make_packing
from esm_efficient.encoder.plan import plan_as
from esm_efficient.estimation.kernels import packed_attention

LENGTHS = [9, 5, 12]


class Waits(TorchDispatchMode):
    """Records the operations for which the host waits for the device or copies to it while it waits.

    Args:
        host: what a copy of the device's attention mask to the host returns.
    """

    def __init__(self, host=None):
        super().__init__()
        self.host, self.seen = host, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero") and args[0].is_meta:
            self.seen.append(name)
        if name == "_to_copy" and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.seen.append("device to host")
            return self.host.clone()
        if name == "_to_copy" and not args[0].is_meta and kwargs.get("device") == torch.device("meta"):
            self.seen += [] if kwargs.get("non_blocking") else ["host to device"]
        if name == "copy_" and args[0].is_meta != args[1].is_meta:
            self.seen.append("copy")
        return func(*args, **kwargs)


class Lists(TorchFunctionMode):
    """Records Python lists that become tensors of the device, of which a dispatch mode sees nothing."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta"
        if made or (func is torch.Tensor.__getitem__ and args[0].is_meta and isinstance(args[1], list)):
            self.seen.append(func.__name__)
        return func(*args, **kwargs)


def train(model, batch, waits):
    with use_attention(packed_attention), plan_as("cuda"), Lists(waits.seen), waits:
        output = model(**batch)
        run_backward((output.logits if "logits" in output else output.last_hidden_state).sum())


def test_what_makes_the_host_wait_is_seen():
    mask = torch.ones(2, 3, device="meta")
    with Waits(torch.ones(2, 3)) as waits, Lists(waits.seen):
        torch.tensor([0, 1], device="meta")
        mask[[0, 1]]
        torch.ones(2).to("meta")
        torch.ones(2).to("meta", non_blocking=True)
        mask.cpu()
        with pytest.raises((RuntimeError, NotImplementedError)):
            mask.sum().item()
        with pytest.raises((RuntimeError, NotImplementedError)):
            mask.nonzero()
    seen = ["tensor", "__getitem__", "host to device", "device to host", "_local_scalar_dense", "nonzero"]
    assert waits.seen == seen


@pytest.mark.skipif(compat.rotates_per_layer(), reason="the rotary frequencies of the layers are compared in each call")
@pytest.mark.parametrize(("head", "trains", "recompute"), each_value(HEADS, ["full", "all-linear"], ["none", "layer"]))
def test_a_step_waits_once_for_the_mask_and_never_if_the_collator_has_read_it(head, trains, recompute):
    model = apply_lean_encoder(build(head, trains).to("meta"), recompute=recompute)
    batch = make_batch(LENGTHS)
    host, described = batch["attention_mask"], describe_batch(batch["attention_mask"])
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    train(model, copy.copy(batch), Waits(host))  # the structure of the model is read in its first call

    train(model, batch, once := Waits(host))
    assert once.seen == ["device to host"]
    moved = {name: part.to("meta") if isinstance(part, torch.Tensor) else part for name, part in described.items()}
    attach_packing(batch["attention_mask"], moved)
    train(model, batch, never := Waits())
    assert never.seen == []


@pytest.mark.skipif(compat.rotates_per_layer(), reason="the rotary frequencies of the layers are compared in each call")
@pytest.mark.parametrize("head", HEADS)
def test_a_prediction_waits_once_for_the_mask_and_never_if_the_lengths_are_known(head):
    model = apply_lean_encoder(build(head, "full").to("meta")).eval()
    batch = make_batch(LENGTHS)
    host, described = batch["attention_mask"], describe_batch(batch["attention_mask"])
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}

    def predict(waits):
        with torch.no_grad(), use_attention(packed_attention), plan_as("cuda"), Lists(waits.seen), waits:
            model(**batch)
        return waits.seen

    predict(Waits(host))  # the structure of the model is read in its first call
    assert predict(Waits(host)) == ["device to host"]
    moved = {name: part.to("meta") if isinstance(part, torch.Tensor) else part for name, part in described.items()}
    attach_packing(batch["attention_mask"], moved)
    assert predict(Waits()) == []


def test_a_packing_whose_tuples_became_lists_is_used():
    """torch 2.6 makes lists of the tuples in a batch when it pins its memory."""
    mask = make_batch(LENGTHS)["attention_mask"]
    described = {name: list(part) if isinstance(part, tuple) else part for name, part in describe_batch(mask).items()}
    attach_packing(mask, described)
    found, expected = attached_packing(mask, (3, 12)), make_packing(mask, (3, 12))
    assert (found.shape, found.lengths) == (expected.shape, expected.lengths)


def test_a_mask_that_has_changed_is_read_again():
    mask = make_batch(LENGTHS)["attention_mask"]
    attach_packing(mask, describe_batch(mask))
    assert attached_packing(mask, (3, 12)).lengths == (5, 9, 12)
    assert attached_packing(mask, (3, 13)) is None
    assert attached_packing(mask.clone(), (3, 12)) is None
    mask[0, 8] = 0
    assert attached_packing(mask, (3, 12)) is None
    assert attached_packing(None, (3, 12)) is None


def test_a_described_batch_has_the_outputs_of_one_that_is_not():
    model = apply_lean_encoder(build(EsmForSequenceClassification, "full")).eval()
    batch = make_batch(LENGTHS)
    with torch.no_grad():
        expected = model(**batch).logits
        attach_packing(batch["attention_mask"], describe_batch(batch["attention_mask"]))
        assert torch.equal(model(**batch).logits, expected)
