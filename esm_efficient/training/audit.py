"""Check during training that every trainable parameter gets a gradient and moves.

Without this check such a failure is silent: gradient checkpointing can leave adapters without a gradient, bfloat16
weights lose small updates, or the loss does not depend on a layer. The loss still falls, because the head trains.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from esm_efficient.adapters.registry import find_architecture, is_unread
from esm_efficient.errors import AuditError, TargetModuleError, listing

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_ELEMENTS = 16
"""Number of watched elements of a parameter: those with the largest gradients, which move first."""


@dataclass(frozen=True)
class AuditReport:
    """Trainable parameters by the state of their audit.

    Attributes:
        moved: names of parameters that had a gradient and moved.
        pending: names of parameters that have not moved yet.
        exempt: names of trainable parameters that no loss uses.
    """

    moved: tuple[str, ...]
    pending: tuple[str, ...]
    exempt: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the encoder layers in which a parameter moved."""
        matches = (re.search(r"\.layer\.(\d+)\.", name) for name in self.moved)
        return tuple(sorted({int(match[1]) for match in matches if match}))

    def __str__(self) -> str:
        return f"{len(self.moved)} parameters moved, {len(self.pending)} not yet, {len(self.exempt)} exempt"


class AuditCallback(TrainerCallback):
    """Fail a run in which a trainable parameter gets no gradient or does not move.

    A missing gradient fails at the first optimizer step. A gradient of zero is correct at first for LoRA's A, because B
    is zero. No parameter moves while the warm-up's learning rate is zero, or too small to change a float32 of its size.
    Therefore only steps that are large enough count. After `patience` of them, or at the end of training, a parameter
    must have had a gradient and moved. A parameter that has moved is not checked again, and costs nothing.

    The audit works for one process and under DDP. It logs a warning and does nothing if a rank cannot see whole
    gradients (FSDP, DeepSpeed, optimizers that step within the backward pass).

    Args:
        patience: number of counted optimizer steps after which a parameter must have moved.

    Raises:
        AuditError: from within training; its attributes contain all names.

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
        """The state of each trainable parameter so far."""
        return AuditReport(tuple(self._moved), tuple(self._pending), tuple(self._exempt))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """List the trainable parameters."""
        self._reset()
        if reason := _reason_without_gradients(args):
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
                "%s is trainable but no loss uses it; prepare_model() freezes such parameters", listing(self._exempt)
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients, and store the values that the step should change."""
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
            indices = gradient.abs().topk(min(_ELEMENTS, gradient.numel())).indices
            indices = indices[gradient[indices] != 0]
            if indices.numel():
                self._had_gradient.add(name)
            self._watched[name] = (indices, parameter.detach().reshape(-1)[indices].clone())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the values with those before the step."""
        optimizer = kwargs.get("optimizer")
        if not self._pending or optimizer is None or getattr(optimizer, "step_was_skipped", False):
            return
        # A batch without any weight moves no parameter: the step does not count.
        if not any(parameter.grad is not None and parameter.grad.any() for parameter in self._trainable):
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        overdue = []
        for name, parameter in list(self._pending.items()):
            indices, before = self._watched.get(name, (None, None))
            after = None if indices is None else parameter.detach().reshape(-1)[indices]
            if after is not None and before is not None and not torch.equal(after, before):
                self._moved.append(name)
                del self._pending[name]
                continue
            if id(parameter) not in groups:
                self._fail("is not in the optimizer", [name], state, unmoved=True)
            if _can_change(groups[id(parameter)], optimizer.state.get(parameter, {}), parameter.grad, before):
                self._steps[name] = self._steps.get(name, 0) + 1
                if self._steps[name] >= self.patience:
                    overdue.append(name)
        if overdue:
            self._fail_unmoved(overdue, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fail if a parameter has not moved although its steps should have moved it."""
        # One counted step is not enough for LoRA's A: its gradient is zero in the first step.
        late = [name for name in self._pending if self._steps.get(name, 0) >= min(2, self.patience)]
        if late:
            self._fail_unmoved(late, state)
        if self._pending:
            logger.warning("training ended before %d parameter(s) could be audited", len(self._pending))
        self._watched = {}

    def _fail_unmoved(self, names: list[str], state: TrainerState) -> None:
        with_gradient = [name for name in names if name in self._had_gradient]
        if with_gradient:
            self._fail("had a gradient and did not move", with_gradient, state, unmoved=True)
        self._fail("had a gradient of zero at every step", names, state, unmoved=False)

    def _fail(self, problem: str, names: list[str], state: TrainerState, *, unmoved: bool) -> None:
        dtypes = {str(self._pending[name].dtype) for name in names}
        advice = {
            "got no gradient": "With adapters and reentrant gradient checkpointing, the embeddings' output must "
            "require a gradient, and parts that the loss does not use must be frozen: prepare_model() does both.",
            "is not in the optimizer": "Create the optimizer after the model is prepared.",
            "had a gradient and did not move": f"The weights are {', '.join(sorted(dtypes))}: keep trainable "
            "parameters in float32, as prepare_model() does, and check the learning rate.",
            "had a gradient of zero at every step": "The loss does not depend on it.",
        }[problem]
        raise AuditError(
            f"{len(names)} of {len(self._pending) + len(self._moved)} trainable parameters: each {problem} "
            f"(optimizer step {state.global_step + 1}): {listing(names)}. {advice}",
            without_gradient=() if unmoved else tuple(names),
            unmoved=tuple(names) if unmoved else (),
        )


def _can_change(
    group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor | None, before: Tensor | None
) -> bool:
    """Return whether an optimizer step was large enough to change float32 values of this size."""
    rate = float(group["lr"] or 0.0)
    if rate <= 0:
        return False
    if gradient is None or before is None or before.numel() == 0:
        return True
    largest = float(gradient.detach().abs().max())
    # Optimizers that divide by the root of the gradient's second moment take steps as large as the learning rate,
    # unless the gradient is small compared with their epsilon.
    is_normalised = any(key.startswith("exp_avg_sq") for key in state)
    epsilon = group.get("eps", 1e-8)
    epsilon = epsilon[0] if isinstance(epsilon, (tuple, list)) else epsilon
    step = rate * largest / (largest + epsilon) if is_normalised else rate * min(1.0, largest)
    return step > 4 * torch.finfo(torch.float32).eps * float(before.abs().max())


def _reason_without_gradients(args: TrainingArguments) -> str:
    """Return why a rank cannot see whole gradients before an optimizer step; empty if it can."""
    kind = AcceleratorState().distributed_type if is_initialized() else DistributedType.NO
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        return f"{kind.value} divides gradients among the ranks"
    if "lomo" in args.optim or args.optim.endswith("layerwise"):
        return f"{args.optim} takes its steps within the backward pass"
    return ""
