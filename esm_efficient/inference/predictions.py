"""Predict from a file of sequences into a file of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.data.arrow_tables import OnError
from esm_efficient.inference.files import FileResult, map_file
from esm_efficient.inference.identity import identity_of
from esm_efficient.inference.predictor import Prediction, Predictor
from esm_efficient.inference.windows import LongReading, describe_reading, windows_for
from esm_efficient.reporting.files import written_as
from esm_efficient.tasks import SPECIAL_TOKENS, Task

if TYPE_CHECKING:
    import pyarrow as pa


def predict_file(
    model: str | Path | Sequence[str | Path] | Predictor,
    source: str | Path,
    output: str | Path,
    *,
    keep: LongReading | None = None,
    token_budget: int = 8192,
    shard: tuple[int, int] = (1, 1),
    sequence: str | None = None,
    accession: str | None = None,
    on_error: OnError = "raise",
) -> FileResult:
    """Predict from every sequence of a file, in constant memory, and write the predictions in the order of the file.

    A run that was stopped goes on with the next block when it is started again with the same arguments. Several ranks
    of one run share the work.

    The columns of the output are ``accession`` and: ``label``, ``score`` (its probability) and ``probability_NAME`` of
    each class; with several labels per sequence ``labels`` and the probabilities; with one class per residue ``labels``
    and ``scores``, lists with an entry per residue; with numbers, a column for each of them. In CSV there is ``|``
    between several labels of a sequence, and a space between the entries of other lists. An ensemble adds
    ``spread_NAME`` of each of the named columns, or ``spreads``: the standard deviation over its members.

    Args:
        model: a `Predictor`, or what `Predictor.load` loads.
        source: a CSV, TSV, Excel, Parquet, JSON lines or FASTA file; text may be packed with gzip or xz.
        output: a file that ends with .csv, .jsonl or .parquet. It exists only when it is whole.
        keep: as `Predictor.predict`.
        token_budget: as `Predictor.predict`.
        shard: the part of the rows to predict from, such as ``(2, 5)`` for the second of five equal parts.
        sequence: the column of the sequences; None to find it by a usual name.
        accession: the column of the accessions, likewise; without one, the number of a row is its accession.
        on_error: ``"skip"`` leaves out rows that are no protein sequence or too long, and logs how many and which are
            the first; otherwise such a row is an error.

    Returns:
        The numbers of rows and residues, and the time.

    Raises:
        DataError: a row is not a protein sequence or is too long, with its place; or the file cannot be read.
        ConfigurationError: the output has another suffix, the shard does not exist, or as `Predictor.load`.

    Example:
        >>> predict_file("output/adapter", "proteome.fasta", "predictions.csv")  # doctest: +SKIP
    """
    import pyarrow as pa

    is_csv = written_as(output) == "csv"
    predictor = model if isinstance(model, Predictor) else Predictor.load(model)

    def compute(sequences: list[str]) -> Mapping[str, Any]:
        found = predictor.predict(sequences, keep=keep, token_budget=token_budget)
        columns = columns_of(found, predictor.task)
        if is_csv and predictor.task.kind == "multi_label_classification":  # a name may have spaces
            columns["labels"] = pa.array(["|".join(prediction.labels) for prediction in found])
        return columns

    longest = predictor.max_tokens - SPECIAL_TOKENS
    reading = windows_for(keep, longest) or keep
    return map_file(
        compute,
        source,
        output,
        identity=identity_of(predictor.model, predictor.model.config, "predictions", longest, predictor.half, reading),
        longest=longest if keep is None else None,
        long_sequences=describe_reading(keep, longest),
        shard=shard,
        sequence=sequence,
        accession=accession,
        on_error=on_error,
        description="predictions",
    )


def columns_of(predictions: Sequence[Prediction], task: Task) -> dict[str, pa.Array]:
    """Return predictions as columns of a table, as `predict_file` writes them."""
    import pyarrow as pa

    spread = [found.spread for found in predictions if found.spread is not None]  # all of them, or none
    if task.kind == "token_classification":
        columns = {
            "labels": pa.array([list(found.labels) for found in predictions], pa.list_(pa.string())),
            "scores": pa.array([found.scores for found in predictions], pa.list_(pa.float32())),
        }
        if spread:
            columns["spreads"] = pa.array([found.score_spread for found in predictions], pa.list_(pa.float32()))
        return columns
    values = np.stack([found.values for found in predictions]).astype(np.float32)
    columns = {}
    if task.kind == "multi_label_classification":
        columns["labels"] = pa.array([list(found.labels) for found in predictions], pa.list_(pa.string()))
    elif task.kind == "single_label_classification":
        columns["label"] = pa.array([found.labels[0] for found in predictions])
        columns["score"] = pa.array(values.max(axis=1))
    prefix = "" if task.kind == "regression" else "probability_"
    columns |= {f"{prefix}{name}": pa.array(column) for name, column in zip(task.names, values.T, strict=True)}
    if spread:
        deviations = np.stack(spread).astype(np.float32)
        columns |= {f"spread_{name}": pa.array(column) for name, column in zip(task.names, deviations.T, strict=True)}
    return columns
