"""Imports point downwards, are declared, and bring in neither torch nor TensorFlow."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "softprompt_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top down. A module may import from its own line and from those below; a folder counts as one module.
LAYERS = (
    "__init__ __main__ cli",
    "paper",
    "analysis export serve",
    "training",
    "inference",
    "assembly",
    "trust",
    "run",
    "tasks",
    "checkpoints pretraining",
    "methods",
    "models",
    "data",
    "distributed optim",
    "config field_comments files in_memory progress statistics trees",
)
LAYER = {module: height for height, line in enumerate(reversed(LAYERS)) for module in line.split()}
# Not for reasons of height: what knows tasks and text knows no model, and the other way round.
NEVER = {("tasks", "checkpoints"), ("tasks", "methods"), ("tasks", "models"), ("pretraining", "models")}
NEVER |= {("pretraining", "methods"), ("models", "data")}

# What would make the base install heavy. Inside a function, behind an extra, they are allowed.
HEAVY = {"torch", "tensorflow", "tensorflow_text", "seqio", "t5", "t5x", "clu", "matplotlib", "fastapi", "uvicorn"}


def module_of(path: Path) -> str:
    """Return the name in LAYERS that a file of the package belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """Yield the dotted names that `tree` imports; for `from a import b`, both could be modules: `a.b`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write softprompt_jax..."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported(node, inside_functions)


def inner_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, as named in LAYERS."""
    names = (name.split(".") for name in imported(ast.parse(path.read_text())))
    return {parts[1] for parts in names if parts[0] == "softprompt_jax" and len(parts) > 1} - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = module_of(path)
    assert here in LAYER, f"{path.name}: a new module; give it a place in LAYERS"
    for other in sorted(inner_imports(path)):
        assert other in LAYER, f"{path.name} imports softprompt_jax.{other}, which LAYERS does not know"
        assert LAYER[other] <= LAYER[here], f"{path.name} imports softprompt_jax.{other}, which lies above it"
        assert (here, other) not in NEVER, f"{path.name}: {here} must not know {other}"


def test_modules_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(module_of(path), set()).update(inner_imports(path) - {module_of(path)})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_heavy_is_imported_at_module_level(path: Path) -> None:
    found = {name.split(".")[0] for name in imported(ast.parse(path.read_text()), inside_functions=False)}
    assert not found & HEAVY, f"{path.name}: import {found & HEAVY} inside the function that needs it"


def test_every_third_party_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = project["dependencies"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    providers = packages_distributions()
    for path in FILES:
        tree = ast.parse(path.read_text())
        at_module_level = {name.split(".")[0] for name in imported(tree, inside_functions=False)}
        for name in {name.split(".")[0] for name in imported(tree)} - sys.stdlib_module_names - {"softprompt_jax"}:
            declared = {distribution(line) for line in (base if name in at_module_level else base + extras)}
            provided_by = {distribution(provider) for provider in providers.get(name, [name])}
            assert provided_by & declared, f"{path.name} imports {name}, which pyproject.toml does not require"


def distribution(requirement: str) -> str:
    """Return the normalised name that a requirement such as `jax[tpu]>=0.10` begins with."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
