"""Residues to token ids, whole batches at once, equal to `EsmTokenizer` on every letter that it knows.

`EsmTokenizer` folds a run of unknown characters into a single ``<unk>``, which shifts every later residue. Here each
unknown character is one ``<unk>``; what is no residue at all is dropped as `esm_efficient.data.sequences.clean` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np

from esm_efficient.data.sequences import AMBIGUOUS_RESIDUES, GAPS, RESIDUES, STOP, Keep, clean
from esm_efficient.errors import ConfigurationError
from esm_efficient.tasks import SPECIAL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DROPPED = 255


class Encoded(NamedTuple):
    """Token ids of many sequences, one after another.

    Attributes:
        ids: uint8 of shape (tokens of all sequences,).
        offsets: int64 of shape (sequences + 1,): sequence i is ``ids[offsets[i]:offsets[i + 1]]``.
        residues: int64 of shape (sequences,): residues of each before it was cut.
    """

    ids: np.ndarray
    offsets: np.ndarray
    residues: np.ndarray


class ResidueEncoder:
    """Turns sequences into the token ids of an ESM model, without a loop over residues.

    Args:
        tokenizer: of an ESM model; its vocabulary says which id a residue has.

    Attributes:
        cls: id of ``<cls>``, put before a sequence.
        eos: id of ``<eos>``, put after it.
        unknown: id of ``<unk>``, for a character that is no residue of the vocabulary.
        ambiguous: ids of X, B and Z.

    Raises:
        ConfigurationError: the tokenizer lacks one of the 25 residue letters or a special token, or has ids above 254.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from esm_efficient.demo import demo_model_path
        >>> encoder = ResidueEncoder(AutoTokenizer.from_pretrained(demo_model_path()))
        >>> ids, offsets, _ = encoder(["MKT", "j-v*"])
        >>> [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
        [[0, 20, 15, 11, 2], [0, 3, 7, 2]]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        if missing := [residue for residue in RESIDUES if residue not in vocabulary]:
            raise ConfigurationError(
                f"the tokenizer has no token for {', '.join(missing)}: expected the tokenizer of an ESM model, got "
                f"{type(tokenizer).__name__}"
            )
        specials = {name: getattr(tokenizer, name) for name in ("cls_token_id", "eos_token_id", "unk_token_id")}
        if absent := [name for name, value in specials.items() if value is None]:
            raise ConfigurationError(f"the tokenizer has no {', '.join(absent)}")
        if (highest := max(*vocabulary.values(), *specials.values())) >= _DROPPED:
            raise ConfigurationError(f"the tokenizer has the id {highest}: an ESM model's vocabulary has 33 tokens")
        self.cls, self.eos, self.unknown = specials.values()
        self.ambiguous = [vocabulary[residue] for residue in AMBIGUOUS_RESIDUES]
        self._table = self._make_table(vocabulary)

    def _make_table(self, vocabulary: Mapping[str, int]) -> np.ndarray:
        """The id of every ASCII character, uint8 of shape (256,)."""
        table = np.full(256, self.unknown, dtype=np.uint8)
        for token, index in vocabulary.items():
            if len(token) == 1 and token.isascii():
                table[ord(token)] = index
        for letter in range(ord("A"), ord("Z") + 1):
            table[letter + 32] = table[letter]
        for character in map(chr, range(128)):
            if character.isspace() or character in GAPS:
                table[ord(character)] = _DROPPED
        table[ord(STOP)] = self.unknown
        return table

    def __call__(
        self, sequences: Sequence[str], *, max_residues: int | None = None, keep: Keep = "start", special: bool = True
    ) -> Encoded:
        """Encode sequences.

        Args:
            sequences: texts, cleaned on the way as by `esm_efficient.data.sequences.clean`.
            max_residues: the most residues to keep of each; None for all.
            keep: what stays of a longer one: its ``"start"``, its ``"end"``, or ``"both"`` ends.
            special: put ``<cls>`` before each and ``<eos>`` after it.

        Raises:
            ConfigurationError: `keep` is none of these, or `max_residues` is below 1.
        """
        check_cut(max_residues, keep)
        ids, lengths = self._residues(sequences)
        residues = lengths
        if max_residues is not None and lengths.max(initial=0) > max_residues:
            kept = kept_by(lengths, max_residues, keep)
            ids, lengths = ids[kept], np.minimum(lengths, max_residues)
        if not special:
            return Encoded(ids, offsets_of(lengths), residues)
        offsets = offsets_of(lengths + SPECIAL_TOKENS)
        tokens = np.empty(offsets[-1], dtype=np.uint8)
        inner = np.ones(len(tokens), dtype=bool)
        inner[offsets[:-1]] = inner[offsets[1:] - 1] = False
        tokens[inner] = ids
        tokens[offsets[:-1]], tokens[offsets[1:] - 1] = self.cls, self.eos
        return Encoded(tokens, offsets, residues)

    def _residues(self, sequences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all residues, and how many each sequence has."""
        text = "".join(sequences)
        if not text.isascii() or STOP in text:
            # Only in the few that hold such a character, other white space or a final stop must be looked for.
            sequences = [s if s.isascii() and STOP not in s else clean(s) for s in sequences]
            text = "".join(sequences)
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        # A character outside of ASCII becomes '?', which is no token: one <unk> for one character.
        ids = self._table[np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)]
        dropped = ids == _DROPPED
        if not dropped.any():
            return ids, lengths
        so_far = np.concatenate(([0], np.cumsum(dropped)))
        offsets = offsets_of(lengths)
        return ids[~dropped], lengths - (so_far[offsets[1:]] - so_far[offsets[:-1]])


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of several pieces begins, and the end of the last: int64 of shape (pieces + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths)))


def kept_by(lengths: np.ndarray, most: int, keep: Keep = "start") -> np.ndarray:
    """Which residues stay when sequences are cut.

    Args:
        lengths: residues of each sequence.
        most: the most residues to keep of each, at least 1.
        keep: what stays: the ``"start"``, the ``"end"``, or ``"both"`` ends (the start gets the odd residue).

    Returns:
        bool of shape (residues of all sequences,).

    Raises:
        ConfigurationError: `keep` is none of these, or `most` is below 1.

    Example:
        >>> kept_by(np.array([4, 2]), 3, "both").tolist()
        [True, True, False, True, True, True]
    """
    check_cut(most, keep)
    tail = {"start": 0, "end": most, "both": most // 2}[keep]
    place = np.arange(lengths.sum()) - np.repeat(offsets_of(lengths)[:-1], lengths)
    return (place < most - tail) | (place >= np.repeat(lengths - tail, lengths))


def check_cut(max_residues: int | None, keep: str) -> None:
    """Refuse a cut that leaves nothing or that has no name.

    Raises:
        ConfigurationError: `keep` is no kind of cut, or `max_residues` is below 1.
    """
    if keep not in get_args(Keep):
        raise ConfigurationError(f"keep={keep!r}: expected one of {', '.join(get_args(Keep))}")
    if max_residues is not None and max_residues < 1:
        raise ConfigurationError(f"max_residues={max_residues}: at least one residue must stay")
