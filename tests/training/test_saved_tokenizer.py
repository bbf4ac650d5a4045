"""The tokenizer of a saved model: plain transformers gives the tokens of training for any spelling of a sequence."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, EsmTokenizer

from esm_efficient import ResidueEncoder, demo_model_path
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
    ],
)
def test_every_spelling_gives_the_tokens_of_training(saved, text):
    own = ResidueEncoder(EsmTokenizer.from_pretrained(demo_model_path()))
    assert saved(text)["input_ids"] == own([text]).ids.tolist()


def test_special_tokens_and_padding_are_those_of_the_model(saved):
    slow = EsmTokenizer.from_pretrained(demo_model_path())
    for name in ("cls", "eos", "unk", "pad", "mask"):
        assert getattr(saved, f"{name}_token_id") == getattr(slow, f"{name}_token_id")
    assert saved.get_vocab() == slow.get_vocab()
    assert saved.model_max_length == slow.model_max_length
    texts = ["MKT", "MKTAYI"]
    assert saved(texts, padding=True)["input_ids"] == slow(texts, padding=True)["input_ids"]
    assert list(saved(texts)) == ["input_ids", "attention_mask"]
