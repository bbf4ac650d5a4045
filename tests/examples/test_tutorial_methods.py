"""The tutorial's methods are rebuilt with their faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm_efficient import demo_model_path, load_deeploc, stratified_sample

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("kind", "steps"), [("base", 4), ("all", 1)])
def test_all_moves_the_head_alone_and_takes_a_quarter_of_the_steps(kind, steps, demo_table, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tutorial_methods import train_as_the_tutorial

    data = load_deeploc(demo_table, max_residues=300)
    data = {name: stratified_sample(data[name], size) for name, size in (("train", 32), ("test", 8))}
    figures = train_as_the_tutorial(kind, demo_model_path(), data, seed=0, folder=tmp_path, callbacks=[])
    assert figures["steps"] == steps
    assert 0 <= figures["metrics"]["accuracy"] <= 1
    assert figures["peak_activation_bytes"] > 0
    width, labels = 128, 2
    head = width * width + width + labels * width + labels
    assert figures["moved_parameters"] == (head if kind == "all" else figures["trainable_parameters"])
    assert (figures["moved_parameters"] < figures["trainable_parameters"]) == (kind == "all")
