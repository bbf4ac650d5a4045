"""The methods of the study are told apart by their settings, and train at the rates that they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, get_linear_schedule_with_warmup

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def study_methods(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import study_methods

    return study_methods


def test_a_name_and_its_settings_belong_to_one_method(study_methods):
    methods = study_methods.list_methods(6)
    names = [method.name for method in methods]
    assert len(set(names)) == len(names)
    tuned = [method for method in methods if method.recipe and method.recipe.trains != "head"]
    settings = [json.dumps(method.settings, sort_keys=True) for method in tuned]
    assert len(set(settings)) == len(settings)


def make_optimizer():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("body", "classifier")})
    kernels = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": kernels}, {"params": biases, "weight_decay": 0.5}], lr=0.1)
    return model, optimizer, get_linear_schedule_with_warmup(optimizer, 2, 10)


def test_named_parameters_train_at_their_rate_in_every_step(study_methods):
    model, optimizer, scheduler = make_optimizer()
    callback = study_methods.GroupRates({"*classifier*": 4.0})
    callback.on_train_begin(
        None, TrainerState(), TrainerControl(), model=model, optimizer=optimizer, lr_scheduler=scheduler
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for share in (0.0, 0.5, 1.0, 0.875):
        groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
        assert groups.keys() == {"body.weight", "body.bias", "classifier.weight", "classifier.bias"}
        for name, group in groups.items():
            assert group["lr"] == pytest.approx((0.4 if "classifier" in name else 0.1) * share)
            assert group["weight_decay"] == (0.5 if "bias" in name else 0.01)
        optimizer.step()
        scheduler.step()


def test_a_rate_for_no_parameter_is_refused(study_methods):
    model, optimizer, scheduler = make_optimizer()
    callback = study_methods.GroupRates({"*lora_B*": 4.0})
    with pytest.raises(ValueError, match="no parameter that trains is named like"):
        callback.on_train_begin(
            None, TrainerState(), TrainerControl(), model=model, optimizer=optimizer, lr_scheduler=scheduler
        )
