"""Write a trained model as one folder to deploy: merged weights, adapter, tokenizer, metrics, model card."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from esm_efficient import __version__
from esm_efficient.encoder import remove_lean_encoder
from esm_efficient.errors import ConfigurationError
from esm_efficient.reporting import escape_markdown, format_markdown, one_line
from esm_efficient.saving import portable_saving
from esm_efficient.tasks import Task, auto_class, task_of_model
from esm_efficient.training.result import FinetuneResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate")
_PATHS = ("model_dir", "result_path")


@dataclass(frozen=True)
class _Trained:
    """What is known of a trained model, whatever trained it.

    Attributes:
        model: the model; it is not changed.
        tokenizer: its tokenizer.
        task: its task.
        metrics: its finite metrics; empty if it was not evaluated.
        evaluated_on: the split of the metrics.
        thresholds: label name -> probability from which the label is positive, or None.
        settings: how it was trained, by name, for the card.
        record: the same for ``metrics.json``.
    """

    model: Any
    tokenizer: Any
    task: Task
    metrics: Mapping[str, float]
    evaluated_on: str
    thresholds: Mapping[str, float] | None
    settings: Mapping[str, str]
    record: Mapping[str, Any]


def export_model(
    trained: FinetuneResult | PreTrainedModel | PeftModel | Trainer,
    folder: str | Path,
    *,
    base_model: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metrics: Mapping[str, float] | None = None,
    evaluated_on: str = "test",
    dataset: str = "",
    description: str = "",
) -> Path:
    """Write a trained model as a folder to deploy or to publish.

    Adapters are merged into the model's weights, in float32, so that plain transformers can load the folder. It
    contains ``config.json`` with the label names and thresholds, ``model.safetensors``, the tokenizer, ``adapter/`` for
    peft and `Predictor.load` (if there is an adapter), ``metrics.json`` and the model card ``README.md``. No file is
    pickled.

    Args:
        trained: result of `finetune`; or a Trainer, such as `WeightedTrainer`; or a model of transformers or of peft
            with a classification head. Its model is not changed.
        folder: folder to write to; it is created if it is missing.
        base_model: Hub name, or another name, of the model that was fine-tuned, for the card and the adapter.
        tokenizer: the model's tokenizer; required for a model, and for a Trainer without ``processing_class``.
        metrics: metrics for the card, such as `evaluate` returns; None for those of the result of `finetune`.
        evaluated_on: split that `metrics` are of.
        dataset: name of the data, for the card.
        description: a paragraph for the card, in Markdown.

    Returns:
        The folder.

    Raises:
        ConfigurationError: `folder` is a file, the tokenizer is missing, the model has no classification head, or its
            adapters cannot be merged.

    Example:
        >>> result = finetune("facebook/esm2_t6_8M_UR50D", data)  # doctest: +SKIP
        >>> export_model(result, "membrane", base_model="facebook/esm2_t6_8M_UR50D")  # doctest: +SKIP
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file: expected a folder to write to")
    facts = _facts(trained, tokenizer, metrics, evaluated_on)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = remove_lean_encoder(copy.deepcopy(facts.model)).cpu().float()
    adapted = isinstance(model, PeftModel)
    if adapted:
        _save_adapter(model, folder / "adapter", facts.tokenizer, base_model)
        model = model.merge_and_unload()
    with portable_saving(model):
        model.save_pretrained(folder)
    facts.tokenizer.save_pretrained(folder)
    record = {**facts.record, "base_model": base_model, "dataset": dataset}
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(_card(facts, base_model, dataset, description, adapted), encoding="utf-8")
    return folder


def _facts(trained: Any, tokenizer: Any, metrics: Mapping[str, float] | None, evaluated_on: str) -> _Trained:
    """Return what is known of a result, a Trainer or a model."""
    settings: dict[str, str] = {}
    record: dict[str, Any] = {}
    if isinstance(trained, FinetuneResult):
        model: Any = trained.model
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(trained.model_dir)
        settings = {"recipe": trained.recipe}
        record = {name: value for name, value in trained.to_dict().items() if name not in _PATHS}
        if metrics is None:
            metrics, evaluated_on = trained.metrics, trained.evaluated_on
    elif isinstance(trained, Trainer):
        model = trained.accelerator.unwrap_model(trained.model)
        tokenizer = tokenizer or trained.processing_class
    else:
        model = trained
    _check_model(model, tokenizer)
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if isinstance(trained, FinetuneResult):
        task, trainable = trained.task, trained.trainable_parameters
        if trained.trained_layers:  # empty if the run resumed after its last step
            settings["trained encoder layers"] = f"{len(trained.trained_layers)} of {trained.layers}"
        settings |= {"optimizer steps": f"{trained.steps:,}", "seed": str(trained.seed)}
    else:
        task = task_of_model(model)
        if isinstance(trained, Trainer):
            settings |= {"optimizer steps": f"{trained.state.global_step:,}", "seed": str(trained.args.seed)}
    settings["trainable parameters"] = f"{trainable:,} of {sum(parameter.numel() for parameter in parameters):,}"
    metrics = metrics or {}
    finite = {name: float(value) for name, value in sorted(metrics.items()) if np.isfinite(value)}
    record |= {
        "task": {"kind": task.kind, "names": list(task.names)},
        "metrics": {name: finite.get(name) for name in metrics},
        "evaluated_on": evaluated_on if metrics else None,
    }
    thresholds = getattr(model.config, "label_thresholds", None)
    return _Trained(model, tokenizer, task, finite, evaluated_on, thresholds, settings, record)


