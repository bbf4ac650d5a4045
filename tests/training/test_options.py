"""The options of a run: other names, the batch size, and names that are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from esm_efficient import RECIPES
from esm_efficient.errors import ConfigurationError
from esm_efficient.training.options import resolve_options


@pytest.mark.parametrize(
    ("recipe", "size", "expected"),
    [
        ("base", 8, (8, 1)),
        ("base", 32, (8, 4)),
        ("base", 4, (4, 1)),
        ("base", 12, (6, 2)),
        ("base", 7, (7, 1)),
        ("base", 1, (1, 1)),
        ("all", 8, (2, 4)),
        ("all", 9, (1, 9)),
    ],
)
def test_the_batch_size_is_micro_batch_times_accumulation(recipe, size, expected):
    chosen, options = resolve_options(RECIPES[recipe], {"batch_size": size})
    assert (chosen.micro_batch, chosen.accumulation) == expected
    assert chosen.batch_size == size
    assert chosen.learning_rate == pytest.approx(RECIPES[recipe].learning_rate * (size / 8) ** 0.5)
    assert options == {}


def test_a_learning_rate_is_taken_as_it_is_given():
    chosen, options = resolve_options(RECIPES["base"], {"batch_size": 32, "learning_rate": 1e-5, "epochs": 0.5})
    assert options == {"learning_rate": 1e-5, "num_train_epochs": 0.5}
    assert chosen.accumulation == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch': did you mean 'epochs'"),
        ({"learning_rat": 3}, "did you mean 'learning_rate'"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
        ({"pooing": "mean"}, "did you mean 'pooling'"),
        ({"frobnicate": 3}, "expected an option of finetune or of TrainingArguments"),
        ({"epochs": 1, "num_train_epochs": 2}, "the same option"),
        ({"epochs": 0}, "epochs=0: expected more than 0"),
        ({"num_train_epochs": -1}, "epochs=-1"),
        ({"epochs": float("nan")}, "epochs=nan: expected more than 0 and a finite number"),
        ({"epochs": float("inf")}, "epochs=inf"),
        ({"epochs": "3"}, "epochs='3' is a str: expected a number"),
        ({"epochs": None}, "epochs=None is a NoneType"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4': expected a finite number, 0 or more"),
        ({"learning_rate": -1e-4}, "learning_rate=-0.0001: expected a finite number, 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": True}, "learning_rate=True"),
        ({"weight_decay": "0.1"}, "weight_decay='0.1' is a str"),
        ({"max_steps": "3"}, "max_steps='3' is a str"),
        ({"eval_steps": [3]}, "eval_steps=.* is a list"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"batch_size": 8, "gradient_accumulation_steps": 2}, "contradict each other"),
    ],
)
def test_a_wrong_option_is_refused_with_advice(options, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_options(RECIPES["all"], options, known=["pooling"])


def test_numbers_of_numpy_are_numbers():
    chosen, options = resolve_options(RECIPES["base"], {"batch_size": np.int64(16), "epochs": np.float32(0.5)})
    assert (chosen.micro_batch, chosen.accumulation) == (8, 2)
    assert {type(value) for value in (chosen.accumulation, options["num_train_epochs"])} == {int, float}


def test_options_that_are_no_numbers_or_may_be_none_are_passed_on():
    options = {"eval_steps": None, "report_to": "none", "lr_scheduler_type": "cosine", "learning_rate": 0, "seed": 3}
    assert resolve_options(RECIPES["all"], options)[1] == options


def test_steps_instead_of_epochs_are_allowed():
    assert resolve_options(RECIPES["all"], {"max_steps": 3, "num_train_epochs": 0})[1]["max_steps"] == 3


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        ("lora", {"micro_batch": 4}, (4, 2)),
        ("all", {"micro_batch": 8}, (8, 1)),
        ("all", {"micro_batch": 16, "batch_size": 32}, (16, 2)),
    ],
)
def test_the_micro_batch_leaves_the_batch_as_it_is(recipe, given, expected):
    chosen, options = resolve_options(RECIPES[recipe], given)
    assert (chosen.micro_batch, chosen.accumulation) == expected
    assert options == {}
    if "batch_size" not in given:
        assert chosen.learning_rate == RECIPES[recipe].learning_rate


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"micro_batch": 3}, "micro_batch=3 does not divide the 8 sequences of an optimizer step"),
        ({"micro_batch": 16}, "or batch_size=16"),
        ({"micro_batch": 0}, "micro_batch=0: expected a whole number"),
        ({"micro_batch": 4, "gradient_accumulation_steps": 2}, "contradict each other"),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_refused(given, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_options(RECIPES["lora"], given)


def test_parts_of_a_recipe_are_options_and_none_leaves_its_own():
    given = {"layers": "top-1", "cache": False, "pooling": "mean", "keep_layers": None, "quantization": None}
    chosen, options = resolve_options(RECIPES["top"], given)
    assert (chosen.layers, chosen.cache, chosen.pooling, chosen.keep_layers) == ("top-1", False, "mean", None)
    assert options == {}
