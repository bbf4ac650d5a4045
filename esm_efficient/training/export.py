"""Write a trained model as one folder to deploy: merged weights, adapter, tokenizer, metrics, model card."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from esm_efficient.adapters.quantization import count_parameters, merge_quantized
from esm_efficient.encoder import remove_lean_encoder
from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.heads import pooling_of_model
from esm_efficient.inference.loading import load_model
from esm_efficient.published import BASE_CONFIG
from esm_efficient.saving import portable_saving, save_base_config, share_weights
from esm_efficient.tasks import Task, base_model_of, task_of_model
from esm_efficient.training.card import CARD, CardFacts, Holds, model_card, public_name, run_settings
from esm_efficient.training.onnx_file import ONNX_FILE, remove_onnx, require_onnx, write_onnx
from esm_efficient.training.outcome import NO_METRICS
from esm_efficient.training.records import RESULT, load_result
from esm_efficient.training.result import FinetuneResult
from esm_efficient.training.saved_tokenizer import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NOT_EXPORTED = ("model_dir", "result_path", "history", "probe_words", "warnings")
"""What a record has that is of no use elsewhere, or names paths of this machine."""

_OF_THE_RUN = ("intervals", "baselines", "gains", "probe")
"""What a record has of the split that the run evaluated."""

_PREFIXES = {"eval_": "validation", "test_": "test"}
"""What a Trainer puts before the names of metrics, and the split that they are of."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl")
"""Files of a Trainer or of torch that are unpickled when they are loaded."""

_RUN_FILES = (RESULT, "run.yaml", "checkpoint-*")
_READS = {
    "first": "the first token",
    "mean": "the mean over the residues",
    "attention": "a mean over the residues with learned weights",
}
"""What the head reads, for the card."""


@dataclass(frozen=True)
class _Trained:
    """A trained model, and what is known of it.

    Attributes:
        model: the model; it is not changed.
        tokenizer: its tokenizer.
        facts: what the card says.
        record: the same for ``metrics.json``.
        base_model: the name of the model that was fine-tuned; empty if it is not known.
        dataset: the name of the data, likewise.
    """

    model: Any
    tokenizer: Any
    facts: CardFacts
    record: Mapping[str, Any]
    base_model: str = ""
    dataset: str = ""


def export_model(
    trained: FinetuneResult | PreTrainedModel | PeftModel | Trainer | str | Path,
    folder: str | Path,
    *,
    base_model: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metrics: Mapping[str, float] | None = None,
    evaluated_on: str | None = None,
    dataset: str | None = None,
    description: str = "",
    onnx: bool = False,
) -> Path:
    """Write a trained model as a folder to deploy or to publish.

    Adapters are merged into the model's weights, in float32, so that plain transformers can load the folder; quantised
    weights are restored for that. It contains ``config.json`` with the label names and thresholds,
    ``model.safetensors``, the tokenizer (`esm_efficient.training.saved_tokenizer`), ``adapter/`` for peft
    and `Predictor.load` (if there is an adapter), ``metrics.json`` and the model card ``README.md``. No file is
    pickled. A head that pools residues is not in transformers: `esm_efficient.heads.PooledEsmForSequenceClassification`
    and `Predictor.load` load such a folder.

    Args:
        trained: result of `finetune`, or the folder of its run, model or adapter; or a Trainer, such as
            `WeightedTrainer`; or a model of transformers or of peft with a classification head. Its model is not
            changed.
        folder: folder to write to; it is created if it is missing.
        base_model: Hub name, or another name, of the model that was fine-tuned, for the card and the adapter. None for
            the model that `finetune` began with; any other model needs a name.
        tokenizer: the model's tokenizer; required for a model, and for a Trainer without ``processing_class``.
        metrics: metrics for the card, such as `evaluate` or ``trainer.evaluate()`` returns; None for those of the
            result of `finetune`. Times and the epoch, which a Trainer puts among them, are left out.
        evaluated_on: split that `metrics` are of. None for what a Trainer's prefix tells: ``eval_`` is validation, and
            ``test_`` is test. Metrics without a prefix need it.
        dataset: name of the data, for the card; None for that of the run.
        description: a paragraph for the card, in Markdown.
        onnx: also write ``model.onnx``, which onnxruntime computes without torch. It takes ``input_ids`` and
            ``attention_mask``, int64 of any shape (sequences, tokens), and gives ``logits`` in float32. Needs the extra
            ``onnx``.

    Returns:
        The folder.

    Raises:
        ConfigurationError: `folder` is a file, is the folder of a run or of its model, or has another adapter or a
            pickled file in it, the tokenizer or
            the name of the base model is missing, the model has no classification head, or its adapters cannot be
            merged; or the packages for ONNX are not installed, or onnxruntime does not compute the logits of the model.

    Example:
        >>> result = finetune("facebook/esm2_t6_8M_UR50D", data)  # doctest: +SKIP
        >>> export_model(result, "membrane")  # doctest: +SKIP
    """
    if onnx:
        require_onnx()
    folder = Path(folder).expanduser()
    _check_folder(folder)
    if isinstance(trained, str | Path):
        trained = load_result(trained)
    if metrics is not None:
        metrics, evaluated_on = _without_prefix(metrics, evaluated_on)
    found = _trained(trained, tokenizer, metrics, evaluated_on or "test")
    if not isinstance(found.model, PeftModel) and (folder / "adapter" / CONFIG_NAME).is_file():
        raise ConfigurationError(f"{folder / 'adapter'} is an adapter of another model: give another folder")
    base_model, dataset = base_model or found.base_model, found.dataset if dataset is None else dataset
    if not base_model:
        raise ConfigurationError("the name of the model that was fine-tuned is not known: give base_model")
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = remove_lean_encoder(_copy_of(found.model))
    if not getattr(base_model_of(model), "is_quantized", False):  # such weights are restored first
        model = model.float()
    adapted = isinstance(model, PeftModel)
    if adapted:
        _save_adapter(model, folder / "adapter", found, base_model, dataset)
        model = merge_quantized(model).cpu().float().merge_and_unload()
    with portable_saving(model):
        model.save_pretrained(folder)
    share_weights(folder)
    save_tokenizer(found.tokenizer, folder)
    record = {**found.record, "base_model": public_name(base_model), "dataset": dataset}
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    holds: Holds = "merged" if adapted else "model"
    card = model_card(found.facts, base_model, holds=holds, dataset=dataset, description=description)
    (folder / CARD).write_text(card, encoding="utf-8")
    was_there = remove_onnx(folder)
    if onnx:
        write_onnx(folder)
    elif was_there:
        logger.warning(
            "%s was that of the model that was here before, and is removed: give onnx=True to write this model's",
            folder / ONNX_FILE,
        )
    return folder


