"""The script that measures on a GPU writes down what fails, and goes on with the next part."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "benchmarks"
WORKER = """
import json, os, sys, time

options = sys.argv[1:]
lines, parts = options[options.index("--lines") + 1], options[options.index("--parts") + 1 :]
def write(text):
    with open(lines, "a") as stream:
        stream.write(text)
def line(**values):
    write(json.dumps(values) + "\\n")
if "absent" in parts[:1]:
    sys.exit("no such library")
for part in parts:
    line(part=part, status="started")
    line(part=part, row={"what": "first", "ms": 1.5})
    if part == "fails":
        line(part=part, row={"what": "second", "error": "ValueError: no"})
    elif part == "hangs":
        write('{"part": "hangs", "row"')
        time.sleep(60)
    elif part == "dies":
        print("out of luck", flush=True)
        os.abort()
    line(part=part, status="done")
    if part == "last_of_its_process":
        sys.exit(0)
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script as a module, with parts that do nothing."""
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(gpu, "__file__", str(worker))
    return gpu


def run(gpu, monkeypatch, tmp_path, parts, seconds=60):
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(parts, 1))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(tmp_path / "g.json"), "--seconds", str(seconds)])
    try:
        gpu.main()
        message = ""
    except SystemExit as stopped:
        message = str(stopped.code)
    return json.loads((tmp_path / "g.json").read_text())["parts"], message


def test_a_failure_of_a_part_does_not_take_the_others(gpu, monkeypatch, tmp_path, capsys):
    parts = ["good", "fails", "hangs", "absent", "dies", "last_of_its_process", "fine"]
    record, message = run(gpu, monkeypatch, tmp_path, parts)
    status = {name: part["status"] for name, part in record.items()}
    assert list(status) == parts
    assert [status[name] for name in ("good", "fails", "last_of_its_process", "fine")] == ["done"] * 4
    assert status["hangs"] == "stopped: it took longer than 1 s"
    assert status["absent"] == "stopped: its process ended with status 1 no such library"
    assert status["dies"] == "stopped: its process ended with status -6 out of luck"
    first = {"what": "first", "ms": 1.5}
    rows = {name: part["rows"] for name, part in record.items()}
    assert rows.pop("fails") == [first, {"what": "second", "error": "ValueError: no"}]
    assert rows.pop("absent") == []
    assert list(rows.values()) == [[first]] * 5
    assert "4 did not succeed" in message
    assert "fails, second: ValueError: no" in message
    assert "fine: done" in capsys.readouterr().out


def test_the_parts_end_in_the_given_time(gpu, monkeypatch, tmp_path):
    began = time.monotonic()
    record, message = run(gpu, monkeypatch, tmp_path, ["hangs", "good"], seconds=0.5)
    assert time.monotonic() - began < 10
    assert record["hangs"]["status"] == "stopped: no time was left"
    assert record["good"]["status"] == "not run: no time was left"
    assert "2 did not succeed" in message


def test_parts_that_end_well_give_no_error(gpu, monkeypatch, tmp_path):
    record, message = run(gpu, monkeypatch, tmp_path, ["good", "fine"])
    assert [part["status"] for part in record.values()] == ["done", "done"]
    assert message == ""
