"""Functions and classes of transformers, torch and peft are told from those of users."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_model
from torch import nn
from transformers import EsmForMaskedLM, EsmModel
from transformers.models.esm import modeling_esm
from transformers.models.esm.modeling_esm import EsmEncoder, EsmIntermediate, EsmLayer

from esm_efficient import PooledEsmForSequenceClassification, apply_lean_encoder
from esm_efficient.encoder import layer
from esm_efficient.encoder.origins import is_own, is_per_token, reads_first_token, source_of, undecorated


def test_only_transformers_own_classifier_reads_the_first_token():
    model = make_model()
    assert reads_first_token(model)
    assert not reads_first_token(make_model(EsmForMaskedLM))
    assert not reads_first_token(make_model(PooledEsmForSequenceClassification, classifier_pooling="mean"))
    model.classifier.forward = lambda features, **kwargs: features.mean(1)
    assert not reads_first_token(model)


def test_a_model_that_accelerate_prepared_for_autocast_still_reads_the_first_token():
    """accelerate sets a decorated forward on the model."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    model = make_model()
    decorated = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = types.MethodType(decorated, model)
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    assert reads_first_token(model)
    model.forward = types.MethodType(lambda self, **kwargs: type(self).forward(self, **kwargs), model)
    assert not reads_first_token(model)


def test_a_classifier_under_accelerates_autocast_computes_first_tokens_only_in_its_last_layer(monkeypatch):
    AcceleratorState._reset_state()  # that of another test may have another precision
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(apply_lean_encoder(make_model()))
    assert "forward" in vars(model)
    queries, attend = [], layer.attend
    monkeypatch.setattr(
        layer, "attend", lambda states, query, *a, **kw: queries.append(query) or attend(states, query, *a, **kw)
    )
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
    }
    loss = model(**batch, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert [None if query is None else len(query) for query in queries] == [*[None] * (len(queries) - 1), 2]
    AcceleratorState._reset_state()


def test_a_users_decorator_is_not_taken_off():
    @functools.wraps(EsmIntermediate.forward)
    def wrapped(self, hidden_states):
        return EsmIntermediate.forward(self, hidden_states)

    assert undecorated(wrapped) is wrapped
    assert source_of(wrapped) == __name__
    assert source_of(undecorated(EsmModel.forward)) == modeling_esm.__name__


def subclass(base, **attributes):
    return type(f"My{base.__name__}", (base,), attributes)


@pytest.mark.parametrize(
    ("cls", "known", "expected"),
    [
        (EsmLayer, EsmLayer, True),
        (subclass(EsmLayer), EsmLayer, True),
        (subclass(EsmLayer, purpose="mine"), EsmLayer, True),
        (subclass(EsmLayer, forward=lambda self, x: x), EsmLayer, False),
        (subclass(EsmLayer, feed_forward_chunk=lambda self, x: x), EsmLayer, False),
        (subclass(EsmLayer, __call__=lambda self, x: x), EsmLayer, False),
        (EsmLayer, EsmEncoder, False),
        (nn.Identity, EsmLayer, False),
    ],
)
def test_a_class_is_known_by_its_functions(cls, known, expected):
    assert is_own(cls.__new__(cls), known) is expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), True),
        (subclass(nn.Linear)(2, 2), True),
        (nn.ModuleDict(), True),
        (nn.Sequential(), True),
        (subclass(nn.Linear, forward=lambda self, x: x)(2, 2), False),
        (subclass(nn.Linear, __call__=lambda self, x: x)(2, 2), False),
        (nn.Conv1d(2, 2, 1), False),
        (nn.BatchNorm1d(2), False),
        (nn.Softmax(1), False),
        (None, False),
    ],
)
def test_modules_that_compute_each_token_by_itself(module, expected):
    assert is_per_token(module) is expected
