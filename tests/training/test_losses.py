"""The loss as parts: summed and divided once, they are torch's weighted mean, however they are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from esm_efficient.errors import DataError
from esm_efficient.training.losses import CrossEntropy


def make(shape, classes=3, seed=0, ignored=0.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, classes, generator=generator, dtype=torch.float32)
    labels = torch.randint(classes, shape, generator=generator)
    return logits, labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_parts_of_any_cut_give_the_weighted_mean_of_the_whole(data):
    shape = data.draw(st.sampled_from([(7,), (5, 4)]))
    weights = data.draw(st.sampled_from([None, torch.tensor([0.2, 1.0, 3.0])]))
    smoothing = data.draw(st.sampled_from([0.0, 0.1]))
    logits, labels = make(shape, seed=data.draw(st.integers(0, 99)), ignored=0.3)
    labels.view(-1)[0] = 1
    loss = CrossEntropy(weights, smoothing)
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=3)))
    parts = [loss(logits[a:b], labels[a:b]) for a, b in zip([0, *cuts], [*cuts, shape[0]], strict=True) if b > a]
    total = sum(part[0].sum() for part in parts) / sum(part[1].sum() for part in parts)
    expected = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight=weights, label_smoothing=smoothing)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_shapes_and_types():
    logits, labels = make((5, 4), ignored=0.5)
    values, weights = CrossEntropy(torch.tensor([1.0, 2.0, 3.0]))(logits.bfloat16(), labels)
    assert values.shape == weights.shape == (5,)
    assert values.dtype == weights.dtype == torch.float32
    assert torch.equal(weights, CrossEntropy(torch.tensor([1.0, 2.0, 3.0])).weights(labels))


def test_an_ignored_example_weighs_nothing_and_gets_no_gradient():
    logits, labels = make((4,))
    labels[2] = -100
    logits.requires_grad_()
    values, weights = CrossEntropy(torch.tensor([1.0, 2.0, 3.0]))(logits, labels)
    values.sum().backward()
    assert values[2] == weights[2] == 0
    assert not logits.grad[2].any()
    assert logits.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_no_class_ids_are_refused(dtype):
    with pytest.raises(DataError, match="whole number"):
        CrossEntropy().weights(torch.zeros(3, dtype=dtype))
