"""Protein sequences: their letters, and what is none of them."""

from __future__ import annotations

from typing import Literal

Keep = Literal["start", "end", "both"]

STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 amino acids of the genetic code."""

AMBIGUOUS_RESIDUES = "XBZ"
"""Letters that stand for more than one amino acid; ESM-2 has a token for each."""

RESIDUES = STANDARD_RESIDUES + AMBIGUOUS_RESIDUES + "UO"
"""The 25 residue letters that ESM-2 has a token for."""


GAPS = "-."
"""What an alignment puts where a sequence has no residue."""

STOP = "*"
"""The stop codon, which a translated sequence may end with."""

_FOLD = str.maketrans({letter: letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz"} | dict.fromkeys(GAPS))


def clean(sequence: str) -> str:
    r"""What is left of a text once everything that is no residue is gone.

    White space and the gaps of an alignment (``-`` and ``.``) are dropped wherever they stand, and stops (``*``) at
    the end. The letters a to z become capitals. Everything else stays, each character for one residue: also a stop
    inside the sequence, which is then unknown.

    Example:
        >>> clean("mk-tv\n AYI* ")
        'MKTVAYI'
    """
    return "".join(sequence.split()).translate(_FOLD).rstrip(STOP)
