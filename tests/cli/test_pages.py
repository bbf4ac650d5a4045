"""The pages that the commands write open in a browser without a network, and fit a wide window and a phone."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from esm_efficient.cli import main

WIDTHS = (1400, 420)
MEASURE = """<script>document.title = [...document.body.querySelectorAll("*")]
  .filter(e => e.getBoundingClientRect().right > PX + 1 && !e.closest(".table, .plot"))
  .map(e => e.tagName).join(" ") + ";" + document.documentElement.scrollWidth</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Every command that writes a page, with its page."""
    folder = tmp_path_factory.mktemp("pages")
    small = "--epochs 0.5 --max-residues 150 --model demo --seed 1"
    commands = {
        "finetune": f"finetune demo -o {folder}/run --profile --rank 4 {small}",
        "evaluate": f"evaluate {folder}/run/adapter demo --report {folder}/evaluate.html",
        "probe": f"probe demo --model demo --max-residues 150 --report {folder}/probe.html",
        "estimate": f"estimate --model 8M --recipe frozen --report {folder}/estimate.html",
        "compare": f"compare --model 8M --recipe frozen --recipe lora --output {folder}/compare",
    }
    for command in commands.values():
        assert main(command.split()) == 0
    files = {name: folder / f"{name}.html" for name in commands}
    files |= {"finetune": folder / "run" / "report.html", "compare": folder / "compare" / "comparison.html"}
    return {name: (commands[name], path.read_text(encoding="utf-8")) for name, path in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "evaluate", "probe", "estimate", "compare"])
def test_a_page_fits_wide_and_narrow_windows_and_has_the_line_that_repeats_it(pages, name, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    command, page = pages[name]
    assert f"<pre>esm-efficient {name}" in page
    if name not in ("finetune", "probe"):  # which have a line that reads the same from any folder
        assert f"esm-efficient {command}" in page
    for width in WIDTHS:
        # A window cannot be as narrow as a phone, but a frame can.
        path = tmp_path / f"{name}-{width}.html"
        path.write_text(page.replace("</body>", f"{MEASURE.replace('PX', str(width))}</body>"), encoding="utf-8")
        frame = tmp_path / f"frame-{width}.html"
        inner = f'<iframe src="{path.name}" style="border:0;width:{width}px;height:900px" id="f"></iframe>'
        script = "<script>onload = () => document.title = document.getElementById('f').contentDocument.title</script>"
        frame.write_text(f"<html><body>{inner}{script}</body></html>", encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--allow-file-access-from-files"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
        options += ["--window-size=1600,1000", "--dump-dom", frame.as_uri()]
        run = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, check=True)
        [(outside, scrolled)] = re.findall("<title>([A-Z0-9a-z ]*);([0-9]+)</title>", run.stdout)
        assert (outside, int(scrolled) <= width) == ("", True)
