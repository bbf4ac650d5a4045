"""html_page(): every kind of part is on the page, and text is escaped."""

from __future__ import annotations

import html
import re

from esm_efficient.reporting.html import Command, Plot, ResidueStrip, Section, Table, html_page


def test_text_is_escaped_everywhere_and_svg_is_not():
    bad = "<b>&\"'"
    parts = [bad, Table((bad,), [(bad,), (1,)]), Plot("<svg><g/></svg>", bad), Command(bad)]
    page = html_page(bad, [Section(bad, parts)], note=bad)
    assert "<b>" not in page
    assert (
        page.count("&lt;b&gt;&amp;") == 10
    )  # title, heading, note, section, paragraph, header, cell, command, and the caption twice
    assert f'<div class="plot"><svg role="img" aria-label="{html.escape(bad)}"><g/></svg></div><figcaption>' in page
    assert "<td>1</td>" in page
    assert "<pre>&lt;b&gt;" in page


def test_parts_keep_their_order():
    page = html_page("t", [Section("one", ["a", Table(("h",), []), "b"]), Section("two", [])])
    order = [page.index(text) for text in ("<h2>one", "<p>a</p>", '<th scope="col">h</th>', "<p>b</p>", "<h2>two")]
    assert order == sorted(order)
    assert page.startswith("<!doctype html>\n")
    assert page.endswith("</html>\n")


def test_a_wide_plot_scrolls_on_a_telephone_and_a_small_one_does_not():
    page = html_page("t", [Section("one", [Plot(f'<svg height="9pt" width="{w}pt"/>', "") for w in (648, 316.8)])])
    assert page.count('class="plot wide"') == page.count('class="plot"') == 1
    assert page.index('class="plot wide"') < page.index('class="plot"')


def test_a_table_without_a_header_has_no_head_and_a_sequence_begins_on_the_left():
    page = html_page("t", [Section("one", [Table(("", ""), [("steps", "4"), ("sequence", "M" * 60)])])])
    assert "<thead>" not in page
    assert f'<td class="long">{"M" * 60}</td>' in page
    assert '<th scope="row">steps</th><td>4</td>' in page


def test_the_ids_of_a_page_are_unique_and_each_reference_finds_its_own():
    svg = '<svg><defs><path id="a"/></defs><use xlink:href="#a"/><g clip-path="url(#b)"/><clipPath id="b"/></svg>'
    page = html_page("t", [Section("one", [Plot(svg, "first"), Plot(svg, "second")])])
    ids = re.findall(r'\bid="(.*?)"', page)
    assert len(ids) == len(set(ids)) == 4
    assert re.findall(r'href="#(.*?)"', page) + re.findall(r"url\(#(.*?)\)", page) == [ids[0], ids[2], ids[1], ids[3]]
    assert '<svg role="img" aria-label="second">' in page


def test_invisible_characters_are_shown_as_codes_everywhere():
    bad = "a\x1b[31m\u202eb"
    parts = [bad, Table((bad,), [(bad,)]), Plot("<svg/>", bad), Command(bad), ResidueStrip(bad, 1, [])]
    page = html_page(bad, [Section(bad, parts)], note=bad)
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert page.count("a\\x1b[31m\\u202eb") == 11
