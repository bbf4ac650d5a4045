"""Match adapter targets against a model, and make a peft `LoraConfig` from them.

peft ignores a target that matches no layer if another target matches one. Here a target without a match is an error
that suggests a correction.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esm_efficient.adapters.registry import (
    ARCHITECTURES,
    PRESETS,
    Architecture,
    encoder_layers,
    ends_with,
    find_architecture,
    is_in_head,
    is_unread,
    linear_layers,
)
from esm_efficient.errors import ConfigurationError, TargetModuleError, listing, nearest
from esm_efficient.recipes import Recipe, get_recipe, select_layers
from esm_efficient.tasks import peft_task_type

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetMatch:
    """Paths of the layers that one target matches, without excluded ones."""

    target: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class TargetReport:
    """The layers that a set of targets matches in a model.

    Attributes:
        matches: one entry per target, in the order given. With user-given suffixes one layer may appear under several;
            with a preset, under exactly one.
        excluded: suffixes of layers that a target matches but that must get no adapter.
    """

    matches: tuple[TargetMatch, ...]
    excluded: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Each matched path once, in the order of the first match."""
        return tuple(dict.fromkeys(path for match in self.matches for path in match.modules))

    def __str__(self) -> str:
        width = max(len(match.target) for match in self.matches)
        lines = [
            f"{match.target:<{width}}  {len(match.modules):>3} layers, e.g. {match.modules[0]}"
            for match in self.matches
        ]
        return "\n".join([*lines, f"{len(self.modules)} layers in all"])


def resolve_targets(
    model: nn.Module, targets: str | Sequence[str] = "all-linear", *, layers: str | Sequence[int] = "all"
) -> TargetReport:
    """Match a preset, or a list of path suffixes as in peft, against a model.

    Args:
        model: a transformers model, with any head.
        targets: ``"qkv"``, ``"attention"``, ``"mlp"``, ``"all-linear"``, or path suffixes such as ``["query"]``.
        layers: the encoder layers to match in, as `esm_efficient.recipes.select_layers` reads them.

    Returns:
        The layers that each target matches.

    Raises:
        TargetModuleError: a target matches no layer, or a layer that no training loss uses, such as the contact head;
            or a preset or `layers` is given for an encoder that is not in the registry.
        ConfigurationError: the preset is unknown, the list is empty, or the encoder has no such layers.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> len(resolve_targets(model, "qkv").modules)
        12
    """
    paths = [path for path, _ in linear_layers(model)]
    if layers != "all":
        chosen_layers = tuple(f".{prefix}." for prefix in _layer_paths(model, layers))
        paths = [path for path in paths if any(prefix in f".{path}" for prefix in chosen_layers)]
    excluded: tuple[str, ...] = ()
    if isinstance(targets, str):
        if targets not in PRESETS:
            raise ConfigurationError(
                f"unknown preset {targets!r}: expected one of {', '.join(PRESETS)}, or a list of path suffixes"
            )
        architecture = find_architecture(model)
        chosen = architecture.suffixes(*PRESETS[targets])
        excluded = _shadowed(architecture, chosen)
        matched = {suffix: [path for path in paths if _role_suffix(architecture, path) == suffix] for suffix in chosen}
    else:
        if not targets:
            raise ConfigurationError("the list of target modules is empty: expected at least one path suffix")
        if wrong := [target for target in targets if not isinstance(target, str)]:
            raise ConfigurationError(f"target modules: got {wrong[0]!r}: expected path suffixes such as 'query'")
        matched = {target: [path for path in paths if ends_with(path, target)] for target in targets}
    matches = tuple(TargetMatch(target, tuple(found)) for target, found in matched.items())
    _check(model, matches, paths)
    return TargetReport(matches, excluded)


