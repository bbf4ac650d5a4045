"""Losses and weights of any parts of a batch, summed and divided once, give torch's weighted mean of the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.training.losses import LOSSES, BinaryCrossEntropy, CrossEntropy, SquaredError


def make(shape, classes=3, seed=0, ignored=0.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, classes, generator=generator, dtype=torch.float32)
    labels = torch.randint(classes, shape, generator=generator)
    return logits, labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_parts_of_any_division_give_the_weighted_mean_of_the_batch(data):
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


def test_an_ignored_example_has_no_weight_and_no_gradient():
    logits, labels = make((4,))
    labels[2] = -100
    logits.requires_grad_()
    values, weights = CrossEntropy(torch.tensor([1.0, 2.0, 3.0]))(logits, labels)
    values.sum().backward()
    assert values[2] == weights[2] == 0
    assert not logits.grad[2].any()
    assert logits.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_not_class_ids_are_refused(dtype):
    with pytest.raises(DataError, match="expected class ids, which are whole numbers"):
        CrossEntropy().weights(torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("positive", [None, torch.tensor([0.5, 1.0, 7.0])])
def test_the_loss_of_known_labels_is_the_mean_of_torch(positive, smoothing):
    logits, labels = torch.randn(6, 3), (torch.rand(6, 3) < 0.5).float()
    values, weights = BinaryCrossEntropy(positive, smoothing)(logits, labels)
    smooth = labels * (1 - smoothing) + smoothing / 2
    expected = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=positive)
    assert values.shape == weights.shape == (6,)
    assert (values.sum() / weights.sum()).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "unknown"),
    [
        (BinaryCrossEntropy(), float("nan")),
        (BinaryCrossEntropy(), -100.0),
        (BinaryCrossEntropy(focal_gamma=2.0), -100.0),
        (SquaredError(), float("nan")),
    ],
    ids=str,
)
def test_an_unknown_label_has_no_weight_and_no_gradient(loss, unknown):
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.ones(4, 3)
    labels[1, 2], labels[3] = unknown, unknown
    values, weights = loss(logits, labels)
    values.sum().backward()
    assert weights.tolist() == [3, 2, 3, 0]
    assert torch.equal(weights, loss.weights(labels))
    assert values[3] == 0
    assert torch.equal(logits.grad == 0, labels.isnan() | (labels == -100))


def test_the_loss_of_one_or_several_numbers_is_torchs_squared_error():
    for shape in ((5,), (5, 1), (5, 3)):
        logits, labels = torch.randn(5, shape[1] if len(shape) > 1 else 1), torch.randn(shape)
        values, weights = SquaredError()(logits.bfloat16(), labels)
        assert values.dtype == torch.float32
        expected = F.mse_loss(logits.bfloat16().float().reshape(shape), labels)
        assert (values.sum() / weights.sum()).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_focal_loss_is_that_of_the_paper(gamma):
    """Lin et al. 2017, equation 4, for one class and for several labels; with one label both are the same."""
    logits, labels = make((9,), classes=2)
    chance = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    values, weights = CrossEntropy(torch.tensor([1.0, 3.0]), focal_gamma=gamma)(logits, labels)
    table = torch.tensor([1.0, 3.0])[labels]
    assert torch.allclose(values, -table * (1 - chance) ** gamma * chance.log(), atol=1e-6)
    assert torch.equal(weights, table)
    margin = logits[:, 1:] - logits[:, :1]
    binary, _ = BinaryCrossEntropy(focal_gamma=gamma)(margin, labels[:, None].float())
    assert torch.allclose(binary, CrossEntropy(focal_gamma=gamma)(logits, labels)[0], atol=1e-6)


@pytest.mark.parametrize("kind", [CrossEntropy, BinaryCrossEntropy])
def test_the_focal_loss_of_certain_predictions_has_a_finite_gradient(kind):
    logits = torch.tensor([[80.0, -80.0], [-80.0, 80.0]], requires_grad=True)
    labels = torch.tensor([0, 1]) if kind is CrossEntropy else torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    kind(focal_gamma=0.5)(logits, labels)[0].sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("options", [{"focal_gamma": -1.0}, {"focal_gamma": 2.0, "label_smoothing": 0.1}])
@pytest.mark.parametrize("kind", [CrossEntropy, BinaryCrossEntropy])
def test_an_undefined_focal_loss_is_refused(kind, options):
    with pytest.raises(ConfigurationError, match="focal_gamma"):
        kind(**options)


def test_integers_are_refused_for_several_labels():
    with pytest.raises(DataError, match=r"torch\.int64"):
        BinaryCrossEntropy().weights(torch.zeros(3, 2, dtype=torch.long))


def test_integers_are_numbers_for_regression():
    logits, labels = torch.randn(4, 1), torch.tensor([3, -100, 0, 2])
    for integers, floats in zip(SquaredError()(logits, labels), SquaredError()(logits, labels.float()), strict=True):
        assert torch.equal(integers, floats)


def test_minus_a_hundred_is_an_ordinary_number_for_regression():
    values, weights = SquaredError()(torch.zeros(1, 1), torch.tensor([-100.0]))
    assert (values.item(), weights.item()) == (10000.0, 1.0)


def test_every_task_has_a_loss():
    assert set(LOSSES) == {"single_label_classification", "multi_label_classification", "regression"}


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "message"),
    [
        (CrossEntropy(), torch.zeros(3, 2), torch.tensor([0, 5, 1]), r"row 1: 5\. Expected class ids from 0 to 1"),
        (CrossEntropy(torch.ones(2)), torch.zeros(3, 2), torch.tensor([0, 1, -3]), "row 2: -3"),
        (CrossEntropy(), torch.zeros(2, 4, 2), torch.tensor([[0, 1, 0, 0], [0, 1, 9, 1]]), "row 1: 9"),
        (CrossEntropy(), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long), "must be floats"),
        (CrossEntropy(), torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), r"shape \(4,\): expected \(3,\)"),
        (BinaryCrossEntropy(), torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "row 1: 2"),
        (BinaryCrossEntropy(), torch.zeros(2, 2), torch.zeros(2), r"expected \(2, 2\)"),
        (SquaredError(), torch.zeros(2, 1), torch.tensor([0.0, 1e30]), "row 1: 1e\\+30.*standardise"),
        (SquaredError(), torch.zeros(2, 1), torch.tensor([0.0, float("inf")]), "row 1: inf"),
        (SquaredError(), torch.zeros(2, 1), torch.zeros(2, 3), r"expected \(2, 1\)"),
    ],
)
def test_labels_that_do_not_fit_the_outputs_are_refused_with_their_row(loss, logits, labels, message):
    loss.weights(labels)
    with pytest.raises(DataError, match=message):
        loss(logits, labels)


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(torch.ones(2))], ids=["plain", "weighted"])
def test_the_loss_of_a_wrong_label_is_nan_where_looking_at_it_takes_time(loss, monkeypatch):
    monkeypatch.setattr("esm_efficient.training.losses._refuse", lambda wrong, labels, expected: wrong)
    values, _ = loss(torch.zeros(3, 2), torch.tensor([0, 5, -100]))
    assert values.isnan().tolist() == [False, True, False]
    several = BinaryCrossEntropy()(torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [2.0, float("nan")]]))[0]
    assert several.isnan().tolist() == [False, True]