def _copy_of(model: Any) -> Any:
    """Return a copy on the CPU, made there: the model's device may have no memory for a second one.

    A quantised model is copied on its device.
    """
    if getattr(base_model_of(model), "is_quantized", False):
        return copy.deepcopy(model)
    tensors: dict[int, Any] = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in model.buffers()}
    for parameter in model.parameters():
        values = parameter.detach().to("cpu", copy=True)
        tensors[id(parameter)] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, tensors)


def _check_folder(folder: Path) -> None:
    """Refuse a folder to write to that is a file, or has what must not be published or loaded with the model.

    Raises:
        ConfigurationError: it is such a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file: expected a folder to write to")
    if (folder / CONFIG_NAME).is_file():
        raise ConfigurationError(
            f"{folder} has an adapter in it, which would be applied to the merged weights again: give another folder"
        )
    if files := sorted(path.name for name in _RUN_FILES for path in folder.glob(name)):
        raise ConfigurationError(
            f"{folder} is the folder of a run ({listing(files)}): its training states and test sequences would be "
            "published with the model. Give another folder"
        )
    if files := sorted(path.name for name in _PICKLED for path in folder.glob(name)):
        raise ConfigurationError(
            f"{folder} has pickled files ({listing(files)}), which would be published with it: give another folder"
        )


def _without_prefix(metrics: Mapping[str, float], evaluated_on: str | None) -> tuple[dict[str, float], str]:
    """Return metrics without a Trainer's prefix, times and epoch, and the split that they are of.

    Raises:
        ConfigurationError: the split is not known.
    """
    prefix = next((prefix for prefix in _PREFIXES if all(n.startswith(prefix) or n == "epoch" for n in metrics)), "")
    if evaluated_on is None and not prefix:
        raise ConfigurationError('it is not known what the metrics are of: give evaluated_on, such as "test"')
    kept = {n.removeprefix(prefix): v for n, v in metrics.items() if n != "epoch" and not n.endswith(NO_METRICS)}
    return kept, evaluated_on or _PREFIXES[prefix]


def _trained(trained: Any, tokenizer: Any, metrics: Mapping[str, float] | None, evaluated_on: str) -> _Trained:
    """Return what is known of a result, a Trainer or a model."""
    if isinstance(trained, FinetuneResult):
        if trained.model is None:  # as `load_result` returns it
            model, _ = load_model(trained.model_dir, revision=None, cache_dir=None, task=None, merge=False)
            trained = dataclasses.replace(trained, model=model)
        return _trained_by_finetune(trained, tokenizer, metrics, evaluated_on)
    model, settings = trained, {}
    if isinstance(trained, Trainer):
        model = trained.accelerator.unwrap_model(trained.model)
        tokenizer = tokenizer or trained.processing_class
        settings = {"optimizer steps": f"{trained.state.global_step:,}", "seed": str(trained.args.seed)}
    _check_model(model, tokenizer)
    trainable = count_parameters(parameter for parameter in model.parameters() if parameter.requires_grad)
    facts = _facts(model, task_of_model(model), metrics or {}, evaluated_on, settings, trainable)
    return _Trained(model, tokenizer, facts, _record(facts, metrics))


def _trained_by_finetune(
    result: FinetuneResult, tokenizer: Any, metrics: Mapping[str, float] | None, evaluated_on: str
) -> _Trained:
    model: Any = result.model
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(result.model_dir)
    _check_model(model, tokenizer)
    own = metrics is None
    metrics, evaluated_on = (result.metrics, result.evaluated_on) if metrics is None else (metrics, evaluated_on)
    facts = _facts(model, result.task, metrics, evaluated_on, run_settings(result), result.trainable_parameters)
    intervals = result.evaluation.intervals if own and result.evaluation is not None else {}
    facts = dataclasses.replace(facts, intervals=intervals, data=result.data)
    left_out = _NOT_EXPORTED if own else (*_NOT_EXPORTED, *_OF_THE_RUN)
    record = {name: value for name, value in result.to_dict().items() if name not in left_out}
    return _Trained(model, tokenizer, facts, record | _record(facts, metrics), result.base_model, result.dataset)


def _facts(
    model: Any,
    task: Task,
    metrics: Mapping[str, float],
    evaluated_on: str,
    settings: Mapping[str, str],
    trainable: int,
) -> CardFacts:
    pooling = pooling_of_model(model)
    read = {"head reads": _READS[pooling]} if task.head == "sequence-classification" else {}
    whole = getattr(model.config, "truncated_from", None)
    kept = {} if whole is None else {"encoder layers kept": f"the lowest {model.config.num_hidden_layers} of {whole}"}
    total = count_parameters(model.parameters())
    return CardFacts(
        task=task,
        pooling=pooling,
        metrics={
            name: float(value) for name, value in sorted(metrics.items()) if value is not None and np.isfinite(value)
        },
        evaluated_on=evaluated_on,
        thresholds=getattr(model.config, "label_thresholds", None),
        is_truncated=whole is not None,
        settings={**settings, **kept, **read, "trainable parameters": f"{trainable:,} of {total:,}"},
    )


def _record(facts: CardFacts, metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """Return what ``metrics.json`` has of any model."""
    return {
        "task": {"kind": facts.task.kind, "names": list(facts.task.names)},
        "metrics": {name: facts.metrics.get(name) for name in metrics or {}},
        "evaluated_on": facts.evaluated_on if metrics else None,
    }


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
    if isinstance(model, PeftModel) and len(model.active_adapters) != 1:
        raise ConfigurationError(
            f"the model has the active adapters {listing(model.active_adapters)}: expected one. Activate it with "
            "set_adapter, or join them first with add_weighted_adapter"
        )
    if tokenizer is None:
        raise ConfigurationError("the model has no tokenizer beside it: give tokenizer too")


def _save_adapter(model: Any, folder: Path, found: _Trained, base_model: str, dataset: str) -> None:
    """Save the active adapter as peft does, with the base model's config, for `Predictor.load`, tokenizer and card."""
    [name] = model.active_adapters
    model.save_pretrained(folder, selected_adapters=[name])
    if name != "default":  # peft saves it in a folder of its name, where it would not be found
        for path in (folder / name).iterdir():
            path.replace(folder / path.name)
        (folder / name).rmdir()
    share_weights(folder)
    save_base_config(model, folder / BASE_CONFIG)
    save_tokenizer(found.tokenizer, folder)
    card = model_card(found.facts, base_model, holds="adapter", dataset=dataset)
    (folder / CARD).write_text(card, encoding="utf-8")  # instead of peft's template
    for path in folder.rglob(CONFIG_NAME):
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"base_model_name_or_path": base_model}, indent=2) + "\n")


def write_card(result: FinetuneResult) -> None:
    """Write the model card of a run into the folder of its model or adapter, in place of peft's template."""
    adapted = isinstance(result.model, PeftModel)
    found = _trained_by_finetune(result, None, None, result.evaluated_on)
    card = model_card(
        found.facts, result.base_model or "unknown", holds="adapter" if adapted else "model", dataset=result.dataset
    )
    (result.model_dir / CARD).write_text(card, encoding="utf-8")
