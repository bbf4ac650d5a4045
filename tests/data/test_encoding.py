"""Token ids: EsmTokenizer's on every string of its letters, and no residue lost where it loses some."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from esm_efficient import demo_model_path, load_deeploc, tokenize_dataset
from esm_efficient.data.encoding import ResidueEncoder, kept_by
from esm_efficient.data.sequences import RESIDUES, clean
from esm_efficient.errors import ConfigurationError, DataError

TOKENIZER = AutoTokenizer.from_pretrained(demo_model_path())
ENCODER = ResidueEncoder(TOKENIZER)


def split(sequences, labels=None) -> Dataset:
    labels = labels if labels is not None else [i % 2 for i in range(len(sequences))]
    features = Features({"sequence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_dict({"sequence": sequences, "label": labels}, features=features)


def ids_of(sequences, **options) -> list[list[int]]:
    ids, offsets, _ = ENCODER(sequences, **options)
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@given(st.lists(st.text(alphabet=RESIDUES, max_size=80), max_size=6))
@settings(max_examples=200, deadline=None)
def test_equal_to_the_tokenizer_on_every_string_of_its_letters(sequences):
    assert ids_of(sequences) == [TOKENIZER(sequence)["input_ids"] for sequence in sequences]
    plain = [TOKENIZER(sequence, add_special_tokens=False)["input_ids"] for sequence in sequences]
    assert ids_of(sequences, special=False) == plain


def one_by_one(text: str) -> list[int]:
    """The stated rules, a character at a time."""
    known = {letter: TOKENIZER.convert_tokens_to_ids(letter) for letter in RESIDUES}
    kept = [c for c in text if not c.isspace() and c not in "-."]
    while kept and kept[-1] == "*":
        kept.pop()
    return [known.get(c.upper() if c.isascii() else c, TOKENIZER.unk_token_id) for c in kept]


ODD = st.text(
    alphabet=st.one_of(st.sampled_from(RESIDUES + "mktv*-. \t\n\u00a0\u2003ß\u0131éJ\ud800\x00"), st.characters())
)


@given(st.lists(ODD, max_size=5))
@settings(max_examples=300, deadline=None)
def test_every_character_is_one_token_or_dropped_by_the_stated_rule(texts):
    assert ids_of(texts, special=False) == [one_by_one(text) for text in texts]
    assert ENCODER(texts).residues.tolist() == [len(clean(text)) for text in texts]


@given(st.lists(ODD, max_size=5), st.integers(1, 12), st.sampled_from(["start", "end", "both"]))
@settings(max_examples=200, deadline=None)
def test_a_cut_keeps_the_chosen_ends(texts, most, keep):
    tail = {"start": 0, "end": most, "both": most // 2}[keep]
    for text, found in zip(texts, ids_of(texts, max_residues=most, keep=keep, special=False), strict=True):
        whole = one_by_one(text)
        cut = whole[: most - tail] + whole[len(whole) - tail :]
        assert found == (whole if len(whole) <= most else cut)


def test_impossible_cuts_are_refused():
    with pytest.raises(ConfigurationError, match="start, end, both"):
        ENCODER(["MK"], keep="middle")
    with pytest.raises(ConfigurationError, match="at least one"):
        ENCODER(["MK"], max_residues=0)
    with pytest.raises(ConfigurationError, match="at least one"):
        kept_by(np.array([3]), 0)


def test_lower_case_and_unknown_characters_shift_nothing():
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


def test_what_is_dropped_is_counted():
    _, report = tokenize_dataset(DatasetDict(test=split(["MK-T V*", "MKTV"])), TOKENIZER)
    assert report.total.characters_dropped == 3
    assert "3 characters" in str(report)


@pytest.mark.parametrize(("keep", "expected"), [("start", "MKTV"), ("end", "IAKQ"), ("both", "MKKQ")])
def test_truncation_keeps_the_chosen_end_between_the_special_tokens(keep, expected):
    data, _ = tokenize_dataset(DatasetDict(test=split(["MKTVAYIAKQ"])), TOKENIZER, max_tokens=6, keep=keep)
    assert data["test"][0]["input_ids"] == TOKENIZER(expected)["input_ids"]


def test_cuts_and_unknown_residues_are_logged_as_a_warning(caplog):
    tokenize_dataset(DatasetDict(test=split(["MKTVJ"])), TOKENIZER)
    assert "1 unknown" in caplog.text


def test_what_cannot_be_tokenised_is_refused():
    with pytest.raises(ConfigurationError, match="no room"):
        tokenize_dataset(DatasetDict(test=split(["MK"])), TOKENIZER, max_tokens=2)
    with pytest.raises(DataError, match="row 1 of test"):
        tokenize_dataset(DatasetDict(test=split(["MK", " "])), TOKENIZER)
    with pytest.raises(DataError, match="no column 'sequence'"):
        tokenize_dataset(DatasetDict(test=split(["MK"]).rename_column("sequence", "text")), TOKENIZER)

    class NoTokenizer:
        def get_vocab(self):
            return {"A": 0}

    with pytest.raises(ConfigurationError, match="tokenizer of an ESM model"):
        ResidueEncoder(NoTokenizer())
    with pytest.raises(DataError, match="missing or no text: row 1 of test"):
        tokenize_dataset(DatasetDict(test=split(["MK", None])), TOKENIZER)


def test_the_real_table_is_tokenised_as_by_the_tokenizer(deeploc_csv):
    data = load_deeploc(deeploc_csv, min_residues=None, max_residues=None)
    sample = DatasetDict(test=data["test"].select(range(40)))
    tokenized, _ = tokenize_dataset(sample, TOKENIZER, max_tokens=10**6)
    for row, source in zip(tokenized["test"], sample["test"], strict=True):
        assert row["input_ids"] == TOKENIZER(source["sequence"])["input_ids"]
