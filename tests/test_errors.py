"""All errors derive from one base class and from the built-in class that a caller would expect."""

from __future__ import annotations

import pytest

from esm_efficient import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.DataError, ValueError),
        (errors.DownloadError, OSError),
        (errors.TargetModuleError, ValueError),
        (errors.ConfigurationError, ValueError),
        (errors.AuditError, RuntimeError),
        (errors.CheckpointError, OSError),
        (errors.DivergenceError, ArithmeticError),
    ],
)
def test_base_classes(error, builtin):
    assert issubclass(error, errors.EsmEfficientError)
    assert issubclass(error, builtin)


def test_listing_gives_the_number_of_items_left_out():
    assert errors.listing(["a", "b"]) == "a, b"
    assert errors.listing(list("abcdefg")) == "a, b, c, d, e and 2 more"
