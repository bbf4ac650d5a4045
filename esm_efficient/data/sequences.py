"""The letters of protein sequences, and how a sequence is cleaned."""

from __future__ import annotations

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

_FOLD = str.maketrans({letter: letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz"} | dict.fromkeys(GAPS))


def clean(sequence: str) -> str:
    r"""Return a text without the characters that are not residues.

    White space and the gaps of an alignment (``-`` and ``.``) are dropped everywhere, and stops (``*``) at the end. The
    letters a to z become capitals. Every other character stays and is one residue. A stop inside the sequence stays
    too, as an unknown residue.

    Example:
        >>> clean("mk-tv\n AYI* ")
        'MKTVAYI'
    """
    return "".join(sequence.split()).translate(_FOLD).rstrip(STOP)
