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
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
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

    Works for one process and under DDP. Where a rank has no whole gradient to look at (FSDP, DeepSpeed, optimizers that
    step within the backward pass), it says so and looks away.

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
        self._trainable: list[nn.Parameter] = []
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
        if reason := _hides_gradients(args):
            logger.warning("%s: this run is not audited", reason)
            return
        model = kwargs["model"]
        try:
            architecture = find_architecture(model)
        except TargetModuleError:
            architecture = None
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            self._trainable.append(parameter)
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
            gradient = parameter.grad.detach().reshape(-1)
            where = gradient.abs().topk(min(_ELEMENTS, gradient.numel())).indices
            where = where[gradient[where] != 0]
            if where.numel():
                self._had_gradient.add(name)
            self._watched[name] = (where, parameter.detach().reshape(-1)[where].clone())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the values with those before the step."""
        optimizer = kwargs.get("optimizer")
        if not self._pending or optimizer is None or getattr(optimizer, "step_was_skipped", False):
            return
        # A batch in which nothing weighs anything moves nothing, and says nothing.
        if not any(parameter.grad is not None and parameter.grad.any() for parameter in self._trainable):
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        overdue = []
        for name, parameter in list(self._pending.items()):
            where, before = self._watched.get(name, (None, None))
            now = None if where is None else parameter.detach().reshape(-1)[where]
            if now is not None and before is not None and not torch.equal(now, before):
                self._moved.append(name)
                del self._pending[name]
                continue
            if id(parameter) not in groups:
                self._fail("is not in the optimizer", [name], state, unmoved=True)
            if self._shows(groups[id(parameter)], optimizer.state.get(parameter, {}), parameter.grad, before):
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
    def _shows(
        group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor | None, before: Tensor | None
    ) -> bool:
        """Whether the step was so large that float32 values of this size would show it."""
        rate = float(group["lr"] or 0.0)
        if rate <= 0:
            return False
        if gradient is None or before is None or before.numel() == 0:
            return True
        largest = float(gradient.detach().abs().max())
        # Optimizers that divide by the root of the gradient's second moment take steps of the size of the rate, as
        # long as the gradient is large beside the epsilon that they add to it.
        normalised = any(key.startswith("exp_avg_sq") for key in state)
        epsilon = group.get("eps", 1e-8)
        epsilon = epsilon[0] if isinstance(epsilon, (tuple, list)) else epsilon
        step = rate * largest / (largest + epsilon) if normalised else rate * min(1.0, largest)
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


def _hides_gradients(args: TrainingArguments) -> str:
    """Why a rank cannot see whole gradients before an optimizer step; empty if it can."""
    kind = AcceleratorState().distributed_type if AcceleratorState._shared_state else DistributedType.NO
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        return f"{kind.value} keeps gradients in parts"
    if "lomo" in args.optim or args.optim.endswith("layerwise"):
        return f"{args.optim} takes its steps within the backward pass"
    return ""
