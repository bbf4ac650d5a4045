"""Find out where the functions and classes of a model come from, and so whether they are those of the libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from esm_efficient import compat
from esm_efficient._torch import source_of, undecorated

ATTENTION_FUNCTIONS = (
    "eager_attention_forward",
    "sdpa_attention_forward",
    "flash_attention_forward",
    "flex_attention_forward",
)
"""transformers' attention functions, which all compute the same."""
PER_TOKEN = (
    nn.Linear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Identity,
    nn.Dropout,
    nn.Sequential,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
)
"""Modules of torch that compute each token by itself."""
PER_TOKEN_ADAPTERS = (
    "lora",
    "adalora",
    "ia3",
    "loha",
    "lokr",
    "vera",
    "oft",
    "boft",
    "hra",
    "fourierft",
    "randlora",
    "shira",
    "miss",
    "ln_tuning",
    "delora",
    "waveft",
    "c3a",
    "road",
    "gralora",
    "vblora",
)
"""Packages of peft's tuners whose layers compute each token by itself."""
FIRST_TOKEN_MODELS = ("Esm", "Esmc")
"""How the names of transformers' classes begin for models whose sequence classifier reads only the first token."""
QUANTISERS = ("bitsandbytes.", "esm_efficient.estimation.quantized")
"""Prefixes of modules that define quantised linear layers, which compute each token by itself."""


def replaced_functions() -> Iterator[tuple[Any, str]]:
    """Yield the module and the name of each function of transformers that the lean encoder stands in for."""
    from transformers.models.esm import modeling_esm

    for name in ("gelu", "rotate_half", "apply_rotary_pos_emb", "eager_attention_forward"):
        yield modeling_esm, name


def attention_function(config: Any) -> Any:
    """Return the function that computes attention for a model's config."""
    from transformers.models.esm import modeling_esm

    default = modeling_esm.eager_attention_forward
    return modeling_esm.ALL_ATTENTION_FUNCTIONS.get(compat.attention_implementation(config), default)


def is_known_attention(function: Any) -> bool:
    """Whether an attention function is one of transformers' own."""
    function = undecorated(getattr(function, "func", function))
    return source_of(function).startswith("transformers.") and function.__name__ in ATTENTION_FUNCTIONS


def is_own(module: Any, known: type) -> bool:
    """Whether a module computes what a class of transformers' ESM-2 defines.

    Args:
        module: a module of that class, of a subclass, or of another class.
        known: the class, as transformers names it.
    """
    if not isinstance(module, known):
        return False
    for name in compat.REPLACED_METHODS:
        expected = undecorated(getattr(known, name, None))
        if expected is None:
            continue
        source = source_of(expected)
        defined = source.startswith(("torch.", "transformers.")) if name == "__call__" else source == known.__module__
        if not defined or undecorated(getattr(type(module), name)) is not expected:
            return False
    return True


def is_per_token(module: Any) -> bool:
    """Whether the forward of a module itself, apart from the modules in it, computes each token by itself."""
    if module is None:
        return False
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    if owner is nn.Module:  # a container, which is not called
        return True
    known = owner in PER_TOKEN or owner.__module__.startswith(QUANTISERS) or _is_per_token_adapter(owner)
    own = source_of(undecorated(vars(owner)["forward"])) == owner.__module__
    return known and own and source_of(type(module).__call__) == nn.Module.__module__


def _is_per_token_adapter(owner: type) -> bool:
    library, _, path = owner.__module__.partition(".")
    package, _, rest = path.partition(".")
    if library != "peft":
        return False
    return path == "utils.other" or (package == "tuners" and rest.split(".")[0] in PER_TOKEN_ADAPTERS)


def is_known_embedding(embeddings: Any) -> bool:
    """Whether embeddings are transformers' own, so that only their own parameters can train."""
    from transformers.models.esm.modeling_esm import EsmEmbeddings

    known = (EsmEmbeddings, nn.Embedding, nn.LayerNorm, nn.Dropout)
    modules = list(embeddings.modules())
    return is_own(embeddings, EsmEmbeddings) and all(type(module) in known for module in modules)


def reads_first_token(model: nn.Module) -> bool:
    """Whether a model is a sequence classifier with transformers' own head, which reads only the first token."""
    suffix, parents = "ForSequenceClassification", type(model).__mro__
    names = [prefix + suffix for prefix in FIRST_TOKEN_MODELS]
    known = next((p for p in parents if p.__name__ in names and p.__module__.startswith("transformers.")), None)
    if known is None:
        return False
    head_class = getattr(sys.modules[known.__module__], known.__name__.replace(suffix, "ClassificationHead"))
    classifier: Any = model.classifier
    copies = getattr(classifier, "modules_to_save", None)
    heads = [classifier] if copies is None else list(copies.values())
    if "forward" in vars(model) and undecorated(vars(model)["forward"]) is not undecorated(type(model).forward):
        return False
    if any("forward" in vars(head) for head in heads):
        return False
    return is_own(model, known) and all(is_own(head, head_class) for head in heads)
