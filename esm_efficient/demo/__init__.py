"""A tiny pretrained ESM-2 and a synthetic table in the DeepLoc-2.0 schema: everything runs offline."""

from __future__ import annotations

from pathlib import Path

from esm_efficient.demo.table import write_demo_table

__all__ = ["demo_model_path", "write_demo_table"]


def demo_model_path() -> str:
    """The folder of the tiny ESM-2 that is shipped with the library, for ``from_pretrained``.

    Its card, ``README.md`` in that folder, says on what it was trained and how well it predicts a residue.

    Example:
        >>> from transformers import AutoConfig
        >>> AutoConfig.from_pretrained(demo_model_path()).model_type
        'esm'
    """
    return str(Path(__file__).parent / "model")
