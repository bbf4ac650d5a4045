"""The plots: their SVG has the expected text."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib import figure as figures

from esm_efficient.errors import ConfigurationError
from esm_efficient.reporting import one_line
from esm_efficient.reporting.plots import CATEGORY_COLOURS, Method, layers_plot, memory_plot, pareto_plot, timeline_plot
from esm_efficient.reporting.score_plots import confusion_plot, ranking_plot

pytestmark = pytest.mark.usefixtures("drawn_figures")

GIB = 2**30


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]


def test_memory_bars_name_methods_categories_and_totals():
    stacks = {"base": {"weights": 2 * GIB, "activations": 3 * GIB}, "all": {"weights": GIB}}
    svg = memory_plot(stacks, capacity=6 * GIB)
    shown = " ".join(texts(svg))
    for text in ("base", "all", *CATEGORY_COLOURS, "memory of the device", "peak memory, GiB"):
        assert text in shown
    assert {text.strip() for text in texts(svg)} >= {"5", "1"}
    assert memory_plot(stacks, capacity=6 * GIB) == svg
    assert "memory of the device" not in " ".join(texts(memory_plot(stacks, capacity=600 * GIB)))


def test_timelines_have_a_plot_per_method_and_a_colour_per_phase():
    points = [("forward", 0.0, 0), ("forward", 1.0, GIB), ("backward", 2.0, GIB), ("optimizer", 3.0, 0)]
    shown = texts(timeline_plot({"one": points, "two": points, "three": points, "four": points}))
    assert {"one", "two", "three", "four", "forward", "backward", "optimizer", "seconds"} <= set(shown)
    assert {"one", "forward", "seconds"} <= set(texts(timeline_plot({"one": points})))


def test_the_layers_plot_names_lines_axes_and_the_layer_that_is_enough():
    shown = texts(layers_plot({"first": [0.1, 0.5, 0.4], "mean": [0.2, 0.6, 0.5]}, metric="MCC", enough=1))
    assert {"first", "mean", "MCC", "layers (0: embeddings)", "enough for a probe: 1 layer"} <= set(shown)


def test_the_pareto_plot_names_methods_and_axes():
    methods = [Method("fast", 1, 9 * GIB), Method("small", 9, GIB), Method("worse", 9.5, 9.5 * GIB)]
    assert {"fast", "small", "worse", "time of the run, s"} <= set(texts(pareto_plot(methods)))
    scored = [Method("a", 1, GIB, 0.7, 0.6, 0.8), Method("b", 2, GIB, 0.75)]
    assert "MCC" in texts(pareto_plot(scored, metric="MCC"))


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$\\frac$", "a\nb\x00", "--><b>", "=cmd|", "\x1b[31m"])
def test_a_name_is_shown_as_text(name):
    shown = one_line(name)
    points = [("forward", 0.0, 0), ("backward", 2.0, GIB)]
    for svg in (
        memory_plot({name: {"weights": GIB}}),
        timeline_plot({name: points}),
        pareto_plot([Method(name, 1, GIB, 0.7)], metric=name),
    ):
        assert shown in texts(svg)
        assert "<script" not in svg
        assert "<b>" not in svg


def test_a_long_name_is_cut_in_its_middle_so_that_two_classes_do_not_look_alike():
    names = [f"Endoplasmic reticulum membrane, kind {number}" for number in (1, 2)]
    shown = texts(confusion_plot(np.eye(2, dtype=int), names))
    assert sum(text.startswith("Endoplasmic ") and "…" in text for text in shown) == 4  # on both axes
    assert len({text for text in shown if "…" in text}) == 2
    assert max(map(len, shown)) == 24


@pytest.mark.parametrize(("classes", "has_numbers"), [(20, True), (21, False)])
def test_a_confusion_of_many_classes_has_a_scale_of_colours_and_no_numbers(classes, has_numbers):
    shown = texts(confusion_plot(np.full((classes, classes), 1234), [f"c{number}" for number in range(classes)]))
    assert shown.count("1,234") == (classes**2 if has_numbers else 0)
    assert ("share of the true class" in shown) != has_numbers


def test_a_confusion_of_very_many_classes_has_the_numbers_of_some_of_them():
    shown = texts(confusion_plot(np.eye(60, dtype=int), [f"class {number}" for number in range(60)]))
    assert not any(text.startswith("class ") for text in shown)
    assert [shown.count(str(number)) for number in (1, 4, 58)] == [2, 2, 2]  # on both axes
    assert "60" not in shown


@pytest.mark.parametrize("letters", [5, 40])
def test_the_names_of_all_curves_are_inside_of_the_plot(letters):
    rng = np.random.default_rng(0)
    classes = {f"{number:02}{'m' * (letters - 2)}": (rng.random(50) < 0.5, rng.random(50)) for number in range(12)}
    drawn = []
    original = figures.Figure.savefig

    def keep(figure, *args, **options):
        drawn.append(figure)
        return original(figure, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Figure, "savefig", keep)
        ranking_plot(classes)
    [figure] = drawn
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert len(figure.legends[0].get_texts()) == 12


def test_precision_has_no_line_to_1_at_recall_0():
    true, score = np.array([False, True, True, False]), np.array([0.9, 0.8, 0.3, 0.1])
    drawn = []
    original = figures.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Figure, "savefig", lambda f, *a, **o: (drawn.append(f), original(f, *a, **o)))
        ranking_plot({"a": (true, score)})
    recall, precision = drawn[0].axes[1].lines[0].get_data()
    assert (recall[-1], precision[-1]) == (0, 0)  # of the highest score alone, which is wrong


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"esm-efficient-finetuning\[plot\]"):
        memory_plot({"base": {"weights": 1}})
