"""What the folder of a run keeps of its result, so that its report and its model card can be written again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.errors import ConfigurationError
from esm_efficient.reporting.description import DataDescription, SplitDescription
from esm_efficient.reporting.files import whole_file
from esm_efficient.tasks import Task
from esm_efficient.training.baselines import PROBE, FrozenProbe
from esm_efficient.training.evaluation_page import Evaluation
from esm_efficient.training.step_memory import StepMemory

if TYPE_CHECKING:
    from esm_efficient.training.result import FinetuneResult

RESULT = "result.json"
PREDICTIONS = "predictions.parquet"
"""The files of the record of a run, and of its predictions for the split that it was evaluated on."""

_SHAPES = b"esm_efficient"
"""The key of the Parquet file's metadata with the shape and type of an example's arrays."""


def load_result(folder: str | Path) -> FinetuneResult:
    """Return the result of a run of `finetune` from its folder, without its model and its profile.

    Args:
        folder: the ``output_dir`` of the run, or the folder of its model or adapter.

    Raises:
        ConfigurationError: the folder has no ``result.json`` of this version of the library, or is another folder than
            that of the run's model, such as a checkpoint or the adapter of a former run.

    Example:
        >>> load_result("output").save_page()  # doctest: +SKIP
    """
    from esm_efficient.training.result import FinetuneResult

    given = Path(folder).expanduser()
    run = next((place for place in (given, given.parent) if (place / RESULT).is_file()), None)
    if run is None:
        raise ConfigurationError(f"{given} has no {RESULT}: expected the folder that finetune wrote")
    try:
        record = json.loads((run / RESULT).read_text(encoding="utf-8"))
        saved = PureWindowsPath(record["model_dir"]).name  # the last part of a path of any system
        task = Task(record["task"]["kind"], tuple(record["task"]["names"]))
        metrics = _numbers(record["metrics"])
        baselines = {name: _numbers(values) for name, values in record["baselines"].items()}
        changed: dict[str, Any] = {
            "task": task,
            "metrics": metrics,
            "step_memory": _step_memory(record["step_memory"]),
            "probe": _probe(record["probe"], baselines),
            "trained_layers": tuple(record["trained_layers"]),
            "model_dir": run / saved,
            "result_path": run / RESULT,
            "evaluation": _load_evaluation(run / PREDICTIONS, task, metrics, baselines, record),
            "history": tuple(record["history"]),
            "data": _description(record["data"]),
            "warnings": tuple(record["warnings"]),
            "probe_words": tuple(record["probe_words"]),
        }
        names = {field.name for field in dataclasses.fields(FinetuneResult)} - {"model", "profile", *changed}
        result = FinetuneResult(model=None, **{name: record[name] for name in names}, **changed)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{run / RESULT} cannot be read ({type(error).__name__}: {error}): it is damaged, or another version of "
            "the library wrote it. Train again"
        ) from error
    if run != given and given.name != saved:
        raise ConfigurationError(f"{given} is not the model of the run in {run}: give {run / saved}")
    return result


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write the predictions and labels of a split as a Parquet file, with a row per example.

    Args:
        evaluation: the evaluation.
        path: the file; ``accession`` and ``sequence`` are those of the examples, ``label`` and ``score`` the true
            labels and the logits or numbers of the model, as flat lists.
    """
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {"label": np.asarray(evaluation.labels), "score": np.asarray(evaluation.scores, dtype=np.float32)}
    shapes = {name: {"shape": values.shape[1:], "dtype": values.dtype.name} for name, values in arrays.items()}
    columns: dict[str, Any] = {"accession": list(evaluation.names)}
    if evaluation.sequences:
        columns["sequence"] = list(evaluation.sequences)
    columns |= {name: list(values.reshape(len(values), -1)) for name, values in arrays.items()}
    table = pa.table(columns).replace_schema_metadata({_SHAPES: json.dumps(shapes)})
    with whole_file(path) as partial:
        parquet.write_table(table, partial, compression="zstd")


def _step_memory(record: Mapping[str, Any] | None) -> StepMemory | None:
    if record is None:
        return None
    return StepMemory(**{**record, "timeline": tuple(tuple(point) for point in record["timeline"])})


def _probe(record: Mapping[str, Any] | None, baselines: Mapping[str, Mapping[str, float]]) -> FrozenProbe | None:
    if record is None:
        return None
    return FrozenProbe(metrics=baselines[PROBE], **{**record, "intervals": _pairs(record["intervals"])})


def _pairs(record: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {name: (ends[0], ends[1]) for name, ends in record.items()}


def _numbers(record: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in record.items()}


def _load_evaluation(
    path: Path,
    task: Task,
    metrics: Mapping[str, float],
    baselines: Mapping[str, Mapping[str, float]],
    record: Mapping[str, Any],
) -> Evaluation | None:
    from pyarrow import parquet

    if not path.is_file():
        return None
    table = parquet.read_table(path)
    shapes = json.loads(table.schema.metadata[_SHAPES])
    labels, scores = (
        np.array(table[name].to_pylist(), dtype=shapes[name]["dtype"]).reshape(len(table), *shapes[name]["shape"])
        for name in ("label", "score")
    )
    thresholds = record["thresholds"]
    return Evaluation(
        task=task,
        scores=scores,
        labels=labels,
        metrics=metrics,
        intervals=_pairs(record["intervals"]),
        names=table["accession"].to_pylist(),
        sequences=table["sequence"].to_pylist() if "sequence" in table.column_names else (),
        thresholds=None if thresholds is None else np.array([thresholds[name] for name in task.names]),
        baselines=baselines,
        baseline_intervals={PROBE: _pairs(record["probe"]["intervals"])} if record["probe"] else {},
        gains=_pairs(record["gains"]),
    )


def _description(record: Mapping[str, Any] | None) -> DataDescription | None:
    if record is None:
        return None
    splits = {}
    for name, split in record["splits"].items():
        numbers = {
            number: tuple(float("nan") if value is None else value for value in pair)
            for number, pair in split["numbers"].items()
        }
        pairs = {"residues": tuple(split["residues"]), "numbers": numbers}
        splits[name] = SplitDescription(**(split | pairs))
    return DataDescription(tuple(record["columns"]), splits)
