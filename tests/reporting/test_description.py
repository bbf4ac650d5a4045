"""The description of splits."""

from __future__ import annotations

import pytest
from datasets import Dataset, Features, List, Value
from sequence_files import frame

from esm_efficient import load_sequences
from esm_efficient.errors import DataError
from esm_efficient.reporting.description import describe


@pytest.fixture
def path(tmp_path):
    table = frame(60)
    table.loc[0, ["sequence", "structure"]] = "MKXTB", "HHEEH"
    table.loc[1, ["sequence", "structure"]] = table.loc[2, ["sequence", "structure"]]
    table.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"label": "label"}, {"soluble", "membrane"}),
        ({"label": "structure"}, {"H", "E"}),
        ({"label": ["nucleus", "golgi"]}, {"nucleus", "golgi"}),
        ({"label": "stability"}, set()),
        ({"label": False}, set()),
    ],
)
def test_every_kind_of_label_is_counted(path, options, names):
    splits = load_sequences(path, **options)
    found = describe(splits)
    total = sum(split.sequences for split in found.splits.values())
    assert total == 60
    assert sum(split.repeated for split in found.splits.values()) == 1
    assert sum(split.unusual for split in found.splits.values()) == 1
    for name, split in found.splits.items():
        assert set(split.labels) == names
        assert list(split.numbers) == (["label"] if options["label"] == "stability" else [])
        assert (split.relatives is None) == (name == "train")
    if options["label"] == "label":
        assert sum(split.labels["membrane"] for split in found.splits.values()) == 20
    if options["label"] == "structure":
        residues = sum(len(text) for split in splits.values() for text in split["sequence"])
        assert sum(sum(split.labels.values()) for split in found.splits.values()) == residues


def test_the_share_of_a_label_among_several_is_that_of_the_sequences_where_it_is_known(path):
    found = describe(load_sequences(path, label=["nucleus", "golgi"]))
    split = found.splits["train"]
    assert split.labelled["golgi"] == split.sequences > split.labelled["nucleus"]
    [nucleus, golgi] = [row[1] for row in found.rows() if row[0].startswith("label ")]
    count, known = split.labels["nucleus"], split.labelled["nucleus"]
    assert nucleus == f"{count} ({100 * count / known:.1f} % of {known} known)"
    assert golgi == f"{split.labels['golgi']} ({100 * split.labels['golgi'] / split.sequences:.1f} %)"


def test_the_table_names_what_it_shows(path):
    text = str(describe(load_sequences(path, label="label")))
    for part in ("residues: shortest, median, longest", "label membrane", "close relative in train", "train"):
        assert part in text


def test_with_too_many_sequences_relatives_are_not_counted_and_queries_are_a_sample(path, monkeypatch):
    from esm_efficient.reporting import description

    splits = load_sequences(path, label="label")
    monkeypatch.setattr(description, "MOST_QUERIES", 3)
    asked = []
    monkeypatch.setattr(description, "close_relatives", lambda queries, _: asked.append(len(queries)) or 0.5)
    assert describe(splits).splits["test"].relatives == 0.5
    assert set(asked) == {3}
    monkeypatch.setattr(description, "MOST_REFERENCES", len(splits["train"]) - 1)
    assert describe(splits).splits["test"].relatives is None


def test_labels_that_a_split_lacks_are_named(tmp_path):
    rows = [("train", "a"), ("train", "b"), ("train", "c"), ("test", "a"), ("test", "d"), ("validation", "c")]
    lines = [f"{'MKT' * 5}{'ACDEFG'[row]},{split},{label}" for row, (split, label) in enumerate(rows)]
    (tmp_path / "table.csv").write_text("\n".join(["sequence,split,label", *lines]))
    found = describe(load_sequences(tmp_path / "table.csv", label_kind="class"))
    assert sorted(gap.partition(":")[0] for gap in found.label_gaps()) == [
        "test has no example of any of the labels b, c",
        "train has no example of the label d, but test has some",
        "validation has no example of any of the labels a, b",
    ]
    assert all(gap in str(found) for gap in found.label_gaps())


def test_full_splits_and_numbers_have_no_gaps(path):
    for label in ("label", "stability", False):
        assert describe(load_sequences(path, label=label)).label_gaps() == []


def test_unknown_labels_are_not_counted_and_no_part_of_a_share():
    feature = {name: Value("float32") for name in ("a", "b")}
    cells = [{"a": 1.0, "b": 0.0}, {"a": float("nan"), "b": 1.0}, {"a": -100.0, "b": None}, {"a": 0.5, "b": 1.0}]
    rows = {"sequence": ["MKV", "MKA", "MKC", "MKD"], "label": cells}
    split = Dataset.from_dict(rows, features=Features({"sequence": Value("string"), "label": feature}))
    found = describe({"train": split})
    assert found.splits["train"].labels == {"a": 2, "b": 2}
    assert found.splits["train"].labelled == {"a": 2, "b": 3}
    shares = [row for row in found.rows() if row[0].startswith("label ")]
    assert shares == [("label a", "2 (100.0 % of 2 known)"), ("label b", "2 (66.7 % of 3 known)")]


def test_each_of_several_numbers_has_its_own_mean_and_deviation():
    feature = Features({"sequence": Value("string"), "label": List(Value("float32"), length=2)})
    labels = [[0.5, 250.0], [0.75, None], None, [1.0, 350.0]]
    split = Dataset.from_dict({"sequence": ["MKTA", "MKTV", "MKTI", "MKTL"], "label": labels}, features=feature)
    unknown = Dataset.from_dict({"sequence": ["MAAA"], "label": [[2.0, None]]}, features=feature)
    found = describe({"train": split, "test": unknown})
    assert found.splits["train"].numbers["label_0"] == pytest.approx((0.75, 0.2041241))
    assert found.splits["train"].numbers["label_1"] == pytest.approx((300.0, 50.0))
    rows = {row[0]: row[1:] for row in found.rows()}
    assert rows["label_1, mean ± standard deviation"] == ("300 ± 50", "nan ± nan")
    assert found.to_dict()["splits"]["test"]["numbers"]["label_1"] == [None, None]


def test_a_row_without_any_label_is_unknown_and_a_missing_sequence_is_an_error():
    feature = Features({"sequence": Value("string"), "label": {"golgi": Value("float32")}})
    rows = {"sequence": ["MKTA", "MKTV", "MKTI"], "label": [{"golgi": 1.0}, None, {"golgi": 0.0}]}
    found = describe({"train": Dataset.from_dict(rows, features=feature)}).splits["train"]
    assert (found.labels, found.labelled) == ({"golgi": 1}, {"golgi": 2})
    rows["sequence"][1] = None
    with pytest.raises(DataError, match=r"missing or not a text: row 1 of train"):
        describe({"train": Dataset.from_dict(rows, features=feature)})
    with pytest.raises(DataError, match="test has no sequence: there is nothing to describe"):
        describe({"test": Dataset.from_dict({"sequence": [], "label": []}, features=feature)})
