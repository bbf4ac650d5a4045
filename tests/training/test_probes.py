"""Linear probes: the right model for each task, whatever is unknown or missing."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from esm_efficient.errors import DataError
from esm_efficient.tasks import Task
from esm_efficient.training.probes import PRIOR_VARIANCE, probe

BINARY = Task("single_label_classification", ("no", "yes"))
CLASSES = Task("single_label_classification", ("a", "b", "c"))
LABELS = Task("multi_label_classification", ("x", "y"))
NUMBERS = Task("regression", ("u", "v"))


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return rng.normal(3, [1, 5, 0.1, 2], size=(200, 4)).astype(np.float32)


def test_classes_are_those_of_scikit_learn_with_balanced_weights(features):
    labels = (features[:, 1] > 8).astype(int)
    x, z = features[:150], features[150:]
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=PRIOR_VARIANCE / 4, class_weight="balanced").fit(scaler.transform(x), labels[:150])
    logits = probe(BINARY, x, labels[:150], z)
    np.testing.assert_allclose(
        logits[:, 1] - logits[:, 0], model.decision_function(scaler.transform(z)), atol=1e-3, rtol=1e-3
    )


def test_numbers_are_those_of_ridge_regression_in_their_unit(features):
    numbers = 1000 + 50 * features[:, :2]
    x, z = features[:150], features[150:]
    scaler, unit = StandardScaler().fit(x), StandardScaler().fit(numbers[:150])
    model = Ridge(alpha=4 / PRIOR_VARIANCE).fit(scaler.transform(x), unit.transform(numbers[:150]))
    expected = unit.inverse_transform(model.predict(scaler.transform(z)))
    np.testing.assert_allclose(probe(NUMBERS, x, numbers[:150], z), expected, rtol=1e-4)


def test_minus_100_is_a_number(features):
    numbers = np.where(features[:, :2] > 3, 100.0, -100.0)
    found = probe(NUMBERS, features, numbers, features)
    np.testing.assert_allclose(found, probe(NUMBERS, features, numbers + 1000, features) - 1000, atol=1e-6)


@pytest.mark.parametrize("unknown", [np.nan, -100])
def test_each_label_is_fitted_on_the_proteins_for_which_it_is_known(features, unknown):
    labels = np.stack([features[:, 1] > 3, features[:, 3] > 3], axis=1).astype(float)
    wrong = labels.copy()
    wrong[:50, 0] = unknown
    got = probe(LABELS, features, wrong, features)
    alone = probe(LABELS, features[50:], labels[50:], features)
    assert np.corrcoef(got[:, 0], alone[:, 0])[0, 1] > 0.99
    assert ((got > 0) == labels.astype(bool)).mean() > 0.9


def test_a_label_with_one_value_gets_its_frequency(features):
    labels = np.stack([np.ones(200), features[:, 1] > 3], axis=1)
    logits = probe(LABELS, features, labels, features[:3])
    np.testing.assert_allclose(logits[:, 0], np.log(200.5 / 0.5))


def test_a_class_without_training_examples_is_never_predicted(features):
    labels = np.where(features[:, 1] > 3, 2, 0)
    logits = probe(CLASSES, features, labels, features)
    assert logits.shape == (200, 3)
    assert set(logits.argmax(1)) == {0, 2}


def test_a_constant_feature_changes_nothing(features):
    labels = (features[:, 1] > 3).astype(int)
    constant = np.concatenate([features, np.full((200, 4), 7, dtype=np.float32)], axis=1)
    assert np.isfinite(probe(BINARY, constant, labels, constant)).all()


def test_examples_of_weight_zero_are_not_read(features):
    labels = (features[:, 1] > 3).astype(int)
    flipped = np.where(np.arange(200) < 60, 1 - labels, labels)
    weights = (np.arange(200) >= 60).astype(float)
    got = probe(BINARY, features, flipped, features, weights=weights)
    assert (got.argmax(1) == labels).mean() > 0.9


def test_without_their_examples_of_weight_zero_one_class_alone_is_refused(features):
    labels = np.arange(200) % 2
    for weights, message in ((labels, "are yes"), (np.zeros(200), "are missing")):
        with pytest.raises(DataError, match=message):
            probe(BINARY, features, labels, features, weights=weights)


@pytest.mark.parametrize("wrong", [-1, 2, np.nan])
def test_a_label_that_is_not_a_class_is_refused(features, wrong):
    labels = np.where(np.arange(200) == 7, wrong, np.arange(200) % 2)
    with pytest.raises(DataError, match=rf"1 training label\(s\) are not classes, such as {wrong}: expected 0 to 1"):
        probe(BINARY, features, labels, features)


@pytest.mark.parametrize(("labels", "message"), [(np.ones(200, int), "are yes"), (np.full(200, -100), "are missing")])
def test_one_class_alone_is_refused(features, labels, message):
    with pytest.raises(DataError, match=message):
        probe(BINARY, features, labels, features)
