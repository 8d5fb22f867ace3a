"""The house: rooms import in one direction, every package is in the wheel, and the core stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import autoplace

ROOT = Path(__file__).parent.parent
SOURCES = Path(autoplace.__file__).parent
HEAVY = ("gymnasium", "stable_baselines3", "sb3_contrib", "mlflow", "optuna", "matplotlib")
COMPOSERS = ("tuner", "group_tuner", "parallel", "tracked", "cli")
"""The only modules of the core that may reach upward, inside a function."""

requires_checkout = pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the repository's files")


def _room(module: str) -> str:
    """`core`, `envs`, `agents` or `zoo`."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in ("envs", "agents", "zoo") else "core"


def _modules() -> list[tuple[str, Path]]:
    import autoplace.agents
    import autoplace.envs
    import autoplace.zoo

    found = []
    for package in (autoplace, autoplace.envs, autoplace.agents, autoplace.zoo):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            found.append((".".join([package.__name__, *inner]).removesuffix(".__init__"), path))
    return found


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether inside a function) of one file; what only type checkers see is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy, unseen = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lazy |= {id(inner) for inner in ast.walk(node)}
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            unseen |= {id(inner) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module, id(node) in lazy))
    return found


def test_rooms_import_in_one_direction():
    allowed = {"core": {"core"}, "envs": {"core", "envs"}, "agents": {"core", "envs", "agents"}, "zoo": {"core", "zoo"}}
    wrong = []
    for module, path in _modules():
        composer = _room(module) == "core" and len(module.split(".")) > 1 and module.split(".")[1] in COMPOSERS
        for imported, lazily in _imports(path):
            if imported.split(".")[0] != "autoplace" or _room(imported) in allowed[_room(module)]:
                continue
            if not (composer and lazily):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_nobody_imports_rooms_by_their_folder_name():
    wrong = [
        f"{m} imports {i}"
        for m, p in _modules()
        for i, _ in _imports(p)
        if i.split(".")[0] in ("envs", "agents", "zoo")
    ]
    assert wrong == []


def test_one_file_alone_imports_pynvml():
    users = {module for module, path in _modules() for imported, _ in _imports(path) if imported.startswith("pynvml")}
    assert users == {"autoplace.hardware.nvml"}


def test_importing_autoplace_loads_nothing_heavy():
    code = f"import sys, autoplace; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_few():
    assert len(autoplace.__all__) <= 8
    assert all(getattr(autoplace, name) is not None for name in autoplace.__all__)


@requires_checkout
def test_every_package_folder_is_in_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT) for p in ROOT.glob("autoplace/**/__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    for top in ("envs", "agents", "zoo"):
        for path in ROOT.glob(f"{top}/**/__init__.py"):
            names.add(".".join(("autoplace", *path.parent.relative_to(ROOT).parts)))
    assert listed == names
