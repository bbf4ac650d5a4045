"""The public names: lazy, complete, and visible."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import esm_efficient


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_import_loads_no_heavy_library():
    heavy = {"torch", "transformers", "peft", "datasets", "numpy"}
    assert run(f"import sys, esm_efficient; print({heavy} & set(sys.modules) or None)") == "None"


def test_import_takes_under_100_ms():
    code = "import time; t = time.perf_counter(); import esm_efficient; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


@pytest.mark.parametrize("name", esm_efficient.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(esm_efficient, name) is not None
    assert name in dir(esm_efficient)


def test_names_for_type_checkers_are_the_names_at_run_time():
    """A type checker reads the imports under TYPE_CHECKING; they must come from where the name is loaded from."""
    tree = ast.parse(Path(esm_efficient.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(static) == sorted(esm_efficient.__all__)
    assert static == {name: f"esm_efficient.{module}" for name, module in esm_efficient._MODULES.items()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'WeigthedTrainer'"):
        _ = esm_efficient.WeigthedTrainer


def test_the_package_is_typed():
    assert (Path(esm_efficient.__file__).parent / "py.typed").exists()


ORDER = (
    *("errors", "_torch", "compat", "tasks", "recipes", "data", "demo", "reporting", "adapters", "encoder", "trunk"),
    *("costs", "estimation", "inference", "profiling", "training", "comparison", "cli", "__main__"),
)


def test_imports_run_one_way():
    """A package imports its own files and what stands before it in the order of the design."""
    root = Path(esm_efficient.__file__).parent
    rank = {name: level for level, name in enumerate(ORDER)}
    wrong = []
    for path in root.rglob("*.py"):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("esm_efficient."):
                other = node.module.split(".")[1]
                if rank[other] > rank[own]:
                    wrong.append(f"{path.relative_to(root)} imports {node.module}")
    assert wrong == []
