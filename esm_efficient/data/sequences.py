"""The letters of protein sequences, and how a sequence is cleaned."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from esm_efficient.errors import DataError, listing

Keep = Literal["start", "end", "both"]

STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 amino acids of the genetic code."""

AMBIGUOUS_RESIDUES = "XBZ"
"""Letters that mean one of several amino acids; ESM-2 has a token for each."""

RESIDUES = STANDARD_RESIDUES + AMBIGUOUS_RESIDUES + "UO"
"""The 25 residue letters that ESM-2 has a token for."""

GAPS = "-."
"""The characters of an alignment where a sequence has no residue."""

STOP = "*"
"""The stop codon, which may be at the end of a translated sequence."""

SPECIAL_TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "<null_1>")
"""Tokens of ESM-2 that may be written in a sequence; each is one residue, as for transformers and fair-esm."""

SPECIAL_PATTERN = re.compile("|".join(SPECIAL_TOKENS), re.IGNORECASE | re.ASCII)
"""Matches a written special token."""

NUCLEOTIDES = "ACGTUN"
"""The letters of DNA and RNA, and N for any of them; each is also the letter of an amino acid."""

_NUCLEOTIDE_RESIDUES = 10
"""The fewest residues of a sequence that may be nucleotides."""

_NUCLEOTIDE_KINDS = 3
"""The fewest different nucleotides of such a sequence, since proteins have repeats such as GAGAGAGAGA."""

_CERTAIN_RESIDUES = 20
"""Residues, of all such sequences together, that peptides hardly ever have by chance."""

_NUCLEOTIDE_TEXT = NUCLEOTIDES + NUCLEOTIDES.lower() + GAPS + STOP + string.whitespace

_WORDS = 0.05
"""The largest share of letters that are rare in proteins (B, J, O, U, Z) in a text that may be words."""

_EXAMPLES = 5

_FOLD = str.maketrans({letter: letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz"} | dict.fromkeys(GAPS))


def clean(sequence: str) -> str:
    r"""Return a text without the characters that are not residues.

    White space and the gaps of an alignment (``-`` and ``.``) are dropped everywhere, and stops (``*``) at the end. The
    letters a to z become capitals, but a special token such as ``<mask>`` stays as it is. Every other character stays
    and is one residue. A stop inside the sequence stays too, as an unknown residue.

    Example:
        >>> clean("mk-tv\n AYI* "), clean("mk<mask>v")
        ('MKTVAYI', 'MK<mask>V')
    """
    text = "".join(sequence.split()).translate(_FOLD).rstrip(STOP)
    return SPECIAL_PATTERN.sub(lambda match: match[0].lower(), text) if "<" in text else text


def check_texts(sequences: Iterable[object], rows: Iterable[int], split: str) -> None:
    """Refuse sequences that are not texts.

    Args:
        sequences: the sequences.
        rows: the number of the row of each.
        split: the name of their split.

    Raises:
        DataError: one is missing or not a text.
    """
    if bad := [f"row {row} of {split}" for row, text in zip(rows, sequences, strict=True) if not isinstance(text, str)]:
        raise DataError(f"the sequence of {len(bad)} row(s) is missing or not a text: {listing(bad)}")


def count_residues(sequence: str) -> int:
    """Return the characters of a text, or the residues of a clean sequence; a special token counts as one.

    Example:
        >>> count_residues("MK<mask>V")
        4
    """
    return len(SPECIAL_PATTERN.sub("?", sequence) if "<" in sequence else sequence)


def looks_like_words(text: str) -> bool:
    """Return whether a text of letters is written as words are, and not as a sequence.

    Such a text is in small letters or has spaces at uneven distances, and many of its letters are rare in proteins. If
    it is in small letters and has such spaces, it is words, whatever its letters are.

    Example:
        >>> [looks_like_words(text) for text in ("mktaylakqr", "MKTAYIA KQR QISFVK", "THIS IS NOT A PROTEIN")]
        [False, False, True]
    """
    written = SPECIAL_PATTERN.sub("", text) if "<" in text else text  # <mask> is no word
    lengths = [len(block) for block in re.split("[ \t]+", text.strip(" \t"))]
    spaced = "\n" not in text and (len(set(lengths[:-1])) > 1 or lengths[-1] > lengths[0])
    small = written != written.upper()
    if spaced == small:
        return spaced
    letters = clean(written)
    return sum(letter not in STANDARD_RESIDUES + "X" for letter in letters) > _WORDS * len(letters)


def is_nucleotides(sequence: str) -> bool:
    """Return whether a sequence of at least 10 residues consists of the letters of DNA and RNA, three or more of them.

    Example:
        >>> is_nucleotides("ACGTACGTACGT"), is_nucleotides("MKTVAYIAKQ"), is_nucleotides("GAGAGAGAGA")
        (True, False, False)
    """
    if sequence.strip(_NUCLEOTIDE_TEXT):
        return False
    letters = clean(sequence)
    return len(letters) >= _NUCLEOTIDE_RESIDUES and len(set(letters) - {"N"}) >= _NUCLEOTIDE_KINDS


@dataclass
class NucleotideCount:
    """How many of some sequences consist of the letters of DNA and RNA.

    Attributes:
        sequences: sequences of any kind.
        found: those that consist of the letters of DNA and RNA.
        residues: of the latter.
        examples: names of the first of the latter.
    """

    sequences: int = 0
    found: int = 0
    residues: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, sequences: Sequence[str], names: Sequence[str]) -> None:
        """Count sequences; `names` says what each is called in a message."""
        self.sequences += len(sequences)
        for sequence, name in zip(sequences, names, strict=True):
            if is_nucleotides(sequence):
                self.found += 1
                self.residues += count_residues(sequence)
                self.examples = [*self.examples, str(name)][:_EXAMPLES]

    def warning(self, source: str) -> str:
        """Return what to warn of; empty if there is nothing.

        Args:
            source: where the sequences are from.

        Raises:
            DataError: most of the sequences are nucleotides.
        """
        if not self.found:
            return ""
        shown = f": {', '.join(self.examples)}" if self.examples else ""
        if self.found > len(self.examples) > 0:
            shown += f" and {self.found - len(self.examples)} more"
        if 2 * self.found > self.sequences and self.residues >= _CERTAIN_RESIDUES:
            raise DataError(
                f"{source}: {self.found} of {self.sequences} sequences consist of the letters A, C, G, T, U and N"
                f"{shown}. Expected proteins, got nucleotides: translate them first"
            )
        return f"{self.found} sequence(s) may be nucleotides, not proteins{shown}"
