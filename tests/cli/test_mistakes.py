"""Plausible mistakes on the command line: each is answered by one line that names what was typed."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from esm_efficient.cli import main
from esm_efficient.cli.output import as_typed

USAGE = {
    "finetun demo": "No such command 'finetun'",
    "finetune": "Missing argument 'DATA'",
    "finetune no.csv": "no file at no.csv",
    "finetune .": ". is a folder: expected a file of sequences",
    "evaluate m .": ". is a folder: expected a file of sequences",
    "predict m /dev/null": "/dev/null is a pipe or a device: expected a file, because it is read twice",
    "predict demo deeploc": "no file at deeploc",
    "data -": "no file at -",
    "finetune demo extra": "unexpected extra argument",
    "finetune demo --model 36M": "no ESM-2 model has the size '36M': expected one of 8M, 35M",
    "finetune demo --model ./nowhere": "no folder at ./nowhere",
    "finetune demo --model": "requires an argument",
    "finetune demo --recipe loraa": "no recipe is named 'loraa'",
    "finetune demo --epochs 0": "--epochs: 0.0: expected more than 0",
    "finetune demo --epochs nan": "--epochs: nan: expected more than 0 and a finite number",
    "finetune demo --learning-rate inf": "--learning-rate inf: expected more than 0 and a finite number",
    "finetune demo --epochs three": "Invalid value for '--epochs': 'three': expected a number",
    "finetune demo --epochs 2,5": "Invalid value for '--epochs': '2,5': write 2.5",
    "finetune demo --learning-rate 0,001": "Invalid value for '--learning-rate': '0,001': write 0.001",
    "finetune demo --learning-rate 1,0,1": "'1,0,1': expected a number",
    "compare --epochs 0,5": "'0,5': write 0.5",
    "recommend --margin 0,1": "'0,1': write 0.1",
    "recommend --disk x": "Invalid value for '--disk': 'x': expected a number",
    "finetune demo --epocs 3": "--epocs",
    "finetune demo --batch-size 0": "greater than or equal to 1",
    "finetune demo --batch-size 8.5": "8.5",
    "finetune demo --batch-size 8,5": "8,5",
    "finetune demo --learning-rate 0": "--learning-rate 0.0: expected more than 0",
    "finetune demo --lr 1e-3": "--lr",
    "finetune demo --layers top": "'--layers': 'top': expected all, a number of top layers such as top-2",
    "finetune demo --micro-batch 0": "greater than or equal to 1",
    "finetune demo --pooling max": "'max' is not one of 'first', 'mean', 'attention'",
    "finetune demo --class-weights heavy": "'heavy' is not one of 'balanced', 'none'",
    "finetune demo --label-kind number2": "'number2' is not one of",
    "finetune demo --on-error ignore": "'ignore' is not one of 'raise', 'skip'",
    "finetune demo --clusters no.tsv": "'no.tsv' does not exist",
    "finetune demo --early-stopping -1": "greater than or equal to 0",
    "finetune demo --max-residues 0": "greater than or equal to 1",
    "finetune demo --precision fp8": "'fp8' is not one of",
    "finetune demo --seed x": "Invalid value for '--seed'",
    "finetune demo --seed -1": "greater than or equal to 0",
    "finetune demo --seed 5000000000": "less than or equal to 4294967295",
    "data demo --seed -1": "greater than or equal to 0",
    "probe demo --seed -1": "greater than or equal to 0",
    "compare --data demo --seed -1": "greater than or equal to 0",
    "finetune demo --config no.yaml": "no.yaml cannot be read as YAML",
    "finetune demo --output FILE": "FILE is a file: expected a folder to write to",
    "finetune demo --output FILE/run": "FILE is a file: expected a folder to write to",
    "predict m": "'MODEL...'. Expected MODEL... FILE: the last word is taken as FILE, so one of the two is missing",
    "predict ./nowhere FILE": "no folder at ./nowhere: expected a folder of finetune or export or a Hub name\n",
    "embed ./nowhere FILE": "no folder at ./nowhere: expected a folder, an ESM-2 size such as 650M, or a Hub name\n",
    "predict m no.fasta": "no file at no.fasta",
    "predict m FILE -o p.txt": "expected a file that ends with .csv",
    "predict m FILE -o /nowhere/p.csv": "its folder does not exist",
    "predict m FILE --shard 3/2": "expected a part and the number of parts",
    "predict m FILE --shard x": "'x': expected a part and the number of parts",
    "predict m FILE --keep middle": "'middle' is not one of 'start', 'end', 'both', 'windows'",
    "predict m FILE --overlap 9": "--overlap is that of windows: give --keep windows too",
    "predict m FILE --keep windows --overlap -1": "greater than or equal to 0",
    "predict m FILE --token-budget 3": "greater than or equal to 16",
    "embed 9M FILE": "no ESM-2 model has the size '9M'",
    "embed 8M no.fasta": "no file at no.fasta",
    "embed 8M FILE --pooling max": "'max' is not one of 'mean', 'first', 'residues'",
    "embed 8M FILE --pooling residues -o e.csv": "--pooling residues does not fit into CSV",
    "embed 8M FILE --layer -1": "greater than or equal to 0",
    "data": "Missing argument",
    "data no.csv": "no file at no.csv",
    "evaluate m": "Missing argument 'MODEL...'. Expected MODEL... DATA: the last word is taken as DATA",
    "evaluate m no.csv": "no file at no.csv",
    "evaluate m FILE --report page.pdf": "page.pdf: expected a file that ends with .html",
    "probe no.csv": "no file at no.csv",
    "probe demo --max-tokens 2": "greater than or equal to 3",
    "probe demo --report /nowhere/p.html": "its folder does not exist",
    "export nowhere out": "no folder at nowhere: expected the folder that finetune wrote",
    "export . FILE": "FILE is a file: expected a folder to write to",
    "report nowhere": "no folder at nowhere",
    "export . out --push membrane": "--push: 'membrane': expected the form owner/name",
    "export . out --public": "--public is of a repository: give --push OWNER/NAME too",
    "targets 8M --preset all": "'all' is not one of 'qkv', 'attention', 'mlp', 'all-linear'",
    "targets 8M --layers 1/3": "'--layers': '1/3': expected all",
    "estimate --model 9M": "no ESM-2 model has the size '9M'",
    "estimate --recipe best": "no recipe is named 'best': expected one of base, ga, gc, lora, all, top, frozen",
    "estimate --padding none": "'padded', 'equal-length', 'padding-free'",
    "estimate --precision int4": "'auto', 'float32', 'bf16', 'fp16', 'pure-bf16'",
    "estimate --micro-batch 0": "--micro-batch",
    "estimate --layers top": "'top': expected all, a number of top layers such as top-2",
    "estimate --model 8M --keep-layers 7": "--keep-layers: 7: 8M has 6 layers",
    "estimate --model 8M --keep-layers 2 --layers top-3": "'top-3': 8M has 6 layers, from 0 on, and keeps 2 of them",
    "finetune demo --keep-layers 0": "greater than or equal to 1",
    "estimate --model 8M --layers top-7": "--layers: 'top-7': 8M has 6 layers",
    "estimate --recipe base --cache": "--cache: recipe base trains all parameters",
    "estimate --sequences 0": "--sequences",
    "estimate --report page.txt": "page.txt: expected a file that ends with .html",
    "recommend --recipe base --recipe best": "expected one of base, ga, gc, lora, all, top, frozen",
    "recommend --batch 3": "--batch",
    "recommend --model 8M --layers 4,6": "--layers: (4, 6): 8M has 6 layers",
    "recommend --model 8M --keep-layers 7": "--keep-layers: 7: 8M has 6 layers",
    "compare --model 8M --keep-layers 7": "--keep-layers: 7: 8M has 6 layers",
    "recommend --pooling max": "'first', 'mean', 'attention'",
    "recommend --recipe base --quantization 4bit": "add one, such as --recipe lora",
    "recommend --quantization 3bit": "'3bit' is not one of '4bit', '8bit'",
    "recommend --epochs 0": "--epochs: 0.0: expected more than 0",
    "recommend --epochs nan": "--epochs: nan: expected more than 0 and a finite number",
    "recommend --epochs inf": "--epochs: inf: expected more than 0 and a finite number",
    "recommend --disk -1": "--disk: -1.0: expected a finite number of GiB, at least 0",
    "recommend --disk inf": "--disk: inf: expected a finite number of GiB",
    "recommend --recipe lora --cache --quantization 4bit": "--cache: a base in 4 or 8 bits trains without a cache",
    "estimate --cache --quantization 4bit": "--cache: a base in 4 or 8 bits trains without a cache",
    "compare --limit 3": "--limit needs --data",
    "compare --label binds": "--label needs --data",
    "compare --seed 7": "--seed needs --data",
    "compare --accession id": "--accession needs --data",
    "compare --model 8M --data /nowhere.csv": "no file at /nowhere.csv",
    "compare --data demo --precision pure-bf16": "train in float32, bf16 or fp16",
    "compare --layers 1,x": "'1,x': expected all",
    "compare --cache": "give --layers, such as --layers top-1/3",
    "compare --epochs nan": "--epochs: nan: expected more than 0 and a finite number",
    "compare --epochs 0": "--epochs: 0.0: expected more than 0",
    "compare --data demo --sequences 5": "--sequences is for estimates, and --data trains on its table, or on --limit",
    "compare --data demo --tokens 64": "--tokens is for estimates, and --data trains on its table",
    "compare --data demo --padding padded": "--padding is for estimates",
    "compare --data demo --attention eager": "--attention is for estimates",
    "compare --data demo --optimizer adamw_8bit": "--optimizer is for estimates",
    "estimate --optimizer sgd": "'sgd' is not one of 'adamw_fused', 'adamw_foreach', 'adamw', 'adamw_8bit'",
    "estimate --preset bogus": "'bogus' is not one of 'qkv', 'attention', 'mlp', 'all-linear'",
    "recommend --recipe base --preset bogus": "--preset': 'bogus' is not one of 'qkv', 'attention'",
    "recommend --margin 1": "--margin: 1.0: expected a share from 0 to below 1",
    "finetune demo --model 8M --layers top-7": "--layers: 'top-7': 8M has 6 layers",
    "finetune demo --model 8M --keep-layers 7": "--keep-layers: 7: 8M has 6 layers",
    "finetune demo --recipe frozen --rank 4": "--rank: recipe frozen has no adapters",
    "finetune FILE --test-size 1": "--test-size: 1.0: expected a share from 0 to below 1",
    "probe FILE --validation-size -0.1": "--validation-size: -0.1: expected a share from 0 to below 1",
    "data FILE --test-partition x": "Invalid value for '--test-partition'",
    "compare --test-size 0.3": "--test-size needs --data",
    "finetune demo --config MISSPELT": "MISSPELT has epocs: did you mean 'epochs'?",
    "finetune demo --config LATIN": "LATIN cannot be read as YAML",
    "compare --output FILE": "FILE is a file: expected a folder to write to",
}
"""Mistakes that are seen before torch is imported; FILE is a file that exists."""

LIBRARY = {
    "finetune demo --model demo --micro-batch 3": "--micro-batch 3 does not divide the 8 sequences",
    "finetune FILE --model demo": "FILE is empty",
    "finetune demo --model demo --report-to notes": "--report-to notes: transformers knows no such tracker, or its",
    "estimate --model 8M --device A11": "no device or instance type is named 'A11'",
    "compare --data demo --recipe lora --seed 1 --seed 1": "at least one seed, each of them once",
    "report .": "has no result.json: expected the folder that finetune wrote",
    "export . out": "has no result.json: expected the folder that finetune wrote",
    "targets 8M --layers top-9": "--layers top-9: the encoder has only 6 layers",
    "data demo --label binds": "--label: the table 'demo' has its own columns",
    "data FILE": "FILE",
    "predict m FILE": "there is no folder m, and it is not a Hub name of the form owner/name\n",
    "predict 9M FILE": "there is no folder 9M, and it is not a Hub name of the form owner/name\n",
    "predict 8M FILE": "8M is a pretrained model without a trained head, and its predictions would be random: give the",
    "evaluate demo demo": "demo is a pretrained model without a trained head",
    "predict demo m FILE": "demo is a pretrained model without a trained head",
}
"""Mistakes that the library finds."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "MISSPELT").write_text("epocs: 3")
    (tmp_path / "LATIN").write_bytes("model: größe".encode("latin-1"))
    return tmp_path


