"""The errors of the library. Each one says what was given, what was expected, and what to do."""

from __future__ import annotations


class EsmEfficientError(Exception):
    """Base class: ``except EsmEfficientError`` catches everything that the library raises on purpose."""


class DataError(EsmEfficientError, ValueError):
    """A table, a sequence or a label is not what it should be; the message names the rows."""


class DownloadError(EsmEfficientError, OSError):
    """A file could not be fetched or is not the file that it should be; the message says what to put where."""


class TargetModuleError(EsmEfficientError, ValueError):
    """An adapter target matches nothing, or matches what must not be adapted."""


class ConfigurationError(EsmEfficientError, ValueError):
    """Options that contradict each other or the model."""


class AuditError(EsmEfficientError, RuntimeError):
    """A parameter that should train got no gradient or did not move.

    Attributes:
        without_gradient: names of the parameters whose gradient is missing or stayed zero.
        unmoved: names of the parameters that had a gradient and did not change.
    """

    def __init__(self, message: str, *, without_gradient: tuple[str, ...] = (), unmoved: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.without_gradient = without_gradient
        self.unmoved = unmoved


class TrainingInterrupted(EsmEfficientError):
    """A signal has ended a run; a checkpoint of its last step was written."""


class RequestError(EsmEfficientError, ValueError):
    """A request for predictions is not what it should be.

    Attributes:
        status: the HTTP status to answer with, from 400 to 499.
    """

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def listing(items: list[str] | tuple[str, ...], limit: int = 5) -> str:
    """Join the first items for a message and say how many are left out.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
