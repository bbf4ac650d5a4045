"""tokenize_dataset: ids, labels beside the tokens, and the counts of what was changed."""

from __future__ import annotations

import math

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDatasetDict, List, Value, load_from_disk
from transformers import AutoTokenizer

from esm_efficient import demo_model_path, load_deeploc, tokenize_dataset
from esm_efficient.data import tokenizing
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.tasks import IGNORE

TOKENIZER = AutoTokenizer.from_pretrained(demo_model_path())
CLASSES = ClassLabel(names=["no", "yes"])
SEVERAL = {"nucleus": Value("float32"), "golgi": Value("int8")}


def split(sequences, labels=None) -> Dataset:
    labels = labels if labels is not None else [i % 2 for i in range(len(sequences))]
    features = Features({"sequence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_dict({"sequence": sequences, "label": labels}, features=features)


def tokenized(feature, labels, sequences=None, *, weights=None, **options):
    rows = {"sequence": sequences or ["MKTV"] * len(labels), "label": labels}
    features = {"sequence": Value("string"), "label": feature}
    if weights is not None:
        rows["sample_weight"], features["sample_weight"] = weights, Value("float64")
    data = DatasetDict(test=Dataset.from_dict(rows, features=Features(features)))
    return tokenize_dataset(data, TOKENIZER, **options)[0]["test"]


def test_lower_case_and_unknown_characters_shift_no_residue():
    data, report = tokenize_dataset(DatasetDict(test=split(["mktvMKTV", "MK1JTV"])), TOKENIZER)
    upper = TOKENIZER("MKTVMKTV")["input_ids"]
    assert data["test"][0]["input_ids"] == upper
    unknown = TOKENIZER.unk_token_id
    assert data["test"][1]["input_ids"] == [*upper[:3], unknown, unknown, *upper[3:5], upper[-1]]
    assert report.splits["test"].unknown_residues == 2


def test_columns_labels_and_counts():
    sequences = ["MKTVAYIAKQ", "XBZMK", "MKTV"]
    data, report = tokenize_dataset(DatasetDict(train=split(sequences), test=split(["MK"])), TOKENIZER, max_tokens=7)
    assert set(data["train"].column_names) == {"input_ids", "attention_mask", "labels", "tokens"}
    assert data["train"]["labels"][:] == [0, 1, 0]
    assert data["train"].features["labels"].names == ["no", "yes"]
    assert data["train"]["tokens"][:] == [7, 7, 6]
    assert [len(row) for row in data["train"]["attention_mask"]] == [7, 7, 6]
    assert all(set(row) == {1} for row in data["train"]["attention_mask"])
    train = report.splits["train"]
    assert (train.sequences, train.residues, train.sequences_cut, train.residues_cut) == (3, 14, 1, 5)
    assert (train.unknown_residues, train.ambiguous_residues) == (0, 3)
    assert report.total.sequences == 4
    assert "5 residues cut from 1 sequences" in str(report)


def test_dropped_characters_are_counted():
    _, report = tokenize_dataset(DatasetDict(test=split(["MK-T V*", "MKTV"])), TOKENIZER)
    assert report.total.characters_dropped == 3
    assert "3 characters" in str(report)


@pytest.mark.parametrize(("keep", "expected"), [("start", "MKTV"), ("end", "IAKQ"), ("both", "MKKQ")])
def test_truncation_keeps_the_chosen_part_between_the_special_tokens(keep, expected):
    data, _ = tokenize_dataset(DatasetDict(test=split(["MKTVAYIAKQ"])), TOKENIZER, max_tokens=6, keep=keep)
    assert data["test"][0]["input_ids"] == TOKENIZER(expected)["input_ids"]


def test_unknown_residues_are_logged_as_a_warning(caplog):
    tokenize_dataset(DatasetDict(test=split(["MKTVJ"])), TOKENIZER)
    assert "letters that are not amino acids, which the model reads as <unk>: 1" in caplog.text


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("start", "start was kept"), ("end", "end was kept"), ("both", "start and end were kept")],
)
def test_residues_that_were_cut_are_one_line_of_warning(caplog, keep, kept):
    tokenize_dataset(DatasetDict(test=split(["MKTVAYIAKQ", "MKTV"])), TOKENIZER, max_tokens=7, keep=keep)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith(f"1 of 2 sequences have more than 5 residues: their {kept}")
    assert record.getMessage().endswith("5 residues were cut")


