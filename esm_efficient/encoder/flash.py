"""Flash attention for packed sequences: the packages that compute it, and the way in which each is called."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esm_efficient.errors import ConfigurationError

logger = logging.getLogger(__name__)

Varlen = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, int, int], float], Tensor]
"""Takes queries, keys, values, `CuSeqlens.boundaries` and the scale of the scores."""

_BOUNDARIES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class FlashPackage(NamedTuple):
    """A package with ``flash_attn_varlen_func``, in half precision and for heads of at most 256.

    Attributes:
        name: the name of the distribution.
        module: the module that has the function.
        majors: the major compute capabilities of the GPUs for which it is used.
        widths: the head widths for which it is used; empty for every multiple of 8.
    """

    name: str
    module: str
    majors: tuple[int, ...]
    widths: tuple[int, ...] = ()

    @property
    def is_installed(self) -> bool:
        """Whether the package is there; flash-attn 2 has a folder ``cute`` too, in which flash-attn 4 is missing."""
        if "." not in self.module:
            return importlib.util.find_spec(self.module) is not None
        try:
            return bool(importlib.metadata.version(self.name))
        except importlib.metadata.PackageNotFoundError:
            return False


PACKAGES = (
    FlashPackage("flash-attn-3", "flash_attn_interface", (9,)),
    FlashPackage("flash-attn-4", "flash_attn.cute", (10, 11), (64, 96, 128)),
    FlashPackage("flash-attn", "flash_attn", (8, 9, 10, 11, 12)),
)
"""The packages, the fastest first: version 3 for Hopper, version 4 for Blackwell, version 2 from Ampere on."""

HUB_KERNELS = (("kernels-community/flash-attn3", (1,), (9,)), ("kernels-community/flash-attn2", (4, 3), ()))
"""The Hub's kernels, their versions from the newest, and the major compute capabilities; empty for all others."""


def flash_attention(capability: tuple[int, int], width: int) -> tuple[str, Varlen] | None:
    """Return the first package of `PACKAGES` that can be used on a GPU, and its function; None if there is none.

    Args:
        capability: the compute capability of the GPU.
        width: the width of the heads.
    """
    for package in PACKAGES:
        if capability[0] in package.majors and (not package.widths or width in package.widths):
            function = _load(package)
            if function is not None:
                return package.name, function
    return None


@lru_cache
def _load(package: FlashPackage) -> Varlen | None:
    """Return a package's function; None, and a line in the log, if the package is installed and cannot be used."""
    if not package.is_installed:
        return None
    try:
        return _called_by_name(importlib.import_module(package.module).flash_attn_varlen_func)
    except Exception as error:  # whatever a build for another torch, Python or GPU raises
        message = "%s is installed but cannot be used (%s): another kernel computes attention"
        logger.warning(message, package.name, error)
        return None


@lru_cache
def hub_attention(major: int) -> Varlen:
    """Return the Hub's flash attention for a GPU; the package kernels downloads it, once.

    Args:
        major: the major compute capability of the GPU.

    Raises:
        ConfigurationError: the package is missing, or it has no kernel for this machine.
    """
    repository, versions, _ = next(found for found in HUB_KERNELS if major in found[2] or not found[2])
    errors: list[Exception] = []
    for version in versions:  # an older version may have a build for an older torch
        try:
            kernel = importlib.import_module("kernels").get_kernel(repository, version=version)
            return _called_by_name(kernel.flash_attn_varlen_func)
        except Exception as error:  # a missing package, no network, no build for this torch
            errors.append(error)
    raise ConfigurationError(
        f"attention='hub': the kernel {repository} cannot be loaded ({errors[0]}). Install the package kernels, and "
        "load the kernel once with a network, or use attention='auto'"
    ) from errors[0]


def _called_by_name(function: Any) -> Varlen:
    """Wrap any version of ``flash_attn_varlen_func``.

    The versions differ in the order of their arguments, in the options that they have, and in whether they return the
    logsumexp too.
    """
    parameters = inspect.signature(function).parameters
    if missing := [name for name in (*_BOUNDARIES[:2], "softmax_scale") if name not in parameters]:
        raise TypeError(f"its function has no argument {', '.join(missing)}")

    def attention(
        query: Tensor, key: Tensor, value: Tensor, boundaries: tuple[Tensor, Tensor, int, int], scale: float
    ) -> Tensor:
        options = dict(zip(_BOUNDARIES, boundaries, strict=True)) | {"softmax_scale": scale}
        if torch.are_deterministic_algorithms_enabled():  # flash-attn does not ask for it
            if "deterministic" not in parameters:
                raise ConfigurationError(
                    f"deterministic algorithms were asked for, and {function.__module__} has none: "
                    "use attention='efficient'"
                )
            options["deterministic"] = True
        found = function(query, key, value, **{name: options[name] for name in options if name in parameters})
        found = found[0] if isinstance(found, tuple) else found
        needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        if needs_gradient and not found.requires_grad:
            raise ConfigurationError(
                f"the flash attention of {function.__module__} has no backward pass: use another attention= to train"
            )
        return cast(Tensor, found)

    return attention
