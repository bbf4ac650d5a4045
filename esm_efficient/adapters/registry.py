"""Which layers of which architecture play which role: architecture -> role -> module path suffix.

A suffix is matched as peft matches ``target_modules``: whole path components from the right. None of them names the
contact head, which no task but contact prediction reads, or a classification head, which is trained in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esm_efficient.errors import ConfigurationError, TargetModuleError

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
        package: the top-level package that defines this class; empty for any. Two packages have an ``ESM2``.
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
    package: str = ""

    def __post_init__(self) -> None:
        if set(self.roles) != set(ROLES):
            raise ConfigurationError(
                f"architecture {self.name!r} has the roles {', '.join(self.roles)}: expected {', '.join(ROLES)}. Where "
                "one layer plays several, such as query, key and value in one, give each of them its path"
            )


ARCHITECTURES: list[Architecture] = [
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
    Architecture(
        name="fair-esm",
        encoder="ESM2",
        package="esm",
        layers="layers",
        roles={
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "attention_output": "self_attn.out_proj",
            "intermediate": "fc1",
            "output": "fc2",
        },
        unread=("contact_head",),
        heads=("lm_head",),
    ),
    Architecture(
        name="esm-c",
        encoder="ESMC",
        package="esm",
        layers="transformer.blocks",
        roles={
            **dict.fromkeys(("query", "key", "value"), "attn.layernorm_qkv.1"),
            "attention_output": "attn.out_proj",
            "intermediate": "ffn.1",
            "output": "ffn.3",
        },
        heads=("sequence_head",),
    ),
]
"""The encoders that are known: transformers' ESM-1b, ESM-1v and ESM-2 and what derives from them, ESM-2 of fair-esm,
and ESM C of EvolutionaryScale's package esm. `register_architecture` adds to them.
"""


def register_architecture(architecture: Architecture) -> None:
    """Make another encoder known, or replace the entry of that name.

    Args:
        architecture: what the library has to know of it.

    Example:
        >>> from esm_efficient.adapters import Architecture, register_architecture
        >>> register_architecture(
        ...     Architecture(
        ...         name="mine",
        ...         encoder="MyEncoder",
        ...         layers="blocks",
        ...         roles={
        ...             "query": "attention.q", "key": "attention.k", "value": "attention.v",
        ...             "attention_output": "attention.out", "intermediate": "mlp.up", "output": "mlp.down",
        ...         },
        ...     )
        ... )
    """
    ARCHITECTURES[:] = [entry for entry in ARCHITECTURES if entry.name != architecture.name] + [architecture]


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
        TargetModuleError: no entry knows the model; the message lists its linear layers by suffix, and how to make it
            known.
    """
    known = {(architecture.encoder, architecture.package): architecture for architecture in ARCHITECTURES}
    for kind in dict.fromkeys(map(type, model.modules())):
        for parent in kind.__mro__:  # the class itself first, so that an entry of its own goes before its parent's
            for package in (parent.__module__.split(".")[0], ""):
                if (parent.__name__, package) in known:
                    return known[parent.__name__, package]
    raise TargetModuleError(
        f"{type(model).__name__} is of no known architecture ({', '.join(a.encoder for a in ARCHITECTURES)}). Give "
        f"target_modules yourself; the linear layers of this model end with: {', '.join(_suffixes(model))}. Or make it "
        "known: register_architecture(Architecture(name=..., encoder=<class name>, layers=<path of their list>, "
        f"roles={{{', '.join(f'{role!r}: ...' for role in ROLES)}}}))"
    )


def _suffixes(model: nn.Module) -> list[str]:
    """How the linear layers end, with numbers of layers left out, and how many end so."""
    counts: dict[str, int] = {}
    for path, _ in linear_layers(model):
        parts = path.split(".")
        # What stands after the number of the layer; a whole path without one.
        last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
        suffix = ".".join(parts[last + 1 :])
        counts[suffix] = counts.get(suffix, 0) + 1
    return [f"{suffix} ({count})" for suffix, count in counts.items()]


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
