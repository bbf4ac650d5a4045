"""Rows that were left out on purpose, counted by what was wrong with them, and other notes on a table."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence

from esm_efficient.errors import listing

_SHOWN = 5


class LeftOut:
    """Counts the rows that were left out because something was wrong with them.

    Attributes:
        counts: rows by problem.
        shown: the first places, by problem.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.shown: dict[str, list[str]] = {}

    def add(self, place: str, problem: str) -> None:
        """Count a row."""
        self.counts[problem] += 1
        shown = self.shown.setdefault(problem, [])
        if len(shown) < _SHOWN:
            shown.append(place)

    def notes(self) -> list[str]:
        """Return a sentence per problem."""
        return [
            f"left out {count} row(s), {problem}: "
            + listing([*self.shown[problem], *[""] * (count - len(self.shown[problem]))], _SHOWN)
            for problem, count in self.counts.items()
        ]


class Notes:
    """What a user should know about a table; they are kept with it and logged whenever it is loaded."""

    def __init__(self, messages: Sequence[tuple[int, str]] = ()) -> None:
        self.messages = list(messages)

    def add(self, level: int, message: str) -> None:
        """Add a message of a level of `logging`."""
        self.messages.append((level, message))

    def log(self, logger: logging.Logger) -> None:
        """Log the messages."""
        for level, message in self.messages:
            logger.log(level, "%s", message)

    def to_json(self) -> bytes:
        """Return the messages as JSON."""
        return json.dumps(self.messages).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Notes:
        """Return the notes that `to_json` wrote."""
        return cls([(level, message) for level, message in json.loads(text)])
