"""Predict from a file of sequences into a file of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.data.arrow_tables import OnError
from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.inference.files import FileResult, map_file
from esm_efficient.inference.identity import identity_of
from esm_efficient.inference.inputs import source_file
from esm_efficient.inference.predictor import Prediction, Predictor
from esm_efficient.inference.windows import LongReading, describe_reading, refuse_joined_ends, windows_for
from esm_efficient.recipes import Precision
from esm_efficient.reporting.files import written_as
from esm_efficient.tasks import SPECIAL_TOKENS, Task

if TYPE_CHECKING:
    import pyarrow as pa


def predict_file(
    model: str | Path | Sequence[str | Path] | Predictor,
    source: Any,
    output: str | Path,
    *,
    keep: LongReading | None = None,
    token_budget: int = 8192,
    shard: tuple[int, int] = (1, 1),
    sequence: str | None = None,
    accession: str | None = None,
    precision: Precision = "auto",
    on_error: OnError = "raise",
) -> FileResult:
    """Predict from every sequence of a file, and write the predictions in the order of the file.

    Apart from some bytes per row, the memory does not grow with the file.

    A run that was stopped goes on with the next block when it is started again with the same arguments. Several ranks
    of one run share the work.

    The columns of the output are ``accession`` and: ``label``, ``score`` (its probability) and ``probability_NAME`` of
    each class; with several labels per sequence ``labels`` and the probabilities; with one class per residue ``labels``
    and ``scores``, lists with an entry per residue; with numbers, a column for each of them. An ensemble adds
    ``spread_NAME`` of each of the named columns, or ``spreads``: the standard deviation over its members.

    In CSV there is ``|`` between several labels of a sequence, and a space between the entries of other lists. A text
    that a spreadsheet would run as a formula, such as the accession ``=A1`` or ``-A1``, has an apostrophe before it in
    CSV (`esm_efficient.reporting.tables.format_csv` says which texts); Parquet and JSON lines have every text as it is.

    Args:
        model: a `Predictor`, or what `Predictor.load` loads.
        source: a CSV, TSV, Excel, Parquet, JSON lines or FASTA file; text may be packed with gzip or xz. Or a DataFrame
            or a split of a data set, or sequences as `Predictor.predict` takes them: these are copied to the cache
            folder first.
        output: a file that ends with .csv, .jsonl or .parquet. It exists only when it is whole.
        keep: as `Predictor.predict`.
        token_budget: as `Predictor.predict`.
        shard: the part of the rows to predict from, such as ``(2, 5)`` for the second of five equal parts.
        sequence: the column of the sequences; None to find it by a usual name.
        accession: the column of the accessions, likewise. Without one, or where its cell is empty, the number of a row
            is its accession.
        precision: as `Predictor`; of a model that is loaded.
        on_error: ``"skip"`` leaves out rows that are not a protein sequence or are too long, and logs how many and
            which are the first; ``OUTPUT.left_out.csv`` lists all of them. Otherwise such a row is an error.

    Returns:
        The numbers of rows and residues, and the time.

    Raises:
        DataError: a row is not a protein sequence or is too long, with its place; or the file cannot be read.
        ConfigurationError: the output has another suffix, is the source or cannot be written; the shard does not exist;
            the model's names cannot be told apart in such a file; one class per residue is predicted and `keep` is
            ``"end"`` or ``"both"``, which leaves open which residues are meant; a `precision` is given beside a
            `Predictor`; or as `Predictor.load`.

    Example:
        >>> predict_file("output/adapter", "proteome.fasta", "predictions.csv")  # doctest: +SKIP
    """
    import pyarrow as pa

    is_csv = written_as(output, source=source) == "csv"
    if isinstance(model, Predictor) and precision != "auto":
        raise ConfigurationError(f"precision={precision!r}: the Predictor has its own. Give it to Predictor.load")
    predictor = model if isinstance(model, Predictor) else Predictor.load(model, precision=precision)
    column_names(predictor.task, spread=bool(predictor.members))
    if predictor.task.kind == "token_classification":
        refuse_joined_ends(keep)
    if is_csv:
        _refuse_ambiguous_names(predictor.task, output)

    def compute(sequences: list[str]) -> Mapping[str, Any]:
        found = predictor.predict(sequences, keep=keep, token_budget=token_budget)
        columns = columns_of(found, predictor.task)
        if is_csv and predictor.task.kind == "multi_label_classification":  # as tables are read
            columns["labels"] = pa.array(["|".join(prediction.labels) or "[]" for prediction in found])
        return columns

    longest = predictor.max_tokens - SPECIAL_TOKENS
    thresholds = None if predictor.thresholds is None else [float(value) for value in predictor.thresholds]
    options = (longest, predictor.half, windows_for(keep, longest) or keep, predictor.members, thresholds)
    with source_file(source) as path:
        return map_file(
            compute,
            path,
            output,
            identity=identity_of(predictor.model, predictor.model.config, "predictions", *options),
            longest=longest if keep is None else None,
            long_sequences=describe_reading(keep, longest),
            shard=shard,
            sequence=sequence,
            accession=accession,
            on_error=on_error,
            description="predictions",
        )


def _refuse_ambiguous_names(task: Task, output: str | Path) -> None:
    """Refuse CSV if a name of a class contains what is written between the labels of a cell.

    Raises:
        ConfigurationError: one does.
    """
    between = {"token_classification": " ", "multi_label_classification": "|"}.get(task.kind)
    if between is not None and (names := [repr(name) for name in task.names if between in name or not name]):
        raise ConfigurationError(
            f"{output}: CSV has {between!r} between the labels of a cell, and the model's names {listing(names)} "
            "contain it or are empty: write .parquet or .jsonl"
        )


def column_names(task: Task, *, spread: bool) -> list[str]:
    """Return the names of the columns of predictions, with ``accession`` first, as `predict_file` writes them.

    Args:
        task: the task of the model.
        spread: whether there is a spread over the members of an ensemble.

    Raises:
        ConfigurationError: two columns have the same name.

    Example:
        >>> column_names(Task("regression", ("kcat", "km")), spread=False)
        ['accession', 'kcat', 'km']
    """
    if task.kind == "token_classification":
        return ["accession", "labels", "scores", *(["spreads"] if spread else [])]
    first = {"single_label_classification": ["label", "score"], "multi_label_classification": ["labels"]}
    prefix = "" if task.kind == "regression" else "probability_"
    values = [f"{prefix}{name}" for name in task.names]
    spreads = [f"spread_{name}" for name in task.names] if spread else []
    names = ["accession", *first.get(task.kind, ()), *values, *spreads]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(
            f"the predictions would have two columns called {listing([repr(name) for name in twice])}, one of them for "
            "the label of this name: use Predictor.predict, or rename the label in the model's config.json"
        )
    return names


def columns_of(predictions: Sequence[Prediction], task: Task) -> dict[str, pa.Array]:
    """Return predictions as columns of a table, as `predict_file` writes them beside ``accession``.

    Raises:
        ConfigurationError: as `column_names`.
    """
    import pyarrow as pa

    spread = [found.spread for found in predictions if found.spread is not None]  # all of them, or none
    arrays: list[Any]
    if task.kind == "token_classification":
        arrays = [
            pa.array([list(found.labels) for found in predictions], pa.list_(pa.string())),
            pa.array([found.scores for found in predictions], pa.list_(pa.float32())),
        ]
        if spread:
            arrays.append(pa.array([found.score_spread for found in predictions], pa.list_(pa.float32())))
    else:
        values = np.stack([found.values for found in predictions]).astype(np.float32)
        arrays = []
        if task.kind == "multi_label_classification":
            arrays.append(pa.array([list(found.labels) for found in predictions], pa.list_(pa.string())))
        elif task.kind == "single_label_classification":
            arrays += [pa.array([found.labels[0] for found in predictions]), pa.array(values.max(axis=1))]
        arrays += map(pa.array, values.T)
        if spread:
            arrays += map(pa.array, np.stack(spread).astype(np.float32).T)
    return dict(zip(column_names(task, spread=bool(spread))[1:], arrays, strict=True))
