"""Find the broken numbers of a run, and stop it before a checkpoint holds them.

Looking at a number on a GPU makes the host wait for it. Numbers are therefore counted on the device in every step, and
looked at when a run logs, evaluates, saves or ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from esm_efficient.errors import DataError, DivergenceError, listing

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

_EXPLOSION = 1000.0
"""A loss, or a norm of the gradient, that grows by this factor since the first step that was logged, explodes."""

_LEAST_SCALE = 1.0
"""A loss scale below it does not explain a gradient that is not finite; torch begins with 65,536."""

_EQUAL = 1e-6
"""Logits that differ by less than this fraction of the largest one are equal."""


class DivergenceWatch:
    """Counts broken numbers on the device, and raises when asked to look at them.

    Args:
        accelerator: the accelerator of the run; the numbers of all ranks are looked at together.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        zeros = dict.fromkeys(("broken", "first", "judged", "equal", "known", "wrong"), 0.0)
        self._counts = {name: torch.tensor(value, device=accelerator.device) for name, value in zeros.items()}
        self._first_logs: dict[str, float] = {}
        self._warned: set[str] = set()
        self._steps = 0
        self._knows_weights = False

    def observe_loss(self, loss: Tensor, step: int) -> None:
        """Count a loss that is NaN or infinite, of the micro-batch of an optimizer step."""
        counts, is_broken = self._counts, ~loss.detach().isfinite().all().to(self._accelerator.device)
        counts["first"] = torch.where(is_broken & (counts["broken"] == 0), float(step), counts["first"])
        counts["broken"] = counts["broken"] + is_broken
        self._steps = step

    def observe_logits(self, logits: Tensor) -> None:
        """Count a micro-batch in which the model answers the same for every sequence or token."""
        rows = logits.detach().float().flatten(0, -2).to(self._accelerator.device)
        if len(rows) > 1:
            spread = (rows - rows[:1]).abs().max()
            self._counts["equal"] = self._counts["equal"] + (spread <= _EQUAL * rows.abs().max())
            self._counts["judged"] = self._counts["judged"] + 1

    def observe_weight(self, weight: Tensor) -> None:
        """Add the weight of the known labels of an optimizer step."""
        self._knows_weights = True
        self._counts["known"] = self._counts["known"] + weight.detach()

    def observe_labels(self, wrong: Tensor) -> None:
        """Count labels that the loss cannot use."""
        self._counts["wrong"] = self._counts["wrong"] + wrong.sum()

    def look(self, args: TrainingArguments, *, at_end: bool = False) -> None:
        """Look at the numbers of all ranks; all ranks must call this together.

        Args:
            args: the arguments of the run, for advice.
            at_end: whether the run has ended.

        Raises:
            DataError: labels are wrong, or at the end, none was known.
            DivergenceError: a loss was NaN or infinite.
        """
        own = torch.stack([value.float() for value in self._counts.values()])
        ranks = self._accelerator.gather(own).reshape(-1, len(own)).tolist()
        counts = dict(zip(self._counts, map(sum, zip(*ranks, strict=True)), strict=True))
        if counts["wrong"]:
            raise DataError(
                f"{counts['wrong']:.0f} label(s) are wrong: expected class ids below config.num_labels, or numbers "
                "from 0 to 1, and -100 or NaN for unknown ones. On a CPU the message names the row"
            )
        if counts["broken"]:
            first = min(rank[list(counts).index("first")] for rank in ranks if rank[0])
            raise DivergenceError(_broken_loss(int(first), int(counts["broken"]), args))
        if self._knows_weights and not counts["known"]:
            self._warn_or_refuse_unknown(at_end)
        if counts["judged"] and counts["equal"] == counts["judged"]:
            self._warn(
                "logits",
                f"all logits were equal in every micro-batch up to step {self._steps}: the model answers the same for "
                "every sequence. If it stays so, lower learning_rate, and check that the sequences differ and that the "
                "attention mask is not 0",
            )
        for name in ("judged", "equal"):
            self._counts[name] = torch.zeros_like(self._counts[name])

    def look_at_logs(self, logs: Mapping[str, Any], args: TrainingArguments) -> None:
        """Look at the loss and the norm of the gradient that a run logs.

        Raises:
            DivergenceError: the norm is NaN or infinite, and no loss scale is the cause; or the loss has exploded.
        """
        advice = f"Lower learning_rate (it is {args.learning_rate:g}), or add warmup_steps"
        norm, loss = logs.get("grad_norm"), logs.get("loss")
        scaler = self._accelerator.scaler
        # A step whose gradient overflows at this loss scale is left out, and the scale is halved.
        if norm is not None and not math.isfinite(norm) and (scaler is None or scaler.get_scale() < _LEAST_SCALE):
            scaled = "" if scaler is None else f", although the loss scale fell to {scaler.get_scale():.3g}"
            raise DivergenceError(
                f"the norm of the gradient is {norm} at step {self._steps}{scaled}: expected a finite number. "
                f"{advice}. {_GOOD_CHECKPOINTS}"
            )
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if value is None or not math.isfinite(value):
                continue
            start = max(self._first_logs.setdefault(name, abs(value)), 1.0)
            if abs(value) <= _EXPLOSION * start:
                continue
            if name == "loss":
                raise DivergenceError(
                    f"the loss has exploded: it is {value:.3g} at step {self._steps} and was "
                    f"{self._first_logs[name]:.3g} at the first logging step. {advice}. {_GOOD_CHECKPOINTS}"
                )
            self._warn(
                name,
                f"the gradient explodes: its norm is {value:.3g} at step {self._steps} and was "
                f"{self._first_logs[name]:.3g} at the first logging step. {advice}, or set max_grad_norm (it is "
                f"{args.max_grad_norm:g})",
            )

    def _warn_or_refuse_unknown(self, at_end: bool) -> None:
        message = (
            f"no label had a weight in {self._steps} step(s): all are -100 or NaN, or have a class weight or "
            "sample_weight of 0"
        )
        if at_end:
            raise DataError(f"{message}. The model has learned nothing: expected some known labels")
        self._warn("known", message)

    def _warn(self, name: str, message: str) -> None:
        if name not in self._warned:
            logger.warning("%s", message)
            self._warned.add(name)


