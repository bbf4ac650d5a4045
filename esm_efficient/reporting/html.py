"""One self-contained HTML page: it has no script and loads no file and no address."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from esm_efficient.reporting.tables import one_line

_BLOCK = 10
_NARROW = 400
"""Points; a plot of this width can still be read on a telephone."""


@dataclass(frozen=True)
class Table:
    """A table of a page."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Plot:
    """A plot of a page: SVG and its caption."""

    svg: str
    caption: str

    @property
    def wide(self) -> bool:
        """Whether the letters of the plot would be too small to read if it were as narrow as a telephone."""
        width = re.search(r'<svg[^>]*?\bwidth="([\d.]+)pt"', self.svg)
        return width is not None and float(width[1]) > _NARROW

    def drawn(self, prefix: str) -> str:
        """Return the SVG as one image that is described by its caption, with a prefix before each of its ids."""
        text = re.sub(r"""(\bid=["']|\bhref=["']#|url\(#)""", rf"\1{prefix}", self.svg)
        described = f'<svg role="img" aria-label="{html.escape(_plain(self.caption))}"'
        return re.sub("<svg", lambda _: described, text, count=1)


@dataclass(frozen=True)
class Residue:
    """A residue of a `ResidueStrip`.

    Attributes:
        letter: its amino acid.
        true: one letter for its true class.
        predicted: one letter for its predicted class.
        state: ``"right"``, ``"wrong"`` or ``"unknown"``.
        probability: that of the predicted class.
        title: all of this in words.
    """

    letter: str
    true: str
    predicted: str
    state: str
    probability: float
    title: str


@dataclass(frozen=True)
class ResidueStrip:
    """A sequence whose residues have a true and a predicted class below them; it is wrapped in blocks of ten.

    Attributes:
        heading: a line above it.
        start: number of the first residue.
        residues: the residues.
    """

    heading: str
    start: int
    residues: Sequence[Residue]

    @property
    def blocks(self) -> list[tuple[int, Sequence[Residue]]]:
        """The number of the first residue of each block, and its residues."""
        return [(self.start + i, self.residues[i : i + _BLOCK]) for i in range(0, len(self.residues), _BLOCK)]


@dataclass(frozen=True)
class Command:
    """A line for a terminal, which is shown as it must be typed.

    Attributes:
        line: the line.
    """

    line: str


Part = str | Table | Plot | ResidueStrip | Command


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables, plots, sequences and lines for a terminal."""

    heading: str
    parts: Sequence[Part]


def repeated_by(command: str | None) -> list[Section]:
    """Return the section with the line that repeats what a page shows; none without a line."""
    return [] if command is None else [Section("Repeat it", [Command(command)])]


def html_page(title: str, sections: Sequence[Section], *, note: str = "") -> str:
    """Return a page that opens offline in any browser.

    Args:
        title: title of the page.
        sections: content of the page.
        note: text under the title: where the figures are from.

    Returns:
        The page. Text is escaped, with its control characters as codes; SVG is inserted as it is, with ids of its own.

    Example:
        >>> page = html_page("Costs", [Section("Memory", ["a < b", Table(("recipe",), [("all",)])])])
        >>> "a &lt; b" in page, "<td>all</td>" in page
        (True, True)
    """
    numbers = itertools.count(1)

    def draw(plot: Plot) -> str:
        return plot.drawn(f"plot{next(numbers)}-")

    return _template().render(title=title, sections=sections, note=note, draw=draw)


@cache
def _template() -> Any:
    """Return the compiled template of a page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"plain": _plain, "line": one_line}
    return environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))


def _plain(text: object) -> str:
    """Return a text with its invisible characters as codes; a line break is a space, as in HTML."""
    return one_line(str(text).replace("\n", " "))
