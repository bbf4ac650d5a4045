"""A preset and a model in, a peft `LoraConfig` and a report of every match out.

peft says nothing of a target that matches no layer as long as another one does. Here each target's matches are
counted, and a target without any is an error that names what was probably meant.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esm_efficient.adapters.registry import (
    ARCHITECTURES,
    PRESETS,
    Architecture,
    ends_with,
    find_architecture,
    is_unread,
    linear_layers,
)
from esm_efficient.errors import ConfigurationError, TargetModuleError
from esm_efficient.recipes import Recipe, get_recipe
from esm_efficient.tasks import peft_task_type

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetMatch:
    """The layers that one target matches: paths in the model, without those that are excluded."""

    target: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class TargetReport:
    """What a set of targets matches in a model.

    Attributes:
        matches: one entry a target, in the order given. A layer counts for every target of the user's own that it
            ends with, and for the one role that it plays.
        excluded: suffixes that are left out although a target ends like them.
    """

    matches: tuple[TargetMatch, ...]
    excluded: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Every matched path once, in the order of the first match."""
        return tuple(dict.fromkeys(path for match in self.matches for path in match.modules))

    def __str__(self) -> str:
        width = max(len(match.target) for match in self.matches)
        lines = [
            f"{match.target:<{width}}  {len(match.modules):>3} layers, e.g. {match.modules[0]}"
            for match in self.matches
        ]
        return "\n".join([*lines, f"{len(self.modules)} layers in all"])


def resolve_targets(model: nn.Module, targets: str | Sequence[str] = "all-linear") -> TargetReport:
    """Match a preset, or a list of suffixes as peft takes them, against a model.

    Args:
        model: a transformers model, with any head.
        targets: ``"qkv"``, ``"attention"``, ``"mlp"``, ``"all-linear"``, or path suffixes such as ``"query"``.

    Returns:
        The layers of every target.

    Raises:
        TargetModuleError: a target matches no layer, or one that training never reads, such as the contact head.
        ConfigurationError: no preset has that name.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> len(resolve_targets(model, "qkv").modules)
        12
    """
    layers = [path for path, _ in linear_layers(model)]
    excluded: tuple[str, ...] = ()
    if isinstance(targets, str):
        if targets not in PRESETS:
            raise ConfigurationError(
                f"no preset is named {targets!r}; there are {', '.join(PRESETS)}. Give suffixes as a list"
            )
        architecture = find_architecture(model)
        chosen = [architecture.roles[role] for role in PRESETS[targets]]
        excluded = _shadowed(architecture, chosen)
        found = {suffix: [path for path in layers if _role_suffix(architecture, path) == suffix] for suffix in chosen}
    else:
        if not targets:
            raise ConfigurationError("the list of target modules is empty")
        found = {target: [path for path in layers if ends_with(path, target)] for target in targets}
    matches = tuple(TargetMatch(target, tuple(paths)) for target, paths in found.items())
    _check(model, matches, layers)
    return TargetReport(matches, excluded)


def lora_config(
    model: nn.Module,
    *,
    preset: str = "all-linear",
    r: int = 8,
    target_modules: Sequence[str] | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.0,
    **peft_options: Any,
) -> LoraConfig:
    """A peft `LoraConfig` whose targets are known to exist in the model.

    Args:
        model: the model that will get the adapters; it is not changed.
        preset: which layers; ignored if `target_modules` is given.
        r: rank.
        target_modules: suffixes of your own, checked like a preset.
        lora_alpha: scale; 2 `r` if None.
        lora_dropout: dropout on the input of every adapter. Above zero, a copy of each input is kept for the backward
            pass.
        **peft_options: every other option of `peft.LoraConfig`, passed on as it is.

    Returns:
        The config. The classification head, if the model has one, is trained in full and saved with the adapter.

    Raises:
        TargetModuleError: as `resolve_targets`.
        ConfigurationError: no preset has that name, or ``exclude_modules`` is a pattern beside a preset that needs a
            list.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> from esm_efficient.demo import demo_model_path
        >>> model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
        >>> lora_config(model, preset="qkv", r=4, use_rslora=True).lora_alpha
        8
    """
    from peft import LoraConfig

    report = resolve_targets(model, preset if target_modules is None else target_modules)
    logger.info("LoRA targets\n%s", report)
    if report.excluded:
        given = peft_options.pop("exclude_modules", None) or []
        if isinstance(given, str):
            raise ConfigurationError(
                f"exclude_modules={given!r} is a pattern; the preset {preset!r} needs a list. Give target_modules too"
            )
        peft_options["exclude_modules"] = [*given, *report.excluded]
    peft_options.setdefault("task_type", peft_task_type(model))
    if peft_options["task_type"] is None and (heads := _other_heads(model)):
        peft_options.setdefault("modules_to_save", heads)
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=[match.target for match in report.matches],
        **peft_options,
    )


