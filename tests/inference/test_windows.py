"""Sequences that are too long, read in windows: the mean of the windows, written from its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_model
from datasets import ClassLabel, Dataset, Features, List, Value
from sequence_texts import sequences
from test_files import Stopping
from test_predictor import HEADS, model_for

from esm_efficient import Embedder, PooledEsmForSequenceClassification, Predictor, Windows, evaluate, predict_file
from esm_efficient.cli import main
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.inference import files
from esm_efficient.inference.batches import run_in_batches
from esm_efficient.inference.windows import plan_windows, windows_for, windows_per_residue

LONGEST, OVERLAP = 20, 7
KEEP = Windows(overlap=OVERLAP)


def texts():
    """Short sequences, some of a window and a residue more, and some of several windows."""
    lengths = (5, 20, 21, 33, 34, 90, 1, 61)
    return [text[:n] for text, n in zip(sequences(len(lengths), longest=900, seed=3), lengths, strict=True)]


def windows_of(length):
    """The windows, by the definition: as few as possible, of the full length, evenly spread."""
    number = 1
    while number * LONGEST - (number - 1) * OVERLAP < length:
        number += 1
    last = max(length - LONGEST, 0)
    starts = [0] if number == 1 else [index * last // (number - 1) for index in range(number)]
    return [(start, min(start + LONGEST, length)) for start in starts]


def test_windows_cover_a_sequence_evenly_and_share_the_overlap():
    for overlap in (0, 1, OVERLAP, LONGEST - 1):
        lengths = np.arange(1, 130)
        pieces = plan_windows(lengths, LONGEST, overlap)
        for index, length in enumerate(lengths):
            mine = pieces.owner == index
            starts, ends = pieces.start[mine], (pieces.start + pieces.residues)[mine]
            assert (starts[0], ends[-1]) == (0, length)
            assert set(pieces.residues[mine]) == {min(length, LONGEST)}
            assert (ends[:-1] - starts[1:] >= overlap).all()
            steps = np.diff(starts)
            assert len(steps) == 0 or steps.max() - steps.min() <= 1
            fewer = len(starts) - 1
            assert fewer == 0 or fewer * LONGEST - (fewer - 1) * overlap < length
            counts = windows_per_residue(pieces, index)
            assert len(counts) == length
            assert counts.min() >= 1


@pytest.mark.parametrize("budget", [1, 60, 8192])
@pytest.mark.parametrize("kind", HEADS)
def test_logits_are_the_mean_over_the_windows(tokenizer, kind, budget):
    predictor = Predictor(model_for(kind), tokenizer, max_tokens=LONGEST + 2)
    given = texts()
    found = predictor.logits(given, keep=KEEP, token_budget=budget)
    assert [len(row) for row in found] == [len(text) if kind == "token_classification" else 3 for text in given]
    for text, logits in zip(given, found, strict=True):
        parts = [(start, predictor.logits([text[start:end]])[0]) for start, end in windows_of(len(text))]
        if kind != "token_classification":
            expected = np.mean([part for _, part in parts], axis=0)
        else:
            rows = [[part[i - start] for start, part in parts if 0 <= i - start < len(part)] for i in range(len(text))]
            expected = np.stack([np.mean(row, axis=0) for row in rows])
        np.testing.assert_allclose(logits, expected, atol=1e-7)
    assert len(windows_of(90)) == 7


@pytest.mark.parametrize("pooling", ["mean", "first", "residues"])
@pytest.mark.parametrize("layer", [None, 1])
def test_embeddings_are_the_mean_over_the_windows(tokenizer, pooling, layer):
    embedders = {
        name: Embedder(model_for("regression"), tokenizer, layer=layer, pooling=name, max_tokens=LONGEST + 2)
        for name in ("mean", "first", "residues")
    }
    given = texts()
    for text, found in zip(given, embedders[pooling].embed(given, keep=KEEP, token_budget=60), strict=True):
        if pooling == "first":
            parts = [embedders["first"].embed([text[start:end]])[0] for start, end in windows_of(len(text))]
            np.testing.assert_allclose(found, np.mean(parts, axis=0), atol=1e-6)
            continue
        sums, counts = np.zeros((len(text), embedders["mean"].width)), np.zeros((len(text), 1))
        for start, end in windows_of(len(text)):
            sums[start:end] += embedders["residues"].embed([text[start:end]])[0]
            counts[start:end] += 1
        expected = sums / counts
        np.testing.assert_allclose(found, expected if pooling == "residues" else expected.mean(0), atol=1e-6)


def test_the_weights_of_all_residues_sum_to_1(tokenizer):
    model = make_model(PooledEsmForSequenceClassification, classifier_pooling="attention", initializer_range=0.5)
    predictor = Predictor(model, tokenizer, max_tokens=LONGEST + 2)
    for text, weights in zip(texts(), predictor.residue_weights(texts(), keep=KEEP), strict=True):
        assert weights.shape == (len(text),)
        assert weights.sum() == pytest.approx(1)
        parts = windows_of(len(text))
        expected = np.zeros(len(text))
        for start, end in parts:
            expected[start:end] += predictor.residue_weights([text[start:end]])[0] / len(parts)
        np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_a_sequence_that_is_not_too_long_is_read_as_before(tokenizer):
    predictor = Predictor(model_for("token_classification"), tokenizer)
    for found, expected in zip(predictor.logits(texts(), keep="windows"), predictor.logits(texts()), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_only_one_batch_is_computed_at_once_and_gaps_are_no_residues(tokenizer):
    """A very long sequence is never one batch; the places of the windows are counted after cleaning."""
    predictor, sizes = Predictor(model_for("regression"), tokenizer, max_tokens=LONGEST + 2), []
    text = "MKTAYI-AKQ.RQISF" * 500

    def compute(input_ids, attention_mask):
        sizes.append(input_ids.numel())
        return predictor.model(input_ids=input_ids, attention_mask=attention_mask).logits

    options = {"half": None, "padding": 1, "device": torch.device("cpu"), "max_tokens": LONGEST + 2}
    [found] = run_in_batches(
        compute, predictor.encoder, [text], result="sequence", keep=KEEP, token_budget=220, **options
    )
    assert max(sizes) <= 220
    assert len(sizes) > 50
    [expected] = predictor.logits([text.replace("-", "").replace(".", "")], keep=KEEP)
    np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (Windows(overlap=20), "overlap=20: expected a whole number from 0 to 19, less than a window of 20"),
        (Windows(overlap=1.5), "overlap=1.5: expected a whole number"),
        (Windows(overlap="3"), "overlap='3': expected a whole number"),
        (Windows(overlap=-1), "overlap=-1: expected a whole number from 0 to 19"),
        ("middle", "keep='middle': expected one of start, end, both, windows"),
    ],
)
def test_what_cannot_be_read_is_refused(tokenizer, tmp_path, keep, message):
    predictor = Predictor(model_for("regression"), tokenizer, max_tokens=LONGEST + 2)
    with pytest.raises(ConfigurationError, match=message):
        predictor.predict(["MKT"], keep=keep)
    source = tmp_path / "p.fasta"
    source.write_text(">a\nnot a protein 7\n")  # the option is seen before the file is read
    with pytest.raises(ConfigurationError, match=message):
        predict_file(predictor, source, tmp_path / "out.csv", keep=keep)


def test_the_default_is_to_refuse_and_the_error_names_the_windows(tokenizer):
    predictor = Predictor(model_for("regression"), tokenizer, max_tokens=LONGEST + 2)
    with pytest.raises(DataError, match='or read all of it with keep="windows"'):
        predictor.predict(texts())
    assert windows_for("windows", LONGEST) == Windows(overlap=5)


def test_a_file_is_computed_again_for_another_policy_and_the_result_says_which(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_ROWS", 3)
    source, output = tmp_path / "p.fasta", tmp_path / "out.jsonl"
    source.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts())))

    def run(kind, keep):
        return predict_file(kind(model_for("regression"), tokenizer, max_tokens=LONGEST + 2), source, output, keep=keep)

    for keep, reused in ((KEEP, 6), (Windows(overlap=3), 0), ("start", 0), ("windows", 0), (Windows(), 6)):
        with pytest.raises(KeyboardInterrupt):
            run(Stopping, "windows" if keep == Windows() else KEEP)
        result = run(Predictor, keep)
        assert result.reused == reused, keep
        output.unlink()
    assert str(result).endswith("; of longer sequences the mean of windows of 20 residues that share 5 or more")


def test_labels_of_all_residues_are_evaluated(tokenizer):
    predictor = Predictor(model_for("token_classification"), tokenizer, max_tokens=LONGEST + 2)
    features = Features({"sequence": Value("string"), "label": List(ClassLabel(names=["a", "b", "c"]))})
    rows = {"sequence": texts(), "label": [predictor_labels(predictor, text) for text in texts()]}
    assert evaluate(predictor, Dataset.from_dict(rows, features=features), keep=KEEP)["accuracy"] == 1


def predictor_labels(predictor, text):
    return ["abc".index(name) for name in predictor.predict([text], keep=KEEP)[0].labels]


def test_the_commands_have_the_option(tokenizer, tmp_path, capsys):
    model = tmp_path / "model"
    model_for("regression").save_pretrained(model)
    tokenizer.save_pretrained(model)
    source, output = tmp_path / "p.fasta", tmp_path / "p.csv"
    text = sequences(1, longest=3000, seed=1)[0]
    assert len(text) > 1022
    source.write_text(f">p0\n{text}\n")
    options = ["--keep", "windows", "--overlap", "500"]
    assert main(["predict", str(model), str(source), "-o", str(output), *options]) == 0
    assert "the mean of windows of 1,022 residues that share 500 or more" in capsys.readouterr().out
    [expected] = Predictor.load(model).logits([text], keep=Windows(overlap=500))
    found = [float(cell) for cell in output.read_text().splitlines()[1].split(",")[1:]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert main(["embed", str(model), str(source), "-o", str(tmp_path / "e.jsonl"), *options]) == 0
    assert main(["embed", str(model), str(source), "-o", str(tmp_path / "e.jsonl"), "--keep", "windows"]) == 0
    capsys.readouterr()
    assert main(["predict", str(model), str(source), "--overlap", "5"]) == 2
    assert "--overlap is that of windows: give --keep windows too" in capsys.readouterr().err
    assert main(["predict", str(model), str(source), "--keep", "windows", "--overlap", "1022"]) == 1
    assert "--overlap 1022: expected a whole number from 0 to 1,021" in capsys.readouterr().err
