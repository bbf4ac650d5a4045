"""A hook of mkdocs: the first page of the API reference lists the names of the other pages, from their `:::` lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the comment `<!-- names -->` by a table with a row for each page of the API reference."""
    if "<!-- names -->" not in markdown:
        return markdown
    pages = next(content for group in config.nav for title, content in group.items() if title == page.parent.title)
    rows = ["| page | names |", "|---|---|"]
    for title, source in (item for entry in pages[1:] for item in entry.items()):
        text = (Path(config.docs_dir) / source).read_text()
        names = re.findall(r"^::: (\S+)", text, re.MULTILINE)
        links = ", ".join(f"[`{name.rpartition('.')[2]}`][{name}]" for name in names)
        rows.append(f"| [{title}]({Path(source).name}) | {links} |")
    return markdown.replace("<!-- names -->", "\n".join(rows))