def lora_config(
    model: nn.Module,
    *,
    preset: str = "all-linear",
    r: int = 8,
    target_modules: Sequence[str] | None = None,
    layers: str | Sequence[int] = "all",
    lora_alpha: int | None = None,
    lora_dropout: float = 0.0,
    **peft_options: Any,
) -> LoraConfig:
    """Return a peft `LoraConfig` after checking that its targets exist in the model.

    Args:
        model: the model that will get the adapters; it is not changed.
        preset: the layers to adapt, as `resolve_targets` names them; ignored if `target_modules` is given.
        r: rank.
        target_modules: path suffixes instead of a preset; they are checked too.
        layers: the encoder layers to adapt, as `esm_efficient.recipes.select_layers` reads them.
        lora_alpha: scale; 2 `r` if None.
        lora_dropout: dropout on the input of each adapter. Above zero, the backward pass needs a copy of each input.
        **peft_options: further options of `peft.LoraConfig`.

    Returns:
        The config. A classification head trains in full and is saved with the adapter.

    Raises:
        TargetModuleError: as `resolve_targets`; or a key of ``rank_pattern`` or ``alpha_pattern`` matches no layer that
            gets an adapter, or a name in ``modules_to_save`` no module.
        ConfigurationError: the preset or an option is unknown, ``exclude_modules`` is a pattern and the preset needs a
            list, ``modules_to_save`` is a text, `layers` and ``layers_to_transform`` are both given, or the model lacks
            one of the latter.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> lora_config(model, preset="qkv", r=4, use_rslora=True).lora_alpha
        8
    """
    from peft import EvaConfig, LoraConfig

    if unknown := [name for name in peft_options if name not in (known := LoraConfig.__dataclass_fields__)]:
        advice = nearest(unknown[0], known, "an option of peft.LoraConfig")
        raise ConfigurationError(f"adapters have no option {unknown[0]!r}{advice}")
    report = resolve_targets(model, preset if target_modules is None else target_modules, layers=layers)
    logger.info("LoRA targets\n%s", report)
    _check_names(model, report, peft_options)
    if layers != "all" and peft_options.get("layers_to_transform") is not None:
        raise ConfigurationError(
            f"layers={layers!r} and layers_to_transform={peft_options['layers_to_transform']!r} both choose layers: "
            "give one of them. A recipe has its own layers; layers=[...] replaces them"
        )
    if "layers_pattern" not in peft_options:
        _check_layer_numbers(model, peft_options.get("layers_to_transform"))
    if report.excluded:
        given = peft_options.pop("exclude_modules", None) or []
        if isinstance(given, str):
            raise ConfigurationError(
                f"exclude_modules={given!r} is a pattern, but the preset {preset!r} extends it as a list: expected a "
                "list of suffixes, or target_modules instead of the preset"
            )
        peft_options["exclude_modules"] = [*given, *report.excluded]
    if peft_options.get("modules_to_save"):
        peft_options["modules_to_save"] = names_to_save(peft_options)  # a copy, because peft adds to it
    peft_options.setdefault("task_type", peft_task_type(model))
    if peft_options["task_type"] is None and (heads := _heads_unknown_to_peft(model)):
        peft_options.setdefault("modules_to_save", heads)
    if peft_options.get("init_lora_weights") == "eva":
        peft_options.setdefault("eva_config", EvaConfig())
    matched = [match.target for match in report.matches]
    if layers != "all" and all(path.split(".")[1].isdigit() for path in report.modules):
        matched = list(report.modules)  # peft finds no layer number in a path that begins with the list of layers
    elif layers != "all":
        peft_options["layers_to_transform"] = list(select_layers(layers, len(encoder_layers(model))))
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=matched,
        **peft_options,
    )


def recipe_adapters(recipe: str | Recipe, model: nn.Module, **options: Any) -> LoraConfig | None:
    """Return a recipe's adapters for a model: a peft `LoraConfig`, or None for a recipe without adapters.

    Args:
        recipe: a name or a `Recipe`.
        model: the model that will get the adapters.
        **options: options of `lora_config` that override those of the recipe.

    Raises:
        ConfigurationError: the recipe is unknown, options are given for a recipe without adapters, or as `lora_config`.
        TargetModuleError: as `lora_config`.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient import demo_model_path, recipe_adapters
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> recipe_adapters("lora", model).r
        8
        >>> print(recipe_adapters("frozen", model))
        None
    """
    chosen = get_recipe(recipe)
    if chosen.preset is None:
        if options:
            raise ConfigurationError(
                f"a recipe that trains {chosen.trains!r} has no adapters: leave out {', '.join(options)}"
            )
        return None
    return lora_config(model, **{"preset": chosen.preset, "r": chosen.r, "layers": chosen.layers, **options})


def _layer_paths(model: nn.Module, layers: str | Sequence[int]) -> list[str]:
    """Return the ends of the paths of the chosen encoder layers."""
    architecture = find_architecture(model)
    return [f"{architecture.layers}.{number}" for number in select_layers(layers, len(encoder_layers(model)))]


