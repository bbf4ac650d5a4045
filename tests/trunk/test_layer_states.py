"""The states of all layers in one pass are those that transformers gives, one sequence at a time."""

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from esm_efficient import (
    ConfigurationError,
    OutOfMemoryError,
    apply_lean_encoder,
    demo_model_path,
    has_lean_encoder,
    split_model,
)
from esm_efficient.trunk.layer_states import LayerReader

LENGTHS = (4, 9, 3, 30, 12, 9)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"input_ids": [[0, *rng.integers(4, 24, length - 2), 2] for length in LENGTHS]})


def load(kind=AutoModelForSequenceClassification):
    torch.manual_seed(0)
    return kind.from_pretrained(demo_model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(data):
    """The states of each layer, one array of shape (layers + 1, tokens, width) per sequence."""
    model = load().eval()
    with torch.no_grad():
        states = [model.esm(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in data["input_ids"]]
    return [torch.cat(layers).numpy() for layers in states]


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForMaskedLM])
@pytest.mark.parametrize("budget", [1, 24, 1000])
def test_pooled_states_of_each_layer(data, expected, kind, budget, caplog):
    reader = LayerReader(load(kind))
    got = reader.pool(data, ("first", "mean"), token_budget=budget, name="train")
    assert got.shape == (5, 2, len(LENGTHS), 128)
    for number, states in enumerate(expected):
        np.testing.assert_allclose(got[:, 0, number], states[:, 0], atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(got[:, 1, number], states[:, 1:-1].mean(1), atol=2e-5, rtol=2e-5)
    assert "the lean encoder is not used" not in caplog.text


def test_the_states_of_esm_c_are_those_of_transformers(data):
    if not hasattr(transformers, "EsmcConfig"):
        pytest.skip("this version of transformers has no ESM C")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = transformers.EsmcForSequenceClassification(transformers.EsmcConfig(**sizes)).eval()
    got = LayerReader(model).pool(data, ("first", "mean"), token_budget=24, name="train")
    for number, ids in enumerate(data["input_ids"]):
        with torch.no_grad():
            layers = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for found, states in zip(got[:, :, number], layers, strict=True):
            np.testing.assert_allclose(found[0], states[0, 0], atol=2e-5, rtol=2e-5)
            np.testing.assert_allclose(found[1], states[0, 1:-1].mean(0), atol=2e-5, rtol=2e-5)


def test_the_states_of_chosen_tokens(data, expected):
    rows, columns = np.array([0, 0, 3, 3, 3, 5]), np.array([1, 2, 28, 5, 6, 7])
    got = LayerReader(load()).select(data, rows, columns, token_budget=24, name="train")
    for number, (row, column) in enumerate(zip(rows, columns, strict=True)):
        np.testing.assert_allclose(got[:, 0, number], expected[row][:, column], atol=2e-5, rtol=2e-5)


def test_the_encoder_runs_once_per_batch(data):
    reader = LayerReader(load())
    calls = []
    reader.encoder.embeddings.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[0]))
    reader.pool(data, ("mean",), token_budget=24, name="train")
    assert sum(calls) == len(LENGTHS)


def test_the_model_stays_as_it_is(data):
    model = apply_lean_encoder(load()).train()
    weights = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    LayerReader(model).pool(data, ("mean",), token_budget=24, name="train")
    assert has_lean_encoder(model)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter is weights[name][0]
        assert parameter.requires_grad is weights[name][1]


@pytest.mark.parametrize(
    ("model", "message"), [(lambda: torch.nn.Linear(2, 2), "expected one"), (lambda: split_model(load(), 1)[1], "rest")]
)
def test_what_has_no_whole_encoder_is_refused(data, model, message):
    with pytest.raises(ConfigurationError, match=message):
        LayerReader(model()).pool(data, ("mean",), token_budget=24, name="train")


@pytest.mark.parametrize(
    ("rows", "advice"), [(slice(None), "Give a smaller token_budget"), (slice(1), "one sequence: use a smaller model")]
)
def test_too_little_memory_is_an_error_that_says_what_to_change(data, rows, advice):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = load()
    model.esm.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemoryError, match=advice):
        LayerReader(model).pool(data.select(range(len(data))[rows]), ("mean",), token_budget=1000, name="train")
