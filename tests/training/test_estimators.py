"""EsmClassifier and EsmRegressor work as scikit-learn's own estimators."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_model
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import check_random_state, estimator_checks

from esm_efficient import (
    RECIPES,
    ConfigurationError,
    DataError,
    EsmClassifier,
    EsmRegressor,
    FinetuneResult,
    list_states,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def proteins(number=32, seed=0):
    """Return sequences of which half are rich in leucine, and whether each is."""
    rng = np.random.default_rng(seed)
    rich = np.arange(number) % 2 == 0
    letters = ["LLLLLLAVIG" if is_rich else "DEKRNQSTPG" for is_rich in rich]
    return ["".join(rng.choice(list(choice), 20)) for choice in letters], rich


def quick(kind, folder, **options):
    return kind(folder, **({"layers": "top-1", "epochs": 4, "learning_rate": 1e-2} | options))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array(["soluble", "membrane"]), ["membrane", "soluble"]),
        (np.array([7, 3]), [3, 7]),
        (np.array([False, True]), [False, True]),
    ],
    ids=["texts", "numbers", "truth values"],
)
def test_a_classifier_learns_and_answers_with_the_classes_it_was_given(folder, labels, classes):
    sequences, rich = proteins()
    y = labels[rich.astype(int)]
    model = quick(EsmClassifier, folder).fit(sequences, y)
    assert model.classes_.tolist() == classes
    others, rich = proteins(seed=1)
    probabilities = model.predict_proba(others)
    assert probabilities.shape == (len(others), 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    predicted = model.predict(others)
    assert predicted.dtype == y.dtype
    assert (predicted == model.classes_[probabilities.argmax(axis=1)]).all()
    assert model.score(others, labels[rich.astype(int)]) > 0.9


@pytest.mark.parametrize("several", [0, 1, 2])
def test_a_regressor_predicts_in_the_unit_and_the_shape_of_its_numbers(folder, several):
    sequences, rich = proteins()
    y = 1000 + 100.0 * rich
    y = np.stack([y, -y][:several], axis=1) if several else y
    model = quick(EsmRegressor, folder).fit(sequences, y)
    predicted = model.predict(sequences)
    assert predicted.shape == y.shape
    assert model.score(sequences, y) > 0.5


def test_a_fit_makes_no_report_that_it_would_discard(folder, monkeypatch):
    sequences, rich = proteins(4)
    monkeypatch.setattr(FinetuneResult, "to_html", None)  # a report would fail
    assert len(quick(EsmClassifier, folder, epochs=1).fit(sequences, rich).predict(sequences)) == 4


def test_a_grid_search_shares_the_states_of_its_folds(folder, tmp_path):
    sequences, rich = proteins()
    search = GridSearchCV(
        quick(EsmClassifier, folder, states_dir=tmp_path, epochs=1),
        {"learning_rate": [1e-4, 1e-2], "batch_size": np.array([8])},
        cv=2,
        refit=False,
        error_score="raise",
    )
    search.fit(np.array(sequences), rich)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(list_states(tmp_path)) == 2 * 2  # a training and an evaluated split per fold


def test_a_fit_leaves_the_global_random_numbers_as_they_are(folder):
    """Otherwise a splitter without a seed draws the same fold after every fit."""
    sequences, rich = proteins(8)
    drawn = []
    for is_fitted in (False, True):
        random.seed(7)
        check_random_state(None).seed(7)
        torch.manual_seed(7)
        if is_fitted:
            quick(EsmClassifier, folder, epochs=1).fit(sequences, rich)
        drawn.append((random.random(), check_random_state(None).rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_the_random_state_is_a_number_or_draws_one_for_each_fit(folder, monkeypatch):
    seeds = []

    def stop(model, data, *, seed, **_):
        seeds.append(seed)
        raise RuntimeError

    monkeypatch.setattr("esm_efficient.training.estimators.finetune", stop)
    state = np.random.RandomState(0)
    check_random_state(None).seed(0)
    for random_state in (np.int64(3), state, state, None, None):
        with pytest.raises(RuntimeError):
            EsmClassifier(folder, random_state=random_state).fit(["MKT", "MAL"], [0, 1])
    assert {type(seed) for seed in seeds} == {int}
    number, first, second, *of_none = seeds
    assert number == 3
    assert first != second
    assert of_none == [first, second]  # None is numpy's global state, which had the same seed


def test_it_works_in_cross_validation_and_in_a_pipeline(folder):
    sequences, rich = proteins()
    pipeline = make_pipeline(FunctionTransformer(), quick(EsmClassifier, folder))
    scores = cross_val_score(pipeline, pd.DataFrame({"sequence": sequences}), rich, cv=2, error_score="raise")
    assert scores.mean() > 0.8


def test_labels_and_weights_of_an_iterator_are_read_once(folder):
    sequences, rich = proteins()
    weights = np.where(rich, 2.0, 1.0)
    given = quick(EsmClassifier, folder).fit(sequences, rich, weights)
    once = quick(EsmClassifier, folder).fit(iter(sequences), iter(rich), iter(weights))
    np.testing.assert_array_equal(once.predict_proba(sequences), given.predict_proba(sequences))
    numbers = quick(EsmRegressor, folder).fit(sequences, iter(1.0 * rich))
    assert numbers.predict(sequences).shape == (len(sequences),)


def test_a_pickled_estimator_predicts_the_same(folder):
    sequences, rich = proteins()
    model = quick(EsmClassifier, folder, epochs=1).fit(sequences, rich)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.predict_proba(sequences), model.predict_proba(sequences))


def test_weights_of_sequences_and_of_classes_move_the_prediction(folder):
    sequences, _ = proteins()
    y = np.arange(32) < 16  # has nothing to do with the sequences
    for options, weight in (
        ({"class_weight": None}, np.where(y, 9.0, 1.0)),
        ({"class_weight": {True: 9.0, False: 1.0}}, None),
        ({"class_weight": {1: 9.0, 0: 1.0}}, None),
    ):
        model = quick(EsmClassifier, folder, **options).fit(sequences, y, sample_weight=weight)
        assert model.predict_proba(sequences)[:, 1].mean() > 0.7


def test_a_long_protein_is_read_from_its_start_in_training_and_in_prediction(folder, caplog):
    sequences, rich = proteins(8)
    sequences[3] += "W" * 30
    model = quick(EsmClassifier, folder, epochs=1, max_tokens=22).fit(sequences, rich)
    assert "1 of 8 sequences have more than 20 residues: their start was kept" in caplog.text
    caplog.clear()
    probabilities = model.predict_proba(sequences)
    assert "1 of 8 sequences have more than 20 residues: their start is read" in caplog.text
    np.testing.assert_allclose(probabilities, model.predict_proba([s[:20] for s in sequences]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("top-1", True, "mean")),
        ({"pooling": "attention"}, ("top-1", True, "attention")),
        ({"layers": "top-2"}, ("top-2", True, "mean")),
        ({"layers": "all"}, ("all", False, "mean")),
        ({"recipe": "lora"}, ("all", False, "first")),
    ],
)
def test_a_recipe_keeps_what_is_not_given(folder, monkeypatch, options, expected):
    def stop(model, data, *, recipe, **_):
        raise RuntimeError((recipe.layers, recipe.cache, recipe.pooling))

    monkeypatch.setattr("esm_efficient.training.estimators.finetune", stop)
    own = RECIPES["top"].replace(layers="top-1", pooling="mean")
    with pytest.raises(RuntimeError) as caught:
        EsmClassifier(folder, **({"recipe": own} | options)).fit(["MKT", "MAL"], [0, 1])
    assert caught.value.args == (expected,)


def test_the_rows_that_are_evaluated_too_make_no_warning(folder, caplog):
    sequences, rich = proteins()
    quick(EsmClassifier, folder, epochs=1).fit(sorted(sequences), sorted(rich))  # the first rows are of one class
    own = [record.getMessage() for record in caplog.records if record.name.startswith("esm_efficient")]
    assert [message for message in own if "optimizer steps may be too few" not in message] == []


@pytest.mark.parametrize(("kind", "shape"), [(EsmClassifier, (0, 2)), (EsmRegressor, (0,))])
def test_no_sequences_have_no_predictions(folder, kind, shape):
    sequences, rich = proteins(4)
    model = quick(kind, folder, epochs=1).fit(sequences, rich)
    assert model.predict([]).shape == (0,)
    assert getattr(model, "predict_proba", model.predict)([]).shape == shape


@pytest.mark.parametrize("weights", [[1.0], [[1.0]] * 2, [1.0, -1.0]])
def test_weights_that_do_not_fit_the_sequences_are_refused(folder, weights):
    with pytest.raises(DataError, match="sample_weight"):
        quick(EsmClassifier, folder).fit(["MKT", "MAL"], [0, 1], sample_weight=weights)


@pytest.mark.parametrize(
    ("kind", "X", "y", "message"),
    [
        (EsmClassifier, ["MKT"] * 3, [0, 1], "3 sequences and 2 labels"),
        (EsmClassifier, ["MKT"] * 3, [1, 1, 1], "all sequences have the class 1:"),
        (EsmClassifier, ["MKT"] * 3, ["a", "a", "a"], "all sequences have the class 'a':"),
        (EsmClassifier, ["MKT"] * 2, [[0, 1], [1, 0]], "expected one class per sequence"),
        (EsmClassifier, ["proteins.fasta", "MKT"], [0, 1], "not protein sequences"),
        (EsmClassifier, ["MKT"] * 3, ["a", "b", float("nan")], "1 of 3 labels are missing"),
        (EsmClassifier, ["MKT"] * 3, pd.Series([1.0, None, 0.0]), "1 of 3 labels are missing"),
        (EsmClassifier, ["MKT"] * 3, np.array(["a", None, "b"], dtype=object), "1 of 3 labels are missing"),
        (EsmClassifier, ["MKT"] * 3, [0.5, 1.0, 2.0], "numbers with fractions, such as 0.5: expected classes. EsmRegr"),
        (EsmClassifier, ["MKT"] * 3, pd.Series([1, "1", 2], dtype=object), r"several types of values \(int, str\)"),
        (EsmClassifier, [], [], "y is empty"),
        (EsmRegressor, ["MKT", "MAL"], ["a", "b"], "not a table of numbers .*EsmClassifier trains on classes"),
        (EsmRegressor, ["MKT", "MAL"], [1.0, np.nan], "not finite"),
        (EsmRegressor, ["MKT", "MAL"], 3.0, r"y has the shape \(\): expected \(sequences,\)"),
        (EsmRegressor, ["MKT", "MAL"], [1e23, 2e23], r"a label is 2e\+23: expected at most 1e\+18"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused(folder, kind, X, y, message):
    with pytest.raises(DataError, match=message):
        quick(kind, folder).fit(X, y)


def test_a_column_of_classes_is_taken_as_scikit_learn_takes_it(folder):
    fitted = quick(EsmClassifier, folder).fit(["MKTAYI", "MALWMR"], pd.DataFrame({"label": ["no", "yes"]}))
    assert fitted.classes_.tolist() == ["no", "yes"]


def test_an_unknown_recipe_and_a_missing_fit_are_named(folder):
    sequences, rich = proteins(4)
    with pytest.raises(ConfigurationError, match="no recipe is named 'lor'"):
        quick(EsmClassifier, folder, recipe="lor").fit(sequences, rich)
    with pytest.raises(NotFittedError):
        quick(EsmClassifier, folder).predict(sequences)


@pytest.mark.parametrize("kind", [EsmClassifier, EsmRegressor])
@pytest.mark.parametrize(
    "check",
    [
        "check_parameters_default_constructible",
        "check_no_attributes_set_in_init",
        "check_get_params_invariance",
        "check_set_params",
    ],
)
def test_the_checks_of_scikit_learn_that_need_no_numbers_pass(kind, check):
    getattr(estimator_checks, check)(kind.__name__, kind())


def test_a_clone_has_the_options_and_not_the_fit(folder):
    model = quick(EsmClassifier, folder, pooling="mean")
    model.predictor_ = object()
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert not hasattr(copy, "predictor_")
