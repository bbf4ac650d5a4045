"""html_page(): every kind of part is on the page, and text is escaped."""

from __future__ import annotations

from esm_efficient.reporting.html import Plot, Section, Table, html_page


def test_text_is_escaped_everywhere_and_svg_is_not():
    bad = "<b>&\"'"
    parts = [bad, Table((bad,), [(bad,), (1,)]), Plot("<svg><g/></svg>", bad)]
    page = html_page(bad, [Section(bad, parts)], note=bad)
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;") == 8  # title, heading, note, section, paragraph, header, cell, caption
    assert "<figure><svg><g/></svg><figcaption>" in page
    assert "<td>1</td>" in page


def test_parts_keep_their_order():
    page = html_page("t", [Section("one", ["a", Table(("h",), []), "b"]), Section("two", [])])
    order = [page.index(text) for text in ("<h2>one", "<p>a</p>", "<th>h</th>", "<p>b</p>", "<h2>two")]
    assert order == sorted(order)
    assert page.startswith("<!doctype html>\n")
    assert page.endswith("</html>\n")
