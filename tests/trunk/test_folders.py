"""Cached states are listed, and deleted if they are old or of another model; nothing else is deleted."""

import json
import os
import time

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from esm_efficient import (
    ConfigurationError,
    cache_states,
    delete_states,
    demo_model_path,
    list_states,
    lora_config,
    split_model,
)
from esm_efficient.trunk import shards

DAY = 24 * 60 * 60


def load(change=0.0):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), dtype=torch.float32)
    with torch.no_grad():
        model.esm.encoder.layer[0].output.dense.weight += change
    return model


def cache(folder, *, layers=1, rows=3, change=0.0, dtype=torch.float32, **options):
    data = Dataset.from_dict({"input_ids": [[0, 5, 6, 7, 2]] * rows})
    trunk, _ = split_model(load(change), layers)
    cache_states(data, trunk.to(dtype), folder, **options)


def age(states, days):
    then = time.time() - days * DAY
    os.utime(states.folder / shards.ABOUT, (then, then))


def test_states_are_listed_with_what_they_are(tmp_path):
    cache(tmp_path)
    cache(tmp_path, layers=0, rows=5, pooling="both", dtype=torch.bfloat16)
    found = {states.sequences: states for states in list_states(tmp_path)}
    assert [(s.layers, s.dtype, s.pooling, s.split) for s in (found[3], found[5])] == [
        (3, "float32", "tokens", "states"),
        (4, "float32", "both", "states"),
    ]
    assert found[3].size > 3 * 5 * 128 * 4
    assert time.time() - found[3].used.timestamp() < 60
    assert "3 sequences of states, 3 layers, tokens in float32" in str(found[3])


def test_states_that_were_not_used_for_some_days_are_deleted(tmp_path):
    cache(tmp_path, rows=3)
    cache(tmp_path, rows=4)
    for states in list_states(tmp_path):
        age(states, 10)
    cache(tmp_path, rows=4)  # used again
    assert delete_states(tmp_path, unused_days=11) == []
    assert [states.sequences for states in delete_states(tmp_path, unused_days=9)] == [3]
    assert [states.sequences for states in list_states(tmp_path)] == [4]
    assert len(list(tmp_path.iterdir())) == 1


def test_states_of_another_model_are_deleted(tmp_path):
    cache(tmp_path, rows=3)
    cache(tmp_path, rows=4, layers=0, dtype=torch.bfloat16)
    cache(tmp_path, rows=5, change=0.1)
    cache(tmp_path, rows=6, layers=0, change=0.1)
    deleted = delete_states(tmp_path, not_of=load())
    assert sorted(states.sequences for states in deleted) == [5, 6]
    assert sorted(states.sequences for states in list_states(tmp_path)) == [3, 4]


def test_states_of_a_copy_in_half_precision_are_those_of_the_model(tmp_path):
    for rows, dtype in ((3, torch.float16), (4, torch.bfloat16)):
        cache(tmp_path, rows=rows, dtype=dtype)
    assert delete_states(tmp_path, not_of=load()) == []


def test_a_damaged_note_hides_its_own_states_alone(tmp_path, caplog):
    cache(tmp_path, rows=3)
    cache(tmp_path, rows=4)
    cache(tmp_path, rows=6)
    *others, last = list_states(tmp_path)
    wrong = json.loads((last.folder / shards.ABOUT).read_text()) | {"sequences": "6"}
    for states, text in zip([*others, last], ("", '{"split": "train"}', json.dumps(wrong)), strict=True):
        (states.folder / shards.ABOUT).write_text(text)
    cache(tmp_path, rows=5)
    assert [states.sequences for states in list_states(tmp_path)] == [5]
    assert caplog.text.count("is damaged") == 3


def test_a_tilde_is_the_home_folder_for_writing_listing_and_deleting(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cache("~/states")
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
    assert len(list_states("~/states")) == 1
    assert len(delete_states("~/states", unused_days=0)) == 1


def test_both_conditions_must_hold(tmp_path):
    cache(tmp_path, rows=3)
    cache(tmp_path, rows=5, change=0.1)
    assert delete_states(tmp_path, not_of=load(), unused_days=1) == []
    for states in list_states(tmp_path):
        age(states, 2)
    assert [states.sequences for states in delete_states(tmp_path, not_of=load(), unused_days=1)] == [5]


def test_other_files_stay(tmp_path):
    cache(tmp_path)
    (states,) = list_states(tmp_path)
    own = states.folder / "notes.txt"
    own.write_text("mine")
    other = tmp_path / "results" / shards.ABOUT
    other.parent.mkdir()
    other.write_text("{}")
    delete_states(tmp_path, unused_days=0)
    assert list(states.folder.iterdir()) == [own]
    assert other.exists()


def test_states_that_a_process_is_writing_stay(tmp_path):
    cache(tmp_path)
    (states,) = list_states(tmp_path)
    with shards._locked(states.folder / "states-00001.arrow.1.part"):
        assert delete_states(tmp_path, unused_days=0) == []
    assert delete_states(tmp_path, unused_days=0) == [states]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {}, "neither unused_days nor not_of"),
        (lambda: {"not_of": get_peft_model(model := load(), lora_config(model))}, "has adapters"),
        (lambda: {"not_of": split_model(load(), 1)[1]}, "give the whole model"),
        (lambda: {"not_of": torch.nn.Linear(2, 2)}, "expected one"),
    ],
)
def test_what_would_delete_too_much_is_refused(tmp_path, options, message):
    cache(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        delete_states(tmp_path, **options())
    assert len(list_states(tmp_path)) == 1
