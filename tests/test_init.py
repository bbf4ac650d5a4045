"""The public names are lazy, complete and documented, and imports run one way."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import esm_efficient

PACKAGE = Path(esm_efficient.__file__).parent
REPOSITORY = Path(__file__).parents[1]


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
    """The imports under TYPE_CHECKING, which type checkers read, must name the modules that are loaded."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(static) == sorted(esm_efficient.__all__)
    assert static == {name: f"esm_efficient.{module}" for name, module in esm_efficient._MODULES.items()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'WeigthedTrainer'"):
        _ = esm_efficient.WeigthedTrainer


def test_every_public_function_has_an_example():
    functions = [name for name in esm_efficient.__all__ if inspect.isfunction(getattr(esm_efficient, name))]
    assert [name for name in functions if "Example:\n" not in getattr(esm_efficient, name).__doc__] == []


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


# --- names in the documentation and the examples ---


def python_sources() -> Iterator[tuple[str, str]]:
    """Yield the file name and the text of every example, and of every Python block of the README and the pages."""
    for path in sorted((REPOSITORY / "examples").rglob("*.py")):
        yield str(path.relative_to(REPOSITORY)), path.read_text()
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs" / "pages").rglob("*.md"))):
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            yield str(path.relative_to(REPOSITORY)), block


def documented_imports() -> list[tuple[str, str, str]]:
    """Return the file, module and name of each `from esm_efficient... import ...` in examples and documentation."""
    return sorted(
        {
            (file, node.module, alias.name)
            for file, source in python_sources()
            for node in ast.walk(ast.parse(source, file))
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "esm_efficient"
            for alias in node.names
        }
    )


def names_in_the_api_reference() -> list[str]:
    pages = sorted((REPOSITORY / "docs" / "pages" / "api").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (esm_efficient\S+)", page.read_text(), re.MULTILINE)]


def test_the_documentation_and_the_examples_import_something():
    files = {file for file, _, _ in documented_imports()}
    assert {"README.md", "docs/pages/index.md", "examples/finetune_membrane.py", "examples/sagemaker/train.py"} <= files
    assert len(names_in_the_api_reference()) > 50


@pytest.mark.parametrize(("file", "module", "name"), documented_imports())
def test_names_that_documentation_and_examples_import_are_public(file, module, name):
    """Public names are imported from the package, and others from modules that the API reference shows."""
    assert pkgutil.resolve_name(f"{module}.{name}") is not None
    if module == "esm_efficient":
        assert name in esm_efficient.__all__
    else:
        assert name not in esm_efficient.__all__, f"import {name} from esm_efficient"
        assert f"{module}.{name}" in names_in_the_api_reference()


@pytest.mark.parametrize("path", names_in_the_api_reference())
def test_names_in_the_api_reference_exist(path):
    assert pkgutil.resolve_name(path) is not None


def test_each_public_name_is_in_the_api_reference_once_with_the_module_that_defines_it():
    listed = names_in_the_api_reference()
    public = {path.rpartition(".")[2]: path for path in listed if path.rpartition(".")[2] in esm_efficient.__all__}
    assert [path for path, count in Counter(listed).items() if count > 1] == []
    assert sorted(public) == sorted(esm_efficient.__all__)
    moved = [path for name, path in public.items() if pkgutil.resolve_name(path) is not getattr(esm_efficient, name)]
    assert moved == []


def test_the_api_reference_shows_the_module_of_a_name_that_is_not_public():
    pages = "".join(path.read_text() for path in (REPOSITORY / "docs" / "pages" / "api").glob("*.md"))
    for path in names_in_the_api_reference():
        with_module = f"::: {path}\n    options:\n      show_root_full_path: true\n" in pages
        assert with_module == (path.rpartition(".")[2] not in esm_efficient.__all__), path


# --- the order of imports ---

ORDER = (
    *(
        "errors",
        "out_of_memory",
        "published",
        "_torch",
        "compat",
        "saving",
        "tasks",
        "heads",
        "recipes",
        "data",
        "demo",
        "reporting",
        "adapters",
        "encoder",
        "trunk",
    ),
    *("costs", "estimation", "inference", "profiling", "training", "comparison", "cli", "__main__"),
)


def library_imports(path: Path) -> Iterator[str]:
    """Yield the names of the library's modules that a file imports, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "esm_efficient")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names if (node.module or "").split(".")[0] == "esm_efficient" else ():
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def module_of(path: Path) -> str:
    """The dotted name of a file of the library."""
    parts = ("esm_efficient", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_imports_run_one_way():
    """A package may import its own files and the packages before it in ORDER."""
    rank = {name: level for level, name in enumerate(ORDER)}
    wrong = []
    for module, path in MODULES.items():
        if module == "esm_efficient":
            continue
        own = module.split(".")[1]
        imported = {name.split(".")[1] for name in library_imports(path) if name != "esm_efficient"}
        wrong += [f"{module} imports {other}" for other in imported if rank[other] > rank[own]]
    assert wrong == []


def test_no_two_files_import_each_other():
    """No chain of imports leads from a file back to it; imports inside functions count too."""
    graph = {module: set(library_imports(path)) for module, path in MODULES.items()}

    def reachable(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    assert [module for module in graph if module in reachable(module)] == []


def test_the_library_imports_no_example_and_no_test():
    outside = {path.stem for folder in ("examples", "tests") for path in (REPOSITORY / folder).rglob("*.py")}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in {"examples", "tests"} | outside, f"{module} imports {name}"
