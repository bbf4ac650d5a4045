"""The optimizers of `estimate`, by name. To add one, add an entry to `OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from esm_efficient import _torch
from esm_efficient.errors import ConfigurationError


def _adamw(**options: Any) -> Callable[[list[nn.Parameter]], Any]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, **options)


class _AdamW8bit:
    """bitsandbytes' 8-bit AdamW: its real state, and one pass over it instead of its kernel, which needs a GPU."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigurationError(
                "optimizer='adamw_8bit' needs bitsandbytes, which is not installed: pip install bitsandbytes"
            ) from error
        with _torch.real_tensors() as fake_mode:  # the quantisation maps are computed from numbers
            self._inner = AdamW8bit([nn.Parameter(torch.zeros(1))], lr=1e-3)
        self._inner.name2qmap = {name: fake_mode.from_tensor(qmap) for name, qmap in self._inner.name2qmap.items()}
        self._inner.param_groups[0]["params"] = parameters
        self.state = self._inner.state

    def zero_grad(self) -> None:
        self._inner.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        [group] = self._inner.param_groups
        for index, parameter in enumerate(group["params"]):
            if parameter not in self.state:
                self._inner.init_state(group, parameter, 0, index)
            state = self.state[parameter]
            # The kernel works in place. It reads and writes the parameter and each part of the state once.
            parameter.add_(parameter.grad)
            for name in ("state1", "state2"):
                state[name].add_(0)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "adamw_fused": _adamw(fused=True),
    "adamw_foreach": _adamw(foreach=True),
    "adamw": _adamw(foreach=False, fused=False),
    "adamw_8bit": _AdamW8bit,
}
"""Functions from parameters to an optimizer, by name. The first is Trainer's default, ``adamw_torch_fused``."""
