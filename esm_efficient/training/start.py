"""The model that a run begins with, with the head of its task."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from esm_efficient.adapters.prepare import freeze
from esm_efficient.adapters.quantization import quantization_config
from esm_efficient.adapters.registry import check_encoder_weights, find_architecture, is_in_head
from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.heads import model_class, pooling_of, pooling_of_model, set_pooling
from esm_efficient.inference.loading import load_tokenizer_of
from esm_efficient.published import available, hub_name, refuse_adapter
from esm_efficient.recipes import RECIPES, Recipe, with_possible_pooling
from esm_efficient.saving import load_pretrained
from esm_efficient.tasks import Pooling, Task, auto_class, head_of, head_of_config
from esm_efficient.training.standardizing import CONFIG_NAME as LABEL_SCALE
from esm_efficient.training.standardizing import find_output_layer
from esm_efficient.trunk.split import truncate

logger = logging.getLogger(__name__)

_KINDS = {"sequence-classification": "sequences", "token-classification": "residues"}
"""What a head predicts for, by its kind."""

_OTHER_LABELS = "the head of %s predicts %s, and the labels are %s: a new output layer is trained"

_PLAIN_OPTIONS = {"preset", "r", "layers", "target_modules", "lora_alpha", "lora_dropout", "use_rslora"}
"""Options of adapters that neither read the model's weights nor train any of them."""


def starting_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Task,
    recipe: Recipe,
    *,
    half: torch.dtype | None = None,
    adapter_options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Return a model with the head of a task, its tokenizer, and whether the head predicts numbers in their unit.

    Args:
        model: a folder, a Hub name, a size, or a loaded model.
        tokenizer: required with a loaded model only.
        task: the task.
        recipe: the recipe, which says what trains and what the head reads.
        half: the half precision in which the run holds what does not train. It is loaded in this dtype, so that the
            host never has it in float32.
        adapter_options: options that override those of the recipe's adapters.
        device: where quantised weights go; other weights are loaded into the memory of the host.

    Raises:
        ConfigurationError: there is no such model, or it does not fit the task or the recipe.
    """
    if isinstance(model, str | Path):
        name = hub_name(str(model))
        # Other adapters than LoRA's original form may read the weights, or train some of them.
        plain = not recipe.preset or (adapter_options or {}).keys() <= _PLAIN_OPTIONS
        quantized: dict[str, Any] = {}
        if recipe.quantization:
            how = quantization_config(recipe.quantization, dtype=half)
            quantized = {"quantization_config": how, "device_map": {"": device}}
        # Which layers train is known only of those that are kept.
        plain = plain and not (recipe.keep_layers and recipe.trains == "full")
        with available(name):
            loaded, tokenizer, has_unit = _load_pretrained(
                name, tokenizer, task, recipe, half if plain else None, quantized
            )
        return _kept(loaded, recipe), tokenizer, has_unit
    if recipe.quantization and not getattr(model, "is_quantized", False):
        raise ConfigurationError(
            f"quantization={recipe.quantization!r} with a loaded model that is not quantised: give the folder or the "
            "name of the model, or load it with from_pretrained(..., quantization_config=quantization_config(...))"
        )
    if not isinstance(model, PreTrainedModel):
        raise ConfigurationError(
            f"model is a {type(model).__name__}: expected a folder, a Hub name, or a model of transformers. Train "
            "another model with prepare_model and WeightedTrainer"
        )
    if tokenizer is None:
        raise ConfigurationError("model is a loaded model, which has no tokenizer: give tokenizer too")
    if head_of(model) != task.head:
        raise ConfigurationError(
            f"{type(model).__name__} has no head for {task.describe()}: expected a model of "
            f"{auto_class(task.head).__name__}.from_pretrained(..., num_labels={len(task.names)}), or give the folder "
            "or the name of the model, so that the head is made"
        )
    config: Any = model.config
    found = pooling_of_model(model)
    pooling = with_possible_pooling(recipe, task.head, config.model_type, found).pooling
    # The pooling of a recipe of your own may be the default of `Recipe`, which nobody chose.
    if pooling != found and (recipe.name in RECIPES or pooling != "first"):
        raise ConfigurationError(
            f"the head of {type(model).__name__} has the pooling {found!r}, and the recipe has {pooling!r}: expected "
            "the same. Give the folder or the name of the model, so that the head is made, or the recipe's pooling to "
            "PooledEsmForSequenceClassification.from_pretrained(..., classifier_pooling=...)"
        )
    set_pooling(config, found)
    if config.problem_type not in (None, task.problem_type):
        raise ConfigurationError(f"the model is for {config.problem_type}, but the labels are {task.describe()}")
    config.problem_type = task.problem_type
    _follow_labels(model, tokenizer, _label_names(config), task, type(model).__name__, others="keep")
    return _kept(model, recipe), tokenizer, _forget_labels(config)


def _kept(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Return a model with the layers that a recipe keeps."""
    if recipe.keep_layers is None:
        return model
    if recipe.keep_layers > (count := model.config.num_hidden_layers):
        raise ConfigurationError(f"keep_layers={recipe.keep_layers}: expected 1 to {count} layers to keep")
    return truncate(model, recipe.keep_layers)