def _shadowed(architecture: Architecture, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """Return suffixes of roles not chosen that end with a chosen one ("attention.output.dense" with "output.dense")."""
    others = [suffix for suffix in architecture.suffixes() if suffix not in chosen]
    return tuple(other for other in others if any(ends_with(other, suffix) for suffix in chosen))


def _role_suffix(architecture: Architecture, path: str) -> str | None:
    """Return the suffix of a layer's role: the longest that matches."""
    return max((suffix for suffix in architecture.suffixes() if ends_with(path, suffix)), key=len, default=None)


def _check(model: nn.Module, matches: tuple[TargetMatch, ...], layers: list[str]) -> None:
    """Refuse targets that match no layer or an unused one; warn of targets that also match layers of a head."""
    if empty := [match.target for match in matches if not match.modules]:
        advice = "\n".join(f"  {target}: {_suggestion(model, target, layers)}" for target in empty)
        raise TargetModuleError(f"{len(empty)} of {len(matches)} target modules match no linear layer:\n{advice}")
    try:
        architecture = find_architecture(model)
    except TargetModuleError:
        return  # the heads of an unknown architecture are unknown too
    for match in matches:
        if unread := [path for path in match.modules if is_unread(architecture, path)]:
            raise TargetModuleError(
                f"target {match.target!r} matches {unread[0]}, which no training loss uses: an adapter there would "
                "get no gradient. Leave it out"
            )
        if in_head := [path for path in match.modules if is_in_head(architecture, path)]:
            logger.warning(
                "target %r also matches %s: a head needs no adapter. Use a longer suffix, such as 'output.dense', to "
                "leave it out",
                match.target,
                ", ".join(in_head),
            )


def _suggestion(model: nn.Module, target: str, layers: list[str]) -> str:
    """Return advice for a target without a match."""
    owner, _, child = target.rpartition(".")
    inside = [
        f"{path}.{child}"
        for path, module in model.named_modules()
        if owner and type(module).__name__ == owner and f"{path}.{child}" in layers
    ]
    if inside:
        try:
            architecture = find_architecture(model)
        except TargetModuleError:
            return f"{owner} is a class, and peft matches paths such as {inside[0]!r}"
        reason = f"{owner} is a class, and peft matches paths: "
        if is_unread(architecture, inside[0]):
            return reason + "leave it out, no training loss uses it"
        if is_in_head(architecture, inside[0]):
            return reason + "leave it out, a head needs no adapter"
        return reason + f"use {_role_suffix(architecture, inside[0])!r}"
    if any(path.endswith(".base_layer") for path in layers):
        return "the model has adapters already: give the model before it was wrapped, or model.unload()"
    return _similar(target, layers)


def _similar(target: str, paths: Sequence[str]) -> str:
    """Return the ends of some paths that are most like a target, as advice."""
    suffixes = sorted({".".join(path.split(".")[-n:]) for path in paths for n in (1, 2, 3)})
    close = difflib.get_close_matches(target, suffixes, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "no layer of the model has a similar name"


_PEFT_HEADS = ("classifier", "score")
"""What peft itself adds to ``modules_to_save`` of a classifier, whichever of them it has."""


def _check_names(model: nn.Module, report: TargetReport, peft_options: Mapping[str, Any]) -> None:
    """Refuse names of peft's options that match nothing, which peft ignores; they are matched as peft matches them."""
    for option in ("rank_pattern", "alpha_pattern"):
        for key in peft_options.get(option) or ():
            try:
                pattern = re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise TargetModuleError(f"{option}: {key!r} is not a regular expression: {error}") from error
            if not any(map(pattern.match, report.modules)):
                advice = _similar(key, report.modules)
                raise TargetModuleError(f"{option}: {key!r} matches no layer that gets an adapter: {advice}")
    modules = [path for path, _ in model.named_modules()]
    for name in names_to_save(peft_options):
        if name not in _PEFT_HEADS and not any(path.endswith(name) for path in modules):
            raise TargetModuleError(f"modules_to_save: {name!r} matches no module: {_similar(name, modules)}")


def _check_layer_numbers(model: nn.Module, given: int | Sequence[int] | None) -> None:
    """Refuse numbers of layers that the model does not have: peft passes over them if it has one of the others."""
    numbers = [] if given is None else [given] if isinstance(given, int) else list(given)
    if not numbers:
        return
    count = len(encoder_layers(model))
    if wrong := [number for number in numbers if not 0 <= number < count]:
        raise ConfigurationError(
            f"layers_to_transform has {listing(list(map(str, wrong)))}: the model has the layers 0 to {count - 1}"
        )


def names_to_save(peft_options: Mapping[str, Any]) -> list[str]:
    """Return the names in ``modules_to_save``, of modules that train in full.

    Raises:
        ConfigurationError: it is a text.
    """
    names = peft_options.get("modules_to_save") or ()
    if isinstance(names, str):
        raise ConfigurationError(f"modules_to_save={names!r} is a text: expected a list of names, [{names!r}]")
    return list(names)


def _heads_unknown_to_peft(model: nn.Module) -> list[str]:
    """Return the names of a model's heads, without a language-model head, which is pretrained and stays frozen."""
    children = dict(model.named_children())
    known = {head for architecture in ARCHITECTURES for head in architecture.heads}
    return [name for name in children if name in known and name not in ("lm_head", "sequence_head")]
