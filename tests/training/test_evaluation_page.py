"""The sections of a page about an evaluation, for each task, and the intervals of the metrics."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings

import numpy as np
import pytest
from transformers import EvalPrediction

from esm_efficient import Task, compute_metrics_for
from esm_efficient.reporting.html import html_page
from esm_efficient.reporting.score_plots import reliability
from esm_efficient.tasks import IGNORE
from esm_efficient.training import intervals as intervals_module
from esm_efficient.training.evaluation_page import Evaluation, evaluation_sections, verdict
from esm_efficient.training.intervals import bootstrap_draws, differences_of, ends_of, intervals_of
from esm_efficient.training.outcome import curves_of
from esm_efficient.training.residue_page import letters_for

pytestmark = pytest.mark.usefixtures("drawn_figures")

EXAMPLES = 60


def evaluation(kind: str, *, skill: float = 1.0, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(seed)
    names = ("<b>a</b>", "b", "c")
    task = Task(kind, names)
    if kind == "single_label_classification":
        labels = rng.choice(3, EXAMPLES, p=[0.6, 0.3, 0.1])
        scores = rng.normal(size=(EXAMPLES, 3)) + skill * 2 * np.eye(3)[labels]
    elif kind == "multi_label_classification":
        labels = rng.integers(0, 2, (EXAMPLES, 3)).astype(float)
        labels[0, 0] = np.nan
        scores = rng.normal(size=(EXAMPLES, 3)) + skill * 2 * (np.nan_to_num(labels) - 0.5)
    elif kind == "token_classification":
        labels = rng.integers(0, 3, (EXAMPLES, 8))
        labels[:, [0, 7]] = IGNORE
        scores = rng.normal(size=(EXAMPLES, 8, 3)) + skill * 2 * np.eye(3)[np.maximum(labels, 0)]
    else:
        labels = rng.normal(size=(EXAMPLES, 3)) * [1, 10, 100]
        scores = labels + rng.normal(size=(EXAMPLES, 3))
    prediction, compute = EvalPrediction(scores, labels), compute_metrics_for(task)
    return Evaluation(
        task=task,
        scores=scores,
        labels=labels,
        metrics=compute(prediction),
        intervals=ends_of(bootstrap_draws(prediction, compute, resamples=20)),
        names=[f"P{i}" for i in range(EXAMPLES)],
        sequences=["MKTVLA"] * EXAMPLES,
    )


KINDS = {
    "single_label_classification": ["Result", "By class", "Confusion", "Ranking", "Reliability", "Worst mistakes"],
    "multi_label_classification": ["Result", "By class", "Ranking", "Reliability", "Worst mistakes"],
    "token_classification": ["Result", "By class", "Confusion", "Ranking", "Reliability", "Worst mistakes"],
    "regression": ["Result", "Predicted and true", "Worst mistakes"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_has_its_sections_with_plots(kind):
    sections = evaluation_sections(evaluation(kind))
    assert [section.heading for section in sections] == KINDS[kind]
    page = html_page("page", sections)
    assert page.count("<svg") >= 1
    assert "<b>a</b>" not in page
    assert not re.search(r"(src|href)=[\"']?http", page)


@pytest.mark.parametrize("kind", KINDS)
def test_without_matplotlib_the_tables_are_there_and_the_page_says_why_there_is_no_plot(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = html_page("page", evaluation_sections(evaluation(kind)))
    assert "No plot: plots need matplotlib" in page
    assert "<table>" in page


def test_the_worst_mistakes_are_those_of_which_the_model_was_surest():
    names = ("no", "yes")
    task = Task("single_label_classification", names)
    labels, margins = np.array([0, 0, 1, 1, 0]), np.array([5.0, 1.0, 3.0, -4.0, -2.0])
    scores = np.stack([np.zeros(5), margins], axis=1)  # wrong: rows 0, 1 and 3
    found = Evaluation(task, scores, labels, {}, {}, names=list("abcde"), sequences=["M"] * 5)
    table = evaluation_sections(found)[-1].parts[1]
    assert [row[0] for row in table.rows] == ["a", "d", "b"]
    assert [row[1:3] for row in table.rows] == [("no", "yes"), ("yes", "no"), ("no", "yes")]


def test_the_worst_mistakes_of_several_labels_are_ranked_by_the_wrong_labels_alone():
    labels = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, np.nan], [1.0, 1.0, np.nan]])
    scores = np.array([[9.0, -9.0, 0.5], [-1.0, 2.0, 9.0], [3.0, 3.0, -9.0]])  # the last row is right
    task = Task("multi_label_classification", ("a", "b", "c"))
    found = Evaluation(task, scores, labels, {}, {}, names=["first", "second", "third"])
    table = evaluation_sections(found)[-1].parts[1]
    assert table.header[3] == "surest mistake, probability"
    assert [row[:4] for row in table.rows] == [
        ("second", "none; unknown: c", "b | c", "b: 0.881"),
        ("first", "a", "a | c", "c: 0.622"),
    ]


def test_a_class_without_examples_has_no_score_in_the_table():
    task = Task("single_label_classification", ("a", "b", "c"))
    scores, labels = 3.0 * np.eye(3)[[0, 1, 1, 0]], np.array([0, 1, 1, 1])
    metrics = compute_metrics_for(task)(EvalPrediction(scores, labels))
    rows = Evaluation(task, scores, labels, metrics, {}, names=list("1234")).class_table().rows
    assert rows == [("a", "1", "0.667", "0.577"), ("b", "3", "0.800", "0.577"), ("c", "0", "-", "-")]


def residue_evaluation(labels, guess, sequences):
    """An evaluation of residues with labels and predictions of shape (sequences, residues)."""
    labels = np.pad(np.array(labels), ((0, 0), (1, 1)), constant_values=IGNORE)
    guess = np.pad(np.array(guess), ((0, 0), (1, 1)))
    task = Task("token_classification", ("helix", "strand"))
    names = [f"P{number}" for number in range(len(sequences))]
    return Evaluation(task, 3.0 * np.eye(2)[guess], labels, {}, {}, names=names, sequences=sequences)


def test_each_residue_shows_its_true_and_its_predicted_class():
    found = residue_evaluation([[0, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]], ["MKT", "VLA"])
    section = evaluation_sections(found)[-1]
    text, strip = section.parts  # the other sequence has no wrong residue
    assert "The letters mean: H helix, S strand, · unknown." in text
    assert "Sequences with a wrong residue: 1; the worst 1" in text
    assert strip.heading == "P0: 2 of 3 labelled residues are wrong; residues 1 to 3 of 3"
    assert [(r.letter, r.true, r.predicted, r.state) for r in strip.residues] == [
        ("M", "H", "H", "right"), ("K", "S", "H", "wrong"), ("T", "H", "S", "wrong")
    ]  # fmt: skip
    assert strip.residues[1].title == "K2: true strand, predicted helix, probability 0.95"
    page = html_page("page", [section])
    assert '<span class="wrong" style="--p:0.95" title="K2: true strand' in page
    assert "<b>K</b><i>S</i><i>H</i>" in page


def test_of_a_long_sequence_the_part_with_the_most_mistakes_is_shown():
    labels = np.zeros((1, 1000), dtype=int)
    labels[0, 3] = labels[0, 600:603] = 1
    labels[0, 610] = IGNORE
    found = residue_evaluation(labels, np.zeros_like(labels), ["A" * 1000])
    strip = evaluation_sections(found)[-1].parts[1]
    assert strip.start <= 601 <= 603 <= strip.start + len(strip.residues) - 1
    assert (strip.start - 1) % 10 == 0
    assert len(strip.residues) == 240
    assert strip.blocks[1][0] == strip.start + 10
    unknown = strip.residues[611 - strip.start]
    assert (unknown.true, unknown.state) == ("·", "unknown")
    assert "4 of 999 labelled residues are wrong" in strip.heading


def test_a_letter_that_is_the_name_of_its_class_is_not_explained():
    found = residue_evaluation([[0]], [[1]], ["M"])
    named = dataclasses.replace(found, task=Task("token_classification", ("C", "strand")))
    assert "The letters mean: S strand, · unknown." in evaluation_sections(named)[-1].parts[0]


def test_each_class_has_a_letter_of_its_own():
    assert letters_for(["helix", "HELIX", "h", "1", "β", ""]) == ["H", "E", "A", "1", "B", "C"]
    many = letters_for([f"class {number}" for number in range(62)])
    assert len(set(many)) == 62
    assert "?" not in many


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_known_label_there_is_nothing_to_plot(kind):
    known = evaluation(kind)
    without = np.nan if kind in ("multi_label_classification", "regression") else IGNORE
    unknown = np.full_like(known.labels, without)
    sections = evaluation_sections(dataclasses.replace(known, labels=unknown, intervals={}))
    assert sections[-1].parts == ["No label is known, so there is nothing to plot."]


def test_a_model_below_the_majority_class_is_called_so():
    worse = evaluation("single_label_classification", skill=-0.5)
    accuracy, majority = worse.metrics["accuracy"], worse.metrics["majority_accuracy"]
    assert (
        "not better than always predicting the most frequent class: its accuracy is "
        f"{accuracy:.3f}, and always predicting that class has {majority:.3f}."
    ) in verdict(worse)
    assert verdict(evaluation("single_label_classification", skill=3)) == ""


def test_examples_of_one_class_are_not_said_to_show_a_bad_model():
    found = evaluation("single_label_classification")
    alike = dataclasses.replace(found, metrics={**found.metrics, "accuracy": 1.0, "majority_accuracy": 1.0})
    assert verdict(alike).startswith("All examples have the same class, so they do not show whether")
    assert "Train longer" not in verdict(alike)


def test_a_model_of_numbers_below_the_mean_is_called_so():
    good = evaluation("regression")
    assert verdict(good) == ""
    worse = dataclasses.replace(good, metrics={**good.metrics, "r2": -0.2})
    assert "not better than always predicting the mean of the labels: its r2 is -0.200" in verdict(worse)
    alike = dataclasses.replace(worse, baselines={"mean of the labels": {"r2": 1.0}})
    assert verdict(alike).startswith("All numbers are the same")


@pytest.mark.parametrize(
    ("subset", "jaccard", "is_worse"), [(0.4, 0.5, True), (0.5, 0.6, True), (0.6, 0.5, False), (0.4, 0.7, False)]
)
def test_a_model_of_several_labels_that_no_metric_shows_to_be_better_is_called_so(subset, jaccard, is_worse):
    found = evaluation("multi_label_classification")
    metrics = {**found.metrics, "subset_accuracy": subset, "jaccard": jaccard}
    constant = {"majority of each label": {"subset_accuracy": 0.5, "jaccard": 0.6}}
    said = verdict(dataclasses.replace(found, metrics=metrics, baselines=constant))
    assert (said != "") == is_worse
    if is_worse:
        assert f"its subset accuracy and its Jaccard index are {subset:.3f} and {jaccard:.3f}, and that" in said
        assert "that prediction has 0.500 and 0.600" in said
    assert verdict(dataclasses.replace(found, metrics=metrics, baselines={})) == ""


def test_a_metric_without_an_interval_is_explained():
    found = evaluation("single_label_classification")
    every = dict.fromkeys(found.metrics, (0.0, 1.0))
    note = dataclasses.replace(found, intervals=every, metrics={**found.metrics, "loss": 0.5}).interval_note()
    assert note == ""
    del every["auroc"]
    without = dataclasses.replace(found, intervals=every)
    assert "No interval: auroc, which cannot be computed for" in str(without)
    assert without.interval_note() in evaluation_sections(without)[0].parts
    assert "No metric has an interval" in dataclasses.replace(found, intervals={}).interval_note()


def test_the_caption_says_how_many_of_the_curves_are_drawn():
    names = tuple(f"class {number}" for number in range(14))
    labels = np.arange(28) % 14
    task = Task("single_label_classification", names)
    found = Evaluation(task, np.eye(14)[labels], labels, {}, {}, names=list("x" * 28))
    [ranking] = [section for section in evaluation_sections(found) if section.heading == "Ranking"]
    assert ranking.parts[0].caption.endswith("The first 12 of 14 are drawn.")


def test_the_largest_errors_of_numbers_are_said_to_be_those_of_all_sequences():
    one = dataclasses.replace(evaluation("regression"), task=Task("regression", ("tm",)))
    one = dataclasses.replace(one, labels=one.labels[:, 0], scores=one.scores[:, :1])
    assert evaluation_sections(one)[-1].parts[0] == "Largest errors, 12 of 60 sequences:"


def test_errors_of_numbers_in_different_units_are_compared_by_their_deviations():
    found = evaluation("regression")  # the numbers are about 1, 10 and 100
    found.scores[:] = found.labels
    found.scores[3, 0] += 5
    found.scores[4, 2] += 50
    note, table = evaluation_sections(found)[-1].parts
    assert note == "Largest errors, each divided by the standard deviation of its number, 12 of 60 sequences:"
    assert [row[0] for row in table.rows[:2]] == ["P3", "P4"]


def test_a_number_that_is_never_known_has_a_sentence_in_place_of_its_plot():
    found = evaluation("regression")
    found.labels[:, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of numpy, for an empty column
        plots = evaluation_sections(found)[1].parts
    assert plots[1] == "b: no number is known in this split."
    assert not any(isinstance(plots[index], str) for index in (0, 2))


def test_a_model_without_a_mistake_has_no_empty_table():
    perfect = evaluation("single_label_classification", skill=50)
    assert evaluation_sections(perfect)[-1].parts == ["There is none."]


@pytest.mark.slow
def test_the_interval_of_the_accuracy_has_the_width_of_the_binomial_distribution():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    right = rng.random(400) < 0.8
    scores = np.eye(2)[np.where(right, labels, 1 - labels)]
    compute = compute_metrics_for(Task("single_label_classification", ("no", "yes")))
    low, high = ends_of(bootstrap_draws(EvalPrediction(scores, labels), compute, resamples=400))["accuracy"]
    expected = 2 * 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert low < right.mean() < high
    assert high - low == pytest.approx(expected, rel=0.15)


def test_the_calibration_error_of_calibrated_predictions_is_small_and_that_of_sure_ones_is_not():
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.5, 1, 20_000)
    right = rng.random(20_000) < probability
    assert reliability(probability, right)[1] < 0.02
    assert reliability(np.full(20_000, 0.99), right)[1] == pytest.approx(0.24, abs=0.02)


def test_a_curve_has_two_values_or_more():
    log = [{"loss": 0.7, "step": 10}, {"eval_mcc": 0.2, "step": 20}, {"loss": 0.6, "step": 20}, {"loss": float("nan")}]
    assert curves_of(log) == {"loss": [(10, 0.7), (20, 0.6)]}
    assert curves_of([*log, {"eval_mcc": 0.3, "step": 40}])["validation: mcc"] == [(20, 0.2), (40, 0.3)]


@pytest.mark.parametrize(("most", "has_intervals"), [(30, True), (29, False)])
def test_intervals_are_left_out_where_examples_times_classes_are_too_many(monkeypatch, most, has_intervals):
    monkeypatch.setattr(intervals_module, "MOST_SCORES", most)
    labels = np.arange(10) % 3
    prediction = EvalPrediction((np.eye(3)[labels], np.zeros((10, 5))), labels)  # a model may give more than logits
    assert bool(intervals_of(prediction, compute_metrics_for(["a", "b", "c"]))) == has_intervals


@pytest.mark.parametrize(("most", "has_intervals"), [(24, True), (23, False)])
def test_of_labels_of_residues_only_the_known_ones_are_counted(monkeypatch, most, has_intervals):
    monkeypatch.setattr(intervals_module, "MOST_SCORES", most)
    labels = np.full((4, 9), -100)
    labels[:, 1:4] = np.arange(12).reshape(4, 3) % 2
    compute = compute_metrics_for(Task("token_classification", ("a", "b")))
    assert bool(intervals_of(EvalPrediction(np.eye(2)[labels % 2], labels), compute)) == has_intervals


FEW_KNOWN = {
    "multi_label_classification": [[1, 0], [0, 1], *[[np.nan, -100]] * 4],
    "token_classification": [[-100, 0, 1], *[[-100] * 3] * 5],
    "regression": [1.0, *[np.nan] * 5],
}


@pytest.mark.parametrize("kind", FEW_KNOWN)
def test_draws_without_a_known_label_are_no_warnings(kind, caplog):
    labels = np.array(FEW_KNOWN[kind])
    task = Task(kind, ("a",) if kind == "regression" else ("a", "b"))
    scores = np.random.default_rng(0).normal(
        size=(*labels.shape, 2) if kind == "token_classification" else (6, len(task.names))
    )
    compute = compute_metrics_for(task)
    intervals_of(EvalPrediction(scores, labels), compute)
    assert not caplog.records
    compute(EvalPrediction(scores[2:], labels[2:]))  # not in a draw
    assert "no label of the evaluated examples is known" in caplog.text


def test_the_interval_of_a_difference_is_narrower_than_those_of_predictions_that_are_alike():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    right = rng.random(200) < 0.7
    better = right | (np.arange(200) < 20)  # right where the other one is, and in some other rows
    compute = compute_metrics_for(["no", "yes"])
    one, other = (
        bootstrap_draws(EvalPrediction(np.eye(2)[np.where(r, labels, 1 - labels)], labels), compute, resamples=200)
        for r in (better, right)
    )
    low, high = differences_of(one, other)["accuracy"]
    assert 0 < low < (better.mean() - right.mean()) < high
    assert ends_of(one)["accuracy"][0] < ends_of(other)["accuracy"][1]  # these overlap


def test_the_most_frequent_confusions_of_many_classes_are_listed():
    names = tuple(f"c{number}" for number in range(21))
    labels = np.array([5] * 4 + [7] * 3 + list(range(21)))
    scores = np.eye(21)[np.array([6] * 4 + [5] * 3 + list(range(21)))] * 9
    task = Task("single_label_classification", names)
    many = Evaluation(task=task, scores=scores, labels=labels, metrics={}, intervals={}, names=list(map(str, labels)))
    section = next(section for section in evaluation_sections(many) if section.heading == "Confusion")
    assert section.parts[1] == "The most frequent confusions:"
    assert section.parts[2].rows == [("6 c5", "7 c6", "4 of 5"), ("8 c7", "6 c5", "3 of 4")]
    few = dataclasses.replace(many, task=Task(task.kind, names[:8]), scores=scores[:7, :8], labels=labels[:7])
    assert len(next(s for s in evaluation_sections(few) if s.heading == "Confusion").parts) == 1
