"""Find and load a fine-tuned model: a whole model, or an adapter and its base model."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from esm_efficient.adapters.registry import check_encoder_weights
from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.heads import model_class, pooling_of_weights
from esm_efficient.inference import foreign
from esm_efficient.out_of_memory import OutOfMemoryError
from esm_efficient.published import BASE_CONFIG, missing_model, models_beside, no_model_in, size_of
from esm_efficient.reporting import format_bytes
from esm_efficient.saving import Loaded, load_pretrained, without_deprecation
from esm_efficient.tasks import Task, head_of_config, pooling_of, set_pooling
from esm_efficient.trunk.split import truncate

_HUB_FILES = ("*.safetensors", "*.json", "*.txt")
"""The files to download from the Hub: weights, configs and vocabulary, and never a pickle."""

LOAD_ERRORS = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""What transformers and peft raise for files that do not fit together."""


def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    task: Task | None,
    merge: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a fine-tuned model, merged with its adapter if it has one, and its tokenizer; see `Predictor.load`.

    With ``merge=False`` an adapter is not merged: the model is one of peft.

    Raises:
        ConfigurationError: the files are missing, do not fit together, or lack the head or the label names.
    """
    folder = _find_trained(name_or_path, revision, cache_dir)
    if (folder / "adapter_config.json").is_file():
        saved = _read_adapter(folder, cache_dir, task)
        adapted = build_adapted(saved)
        return adapted.merge_and_unload() if merge else adapted, load_tokenizer(saved)
    config = foreign.read_config(folder)
    shapes = _shapes_of(folder)
    _set_task(config, task, folder)
    foreign.check_sizes(config, shapes, folder)
    return _load_whole(folder, config, {}), load_tokenizer_of(folder)


def load_encoder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model without its head, and its tokenizer, with the checks of `load_model`.

    Raises:
        ConfigurationError: files or weights of the encoder are missing, or do not fit together.
    """
    config = foreign.read_config(folder)
    foreign.check_sizes(config, _shapes_of(folder), folder)
    # A pooler that the checkpoint lacks would be random, and so would be what tells this model from others.
    options = {"add_pooling_layer": False} if config.model_type == "esm" else {}
    loaded = _load_weights(AutoModel, folder, config, f"the model {folder}", **options)
    check_encoder_weights(loaded.model, loaded.missing, folder)
    return loaded.model, load_tokenizer_of(folder)


class SavedAdapter(NamedTuple):
    """An adapter in a folder, checked and not loaded.

    Attributes:
        folder: its folder.
        base: the folder of its base model.
        config: the config of the base model with the head that the adapter has.
        adapter: the config of the adapter.
        shapes: name of each of its weights to the shape.
    """

    folder: Path
    base: Path
    config: Any
    adapter: Any
    shapes: Mapping[str, tuple[int, ...]]


def read_adapter(
    name_or_path: str | Path, *, revision: str | None, cache_dir: str | Path | None, task: Task | None
) -> SavedAdapter:
    """Read and check an adapter; the arguments are as in `load_model`.

    Raises:
        ConfigurationError: it is not an adapter, or as `load_model`.
    """
    folder = _find_trained(name_or_path, revision, cache_dir)
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(no_model_in(folder))
        raise ConfigurationError(
            f"{folder} has no adapter_config.json: expected the folder of an adapter, because the members of an "
            "ensemble share one base model"
        )
    return _read_adapter(folder, cache_dir, task)


def _read_adapter(folder: Path, cache_dir: str | Path | None, task: Task | None) -> SavedAdapter:
    weights = folder / foreign.ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ConfigurationError(f"{folder} has no {weights.name}, and pickled weights are not read")
    shapes = foreign.weight_shapes(weights)
    adapter = foreign.adapter_config(folder, shapes)
    record = foreign.read_json(folder / "adapter_config.json")
    has_config = (folder / BASE_CONFIG).is_dir()
    if not has_config and task is None:
        raise ConfigurationError(
            f"{folder} has no base_config/ with the task and the label names: peft saved the adapter without them. Say "
            'what it predicts, such as Predictor.load(..., task=Task("single_label_classification", ("no", "yes"))), '
            "or save the model with export_model"
        )
    config = foreign.read_config(folder / BASE_CONFIG) if has_config else None
    base = _base_folder(record, folder, cache_dir)
    if config is None:
        config = foreign.read_config(base)
        set_pooling(config, pooling_of_weights(shapes))
    _set_task(config, task, folder)
    of_base = _shapes_of(base)
    foreign.check_sizes(config, of_base | {f"adapter {name}": shape for name, shape in shapes.items()}, folder)
    if (base / "config.json").is_file():  # its number of layers is built, of which the adapter may have fewer
        own = foreign.read_config(base)
        own.num_labels = 1
        foreign.check_sizes(own, of_base, base)
    return SavedAdapter(folder, base, config, adapter, shapes)


def build_adapted(saved: SavedAdapter, *, name: str = "default") -> Any:
    """Load the base model of an adapter, and the adapter under a name; it is not merged.

    Raises:
        ConfigurationError: the weights do not fit together.
    """
    from peft import PeftModel

    folder, base, _, adapter, _ = saved
    model = _load_base(saved)
    modules = dict(model.named_modules())
    if unknown := [path for path in adapter.target_modules or () if path not in modules]:
        raise ConfigurationError(f"the adapter {folder} is for layers that {base} does not have: {listing(unknown)}")
    whole: Any = model
    try:
        with without_deprecation():
            return PeftModel.from_pretrained(whole, str(folder), adapter_name=name, config=adapter)
    except LOAD_ERRORS as error:
        raise ConfigurationError(f"the adapter {folder} does not fit its base model {base}: {error}") from error


