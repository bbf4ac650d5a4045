"""Where predictions are written: never over their source, never with other names than the file or the model has."""

from __future__ import annotations

import json
import os
import resource

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from sequence_texts import sequences
from test_predictor import model_for

from esm_efficient import Predictor, demo_model_path, embed_file, load_sequences, predict_file
from esm_efficient.errors import ConfigurationError
from esm_efficient.inference import files


def zeros(given):
    return {"value": pa.array([0.0] * len(given))}


def table(path, accessions=("a", "b")):
    rows = zip(accessions, sequences(len(accessions)), strict=True)
    path.write_text("id,sequence\n" + "".join(f"{name},{text}\n" for name, text in rows))
    return path


@pytest.mark.parametrize("shard", [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("in.csv", "in.csv"),
        ("in.csv", "folder/../in.csv"),
        ("in.csv", "hard.csv"),
        ("soft.csv", "in.csv"),
        ("out.csv.part", "out.csv"),
        ("out.csv.parts", "out.csv"),
        ("out.csv.parts/in.csv", "out.csv"),
    ],
)
def test_no_run_writes_over_its_source(tmp_path, source, output, shard):
    source, output = tmp_path / source, tmp_path / output
    (tmp_path / "folder").mkdir()
    source.parent.mkdir(exist_ok=True)
    table(tmp_path / "in.csv")
    os.link(tmp_path / "in.csv", tmp_path / "hard.csv")
    (tmp_path / "soft.csv").symlink_to("in.csv")
    text = (source if source.exists() else table(source)).read_text()
    with pytest.raises(ConfigurationError, match=r"is the source .*give another output"):
        files.map_file(zeros, source, output, identity="one", shard=shard)
    assert source.read_text() == text


def test_predictions_and_embeddings_refuse_the_source_before_a_model_is_loaded(tmp_path):
    source = table(tmp_path / "in.csv")
    for run in (predict_file, embed_file):
        with pytest.raises(ConfigurationError, match="give another output"):
            run("no such model", source, source)


def test_a_folder_in_place_of_the_output_and_a_file_in_place_of_the_blocks_are_refused(tmp_path):
    source = table(tmp_path / "in.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigurationError, match=r"folder\.csv is a folder: expected a file"):
        files.map_file(zeros, source, tmp_path / "folder.csv", identity="one")
    (tmp_path / "out.csv.parts").write_text("of the user")
    with pytest.raises(ConfigurationError, match=r"out\.csv\.parts is a file where the blocks are written"):
        files.map_file(zeros, source, tmp_path / "out.csv", identity="one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv", "in.csv", "out.csv.parts"]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_file_that_grows_too_large_names_the_output_and_leaves_no_part(tmp_path, monkeypatch, rows):
    """With 2 rows the blocks fit, and the output does not."""
    source, output = table(tmp_path / "in.csv", [f"p{i}" for i in range(rows)]), tmp_path / "out.csv"
    monkeypatch.setattr(files, "BLOCK_ROWS", 1)
    numbers = pa.array([np.random.default_rng(0).random(40_000 // rows).tolist()])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ConfigurationError, match=rf"{output} cannot be written: File too large.*same command"):
            files.map_file(lambda given: {"value": numbers}, source, output, identity="one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.part"))
    result = files.map_file(lambda given: {"value": numbers}, source, output, identity="one")
    assert (result.rows, result.reused) == (rows, 0 if rows == 1 else rows)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (pa.array(["p1", None, " "]), ["p1", "2", "3"]),
        (pa.array([7.0, None, float("nan")]), ["7.0", "2", "3"]),
        (pa.array([7, 8, None]), ["7", "8", "3"]),
    ],
)
def test_a_row_without_an_accession_has_its_number(tmp_path, cells, expected):
    parquet.write_table(pa.table({"id": cells, "sequence": sequences(3)}), tmp_path / "in.parquet")
    files.map_file(zeros, tmp_path / "in.parquet", tmp_path / "out.parquet", identity="one")
    assert parquet.read_table(tmp_path / "out.parquet")["accession"].to_pylist() == expected


def test_a_label_with_the_name_of_another_column_is_refused(tokenizer, tmp_path):
    source = table(tmp_path / "in.csv")
    predictor = Predictor(model_for("regression", ("kcat", "accession")), tokenizer)
    with pytest.raises(ConfigurationError, match="two columns called 'accession'"):
        predict_file(predictor, source, tmp_path / "out.parquet")
    predictor = Predictor(model_for("regression", ("kcat", "spread_kcat")), tokenizer)
    assert predict_file(predictor, source, tmp_path / "out.parquet").rows == 2
    predictor.members = ("one", "two")
    with pytest.raises(ConfigurationError, match="two columns called 'spread_kcat'"):
        predict_file(predictor, source, tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("token_classification", ("coil", "alpha helix")),
        ("multi_label_classification", ("a|b", "c")),
    ],
)
def test_names_that_csv_cannot_tell_apart_need_another_format(tokenizer, tmp_path, kind, names):
    predictor, source = Predictor(model_for(kind, names), tokenizer), table(tmp_path / "in.csv")
    with pytest.raises(ConfigurationError, match=r"between the labels of a cell.*write \.parquet or \.jsonl"):
        predict_file(predictor, source, tmp_path / "out.csv")
    expected = [list(found.labels) for found in predictor.predict(sequences(2))]
    predict_file(predictor, source, tmp_path / "out.jsonl")
    assert [json.loads(line)["labels"] for line in (tmp_path / "out.jsonl").open()] == expected


