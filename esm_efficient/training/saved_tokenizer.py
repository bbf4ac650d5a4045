"""The tokenizer that a saved model has: in plain transformers it gives the tokens that the model was trained on.

`EsmTokenizer` folds a run of characters that it does not know, such as small letters, into one ``<unk>``, so that
``mktv`` becomes one token without a word. The library reads a sequence as `esm_efficient.data.sequences.clean` says:
small letters are residues, white space and the gaps of an alignment are dropped, stops are dropped at the end, and each
unknown character is one ``<unk>``. A tokenizer of the package ``tokenizers`` with these rules is saved with a model.
"""

from __future__ import annotations

import re
import string
import sys
from functools import cache
from pathlib import Path
from typing import Any

from transformers import EsmTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from esm_efficient.data.sequences import GAPS, SPECIAL_TOKENS, STOP


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save the tokenizer of a model, with the rules of this library if it is that of ESM-2.

    Args:
        tokenizer: the tokenizer.
        folder: the folder of the model.

    Example:
        >>> save_tokenizer(tokenizer, "output/model")  # doctest: +SKIP
    """
    if isinstance(tokenizer, EsmTokenizer):
        (Path(folder) / "vocab.txt").unlink(missing_ok=True)  # of a Trainer, which saved the slow tokenizer
        tokenizer = residue_tokenizer(tokenizer)
    tokenizer.save_pretrained(folder)


def residue_tokenizer(tokenizer: EsmTokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer that gives the tokens of `esm_efficient.data.encoding.ResidueEncoder`.

    Args:
        tokenizer: the tokenizer of ESM-2, whose vocabulary and special tokens are taken.

    Example:
        >>> from esm_efficient.demo import demo_model_path
        >>> tokenizer = residue_tokenizer(EsmTokenizer.from_pretrained(demo_model_path()))
        >>> tokenizer("mk-tv *")["input_ids"] == tokenizer("MKTV")["input_ids"]
        True
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = tokenizer.get_vocab()
    cls, eos, unknown = (str(token) for token in (tokenizer.cls_token, tokenizer.eos_token, tokenizer.unk_token))
    built: Any = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    built.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"[{re.escape(GAPS + _white_space())}]+"), ""),
            normalizers.Replace(Regex(f"[{STOP}]+$"), ""),
            *(normalizers.Replace(letter, letter.upper()) for letter in string.ascii_lowercase),
        ]
    )
    # Looked for in the normalised text, a token is found in capitals too, and a stop before it is not at the end.
    built.add_special_tokens(
        [AddedToken(token, special=True, normalized=True) for token in SPECIAL_TOKENS if token in vocabulary]
    )
    built.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    built.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {eos}", special_tokens=[(cls, vocabulary[cls]), (eos, vocabulary[eos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        cls_token=cls,
        eos_token=eos,
        unk_token=unknown,
        pad_token=str(tokenizer.pad_token),
        mask_token=str(tokenizer.mask_token),
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


@cache
def _white_space() -> str:
    r"""Return the characters that Python calls white space, which are more than ``\s`` matches in tokenizers."""
    return "".join(re.findall(r"\s", "".join(map(chr, range(sys.maxunicode + 1)))))
