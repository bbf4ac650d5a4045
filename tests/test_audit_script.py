"""The check of installed packages fails on a vulnerability, and says so if it could not ask for any."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / ".ci" / "audit.py"


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLEAN = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "own", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("stdout", "stderr", "status", "message"),
    [
        (json.dumps({"dependencies": [CLEAN, UNKNOWN]}), "", 0, "1 of 2 packages checked, 0 vulnerabilities"),
        (json.dumps({"dependencies": [CLEAN, BAD]}), "", 1, "bad 2: PYSEC-1 is fixed in 3"),
        (json.dumps({"dependencies": [UNKNOWN]}), "", 0, "is skipped: the service knows none of the 1"),
        ("", "Traceback\nConnectionError: no route", 0, "is skipped: .*ConnectionError: no route"),
        ("", "pip-audit: error: unrecognized arguments: --nope", 1, "failed: .*unrecognized arguments"),
        ("[]", "", 1, "failed: no output"),
    ],
)
def test_the_status_follows_the_answer(audit, monkeypatch, capsys, stdout, stderr, status, message):
    done = subprocess.CompletedProcess([], 0, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    assert audit.main() == status
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 2
    assert re.search(message, printed)
