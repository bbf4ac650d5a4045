"""Show which layers of a model get adapters, from its config alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from esm_efficient.adapters.registry import find_architecture, is_in_head, is_unread, linear_layers
from esm_efficient.adapters.resolve import resolve_targets
from esm_efficient.estimation.inputs import resolve_config
from esm_efficient.reporting.tables import format_table


@dataclass(frozen=True)
class TargetsDescription:
    """What happens to each kind of linear layer of a model.

    Attributes:
        model: name of the model.
        preset: the kinds of layers that get adapters.
        layers: the encoder layers that get adapters.
        rows: the paths of linear layers with the numbers of their encoder layers in braces, such as
            ``esm.encoder.layer.{0-3}.output.dense``; how many they are, and what happens to them.
    """

    model: str
    preset: str
    layers: str | Sequence[int]
    rows: tuple[tuple[str, int, str], ...]

    def __str__(self) -> str:
        table = format_table(self.rows, ("linear layers", "number", "what"))
        return f"{self.model}, preset {self.preset}, layers {self.layers}\n\n{table}"


def describe_targets(
    model: str | Path, *, preset: str = "all-linear", layers: str | Sequence[int] = "all"
) -> TargetsDescription:
    """Return what happens to each kind of linear layer of a classifier, and why.

    Args:
        model: an ESM-2 size such as ``"650M"``, a folder or a Hub name.
        preset: ``"qkv"``, ``"attention"``, ``"mlp"`` or ``"all-linear"``.
        layers: the layers that get adapters, as `esm_efficient.recipes.select_layers` reads them.

    Raises:
        ConfigurationError: the model, the preset or the layers do not exist.
        TargetModuleError: the architecture is unknown.
    """
    from transformers import AutoModelForSequenceClassification

    name, config = resolve_config(model)
    with torch.device("meta"):
        built = AutoModelForSequenceClassification.from_config(config)
    architecture = find_architecture(built)
    chosen = set(resolve_targets(built, preset, layers=layers).modules)
    numbers: dict[tuple[str, str, str], list[int]] = {}
    for path, _ in linear_layers(built):
        before, after, number = _split_at_layer(path, architecture.layers)
        if path in chosen:
            fate = "gets an adapter"
        elif is_unread(architecture, path):
            fate = "frozen: no training loss uses it"
        elif is_in_head(architecture, path):
            fate = "trains in full: it is the head"
        else:
            fate = "frozen: not in the preset or the layers"
        numbers.setdefault((before, after, fate), []).extend(number)
    rows = [
        (f"{before}{{{_ranges(found)}}}{after}" if found else before, max(1, len(found)), fate)
        for (before, after, fate), found in numbers.items()
    ]
    return TargetsDescription(name, preset, layers, tuple(rows))


def _split_at_layer(path: str, layers: str) -> tuple[str, str, list[int]]:
    """Return what is before and after the layer number in a path, and the number; outside of layers, the path alone."""
    match = re.fullmatch(rf"((?:.*\.)?{re.escape(layers)}\.)(\d+)(\..*)", path)
    return (path, "", []) if match is None else (match[1], match[3], [int(match[2])])


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as text, such as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
