"""Which layers of which architecture play which role: architecture -> role -> module path suffix.

A suffix is matched as peft matches ``target_modules``: whole path components from the right. None of them names the
contact head, which no task but contact prediction reads, or a classification head, which is trained in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esm_efficient.errors import TargetModuleError

if TYPE_CHECKING:
    from torch import nn

ATTENTION_ROLES = ("query", "key", "value", "attention_output")
MLP_ROLES = ("intermediate", "output")
ROLES = ATTENTION_ROLES + MLP_ROLES

PRESETS: dict[str, tuple[str, ...]] = {
    "qkv": ("query", "key", "value"),
    "attention": ATTENTION_ROLES,
    "mlp": MLP_ROLES,
    "all-linear": ROLES,
}
"""Named sets of roles to adapt."""


@dataclass(frozen=True)
class Architecture:
    """What the library knows of one encoder architecture.

    Attributes:
        name: of the entry.
        encoder: class name of the encoder inside any task model.
        layers: path suffix of the list of layers.
        roles: role to the path suffix of its linear layer.
        unread: path suffixes of modules that training never reads; they are frozen.
        heads: path suffixes of the heads; beside adapters a classifier trains in full and a language-model head not.
    """

    name: str
    encoder: str
    layers: str
    roles: Mapping[str, str]
    unread: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="esm",
        encoder="EsmModel",
        layers="encoder.layer",
        roles={
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "attention_output": "attention.output.dense",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
        },
        unread=("contact_head",),
        heads=("classifier", "lm_head"),
    ),
)


def ends_with(path: str, suffix: str) -> bool:
    """Whether a module path ends with a suffix of whole components.

    Example:
        >>> ends_with("esm.encoder.layer.0.output.dense", "output.dense"), ends_with("a.my_dense", "dense")
        (True, False)
    """
    return path == suffix or path.endswith("." + suffix)


def find_architecture(model: nn.Module) -> Architecture:
    """The registry's entry for a model, with any head and with or without adapters.

    Raises:
        TargetModuleError: no entry knows the model; the message lists its linear layers by suffix.
    """
    classes = {parent.__name__ for module in model.modules() for parent in type(module).__mro__}
    for architecture in ARCHITECTURES:
        if architecture.encoder in classes:
            return architecture
    suffixes = sorted({name.rsplit(".", 1)[-1] for name, _ in linear_layers(model)})
    raise TargetModuleError(
        f"{type(model).__name__} is of no known architecture ({', '.join(a.encoder for a in ARCHITECTURES)}). Give "
        f"target_modules yourself; the linear layers of this model end with: {', '.join(suffixes)}"
    )


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The encoder's layers, first to last; none if the architecture is not known."""
    try:
        suffix = find_architecture(model).layers
    except TargetModuleError:
        return []
    return [layer for path, module in model.named_modules() if ends_with(path, suffix) for layer in module.children()]


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every linear layer; adapters' own layers are left out."""
    from torch import nn

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part.startswith("lora_") for part in name.split("."))
    ]


def is_unread(architecture: Architecture, path: str) -> bool:
    """Whether a module or parameter lies in a part that training never reads."""
    return any(f".{suffix}." in f".{path}." for suffix in architecture.unread)
