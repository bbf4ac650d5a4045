"""The layers of each known architecture: architecture -> role -> module path suffix.

A suffix matches whole path components from the right, as ``target_modules`` of peft does. No suffix names the contact
head, which only contact prediction uses, or a classification head, which trains in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esm_efficient.errors import ConfigurationError, TargetModuleError, listing

if TYPE_CHECKING:
    from pathlib import Path

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
    """Names and paths of one encoder architecture.

    Attributes:
        name: name of the entry.
        encoder: class name of the encoder inside any task model.
        layers: path suffix of the list of layers.
        roles: role -> path suffix of its linear layer, for ``query``, ``key``, ``value``, ``attention_output``,
            ``intermediate`` and ``output``, all of them; or a tuple of suffixes if several layers play it, such as the
            two parallel layers of a gated MLP.
        unread: path suffixes of modules that no training loss uses; they are frozen.
        heads: path suffixes of the heads. With adapters, a classifier trains in full and a language-model head is
            frozen.
        package: the top-level package that defines the class; empty for any. Two packages define an ``ESM2``.

    Raises:
        ConfigurationError: the roles are not those of `ROLES`, or one has no suffix.
    """

    name: str
    encoder: str
    layers: str
    roles: Mapping[str, str | tuple[str, ...]]
    unread: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    package: str = ""

    def __post_init__(self) -> None:
        if set(self.roles) != set(ROLES):
            raise ConfigurationError(
                f"architecture {self.name!r} has the roles {', '.join(self.roles)}: expected {', '.join(ROLES)}. If "
                "one layer computes several, such as query, key and value, give its path for each of them"
            )
        if empty := [role for role in ROLES if "" in self.suffixes(role) or not self.suffixes(role)]:
            raise ConfigurationError(
                f"architecture {self.name!r} has no suffix for {', '.join(empty)}: expected a path suffix, or a tuple "
                "of them"
            )

    def suffixes(self, *roles: str) -> tuple[str, ...]:
        """Return the path suffixes of the linear layers of some roles, each once; without roles, those of all.

        Example:
            >>> next(entry for entry in ARCHITECTURES if entry.name == "esmc").suffixes("intermediate")
            ('mlp.gate_proj', 'mlp.up_proj')
        """
        found = (self.roles[role] for role in roles or ROLES)
        return tuple(dict.fromkeys(s for value in found for s in ((value,) if isinstance(value, str) else value)))


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
        name="esmc",
        encoder="EsmcModel",
        package="transformers",
        layers="layers",
        roles={
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "attention_output": "self_attn.o_proj",
            "intermediate": ("mlp.gate_proj", "mlp.up_proj"),
            "output": "mlp.down_proj",
        },
        heads=("classifier", "score", "lm_head"),
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
"""The known encoders: ESM-1b, ESM-1v, ESM-2 and ESM C of transformers and classes derived from them, ESM-2 of fair-esm,
and ESM C of EvolutionaryScale's package esm. `register_architecture` adds more.
"""


def register_architecture(architecture: Architecture) -> None:
    """Add an encoder to the registry, or replace the entry of the same name.

    Args:
        architecture: names and paths of the encoder.

    Example:
        >>> from esm_efficient.adapters import Architecture, register_architecture
        >>> register_architecture(
        ...     Architecture(
        ...         name="mine",
        ...         encoder="MyEncoder",
        ...         layers="blocks",
        ...         roles={
        ...             "query": "attention.q", "key": "attention.k", "value": "attention.v",
        ...             "attention_output": "attention.out",
        ...             "intermediate": ("mlp.gate", "mlp.up"), "output": "mlp.down",
        ...         },
        ...     )
        ... )
    """
    ARCHITECTURES[:] = [entry for entry in ARCHITECTURES if entry.name != architecture.name] + [architecture]


def ends_with(path: str, suffix: str) -> bool:
    """Return whether a module path ends with a suffix of whole components.

    Example:
        >>> ends_with("esm.encoder.layer.0.output.dense", "output.dense"), ends_with("a.my_dense", "dense")
        (True, False)
    """
    return path == suffix or path.endswith("." + suffix)


def find_architecture(model: nn.Module) -> Architecture:
    """Return the registry's entry for a model, with any head and with or without adapters.

    Raises:
        TargetModuleError: no entry fits the model; the message lists its linear layers and how to register it.
    """
    known = {(architecture.encoder, architecture.package): architecture for architecture in ARCHITECTURES}
    for kind in dict.fromkeys(map(type, model.modules())):
        for parent in kind.__mro__:  # the class itself first: its own entry wins over that of its parent
            for package in (parent.__module__.split(".")[0], ""):
                if (parent.__name__, package) in known:
                    return known[parent.__name__, package]
    raise TargetModuleError(
        f"{type(model).__name__} contains no known encoder ({', '.join(a.encoder for a in ARCHITECTURES)}). Give "
        f"target_modules; the linear layers of this model end with: {', '.join(_suffix_counts(model))}. Or register "
        "the encoder: register_architecture(Architecture(name=..., encoder=<class name>, layers=<path of the list>, "
        f"roles={{{', '.join(f'{role!r}: ...' for role in ROLES)}}}))"
    )


def _suffix_counts(model: nn.Module) -> list[str]:
    """Return the path suffix of each kind of linear layer after the layer number, with the number of such layers."""
    counts: dict[str, int] = {}
    for path, _ in linear_layers(model):
        parts = path.split(".")
        # The part after the layer's number, or the whole path if it has no number.
        last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
        suffix = ".".join(parts[last + 1 :])
        counts[suffix] = counts.get(suffix, 0) + 1
    return [f"{suffix} ({count})" for suffix, count in counts.items()]


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the encoder's layers from first to last, or an empty list if the architecture is unknown."""
    try:
        suffix = find_architecture(model).layers
    except TargetModuleError:
        return []
    return [layer for path, module in model.named_modules() if ends_with(path, suffix) for layer in module.children()]


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the path and module of every linear layer, without the layers inside adapters."""
    from torch import nn

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part.startswith("lora_") for part in name.split("."))
    ]


def is_unread(architecture: Architecture, path: str) -> bool:
    """Return whether a module or parameter belongs to a part that no training loss uses."""
    return is_inside(path, architecture.unread)


def is_in_head(architecture: Architecture, path: str) -> bool:
    """Return whether a module or parameter belongs to a head."""
    return is_inside(path, architecture.heads)


def check_encoder_weights(model: nn.Module, new: Iterable[str], source: str | Path) -> None:
    """Refuse a model of which the checkpoint lacks weights of the encoder: they would be random.

    Args:
        model: the model that was loaded.
        new: the names of its weights that the checkpoint lacks, or has in another shape.
        source: the name or folder of the checkpoint, for the message.

    Raises:
        ConfigurationError: one of them is neither in a head nor in the pooler or another part that nothing reads.
    """
    architecture = find_architecture(model)
    others = (*architecture.heads, *architecture.unread, "pooler")
    if lost := [name for name in new if not is_inside(name, others)]:
        raise ConfigurationError(
            f"{source} lacks {len(lost)} weights of the encoder, or has them in other shapes than its config says: "
            f"{listing(lost)}. Expected a whole model"
        )


def is_inside(path: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a module or parameter belongs to a module whose path ends with one of some suffixes."""
    return any(f".{suffix}." in f".{path}." for suffix in suffixes)
