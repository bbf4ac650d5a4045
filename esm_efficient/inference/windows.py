"""Sequences that are longer than a model reads: a part of them, or all of them in windows that overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from esm_efficient.data.sequences import Keep
from esm_efficient.errors import ConfigurationError

_DEFAULT_SHARE = 4
"""Neighbouring windows share a fourth of a window if nothing else is said."""


@dataclass(frozen=True)
class Windows:
    """Read sequences that are too long in windows, and take the mean of what the model computes from them.

    Every window is as long as the model reads. There are as few as possible, and they are evenly spread from the first
    residue to the last.

    Args:
        overlap: residues that two neighbouring windows share at least; None for a fourth of a window.

    Example:
        >>> predictor.predict(sequences, keep=Windows(overlap=100))  # doctest: +SKIP
    """

    overlap: int | None = None


LongReading: TypeAlias = Keep | Literal["windows"] | Windows
"""What is read of a sequence that is too long; ``"windows"`` is ``Windows()``."""


class Pieces(NamedTuple):
    """The windows of some sequences; a sequence that is not too long is one window.

    Attributes:
        owner: the index of the sequence, int64 of shape (windows,), ascending.
        start: the first residue, counted from 0, likewise.
        residues: the number of residues, likewise.
    """

    owner: np.ndarray
    start: np.ndarray
    residues: np.ndarray


def windows_for(keep: LongReading | None, longest: int) -> Windows | None:
    """Return the windows that are asked for, with their overlap in numbers; None for a part, or for none.

    Args:
        keep: as `Predictor.predict`.
        longest: residues of a window.

    Raises:
        ConfigurationError: `keep` is unknown, or the overlap is not smaller than a window.

    Example:
        >>> windows_for("windows", 1022)
        Windows(overlap=255)
    """
    if isinstance(keep, Windows) or keep == "windows":
        overlap = keep.overlap if isinstance(keep, Windows) else None
        if overlap is not None and (type(overlap) is not int or not 0 <= overlap < longest):
            raise ConfigurationError(
                f"overlap={overlap!r}: expected a whole number from 0 to {longest - 1:,}, less than a window of "
                f"{longest:,}"
            )
        return Windows(longest // _DEFAULT_SHARE if overlap is None else overlap)
    if keep is not None and keep not in get_args(Keep):
        raise ConfigurationError(
            f"keep={keep!r}: expected one of {', '.join(get_args(Keep))}, windows, or Windows(...)"
        )
    return None


def refuse_joined_ends(keep: LongReading | None) -> None:
    """Refuse to write an entry per residue if the first entry need not be that of the first residue.

    Raises:
        ConfigurationError: `keep` is ``"end"`` or ``"both"``.
    """
    if keep in ("end", "both"):
        raise ConfigurationError(
            f'keep="{keep}": a file with an entry per residue would not say which residues were read. Give '
            'keep="start" or keep="windows"'
        )


def describe_reading(keep: LongReading | None, longest: int) -> str:
    """Return in words what is read of a sequence that is too long; the arguments are as in `windows_for`.

    Example:
        >>> describe_reading(Windows(overlap=100), 1022)
        'the mean of windows of 1,022 residues that share 100 or more'
        >>> describe_reading("start", 1022)
        '1,022 residues at the start'
    """
    if windows := windows_for(keep, longest):
        return f"the mean of windows of {longest:,} residues that share {windows.overlap:,} or more"
    if keep is None:
        return "refused"
    return f"{longest:,} residues at {'both ends' if keep == 'both' else f'the {keep}'}"


def plan_windows(residues: np.ndarray, longest: int, overlap: int) -> Pieces:
    """Return the windows of sequences.

    Args:
        residues: residues per sequence.
        longest: residues of a window.
        overlap: residues that two neighbouring windows share at least, fewer than `longest`.

    Example:
        >>> plan_windows(np.array([4, 11]), 6, 2).start.tolist()
        [0, 0, 2, 5]
    """
    # n windows with n - 1 overlaps reach n * longest - (n - 1) * overlap residues.
    numbers = np.maximum(1, -((overlap - residues) // (longest - overlap)))
    owner = np.repeat(np.arange(len(residues)), numbers)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    rest = np.maximum(residues - longest, 0)[owner]
    return Pieces(owner, rank * rest // np.maximum(numbers[owner] - 1, 1), np.minimum(residues, longest)[owner])


def windows_per_residue(pieces: Pieces, owner: int) -> np.ndarray:
    """Return the number of windows with each residue of a sequence, int64 of shape (residues,)."""
    first, end = np.searchsorted(pieces.owner, [owner, owner + 1])
    starts, counts = pieces.start[first:end], pieces.residues[first:end]
    found = np.zeros((starts + counts).max(), dtype=np.int64)
    for start, count in zip(starts, counts, strict=True):
        found[start : start + count] += 1
    return found