def check_parameters(model: nn.Module, args: TrainingArguments) -> None:
    """Check that all trainable parameters are finite; of a sharded model, those of this rank.

    Raises:
        DivergenceError: a parameter is NaN or infinite; the message names it.
    """
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = [getattr(value, "to_local", lambda value=value: value)() for _, value in named]
    if not parts:
        return
    finite = torch.stack([part.isfinite().all().to(parts[0].device) for part in parts]).tolist()
    broken = [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]
    if broken:
        raise DivergenceError(
            f"{len(broken)} of {len(named)} trainable parameters are NaN or infinite ({listing(broken)}), and are "
            f"not saved. {_advice(args)} {_GOOD_CHECKPOINTS}"
        )


_GOOD_CHECKPOINTS = "Checkpoints that were written before are not changed: resume from one with the new options"


def _broken_loss(first: int, count: int, args: TrainingArguments) -> str:
    where = f"the loss is NaN or infinite since step {first} ({count} micro-batch(es) so far)"
    if first == 1:
        return (
            f"{where}, before any parameter has changed: the data or the model's weights are the cause. Check the "
            "targets of regression (standardise them), sample_weight, and that the loaded weights are finite; with "
            "bf16 or fp16 try float32"
        )
    return f"{where}. {_advice(args)} {_GOOD_CHECKPOINTS}"


def _advice(args: TrainingArguments) -> str:
    return (
        f"Lower learning_rate (it is {args.learning_rate:g}), add warmup_steps, set max_grad_norm (it is "
        f"{args.max_grad_norm:g}), or with bf16 or fp16 try float32."
    )
