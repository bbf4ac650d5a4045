"""A hook of mkdocs: write llms.txt, an index of the pages for language models (llmstxt.org), from the pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SUMMARIES: dict[str, str] = {}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Remember the first sentence of a page or a notebook."""
    if page.file.src_uri.endswith(".ipynb"):
        cells = json.loads(Path(page.file.abs_src_path).read_text())["cells"]
        markdown = "".join(cells[0]["source"])
    blocks = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL).split("\n\n")
    text = next(block.strip() for block in blocks if re.match(r"[\w`*]", block.strip()))
    SUMMARIES[page.file.src_uri] = re.split(r"(?<=[.?])\s", " ".join(text.split()))[0]


def on_post_build(config: Any, **_: Any) -> None:
    """Write the index beside the pages."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for group in config.nav:
        [(title, content)] = group.items()
        lines += ["", f"## {title}", ""]
        for name, source in (
            [(title, content)] if isinstance(content, str) else [next(iter(i.items())) for i in content]
        ):
            url = re.sub(r"(^|/)index/$", r"\1", f"{source.rpartition('.')[0]}/")
            lines.append(f"- [{name}]({(config.site_url or '') + url or 'index.html'}): {SUMMARIES[source]}")
    (Path(config.site_dir) / "llms.txt").write_text("\n".join(lines) + "\n")