def recipe_adapters(recipe: str | Recipe, model: nn.Module, **options: Any) -> LoraConfig | None:
    """The adapters of a recipe for a model: a peft `LoraConfig`, or None for a recipe without any.

    Args:
        recipe: a name or a `Recipe`.
        model: the model that will get them.
        **options: of `lora_config`, which win over the recipe's.

    Raises:
        ConfigurationError: no recipe has that name, or options are given to one without adapters.
        TargetModuleError: as `lora_config`.
    """
    chosen = get_recipe(recipe)
    if chosen.preset is None:
        if options:
            raise ConfigurationError(f"recipe {chosen.name!r} has no adapters, so it takes no {', '.join(options)}")
        return None
    return lora_config(model, **{"preset": chosen.preset, "r": chosen.r, **options})


def _shadowed(architecture: Architecture, chosen: list[str]) -> tuple[str, ...]:
    """Suffixes of roles that were not chosen but end like one that was ("attention.output.dense", "output.dense")."""
    others = [suffix for suffix in architecture.roles.values() if suffix not in chosen]
    return tuple(other for other in others if any(ends_with(other, suffix) for suffix in chosen))


def _role_suffix(architecture: Architecture, path: str) -> str | None:
    """The suffix of the role that a layer plays; of two that match, the longer is meant."""
    return max((suffix for suffix in architecture.roles.values() if ends_with(path, suffix)), key=len, default=None)


def _check(model: nn.Module, matches: tuple[TargetMatch, ...], layers: list[str]) -> None:
    """Refuse targets that match nothing or what is never read; warn of those that reach into a head."""
    if empty := [match.target for match in matches if not match.modules]:
        advice = "\n".join(f"  {target}: {_suggest(model, target, layers)}" for target in empty)
        raise TargetModuleError(f"{len(empty)} of {len(matches)} target modules match no linear layer:\n{advice}")
    try:
        architecture = find_architecture(model)
    except TargetModuleError:
        return  # a model of the user's own: there is no list of its heads to check against
    for match in matches:
        if unread := [path for path in match.modules if is_unread(architecture, path)]:
            raise TargetModuleError(
                f"target {match.target!r} matches {unread[0]}, which training never reads: an adapter there would "
                "get no gradient. Leave it out"
            )
        if in_head := [path for path in match.modules if _in_head(architecture, path)]:
            logger.warning(
                "target %r also matches %s: a head needs no adapter. A longer suffix, such as 'output.dense', leaves "
                "it out",
                match.target,
                ", ".join(in_head),
            )


def _suggest(model: nn.Module, target: str, layers: list[str]) -> str:
    """What was probably meant by a target without a match."""
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
        what = f"{owner} is a class, and peft matches paths: "
        if is_unread(architecture, inside[0]):
            return what + "leave it out, training never reads it"
        if _in_head(architecture, inside[0]):
            return what + "leave it out, a head needs no adapter"
        return what + f"use {_role_suffix(architecture, inside[0])!r}"
    suffixes = sorted({".".join(path.split(".")[-n:]) for path in layers for n in (1, 2, 3)})
    close = difflib.get_close_matches(target, suffixes, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "nothing in the model is named like it"


def _in_head(architecture: Architecture, path: str) -> bool:
    return any(f".{head}." in f".{path}." for head in architecture.heads)


def _other_heads(model: nn.Module) -> list[str]:
    """Heads of a model class that peft does not know; a language-model head is pretrained and stays frozen."""
    children = dict(model.named_children())
    known = {head for architecture in ARCHITECTURES for head in architecture.heads}
    return [name for name in children if name in known and name not in ("lm_head", "sequence_head")]