def test_invalid_sequences_and_options_are_refused():
    with pytest.raises(ConfigurationError, match="no room"):
        tokenize_dataset(DatasetDict(test=split(["MK"])), TOKENIZER, max_tokens=2)
    with pytest.raises(DataError, match="row 1 of test"):
        tokenize_dataset(DatasetDict(test=split(["MK", " "])), TOKENIZER)
    with pytest.raises(DataError, match="no column 'sequence'"):
        tokenize_dataset(DatasetDict(test=split(["MK"]).rename_column("sequence", "text")), TOKENIZER)

    with pytest.raises(DataError, match="missing or not a text: row 1 of test"):
        tokenize_dataset(DatasetDict(test=split(["MK", None])), TOKENIZER)


def test_the_real_table_is_tokenised_as_the_tokenizer_does(deeploc_csv):
    data = load_deeploc(deeploc_csv, min_residues=None, max_residues=None)
    sample = DatasetDict(test=data["test"].select(range(40)))
    tokenized, _ = tokenize_dataset(sample, TOKENIZER, max_tokens=10**6)
    for row, source in zip(tokenized["test"], sample["test"], strict=True):
        assert row["input_ids"] == TOKENIZER(source["sequence"])["input_ids"]


def test_a_streamed_split_is_refused_with_what_to_do():
    streams = IterableDatasetDict(test=split(["MK"]).to_iterable_dataset())
    with pytest.raises(DataError, match=r"'test' is streamed.*without streaming, or map a ResidueEncoder"):
        tokenize_dataset(streams, TOKENIZER)


def test_several_labels_become_numbers_and_null_becomes_nan():
    rows = tokenized(SEVERAL, [{"nucleus": 1.0, "golgi": 0}, {"nucleus": None, "golgi": 1}, {"nucleus": 0.5}])
    assert rows.features["labels"] == List(Value("float32"), length=2)
    assert rows["labels"][0] == [1.0, 0.0]
    assert math.isnan(rows["labels"][1][0])
    assert rows["labels"][1][1] == 1.0
    assert rows["labels"][2][0] == 0.5
    assert math.isnan(rows["labels"][2][1])


def test_numbers_become_float32_and_null_becomes_nan():
    assert tokenized(Value("float64"), [0.5, -2.0])["labels"][:] == [0.5, -2.0]
    assert math.isnan(tokenized(Value("float64"), [0.5, None])["labels"][1])
    assert tokenized(List(Value("float64"), length=2), [[0.5, 1.0], [2.0, 3.0]])["labels"][:] == [
        [0.5, 1.0],
        [2.0, 3.0],
    ]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("start", [0, 1, 0]), ("end", [IGNORE, 1, 1]), ("both", [0, 1, 1])],
)
def test_labels_of_residues_are_truncated_with_them_and_special_tokens_have_none(keep, expected):
    rows = tokenized(List(CLASSES), [[0, 1, 0, None, 1, 1], [1, 0]], ["mk-tvay*", "MK"], max_tokens=5, keep=keep)
    assert rows.features["labels"] == List(CLASSES)
    assert rows["labels"][:] == [[IGNORE, *expected, IGNORE], [IGNORE, 1, 0, IGNORE]]
    assert [len(ids) for ids in rows["input_ids"]] == [5, 4]


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (CLASSES, [0, None], "missing in 1 row.*row 1 of test"),
        (CLASSES, [0, -1], "-1 in row 1 of test"),
        (SEVERAL, [{"nucleus": 2.0, "golgi": 0}], "between 0 and 1 in 1 row.*row 0"),
        (Value("float32"), [1.0, math.inf], "infinite in 1 row.*row 1"),
        (List(Value("float32"), length=2), [[1.0, 2.0], None], "2 numbers"),
        (List(CLASSES), [[0, 1, 0, 1], [0, 1]], r"label count differs.*row 1 of test \(4 residues, 2 labels\)"),
        (List(CLASSES), [None], r"row 0 of test \(4 residues, 0 labels\)"),
        (List(CLASSES), [[0, 1, -1, 0]], "-1 in row 0"),
    ],
)
def test_the_error_for_an_invalid_label_names_the_row(feature, labels, message):
    with pytest.raises(DataError, match=message):
        tokenized(feature, labels)