@pytest.mark.parametrize(("command", "message"), [*USAGE.items(), *LIBRARY.items()])
def test_a_mistake_is_answered_in_one_line(folder, command, message, capsys):
    assert main(command.split()) == (2 if command in USAGE else 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err.replace(str(folder), ".").replace("./FILE", "FILE")
    assert sorted(path.name for path in folder.iterdir()) == ["FILE", "LATIN", "MISSPELT"]


def test_the_models_beside_a_folder_that_is_not_there_are_named(folder, capsys):
    (folder / "first" / "adapter").mkdir(parents=True)
    (folder / "first" / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "first" / "logs").mkdir()
    for command in ("predict first/adaptor FILE", "predict ./first/adaptor FILE", "embed first/adaptor FILE"):
        assert main(command.split()) in (1, 2)
        assert "first/adaptor (first has adapter)" in capsys.readouterr().err.replace("./first", "first")
    for command in ("predict first first FILE", "predict first FILE"):
        assert main(command.split()) == 1
        assert "first is the folder of a run: give first/adapter" in capsys.readouterr().err


def test_nothing_typed_is_answered_by_the_help_alone(capsys):
    assert main([]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("Usage: esm-efficient") == 1
    assert captured.err == ""


@pytest.mark.parametrize("log", [False, True])
def test_no_code_of_a_file_reaches_the_terminal(log, capsys):
    from esm_efficient.cli.output import quiet, show

    name = "\x1b[31mred\x1b]0;title\x07\u202e\nnext"
    with quiet():
        if log:
            logging.getLogger("esm_efficient.data").warning("column %s", name)
        else:
            warnings.warn_explicit(f"column {name}", UserWarning, "x.py", 1, module="esm_efficient.data")
    assert capsys.readouterr().err == "warning: column \\x1b[31mred\\x1b]0;title\\x07\\u202e\nnext\n"
    show(f"column {name}", as_json=False)
    assert capsys.readouterr().out == "column \\x1b[31mred\\x1b]0;title\\x07\\u202e\nnext\n"
    assert main(["data", name]) == 2
    assert capsys.readouterr().err == "error: Invalid value: no file at \\x1b[31mred\\x1b]0;title\\x07\\u202e next\n"


def test_mistakes_in_arguments_are_seen_without_torch(folder):
    code = (
        "import sys; from esm_efficient.cli import main; "
        "found = [command for command in sys.argv[1:] if main(command.split()) != 2 or 'torch' in sys.modules]; "
        "print(found)"
    )
    wrong = [command for command in USAGE if "8M has 6 layers" not in USAGE[command]]
    done = subprocess.run([sys.executable, "-c", code, *wrong], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ('3 are too long: keep="start" reads their start', "3 are too long: --keep start reads their start"),
        ("keep='both', or shorter", "--keep both, or shorter"),
        ("token_budget=512: too small", "--token-budget 512: too small"),
        ("Name them with accession= and sequence=", "Name them with --accession and --sequence"),
        ('unlabelled="" if each is a class', '--unlabelled "" if each is a class'),
        ("layers=[7]: the encoder has 4", "--layers 7: the encoder has 4"),
        ("layers=[0, 7]: the encoder has 4", "--layers 0,7: the encoder has 4"),
        ("or pass class_weights=None", "or pass --class-weights none"),
        ("pass split=False or partition=False", "pass --split none or --partition none"),
        ("leave probe=False away", "leave --no-probe away"),
        ("the name x_keep=3 stays", "the name x_keep=3 stays"),
        ("Predictor.load(..., task=3) stays", "Predictor.load(..., task=3) stays"),
    ],
)
def test_messages_name_the_options_that_are_typed(message, expected):
    from esm_efficient.cli import parameters_of

    command = "predict" if "keep" in message or "task" in message or "budget" in message else "finetune"
    assert as_typed(message, parameters_of([command, "m", "x"])) == expected


@pytest.mark.parametrize("command", ["data", "finetune", "probe"])
def test_a_misspelt_file_names_the_nearest_one(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "small.csv").write_text("sequence,label\n")
    assert main([command, "tables/smal.csv"]) == 2
    assert "no file at tables/smal.csv: did you mean 'tables/small.csv'?" in capsys.readouterr().err
    assert main([command, "dmo"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err
