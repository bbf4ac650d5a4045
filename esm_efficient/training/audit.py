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

from esm_efficient.adapters.prepare import EXPECTATION
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
        exempt: names of trainable parameters that no loss uses, and of those that a warning has named.
    """

    moved: tuple[str, ...]
    pending: tuple[str, ...]
    exempt: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the encoder layers in which a parameter moved."""
        matches = map(_LAYER.match, self.moved)
        return tuple(sorted({int(match[1]) for match in matches if match}))

    def __str__(self) -> str:
        return f"{len(self.moved)} parameters moved, {len(self.pending)} not yet, {len(self.exempt)} exempt"


class AuditCallback(TrainerCallback):
    """Find trainable parameters that get no gradient or do not move, and fail the run if they should train.

    A missing gradient is found at the first optimizer step. A gradient of zero is correct at first for LoRA's A,
    because B is zero. No parameter moves while the warm-up's learning rate is zero, or too small to change a float32 of
    its size. Therefore only steps that are large enough count. After `patience` of them, or at the end of training, a
    parameter must have had a gradient and moved. A parameter that has moved is not checked again, and costs nothing.

    The run fails if the parameter is that of an adapter, if `prepare_model` made it trainable, if no parameter of its
    encoder layer moves, or if nothing moves. Otherwise a warning names it: a pooler that a custom head does not read,
    or parameters that the optimizer was not given, may be meant so.

    The audit works for one process, under DDP, and under FSDP2 with transformers 5.23 or newer, where every rank looks
    at its shards. It logs a warning and does nothing if a rank cannot see gradients (FSDP1, DeepSpeed, FSDP2 with an
    older transformers, optimizers that step within the backward pass).

    Args:
        patience: number of counted optimizer steps after which a parameter must have moved.
        strict: whether every trainable parameter must move.
        usual_rate: a learning rate that suits the method; a much higher one is named as a cause.

    Raises:
        AuditError: from within training; its attributes contain all names.

    Example:
        >>> AuditCallback().report
        AuditReport(moved=(), pending=(), exempt=())
    """

    def __init__(self, patience: int = 3, *, strict: bool = False, usual_rate: float | None = None) -> None:
        self.patience = patience
        self.strict = strict
        self.usual_rate = usual_rate
        self._reset()

    def _reset(self) -> None:
        self._trainable: dict[str, nn.Parameter] = {}
        self._pending: dict[str, nn.Parameter] = {}
        self._expected: set[str] = set()
        self._watched: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps: dict[str, int] = {}
        self._had_gradient: set[str] = set()
        self._moved: list[str] = []
        self._exempt: list[str] = []
        self._first_step = True
        self._rate = 0.0
        self._is_sharded = False

    @property
    def report(self) -> AuditReport:
        """The state of each trainable parameter so far."""
        return AuditReport(tuple(self._moved), tuple(self._pending), tuple(self._exempt))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """List the trainable parameters."""
        self._reset()
        self._rate = args.learning_rate
        model = kwargs["model"]
        self._is_sharded = any(hasattr(parameter, "to_local") for parameter in model.parameters())
        if reason := _reason_without_gradients(args, self._is_sharded):
            logger.warning("%s: this run is not audited", reason)
            return
        try:
            architecture = find_architecture(model)
        except TargetModuleError:
            architecture = None
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            self._trainable[name] = parameter
            if architecture is not None and is_unread(architecture, name):
                self._exempt.append(name)
            else:
                self._pending[name] = parameter
        self._expected = _expected_to_train(model)
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
            self._judge("got no gradient", missing, state, unmoved=False)
        self._first_step = False
        self._watched = {}
        for name, parameter in self._pending.items():
            if parameter.grad is None:
                continue
            gradient = _on_this_rank(parameter.grad).reshape(-1)
            indices = gradient.abs().topk(min(_ELEMENTS, gradient.numel())).indices
            indices = indices[gradient[indices] != 0]
            if indices.numel():
                self._had_gradient.add(name)
            self._watched[name] = (indices, _on_this_rank(parameter).reshape(-1)[indices].clone())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the values with those before the step."""
        optimizer = kwargs.get("optimizer")
        if not self._pending or optimizer is None or getattr(optimizer, "step_was_skipped", False):
            return
        gradients = [_on_this_rank(p.grad) for p in self._trainable.values() if p.grad is not None]
        # A batch without any weight moves no parameter, and neither does a step that overflows at its loss scale, which
        # a fused optimizer leaves out without telling: such steps do not count.
        is_used = any(bool(grad.any()) for grad in gradients)
        is_used, is_broken = self._on_any_rank([is_used, not all(grad.isfinite().all() for grad in gradients)])
        if is_broken or not is_used:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if outside := [name for name, parameter in self._pending.items() if id(parameter) not in groups]:
            self._judge("is not in the optimizer", outside, state, unmoved=True)
        overdue = []
        seen = self._seen(groups, optimizer)
        for (name, parameter), (moved, had_gradient, is_watched, can_change) in zip(
            list(self._pending.items()), seen, strict=True
        ):
            if had_gradient:
                self._had_gradient.add(name)
            if moved:
                self._moved.append(name)
                del self._pending[name]
                continue
            # Without a gradient to tell how large the step was, only the learning rate can.
            if can_change if is_watched else _can_change(groups[id(parameter)], {}, None, None):
                self._steps[name] = self._steps.get(name, 0) + 1
                if self._steps[name] >= self.patience:
                    overdue.append(name)
        if overdue:
            self._judge_unmoved(overdue, state)

    def _seen(self, groups: Mapping[int, Any], optimizer: Any) -> list[tuple[bool, ...]]:
        """Return what the ranks have seen of each pending parameter.

        Returns:
            Per parameter whether elements moved, it had a gradient, elements were watched, and the step was large
            enough to change these.
        """
        flags: list[bool] = []
        for name, parameter in self._pending.items():
            indices, before = self._watched.get(name, (None, None))
            is_watched = indices is not None and indices.numel() > 0
            moved = can_change = False
            if is_watched and indices is not None and before is not None:
                after = _on_this_rank(parameter).reshape(-1)[indices]
                moved = not torch.equal(after, before)
                gradient = None if parameter.grad is None else _on_this_rank(parameter.grad)
                can_change = _can_change(groups[id(parameter)], optimizer.state.get(parameter, {}), gradient, before)
            flags += [moved, name in self._had_gradient, is_watched, can_change]
        flags = self._on_any_rank(flags)
        return list(zip(*(flags[i::4] for i in range(4)), strict=True))

    def _on_any_rank(self, flags: list[bool]) -> list[bool]:
        """Return which flags are set on some rank, if the parameters are sharded; all ranks call this together."""
        if not self._is_sharded:
            return flags
        (device, *_) = {_on_this_rank(parameter).device for parameter in self._trainable.values()}
        values = torch.tensor(flags, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return values.bool().tolist()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fail if a parameter has not moved although its steps should have moved it."""
        # One counted step is not enough for LoRA's A: its gradient is zero in the first step.
        late = [name for name in self._pending if self._steps.get(name, 0) >= min(2, self.patience)]
        if late:
            self._judge_unmoved(late, state)
        if self._pending:
            logger.warning("training ended before %d parameter(s) could be audited", len(self._pending))
        self._watched = {}

    def _judge_unmoved(self, names: list[str], state: TrainerState) -> None:
        with_gradient = [name for name in names if name in self._had_gradient]
        if with_gradient:
            self._judge("had a gradient and did not move", with_gradient, state, unmoved=True)
        if without := [name for name in names if name not in self._had_gradient]:
            self._judge("had a gradient of zero at every step", without, state, unmoved=False)

    def _judge(self, problem: str, names: list[str], state: TrainerState, *, unmoved: bool) -> None:
        """Fail if some of the parameters must train; else name them in a warning and leave them out from now on."""
        wrong = [name for name in names if self.strict or self._must_train(name, names, problem)]
        chosen = wrong or names
        dtypes = {str(self._pending[name].dtype) for name in chosen}
        advice = {
            "got no gradient": "With adapters and reentrant gradient checkpointing, the embeddings' output must "
            "require a gradient, and parts that the loss does not use must be frozen: prepare_model() does both.",
            "is not in the optimizer": "Create the optimizer after the model is prepared.",
            "had a gradient and did not move": f"The weights are {', '.join(sorted(dtypes))}: keep trainable "
            "parameters in float32, as prepare_model() does, and check the learning rate.",
            "had a gradient of zero at every step": f"The loss does not depend on it{self._high_rate()}.",
        }[problem]
        message = (
            f"{len(chosen)} of {len(self._pending) + len(self._moved)} trainable parameters: each {problem} "
            f"(optimizer step {state.global_step + 1}): {listing(chosen)}. {advice}"
        )
        if wrong:
            without, still = ((), tuple(wrong)) if unmoved else (tuple(wrong), ())
            raise AuditError(message, without_gradient=without, unmoved=still)
        logger.warning("%s If this is meant so, freeze what does not train, with requires_grad_(False)", message)
        for name in names:
            del self._pending[name]
            self._exempt.append(name)

    def _high_rate(self) -> str:
        """Return that the learning rate may be the cause, if it is at least ten times the usual one."""
        if self.usual_rate is None or self._rate < 10 * self.usual_rate:
            return ""
        return (
            f", or the learning rate is too high: this run has {self._rate:g}, the recipe {self.usual_rate:g}. Give "
            f"learning_rate={self.usual_rate:g}"
        )

    def _must_train(self, name: str, still: list[str], problem: str) -> bool:
        """Return whether a run is wrong in which a parameter does not train, among others that do not."""
        if name in self._expected:
            return True
        if problem == "is not in the optimizer":
            return False
        others = (self._pending.keys() - still) | set(self._moved)
        layer = _LAYER.match(name)
        return not others or (layer is not None and not any(other.startswith(layer[0]) for other in others))


