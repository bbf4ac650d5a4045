"""Phases of a training loop: which one runs now, and the hooks that find it."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import nn

from esm_efficient._torch import call_after_backward
from esm_efficient.costs.allocations import tensors_in
from esm_efficient.costs.memory import Phase

Stage = Literal["between", "forward", "backward", "optimizer", "evaluation"]
"""What a training loop does now; ``between`` is everything outside the model and the optimizer."""

PassStage = Literal["forward", "evaluation"]
"""The two kinds of forward pass: of training, and without gradients."""


class PhaseTracker:
    """Follows the stages of a training loop and assigns each of them to a phase.

    The time between two stages counts as the phase ``data``, except before an optimizer step or an evaluation: gradient
    clipping is a part of the optimizer phase.

    Attributes:
        stage: what the loop does now.

    Example:
        >>> tracker = PhaseTracker()
        >>> [tracker.switch(stage) for stage in ("forward", "backward", "between", "optimizer", "between")]
        ['data', 'forward', 'backward', 'optimizer', 'optimizer']
    """

    def __init__(self) -> None:
        self.stage: Stage = "between"
        self._gradients_wait = False

    @property
    def phase(self) -> Phase:
        """The phase of what runs now."""
        return "data" if self.stage == "between" else self.stage

    @property
    def failed_phase(self) -> Phase:
        """The phase of an error that is raised now; between a backward pass and the step it is the optimizer's."""
        return "optimizer" if self.stage == "between" and self._gradients_wait else self.phase

    def switch(self, stage: Stage) -> Phase:
        """Begin a stage; return the phase of the stage that ends."""
        ended = self.phase
        if self.stage == "between" and (stage == "optimizer" or stage == "evaluation"):
            ended = stage
        elif self.stage == "backward":
            self._gradients_wait = True
        elif self.stage == "optimizer" and stage == "between":
            self._gradients_wait = False
        self.stage = stage
        return ended


class StageListener(Protocol):
    """What `StageHooks` calls."""

    def begin_stage(self, stage: Stage) -> None:
        """A stage begins."""
        ...

    def begin_pass(self, stage: PassStage, args: tuple, kwargs: dict[str, Any]) -> None:
        """The model is called."""
        ...

    def end_evaluation(self) -> None:
        """A forward pass without gradients has ended."""
        ...

    def end_optimizer_step(self) -> None:
        """The optimizer has updated the weights."""
        ...


class StageHooks:
    """Hooks on a model and its optimizer that find the stages of a training loop.

    The forward pass is found by hooks on the model, the beginning of the backward pass by one on the gradient of the
    model's output, and its end by autograd.

    Args:
        model: the model in training.
        optimizer: its torch optimizer, or None.
        phases: tells which stage runs.
        listener: is called at the borders of stages.
    """

    def __init__(self, model: nn.Module, optimizer: Any, phases: PhaseTracker, listener: StageListener) -> None:
        self._phases = phases
        self._listener = listener
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(lambda *_: listener.begin_stage("optimizer")),
                optimizer.register_step_post_hook(lambda *_: listener.end_optimizer_step()),
            ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        trains = model.training and torch.is_grad_enabled()
        self._listener.begin_pass("forward" if trains else "evaluation", args, kwargs)

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._phases.stage == "forward":
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(lambda _: self._before_backward())
        elif self._phases.stage == "evaluation":
            self._listener.end_evaluation()

    def _before_backward(self) -> None:
        if self._phases.stage == "forward":
            self._listener.begin_stage("backward")
            call_after_backward(lambda: self._listener.begin_stage("between"))
