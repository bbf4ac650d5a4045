"""The optimizers that a step can be simulated with, under the names that `estimate` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from esm_efficient.errors import ConfigurationError


def _adamw(**options: Any) -> Callable[[list[nn.Parameter]], Any]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, **options)


class _AdamW8bit:
    """bitsandbytes' 8-bit AdamW: its own state, and in the place of its kernel, which needs a GPU, one pass over it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        from torch._guards import active_fake_mode
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigurationError(
                "the 8-bit optimizer is that of bitsandbytes, which is not installed: pip install bitsandbytes"
            ) from error
        fake = active_fake_mode()
        assert fake is not None
        with unset_fake_temporarily():  # its quantisation maps are computed, so they cannot be fake
            self._inner = AdamW8bit([nn.Parameter(torch.zeros(1))], lr=1e-3)
        self._inner.name2qmap = {name: fake.from_tensor(qmap) for name, qmap in self._inner.name2qmap.items()}
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
            parameter.add_(parameter.grad)  # the kernel works in place: it reads and writes each of these once
            for name in ("state1", "state2"):
                state[name].add_(0)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "adamw_fused": _adamw(fused=True),
    "adamw_foreach": _adamw(foreach=True),
    "adamw": _adamw(foreach=False, fused=False),
    "adamw_8bit": _AdamW8bit,
}
"""Name to what makes the optimizer from parameters. Trainer's default, ``adamw_torch_fused``, is the first."""
