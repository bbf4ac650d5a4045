"""Warnings of a run are kept for its page, and still reach whoever reads the terminal."""

from __future__ import annotations

import logging

import pytest

from esm_efficient.training.outcome import WarningList


@pytest.mark.parametrize("place", [None, "esm_efficient", "esm_efficient.training", ""])
def test_a_warning_is_kept_and_shown_once(place, monkeypatch, capsys):
    """Without any configuration of logging, Python itself shows warnings, unless a handler takes them."""
    for name in ("", "esm_efficient", "esm_efficient.training", "esm_efficient.training.outcome"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    if place is not None:
        logging.getLogger(place).addHandler(logging.StreamHandler())
    with WarningList() as kept:
        logging.getLogger("esm_efficient.training.outcome").warning("few %s", "steps")
    assert kept.messages == ["few steps"]
    assert capsys.readouterr().err == "few steps\n"
