"""Write a finished run as one folder to deploy: merged weights, adapter, tokenizer, metrics, model card."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from esm_efficient import __version__
from esm_efficient.encoder import remove_lean_encoder
from esm_efficient.errors import ConfigurationError
from esm_efficient.reporting import format_markdown
from esm_efficient.saving import portable_saving
from esm_efficient.tasks import auto_class

if TYPE_CHECKING:
    from esm_efficient.training.result import FinetuneResult

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate")
_PATHS = ("model_dir", "result_path")


def export_model(
    result: FinetuneResult, folder: str | Path, *, base_model: str, dataset: str = "", description: str = ""
) -> Path:
    """Write a finished run as a folder to deploy or to publish.

    Adapters are merged into the model's weights, in float32, so that plain transformers can load the folder. It
    contains ``config.json`` with the label names and thresholds, ``model.safetensors``, the tokenizer, ``adapter/`` for
    peft (if there is an adapter), ``metrics.json`` and the model card ``README.md``. No file is pickled.

    Args:
        result: result of `finetune`; its model is not changed.
        folder: folder to write to; it is created if it is missing.
        base_model: Hub name, or another name, of the model that was fine-tuned, for the card.
        dataset: name of the data, for the card.
        description: a paragraph for the card.

    Returns:
        The folder.

    Raises:
        ConfigurationError: `folder` is a file.

    Example:
        >>> result = finetune("facebook/esm2_t6_8M_UR50D", data)  # doctest: +SKIP
        >>> export_model(result, "membrane", base_model="facebook/esm2_t6_8M_UR50D")  # doctest: +SKIP
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file: expected a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = remove_lean_encoder(copy.deepcopy(result.model)).cpu().float()
    adapted = hasattr(model, "peft_config")
    if adapted:
        model = model.merge_and_unload()
    with portable_saving(model):
        model.save_pretrained(folder)
    for path in result.model_dir.iterdir():
        # The run saved the tokenizer in the same folder as the weights.
        if path.is_file() and path.name.startswith(("tokenizer", "vocab", "special_tokens", "added_tokens")):
            shutil.copy(path, folder)
    if adapted:
        (folder / "adapter").mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(result.model_dir / name, folder / "adapter")
        _write_base_name(folder / "adapter" / "adapter_config.json", base_model)
    record = {name: value for name, value in result.to_dict().items() if name not in _PATHS}
    record |= {"base_model": base_model, "dataset": dataset}
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(_card(result, base_model, dataset, description, adapted))
    return folder


def _write_base_name(path: Path, base_model: str) -> None:
    """Write the base model's name into an adapter's config, instead of a path of the machine that trained it."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": base_model}, indent=2) + "\n")


def _card(result: FinetuneResult, base_model: str, dataset: str, description: str, adapted: bool) -> str:
    """Return the model card, with metadata for the Hub."""
    metrics = {name: value for name, value in sorted(result.metrics.items()) if np.isfinite(value)}
    title = f"{Path(base_model).name}, fine-tuned: {result.task.describe()}"
    metadata = _metadata(result, title, base_model, dataset, metrics, adapted)
    thresholds = "".join(f"\n- {name}: {value:.3f}" for name, value in (result.thresholds or {}).items())
    evaluated = f"the split `{result.evaluated_on}`" + (f" of {dataset}" if dataset else "")
    metric_table = format_markdown([(name, f"{value:.4f}") for name, value in metrics.items()], ("metric", "value"))
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {title}",
        description,
        f"It predicts {result.task.describe()}.",
        f"A label is positive from this probability on:\n{thresholds}" if thresholds else "",
        f"## Metrics\n\nOn {evaluated}:\n\n{metric_table}",
        "## Training\n\n" + format_markdown(_training_rows(result, base_model), ("setting", "value")),
        _usage(auto_class(result.task.head).__name__),
        "The licence of the base model applies to its weights. Predictions are estimates: they do not replace an "
        "experiment.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(
    result: FinetuneResult, title: str, base_model: str, dataset: str, metrics: dict[str, float], adapted: bool
) -> ModelCardData:
    of_tokens = result.task.head == "token-classification"
    pipeline = "token-classification" if of_tokens else "text-classification"
    return ModelCardData(
        model_name=title,
        base_model=base_model if "/" in base_model and not Path(base_model).is_absolute() else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["esm2", "protein", "biology", *(["lora"] if adapted else [])],
        eval_results=[
            EvalResult(
                task_type=pipeline,
                dataset_type=dataset or "unnamed",
                dataset_name=dataset or "unnamed",
                dataset_split=result.evaluated_on,
                metric_type=name,
                metric_value=round(value, 6),
            )
            for name, value in metrics.items()
        ],
    )


def _training_rows(result: FinetuneResult, base_model: str) -> list[tuple[str, str]]:
    rows = [
        ("base model", base_model),
        ("recipe", result.recipe),
        ("trainable parameters", f"{result.trainable_parameters:,} of {result.total_parameters:,}"),
        ("optimizer steps", f"{result.steps:,}"),
        ("seed", str(result.seed)),
        ("esm_efficient", __version__),
        *((name, importlib.metadata.version(name)) for name in _LIBRARIES),
    ]
    if result.trained_layers:  # empty if the run resumed after its last step
        rows.insert(3, ("trained encoder layers", f"{len(result.trained_layers)} of {result.layers}"))
    return rows


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