def _check_model(model: Any, tokenizer: Any) -> None:
    """Refuse what cannot be exported.

    Raises:
        ConfigurationError: it is not a model, has adapters that cannot be merged, or has no tokenizer.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ConfigurationError(
            f"got a {type(model).__name__}: expected the result of finetune, a Trainer, or a model of transformers or "
            "of peft"
        )
    if not isinstance(model, PeftModel) and hasattr(model, "peft_config"):
        raise ConfigurationError(
            "the model has adapters of add_adapter(), which cannot be merged: expected a model of peft.get_peft_model"
        )
    if isinstance(model, PeftModel) and not hasattr(model.base_model, "merge_and_unload"):
        kind = type(model.active_peft_config).__name__
        raise ConfigurationError(f"adapters of {kind} cannot be merged into the model: expected those of LoraConfig")
    if tokenizer is None:
        raise ConfigurationError("the model has no tokenizer beside it: give tokenizer too")


def _save_adapter(model: Any, folder: Path, tokenizer: Any, base_model: str) -> None:
    """Save an adapter as peft does, with the base model's config, for `Predictor.load`, and the tokenizer."""
    model.save_pretrained(folder)
    # peft's card names the folder of the base model on this machine.
    (folder / "README.md").unlink(missing_ok=True)
    model.get_base_model().config.save_pretrained(folder / "base_config")
    tokenizer.save_pretrained(folder)
    for path in folder.rglob("adapter_config.json"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"base_model_name_or_path": base_model}, indent=2) + "\n")


def _card(facts: _Trained, base_model: str, dataset: str, description: str, adapted: bool) -> str:
    """Return the model card, with metadata for the Hub."""
    title = f"{one_line(Path(base_model).name)}, fine-tuned: {one_line(facts.task.describe())}"
    metadata = _metadata(facts, title, base_model, dataset, adapted)
    thresholds = "".join(
        f"\n- {escape_markdown(name)}: {value:.3f}" for name, value in (facts.thresholds or {}).items()
    )
    evaluated = f"the split {escape_markdown(facts.evaluated_on)}"
    evaluated += f" of {escape_markdown(dataset)}" if dataset else ""
    metrics = format_markdown([(name, f"{value:.4f}") for name, value in facts.metrics.items()], ("metric", "value"))
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    settings = {"base model": base_model, **facts.settings, "esm_efficient": __version__, **versions}
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {escape_markdown(title)}",
        description,
        f"It predicts {escape_markdown(facts.task.describe())}.",
        f"A label is positive from this probability on:\n{thresholds}" if thresholds else "",
        f"## Metrics\n\nOn {evaluated}:\n\n{metrics}" if facts.metrics else "",
        "## Training\n\n" + format_markdown(list(settings.items()), ("setting", "value")),
        _usage(auto_class(facts.task.head).__name__),
        "The licence of the base model applies to its weights. Predictions are estimates: they do not replace an "
        "experiment.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: _Trained, title: str, base_model: str, dataset: str, adapted: bool) -> ModelCardData:
    of_tokens = facts.task.head == "token-classification"
    pipeline = "token-classification" if of_tokens else "text-classification"
    name = one_line(dataset) or "unnamed"
    return ModelCardData(
        model_name=title,
        base_model=base_model if "/" in base_model and not Path(base_model).is_absolute() else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["esm2", "protein", "biology", *(["lora"] if adapted else [])],
        eval_results=[
            EvalResult(
                task_type=pipeline,
                dataset_type=name,
                dataset_name=name,
                dataset_split=facts.evaluated_on,
                metric_type=one_line(metric),
                metric_value=round(value, 6),
            )
            for metric, value in facts.metrics.items()
        ],
    )


def _usage(auto: str) -> str:
    return f"""## Usage

```python
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {auto}.from_pretrained("FOLDER")
logits = model(**tokenizer("MKTAYIAKQR", return_tensors="pt")).logits
```

Or with `esm_efficient`, which checks sequences, computes without padding and applies the thresholds:
`Predictor.load("FOLDER").predict(["MKTAYIAKQR"])`."""
