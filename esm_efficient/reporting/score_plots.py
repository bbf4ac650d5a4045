"""Plots of how well a model predicts, as SVG text: curves, confusion, ROC, precision-recall, reliability, scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from esm_efficient.reporting.plots import new_figure, plain_text, svg_of
from esm_efficient.reporting.tables import one_line

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
"""Okabe and Ito's palette, which is safe for colour-blind readers."""

BINS = 10
"""Bins of `reliability`."""

MOST_CURVES = 12
"""The most curves of `ranking_plot`."""

MOST_NUMBERED = 20
"""The most classes of which a confusion matrix shows the numbers."""

_MOST_NAMED = 40
"""The most classes of which it shows the names."""


@plain_text
def curves_plot(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Plot values over the optimizer steps, one small plot per curve.

    Args:
        curves: (step, value) by name, such as ``loss``.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    from matplotlib.ticker import MaxNLocator

    figure, [panels] = new_figure(min(4.5 * len(curves), 10), 2.8, 1, len(curves))
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_title(one_line(name), fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return svg_of(figure)


@plain_text
def confusion_plot(counts: np.ndarray, names: Sequence[str]) -> str:
    """Plot a confusion matrix; the colour is the share of the row, which is a true class.

    With more than 20 classes it has a scale of colours in place of the numbers. With more than 40, the axes have the
    numbers of the classes, from 1, in place of their names.

    Args:
        counts: int of shape (classes, classes): true class by predicted class.
        names: names of the classes.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    size = 1.8 + 0.55 * len(names)
    figure, [[axes]] = new_figure(min(size + 1.2, 10), min(size, 9))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    is_small, every = len(names) <= MOST_NUMBERED, 1
    labels = [_short(name, 24) for name in names]
    if len(names) > _MOST_NAMED:
        every = max(1, len(names) // 20)
        labels = [str(number) for number in range(1, len(names) + 1, every)]
    turned = {"rotation": 35, "ha": "right"} if is_small else {"rotation": 90}
    letters = 9 if is_small else 7
    axes.set_xticks(range(0, len(names), every), labels, fontsize=letters, **turned)
    axes.set_yticks(range(0, len(names), every), labels, fontsize=letters)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)
    if not is_small:
        figure.colorbar(image, ax=axes, shrink=0.5, label="share of the true class")
        return svg_of(figure)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    return svg_of(figure)


@plain_text
def ranking_plot(classes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Plot ROC curves, and beside them precision against recall; dashed lines are what chance gives.

    Args:
        classes: by name, whether each example has the label (bool) and its score, both of shape (examples,). Labels
            without positive or negative examples are left out, and at most twelve are drawn.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    from matplotlib.textpath import TextPath
    from sklearn.metrics import precision_recall_curve, roc_curve

    drawn = [(name, true, score) for name, (true, score) in classes.items() if 0 < true.sum() < len(true)]
    drawn = drawn[:MOST_CURVES]
    widths = [TextPath((0, 0), _short(name, 32), size=9).get_extents().width / 72 for name, *_ in drawn]
    columns = int(np.clip(9 / (0.8 + max(widths, default=0)), 1, 4))  # inches: the figure, a line with its gaps
    figure, [[left, right]] = new_figure(9, 4.0 + 0.2 * -(-len(drawn) // columns), 1, 2)
    for index, (name, true, score) in enumerate(drawn):
        colour, style = COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else ":"
        false_rate, true_rate, _ = roc_curve(true, score)
        left.plot(false_rate, true_rate, style, color=colour, label=_short(name, 32))
        precision, recall, _ = precision_recall_curve(true, score)
        # Its last point, precision 1 at recall 0, is no threshold of the model.
        right.plot(recall[:-1], precision[:-1], style, color=colour, marker="o" if len(recall) == 2 else None)
        right.axhline(true.mean(), color=colour, linestyle="--", linewidth=0.7)
    left.plot([0, 1], [0, 1], "--", color="#999999", linewidth=0.7)
    left.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
    right.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    if drawn:
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return svg_of(figure)


def _short(name: str, most: int) -> str:
    """Return a name with at most so many characters, without its middle, since names often differ at their ends."""
    text = one_line(name)
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def reliability(probability: np.ndarray, right: np.ndarray) -> tuple[list[tuple[float, float, int]], float]:
    """Return how often predictions of a probability come true, and the expected calibration error.

    The probabilities are put into ten bins of equal width. The error is the mean over the predictions of the distance
    between the mean probability and the share that is right in their bin (Guo et al. 2017, "On Calibration of Modern
    Neural Networks").

    Args:
        probability: of the predicted class, float of shape (examples,).
        right: whether the prediction is right, bool of shape (examples,).

    Returns:
        Mean probability, share that is right and number of examples of each bin that has any; and the error.

    Example:
        >>> import numpy as np
        >>> bins, error = reliability(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False]))
        >>> [(round(p, 2), share, count) for p, share, count in bins], round(error, 2)
        ([(0.6, 0.5, 2), (0.9, 1.0, 2)], 0.1)
    """
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins = [
        (float(probability[place == index].mean()), float(right[place == index].mean()), int((place == index).sum()))
        for index in np.unique(place)
    ]
    error = sum(count * abs(mean - share) for mean, share, count in bins) / max(len(right), 1)
    return bins, float(error)


@plain_text
def reliability_plot(bins: Sequence[tuple[float, float, int]]) -> str:
    """Plot the bins of `reliability`; the size of a point is the number of examples.

    Args:
        bins: mean probability, share that is right, number of examples.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, [[axes]] = new_figure(4.4, 4.0)
    axes.plot([0, 1], [0, 1], "--", color="#999999", linewidth=0.8)
    mean, share, count = (np.array(column) for column in zip(*bins, strict=True))
    axes.plot(mean, share, color=COLOURS[0], linewidth=1)
    axes.scatter(mean, share, s=20 + 180 * count / count.max(), color=COLOURS[0])
    axes.set(xlabel="probability that the model gives", ylabel="share that is right", xlim=(0, 1.03), ylim=(0, 1.03))
    return svg_of(figure)


@plain_text
def scatter_plot(true: np.ndarray, predicted: np.ndarray, name: str) -> str:
    """Plot predicted against true numbers, with the line of a perfect prediction.

    Args:
        true: float of shape (examples,).
        predicted: float of shape (examples,).
        name: name of the number.

    Returns:
        SVG.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, [[axes]] = new_figure(4.4, 4.0)
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axes.plot(ends, ends, "--", color="#999999", linewidth=0.8)
    axes.scatter(true, predicted, s=10, alpha=0.5, color=COLOURS[0], linewidths=0)
    axes.set(xlabel=f"true {one_line(name)}", ylabel=f"predicted {one_line(name)}")
    return svg_of(figure)
