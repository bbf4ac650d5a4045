"""All errors derive from one base class and from the built-in class that a caller would expect."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from esm_efficient import errors

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.DataError, ValueError),
        (errors.DownloadError, OSError),
        (errors.TargetModuleError, ValueError),
        (errors.ConfigurationError, ValueError),
        (errors.AuditError, RuntimeError),
        (errors.CheckpointError, OSError),
        (errors.DivergenceError, ArithmeticError),
    ],
)
def test_base_classes(error, builtin):
    assert issubclass(error, errors.EsmEfficientError)
    assert issubclass(error, builtin)


def test_listing_gives_the_number_of_items_left_out():
    assert errors.listing(["a", "b"]) == "a, b"
    assert errors.listing(list("abcdefg")) == "a, b, c, d, e and 2 more"


def texts_of_the_library() -> set[str]:
    """All texts in the code, with N for each value that is filled in."""
    texts = set()
    for path in (REPOSITORY / "esm_efficient").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "N" for part in node.values]
                texts.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return texts


def test_messages_on_the_troubleshooting_page_are_those_of_the_library():
    page = (REPOSITORY / "docs" / "pages" / "troubleshooting.md").read_text()
    table = page.partition("## A message")[2].partition("\n## ")[0]
    messages = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", table)
    texts = texts_of_the_library()
    assert len(messages) > 8
    assert [message for message in messages if not any(message in text for text in texts)] == []
