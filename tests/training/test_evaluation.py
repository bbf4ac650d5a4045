"""evaluate(): the metrics of the labels that it was given, matched by name with those of the model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import make_model
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import EsmForSequenceClassification, EsmForTokenClassification

from esm_efficient import (
    Predictor,
    classification_metrics,
    evaluate,
    load_deeploc,
    multi_label_metrics,
    regression_metrics,
    write_demo_table,
)
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.saving import portable_saving
from esm_efficient.training.evaluation import evaluate_in_full
from esm_efficient.training.evaluation_page import evaluation_sections

RNG = np.random.default_rng(0)
SEQUENCES = ["".join(RNG.choice(list("ACDEFGHIKLMNPQRSTVWY"), int(n))) for n in RNG.integers(5, 40, 24)]
NAMES = ("a", "b", "c")
HEADS = {"token_classification": EsmForTokenClassification}


def predictor_for(kind, tokenizer, **options):
    model = make_model(
        HEADS.get(kind, EsmForSequenceClassification),
        num_labels=len(NAMES),
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
        problem_type=None if kind == "token_classification" else kind,
        label_thresholds={"a": 0.45, "b": 0.5, "c": 0.55},
    )
    return Predictor(model, tokenizer, **options)


def dataset_of(labels, feature, sequences=SEQUENCES):
    features = Features({"sequence": Value("string"), "label": feature})
    return Dataset.from_dict({"sequence": sequences, "label": labels}, features=features)


def test_classes_are_matched_by_name(tokenizer):
    predictor = predictor_for("single_label_classification", tokenizer)
    ids = RNG.integers(0, 3, len(SEQUENCES))
    expected = classification_metrics(ids, np.stack(predictor.logits(SEQUENCES)), NAMES)
    assert evaluate(predictor, dataset_of(ids.tolist(), ClassLabel(names=list(NAMES)))) == expected
    names = ["c", "a", "b"]
    turned = [names.index(NAMES[i]) for i in ids]
    assert evaluate(predictor, dataset_of(turned, ClassLabel(names=names))) == expected


def test_several_labels_are_matched_by_name_and_use_the_tuned_thresholds(tokenizer):
    predictor = predictor_for("multi_label_classification", tokenizer)
    table = (RNG.random((len(SEQUENCES), 3)) < 0.5).astype(float)
    table[0, 1] = np.nan
    logits = np.stack(predictor.logits(SEQUENCES))
    expected = multi_label_metrics(table, logits, NAMES, thresholds=np.array([0.45, 0.5, 0.55]))
    rows = [{n: None if np.isnan(v) else v for n, v in zip(NAMES, row, strict=True)} for row in table]
    feature = {name: Value("float32") for name in ("c", "b", "a")}
    assert evaluate(predictor, dataset_of(rows, feature)) == pytest.approx(expected)


@pytest.mark.parametrize("keep", [None, "start", "end", "both"])
def test_labels_of_residues_are_truncated_with_their_sequences(tokenizer, keep):
    predictor = predictor_for("token_classification", tokenizer, max_tokens=1024 if keep is None else 12)
    labels = [RNG.integers(0, 3, len(s)).tolist() for s in SEQUENCES]
    labels[0][1] = None
    found = evaluate(predictor, dataset_of(labels, List(ClassLabel(names=list(NAMES)))), keep=keep)

    def part(row):
        long = len(row) > 10 and keep is not None
        return {"start": row[:10], "end": row[-10:], "both": row[:5] + row[-5:]}[keep] if long else row

    cut = [part(row) for row in labels]
    logits = np.concatenate(predictor.logits([part(s) for s in SEQUENCES]))
    flat = [label for row in cut for label in row]
    known = [i for i, label in enumerate(flat) if label is not None]
    expected = classification_metrics(np.array([flat[i] for i in known]), logits[known], NAMES)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keep", "places"),
    [(None, range(11)), ("start", range(5)), ("end", range(6, 11)), ("both", [0, 1, 2, 9, 10])],
)
def test_the_letters_of_residues_are_those_that_the_model_read(tokenizer, keep, places):
    predictor = predictor_for("token_classification", tokenizer, max_tokens=1024 if keep is None else 7)
    labels = np.zeros(11, dtype=int)
    [logits] = predictor.logits(["MKTV<mask>AWGHIK"], keep=keep)
    labels[places] = (logits.argmax(-1) + 1) % 3  # each residue that is read is wrong
    data = dataset_of([labels.tolist()], List(ClassLabel(names=list(NAMES))), ["MK-TV<mask>A--WGHIK*"])
    found = evaluate_in_full(predictor, data, keep=keep)
    shown = "".join("MKTV?AWGHIK"[place] for place in places)
    assert found.sequences == [shown]
    strip = evaluation_sections(found)[-1].parts[1]
    assert "".join(residue.letter for residue in strip.residues) == shown
    assert {residue.state for residue in strip.residues} == {"wrong"}
    assert strip.heading.endswith(f"residues 1 to {len(shown)} of {len(shown)}")


def test_numbers_are_matched_by_their_order(tokenizer):
    predictor = predictor_for("regression", tokenizer)
    numbers = RNG.normal(size=(len(SEQUENCES), 3))
    expected = regression_metrics(numbers, np.stack(predictor.logits(SEQUENCES)), NAMES)
    found = evaluate(predictor, dataset_of(numbers.tolist(), List(Value("float64"), length=3)))
    assert found == pytest.approx(expected)


def test_a_folder_is_loaded(tmp_path, tokenizer):
    predictor = predictor_for("single_label_classification", tokenizer)
    with portable_saving(predictor.model):
        predictor.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = dataset_of([0, 1, 2] * 8, ClassLabel(names=list(NAMES)))
    assert evaluate(tmp_path, data) == pytest.approx(evaluate(predictor, data))


def test_all_rows_of_a_table_are_evaluated_and_labels_are_read_as_those_of_the_model(tmp_path, tokenizer):
    predictor = predictor_for("multi_label_classification", tokenizer)
    labels = ["a", "b", "c"] * 8  # one each, so they look like classes
    rows = [{name: float(name == label) for name in NAMES} for label in labels]
    expected = evaluate(predictor, dataset_of(rows, {name: Value("float32") for name in NAMES}))
    table = pd.DataFrame({"protein": SEQUENCES, "is": labels, "split": ["train", "test"] * 12})
    table.to_csv(tmp_path / "t.csv", index=False)
    options = {"sequence": "protein", "label": "is"}
    for data in (tmp_path / "t.csv", str(tmp_path / "t.csv"), table):
        assert evaluate(predictor, data, data_options=options) == pytest.approx(expected)
    assert evaluate(predictor, (SEQUENCES, labels)) == pytest.approx(expected)
    with pytest.raises(DataError, match=r"one class per sequence.*but the model predicts several labels"):
        evaluate(predictor, table, data_options=options | {"label_kind": "class"})
    full = evaluate_in_full(predictor, (SEQUENCES, labels))
    assert full.sequences == SEQUENCES  # in the order that was given
    np.testing.assert_array_equal(full.labels, [[name == label for name in NAMES] for label in labels])
    with pytest.raises(ConfigurationError, match="data_options has label, but the data are a split already"):
        evaluate(predictor, GOOD, data_options={"label": "is"})


def test_a_label_that_no_cell_lists_is_absent_and_one_without_a_column_is_unknown(tokenizer, caplog):
    predictor = predictor_for("multi_label_classification", tokenizer)
    listed = evaluate_in_full(predictor, (SEQUENCES, ["a|c"] * 24))
    np.testing.assert_array_equal(listed.labels, [[1, 0, 1]] * 24)
    assert "count nowhere" not in caplog.text
    table = pd.DataFrame({"sequence": SEQUENCES, "a": [0, 1] * 12, "c": 1})
    for label in (["a", "c"], ("a", "c"), {"c": "c", "a": "a"}):
        columns = evaluate_in_full(predictor, table, data_options={"label": label})
        np.testing.assert_array_equal(columns.labels, [[0, np.nan, 1], [1, np.nan, 1]] * 12)
    assert "so they count nowhere: b" in caplog.text


def test_another_spelling_of_a_class_is_that_class(tokenizer):
    model = make_model(num_labels=2, id2label={0: "Not membrane", 1: "Membrane"})
    predictor = Predictor(model, tokenizer)
    labels = ["Membrane"] * 8 + ["membrane"] * 4 + ["not_membrane"] * 12
    np.testing.assert_array_equal(evaluate_in_full(predictor, (SEQUENCES, labels)).labels, [1] * 12 + [0] * 12)
    rows = [{"Nucleus": 1.0, "nucleus": None}, {"Nucleus": 0.0, "nucleus": 1.0}, {"Nucleus": 0.0, "nucleus": 0.0}] * 8
    model = make_model(num_labels=1, id2label={0: "NUCLEUS"}, problem_type="multi_label_classification")
    found = evaluate_in_full(Predictor(model, tokenizer), dataset_of(rows, dict.fromkeys(rows[0], Value("float32"))))
    np.testing.assert_array_equal(found.labels, [[1], [1], [0]] * 8)


@pytest.mark.parametrize("option", ["split", "clusters", "test_size", "seed"])
def test_options_of_splits_are_refused(tokenizer, option):
    with pytest.raises(ConfigurationError, match=f"all rows are one split, so {option}= would not be used"):
        evaluate(predictor_for("regression", tokenizer), (SEQUENCES, [0.5] * 24), data_options={option: "x"})


def test_sequences_that_are_too_long_are_left_out_with_wrong_rows(tokenizer, caplog):
    predictor = predictor_for("single_label_classification", tokenizer, max_tokens=22)
    found = evaluate_in_full(predictor, (SEQUENCES, ["a", "b", "c"] * 8), data_options={"on_error": "skip"})
    assert found.sequences == [text for text in SEQUENCES if len(text) <= 20]


def test_of_a_named_table_the_test_split_is_evaluated(tmp_path, tokenizer):
    model = make_model(num_labels=2, id2label={0: "non-membrane", 1: "membrane"})
    predictor = Predictor(model, tokenizer)
    found = evaluate_in_full(predictor, "demo")
    assert found.sequences == list(load_deeploc(write_demo_table(tmp_path / "demo.csv"))["test"]["sequence"])


CLASSES = ClassLabel(names=list(NAMES))
GOOD = dataset_of([0, 1, 2] * 8, CLASSES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DatasetDict(train=GOOD, test=GOOD), r"all splits \(train, test\): expected one of them"),
        (GOOD.remove_columns("sequence"), "the Dataset has no column with a usual name of sequences"),
        (GOOD.rename_column("label", "kind"), "the Dataset has no column with a usual name of labels"),
        (Dataset.from_dict({"input_ids": [[0, 4, 2]], "labels": [0]}), "expected sequence and label too"),
        (
            dataset_of([0, 1] * 12, ClassLabel(names=["a", "d"])),
            r"does not have the label\(s\) 'd'; it has 'a', 'b', 'c'",
        ),
        (
            dataset_of([0.5, 1.5] * 12, Value("float32")),
            'labels are numbers.*but the model predicts one class.*label_kind="class"',
        ),
        (GOOD.to_iterable_dataset(), "streamed"),
        ({"sequence": ["MK"], "label": ["a"]}, r"type dict: expected .* pair of lists, \(sequences, labels\)"),
        (24, "got data of the type int: expected the path of a table, a DataFrame"),
        ("other.csv", "other.csv"),
        (GOOD.select([]), "no row"),
        (dataset_of([0], CLASSES, ["not a protein"]), "looks like words"),
    ],
)
def test_other_data_is_refused(tokenizer, data, message):
    with pytest.raises(DataError, match=message):
        evaluate(predictor_for("single_label_classification", tokenizer), data)


@pytest.mark.parametrize("named", [True, False])
def test_sequences_that_are_too_long_are_named_and_left_out(tokenizer, caplog, named):
    predictor = predictor_for("single_label_classification", tokenizer, max_tokens=22)
    data = GOOD.add_column("accession", [f"P{row}" for row in range(len(GOOD))]) if named else GOOD
    long = [row for row, text in enumerate(SEQUENCES) if len(text) > 20]
    first = f"P{long[0]}" if named else long[0] + 1
    with pytest.raises(
        DataError, match=rf'more than 20 residues: {first} \({len(SEQUENCES[long[0]])}\).*on_error="skip"'
    ):
        evaluate(predictor, data)
    found = evaluate_in_full(predictor, data, on_error="skip")
    assert f"left out {len(long)} of 24 sequences" in caplog.text
    assert len(found.labels) == 24 - len(long)
    kept = [row for row in range(24) if row not in long]
    assert found.names == [f"P{row}" if named else str(row + 1) for row in kept]
    short = data.select([row for row in range(24) if row not in long])
    assert found.metrics == evaluate(predictor, short)
    with pytest.raises(DataError, match=r'1 of 1 sequences have more than 20 residues.*keep="windows"$'):
        evaluate(predictor, data.select(long[:1]), on_error="skip")


def test_a_sequence_without_labels_of_residues_is_refused_before_anything_is_predicted(tokenizer, monkeypatch):
    predictor = predictor_for("token_classification", tokenizer)
    monkeypatch.setattr(predictor, "logits", lambda *_, **__: pytest.fail("it predicts"))
    with pytest.raises(DataError, match=r"residues: 2 \(0 and 2\)"):
        evaluate(predictor, dataset_of([[0, 1], None], List(CLASSES), ["MK", "MK"]))


def test_other_numbers_of_labels_are_refused(tokenizer):
    data = dataset_of([[0, 1], [0]], List(CLASSES), ["MK", "MK"])
    with pytest.raises(DataError, match=r"another number of labels than of residues: 2 \(1 and 2\)"):
        evaluate(predictor_for("token_classification", tokenizer), data)
    with pytest.raises(DataError, match=r"residues: P7 \(1 and 2\)"):
        evaluate(predictor_for("token_classification", tokenizer), data.add_column("accession", ["P6", "P7"]))
    data = dataset_of([[0.0, 1.0]], List(Value("float32"), length=2), ["MK"])
    with pytest.raises(DataError, match="labels are 2 numbers, but the model predicts 3"):
        evaluate(predictor_for("regression", tokenizer), data)


def test_classes_that_are_numbers_are_read_without_a_question(tmp_path, tokenizer):
    predictor = predictor_for("single_label_classification", tokenizer)
    predictor.model.config.id2label = {0: "1", 1: "2", 2: "4"}
    predictor = Predictor(predictor.model, tokenizer)
    ids = RNG.integers(0, 3, len(SEQUENCES))
    expected = classification_metrics(ids, np.stack(predictor.logits(SEQUENCES)), ("1", "2", "4"))
    numbers = [(1, 2, 4)[index] for index in ids]
    assert evaluate(predictor, (SEQUENCES, numbers)) == expected
    assert evaluate(predictor, Dataset.from_dict({"sequence": SEQUENCES, "label": numbers})) == expected