_LAYER = re.compile(r"(?:.*\.)?(?:layer|layers|blocks|block|h)\.(\d+)\.")
"""The path of an encoder layer, at the beginning of a parameter's name, and its number."""


def _expected_to_train(model: nn.Module) -> set[str]:
    """Return the names of the parameters of adapters, and of those that `prepare_model` made trainable."""
    expected = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        expected |= {prefix + name for name in getattr(module, EXPECTATION, ())}
        if hasattr(module, "peft_config"):
            # peft trains nothing but adapters, and the head in a wrapper.
            names = (name for name, parameter in module.named_parameters() if parameter.requires_grad)
            expected |= {prefix + name for name in names if ".modules_to_save." not in name}
    return expected


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


def _on_this_rank(tensor: Tensor) -> Tensor:
    """Return the shard of this rank, or the whole tensor if it is not sharded."""
    return getattr(tensor, "to_local", lambda: tensor)().detach()


def _reason_without_gradients(args: TrainingArguments, is_sharded: bool) -> str:
    """Return why a rank cannot see gradients before an optimizer step; empty if it can see whole ones or its shards."""
    kind = AcceleratorState().distributed_type if is_initialized() else DistributedType.NO
    divided = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if kind in divided and not (is_sharded and kind == DistributedType.FSDP):
        return f"{kind.value} divides gradients among the ranks"
    if "lomo" in args.optim or args.optim.endswith("layerwise"):
        return f"{args.optim} takes its steps within the backward pass"
    return ""
