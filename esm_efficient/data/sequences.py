"""Protein sequences: cleaning, checking, shortening."""

from __future__ import annotations

from typing import Literal, get_args

from esm_efficient.errors import ConfigurationError

Keep = Literal["start", "end", "both"]

STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 amino acids of the genetic code."""

AMBIGUOUS_RESIDUES = "XBZ"
"""Letters that stand for more than one amino acid; ESM-2 has a token for each."""

RESIDUES = STANDARD_RESIDUES + AMBIGUOUS_RESIDUES + "UO"
"""The 25 residue letters that ESM-2 has a token for."""


def clean(sequence: str) -> str:
    r"""Fold lower case to upper case and drop white space.

    Example:
        >>> clean("mktv\n AYI ")
        'MKTVAYI'
    """
    return "".join(sequence.split()).upper()


def truncate(sequence: str, max_residues: int, keep: Keep = "start") -> str:
    """Shorten a sequence to at most `max_residues` residues.

    Args:
        sequence: residues.
        max_residues: the most residues to keep, at least 1.
        keep: which part stays: the ``"start"``, the ``"end"``, or ``"both"`` ends with the middle cut out (the start
            gets the odd residue).

    Raises:
        ConfigurationError: `keep` is none of these, or `max_residues` is below 1.

    Example:
        >>> truncate("MKTVAYI", 5, "both")
        'MKTYI'
    """
    if keep not in get_args(Keep):
        raise ConfigurationError(f"keep={keep!r}: expected one of {', '.join(get_args(Keep))}")
    if max_residues < 1:
        raise ConfigurationError(f"max_residues={max_residues}: at least one residue must stay")
    if len(sequence) <= max_residues:
        return sequence
    if keep == "start":
        return sequence[:max_residues]
    if keep == "end":
        return sequence[-max_residues:]
    tail = max_residues // 2
    return sequence[: max_residues - tail] + (sequence[-tail:] if tail else "")