def name_of_model(model: Any) -> str:
    """Return the Hub name or the whole path of the model that a run begins with; empty if it is not known.

    Raises:
        ConfigurationError: it is the folder of an adapter, or a folder without a model.
    """
    if isinstance(model, str | Path):
        refuse_adapter(str(model))
        name = hub_name(str(model))
    else:
        name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def _load_pretrained(
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Task,
    recipe: Recipe,
    half: torch.dtype | None,
    quantized: Mapping[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a model with the head of a task, which is new unless the checkpoint has one of this size."""
    config = AutoConfig.from_pretrained(name)
    pooling = with_possible_pooling(recipe, task.head, config.model_type).pooling
    was_regressor = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    names = _label_names(config)
    _forget_labels(config)
    _tell_of_new_head(config, name, task, pooling)
    set_pooling(config, pooling)
    # In this order: one label of a single-label problem is refused.
    config.problem_type = task.problem_type
    config.num_labels = len(task.names)
    kind = model_class(task.head, pooling)
    original, kind = (None, kind) if half is None else _with_trained_parts(kind, config, recipe)
    try:
        loaded, missing, mismatched = load_pretrained(
            kind, name, config=config, dtype=half or torch.float32, ignore_mismatched_sizes=True, **quantized
        )
    except SafetensorError as error:
        raise ConfigurationError(f"the safetensors of the model {name} cannot be loaded: {error}") from error
    if original is not None:
        loaded.__class__ = original
        loaded.config.dtype = torch.float32  # that of the checkpoint's values, as before this run held them in half
    new = (*missing, *mismatched)
    check_encoder_weights(loaded, new, name)
    architecture = find_architecture(loaded)
    has_head = not any(is_in_head(architecture, key) for key in new)
    tokenizer = tokenizer or load_tokenizer_of(name)
    if any(is_in_head(architecture, key) for key in mismatched):
        logger.warning(_OTHER_LABELS, name, listing(names), listing(task.names))
    elif has_head:
        both_are_numbers = was_regressor and task.kind == "regression"
        _follow_labels(loaded, tokenizer, names, task, name, others="keep" if both_are_numbers else "replace")
    return loaded, tokenizer, was_regressor and has_head


def _label_names(config: Any) -> tuple[str, ...]:
    """Return the names of the labels of a config in their order."""
    return tuple(str(label) for _, label in sorted(config.id2label.items()))


def _tell_of_new_head(config: Any, name: str | Path, task: Task, pooling: Pooling) -> None:
    """Say that a head of another kind than the run's is not used, if the checkpoint has one."""
    before = head_of_config(config)
    if before not in _KINDS:
        return
    if before != task.head:
        logger.warning(
            "the head of %s is for %s, and the labels are for %s: a new head is trained",
            *(name, _KINDS[before], _KINDS[task.head]),
        )
    elif before == "sequence-classification" and pooling_of(config) != pooling:
        logger.warning(
            "the head of %s has the pooling %r, and the recipe has %r: a new head is trained",
            *(name, pooling_of(config), pooling),
        )


def _follow_labels(
    model: Any,
    tokenizer: Any,
    names: tuple[str, ...],
    task: Task,
    source: str | Path,
    *,
    others: Literal["replace", "keep"],
) -> None:
    """Give the output layer of a model the order of the labels of a task, if it has the same labels.

    Labels without names of their own are taken as they are; so are numbers, which have the name of a column.

    Args:
        model: the model, which has the output layer.
        tokenizer: its tokenizer.
        names: the names of the labels of the layer.
        task: the task.
        source: the name of the model, for messages.
        others: whether a layer for other labels is initialised again or kept; a warning says so.

    Raises:
        ConfigurationError: the head does not end in a linear layer with a bias.
    """
    if names == task.names or all(re.fullmatch(r"LABEL_\d+", label) for label in names):
        return
    is_same = sorted(names) == sorted(task.names)
    if not is_same and others == "keep":
        if task.kind != "regression":
            logger.warning(
                "%s predicts %s, and the labels are %s: they are taken in this order",
                *(source, listing(names), listing(task.names)),
            )
        return
    layer = find_output_layer(model, tokenizer)
    if layer is None:
        raise ConfigurationError(
            f"the head of {source} predicts {listing(names)}, and the labels are {listing(task.names)}: its last layer "
            "is not a linear layer with a bias, whose rows could follow them. Give the labels in the order of the model"
        )
    with torch.no_grad():
        if is_same:
            logger.info("the labels of %s have another order: its output layer follows that of the data", source)
            rows = [names.index(label) for label in task.names]
            layer.weight.copy_(layer.weight[rows])
            layer.bias.copy_(layer.bias[rows])
        else:
            logger.warning(_OTHER_LABELS, source, listing(names), listing(task.names))
            layer.weight.normal_(std=getattr(model.config, "initializer_range", 0.02))
            layer.bias.zero_()


def _with_trained_parts(auto: Any, config: Any, recipe: Recipe) -> tuple[Any, Any]:
    """Return the class of a model, and one that has what a recipe trains in float32, whatever dtype it is loaded in.

    transformers loads a weight in the dtype that the class gives it, and initialises a missing one in it.
    """
    with torch.device("meta"):
        model = auto.from_config(config)
    freeze(model, head_only=recipe.trains != "full", layers=recipe.layers if recipe.trains == "full" else "all")
    kind: Any = type(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def make(self: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **options)
        for name in trained:
            parameter = self.get_parameter(name)
            parameter.data = parameter.data.to(torch.float32)

    return kind, type(kind.__name__, (kind,), {"__module__": kind.__module__, "__init__": make})


def _forget_labels(config: Any) -> bool:
    """Remove what a former training has written about its labels; return whether it was the scale of numbers."""
    scale = vars(config).pop(LABEL_SCALE, None)
    vars(config).pop("label_thresholds", None)
    return scale is not None