def test_splits_must_have_the_same_labels_in_the_same_order():
    def split(names):
        features = Features({"sequence": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"sequence": ["MK"], "label": [0]}, features=features)

    with pytest.raises(DataError, match=r"train one class per sequence: no, yes; test one class per sequence: yes, no"):
        tokenize_dataset(DatasetDict(train=split(["no", "yes"]), test=split(["yes", "no"])), TOKENIZER)
    unlabelled = split(["no", "yes"]).remove_columns("label")
    assert (
        "labels"
        not in tokenize_dataset(DatasetDict(train=split(["no"]), test=unlabelled), TOKENIZER)[0]["test"].features
    )
    with pytest.raises(DataError, match="'test' has no row"):
        tokenize_dataset(DatasetDict(test=unlabelled.select([])), TOKENIZER)


def test_tokens_of_another_version_of_the_library_are_not_used_again(tmp_path, monkeypatch):
    Dataset.from_dict({"sequence": ["MK"]}).save_to_disk(tmp_path / "rows")
    splits = DatasetDict(test=load_from_disk(tmp_path / "rows"))  # datasets keeps what is made of such rows on disk
    fingerprints = {}
    for version in ("1", "2"):
        monkeypatch.setattr(tokenizing, "__version__", version)
        for _ in range(2):
            tokenized = tokenize_dataset(splits, TOKENIZER)[0]["test"]
            fingerprints.setdefault(version, set()).add(tokenized.cache_files[0]["filename"])
    assert all(len(files) == 1 for files in fingerprints.values())
    assert fingerprints["1"] != fingerprints["2"]


def test_labels_of_residues_may_be_lists_of_a_fixed_length():
    rows = tokenized(List(CLASSES, length=4), [[0, 1, 0, 1]])
    assert rows["labels"][0] == [IGNORE, 0, 1, 0, 1, IGNORE]


def test_weights_of_sequences_are_kept_and_checked():
    assert tokenized(CLASSES, [0, 1], weights=[0.5, 2])["sample_weight"][:] == [0.5, 2.0]
    for wrong in (None, -1.0, math.nan, math.inf):
        with pytest.raises(DataError, match=r"sample_weight.*row 1 of test"):
            tokenized(CLASSES, [0, 1], weights=[1.0, wrong])


def test_a_written_mask_is_one_residue_of_one_label():
    rows = tokenized(List(CLASSES), [[0, 1, None, 1, 0]], ["MK<mask>TV"])
    mask = TOKENIZER.mask_token_id
    assert rows["input_ids"][0] == [0, *TOKENIZER.convert_tokens_to_ids(["M", "K"]), mask, 11, 7, 2]
    assert rows["labels"][0] == [IGNORE, 0, 1, IGNORE, 1, 0, IGNORE]
    assert rows["tokens"][0] == 7
    _, report = tokenize_dataset(DatasetDict(test=split(["MK<mask> TV-*"])), TOKENIZER)
    assert (report.total.residues, report.total.characters_dropped, report.total.unknown_residues) == (5, 3, 0)


def test_nucleotides_are_counted_and_refused_where_they_are_the_most(caplog):
    gene = "ATGGCCCTGTGGATGCGCCTC"
    proteins = split(["MKTVAYIAKQ", "MALWMRLLPL"])
    with caplog.at_level("WARNING"):
        _, report = tokenize_dataset(DatasetDict(train=proteins, test=split([gene.lower()])), TOKENIZER)
    assert [report.splits[name].nucleotides for name in ("train", "test")] == [0, 1]
    assert "1 sequence(s) may be nucleotides" in caplog.text
    with pytest.raises(DataError, match="the data set: 3 of 5 sequences consist of the letters A, C, G"):
        tokenize_dataset(DatasetDict(train=proteins, test=split([gene] * 3)), TOKENIZER)
