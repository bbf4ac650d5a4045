"""The plots of the pages that explain show what the pages say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esm_efficient import RECIPES, estimate

pytestmark = pytest.mark.usefixtures("drawn_figures")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def explanations(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import explanations

    return explanations


def test_the_mean_of_weighted_means_is_wrong_unless_the_batch_is_whole(explanations, monkeypatch):
    monkeypatch.setattr(explanations, "DRAWS", 20)
    errors = explanations.accumulation_errors()
    medians = [np.median(errors[size]) for size in explanations.MICRO_BATCHES]
    assert medians == sorted(medians, reverse=True)
    assert medians[-1] < 1e-6
    assert medians[explanations.MICRO_BATCHES.index(8)] > 0.1


def test_adapters_have_no_gradient_unless_the_embeddings_have_one(explanations):
    found = explanations.adapter_gradients()
    assert found["embeddings without a gradient"] == [0.0] * 4
    assert min(found["prepare_model"]) > 0


def test_every_plot_is_on_a_page(explanations):
    pages = "".join(page.read_text() for page in (EXAMPLES.parent / "docs" / "pages").glob("*.md"))
    assert [name for name in explanations.PLOTS if f"(images/explain_{name}.svg)" not in pages] == []
    assert [
        n for n in explanations.PLOTS if not (EXAMPLES.parent / f"docs/pages/images/explain_{n}.svg").is_file()
    ] == []


@pytest.mark.parametrize("plot", ["memory", "sizes"])
def test_the_plots_of_memory_on_the_page_have_every_recipe_or_size(explanations, plot):
    picture = (EXAMPLES.parent / "docs" / "pages" / "images" / f"explain_{plot}.svg").read_text()
    named = RECIPES if plot == "memory" else (*explanations.SIZES, *explanations.SIZED)
    assert [name for name in named if f">{name}</text>" not in picture] == []


def test_the_default_and_the_recipe_with_the_least_memory_need_a_fraction_of_full_fine_tuning(explanations):
    """The plot of sizes, for the smallest: its picture is made by the same calls."""
    peaks = {name: estimate("8M", recipe=name, device="A10G", tokens=512).peak.total for name in explanations.SIZED}
    picture = (EXAMPLES.parent / "docs" / "pages" / "images" / "explain_sizes.svg").read_text()
    assert [name for name, peak in peaks.items() if f">{peak / 2**30:.2g}</text>" not in picture] == []
    assert max(peaks["top"], peaks["all"]) < 0.25 * peaks["base"]
