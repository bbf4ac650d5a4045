"""The commands that read sequences, in this process; errors come before torch is imported."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from sequence_files import frame
from sequence_texts import sequences
from transformers import TrainerState, pipeline

from esm_efficient import Predictor, demo_model_path
from esm_efficient.cli import main
from esm_efficient.errors import ConfigurationError, DataError, TrainingInterrupted
from esm_efficient.reporting.description import describe
from esm_efficient.training.given import splits_from

pytestmark = pytest.mark.filterwarnings("ignore:A random split")


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "p.fasta"
    path.write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(sequences(7))))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A table, and the folder of a run on it by the command."""
    folder = tmp_path_factory.mktemp("run")
    table = frame(60)
    table["binds"] = table["label"]
    table[["id", "sequence", "binds"]].to_csv(folder / "proteins.csv", index=False)
    command = ["finetune", str(folder / "proteins.csv"), "--model", demo_model_path(), "--recipe", "frozen"]
    options = ["--epochs", "2", "--batch-size", "4", "--label", "binds", "--pooling", "first"]
    with redirect_stdout(io.StringIO()) as out:
        assert main([*command, *options, "-o", str(folder / "out"), "--json"]) == 0
    (folder / "r.json").write_text(out.getvalue())
    return folder


def test_one_line_gives_a_model_a_table_and_a_page(run, capsys):
    record = json.loads((run / "r.json").read_text())
    assert record["steps"] == 2 * -(-42 // 4)
    assert set(record["intervals"]) >= {"accuracy", "f1_macro"}
    page = (run / "out" / "report.html").read_text()
    again = f"--config {run / 'out' / 'run.yaml'} {run / 'proteins.csv'} -o {run / 'out-again'}"
    assert f"esm-efficient finetune {again}" in page
    assert "label membrane" in page
    assert "by cluster (--clusters)" in page
    assert Predictor.load(run / "out" / "model").task.names == ("membrane", "soluble")


def test_the_file_of_a_run_repeats_it(run, capsys):
    written = yaml.safe_load((run / "out" / "run.yaml").read_text())
    assert written["epochs"] == 2
    assert written["label"] == ["binds"]
    again = ["finetune", "--config", str(run / "out" / "run.yaml"), str(run / "proteins.csv"), "-o", str(run / "again")]
    assert main([*again, "--json", "--no-probe"]) == 0
    first, second = json.loads((run / "r.json").read_text()), json.loads(capsys.readouterr().out)
    assert first["probe"]["picked"]
    assert second["probe"] is None
    assert set(first["baselines"]) == {"majority class", "linear probe"}
    assert yaml.safe_load((run / "again" / "run.yaml").read_text())["probe"] is False
    assert second["metrics"] == first["metrics"]
    assert second["train_loss"] == first["train_loss"]


def test_a_trained_model_predicts_and_is_evaluated(run, fasta, capsys):
    assert main(["predict", str(run / "out" / "model"), str(fasta), "-o", str(run / "p.csv")]) == 0
    assert pd.read_csv(run / "p.csv")["accession"].tolist() == [f"p{i}" for i in range(7)]
    capsys.readouterr()
    assert main(["evaluate", str(run / "out" / "model"), str(run / "proteins.csv"), "--label", "binds"]) == 0
    assert "mcc" in capsys.readouterr().out
    page = run / "evaluation.html"
    command = ["evaluate", str(run / "out" / "model"), str(run / "proteins.csv"), "--label", "binds"]
    assert main([*command, "--json", "--report", str(page)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["examples"] == 60
    assert set(record["intervals"]) >= {"accuracy"}
    assert "60 sequences of" in page.read_text()
    assert "<h1>out/model on proteins.csv</h1>" in page.read_text()


def test_a_warning_is_shown_by_the_first_rank_alone(tmp_path, capsys, monkeypatch):
    frame(20)[["id", "sequence", "label"]].to_csv(tmp_path / "t.csv", index=False)
    for rank, shown in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(["data", str(tmp_path / "t.csv")]) == 0
        assert ("warning: A random split" in capsys.readouterr().err) == shown


def test_the_demo_names_a_model_and_proteins(run, capsys):
    assert main(["predict", str(run / "out" / "model"), "demo", "--shard", "1/100", "-o", str(run / "demo.csv")]) == 0
    assert pd.read_csv(run / "demo.csv")["accession"].str.startswith("SYNTH").all()
    assert main(["targets", "demo", "--preset", "qkv"]) == 0
    assert "attention.self.query" in capsys.readouterr().out


def test_the_demo_has_its_own_labels_and_columns(run, capsys):
    assert main(["evaluate", str(run / "out" / "model"), "demo"]) == 1
    assert "Write into the table, in place of 'non-membrane', the label of the model that" in capsys.readouterr().err
    assert main(["evaluate", str(run / "out" / "model"), "demo", "--label", "binds"]) == 1
    assert "--label: the table 'demo' has its own columns" in capsys.readouterr().err


def test_the_start_says_what_is_read_split_trained_and_needed(run, capsys):
    again = ["finetune", "--config", str(run / "out" / "run.yaml"), str(run / "proteins.csv"), "-o", str(run / "said")]
    assert main([*again, "--epochs", "1"]) == 0
    captured = capsys.readouterr()
    words = [line.split(maxsplit=1) for line in captured.err.splitlines()]
    lines = {pair[0]: pair[1] for pair in words if pair and pair[0] in ("read", "split", "train", "cost", "probe")}
    assert lines["read"].startswith("proteins.csv: 60 sequences of 10 to 29 residues")
    assert lines["split"].startswith("42 train, 6 validation, 12 test; ")
    assert "11 steps of 4 sequences (1 epoch)" in lines["train"]
    assert "fits into" in lines["cost"]
    assert "another run" not in captured.err
    assert lines["probe"] == "a linear probe to compare with: one forward pass over train, validation, test"
    assert captured.out.startswith("on test ")
    assert "LOAD REPORT" not in captured.err


@pytest.mark.slow
def test_a_probe_that_is_better_is_named_by_a_line_that_works_from_any_folder(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    command = ["finetune", "proteins.csv", "--model", "demo", "--recipe", "lora", "--learning-rate", "1e-9"]
    assert main([*command, "--label", "binds", "--max-residues", "28", "-o", "slow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [text.split("no training: ")[1] for text in lines if "no training: " in text]
    assert lines[-2:] == [
        "Next, predict: esm-efficient predict slow/adapter FILE",
        "For transformers' pipeline, ONNX or the Hub: esm-efficient export slow FOLDER",
    ]
    words = f"probe {run / 'proteins.csv'} --label binds --max-residues 28 --model {demo_model_path()}"
    assert line == f"esm-efficient {words}"
    monkeypatch.chdir(tmp_path)
    assert main(line.split()[1:]) == 0
    captured = capsys.readouterr()
    assert "has the best mcc" in captured.out
    following = captured.out.splitlines()[-1].split("Next, train: esm-efficient ")[1]
    assert following.startswith(words.replace("probe", "finetune"))
    monkeypatch.setattr("esm_efficient.training.finetune.finetune", lambda *given, **options: pytest.skip("it is read"))
    with pytest.raises(pytest.skip.Exception):
        main(following.split())


def test_a_run_that_cannot_read_its_data_writes_nothing(run, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("sequence,label\nMKT,a\n,b\n")
    before = (run / "out" / "run.yaml").read_text()
    for folder in (run / "out", tmp_path / "new"):
        assert main(["finetune", str(tmp_path / "t.csv"), "--model", "demo", "-o", str(folder)]) == 1
    assert (run / "out" / "run.yaml").read_text() == before
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_that_ends_before_training_leaves_the_options_of_the_model_that_is_there(run, monkeypatch, capsys):
    def stop(*given, **options):
        raise DataError("stopped")

    before = (run / "out" / "run.yaml").read_text()
    monkeypatch.setattr("esm_efficient.training.finetune.starting_model", stop)
    assert main(["finetune", "demo", "--model", "demo", "--epochs", "7", "-o", str(run / "out")]) == 1
    assert "stopped" in capsys.readouterr().err
    assert (run / "out" / "run.yaml").read_text() == before


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_of_several_prints(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    assert main(["data", "demo", "--json"]) == 0
    assert bool(capsys.readouterr().out) == (rank == "0")


@pytest.mark.parametrize(
    ("command", "status"), [(["data", "demo"], 0), (["data", "nothing.csv"], 2)], ids=["success", "error"]
)
def test_a_command_that_succeeds_leaves_the_process_group(command, status):
    """With it, gloo may abort the process. After an error the other ranks may still use the group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert main(command) == status
        assert torch.distributed.is_initialized() == (status != 0)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_run_that_replaces_another_one_says_so(run, capsys, monkeypatch):
    command = ["finetune", str(run / "proteins.csv"), "--model", "demo", "--label", "binds", "--recipe", "frozen"]
    shutil.copytree(run / "out", run / "twice")
    assert main([*command, "--no-probe", "-o", str(run / "twice")]) == 0
    said = f"{run / 'twice'} has the model of another run, which this run will replace"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_layers_may_be_numbers(run, capsys):
    command = ["finetune", str(run / "proteins.csv"), "--model", "demo", "--label", "binds", "--recipe", "lora"]
    folder = run / "numbers"
    assert main([*command, "--no-probe", "--layers", "1,3", "-o", str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text())["trained_layers"] == [1, 3]
    again = ["finetune", "--config", str(folder / "run.yaml"), str(run / "proteins.csv"), "-o", str(run / "numbers2")]
    assert main(again) == 0
    assert json.loads((run / "numbers2" / "result.json").read_text())["trained_layers"] == [1, 3]
    capsys.readouterr()
    assert main(["targets", "demo", "--layers", "1,3"]) == 0
    assert capsys.readouterr().out.count(".{1,3}.") == 6


def test_residues_without_a_label_are_named_as_the_message_says(run, capsys):
    table = frame(60)
    table["label"] = ["H-" * (len(s) // 2) + "C" * (len(s) % 2) for s in table["sequence"]]
    path = run / "residues.csv"
    table[["id", "sequence", "label"]].to_csv(path, index=False)
    assert main(["data", str(path)]) == 1
    assert '--unlabelled - if such residues have no label, or --unlabelled "" if' in capsys.readouterr().err
    for mark, names in (("-", ["C", "H"]), ("", ["-", "C", "H"])):
        assert main(["data", str(path), "--unlabelled", mark, "--json"]) == 0
        assert sorted(json.loads(capsys.readouterr().out)["splits"]["train"]["labels"]) == names


def test_a_finished_run_is_reported_again(run, capsys):
    page = run / "out" / "report.html"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(run / "out")]) == 0
    assert page.read_text() == before
    assert "95 % interval" in capsys.readouterr().out


def test_a_report_of_a_run_whose_model_was_deleted_says_so(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run / "out", folder, ignore=shutil.ignore_patterns("model", "checkpoint-*"))
    assert main(["report", str(folder)]) == 0
    captured = capsys.readouterr()
    assert f"warning: the model of this run was in {folder / 'model'}, which is not there any more" in captured.err
    assert "95 % interval" in captured.out
    assert main(["report", str(run / "out")]) == 0
    assert "not there any more" not in capsys.readouterr().err


def test_a_report_without_its_predictions_is_not_replaced(run, capsys):
    predictions, page = run / "out" / "predictions.parquet", run / "out" / "report.html"
    before, content = page.read_text(), predictions.read_bytes()
    predictions.unlink()
    assert main(["report", str(run / "out")]) == 1
    assert "has no predictions.parquet, of which the report is made" in capsys.readouterr().err
    assert page.read_text() == before
    predictions.write_bytes(content)


def test_a_run_is_exported_for_plain_transformers(run, capsys):
    assert main(["export", str(run / "out"), str(run / "hub"), "--base-model", "someone/demo"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    classify = pipeline("text-classification", str(run / "hub"))
    text = frame(60)["sequence"][0]
    [expected] = Predictor.load(run / "out" / "model").predict([text])
    for written in (text, text.lower(), f" {text[:5]}-{text[5:]}* "):
        [found] = classify(written)
        assert found["label"] == expected.labels[0]
        assert found["score"] == pytest.approx(expected.values.max(), abs=1e-5)


def test_a_pooling_that_is_typed_for_residues_is_refused_although_the_recipe_has_it(tmp_path, capsys):
    table = frame(40)[["sequence", "structure"]]
    table.to_csv(tmp_path / "table.csv", index=False)
    command = ["finetune", str(tmp_path / "table.csv"), "--label", "structure", "--model", "demo", "--recipe", "frozen"]
    assert main([*command, "--pooling", "attention", "-o", str(tmp_path / "out")]) == 1
    assert "error: --pooling attention with a token-classification head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_bound_of_the_tokens_and_the_seed_reach_the_run(run, monkeypatch):
    given = {}

    def stop(model, data, **options):
        given.update(options)
        raise ConfigurationError("seen")

    monkeypatch.setattr("esm_efficient.training.finetune.finetune", stop)
    assert main(["finetune", str(run / "proteins.csv"), "--max-tokens", "52", "--seed", "1", "--label", "binds"]) == 1
    assert given["max_tokens"] == 52
    assert given["data_options"]["seed"] == 1


def test_the_data_are_shown_as_a_run_with_this_seed_splits_them(run, capsys):
    shown = []
    for seed in (0, 1):
        command = ["data", str(run / "proteins.csv"), "--label", "binds", "--seed", str(seed), "--json"]
        assert main(command) == 0
        shown.append(json.loads(capsys.readouterr().out))
        splits = splits_from(run / "proteins.csv", label="binds", seed=seed)
        read, sizes = shown[-1].pop("notes")
        assert read.endswith("proteins.csv: sequence from sequence, label from binds, accession from id")
        assert sizes.startswith("train ")
        assert shown[-1] == json.loads(json.dumps(describe(splits).to_dict()))
    assert shown[0] != shown[1]


@pytest.mark.usefixtures("drawn_figures")
def test_the_layers_are_probed(run, capsys):
    command = ["probe", str(run / "proteins.csv"), "--label", "binds", "--model", "demo"]
    assert main([*command, "--report", str(run / "probe.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isdigit()] == list("01234")
    # The line trains by default, whatever the probe says: fewer layers may cost accuracy.
    assert lines[-1] == f"Next, train: esm-efficient finetune {run / 'proteins.csv'} --label binds --model demo"
    assert main([*command, "--max-tokens", "20", "--report", str(run / "short.html")]) == 0
    words = f"{run / 'proteins.csv'} --label binds --max-tokens 20 --model demo"
    assert capsys.readouterr().out.splitlines()[-1] == f"Next, train: esm-efficient finetune {words}"
    assert f"<pre>esm-efficient probe {words}</pre>" in (run / "short.html").read_text()
    page = (run / "probe.html").read_text()
    assert lines[-3] in html.unescape(page)
    assert "<pre>esm-efficient probe " in page
    assert "<svg" in page


def test_a_run_that_is_interrupted_says_how_to_go_on(run, tmp_path, capsys, monkeypatch):
    def stop(*_, announce, callbacks, **__):
        announce("the plan")
        callbacks[-1].on_train_begin(None, TrainerState(), None)
        raise TrainingInterrupted("a signal ended the run after optimizer step 3 of 22: resume it from checkpoint-3")

    monkeypatch.setattr("esm_efficient.training.finetune.finetune", stop)
    command = ["finetune", str(run / "proteins.csv"), "--model", demo_model_path(), "-o", str(tmp_path / "o")]
    assert main(command) == 130
    error = capsys.readouterr().err
    assert "after optimizer step 3 of 22. It is saved. Go on with: esm-efficient finetune --config" in error
    assert error.endswith(f"-o {tmp_path / 'o'} --resume\n")


def test_standard_input_is_embedded(fasta, tmp_path, monkeypatch):
    output = tmp_path / "e.jsonl"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(fasta.read_bytes())))
    assert main(["embed", demo_model_path(), "-", "--layer", "2", "-o", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["accession"] for row in rows] == [f"p{i}" for i in range(7)]
    assert len(rows[0]["embedding"]) == 128


def test_an_error_names_standard_input_and_no_temporary_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["embed", demo_model_path(), "-", "-o", str(tmp_path / "e.jsonl")]) == 1
    assert capsys.readouterr().err == "error: standard input is empty\n"


def test_a_table_is_described(run, capsys):
    assert main(["data", str(run / "proteins.csv"), "--label", "binds"]) == 0
    assert "label soluble" in capsys.readouterr().out
    assert main(["data", str(run / "proteins.csv"), "--label", "binds", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert sum(split["sequences"] for split in record["splits"].values()) == 60


def test_targets_are_counted_without_weights(capsys):
    assert main(["targets", "650m", "--preset", "qkv", "--layers", "top-1/3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[:2] for line in lines if "gets an adapter" in line]
    assert found == [[f"esm.encoder.layer.{{22-32}}.attention.self.{role}", "11"] for role in ("query", "key", "value")]
    frozen = [line.split()[:2] for line in lines if "not in the preset" in line]
    assert ["esm.encoder.layer.{0-21}.attention.self.query", "22"] in frozen
    assert ["esm.encoder.layer.{0-32}.output.dense", "33"] in frozen
    assert main(["targets", "8M", "--layers", "0,2,3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("esm.encoder.layer.{0,2-3}.output.dense ") and "gets an" in line for line in lines)
    assert any(line.startswith("esm.encoder.layer.{1,4-5}.output.dense ") and "frozen" in line for line in lines)


def test_wrong_arguments_are_told_without_torch():
    code = "import sys; from esm_efficient.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for command in ("predict m p.fasta -o p.txt", "finetune demo --epochs 0", "finetune no.csv"):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "False", command
        assert time.perf_counter() - started < 10


def test_an_error_of_the_data_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("sequence,label\nMKT,a\n,b\n")
    assert main(["data", str(tmp_path / "t.csv")]) == 1
    error = capsys.readouterr().err
    assert "the sequence is empty in 1 row(s)" in error
    assert error.endswith("Correct them, or leave such rows out with --on-error skip\n")
    assert os.listdir(tmp_path) == ["t.csv"]


UNUSUAL = "Seq,is membrane\nMKT,yes\n,no\n" + "".join(f"MK{'AV' * n},{'no' if n % 3 else 'No'}\n" for n in range(20))
"""A table with an empty row, a column of labels with a name of its own, and two spellings of a class."""


@pytest.mark.parametrize("command", ["finetune TABLE --model demo", "probe TABLE --model demo", "evaluate MODEL TABLE"])
def test_a_table_whose_labels_have_another_name_is_an_error_that_lists_its_columns(command, run, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(UNUSUAL)
    command = command.replace("MODEL", str(run / "out" / "model"))
    assert main([*command.replace("TABLE", str(tmp_path / "t.csv")).split(), "--on-error", "skip"]) == 1
    error = capsys.readouterr().err
    if "evaluate" not in command:  # it knows that there are labels, and stops before it reads the rows
        assert "left out 1 row(s), the sequence is empty" in error
    assert error.endswith("it has Seq, is membrane. Name the column with --label\n")


def test_the_description_of_a_table_without_labels_says_so(tmp_path, capsys):
    (tmp_path / "t.csv").write_text(UNUSUAL)
    assert main(["data", str(tmp_path / "t.csv"), "--on-error", "skip"]) == 0
    assert "it has Seq, is membrane. Name the column with --label\n" in capsys.readouterr().err
    assert main(["data", str(tmp_path / "t.csv"), "--on-error", "skip", "--label", "is membrane"]) == 0
    captured = capsys.readouterr()
    assert "read as one class: 'No' as 'no'. To keep them apart, pass --label-kind class if each" in captured.err
    assert "label no " in captured.out


def test_columns_that_only_look_like_splits_can_be_ignored(tmp_path, capsys):
    table = frame(40)[["id", "sequence", "label"]].assign(stage=["adult", "larva"] * 20, fold=range(40))
    table.to_csv(tmp_path / "t.csv", index=False)
    command = ["data", str(tmp_path / "t.csv")]
    assert main(command) == 1
    assert "stage is not train, validation or test in 40 row(s)" in (error := capsys.readouterr().err)
    assert "If it says something else, pass --split none" in error
    assert main([*command, "--split", "none"]) == 1
    assert "40 different numbers" in (error := capsys.readouterr().err)
    assert "pass --partition none" in error
    assert main([*command, "--split", "none", "--partition", "none"]) == 0
    table.assign(phase=["train", "train", "test", "validation"] * 10).to_csv(tmp_path / "t.csv", index=False)
    capsys.readouterr()
    assert main([*command, "--split", "phase", "--partition", "none", "--json"]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert {name: split["sequences"] for name, split in splits.items()} == {"train": 20, "validation": 10, "test": 10}


def test_the_file_of_a_run_repeats_that_a_column_is_ignored(tmp_path, monkeypatch):
    frame(40)[["id", "sequence", "label"]].to_csv(tmp_path / "t.csv", index=False)
    given = []

    def record(*_, data_options, callbacks, **__):
        given.append(data_options)
        callbacks[-1].on_train_begin(None, TrainerState(), None)
        raise DataError("stopped")

    monkeypatch.setattr("esm_efficient.training.finetune.finetune", record)
    command = ["finetune", str(tmp_path / "t.csv"), "-o", str(tmp_path / "o")]
    assert main([*command, "--split", "none", "--partition", "fold"]) == 1
    assert main([*command, "--config", str(tmp_path / "o" / "run.yaml")]) == 1
    assert given[0] == given[1]
    assert (given[0]["split"], given[0]["partition"]) == (False, "fold")


def test_a_file_of_options_may_have_one_label_as_a_text_and_layers_as_a_list(tmp_path, monkeypatch):
    given = []

    def record(*_, data_options, recipe, **__):
        given.append((data_options["label"], recipe.layers))
        raise DataError("stopped")

    monkeypatch.setattr("esm_efficient.training.finetune.finetune", record)
    for text in ("label: binds\nlayers: [1, 3]", 'label: [binds]\nlayers: "1,3"'):
        (tmp_path / "o.yaml").write_text(text)
        assert main(["finetune", "demo", "--config", str(tmp_path / "o.yaml"), "-o", str(tmp_path / "o")]) == 1
    assert given == [("binds", (1, 3))] * 2


def test_a_fasta_file_and_a_table_of_labels_train_and_the_run_repeats(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = frame(60).rename(columns={"label": "binds"})
    fasta_file, labels = tmp_path / "p.fasta", tmp_path / "labels.csv"
    fasta_file.write_text("".join(f">{row.id}\n{row.sequence}\n" for row in table.itertuples()))
    table[["id", "binds"]].to_csv(labels, index=False)
    given = ["--labels", "labels.csv", "--label", "binds"]
    assert main(["data", "p.fasta", *given, "--json"]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert sum(split["labels"]["membrane"] for split in splits.values()) == (table["binds"] == "membrane").sum()
    options = ["--model", "demo", "--recipe", "frozen", "--epochs", "1", "--no-probe", "--json"]
    assert main(["finetune", "p.fasta", *given, *options, "-o", "out"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["labels"] == str(labels)
    monkeypatch.chdir("/")
    line = ["finetune", "--config", str(tmp_path / "out" / "run.yaml"), str(fasta_file), "-o", str(tmp_path / "again")]
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == first["metrics"]
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "out/model", "p.fasta", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 60
    assert main(["probe", "p.fasta", "--model", "demo", *given]) == 0
    assert f"--label binds --labels {labels} " in capsys.readouterr().out.replace("\n", " ")
    assert main(["data", "p.fasta", "--labels", "labels.csv"]) != 0
    assert "it has binds. Name the column with --label" in capsys.readouterr().err


def test_rows_that_are_left_out_and_the_sizes_of_splits_are_said(tmp_path, capsys, table_cache):
    rows = frame(60)[["id", "sequence", "label"]]
    rows.loc[:8, "sequence"] = ""
    rows.loc[20, "sequence"] = "MK" * 600
    rows.to_csv(tmp_path / "t.csv", index=False)
    command = ["data", str(tmp_path / "t.csv"), "--on-error", "skip", "--test-size", "0.5", "--validation-size", "0"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "of more than 1,022 residues" in captured.out
    assert re.search(r"^sequences +2[56] +2[56]$", captured.out, re.MULTILINE)
    listed = Path(re.search("all 9 rows that were left out are in (.*csv)", captured.err)[1])
    assert listed.read_text().splitlines()[1].endswith("line 2: ''\",the sequence is empty")
    assert len(listed.read_text().splitlines()) == 10
    assert "info" not in captured.err


def test_headers_and_partitions_are_options(tmp_path, capsys, table_cache):
    rows = frame(60)
    fasta = "".join(f">{row.id} kind={row.label} part={row.Index % 3}\n{row.sequence}\n" for row in rows.itertuples())
    (tmp_path / "t.fasta").write_text(fasta)
    header = "kind=(?P<label>[a-z]+) part=(?P<fold>[0-9])"
    command = ["data", str(tmp_path / "t.fasta"), "--header", header, "--test-partition", "0", "--json"]
    assert main(command) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert {name: split["sequences"] for name, split in splits.items()} == {"train": 20, "validation": 20, "test": 20}
    assert set(splits["train"]["labels"]) == {"membrane", "soluble"}
