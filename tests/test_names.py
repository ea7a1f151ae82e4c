"""Every name of jax and flax that softprompt_jax uses exists in the versions for newer Pythons too.

The tests run on one pair of jax and flax. The other pair's wheels are read, not executed: their sources tell which
names a module has. A name that is only still reachable through a deprecation (a module's `__getattr__`) counts as
missing, so this fails before the name goes.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "softprompt_jax").rglob("*.py"))
LIBRARIES = ("jax", "flax")


def names_used(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every dotted jax or flax name in a file (`jax.numpy.einsum`), and its line."""
    tree = ast.parse(path.read_text())
    called: dict[str, str] = {}  # what the file calls it -> what it is
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    yield alias.name, node.lineno
                    first = alias.name.split(".")[0]
                    called[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
                called[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts, root = [], node
        while isinstance(root, ast.Attribute):
            parts.append(root.attr)
            root = root.value
        if parts and isinstance(root, ast.Name) and root.id in called:
            yield ".".join([called[root.id], *reversed(parts)]), node.lineno


class Sources:
    """The modules of a library as text: an installed folder or a wheel, both offer `joinpath` and `read_text`."""

    def __init__(self, root: Path | zipfile.Path):
        self.root = root
        self.bound = cache(self._bound)

    def has(self, name: str) -> bool:
        """Tell whether a dotted name is a module, or bound in one; what hangs on a class or function is not asked."""
        module, rest = name.split(".")[0], name.split(".")[1:]
        while rest:
            bound = self.bound(module)
            if bound is None:
                return False
            target = bound.get(rest[0], f"{module}.{rest[0]}" if self.file(f"{module}.{rest[0]}") else None)
            if target is None:
                return False
            if not self.file(target):  # a class, a function, a value; or imported from another library
                return True
            module, rest = target, rest[1:]
        return self.file(module) is not None

    def file(self, module: str):
        """Return the file of a module, a stub for a compiled one, or None."""
        parts = module.split(".")
        for tail in (["__init__.py"], ["__init__.pyi"]):
            if (path := self.root.joinpath(*parts, *tail)).exists():
                return path
        for ending in (".py", ".pyi"):
            if (path := self.root.joinpath(*parts[:-1], parts[-1] + ending)).exists():
                return path
        return None

    def _bound(self, module: str) -> dict[str, str] | None:
        """Return what a module binds at its top level, and the module each name stands for ("" where it is none)."""
        path = self.file(module)
        if path is None:
            return None
        package = module if path.name.startswith("__init__") else module.rpartition(".")[0]
        bound: dict[str, str] = {}
        for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else ""
            elif isinstance(node, ast.ImportFrom):
                above = package.rsplit(".", node.level - 1)[0] if node.level else ""
                origin = ".".join(part for part in (above, node.module) if part)
                for alias in node.names:
                    if alias.name == "*":
                        bound |= {key: value for key, value in (self.bound(origin) or {}).items() if key[0] != "_"}
                    else:
                        bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound[node.name] = ""
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    bound |= {leaf.id: "" for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
        return bound


def statements(tree: ast.Module | ast.If | ast.Try) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported, without what only type checkers see."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try):
            yield from statements(node)
        else:
            yield node
    for node in getattr(tree, "orelse", []):
        yield node


def missing(sources: Sources, library: str) -> list[str]:
    """Return the names of one library that softprompt_jax uses and `sources` lack, each with its place."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        for name, line in names_used(path)
        if name.split(".")[0] == library and not sources.has(name)
    ]


def installed(library: str) -> Sources:
    """Return the sources of a library as installed here."""
    return Sources(Path(str(importlib.metadata.distribution(library).locate_file(""))))


@pytest.mark.parametrize("library", LIBRARIES)
def test_names_exist_in_the_installed_version(library: str) -> None:
    assert missing(installed(library), library) == []


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("jax.numpy.einsum", True),
        ("jax.lax.scan", True),
        ("jax.sharding.AxisType.Auto", True),
        ("jax.tree.map", True),
        ("jax.experimental.multihost_utils.sync_global_devices", True),
        ("flax.nnx.Param", True),
        ("flax.nnx.no_such_name", False),
        ("jax.numpy.no_such_name", False),
        ("jax.no_such_module.name", False),
        ("jax.tree_map", False),  # removed in jax 0.6
    ],
)
def test_reading_sources_tells_names_apart(name: str, there: bool) -> None:
    assert installed(name.split(".")[0]).has(name) is there


@pytest.mark.network
@pytest.mark.parametrize("library", LIBRARIES)
def test_names_exist_in_the_version_for_newer_pythons(library: str, tmp_path: Path) -> None:
    pins = re.findall(rf"^{library}==(\S+); python_version >= '3.12'$", (ROOT / "constraints.txt").read_text(), re.M)
    assert len(pins) == 1, f"constraints.txt: expected one pin of {library} for Python 3.12 and newer"
    download = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*download, "--python-version=3.12", f"--dest={tmp_path}", f"{library}=={pins[0]}"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert missing(Sources(zipfile.Path(wheel)), library) == []
