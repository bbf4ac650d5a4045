"""The check of the built documentation finds links that lead nowhere, errors of a page, and parts that are cut off."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / ".ci" / "site.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("site_script", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_site(folder: Path, **pages: str) -> Path:
    """Write pages with an article; `index` is the first one, and another page is a folder with an `index.html`."""
    for name, article in pages.items():
        path = folder / ("index.html" if name == "index" else f"{name}/index.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<!doctype html><link rel=icon href='data:,'><body><article>{article}</article>")
    return folder


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("data/", None),
        ("data/#splits", None),
        ("/data/index.html#splits", None),
        ("#here", None),
        ("https://example.org/a?b=c#d", None),
        ("data.md", "no such page"),
        ("missing/", "no such page"),
        ("data/#spilts", "no such heading"),
        ("#there", "no such heading"),
        ("http://example.org", "not the form of a link"),
        ("https://localhost", "not the form of a link"),
        ("https://example.org/page.", "not the form of a link"),
    ],
)
def test_links_of_a_page_lead_somewhere(script, tmp_path, link, fault):
    site = write_site(tmp_path, index=f"<h2 id=here></h2><a href='{link}'>x</a>", data="<h2 id=splits></h2>")
    assert list(script.broken_links(site)) == ([] if fault is None else [f"index.html: {link}: {fault}"])


def test_a_picture_that_is_missing_is_found(script, tmp_path):
    site = write_site(tmp_path, index="<img src='plot.svg'>")
    assert list(script.broken_links(site)) == ["index.html: plot.svg: no such page"]


def test_links_of_the_readme_lead_to_files_and_headings(script, tmp_path):
    site = write_site(tmp_path / "site", index="", data="<h2 id=splits></h2>")
    (tmp_path / "docs" / "pages").mkdir(parents=True)
    (tmp_path / "docs" / "pages" / "data.md").touch()
    readme = tmp_path / "README.md"
    readme.write_text("[a](docs/pages/data.md#splits) [b](docs/pages/data.md#x) [c](docs/d.md)\n```text\n[e](f)\n```\n")
    assert list(script.broken_links(site, readme)) == [
        "README.md: docs/pages/data.md#x: no such heading",
        "README.md: docs/d.md: no such file",
    ]


def test_errors_and_parts_that_are_cut_off_are_found_in_a_browser(script, tmp_path):
    pytest.importorskip("playwright", reason="playwright is not installed")
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no Chromium is installed")
    code = "<pre style='overflow: auto'><code>{}</code></pre>".format
    site = write_site(
        tmp_path,
        index=code("short"),
        error="<script>console.error('lost')</script>",
        example="<blockquote><blockquote>x = 1</blockquote></blockquote>",
        output=f"<div class=language-text>{code('w' * 80)}</div>",
        picture="<img src='/missing.png'>",
        table=f"<table><td>{'w' * 80}</td></table>",
        wide=code("w" * 80),
    )
    found = list(script.faults_in_a_browser(site, browser))
    expected = {
        "error/index.html: lost": 1,
        "example/index.html at 1400 pixels: an example is not shown as code": 1,
        "picture/index.html at 1400 pixels: no picture": 1,
        "table/index.html at 420 pixels: the page": 1,
        "wide/index.html at 420 pixels: ": 1,
    }
    assert {begin: sum(fault.startswith(begin) for fault in found) for begin in expected} == expected
    assert not [fault for fault in found if fault.startswith(("index.html", "output/"))]
