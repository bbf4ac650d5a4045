"""Check the built documentation: python .ci/site.py SITE.

Every link within the site and from the README leads to a page, a file or a heading that exists. Links to other sites
are well formed. In a browser no page reports an error, and no code or table is cut off on a wide or a narrow
screen. Without Chromium or playwright the part in a browser is skipped with a message.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

WIDTHS = (1400, 420)
"""Pixels of a laptop's window and of a phone."""

# What is cut off or has to be scrolled sideways. On a phone, outputs in columns may scroll within their box.
CUT_OFF = """(narrow) => {
  const found = [], view = document.documentElement;
  const begin = (box) => box.textContent.trim().replace(/\\s+/g, " ").slice(0, 90);
  if (view.scrollWidth > view.clientWidth) found.push(`the page: ${view.scrollWidth} pixels`);
  for (const box of document.querySelectorAll("article pre, article code, article table, article div, article img")) {
    if (narrow && box.closest(".language-text, .jp-OutputArea-output")) continue;
    if (box.tagName === "IMG" && !box.naturalWidth) found.push(`no picture: ${box.src}`);
    const clips = getComputedStyle(box).overflowX !== "visible" && box.clientWidth > 0;
    if (clips && box.scrollWidth > box.clientWidth + 1)
      found.push(`${box.scrollWidth} of ${box.clientWidth} pixels: ${begin(box)}`);
  }
  for (const quote of document.querySelectorAll("article blockquote blockquote"))
    found.push(`an example is not shown as code: ${begin(quote)}`);
  return found;
}"""


class Page(HTMLParser):
    """The links of a page and the places in it that a link can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a tag links to, and its names."""
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]


def broken_links(site: Path, readme: Path | None = None) -> Iterator[str]:
    """Yield a line for each link that leads nowhere."""
    pages = {path.relative_to(site).as_posix(): Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    for name, page in pages.items():
        for link in dict.fromkeys(page.links):
            if fault := _fault(link, name, site, pages):
                yield f"{name}: {link}: {fault}"
    if readme:
        text = re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, place = link.partition("#")
            page = re.sub(r"^docs/pages/(.*)\.md$", r"\1/index.html", path).replace("index/index.html", "index.html")
            if urlsplit(link).scheme:
                fault = _fault(link, "", site, pages)
            elif path and not (readme.parent / path).exists():
                fault = "no such file"
            else:
                fault = _fault(f"/{page}#{place}", "", site, pages) if path and place else ""
            if fault:
                yield f"{readme.name}: {link}: {fault}"


def _fault(link: str, name: str, site: Path, pages: dict[str, Page]) -> str:
    """What is wrong with a link of a page; empty if nothing is."""
    parts = urlsplit(link)
    if parts.scheme == "data":
        return ""
    if parts.scheme or parts.netloc:
        well_formed = parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
        return "" if well_formed and not re.search(r"[\s<>\"]|[.,;]$", link) else "not the form of a link"
    target, place = urldefrag(urljoin(f"/{name}", link))
    target = unquote(target.lstrip("/"))
    if target.endswith("/") or not target:
        target += "index.html"
    if not (site / target).is_file():
        return "no such page"
    if place and target in pages and unquote(place) not in pages[target].places:
        return "no such heading"
    return ""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def faults_in_a_browser(site: Path, browser: str) -> Iterator[str]:
    """Yield a line for each error that a page reports, and for each part that is cut off."""
    from playwright.sync_api import sync_playwright

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    errors: list[str] = []
    arguments = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    widths = WIDTHS
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
        tab = chromium.new_page(reduced_motion="reduce")
        tab.set_default_timeout(120_000)  # milliseconds, for a busy machine
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        for path in sorted(site.rglob("*.html")):
            name = path.relative_to(site).as_posix()
            for number, width in enumerate(widths):
                tab.set_viewport_size({"width": width, "height": 1000})
                if number == 0:
                    tab.goto(f"http://127.0.0.1:{server.server_port}/{name}")
                yield from (
                    f"{name} at {width} pixels: {fault}" for fault in tab.evaluate(CUT_OFF, width == min(WIDTHS))
                )
            widths = widths[::-1]  # the next page begins with the width of the window, because changing it takes time
            yield from (f"{name}: {error}" for error in errors)
            errors.clear()
        chromium.close()
    server.shutdown()


def main(site: Path) -> int:
    faults = list(broken_links(site, Path(__file__).parents[1] / "README.md"))
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None or importlib.util.find_spec("playwright") is None:
        print("Chromium or playwright is not installed: the pages are not opened in a browser")
    else:
        faults += faults_in_a_browser(site, browser)
    print("\n".join([*faults, f"documentation: {len(faults)} faults in {len(list(site.rglob('*.html')))} pages"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
