"""Which parameters should move, and did they?

The failure that this catches is silent: gradient checkpointing cuts adapters off from their gradient, weights held in
bfloat16 swallow small updates, a layer is not reached by the loss. The loss still falls, because the head trains.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from esm_efficient.adapters.registry import find_architecture, is_unread
from esm_efficient.errors import AuditError, TargetModuleError, listing

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_ELEMENTS = 16
"""How many elements of a parameter are watched: those with the largest gradient, which move first."""


@dataclass(frozen=True)
class AuditReport:
    """What the audit saw.

    Attributes:
        moved: names of the parameters that had a gradient and moved.
        pending: names of those that have not yet.
        exempt: names of those that train in name only, because nothing reads them.
    """

    moved: tuple[str, ...]
    pending: tuple[str, ...]
    exempt: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.moved)} parameters moved, {len(self.pending)} not yet, {len(self.exempt)} exempt"


class AuditCallback(TrainerCallback):
    """Fail a run in which a parameter that should train gets no gradient or does not move.

    A missing gradient fails at the first optimizer step. A gradient of exactly zero is right at first for LoRA's A,
    since B is zero; and nothing moves while warm-up holds the rate at zero, or so low that no float32 of that size
    could change. So each parameter has `patience` steps with a rate that shows, after which it must have had a
    gradient and moved; whatever is missing when training ends fails too. Once a parameter has passed it costs nothing.

    Works for one process, DDP and FSDP. Under DeepSpeed, which keeps gradients to itself, it says so and looks away.

    Args:
        patience: optimizer steps at a rate that shows before a parameter must have moved.

    Raises:
        AuditError: from within training; its attributes hold every name.

    Example:
        >>> AuditCallback().report
        AuditReport(moved=(), pending=(), exempt=())
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self._reset()

    def _reset(self) -> None:
        self._pending: dict[str, nn.Parameter] = {}
        self._watched: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps: dict[str, int] = {}
        self._had_gradient: set[str] = set()
        self._moved: list[str] = []
        self._exempt: list[str] = []
        self._first_step = True

    @property
    def report(self) -> AuditReport:
        """What was seen so far."""
        return AuditReport(tuple(self._moved), tuple(self._pending), tuple(self._exempt))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """List what should train."""
        self._reset()
        if getattr(args, "deepspeed", None):
            logger.warning("DeepSpeed keeps gradients to itself: this run is not audited")
            return
        model = kwargs["model"]
        try:
            architecture = find_architecture(model)
        except TargetModuleError:
            architecture = None
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or _local(parameter).numel() == 0:
                continue
            if architecture is not None and is_unread(architecture, name):
                self._exempt.append(name)
            else:
                self._pending[name] = parameter
        if self._exempt:
            logger.warning(
                "%s should train but no loss reads it; prepare_model() freezes such parameters", listing(self._exempt)
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for gradients, and note the values that should change."""
        if not self._pending:
            return
        missing = [name for name, parameter in self._pending.items() if parameter.grad is None]
        if missing and self._first_step:
            self._fail("got no gradient", missing, state, unmoved=False)
        self._first_step = False
        self._watched = {}
        for name, parameter in self._pending.items():
            if parameter.grad is None:
                continue
            gradient = _local(parameter.grad).reshape(-1)
            where = gradient.abs().topk(min(_ELEMENTS, gradient.numel())).indices
            where = where[gradient[where] != 0]
            if where.numel():
                self._had_gradient.add(name)
            self._watched[name] = (where, _local(parameter).reshape(-1)[where].clone())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the values with those before the step."""
        optimizer = kwargs.get("optimizer")
        if not self._pending or optimizer is None or getattr(optimizer, "step_was_skipped", False):
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        overdue = []
        for name, parameter in list(self._pending.items()):
            where, before = self._watched.get(name, (None, None))
            now = None if where is None else _local(parameter).reshape(-1)[where]
            if now is not None and before is not None and not torch.equal(now, before):
                self._moved.append(name)
                del self._pending[name]
                continue
            if rates and id(parameter) not in rates:
                self._fail("is not in the optimizer", [name], state, unmoved=True)
            if self._shows(rates.get(id(parameter), 0.0), optimizer.state.get(parameter, {}), parameter.grad, before):
                self._steps[name] = self._steps.get(name, 0) + 1
                if self._steps[name] >= self.patience:
                    overdue.append(name)
        if overdue:
            self._judge(overdue, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What still waits after a step that should have moved it, never moved."""
        # One step at a rate that shows is not enough for LoRA's A, whose gradient begins at the second.
        late = [name for name in self._pending if self._steps.get(name, 0) >= min(2, self.patience)]
        if late:
            self._judge(late, state)
        if self._pending:
            logger.warning("training ended before %d parameter(s) could be judged", len(self._pending))
        self._watched = {}

    @staticmethod
    def _shows(rate: float, state: Mapping[str, Any], gradient: Tensor | None, before: Tensor | None) -> bool:
        """Whether the step was so large that float32 values of this size would show it."""
        if rate <= 0:
            return False
        if gradient is None or before is None or before.numel() == 0:
            return True
        # Optimizers that divide by the gradient's second moment take steps of the size of the rate.
        normalised = any(key.startswith("exp_avg_sq") for key in state)
        step = rate if normalised else rate * min(1.0, float(_local(gradient).abs().max()))
        return step > 4 * torch.finfo(torch.float32).eps * float(before.abs().max())

    def _judge(self, names: list[str], state: TrainerState) -> None:
        still = [name for name in names if name in self._had_gradient]
        if still:
            self._fail("had a gradient and did not move", still, state, unmoved=True)
        self._fail("had a gradient of zero at every step", names, state, unmoved=False)

    def _fail(self, what: str, names: list[str], state: TrainerState, *, unmoved: bool) -> None:
        dtypes = {str(self._pending[name].dtype) for name in names}
        cure = {
            "got no gradient": "Adapters under reentrant gradient checkpointing need gradients of the embeddings' "
            "output, and a part that the loss never reads must be frozen: prepare_model() does both.",
            "is not in the optimizer": "Make the optimizer after the model is prepared.",
            "had a gradient and did not move": f"The weights are {', '.join(sorted(dtypes))}: keep what trains in "
            "float32 (prepare_model() does), and check the learning rate.",
            "had a gradient of zero at every step": "Nothing that the loss reads depends on it.",
        }[what]
        raise AuditError(
            f"{len(names)} of {len(self._pending) + len(self._moved)} parameters that should train: each {what} "
            f"(optimizer step {state.global_step + 1}): {listing(names)}. {cure}",
            without_gradient=() if unmoved else tuple(names),
            unmoved=tuple(names) if unmoved else (),
        )


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, detached."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
