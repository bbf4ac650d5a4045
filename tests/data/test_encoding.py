"""ResidueEncoder: equal to EsmTokenizer on its letters, and one token per residue where EsmTokenizer merges some."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from esm_efficient import demo_model_path
from esm_efficient.data.encoding import ResidueEncoder, truncation_mask
from esm_efficient.data.sequences import RESIDUES, SPECIAL_TOKENS, clean, count_residues
from esm_efficient.errors import ConfigurationError

TOKENIZER = AutoTokenizer.from_pretrained(demo_model_path())
ENCODER = ResidueEncoder(TOKENIZER)


def ids_of(sequences, **options) -> list[list[int]]:
    ids, offsets, _ = ENCODER(sequences, **options)
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@given(st.lists(st.text(alphabet=RESIDUES, max_size=80), max_size=6))
@settings(max_examples=200, deadline=None)
def test_ids_equal_those_of_the_tokenizer_on_every_string_of_its_letters(sequences):
    assert ids_of(sequences) == [TOKENIZER(sequence)["input_ids"] for sequence in sequences]
    plain = [TOKENIZER(sequence, add_special_tokens=False)["input_ids"] for sequence in sequences]
    assert ids_of(sequences, special=False) == plain


def one_by_one(text: str) -> list[int]:
    """The documented rules, applied to one character at a time."""
    known = {letter: TOKENIZER.convert_tokens_to_ids(letter) for letter in RESIDUES}
    kept = [c for c in text if not c.isspace() and c not in "-."]
    while kept and kept[-1] == "*":
        kept.pop()
    ids = []
    while kept:
        written = next((t for t in SPECIAL_TOKENS if "".join(kept[: len(t)]).lower() == t), None)
        character = kept[0].upper() if kept[0].isascii() else kept[0]
        ids.append(
            TOKENIZER.convert_tokens_to_ids(written) if written else known.get(character, TOKENIZER.unk_token_id)
        )
        kept = kept[len(written) if written else 1 :]
    return ids


CHARACTERS = st.one_of(st.sampled_from(RESIDUES + "mktv*-. \t\n\u00a0\u2003ß\u0131éJ<>\ud800\x00"), st.characters())
PARTS = st.one_of(CHARACTERS, st.sampled_from([*SPECIAL_TOKENS, "<MASK>", "<ma", "sk>", "<foo>", "<ma\u017fk>"]))
ODD = st.one_of(st.text(alphabet=CHARACTERS), st.lists(PARTS, max_size=20).map("".join))


@given(st.lists(ODD, max_size=5))
@settings(max_examples=300, deadline=None)
def test_every_character_is_one_token_or_is_dropped_by_the_documented_rule(texts):
    assert ids_of(texts, special=False) == [one_by_one(text) for text in texts]
    assert ENCODER(texts).residues.tolist() == [count_residues(clean(text)) for text in texts]


@given(st.lists(ODD, max_size=5), st.integers(1, 12), st.sampled_from(["start", "end", "both"]))
@settings(max_examples=200, deadline=None)
def test_truncation_keeps_the_chosen_ends(texts, most, keep):
    tail = {"start": 0, "end": most, "both": most // 2}[keep]
    for text, found in zip(texts, ids_of(texts, max_residues=most, keep=keep, special=False), strict=True):
        whole = one_by_one(text)
        cut = whole[: most - tail] + whole[len(whole) - tail :]
        assert found == (whole if len(whole) <= most else cut)


def test_impossible_truncations_are_refused():
    with pytest.raises(ConfigurationError, match="start, end, both"):
        ENCODER(["MK"], keep="middle")
    with pytest.raises(ConfigurationError, match="at least one"):
        ENCODER(["MK"], max_residues=0)
    with pytest.raises(ConfigurationError, match="at least one"):
        truncation_mask(np.array([3]), 0)


def test_another_tokenizer_is_refused():
    class OtherTokenizer:
        def get_vocab(self):
            return {"A": 0}

    with pytest.raises(ConfigurationError, match="tokenizer of an ESM model"):
        ResidueEncoder(OtherTokenizer())


WRITTEN = st.lists(st.one_of(st.sampled_from(RESIDUES), st.sampled_from(SPECIAL_TOKENS)), max_size=30).map("".join)


@given(st.lists(WRITTEN, max_size=5))
@settings(max_examples=200, deadline=None)
def test_written_special_tokens_are_one_token_as_for_the_tokenizer(sequences):
    assert ids_of(sequences) == [TOKENIZER(sequence)["input_ids"] for sequence in sequences]


def test_written_special_tokens_are_one_token_as_for_fair_esm():
    esm = pytest.importorskip("esm")
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    sequence = "MK<mask>TV<unk><mask>X<pad><cls><eos>A"
    assert ids_of([sequence], special=False) == [alphabet.encode(sequence)]
    ids, offsets, residues = ENCODER(["MK<mask>TV", "<mask>", "M K"], max_residues=3, keep="end")
    assert residues.tolist() == [5, 1, 2]
    mask = TOKENIZER.mask_token_id
    kept = [ids[a + 1 : b - 1].tolist() for a, b in itertools.pairwise(offsets)]
    assert kept == [
        [mask, *TOKENIZER.convert_tokens_to_ids(["T", "V"])],
        [mask],
        TOKENIZER.convert_tokens_to_ids(["M", "K"]),
    ]
