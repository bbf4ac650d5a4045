"""The command line, run in a new process and in this process."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from conftest import slow_except, tiny_config

from esm_efficient import RECIPES, compare, estimate, recommend
from esm_efficient.adapters.registry import PRESETS
from esm_efficient.cli import commands, comparing, main, training
from esm_efficient.cli.run_files import WRITTEN
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.optimizers import OPTIMIZERS
from esm_efficient.reporting import format_bytes

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ"
COSTS = Path(__file__).parents[2] / "docs/pages/costs.md"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@pytest.mark.slow
def test_the_page_on_costs_shows_what_its_commands_print_offline():
    # A command, and the first block of output after it.
    blocks = re.findall(
        r"```bash\n(esm-efficient estimate [^\n]*)\n```\s+```text\n(.*?)```", COSTS.read_text(), re.DOTALL
    )
    assert [" --model 15B " in command for command, _ in blocks] == [True, False]
    for command, output in blocks:
        run = subprocess.run(
            [sys.executable, "-m", "esm_efficient", *command.split()[1:]],
            capture_output=True,
            text=True,
            env=os.environ | OFFLINE,
            timeout=120,
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, output, "")


def test_options_reach_the_function(capsys):
    options = "--recipe lora --preset qkv --micro-batch 3 --accumulation 2 --tokens 40 --device L4 --attention eager "
    options += "--keep-layers 3"
    command = ["estimate", "--model", "8M", *options.split(), "--padding", "equal-length"]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    expected = estimate(
        "8M",
        recipe=RECIPES["lora"].replace(keep_layers=3),
        preset="qkv",
        micro_batch=3,
        accumulation=2,
        tokens=40,
        device="L4",
        attention="eager",
        padding="equal-length",
    )
    assert record == json.loads(json.dumps(expected.to_dict()))
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a model whose estimates take a third of the time of those of 8M."""
    folder = tmp_path_factory.mktemp("small")
    tiny_config(num_hidden_layers=3).save_pretrained(folder)
    return str(folder)


def test_layers_cache_and_pooling_reach_the_function(capsys, small):
    options = "--recipe lora --layers top-1/3 --cache --pooling mean --tokens 40 --sequences 1000"
    assert main(["estimate", "--model", small, *options.split(), "--json"]) == 0
    recipe = RECIPES["lora"].replace(layers="top-1/3", cache=True, pooling="mean")
    expected = estimate(small, recipe=recipe, tokens=40, sequences=1000)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected.to_dict()))
    assert main(["estimate", "--model", small, *options.split()]) == 0
    assert f"cache: {format_bytes(1000 * (40 * 16 * 2 + 1))} on disk" in capsys.readouterr().out
    frozen = ["estimate", "--model", small, "--recipe", "frozen", "--tokens", "40"]
    assert main(frozen) == 0
    assert "for your table give --sequences N)" in capsys.readouterr().out
    assert main([*frozen, "--no-cache"]) == 0
    assert "cache" not in capsys.readouterr().out