def _load_base(saved: SavedAdapter) -> PreTrainedModel:
    """Load the base model of an adapter, with the layers that the adapter was trained on."""
    folder, base, config, _, shapes = saved
    kept = config.num_hidden_layers
    count = foreign.read_config(base).num_hidden_layers if (base / "config.json").is_file() else kept
    if count <= kept:
        return _load_whole(base, config, shapes, adapter_folder=folder)
    whole = copy.deepcopy(config)
    whole.num_hidden_layers = count
    return truncate(_load_whole(base, whole, shapes, adapter_folder=folder), kept)


def default_device() -> torch.device:
    """Return the accelerator if there is one; of several ranks on a machine, each has one of its own."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return accelerator
    return torch.device(accelerator.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())


def place(model: Any, device: torch.device | str) -> Any:
    """Move a model to a device.

    Raises:
        OutOfMemoryError: the device has too little memory for it.
        ConfigurationError: the device does not exist here.
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"device={str(device)!r}: torch finds no CUDA device here. Leave it out, or give 'cpu'"
        )
    if target.type == "cuda" and (target.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigurationError(f"device={str(device)!r}: torch finds {count} CUDA device(s), and counts them from 0")
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        size = format_bytes(sum(tensor.nbytes for tensor in model.parameters()))
        raise OutOfMemoryError(
            f"{device} has too little free memory for a model of {size}. Use a smaller model, stop other programs that "
            "use the device, or compute on the CPU: set CUDA_VISIBLE_DEVICES to nothing"
        ) from error


def load_tokenizer(saved: SavedAdapter) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside an adapter, or else that of its base model."""
    return load_tokenizer_of(saved.folder if _has_tokenizer(saved.folder) else saved.base)


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
    kind = (
        model_class("token-classification") if of_tokens else model_class("sequence-classification", pooling_of(config))
    )
    what = f"the model {folder}" if adapter_folder is None else f"the base model {folder} of {adapter_folder}"
    model, missing, _ = _load_weights(kind, folder, config, what)
    if lost := foreign.missing_weights(missing, adapter):
        raise ConfigurationError(
            f"{adapter_folder or folder} lacks {len(lost)} weights of {type(model).__name__} ({listing(lost)}): it is "
            "a pretrained model without a trained head, or its head was not saved with it, and predictions would be "
            "random. Expected a fine-tuned model, such as finetune or export_model writes; for an adapter of peft, "
            'train with task_type="SEQ_CLS", "TOKEN_CLS" or modules_to_save=["classifier"]'
        )
    return model


def _load_weights(kind: Any, folder: Path, config: PreTrainedConfig, what: str, **options: Any) -> Loaded:
    """Load safetensors in float32 into a model of a class of transformers; errors call it `what`."""
    try:
        return load_pretrained(
            kind,
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            # A config may name attention code on the Hub.
            attn_implementation="sdpa",
            **options,
        )
    except LOAD_ERRORS as error:
        raise ConfigurationError(f"the safetensors of {what} cannot be loaded: {str(error)[:500]}") from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.txt"))


def load_tokenizer_of(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or of a Hub name.

    Raises:
        ConfigurationError: there is none, or it cannot be loaded.
    """
    if Path(folder).is_dir() and not _has_tokenizer(Path(folder)):
        raise ConfigurationError(
            f"{folder} has no tokenizer: expected tokenizer_config.json, tokenizer.json or vocab.txt. Copy them from "
            "the model that it was made of"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ConfigurationError(f"{folder} has no tokenizer that can be loaded: {str(error)[:500]}") from error


def _find_trained(name_or_path: str | Path, revision: str | None, cache_dir: str | Path | None) -> Path:
    """As `find_folder`; the name of a published model is refused, because it has no trained head."""
    name = str(name_or_path)
    if (name == "demo" or size_of(name)) and not Path(name).is_dir():
        raise ConfigurationError(
            f"{name} is a pretrained model without a trained head, and its predictions would be random: give the "
            "folder that finetune wrote, such as output/adapter or output/model"
        )
    return find_folder(name_or_path, revision, cache_dir, trained=True)


def find_folder(
    name_or_path: str | Path, revision: str | None, cache_dir: str | Path | None, *, trained: bool = False
) -> Path:
    """Return the folder of a model; a model on the Hub is downloaded unless it is in the cache.

    `trained` says whether a model with a trained head is needed.

    Raises:
        ConfigurationError: there is no such folder, and the name is not that of a model on the Hub or in the cache.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(name_or_path, Path):
        raise ConfigurationError(f"there is no folder {folder}{models_beside(folder)}")
    missing = f"there is no folder {folder}{models_beside(folder)}"
    model = repr(name_or_path) if revision is None else f"{name_or_path!r} (revision {revision!r})"
    try:
        return Path(
            snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=list(_HUB_FILES))
        )
    except HFValidationError as error:
        raise ConfigurationError(missing_model(str(folder), "", trained=trained)) from error
    except LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub is not reachable"
        copy_of = "complete copy" if revision is None else f"complete copy of revision {revision!r}"
        where = f"{cache_dir or constants.HF_HUB_CACHE} has no {copy_of}, and {offline}"
        raise ConfigurationError(missing_model(name_or_path, where, revision=revision, trained=trained)) from error
    except HfHubHTTPError as error:
        raise ConfigurationError(
            f"{missing}, and the Hub does not give the model {model}: {error}. "
            "Check the name and the revision; for a private model, log in with `hf auth login`"
        ) from error
