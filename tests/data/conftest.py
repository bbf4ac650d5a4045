"""A cache folder of its own for each test that loads files."""

from __future__ import annotations

import pytest


@pytest.fixture
def table_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
