"""The tokenizer of a saved model: plain transformers gives the tokens of training for any spelling of a sequence."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer, EsmTokenizer

from esm_efficient import ResidueEncoder, demo_model_path
from esm_efficient.data.sequences import SPECIAL_TOKENS
from esm_efficient.training.saved_tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(EsmTokenizer.from_pretrained(demo_model_path()), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        "MKTAYIAKQR",
        "mktv",
        " MK TV\n",
        "MK-T.V",
        "MKTV*",
        "MKTV**",
        "MK*TV",
        "XBZUO",
        "MJKT",
        "M??KT",
        "MK<mask>TV",
        "é",
        "MK<MASK>TV",
        "M*<mask>",
        "<mask>**",
        "MK<null_1>TV<Pad>",
        "M<ma sk>K",
        "M\x1cK\x85T\u2028V\u00a0A",
        "M<masK>\u017f<mask",
    ],
)
def test_every_spelling_gives_the_tokens_of_training(saved, text):
    own = ResidueEncoder(EsmTokenizer.from_pretrained(demo_model_path()))
    assert saved(text)["input_ids"] == own([text]).ids.tolist()


def test_random_texts_give_the_tokens_of_training(saved):
    own = ResidueEncoder(EsmTokenizer.from_pretrained(demo_model_path()))
    parts = [*"MKTvayj*-. \n\t\x1c\x85<1\u017fßİé", *SPECIAL_TOKENS, "<MASK>", "<cLs>", "\u00a0", "\u2028", "\u3000"]
    draw = random.Random(0)
    texts = ["".join(draw.choices(parts, k=draw.randint(1, 9))) for _ in range(3000)]
    assert [text for text in texts if saved(text)["input_ids"] != own([text]).ids.tolist()] == []


def test_special_tokens_and_padding_are_those_of_the_model(saved):
    slow = EsmTokenizer.from_pretrained(demo_model_path())
    for name in ("cls", "eos", "unk", "pad", "mask"):
        assert getattr(saved, f"{name}_token_id") == getattr(slow, f"{name}_token_id")
    assert saved.get_vocab() == slow.get_vocab()
    assert saved.model_max_length == slow.model_max_length
    texts = ["MKT", "MKTAYI"]
    assert saved(texts, padding=True)["input_ids"] == slow(texts, padding=True)["input_ids"]
    assert list(saved(texts)) == ["input_ids", "attention_mask"]
