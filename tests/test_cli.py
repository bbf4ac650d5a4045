"""The command line, run in a new process and in this process."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest

from esm_efficient import compare, estimate, recommend
from esm_efficient.cli import commands, main


def test_the_largest_model_is_estimated_offline(tmp_path):
    command = "estimate --model 15B --recipe all --micro-batch 1 --tokens 1024 --device A100-80 --json"
    run = subprocess.run(
        [sys.executable, "-m", "esm_efficient", *command.split(), str(tmp_path / "sub" / "e.json")],
        capture_output=True,
        text=True,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "sub" / "e.json").read_text())
    assert record["total_parameters"] > 15e9
    assert record["peak_bytes"] == sum(record["peak"].values()) - record["peak"]["total"]
    assert record["fits"] is True
    assert "fits A100-80" in run.stdout
    assert run.stderr == ""


def test_options_reach_the_function(capsys, tmp_path):
    options = "--recipe lora --preset qkv --micro-batch 3 --accumulation 2 --tokens 40 --device L4 --attention eager"
    file = tmp_path / "e.json"
    assert main(["estimate", "--model", "8M", *options.split(), "--padding", "equal-length", "--json", str(file)]) == 0
    expected = estimate(
        "8M",
        recipe="lora",
        preset="qkv",
        micro_batch=3,
        accumulation=2,
        tokens=40,
        device="L4",
        attention="eager",
        padding="equal-length",
    )
    assert json.loads(file.read_text()) == json.loads(json.dumps(expected.to_dict()))
    assert str(expected) in capsys.readouterr().out


def test_recommend_prints_what_it_tried(capsys):
    command = "recommend --model 8M --device T4 --tokens 40 --batch-size 1 --precision float32 --recipe lora"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "ESM-2 8M on T4" in out
    assert out.count("taken") == 1


def test_compare_writes_the_page(capsys, tmp_path):
    command = f"compare --model 8M --device L4 --tokens 40 --recipe base --recipe all --steps 7 --output {tmp_path}"
    assert main(command.split()) == 0
    expected = compare("8M", device="L4", tokens=40, recipes=["base", "all"], steps=7)
    assert str(expected) in capsys.readouterr().out
    assert (tmp_path / "comparison.html").read_text() == expected.to_html()


def test_compare_trains_on_the_demo(capsys, tmp_path):
    from esm_efficient import demo_model_path

    command = f"compare --model {demo_model_path()} --data demo --limit 16 --recipe frozen --steps 2 --epochs 1"
    assert main([*command.split(), "--device", "cpu", "--json", str(tmp_path / "c.json")]) == 0
    record = json.loads((tmp_path / "c.json").read_text())
    assert [row["steps"] for row in record["rows"]] == [2, 2]
    assert "16 sequences to train on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("estimate --model 9M", "one of the ESM-2 sizes"),
        ("estimate --model 8M --device A11", "no device"),
        (
            "recommend --model 15B --device T4 --precision float32 --batch-size 1 --tokens 30 --recipe base",
            "no setting that was tried fits",
        ),
        ("compare --model 8M --data /nowhere.csv", "nowhere.csv"),
    ],
)
def test_errors_of_the_library_end_with_1_and_no_traceback(command, message, capsys):
    assert main(command.split()) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("estimate --recipe best", "no recipe is named 'best': expected one of base, ga, gc, lora, all, frozen"),
        ("recommend --recipe base --recipe best", "expected one of base, ga, gc, lora, all, frozen"),
        ("estimate --padding none", "'padded', 'equal-length', 'padding-free'"),
        ("estimate --precision int4", "'auto', 'float32', 'bf16', 'fp16', 'pure-bf16'"),
        ("estimate --micro-batch 0", "--micro-batch"),
        ("compare --limit 3", "--limit needs --data"),
        ("compare --data demo --precision fp16", "train in float32 or bf16"),
        ("recommend --batch 3", "--batch"),
        ("guess", "guess"),
    ],
)
def test_invalid_arguments_end_with_2_and_one_line(command, message, capsys):
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", ["estimate --recipe best", "estimate --device A11", "--help", "recommend --help"])
def test_invalid_arguments_and_help_import_no_torch(command):
    code = f"import sys; from esm_efficient.cli import main; main({command.split()}); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.endswith("False\n")


def test_help_lists_commands_and_options(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("estimate", "recommend", "compare"))
    assert main(["recommend", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--batch-size", "--tokens", "--recipe", "--json"))


def test_the_default_device_is_one_in_python_and_on_the_command_line():
    functions = (estimate, recommend, compare, commands.estimate, commands.recommend, commands.compare)
    assert [inspect.signature(function).parameters["device"].default for function in functions] == ["A10G"] * 6