def test_a_sequence_without_any_label_is_read_back_from_csv(tokenizer, tmp_path):
    model = model_for("multi_label_classification", ("a", "b"))
    model.config.label_thresholds = {"a": 0.99, "b": 0.0}
    source = table(tmp_path / "in.csv")
    predict_file(Predictor(model, tokenizer), source, tmp_path / "b.csv")
    model.config.label_thresholds = {"a": 0.99, "b": 0.99}
    predict_file(Predictor(model, tokenizer), source, tmp_path / "none.csv")
    cells = [pd.read_csv(tmp_path / name)["labels"].iloc[0] for name in ("b.csv", "none.csv")]
    assert cells == ["b", "[]"]
    texts = sequences(40)
    pd.DataFrame({"sequence": texts, "label": [cells[n % 2] for n in range(40)]}).to_csv(
        tmp_path / "l.csv", index=False
    )
    data = load_sequences(tmp_path / "l.csv", label_kind="several")
    assert sum(sum(label.values()) for split in data.values() for label in split["label"]) == 20


def test_labels_and_accessions_read_back_as_they_were(tokenizer, tmp_path):
    """Where a spreadsheet runs nothing: in CSV the labels + and -, and every text in the other formats."""
    source = table(tmp_path / "in.csv", ["-a", "=A1", "p3"])
    predictor = Predictor(model_for("token_classification", ("-", "H", "+")), tokenizer)
    expected = [list(found.labels) for found in predictor.predict(sequences(3))]
    assert "-" in {labels[0] for labels in expected} | {labels[-1] for labels in expected}
    for suffix, accessions in (("csv", ["'-a", "'=A1", "p3"]), ("parquet", ["-a", "=A1", "p3"])):
        output = tmp_path / f"out.{suffix}"
        predict_file(predictor, source, output)
        found = pd.read_csv(output) if suffix == "csv" else pd.read_parquet(output)
        assert found["accession"].tolist() == accessions
        labels = found["labels"].str.split(" ") if suffix == "csv" else found["labels"]
        assert [list(row) for row in labels] == expected


def test_a_result_that_is_not_finite_names_the_row_of_the_file(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_ROWS", 2)
    model = model_for("single_label_classification")
    model.esm.embeddings.word_embeddings.weight.data[tokenizer.convert_tokens_to_ids("W")] = float("nan")
    (tmp_path / "in.csv").write_text("id,sequence\na,MKTAY\nb,MKAAA\nc,MKKKK\nd,MWKKL\n")
    with pytest.raises(ConfigurationError, match=r"not finite \(line 5 \(accession d\)\)"):
        predict_file(Predictor(model, tokenizer), tmp_path / "in.csv", tmp_path / "out.csv")


def test_embeddings_of_a_layer_leave_the_model_trainable(tokenizer):
    from transformers import AutoModel

    from esm_efficient import Embedder

    for layer in (None, 1):
        model = AutoModel.from_pretrained(demo_model_path())
        model.embeddings.requires_grad_(False)
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        Embedder(model, tokenizer, layer=layer).embed(["MKT"])
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_a_model_trains_after_it_has_predicted(tokenizer):
    model = model_for("single_label_classification")
    model.esm.embeddings.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    Predictor(model, tokenizer).predict(["MKT"])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    model(**tokenizer("MKT", return_tensors="pt"), labels=torch.tensor([1])).loss.backward()
    assert model.classifier.dense.weight.grad.abs().max() > 0
