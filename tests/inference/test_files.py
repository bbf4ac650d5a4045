"""Files of predictions and embeddings: the right rows in the right order, after a kill, in parts and over ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from copies import Copy
from datasets import Dataset, DatasetDict
from sequence_texts import sequences
from test_predictor import model_for

from esm_efficient import Embedder, Predictor, demo_model_path, embed_file, predict_file
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.inference import files
from esm_efficient.inference.rows import check_rows, usable_rows

FASTA_ROWS = 23


@pytest.fixture
def fasta(tmp_path) -> Path:
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">p{i} of a test\n{s}\n" for i, s in enumerate(sequences(FASTA_ROWS))))
    return path


class Stopping(Predictor):
    """Is stopped in its third block."""

    blocks = 2

    def predict(self, *args, **options):
        self.blocks -= 1
        if self.blocks < 0:
            raise KeyboardInterrupt
        return super().predict(*args, **options)


def read(path: Path) -> pd.DataFrame:
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".jsonl": lambda p: pd.read_json(p, lines=True)}
    return readers[path.suffix](path)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(files, "BLOCK_ROWS", 5)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "kind", ["single_label_classification", "multi_label_classification", "token_classification", "regression"]
)
def test_a_file_has_the_predictions_of_its_sequences_in_their_order(
    tokenizer, fasta, tmp_path, kind, suffix, small_blocks
):
    predictor = Predictor(model_for(kind), tokenizer)
    expected = predictor.predict(sequences(FASTA_ROWS))
    output = tmp_path / f"out.{suffix}"
    result = predict_file(predictor, fasta, output)
    found = read(output)
    assert (result.rows, result.computed, len(found)) == (FASTA_ROWS, FASTA_ROWS, FASTA_ROWS)
    assert found["accession"].tolist() == [f"p{i}" for i in range(FASTA_ROWS)]
    if kind == "token_classification":
        labels = found["labels"].str.split(" ") if suffix == "csv" else found["labels"]
        assert [list(row) for row in labels] == [list(p.labels) for p in expected]
        return
    names = predictor.task.names
    columns = list(names) if kind == "regression" else [f"probability_{name}" for name in names]
    assert np.abs(found[columns].to_numpy() - np.stack([p.values for p in expected])).max() < 1e-6
    if kind == "single_label_classification":
        assert found["label"].tolist() == [p.labels[0] for p in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, fasta.name]


def test_parts_of_a_file_are_the_whole_file(tokenizer, fasta, tmp_path, small_blocks):
    predictor = Predictor(model_for("regression"), tokenizer)
    predict_file(predictor, fasta, tmp_path / "whole.csv")
    for part in (1, 2, 3):
        predict_file(predictor, fasta, tmp_path / f"{part}.csv", shard=(part, 3))
    joined = pd.concat([read(tmp_path / f"{part}.csv") for part in (1, 2, 3)], ignore_index=True)
    whole = read(tmp_path / "whole.csv")
    assert joined["accession"].tolist() == whole["accession"].tolist()
    assert np.abs(joined["a"] - whole["a"]).max() < 1e-6


def test_a_file_is_replaced_at_the_end_with_a_warning(tokenizer, fasta, tmp_path, small_blocks, caplog):
    output = tmp_path / "out.csv"
    output.write_text("of another model\n")
    with pytest.raises(KeyboardInterrupt):
        predict_file(Stopping(model_for("regression"), tokenizer), fasta, output)
    assert output.read_text() == "of another model\n"
    assert f"{output} exists, and is replaced when this run ends" in caplog.text
    caplog.clear()
    result = predict_file(Predictor(model_for("regression"), tokenizer), fasta, output)
    assert len(read(output)) == result.rows
    output.unlink()
    caplog.clear()
    predict_file(Predictor(model_for("regression"), tokenizer), fasta, output)
    assert "exists" not in caplog.text


def test_a_run_that_was_stopped_goes_on_and_one_with_another_model_begins_anew(
    tokenizer, fasta, tmp_path, small_blocks
):
    output = tmp_path / "out.jsonl"

    with pytest.raises(KeyboardInterrupt):
        predict_file(Stopping(model_for("regression"), tokenizer), fasta, output)
    assert not output.exists()
    with pytest.raises(KeyboardInterrupt):
        predict_file(Stopping(make_other(), tokenizer), fasta, output)
    with pytest.raises(KeyboardInterrupt):
        predict_file(Stopping(model_for("regression"), tokenizer), fasta, output)
    result = predict_file(Predictor(model_for("regression"), tokenizer), fasta, output)
    assert (result.rows, result.computed, result.reused) == (FASTA_ROWS, FASTA_ROWS - 10, 10)
    assert read(output)["accession"].tolist() == [f"p{i}" for i in range(FASTA_ROWS)]


def test_a_run_with_other_thresholds_begins_anew(tokenizer, fasta, tmp_path, small_blocks):
    output = tmp_path / "out.parquet"
    predictor = Stopping(model_for("multi_label_classification"), tokenizer)
    with pytest.raises(KeyboardInterrupt):
        predict_file(predictor, fasta, output)
    predictor.blocks, predictor.thresholds = 100, np.zeros(len(predictor.task.names))
    assert predict_file(predictor, fasta, output).reused == 0
    assert all(list(labels) == list(predictor.task.names) for labels in read(output)["labels"])


def make_other():
    model = model_for("regression")
    model.classifier.out_proj.bias.data += 1
    return model


def test_kill_9_loses_and_repeats_no_sequence(tmp_path):
    source, output = tmp_path / "many.fasta", tmp_path / "out.parquet"
    texts = sequences(400, longest=40)
    source.write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(texts)))
    code = (
        "from esm_efficient.inference import files; files.BLOCK_ROWS = 5\n"
        "from esm_efficient import demo_model_path, embed_file\n"
        f"print(embed_file(demo_model_path(), {str(source)!r}, {str(output)!r}))"
    )
    run = Copy(code, folder=tmp_path)
    parts = output.with_name("out.parquet.parts")
    deadline = time.monotonic() + 120
    while len(list(parts.glob("block-*.arrow"))) < 5:
        assert run.is_running, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.kill()
    finished = len(list(parts.glob("block-*.arrow")))
    done = Copy(code, folder=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert f"{5 * finished:,} rows were there" in done.stdout
    embed_file(demo_model_path(), source, tmp_path / "at_once.parquet")
    found, expected = read(output), read(tmp_path / "at_once.parquet")
    assert found["accession"].tolist() == expected["accession"].tolist()
    assert np.abs(np.stack(found["embedding"]) - np.stack(expected["embedding"])).max() < 1e-5


@pytest.mark.slow
def test_ranks_share_the_work(tmp_path, fasta):
    """The ranks agree on a name of the run although the hook cannot be compared and has a new name each time."""
    output = tmp_path / "out.csv"
    script = tmp_path / "run.py"
    script.write_text(
        "from esm_efficient.inference import files; files.BLOCK_ROWS = 5\n"
        "from esm_efficient import demo_model_path, embed_file\n"
        "from esm_efficient.inference import Embedder\n"
        "class Nothing:\n"
        "    __slots__ = ()\n"
        "    def __call__(self, *given): pass\n"
        "embedder = Embedder.load(demo_model_path())\n"
        "embedder.model.register_forward_hook(Nothing())\n"
        f"result = embed_file(embedder, {str(fasta)!r}, {str(output)!r})\n"
        "import os, json; counts = [result.computed, result.reused]\n"
        "open(__file__ + os.environ['RANK'], 'w').write(json.dumps(counts))\n"
        "import torch; torch.distributed.destroy_process_group()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(script)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    counts = [json.loads(script.with_name(f"run.py{rank}").read_text()) for rank in (0, 1)]
    computed, reused = zip(*counts, strict=True)
    assert sum(computed) == FASTA_ROWS
    assert min(computed) > 0
    assert reused == (0, 0)
    assert read(output)["accession"].tolist() == [f"p{i}" for i in range(FASTA_ROWS)]


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        (">a\nMKT\n>b\nnot a protein 7\n", {}, DataError, "1 of 2 rows cannot be used: .*b"),
        (f">a\nMKT\n>b\n{'M' * 1100}\n", {}, DataError, "has 1,100 residues, more than 1,022"),
        (
            f">a\nMKT\n>b\n{'M' * 1100}\n>c\n{'M' * 1200}\n",
            {},
            DataError,
            "more than 1,022, record 3 .c. has 1,200 residues, more than 1,022. Of sequences .* keep=.start., or",
        ),
        ("name,text\na,MKT\n", {}, DataError, "none has a usual name of sequences"),
        ("name,text\na,MKT\n", {"sequence": "txt"}, DataError, "no column 'txt'"),
        (
            "id,sequence,fold\na,a helix,MKT\nb,a sheet,MKV\n",
            {},
            DataError,
            "none of the 2 cells of 'sequence' is a sequence.* the right column.* also has id, fold: name one with seq",
        ),
        ("sequence,full\nW68H,MKT\nW69H,MKV\n", {}, DataError, "2 of 2 cells of 'sequence' are mutations"),
        ("id,sequence\na,a helix\nb,a sheet\n", {}, DataError, "2 of 2 rows cannot be used: line 2 looks like words"),
        (">a\nMKT7\n>b\nMKV7\n", {}, DataError, "2 of 2 rows cannot be used: record 1 .a. contains characters"),
        (">a\nMKT\n", {"shard": (2, 2)}, None, ""),
        (">a\nMKT\n", {"shard": (1, 2)}, ConfigurationError, "has only 1 row to use"),
        ("id,sequence\n", {}, DataError, "source has no sequence"),
        (">a\nMKT\n", {"shard": (3, 2)}, ConfigurationError, "shard=\\(3, 2\\): expected two whole numbers"),
        (">a\nMKT\n", {"shard": "1/2"}, ConfigurationError, "shard='1/2': expected two whole numbers, .* \\(1, 3\\)"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_anything_is(tokenizer, tmp_path, text, options, error, message):
    source = tmp_path / "source"
    source.write_text(text)
    predictor = Predictor(model_for("regression"), tokenizer)
    if error is None:
        assert predict_file(predictor, source, tmp_path / "out.csv", **options).rows == 1
        return
    with pytest.raises(error, match=message):
        predict_file(predictor, source, tmp_path / "out.csv", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("accessions", [True, False])
def test_rows_that_cannot_be_used_are_left_out_and_named(tokenizer, tmp_path, small_blocks, caplog, accessions):
    predictor = Predictor(model_for("single_label_classification"), tokenizer, max_tokens=40)
    texts = [*(text[:38] for text in sequences(7)), "", "M" * 60, *(text[:9] for text in sequences(4)), "no protein 7"]
    names = {"id": [f"p{i}" for i in range(len(texts))]} if accessions else {}
    pd.DataFrame(names | {"sequence": texts}).to_csv(tmp_path / "in.csv", index=False)
    with pytest.raises(DataError, match=r'3 of 14 rows cannot be used: .*leave them out with on_error="skip"'):
        predict_file(predictor, tmp_path / "in.csv", tmp_path / "out.csv")
    whole = predict_file(predictor, tmp_path / "in.csv", tmp_path / "out.csv", on_error="skip")
    assert (whole.rows, whole.computed, whole.left_out) == (11, 11, 3)
    assert "11 rows, " in str(whole)
    assert "; of the file, 3 rows were left out" in str(whole)
    assert "; of the file, 1 row was left out" in str(dataclasses.replace(whole, left_out=1))
    assert "3 of 14 rows cannot be used: line 9 is empty, line 10 has 60 residues, more than 38" in caplog.text
    found = read(tmp_path / "out.csv")
    kept = [index for index in range(14) if index not in (7, 8, 13)]
    assert found["accession"].tolist() == [f"p{i}" if accessions else i + 1 for i in kept]
    expected = [prediction.labels[0] for prediction in predictor.predict([texts[i] for i in kept])]
    assert found["label"].tolist() == expected
    for part in (1, 2, 3):
        predict_file(predictor, tmp_path / "in.csv", tmp_path / f"{part}.csv", on_error="skip", shard=(part, 3))
    parts = pd.concat([read(tmp_path / f"{part}.csv") for part in (1, 2, 3)], ignore_index=True)
    pd.testing.assert_frame_equal(parts, found)
    embeddings = embed_file(
        demo_model_path(), tmp_path / "in.csv", tmp_path / "e.parquet", keep="start", on_error="skip"
    )
    assert (embeddings.rows, embeddings.left_out) == (12, 2)


def test_a_file_without_a_row_to_use_is_an_error_also_if_wrong_rows_are_left_out(tokenizer, tmp_path):
    (tmp_path / "in.csv").write_text("sequence\nnot a protein 7\n1\n")
    predictor = Predictor(model_for("single_label_classification"), tokenizer)
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        predict_file(predictor, tmp_path / "in.csv", tmp_path / "out.csv", on_error="skip")
    with pytest.raises(ConfigurationError, match="on_error='drop': expected"):
        predict_file(predictor, tmp_path / "in.csv", tmp_path / "out.csv", on_error="drop")


def test_rows_that_cannot_be_parsed_are_left_out_too(tokenizer, tmp_path, small_blocks, caplog):
    rows = [*(f"p{i},{text}" for i, text in enumerate(sequences(7))), "p7", "p8,M,K", "p9,MKTAYI", "p10,", "p11,MALWMR"]
    (tmp_path / "in.csv").write_text("\n".join(["id,sequence", *rows]) + "\n")
    predictor = Predictor(model_for("regression"), tokenizer)
    with pytest.raises(DataError, match="line 9: 1 cells for 2 columns"):
        predict_file(predictor, tmp_path / "in.csv", tmp_path / "out.csv")
    done = predict_file(predictor, tmp_path / "in.csv", tmp_path / "out.csv", on_error="skip")
    assert (done.rows, done.left_out) == (9, 3)
    assert "3 of 12 rows cannot be used: " in caplog.text
    assert len((tmp_path / "out.csv.left_out.csv").read_text().splitlines()) == 4
    assert "line 9: the number of cells is not 2" in caplog.text
    found = read(tmp_path / "out.csv")
    assert found["accession"].tolist() == [*(f"p{i}" for i in range(7)), "p9", "p11"]
    expected = [p.values[0] for p in predictor.predict([*sequences(7), "MKTAYI", "MALWMR"])]
    assert np.abs(found.iloc[:, 1].to_numpy() - expected).max() < 1e-6
    (tmp_path / "good.csv").write_text("id,sequence\np1,MKTAYI\n")
    predict_file(predictor, tmp_path / "good.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv.left_out.csv").exists()  # that of the former run
    (tmp_path / "bare.csv").write_text("sequence,note\nMKTAYI,a\nMKT\nMALWMR,b\n")
    with pytest.raises(DataError, match="Rows have no accession, and their numbers would not be those of the file"):
        predict_file(predictor, tmp_path / "bare.csv", tmp_path / "bare_out.csv", on_error="skip")


def test_many_wrong_rows_are_counted_in_little_memory(tmp_path):
    (tmp_path / "in.csv").write_text("id,sequence\n" + "".join(f"{i},{'' if i % 3 else 'MKT'}\n" for i in range(9000)))
    listed = tmp_path / "left_out.csv"
    checked = check_rows(tmp_path / "in.csv", on_error="skip", listed=listed)
    rows = listed.read_text().splitlines()
    assert (len(rows), rows[:2], rows[-1]) == (6001, ["place,problem", "line 3,is empty"], "line 9001,is empty")
    assert (checked.usable, checked.wrong.count) == (3000, 6000)
    assert str(checked.wrong) == "line 3 is empty, line 4 is empty, line 6 is empty and 5,997 more"
    assert len(checked.wrong.shown) == 3
    kept = usable_rows(tmp_path / "in.csv", checked.wrong)
    assert [row.accession for row in kept] == [str(i) for i in range(0, 9000, 3)]


def test_letters_that_are_no_amino_acid_are_counted(tokenizer, tmp_path, caplog):
    predictor = Predictor(model_for("regression"), tokenizer)
    predictor.predict(["MKTJJ", "MJK"])
    assert "the given sequences: 3 letters J, which is not an amino acid" in caplog.text
    (tmp_path / "in.fasta").write_text(">a\nMKTJ\n>b\nMKX\n")
    predict_file(predictor, tmp_path / "in.fasta", tmp_path / "out.csv")
    assert "in.fasta: 1 letter J, which is not an amino acid" in caplog.text


@pytest.mark.parametrize("names", ["aba", "aaa", "abcba"])
def test_accessions_of_several_rows_are_a_warning(tokenizer, tmp_path, caplog, names):
    rows = "".join(f">{name}\n{text}\n" for name, text in zip(names, sequences(len(names)), strict=True))
    (tmp_path / "in.fasta").write_text(">z\n\n" + rows)
    predictor = Predictor(model_for("regression"), tokenizer)
    predict_file(predictor, tmp_path / "in.fasta", tmp_path / "out.csv", on_error="skip")
    said = (
        "2 accessions are on several rows, such as b" if "c" in names else "1 accession is on several rows, such as a"
    )
    assert f"in.fasta: {said} on record {names.index(said[-1], names.index(said[-1]) + 1) + 2}" in caplog.text
    assert read(tmp_path / "out.csv")["accession"].tolist() == list(names)
    caplog.clear()
    (tmp_path / "out.csv").unlink()
    (tmp_path / "in.csv").write_text("sequence\n" + "MKT\n" * 3)  # numbered rows differ
    predict_file(predictor, tmp_path / "in.csv", tmp_path / "out.csv")
    assert not caplog.text


TABLE = {"protein": sequences(7), "id": list("abcdefg")}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (pd.DataFrame(TABLE), TABLE["id"]),
        (Dataset.from_dict(TABLE), TABLE["id"]),
        (Dataset.from_dict(TABLE)["protein"], None),
        (pd.DataFrame(TABLE)["protein"], None),
        (np.array(TABLE["protein"]), None),
        (TABLE["protein"], None),
        (tuple(TABLE["protein"][:2]), None),
    ],
    ids=["DataFrame", "Dataset", "column", "Series", "array", "list", "two sequences"],
)
def test_sequences_in_memory_are_predicted_from_as_those_of_a_file(tokenizer, tmp_path, small_blocks, given, names):
    predictor = Stopping(model_for("regression"), tokenizer)
    numbers = [found.values[0] for found in Predictor(predictor.model, tokenizer).predict(TABLE["protein"])]
    count = len(given)
    predictor.blocks = 1
    if count > files.BLOCK_ROWS:
        with pytest.raises(KeyboardInterrupt):
            predict_file(predictor, given, tmp_path / "out.parquet")
    predictor.blocks = 9
    result = predict_file(predictor, given, tmp_path / "out.parquet")
    assert (result.rows, result.reused) == (count, files.BLOCK_ROWS if count > files.BLOCK_ROWS else 0)
    found = read(tmp_path / "out.parquet")
    assert found["accession"].tolist() == (names or [str(number) for number in range(1, count + 1)])
    assert np.allclose(found.iloc[:, 1], numbers[:count], atol=1e-6)
    embedder = Embedder(model_for("regression"), tokenizer)
    assert embed_file(embedder, given, tmp_path / "e.parquet").rows == count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["MKT", "", "MKV7"], "^the list: 2 of 3 rows cannot be used: row 1 is empty"),
        (pd.DataFrame({"sequence": ["MKT", None]}), "^the DataFrame: 1 of 2 rows cannot be used: row 1 is not text"),
        (pd.DataFrame({"a": ["x"]}), "^the DataFrame has the columns a, and none has a usual name of sequences"),
        (DatasetDict(test=Dataset.from_dict(TABLE)), r'got a DatasetDict with .test.: give one .*data\["test"\]'),
        ({"sequence": ["MKT"]}, "got a dict with 'sequence'"),
        (7, "expected a list of sequences, got int"),
    ],
)
@pytest.mark.parametrize("write", [predict_file, embed_file])
def test_what_is_wrong_with_sequences_in_memory_is_said(tokenizer, tmp_path, write, given, message):
    kind = Predictor if write is predict_file else Embedder
    with pytest.raises(DataError, match=message):
        write(kind(model_for("regression"), tokenizer), given, tmp_path / "out.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", ["end", "both"])
def test_a_file_with_an_entry_per_residue_begins_with_the_first_residue(tokenizer, fasta, tmp_path, keep):
    predictor = Predictor(model_for("token_classification"), tokenizer)
    with pytest.raises(ConfigurationError, match="would not say which residues were read"):
        predict_file(predictor, fasta, tmp_path / "out.parquet", keep=keep)
    embedder = Embedder(model_for("regression"), tokenizer, pooling="residues")
    with pytest.raises(ConfigurationError, match="would not say which residues were read"):
        embed_file(embedder, fasta, tmp_path / "out.parquet", keep=keep)
    assert predict_file(Predictor(model_for("regression"), tokenizer), fasta, tmp_path / "out.csv", keep=keep).rows


def test_a_folder_with_files_of_the_user_is_not_removed(tokenizer, fasta, tmp_path):
    folder = tmp_path / "out.csv.parts"
    folder.mkdir()
    (folder / "thesis.docx").write_text("years of work")
    with pytest.raises(ConfigurationError, match="other files"):
        predict_file(Predictor(model_for("regression"), tokenizer), fasta, tmp_path / "out.csv")
    assert (folder / "thesis.docx").read_text() == "years of work"


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("when", [2, 5])
def test_two_runs_with_one_output_mix_no_rows(fasta, tmp_path, small_blocks, when, ends):
    """The run that began last has the output, also if it has not ended yet, and the other one is told."""
    output, blocks, others = tmp_path / "out.csv", [], []

    def other(sequences):
        others.append(len(sequences))
        if len(others) == 2 and not ends:
            raise KeyboardInterrupt
        return {"value": pa.array([2.0] * len(sequences))}

    def begin_other():
        return files.map_file(other, fasta, output, identity="other", shard=(2, 2))

    def compute(sequences):
        blocks.append(len(sequences))
        if len(blocks) == when:
            with nullcontext() if ends else pytest.raises(KeyboardInterrupt):
                begin_other()
        return {"value": pa.array([1.0] * len(sequences))}

    with pytest.raises(ConfigurationError, match=r"another run has taken .*out\.csv\.parts.*output of its own"):
        files.map_file(compute, fasta, output, identity="one")
    if not ends:
        assert begin_other().reused == 5
    assert set(read(output)["value"]) == {2.0}
    assert files.map_file(compute, fasta, output, identity="one").reused == 0
    assert set(read(output)["value"]) == {1.0}


@pytest.mark.parametrize("keep", [None, "windows"])
def test_embeddings_per_residue_are_written_in_small_blocks(tokenizer, tmp_path, monkeypatch, keep):
    monkeypatch.setattr("esm_efficient.inference.embedder.RESIDUE_BLOCK_ROWS", 3)
    texts = [text if keep else text[:30] for text in sequences(8, longest=60)]
    (tmp_path / "in.fasta").write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))
    embedder = Embedder(model_for("regression"), tokenizer, pooling="residues", max_tokens=32)
    seen = []
    embed = embedder.embed
    monkeypatch.setattr(embedder, "embed", lambda given, **options: seen.append(len(given)) or embed(given, **options))
    embed_file(embedder, tmp_path / "in.fasta", tmp_path / "out.parquet", keep=keep)
    assert seen == [3, 3, 2]
    found = read(tmp_path / "out.parquet")["embedding"]
    for rows, expected in zip(found, embed(texts, keep=keep), strict=True):
        assert np.abs(np.stack(rows) - expected).max() < 1e-6


def test_nucleotides_are_judged_over_the_whole_file_before_anything_is_computed(
    tokenizer, tmp_path, small_blocks, caplog
):
    """One gene in a block of its own is a warning; a file of genes is an error."""
    predictor = Predictor(model_for("regression"), tokenizer)
    proteins = [f">p{i}\n{text}\n" for i, text in enumerate(sequences(10))]
    (tmp_path / "mixed.fasta").write_text("".join(proteins) + ">gene\nATGGCATTACGATTACAGGCATTAC\n")
    assert predict_file(predictor, tmp_path / "mixed.fasta", tmp_path / "out.csv").rows == 11
    assert "1 sequence(s) may be nucleotides, not proteins: record 11" in caplog.text
    (tmp_path / "genes.fasta").write_text(">a\nATGGCATTACGATTACAGGCATTAC\n" * 3)
    with pytest.raises(DataError, match=r"genes\.fasta: 3 of 3 sequences consist of the letters A, C, G"):
        predict_file(predictor, tmp_path / "genes.fasta", tmp_path / "genes.csv", on_error="skip")


def test_masked_sequences_are_predicted(tokenizer):
    predictor = Predictor(model_for("regression"), tokenizer)
    masked, other = predictor.predict(["MKTAYI<mask>KQRLV", "MKTAYIAKQRLV"])
    assert (masked.values != other.values).all()
