"""Phases of a training loop, and which one runs now."""

from __future__ import annotations

from typing import Literal

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
