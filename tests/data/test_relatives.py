"""The count of close relatives across splits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_texts import RESIDUES, sequences

from esm_efficient import load_deeploc
from esm_efficient.data.relatives import WORD, close_relatives, shared_words

texts = st.lists(st.text(alphabet="ACDEF", min_size=0, max_size=25), max_size=8)


def words(text: str) -> set[str]:
    return {text[i : i + WORD] for i in range(len(text) - WORD + 1)}


@settings(max_examples=50, deadline=None)
@given(queries=texts, references=texts)
def test_the_share_is_that_of_sets_of_words(queries, references):
    expected = [
        max((len(words(query) & words(other)) for other in references), default=0) / max(len(words(query)), 1)
        for query in queries
    ]
    assert shared_words(queries, references) == pytest.approx(expected)


def mutated(text: str, identity: float, rng) -> str:
    return "".join(letter if rng.random() < identity else rng.choice(RESIDUES) for letter in text)


def test_relatives_are_found_and_strangers_are_not():
    rng = np.random.default_rng(0)
    train = ["".join(rng.choice(RESIDUES, 300)) for _ in range(40)]
    relatives = [mutated(text, 0.75, rng) for text in train]
    strangers = ["".join(rng.choice(RESIDUES, 300)) for _ in range(40)]
    assert close_relatives(relatives, train) == 1.0
    assert close_relatives(strangers, train) == 0.0
    assert np.isnan(close_relatives([], sequences(3)))


@pytest.mark.slow
def test_a_random_split_of_the_real_table_has_many_more_relatives_than_partitions(deeploc_csv):
    shares = {}
    for split in ("partition", "random"):
        with pytest.warns(UserWarning, match="random split") if split == "random" else _nothing():
            data = load_deeploc(deeploc_csv, split=split)
        shares[split] = close_relatives(data["test"]["sequence"][:], data["train"]["sequence"][:])
    assert shares["partition"] < 0.02
    assert shares["random"] > 0.3


def _nothing():
    from contextlib import nullcontext

    return nullcontext()
