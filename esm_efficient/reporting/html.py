"""One self-contained HTML page: it has no script and loads no file and no address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and plots."""

    heading: str
    parts: Sequence[str | Table | Plot]


def html_page(title: str, sections: Sequence[Section], *, note: str = "") -> str:
    """Return a page that opens offline in any browser.

    Args:
        title: title of the page.
        sections: content of the page.
        note: text under the title: where the figures are from.

    Returns:
        The page. Text is escaped; SVG is inserted as it is.

    Example:
        >>> page = html_page("Costs", [Section("Memory", ["a < b", Table(("recipe",), [("all",)])])])
        >>> "a &lt; b" in page, "<td>all</td>" in page
        (True, True)
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, sections=sections, note=note)
