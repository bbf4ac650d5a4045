"""Find and load a fine-tuned model: a whole model, or an adapter and its base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.inference import foreign
from esm_efficient.saving import load_pretrained
from esm_efficient.tasks import Task, auto_class, head_of_config

_HUB_FILES = ("*.safetensors", "*.json", "*.txt")
"""The files to download from the Hub: weights, configs and vocabulary, and never a pickle."""

_LOAD_ERRORS = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""What transformers and peft raise for files that do not fit together."""


def load_model(
    name_or_path: str | Path, *, revision: str | None, cache_dir: str | Path | None, task: Task | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a fine-tuned model, merged with its adapter if it has one, and its tokenizer; see `Predictor.load`.

    Raises:
        ConfigurationError: the files are missing, do not fit together, or lack the head or the label names.
    """
    folder = find_folder(name_or_path, revision, cache_dir)
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, cache_dir, task)
    config = foreign.read_config(folder)
    shapes = _shapes_of(folder)
    _set_task(config, task, folder)
    foreign.check_sizes(config, shapes, folder)
    return _load_whole(folder, config, {}), _load_tokenizer(folder)


def _load_adapter(
    folder: Path, cache_dir: str | Path | None, task: Task | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an adapter and its base model, which is merged with it."""
    from peft import PeftModel

    weights = folder / foreign.ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ConfigurationError(f"{folder} has no {weights.name}, and pickled weights are not read")
    shapes = foreign.weight_shapes(weights)
    adapter = foreign.adapter_config(folder, shapes)
    record = foreign.read_json(folder / "adapter_config.json")
    has_config = (folder / "base_config").is_dir()
    if not has_config and task is None:
        raise ConfigurationError(
            f"{folder} has no base_config/ with the task and the label names: peft saved the adapter without them. Say "
            'what it predicts, such as Predictor.load(..., task=Task("single_label_classification", ("no", "yes"))), '
            "or save the model with export_model"
        )
    config = foreign.read_config(folder / "base_config") if has_config else None
    base = _base_folder(record, folder, cache_dir)
    if config is None:
        config = foreign.read_config(base)
    _set_task(config, task, folder)
    foreign.check_sizes(config, _shapes_of(base) | {f"adapter {name}": shape for name, shape in shapes.items()}, folder)
    model = _load_whole(base, config, shapes, adapter_folder=folder)
    modules = dict(model.named_modules())
    if unknown := [path for path in adapter.target_modules or () if path not in modules]:
        raise ConfigurationError(f"the adapter {folder} is for layers that {base} does not have: {listing(unknown)}")
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder), config=adapter)
    except _LOAD_ERRORS as error:
        raise ConfigurationError(f"the adapter {folder} does not fit its base model {base}: {error}") from error
    has_vocabulary = (folder / "tokenizer_config.json").is_file() or (folder / "vocab.txt").is_file()
    return adapted.merge_and_unload(), _load_tokenizer(folder if has_vocabulary else base)


def _base_folder(record: Mapping[str, Any], folder: Path, cache_dir: str | Path | None) -> Path:
    """Return the folder of an adapter's base model, which is downloaded if it is on the Hub."""
    base, revision = record.get("base_model_name_or_path"), record.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise ConfigurationError(
            f"{folder / 'adapter_config.json'} does not name its base model: expected its Hub name or folder in "
            f"base_model_name_or_path, got {base!r:.80}"
        )
    try:
        return find_folder(base, revision, cache_dir)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"the base model {base!r} of the adapter {folder} is not available: {error}. Write its folder or its Hub "
            "name into base_model_name_or_path of adapter_config.json"
        ) from error


def _shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    paths = sorted(path for path in folder.glob("*.safetensors") if path.name != foreign.ADAPTER_WEIGHTS)
    if not paths:
        raise ConfigurationError(f"the folder {folder} has no safetensors with weights, and pickled ones are not read")
    return foreign.weight_shapes(*paths)


def _set_task(config: Any, task: Task | None, folder: Path) -> None:
    """Write a given task into a config, and the kind of head that the model is loaded with."""
    if task is None:
        return
    config.id2label = dict(enumerate(task.names))
    config.label2id = {name: index for index, name in enumerate(task.names)}
    config.problem_type = task.problem_type
    config.architectures = [
        "EsmForTokenClassification" if task.head == "token-classification" else "EsmForSequenceClassification"
    ]


def _load_whole(
    folder: Path, config: PreTrainedConfig, adapter: Mapping[str, Any], *, adapter_folder: Path | None = None
) -> PreTrainedModel:
    """Load the weights of a classifier in float32; a head that neither the files nor the adapter have is refused."""
    # The base config of an adapter may still name the head of the pretrained base model.
    of_tokens = head_of_config(config) == "token-classification"
    auto = auto_class("token-classification" if of_tokens else "sequence-classification")
    try:
        model, missing, _ = load_pretrained(
            auto,
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            # A config may name attention code on the Hub.
            attn_implementation="sdpa",
        )
    except _LOAD_ERRORS as error:
        what = f"the model {folder}" if adapter_folder is None else f"the base model {folder} of {adapter_folder}"
        raise ConfigurationError(f"the safetensors of {what} cannot be loaded: {str(error)[:500]}") from error
    if lost := foreign.missing_weights(missing, adapter):
        raise ConfigurationError(
            f"{adapter_folder or folder} lacks {len(lost)} weights of {type(model).__name__} ({listing(lost)}): it is "
            "a pretrained model without a trained head, or its head was not saved with it, and predictions would be "
            "random. Expected a fine-tuned model, such as finetune or export_model writes; for an adapter of peft, "
            'train with task_type="SEQ_CLS", "TOKEN_CLS" or modules_to_save=["classifier"]'
        )
    return model


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise ConfigurationError(f"{folder} has no tokenizer that can be loaded: {str(error)[:500]}") from error


def find_folder(name_or_path: str | Path, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Return the folder of a model; a model on the Hub is downloaded unless it is in the cache.

    Raises:
        ConfigurationError: there is no such folder, and the name is not that of a model on the Hub or in the cache.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(name_or_path, Path):
        raise ConfigurationError(f"there is no folder {folder}")
    model = repr(name_or_path) if revision is None else f"{name_or_path!r} (revision {revision!r})"
    try:
        return Path(
            snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=list(_HUB_FILES))
        )
    except HFValidationError as error:
        raise ConfigurationError(f"there is no folder {folder}, and a Hub name has the form owner/name") from error
    except LocalEntryNotFoundError as error:
        raise ConfigurationError(
            f"there is no folder {folder}, the cache {cache_dir or constants.HF_HUB_CACHE} has no complete copy of the "
            f"model {model}, and the Hub is not reachable or HF_HUB_OFFLINE is set. Check the name, or download the "
            "model while online"
        ) from error
    except HfHubHTTPError as error:
        raise ConfigurationError(
            f"there is no folder {folder}, and the Hub does not give the model {model}: {error}. Check the name and "
            "the revision; for a private model, log in with `hf auth login`"
        ) from error
