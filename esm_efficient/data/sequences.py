"""The letters of protein sequences, and how a sequence is cleaned."""

from __future__ import annotations

import re
from typing import Literal

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

NUCLEOTIDE_RESIDUES = 10
"""The fewest residues that tell a gene from a peptide."""

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


def count_residues(sequence: str) -> int:
    """Return the characters of a text, or the residues of a clean sequence; a special token counts as one.

    Example:
        >>> count_residues("MK<mask>V")
        4
    """
    return len(SPECIAL_PATTERN.sub("?", sequence) if "<" in sequence else sequence)


def is_nucleotides(sequence: str) -> bool:
    """Return whether a clean sequence of at least 10 residues consists of the letters of DNA and RNA.

    Example:
        >>> is_nucleotides("ACGTACGTACGT"), is_nucleotides("MKTVAYIAKQ")
        (True, False)
    """
    return len(sequence) >= NUCLEOTIDE_RESIDUES and not sequence.strip(NUCLEOTIDES)
