"""Each option of a command reaches the function that the command calls, under its name and with its value."""

from __future__ import annotations

from pathlib import Path

import pytest
from sequence_files import frame

from esm_efficient.cli import main
from esm_efficient.errors import ConfigurationError
from esm_efficient.inference.windows import Windows

FUNCTIONS = {
    "finetune": "esm_efficient.training.finetune.finetune",
    "predict": "esm_efficient.inference.predictions.predict_file",
    "embed": "esm_efficient.inference.embedder.embed_file",
    "evaluate": "esm_efficient.training.evaluation.evaluate_in_full",
    "probe": "esm_efficient.training.sweep.sweep_layers",
    "export": "esm_efficient.training.export.export_model",
    "estimate": "esm_efficient.estimation.estimate.estimate",
    "recommend": "esm_efficient.estimation.recommend.recommend",
}
WORDS = {  # what a command needs before its options; TABLE, RUN and OUT are replaced
    "finetune": ["TABLE", "--model", "8M", "-o", "OUT"],
    "predict": ["RUN", "TABLE", "-o", "OUT.csv"],
    "embed": ["8M", "TABLE", "-o", "OUT.parquet"],
    "evaluate": ["RUN", "TABLE"],
    "probe": ["TABLE", "--model", "8M"],
    "export": ["RUN", "OUT"],
    "estimate": ["--model", "8M"],
    "recommend": ["--model", "8M"],
}
READING = [  # of predict, embed and evaluate
    ("--keep both", {"keep": "both"}),
    ("--keep windows --overlap 9", {"keep": Windows(9)}),
    ("--token-budget 99", {"token_budget": 99}),
    ("--on-error skip", {"on_error": "skip"}),
]
FILES = [  # of predict and embed
    ("--shard 2/5", {"shard": (2, 5)}),
    ("--sequence protein", {"sequence": "protein"}),
    ("--accession entry", {"accession": "entry"}),
    ("--precision bf16", {"precision": "bf16"}),
]
OPTIONS = {
    "finetune": [
        ("--epochs 2.5", {"epochs": 2.5}),
        ("--batch-size 16", {"batch_size": 16}),
        ("--micro-batch 2", {"micro_batch": 2}),
        ("--learning-rate 3e-4", {"learning_rate": 3e-4}),
        ("--max-tokens 52", {"max_tokens": 52}),
        ("--class-weights none", {"class_weights": None}),
        ("--class-weights balanced", {"class_weights": "balanced"}),
        ("--early-stopping 4", {"early_stopping": 4}),
        ("--early-stopping 0", {"early_stopping": None}),
        ("", {"early_stopping": "auto", "resume_from_checkpoint": None, "probe": True, "precision": "auto"}),
        ("--no-probe", {"probe": False}),
        ("--precision bf16", {"precision": "bf16"}),
        ("--seed 3", {"seed": 3}),
        ("--resume", {"resume_from_checkpoint": True}),
    ],
    "predict": READING + FILES,
    "embed": [
        *READING,
        *FILES,
        ("--layer 2", {"layer": 2}),
        ("--pooling first", {"pooling": "first"}),
        ("", {"pooling": "mean"}),
    ],
    "evaluate": READING,
    "probe": [
        ("--max-tokens 52", {"max_tokens": 52}),
        ("--token-budget 99", {"token_budget": 99}),
        ("--max-labelled-residues 7", {"max_labelled_residues": 7}),
        ("--seed 3", {"seed": 3}),
    ],
    "export": [
        ("--base-model a/b", {"base_model": "a/b"}),
        ("--dataset mine", {"dataset": "mine"}),
        ("--description text", {"description": "text"}),
        ("--onnx", {"onnx": True}),
    ],
    "estimate": [("--tokens 300", {"tokens": 300}), ("--sequences 77", {"sequences": 77})],
    "recommend": [("--margin 0.3", {"margin": 0.3}), ("--batch-size 16", {"batch_size": 16})],
}
DATA_OPTIONS = [
    ("--sequence protein", {"sequence": "protein"}),
    ("--label binds", {"label": "binds"}),
    ("--label golgi --label nucleus", {"label": ["golgi", "nucleus"]}),
    ("--label-kind number", {"label_kind": "number"}),
    ("--labels TABLE", {"labels": "TABLE"}),
    ("--unlabelled -", {"unlabelled": "-"}),
    ("--accession entry", {"accession": "entry"}),
    ("--split set", {"split": "set"}),
    ("--split none", {"split": False}),
    ("--partition fold", {"partition": "fold"}),
    ("--partition none", {"partition": False}),
    ("--clusters TABLE", {"clusters": "TABLE"}),
    ("--min-residues 5", {"min_residues": 5}),
    ("--max-residues 50", {"max_residues": 50}),
    ("--on-error skip", {"on_error": "skip"}),
    ("--seed 3", {"seed": 3}),
]
OF_EVALUATE = ("--sequence", "--label", "--label-kind", "--labels", "--unlabelled", "--accession")
RECIPE_OPTIONS = [
    ("--recipe all", {"name": "all"}),
    ("--recipe lora --layers top-2", {"layers": "top-2"}),
    ("--layers 0,3", {"layers": (0, 3)}),
    ("--no-cache", {"cache": False}),
    ("--pooling mean", {"pooling": "mean"}),
    ("--recipe lora --quantization 4bit", {"quantization": "4bit"}),
    ("--keep-layers 4", {"keep_layers": 4}),
]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Call a command whose function is replaced, and return what the function was given."""
    frame(12).to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    places = {"TABLE": tmp_path / "table.csv", "RUN": tmp_path / "run", "OUT": tmp_path / "out"}

    def place(word: str) -> str:
        name, dot, suffix = word.partition(".")
        return f"{places[name]}{dot}{suffix}" if name in places else word

    def call(command: str, options: str) -> dict:
        seen = {}

        def stop(*arguments, **options):
            seen.update(options)
            raise ConfigurationError("seen")

        monkeypatch.setattr(FUNCTIONS[command], stop)
        assert main([command, *map(place, [*WORDS[command], *options.split()])]) == 1
        assert seen
        return {name: "TABLE" if value == places["TABLE"] else value for name, value in seen.items()}

    return call


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [(command, options, expected) for command, rows in OPTIONS.items() for options, expected in rows],
)
def test_an_option_reaches_the_function(given, command, options, expected):
    found = given(command, options)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("command", ["finetune", "probe"])
@pytest.mark.parametrize(("options", "expected"), DATA_OPTIONS)
def test_an_option_of_the_data_reaches_the_function(given, command, options, expected):
    found = given(command, options)["data_options"]
    found = {name: "TABLE" if isinstance(value, Path) else value for name, value in found.items()}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("options", "expected"), [row for row in DATA_OPTIONS if row[0].split()[0] in OF_EVALUATE])
def test_an_option_of_the_data_reaches_evaluate(given, options, expected):
    found = given("evaluate", options)["data_options"]
    assert {name: "TABLE" if isinstance(value, Path) else value for name, value in found.items()} == expected


@pytest.mark.parametrize(("options", "expected"), RECIPE_OPTIONS)
def test_an_option_of_the_recipe_reaches_the_function(given, options, expected):
    recipe = given("finetune", options)["recipe"]
    assert {name: getattr(recipe, name) for name in expected} == expected
