"""Encode residues as token ids, whole batches at once; equal to `EsmTokenizer` on every letter that it knows.

`EsmTokenizer` folds a run of unknown characters into a single ``<unk>``, which shifts every later residue. Here each
unknown character is one ``<unk>``. `esm_efficient.data.sequences.clean` says which characters are dropped. A special
token that is written in a sequence, such as ``<mask>``, is one token in place of a residue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np

from esm_efficient.data.sequences import AMBIGUOUS_RESIDUES, GAPS, RESIDUES, SPECIAL_PATTERN, STOP, Keep, clean
from esm_efficient.errors import ConfigurationError
from esm_efficient.tasks import MAX_TOKENS, SPECIAL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_TOKENS = 1_000_000
"""Tokens of a sequence above which a tokenizer's ``model_max_length`` means that it is unknown."""

_DROPPED = 255
"""The entry of a dropped character in the table of ids."""


def longest_input(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens that a model reads, special tokens included, as its tokenizer says.

    Args:
        tokenizer: of a model; ``model_max_length`` is what `finetune` was given as ``max_tokens``. transformers has a
            huge number there if nothing is known, which gives 1,024.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from esm_efficient.demo import demo_model_path
        >>> longest_input(AutoTokenizer.from_pretrained(demo_model_path()))
        1024
    """
    length = tokenizer.model_max_length
    is_known = isinstance(length, int | float) and SPECIAL_TOKENS < length <= _MOST_TOKENS
    return int(length) if is_known else MAX_TOKENS


class Encoded(NamedTuple):
    """The token ids of many sequences, joined into one array.

    Attributes:
        ids: uint8 of shape (tokens of all sequences,).
        offsets: int64 of shape (sequences + 1,): sequence i is ``ids[offsets[i]:offsets[i + 1]]``.
        residues: int64 of shape (sequences,): residues per sequence before truncation.
    """

    ids: np.ndarray
    offsets: np.ndarray
    residues: np.ndarray


class ResidueEncoder:
    """Encodes sequences as the token ids of an ESM model, without a loop over residues.

    Args:
        tokenizer: the tokenizer of an ESM model; its vocabulary gives the ids.

    Attributes:
        cls: the id of ``<cls>``, which comes before a sequence.
        eos: the id of ``<eos>``, which comes after a sequence.
        unknown: the id of ``<unk>``, for a character that is not in the vocabulary.
        ambiguous: the ids of X, B and Z.

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
            raise ConfigurationError(
                f"the tokenizer has no {', '.join(absent)}: expected the tokenizer of an ESM model"
            )
        if (highest := max(*vocabulary.values(), *specials.values())) >= _DROPPED:
            raise ConfigurationError(f"the tokenizer has the id {highest}: an ESM model's vocabulary has 33 tokens")
        self.cls, self.eos, self.unknown = specials.values()
        self.ambiguous = [vocabulary[residue] for residue in AMBIGUOUS_RESIDUES]
        self._table = self._make_table(vocabulary)
        self._written = {token: index for token, index in vocabulary.items() if SPECIAL_PATTERN.fullmatch(token)}

    def _make_table(self, vocabulary: Mapping[str, int]) -> np.ndarray:
        """Return the id of every ASCII character, uint8 of shape (256,)."""
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
            sequences: texts; they are cleaned as by `esm_efficient.data.sequences.clean`.
            max_residues: the most residues to keep per sequence; None for all.
            keep: the part of a longer sequence to keep: its ``"start"``, its ``"end"``, or ``"both"`` ends.
            special: put ``<cls>`` before each sequence and ``<eos>`` after it.

        Raises:
            ConfigurationError: `keep` has another value, or `max_residues` is below 1.
        """
        check_truncation(max_residues, keep)
        ids, lengths = self._residue_ids(sequences)
        residues = lengths
        if max_residues is not None and lengths.max(initial=0) > max_residues:
            ids = ids[truncation_mask(lengths, max_residues, keep)]
            lengths = np.minimum(lengths, max_residues)
        if not special:
            return Encoded(ids, offsets_from_lengths(lengths), residues)
        offsets = offsets_from_lengths(lengths + SPECIAL_TOKENS)
        tokens = np.empty(offsets[-1], dtype=np.uint8)
        tokens[residue_positions(offsets)] = ids
        tokens[offsets[:-1]], tokens[offsets[1:] - 1] = self.cls, self.eos
        return Encoded(tokens, offsets, residues)

    def _residue_ids(self, sequences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all residues, and the number of residues per sequence."""
        text = "".join(sequences)
        if not text.isascii() or STOP in text:
            # Other white space and final stops can only be in a sequence with such a character.
            sequences = [s if s.isascii() and STOP not in s else clean(s) for s in sequences]
        if "<" in text:
            return self._ids_with_special_tokens(sequences)
        return self._ids_of_characters(sequences)

    def _ids_of_characters(self, sequences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `_residue_ids`, with one id for every character that is not dropped."""
        text = "".join(sequences)
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        # A character outside ASCII becomes '?', which is not in the vocabulary: one <unk> per character.
        ids = self._table[np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)]
        dropped = ids == _DROPPED
        if not dropped.any():
            return ids, lengths
        dropped_before = offsets_from_lengths(dropped)
        offsets = offsets_from_lengths(lengths)
        return ids[~dropped], lengths - (dropped_before[offsets[1:]] - dropped_before[offsets[:-1]])

    def _ids_with_special_tokens(self, sequences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `_residue_ids`, for sequences in which special tokens may be written."""
        cleaned = [clean(sequence) if "<" in sequence else sequence for sequence in sequences]
        # A token becomes one character that is not in the vocabulary; its id is put in its place below.
        ids, lengths = self._ids_of_characters([SPECIAL_PATTERN.sub("?", sequence) for sequence in cleaned])
        starts = offsets_from_lengths(lengths).tolist()
        for start, sequence in zip(starts, cleaned, strict=False):
            shift = 0
            for match in SPECIAL_PATTERN.finditer(sequence) if "<" in sequence else ():
                ids[start + match.start() - shift] = self._written.get(match[0], self.unknown)
                shift += len(match[0]) - 1
        return ids, lengths


def offsets_from_lengths(lengths: np.ndarray) -> np.ndarray:
    """Return the start of each sequence in a joined array, and the end of the last: int64 of shape (sequences + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths)))


def residue_positions(offsets: np.ndarray) -> np.ndarray:
    """Return which tokens are residues, bool of shape (tokens,): all but the first and the last of each sequence.

    Args:
        offsets: the start of each sequence, with its two special tokens, and the end of the last.
    """
    inner = np.ones(offsets[-1], dtype=bool)
    inner[offsets[:-1]] = inner[offsets[1:] - 1] = False
    return inner


def truncation_mask(lengths: np.ndarray, max_residues: int, keep: Keep = "start") -> np.ndarray:
    """Return which residues stay when sequences are truncated.

    Args:
        lengths: residues per sequence.
        max_residues: the most residues to keep per sequence, at least 1.
        keep: the part to keep: the ``"start"``, the ``"end"``, or ``"both"`` ends (the start gets the odd residue).

    Returns:
        bool of shape (residues of all sequences,).

    Raises:
        ConfigurationError: `keep` has another value, or `max_residues` is below 1.

    Example:
        >>> truncation_mask(np.array([4, 2]), 3, "both").tolist()
        [True, True, False, True, True, True]
    """
    check_truncation(max_residues, keep)
    tail = {"start": 0, "end": max_residues, "both": max_residues // 2}[keep]
    position = np.arange(lengths.sum()) - np.repeat(offsets_from_lengths(lengths)[:-1], lengths)
    return (position < max_residues - tail) | (position >= np.repeat(lengths - tail, lengths))


def check_truncation(max_residues: int | None, keep: str) -> None:
    """Refuse a truncation that leaves nothing, or an unknown value of `keep`.

    Raises:
        ConfigurationError: `keep` is unknown, or `max_residues` is below 1.
    """
    if keep not in get_args(Keep):
        raise ConfigurationError(f"keep={keep!r}: expected one of {', '.join(get_args(Keep))}")
    if max_residues is not None and max_residues < 1:
        raise ConfigurationError(f"max_residues={max_residues}: at least one residue must stay")
