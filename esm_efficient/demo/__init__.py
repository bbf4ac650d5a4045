"""A tiny pretrained ESM-2 and a synthetic table in the DeepLoc-2.0 schema, to run everything offline."""

from __future__ import annotations

from esm_efficient.demo.table import write_demo_table
from esm_efficient.published import hub_name

__all__ = ["demo_model_path", "write_demo_table"]


def demo_model_path() -> str:
    """Return the folder of the tiny ESM-2 that the library contains, for ``from_pretrained``.

    The model card, ``README.md`` in that folder, gives the training data and the accuracy.

    Example:
        >>> from transformers import AutoConfig
        >>> AutoConfig.from_pretrained(demo_model_path()).model_type
        'esm'
    """
    return hub_name("demo")
