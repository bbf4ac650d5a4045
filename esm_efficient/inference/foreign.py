"""Checks of a model folder by somebody else, before anything is built from it.

A config can ask for any amount of memory, and peft evaluates the regular expressions of an adapter's config. So every
size is compared with the weights that are there, and the names of the adapted layers come from the weights, not from
patterns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.published import no_model_in
from esm_efficient.tasks import pooling_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MODEL_TYPES = ("esm", "esmc")
"""The ``model_type`` of the configs that are read: ESM-2 with its elder relatives, and ESM C."""
_LARGEST = {"num_labels": 100_000, "max_position_embeddings": 1_000_000}
"""The largest values of sizes for which transformers allocates memory, whatever the weights are."""
_PREFIX = "base_model.model."
_DEFAULT_THRESHOLD = 0.5
"""The probability from which a label is positive, if the model has no tuned threshold for it."""

_KEPT = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias", "modules_to_save")
"""Options of an adapter's config that determine what its weights compute."""

_IGNORED = (
    # They say where the adapters are, which the names of the weights say too.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    # They describe the training, or where the files come from.
    *("init_lora_weights", "lora_dropout", "inference_mode", "base_model_name_or_path", "revision", "peft_version"),
    *("peft_type", "task_type", "auto_mapping", "eva_config", "ensure_weight_tying", "fan_in_fan_out"),
    # They are parts of options that are refused.
    *("qalora_group_size", "megatron_core", "runtime_config"),
)
KEPT_INITIALISATIONS = ("olora", "pissa")
"""Initialisations that also change the base model's weights, so that peft must repeat them."""

_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
_PATH = re.compile(r"\^?(?:[\w.]|\\\.)+\$?")
"""A module path, or its end, as text or as a regular expression that can match only this text."""


