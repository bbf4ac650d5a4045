"""Show the predicted classes of residues beside the true ones, residue by residue, for a page."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.data.sequences import SPECIAL_PATTERN, clean
from esm_efficient.reporting.html import Residue, ResidueStrip
from esm_efficient.tasks import IGNORE, SPECIAL_TOKENS

if TYPE_CHECKING:
    from esm_efficient.training.evaluation_page import Evaluation

SHOWN_RESIDUES = 240
"""The most residues that are shown of a sequence: the part with the most mistakes."""

_UNKNOWN = "·"
"""Stands for a label that is unknown."""


def residue_strips(evaluation: Evaluation, most: int) -> list[Any]:
    """Return the sequences with the most wrong residues, each residue with its true and its predicted class.

    Args:
        evaluation: the evaluation of a task with one class per residue, with sequences.
        most: the most sequences.

    Returns:
        A text that explains the letters, and a `ResidueStrip` per sequence.
    """
    from scipy.special import softmax

    predicted = evaluation.scores.argmax(axis=-1)
    wrong = (predicted != evaluation.labels) & (evaluation.labels != IGNORE)
    order = np.argsort(-wrong.sum(axis=1), kind="stable")
    rows = [row for row in order[:most] if wrong[row].any()]
    codes = letters_for(evaluation.task.names)
    named = [f"{code} {name}" for code, name in zip(codes, evaluation.task.names, strict=True) if code != name]
    meaning = ", ".join([*named, f"{_UNKNOWN} unknown"])
    strips: list[Any] = [
        f"Sequences with a wrong residue: {int(wrong.any(axis=1).sum()):,}; the worst {len(rows)} are shown. Each "
        f"column is a residue, with its true class and its predicted class below it. The letters mean: {meaning}. A "
        "wrong residue is underlined and orange, and a right one is blue. A deeper colour is a higher probability of "
        "the predicted class. The number above a block is that of its first residue."
    ]
    for row in rows:
        size = min(len(evaluation.sequences[row]), evaluation.labels.shape[1] - SPECIAL_TOKENS)
        within = slice(1, size + 1)  # tokens begin with <cls>
        start = _most_wrong(wrong[row, within])
        place = slice(1 + start, 1 + min(start + SHOWN_RESIDUES, size))
        strips.append(
            ResidueStrip(
                heading=_heading(evaluation, row, wrong[row, within], start, size),
                start=start + 1,
                residues=_residues(
                    evaluation.sequences[row][start : min(start + SHOWN_RESIDUES, size)],
                    evaluation.labels[row, place],
                    softmax(evaluation.scores[row, place], axis=-1),
                    evaluation.task.names,
                    codes,
                    start,
                ),
            )
        )
    return strips


def read_letters(sequence: str) -> str:
    """Return the letters that a model reads of a sequence: a character per residue; a special token is ``?``.

    Example:
        >>> read_letters("mk-t v<mask>a*")
        'MKTV?A'
    """
    text = clean(sequence)
    return SPECIAL_PATTERN.sub("?", text) if "<" in text else text


def letters_for(names: Sequence[str]) -> list[str]:
    """Return a letter or digit for each class, one of its name if possible; ``"?"`` if there are too many classes.

    Example:
        >>> letters_for(["helix", "strand", "sheet", "coil"])
        ['H', 'S', 'E', 'C']
    """
    found: list[str] = []
    for name in names:
        wanted = [letter for letter in name.upper() if letter.isascii() and letter.isalnum()]
        free = (letter for letter in (*wanted, *string.ascii_uppercase, *string.digits, *string.ascii_lowercase))
        found.append(next((letter for letter in free if letter not in found), "?"))
    return found


def _most_wrong(wrong: np.ndarray) -> int:
    """Return the start of the part with the most wrong residues, a multiple of ten."""
    starts = range(0, max(len(wrong) - SHOWN_RESIDUES, 0) + 10, 10)
    counts = {start: int(wrong[start : start + SHOWN_RESIDUES].sum()) for start in starts}
    best = [start for start, count in counts.items() if count == max(counts.values())]
    return best[len(best) // 2]


def _heading(evaluation: Evaluation, row: int, wrong: np.ndarray, start: int, size: int) -> str:
    known = int((evaluation.labels[row] != IGNORE).sum())
    shown = f"residues {start + 1:,} to {min(start + SHOWN_RESIDUES, size):,} of {size:,}"
    return f"{evaluation.names[row]}: {int(wrong.sum()):,} of {known:,} labelled residues are wrong; {shown}"


def _residues(
    letters: str, labels: np.ndarray, chances: np.ndarray, names: Sequence[str], codes: Sequence[str], start: int
) -> list[Residue]:
    residues = []
    for number, (letter, label, chance) in enumerate(zip(letters, labels, chances, strict=True), start + 1):
        best = int(chance.argmax())
        known = label != IGNORE
        true = names[label] if known else "unknown"
        residues.append(
            Residue(
                letter=letter,
                true=codes[label] if known else _UNKNOWN,
                predicted=codes[best],
                state=("right" if label == best else "wrong") if known else "unknown",
                probability=round(float(chance[best]), 2),
                title=f"{letter}{number}: true {true}, predicted {names[best]}, probability {chance[best]:.2f}",
            )
        )
    return residues
