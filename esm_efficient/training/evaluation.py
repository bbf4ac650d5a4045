"""evaluate(): the metrics of a trained model on another data set."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from esm_efficient.data.arrow_tables import OnError
from esm_efficient.data.encoding import truncation_mask
from esm_efficient.data.label_cells import spelling
from esm_efficient.data.label_kinds import LabelKind
from esm_efficient.data.schema import number_of
from esm_efficient.data.sequences import Keep
from esm_efficient.errors import ConfigurationError, DataError, listing
from esm_efficient.inference import Predictor
from esm_efficient.inference.inputs import sequences_from
from esm_efficient.inference.windows import LongReading
from esm_efficient.tasks import IGNORE, SPECIAL_TOKENS, Task, task_of
from esm_efficient.training.baselines import majority_metrics
from esm_efficient.training.evaluation_page import Evaluation
from esm_efficient.training.given import NAMED_TABLES, is_typed, one_split_from
from esm_efficient.training.intervals import intervals_of
from esm_efficient.training.metrics import compute_metrics_for
from esm_efficient.training.residue_page import read_letters

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

logger = logging.getLogger(__name__)

_READ_AS: Mapping[str, LabelKind] = {
    "single_label_classification": "class",
    "multi_label_classification": "several",
    "token_classification": "residues",
    "regression": "number",
}
"""What a reader of tables calls the labels of each task."""


def evaluate(
    model: Predictor | str | Path | Sequence[str | Path],
    data: Any,
    *,
    data_options: Mapping[str, Any] | None = None,
    keep: LongReading | None = None,
    token_budget: int = 8192,
    on_error: OnError = "raise",
) -> dict[str, float]:
    """Return the metrics of a trained model on the sequences and labels of a data set.

    The labels are matched by name with those of the model, whatever their order in the data set.

    Args:
        model: a `Predictor`, or what `Predictor.load` loads: a model, or a list of adapters as an ensemble.
            ``Predictor(model, tokenizer)`` makes one of any model with a head.
        data: the path of a table, a DataFrame, or a pair of lists, ``(sequences, labels)``: all their rows are used,
            and labels are read as those of the model. Or ``"demo"`` or ``"deeploc"``, of which the test split is used.
            Or one split with the columns ``sequence`` and ``label``, such as one that `load_sequences` returns.
        data_options: options of `load_sequences` for what is not a split yet, such as ``{"label": "binds"}``.
        keep: as `Predictor.predict`; labels per residue are truncated with their sequence.
        token_budget: as `Predictor.predict`.
        on_error: ``"skip"`` leaves out wrong rows of a table and sequences that are too long, and logs how many and
            which are the first.

    Returns:
        The metrics of `compute_metrics_for` for the model's task, with the model's tuned thresholds.

    Raises:
        DataError: the data set lacks a column, has labels for another task or of names that the model does not have, or
            has sequences that `Predictor.predict` refuses.
        ConfigurationError: as `Predictor.load` and `Predictor.predict`; or there are `data_options` for a split.

    Example:
        >>> evaluate("output/adapter", "other.csv", data_options={"label": "binds"})["mcc"]  # doctest: +SKIP
    """
    predictor = model if isinstance(model, Predictor) else Predictor.load(model)
    dataset = _read(predictor, data, {"on_error": on_error, **(data_options or {})}, keep)
    return _metrics_of(predictor)(_predict(predictor, dataset, keep, token_budget))


def evaluate_in_full(
    model: Predictor | str | Path | Sequence[str | Path],
    data: Any,
    *,
    data_options: Mapping[str, Any] | None = None,
    keep: LongReading | None = None,
    token_budget: int = 8192,
    on_error: OnError = "raise",
) -> Evaluation:
    """Return the metrics of `evaluate` with their 95 % intervals, and what the model predicts for each sequence.

    `esm_efficient.training.outcome.evaluation_page` makes a page of it.

    Args:
        model: as `evaluate`.
        data: as `evaluate`.
        data_options: as `evaluate`.
        keep: as `evaluate`.
        token_budget: as `evaluate`.
        on_error: as `evaluate`.

    Returns:
        An `Evaluation`: ``metrics``; ``intervals``, the 95 % interval of each metric; ``scores`` (logits or numbers)
        and ``labels`` of each example; ``names`` and ``sequences``; ``baselines``. Its text is a table.

    Raises:
        DataError: as `evaluate`.
        ConfigurationError: as `evaluate`.

    Example:
        >>> print(evaluate_in_full("output/adapter", "other.csv"))  # doctest: +SKIP
    """
    predictor = model if isinstance(model, Predictor) else Predictor.load(model)
    dataset = _read(predictor, data, {"on_error": on_error, **(data_options or {})}, keep)
    prediction, compute = _predict(predictor, dataset, keep, token_budget), _metrics_of(predictor)
    labels: Any = prediction.label_ids
    return Evaluation(
        task=predictor.task,
        scores=np.asarray(prediction.predictions),
        labels=labels,
        metrics=compute(prediction),
        intervals=intervals_of(prediction, compute),
        names=_names_of(dataset),
        sequences=_kept(list(dataset["sequence"]), predictor, keep),
        thresholds=predictor.thresholds,
        baselines=majority_metrics(predictor.task, np.asarray(labels)),
    )


def _read(predictor: Predictor, data: Any, options: Mapping[str, Any], keep: LongReading | None) -> Dataset:
    """Return the rows of what is evaluated that the model reads; the options have ``on_error``."""
    return _readable(predictor, _split_of(predictor, data, options), keep, options["on_error"])


def _split_of(predictor: Predictor, data: Any, options: Mapping[str, Any]) -> Any:
    """Return what is evaluated as one split; what is a split, or something else, is returned as it is."""
    import pandas as pd
    from datasets import Dataset

    is_named, task = isinstance(data, str) and data in NAMED_TABLES, predictor.task
    is_read = isinstance(data, str | Path | tuple | pd.DataFrame) or (isinstance(data, Dataset) and not is_typed(data))
    if is_named or not is_read:
        given = {name: value for name, value in options.items() if name != "on_error"}
        if given and not is_named:
            raise ConfigurationError(f"data_options has {listing(list(given))}, but the data are a split already")
        return one_split_from(data, **given) if is_named else data
    # Whole numbers may look like classes, and so does a single label of several. Several columns say what they are.
    if task.kind in ("regression", "multi_label_classification") and isinstance(options.get("label", ""), str | None):
        options = {"label_kind": _READ_AS[task.kind], **options}
    elif task.kind == "single_label_classification" and all(number_of(name) is not None for name in task.names):
        options = {"label_kind": "class", **options}  # the reader asks whether numbers are classes
    split = one_split_from(data, **options)
    return _with_all_labels(split, task.names) if options.get("label_kind") == "several" else split


def _with_all_labels(split: Dataset, names: Sequence[str]) -> Dataset:
    """Return a split whose cells list all labels of a sequence, so that a label that none lists is 0, not unknown."""
    from datasets import Features, Value

    feature = split.features["label"]
    if not (unlisted := [name for name in names if name not in feature]):
        return split
    features = Features(split.features | {"label": feature | dict.fromkeys(unlisted, Value("float32"))})

    def fill(label: dict[str, float] | None) -> dict[str, Any]:
        return {"label": None if label is None else label | dict.fromkeys(unlisted, 0.0)}

    return split.map(fill, input_columns="label", features=features, keep_in_memory=True)


def _metrics_of(predictor: Predictor) -> Any:
    return compute_metrics_for(predictor.task, thresholds=predictor.thresholds)


def _kept(sequences: list[str], predictor: Predictor, keep: LongReading | None) -> list[str]:
    """Return the letters that the model reads of sequences."""
    part, letters = _part(keep), list(map(read_letters, sequences))
    if part is None:
        return letters
    limit = predictor.max_tokens - SPECIAL_TOKENS
    masks = (truncation_mask(np.array([len(sequence)]), limit, part) for sequence in letters)
    return ["".join(itertools.compress(sequence, mask)) for sequence, mask in zip(letters, masks, strict=True)]


def _part(keep: LongReading | None) -> Keep | None:
    """Return the part of a long sequence that is read; None if all is read, in windows, or if it is refused."""
    return next((part for part in get_args(Keep) if part == keep), None)


def _names_of(dataset: Dataset) -> list[str]:
    """Return the accession of each row, or else its number."""
    named = "accession" in dataset.column_names
    return list(map(str, dataset["accession"] if named else range(1, len(dataset) + 1)))


def _readable(predictor: Predictor, dataset: Dataset, keep: LongReading | None, on_error: OnError) -> Dataset:
    """Return the rows that the model reads; sequences that are too long are an error or are left out.

    Raises:
        DataError: the data set is not one of sequences and labels, has no row, or has sequences that are refused.
    """
    if isinstance(dataset, Mapping) and all(hasattr(split, "column_names") for split in dataset.values()):
        raise DataError(f"got all splits ({', '.join(map(str, dataset))}): expected one of them, such as data['test']")
    if not hasattr(dataset, "column_names"):
        raise DataError(
            f"got data of the type {type(dataset).__name__}: expected the path of a table, a DataFrame, a pair of "
            'lists, (sequences, labels), or one split of a data set, such as load_sequences(FILE)["test"]'
        )
    if missing := [name for name in ("sequence", "label") if name not in dataset.column_names]:
        raise DataError(
            f"the data set has the columns {', '.join(dataset.column_names)}: expected {' and '.join(missing)} too. "
            "Splits that are tokenised already are not taken"
        )
    if not hasattr(dataset, "__len__"):
        raise DataError(f"the data set is streamed ({type(dataset).__name__}): load it without streaming")
    if not len(dataset):
        raise DataError("the data set has no row: there is nothing to evaluate")
    residues = predictor.encoder(sequences_from(dataset)).residues
    long = np.flatnonzero(residues > (longest := predictor.max_tokens - SPECIAL_TOKENS))
    if keep is not None or not long.size:
        return dataset
    names = _names_of(dataset)
    problem = (
        f"{len(long):,} of {len(dataset):,} sequences have more than {longest:,} residues: "
        f"{listing([f'{names[row]} ({residues[row]:,})' for row in long])}"
    )
    if on_error == "skip" and len(long) < len(dataset):
        logger.warning("left out %s", problem)
        if "accession" not in dataset.column_names:  # the others keep their numbers
            dataset = dataset.add_column("accession", names)
        return dataset.select(np.flatnonzero(residues <= longest))
    parts = 'Read a part of them with keep="start", keep="end" or keep="both", or all with keep="windows"'
    left_out = '; or leave them out with on_error="skip"' if on_error == "raise" else ""
    raise DataError(f"{problem}. {parts}{left_out}")


def _predict(predictor: Predictor, dataset: Dataset, keep: LongReading | None, token_budget: int) -> EvalPrediction:
    """Return logits and labels as a Trainer does; those of residues are padded, and have a place for <cls>."""
    from transformers import EvalPrediction

    order = _matched_names(task_of(dataset.features), predictor.task)
    labels = _labels(dataset["label"], predictor.task, order)
    if predictor.task.kind == "token_classification":
        _check_lengths(labels, predictor.encoder(list(dataset["sequence"])).residues, _names_of(dataset))
    logits = predictor.logits(dataset["sequence"], keep=keep, token_budget=token_budget)
    logger.info("evaluated on %d sequences", len(logits))
    if predictor.task.kind != "token_classification":
        return EvalPrediction(predictions=np.stack(logits), label_ids=np.stack(labels))
    if part := _part(keep):
        limit = predictor.max_tokens - SPECIAL_TOKENS
        labels = [row[truncation_mask(np.array([len(row)]), limit, part)] for row in labels]
    shape = len(labels), max(map(len, labels)) + SPECIAL_TOKENS
    padded = np.full(shape, IGNORE, dtype=np.int64), np.zeros((*shape, len(predictor.task.names)), dtype=np.float32)
    for index, (row, scores) in enumerate(zip(labels, logits, strict=True)):
        padded[0][index, 1 : len(row) + 1], padded[1][index, 1 : len(row) + 1] = row, scores
    return EvalPrediction(predictions=padded[1], label_ids=padded[0])


def _matched_names(given: Task, expected: Task) -> dict[str, int]:
    """Return the index in the model of each label name of a data set.

    Raises:
        DataError: the tasks differ, or the model does not have a name.
    """
    if given.kind != expected.kind:
        raise DataError(
            f"the labels are {given.describe()}, but the model predicts {expected.describe()}. If one column has "
            f'labels of that kind, name it, and say so when it is read: label_kind="{_READ_AS[expected.kind]}"'
        )
    index = {name: position for position, name in enumerate(expected.names)}
    if expected.kind == "regression":
        # The name of a number is that of its column, which need not be the same in another table.
        if len(given.names) != len(expected.names):
            raise DataError(f"the labels are {len(given.names)} numbers, but the model predicts {len(expected.names)}")
        return {name: position for position, name in enumerate(given.names)}
    spelled: dict[str, list[str]] = {}
    for name in expected.names:
        spelled.setdefault(spelling(name), []).append(name)
    # "membrane" is "Membrane", unless the model tells them apart, as the reader of a training table has it.
    alike = {name: spelled.get(spelling(name), []) for name in given.names if name not in index}
    index |= {name: index[names[0]] for name, names in alike.items() if len(names) == 1}
    unscored = sorted(set(expected.names) - {expected.names[index[name]] for name in given.names if name in index})
    if unscored and expected.kind == "multi_label_classification":
        logger.warning(
            "the data set does not say which sequences have these, so they count nowhere: %s", listing(unscored)
        )
    if unknown := [repr(name) for name in given.names if name not in index]:
        known = listing([repr(name) for name in expected.names], 20)
        raise DataError(
            f"the model does not have the label(s) {listing(unknown)}; it has {known}. Write into the table, in place "
            f"of {listing(unknown)}, the label of the model that means the same"
        )
    return {name: index[name] for name in given.names}


def _labels(cells: Any, task: Task, order: Mapping[str, int]) -> list[np.ndarray]:
    """Return the labels of each row in the model's order; unknown ones are NaN, or -100 for classes."""
    places = list(order.values())
    if task.kind == "single_label_classification":
        return [np.array(_class(cell, places)) for cell in cells]
    if task.kind == "token_classification":
        return [np.array([_class(cell, places) for cell in row or ()], dtype=np.int64) for row in cells]
    rows = np.full((len(cells), len(task.names)), np.nan)
    for row, cell in zip(rows, cells, strict=True):
        if cell is None:
            continue
        values = [cell[name] for name in order] if isinstance(cell, Mapping) else np.atleast_1d(cell).tolist()
        for place, value in zip(places, values, strict=True):
            row[place] = np.fmax(row[place], np.nan if value is None else value)  # two spellings may be one label
    return list(rows)


def _class(cell: int | None, places: list[int]) -> int:
    return IGNORE if cell is None or cell < 0 else places[cell]


def _check_lengths(labels: list[np.ndarray], residues: np.ndarray, names: Sequence[str]) -> None:
    """Refuse sequences with another number of labels than of residues."""
    rows = zip(names, map(len, labels), residues.tolist(), strict=True)
    if wrong := [f"{name} ({count} and {length})" for name, count, length in rows if count != length]:
        raise DataError(f"{len(wrong)} sequence(s) have another number of labels than of residues: {listing(wrong)}")
