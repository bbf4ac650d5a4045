"""load_result(): the folder of a run gives the same table and page as the run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import slow_except
from datasets import DatasetDict

from esm_efficient import demo_model_path, finetune, load_deeploc, load_result
from esm_efficient.errors import ConfigurationError
from esm_efficient.training.result import FinetuneResult


def splits_of(kind, demo_table):
    data = load_deeploc(demo_table, task="location" if kind == "several labels" else "membrane", max_residues=300)
    data = DatasetDict({name: data[name].select(range(12)) for name in ("train", "validation", "test")})
    if kind == "numbers":
        data = data.remove_columns("label").map(lambda row: {"label": row["residues"] / 10})
    return data


@pytest.mark.parametrize("kind", slow_except(["classes", "several labels", "numbers"], "several labels"))
def test_a_folder_gives_the_result_again(tmp_path, demo_table, kind):
    result = finetune(
        demo_model_path(),
        splits_of(kind, demo_table),
        recipe="frozen",
        output_dir=tmp_path,
        class_weights=None,
        probe=True,
        disable_tqdm=True,
    )
    loaded = load_result(tmp_path)
    assert str(loaded) == str(result)
    assert loaded.to_html() == result.to_html()
    assert loaded.to_dict() == json.loads(json.dumps(result.to_dict()))
    np.testing.assert_array_equal(loaded.evaluation.scores, result.evaluation.scores.astype(np.float32))
    assert loaded.model is None
    assert loaded.probe == result.probe is not None
    assert load_result(tmp_path / "model").result_path == loaded.result_path
    record = json.loads(result.result_path.read_text())
    result.result_path.write_text(json.dumps(record | {"model_dir": "C:\\runs\\model"}))  # trained on Windows
    assert load_result(tmp_path / "model").model_dir == loaded.model_dir
    (tmp_path / "adapter").mkdir()  # of a former run in the same folder
    with pytest.raises(ConfigurationError, match=r"^[^ ]*adapter is not the model of the run in .*: give [^ ]*model$"):
        load_result(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "has no result.json"),
        ("{", "cannot be read"),
        ('{"task": {"kind": "regression", "names": ["x"]}}', "another version"),
    ],
)
def test_a_folder_without_a_whole_record_is_refused(tmp_path, record, message):
    if record is not None:
        (tmp_path / "result.json").write_text(record)
    with pytest.raises(ConfigurationError, match=message):
        load_result(tmp_path)


@pytest.mark.parametrize(
    ("trained", "layers", "words"),
    [
        ((), 6, "0 of 6"),
        (range(6), 6, "6 of 6"),
        ((5,), 6, "the top 1 of 6"),
        (range(22, 33), 33, "the top 11 of 33"),
        ((1,), 6, "1 of 6: 1"),
        ((1, 2), 6, "2 of 6: 1, 2"),
        (range(2, 32), 33, "30 of 33: 2 to 31"),
        ((0, 1, 5), 6, "3 of 6: 0, 1, 5"),
    ],
)
def test_the_layers_that_trained_are_named(trained, layers, words):
    record = SimpleNamespace(trained_layers=tuple(trained), layers=layers)
    assert FinetuneResult.layers_in_words.fget(record) == words


def test_the_peak_of_memory_says_what_it_counts():
    record = SimpleNamespace(peak_memory_bytes=2**30, peak_memory_kind="process")
    words = "1.00 GiB of the whole process, with Python and libraries"
    assert FinetuneResult.peak_memory_in_words.fget(record) == words
