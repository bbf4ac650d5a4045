"""One HTML page with everything in it: no script, no file and no address that it would load."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.82rem; }
th, td { text-align: right; padding: 0.35rem 0.5rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.9rem; }
"""


@dataclass(frozen=True)
class Table:
    """A table of a page."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Plot:
    """A plot of a page: SVG, and what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and plots."""

    heading: str
    parts: Sequence[str | Table | Plot]


def html_page(title: str, sections: Sequence[Section], *, note: str = "") -> str:
    """A page that opens offline in any browser.

    Args:
        title: of the page.
        sections: what is on it.
        note: under the title: where the figures are from.

    Returns:
        The page. Text is escaped; SVG is taken as it is.

    Example:
        >>> page = html_page("Costs", [Section("Memory", ["a < b", Table(("recipe",), [("all",)])])])
        >>> "a &lt; b" in page, "<td>all</td>" in page
        (True, True)
    """
    body = "\n".join(
        f"<section><h2>{html.escape(section.heading)}</h2>\n{''.join(map(_part, section.parts))}</section>"
        for section in sections
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f'<p class="note">{html.escape(note)}</p>\n{body}\n</body>\n</html>\n'
    )


def _part(part: str | Table | Plot) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>\n"
    if isinstance(part, Plot):
        return f"<figure>{part.svg}<figcaption>{html.escape(part.caption)}</figcaption></figure>\n"
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in part.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in part.rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
