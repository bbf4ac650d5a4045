"""The registry: suffixes of whole path components, and parts that are never adapted."""

from __future__ import annotations

import pytest
from transformers import EsmForSequenceClassification

from esm_efficient.adapters.registry import ARCHITECTURES, PRESETS, ROLES, ends_with, find_architecture, is_unread


@pytest.mark.parametrize(
    ("path", "suffix", "matches"),
    [
        ("esm.encoder.layer.0.attention.self.query", "query", True),
        ("esm.encoder.layer.0.attention.self.query", "self.query", True),
        ("query", "query", True),
        ("my_query", "query", False),
        ("esm.encoder.layer.0.attention.output.dense", "output.dense", True),
        ("layer.query.base_layer", "query", False),
    ],
)
def test_ends_with(path, suffix, matches):
    assert ends_with(path, suffix) is matches


def test_every_architecture_has_every_role_of_every_preset():
    for architecture in ARCHITECTURES:
        assert set(architecture.roles) == set(ROLES)
    assert all(set(roles) <= set(ROLES) for roles in PRESETS.values())


def test_no_role_touches_the_contact_head_or_the_classifier(tiny_model):
    model = tiny_model(EsmForSequenceClassification)
    architecture = find_architecture(model)
    for path, _ in model.named_modules():
        if "contact_head" in path or path.startswith("classifier"):
            assert not any(ends_with(path, suffix) for suffix in architecture.roles.values())


def test_unread_parts_are_found_by_whole_components():
    esm = ARCHITECTURES[0]
    assert is_unread(esm, "esm.contact_head.regression.weight")
    assert not is_unread(esm, "esm.my_contact_head.weight")
