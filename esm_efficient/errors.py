"""The errors of the library. Each message says what was given, what was expected, and what to do.

`OutOfMemoryError` is in `esm_efficient.out_of_memory`: it derives from torch's class, and this module loads no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class EsmEfficientError(Exception):
    """Base class of all errors that the library raises on purpose."""


class DataError(EsmEfficientError, ValueError):
    """A table, a sequence or a label is invalid; the message names the rows."""


class DownloadError(EsmEfficientError, OSError):
    """A file could not be downloaded, or its checksum is wrong; the message says which file to put where."""


class TargetModuleError(EsmEfficientError, ValueError):
    """An adapter target matches no layer, or a layer that must not be adapted."""


class ConfigurationError(EsmEfficientError, ValueError):
    """Options that contradict each other or the model."""


class AuditError(EsmEfficientError, RuntimeError):
    """A trainable parameter got no gradient or did not move.

    Attributes:
        without_gradient: names of the parameters with no gradient, or a gradient of zero at every step.
        unmoved: names of the parameters that had a gradient and did not change.
    """

    def __init__(self, message: str, *, without_gradient: tuple[str, ...] = (), unmoved: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.without_gradient = without_gradient
        self.unmoved = unmoved


class DivergenceError(EsmEfficientError, ArithmeticError):
    """A loss, a gradient or a parameter is NaN or infinite, or the loss has exploded."""


class TrainingInterrupted(EsmEfficientError):
    """A signal ended a run after a checkpoint of its last step was written."""


class CheckpointError(EsmEfficientError, OSError):
    """A checkpoint could not be written, or no checkpoint is whole; the message names the last whole one, if any."""


class RequestError(EsmEfficientError, ValueError):
    """A request for predictions is invalid.

    Attributes:
        status: HTTP status of the answer, from 400 to 499.
    """

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def listing(items: list[str] | tuple[str, ...], limit: int = 5) -> str:
    """Join the first items for a message, with the number of items left out.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def nearest(name: str, names: Collection[str], otherwise: str = "") -> str:
    """Return the end of a message on an unknown name: the nearest of the right names, or what is expected instead.

    Example:
        >>> nearest("lable", ["label", "split"]), nearest("x", ["label"], "a name")
        (": did you mean 'label'?", ': expected a name')
    """
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f": did you mean {near[0]!r}?" if near else f": expected {otherwise}" if otherwise else ""