def test_recommend_weighs_the_cache(capsys, small):
    command = f"recommend --model {small} --tokens 40 --batch-size 1 --recipe lora --layers 1,2 --disk 0.5"
    assert main([*command.split(), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [attempt["layers"] for attempt in record["attempts"]] == [[1, 2], [1, 2]]
    assert [attempt["cache"] is not None for attempt in record["attempts"]] == [False, True]
    assert (record["epochs"], record["disk_bytes"]) == (3.0, 2**29)
    assert main([*command.split(), "--no-cache"]) == 0
    out = capsys.readouterr().out
    assert "of layers 1, 2" in out
    assert "cached" not in out


@pytest.mark.slow
def test_recommend_tries_a_quantised_base(capsys):
    command = "recommend --model 8M --device T4 --tokens 64 --recipe lora --batch-size 2 --quantization 4bit --json"
    assert main(command.split()) == 0
    attempts = json.loads(capsys.readouterr().out)["attempts"]
    weights = {attempt["quantization"]: attempt["peak"]["weights"] for attempt in attempts}
    assert set(weights) == {None, "4bit"}
    assert weights["4bit"] < weights[None]


def test_recommend_prints_what_it_tried(capsys):
    command = "recommend --model 8M --device T4 --tokens 40 --batch-size 1 --precision float32 --recipe lora"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "ESM-2 8M on T4" in out
    assert out.count("taken") == 1
    advice = "(for your table give --sequences N)"
    assert advice in out
    assert main([*command.split(), "--sequences", "100"]) == 0
    assert advice not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    slow_except(
        ["", "--tokens 2000", "--layers top-1/3 --cache --pooling mean --precision fp16 --keep-layers 2"],
        "",
    ),
)
def test_recommend_gives_a_line_that_trains_what_it_chose(options, capsys, monkeypatch, small):
    # The last of two numbers of tokens counts.
    command = f"recommend --model {small} --device T4 --tokens 40 --batch-size 4 --recipe lora --epochs 2 " + options
    assert main([*command.split(), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(command.split()) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Train with it: ")]
    given = {}

    def train(model, data, **options):
        given.update(options, model=model)
        raise ConfigurationError("enough")

    monkeypatch.setattr("esm_efficient.training.finetune.finetune", train)
    assert main(line.split()[4:]) == 2  # there is no file DATA
    assert main([*line.replace("DATA", "demo").split()[4:]]) == 1
    assert given["model"] == small
    assert {name: given[name] for name in ("epochs", "batch_size", "micro_batch")} == {
        "epochs": 2.0,
        "batch_size": 4,
        "micro_batch": record["micro_batch"],
    }
    assert (given["recipe"].layers, given["recipe"].cache) == (record["layers"], record["cached"])
    assert given["recipe"].pooling == record["pooling"]
    assert given["recipe"].keep_layers == (2 if "keep-layers" in options else None)
    assert given["precision"] == ("fp16" if "fp16" in options else "auto")
    assert given["max_tokens"] == (2000 if "tokens" in options else 1024)


@pytest.mark.parametrize("option", ["--preset qkv", "--optimizer adamw_foreach"])
def test_recommend_gives_no_line_for_what_finetune_has_no_option_for(capsys, option, small):
    command = f"recommend --model {small} --device T4 --tokens 40 --batch-size 1 --recipe lora {option}"
    assert main(command.split()) == 0
    assert "Train with it" not in capsys.readouterr().out


def test_compare_writes_the_page(capsys, tmp_path, small):
    command = (
        f"compare --model {small} --device L4 --tokens 40 --recipe base --recipe all --steps 7 --output {tmp_path}"
    )
    assert main(command.split()) == 0
    expected = compare(small, device="L4", tokens=40, recipes=["base", "all"], steps=7)
    assert str(expected) in capsys.readouterr().out
    assert (tmp_path / "comparison.html").read_text() == expected.to_html(command=f"esm-efficient {command}")


@pytest.mark.parametrize(
    ("labels", "metric"),
    [(["yes", "no", "Yes"] * 12, "mcc"), ([0.5 + n for n in range(36)], "rmse")],
)
@pytest.mark.slow
def test_compare_trains_on_a_table_of_ones_own(labels, metric, tmp_path, capsys):
    from esm_efficient import demo_model_path

    rows = [f"{SEQUENCE[n:] + SEQUENCE[:n]},{label}" for n, label in enumerate(labels)]
    (tmp_path / "mine.csv").write_text("\n".join(["protein,binds", *rows]))
    command = f"compare --model {demo_model_path()} --data {tmp_path}/mine.csv --label binds --limit 12 --recipe top"
    assert main([*command.split(), "--steps", "1", "--epochs", "1", "--device", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "12 sequences to train on" in record["note"]
    assert record["metric"] == metric
    assert [len(row["scores"]) for row in record["rows"]] == [1, 1]


@pytest.mark.slow
def test_compare_trains_on_the_demo(capsys):
    from esm_efficient import demo_model_path

    command = f"compare --model {demo_model_path()} --data demo --limit 16 --recipe frozen --steps 2 --epochs 1"
    assert main([*command.split(), "--device", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["steps"] for row in record["rows"]] == [2, 2]
    assert "16 sequences to train on" in record["note"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("estimate --model 8M --device A11", "no device"),
        (
            "recommend --model 15B --device T4 --precision float32 --batch-size 1 --tokens 30 --recipe base",
            "no setting that was tried fits",
        ),
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
    "command",
    [
        "estimate --recipe best",
        "estimate --device A11",
        "estimate --layers top-0",
        "compare --pooling max",
        "recommend --epochs 0",
        "--help",
        "recommend --help",
    ],
)
def test_invalid_arguments_and_help_import_no_torch(command):
    code = f"import sys; from esm_efficient.cli import main; main({command.split()}); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.endswith("False\n")


def test_help_lists_commands_and_options(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    commands = [line.split()[0] for line in shown.split("Commands:")[1].splitlines() if line.strip()]
    assert commands[:5] == ["data", "probe", "finetune", "evaluate", "predict"]
    assert {"estimate", "recommend", "compare", "targets", "embed", "report", "export"} == set(commands[5:])
    assert "..." not in shown.split("Commands:")[1]  # every line is whole
    assert main(["recommend", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--batch-size", "--tokens", "--recipe", "--json"))


def test_the_file_of_a_run_has_every_option_that_changes_the_run():
    options = inspect.signature(training.finetune).parameters.keys()
    assert options - set(WRITTEN) == {"output", "resume", "config", "as_json", "verbose"}
    assert set(WRITTEN) <= options


def test_the_default_device_is_one_in_python_and_on_the_command_line():
    functions = (estimate, recommend, commands.estimate, commands.recommend)
    assert [inspect.signature(function).parameters["device"].default for function in functions] == ["A10G"] * 4
    for function in (compare, comparing.compare):  # this machine, if it trains
        assert inspect.signature(function).parameters["device"].default is None


def test_the_choices_that_need_no_torch_are_those_of_the_library():
    assert set(get_args(commands.Preset)) == set(PRESETS)
    assert set(get_args(get_args(commands.OptimizerOption)[0])) == set(OPTIMIZERS)