def unread_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options of an adapter whose effect is not read when it is loaded, in order."""
    unread = {name for name, value in options.items() if value and name not in {*_KEPT, *_IGNORED}}
    initialisation = options.get("init_lora_weights")
    is_known = isinstance(initialisation, str | bool | None)
    if not is_known or initialisation not in (*_PLAIN_INITIALISATIONS, *KEPT_INITIALISATIONS):
        unread.add("init_lora_weights")
    return sorted(unread)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConfigurationError: the file cannot be read, or is not a JSON object.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {str(error)[:200]}") from error
    if not isinstance(record, dict):
        raise ConfigurationError(f"{path} contains a {type(record).__name__}: expected a JSON object")
    return record


def weight_shapes(*paths: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of safetensors files; only their headers are read.

    Raises:
        ConfigurationError: a file is not in the format.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as handle:
                # safe_open has keys and is no mapping.
                shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{path} cannot be read as safetensors: {error}") from error
    return shapes


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a model's folder, which must be that of an ESM model: ESM-2 or ESM C.

    Raises:
        ConfigurationError: there is none, it is of another kind of model, it asks for code, for quantized weights, for
            an unknown head or for sizes above `_LARGEST`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ConfigurationError(no_model_in(folder))
    record = read_json(path)
    if record.get("model_type") not in _MODEL_TYPES:
        raise ConfigurationError(
            f"{path} is for a model of type {str(record.get('model_type'))[:80]!r}: expected "
            f"{' or '.join(_MODEL_TYPES)}"
        )
    if record.get("quantization_config"):
        raise ConfigurationError(f"{path} is for quantized weights, which are not read: save the model in float32")
    for name, most in _LARGEST.items():
        value: Any = record.get(name)
        if _is_number(value) and value > most:
            raise ConfigurationError(f"{path} has {name}={value:,}: expected at most {most:,}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        names = {int(index): str(name) for index, name in config.id2label.items()}
    except (AttributeError, KeyError, OSError, StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} is not the config of an ESM model: {str(error)[:200]}") from error
    pooling_of(config)
    if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
        raise ConfigurationError(
            f"{path} does not name each label once: id2label has the ids {listing([str(i) for i in names])} and the "
            f"names {listing([repr(name[:80]) for name in names.values()])}"
        )
    return config


def check_sizes(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Refuse a config that describes a larger model than there are weights for.

    Args:
        config: of an ESM model.
        shapes: the shape of every weight, adapters included.
        source: the folder, for the message.

    Raises:
        ConfigurationError: a size is not a positive whole number, or the weights are too few.
    """
    names = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_labels"),
        "max_position_embeddings",
    )
    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in names}
    if wrong := [f"{name}={value!r:.40}" for name, value in sizes.items() if type(value) is not int or value < 1]:
        raise ConfigurationError(f"the config in {source} has {', '.join(wrong)}: expected positive whole numbers")
    width, inner, layers, heads, vocabulary, labels, positions = sizes.values()
    is_gated = config.model_type == "esmc"
    needed = layers * width * (4 * width + (3 if is_gated else 2) * inner) + width * (vocabulary + labels)
    if not is_gated and getattr(config, "position_embedding_type", "") != "rotary":
        needed += positions * width
    there = sum(map(math.prod, shapes.values()))
    if needed > there or width % heads or getattr(config, "head_dim", width // heads) != width // heads:
        raise ConfigurationError(
            f"the config in {source} describes {layers:,} layers of width {width:,} with {heads:,} heads, a vocabulary "
            f"of {vocabulary:,} and {labels:,} labels, which is at least {needed:,} weights, but the files have "
            f"{there:,}: the config and the weights are not of the same model"
        )


def adapter_config(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> LoraConfig:
    """Return the config of an adapter with the names of the layers for which there are weights.

    Args:
        folder: the folder of the adapter.
        shapes: the shape of each of the adapter's weights.

    Raises:
        ConfigurationError: the adapter is not LoRA or has an option that is not read, or the config and the weights
            have different ranks.
    """
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    record = read_json(path)
    if record.get("peft_type") != "LORA":
        raise ConfigurationError(
            f"{path} is for adapters of type {str(record.get('peft_type'))[:80]!r}: expected LORA. Merge other "
            "adapters with merge_and_unload() of peft, and save the merged model with export_model"
        )
    kept = {name: record[name] for name in _KEPT if record.get(name) is not None}
    initialisation = record.get("init_lora_weights")
    if other := [name for name in unread_options(record) if name != "init_lora_weights"]:
        raise ConfigurationError(
            f"{path} has the options {listing([name[:80] for name in other])}, which are not read. Merge the adapter "
            "with merge_and_unload() of peft, and save the merged model with export_model"
        )
    _check_types(kept, path)
    if unread_options(record):
        raise ConfigurationError(
            f"{path} has init_lora_weights={initialisation!r:.40}, which changes the base model's weights at random. "
            "Merge the adapter with merge_and_unload() of peft, and save the merged model with export_model"
        )
    if initialisation in KEPT_INITIALISATIONS:
        kept["init_lora_weights"] = initialisation
    layers = _adapted_layers(shapes)
    if not layers:
        raise ConfigurationError(f"{folder / ADAPTER_WEIGHTS} has no weights of LoRA")
    ranks, scales = _plain_patterns(record, "rank_pattern", path), _plain_patterns(record, "alpha_pattern", path)
    rank, scale = kept.setdefault("r", LoraConfig.r), kept.setdefault("lora_alpha", LoraConfig.lora_alpha)
    for layer, found in layers.items():
        if (told := _value_for(layer, ranks, rank)) != found:
            raise ConfigurationError(f"{path} has rank {told} for {layer}, but its weights have rank {found}")
    scales = {layer: _value_for(layer, scales, scale) for layer in layers}
    return LoraConfig(
        target_modules=sorted(layers),
        rank_pattern={f"^{re.escape(layer)}": found for layer, found in layers.items() if found != rank},
        alpha_pattern={f"^{re.escape(layer)}": found for layer, found in scales.items() if found != scale},
        inference_mode=True,
        task_type=record.get("task_type") if record.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else None,
        **kept,
    )


def _check_types(options: Mapping[str, Any], path: Path) -> None:
    """Refuse kept options that peft would not understand."""
    saved = options.get("modules_to_save", [])
    valid = {
        "r": _is_positive_integer,
        "lora_alpha": _is_number,
        "bias": lambda value: value in ("none", "all", "lora_only"),
        "modules_to_save": lambda _: isinstance(saved, list) and all(isinstance(name, str) for name in saved),
    }
    for name, value in options.items():
        if not valid.get(name, lambda value: isinstance(value, bool))(value):
            raise ConfigurationError(f"{path} has {name}={value!r:.80}, which is not a value of this option")


def _is_positive_integer(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _adapted_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the path of each layer that the weights adapt, and its rank."""
    layers = {}
    for name, shape in shapes.items():
        path, _, kind = name.removeprefix(_PREFIX).partition(".lora_")
        if kind in ("A.weight", "embedding_A") and shape:
            layers[path] = shape[0]
    return layers


def _plain_patterns(record: Mapping[str, Any], name: str, path: Path) -> dict[str, float]:
    """Return a table of module paths and numbers; a key that is another regular expression is refused."""
    patterns = record.get(name) or {}
    is_plain = isinstance(patterns, dict) and all(
        _PATH.fullmatch(key) and _is_number(value) for key, value in patterns.items()
    )
    if not is_plain:
        raise ConfigurationError(
            f"{path} has {name}={str(patterns)!r:.80}: expected numbers by module path. Regular expressions of other "
            "people are not evaluated"
        )
    return patterns


def _value_for(layer: str, patterns: Mapping[str, float], default: Any) -> Any:
    """Return the number of the first pattern that a path ends with, as peft does, or the default."""
    for key, value in patterns.items():
        suffix = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if layer == suffix or (not key.startswith("^") and layer.endswith(f".{suffix}")):
            return value
    return default


def missing_weights(missing: list[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the weights that neither a base model nor its adapter has; the unused contact head does not count."""
    given = {name.removeprefix(_PREFIX) for name in shapes}
    return [name for name in missing if name not in given and "contact_head." not in name]


def label_thresholds(config: PreTrainedConfig, names: tuple[str, ...]) -> np.ndarray:
    """Return the threshold of each label from a model's config, float64 of shape (labels,).

    Raises:
        ConfigurationError: one of them is not a probability.
    """
    tuned = getattr(config, "label_thresholds", None) or {}
    values = [tuned.get(name, _DEFAULT_THRESHOLD) if isinstance(tuned, dict) else None for name in names]
    if any(isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 for value in values):
        raise ConfigurationError(
            f"the model's config has label_thresholds {str(tuned)!r:.200}: expected a probability by label name"
        )
    return np.array(values, dtype=np.float64)
