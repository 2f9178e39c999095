"""Imports point one way, without a circle, and only one room knows Ray; also between the rooms inside the packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("orchestrator", "strategies", "monitoring")
FLOORS = {
    "strategies": (
        "layout", "comm", "reduction", "model", "optim", "state", "objective", "gradient", "trial", "update",
    ),
    "orchestrator": (
        "errors", "plugins", "urls", "lateness", "storage", "job", "rundir", "succession", "data", "models", "planning",
        "checkpoint", "notices", "control.core", "training", "control.training", "doctor", "runtime", "runtime.ray",
        "api", "cli",
    ),
}  # fmt: skip
"""The rooms of a package from the ground up: each imports only those before it."""
NESTED = ("runtime.ray", "control.core", "control.training")
"""Rooms inside others that are rooms of their own."""
KNOWS_RAY = ("orchestrator", "runtime", "ray")


def imported(path: Path, modules: Container[str] = ()) -> set[str]:
    """The modules that a file imports, wherever in it; of `modules` also those that it takes out of a package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module or "" for name in inner}
    return names


def files(*parts: str) -> list[Path]:
    found = sorted(ROOT.joinpath(*parts).rglob("*.py"))
    assert found
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@cache
def graph() -> Mapping[str, set[str]]:
    """By module of ours, the modules of ours that it imports."""
    modules = {}
    for package in PACKAGES:
        for path in files(package):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            modules[name] = path
    return {name: imported(path, modules) & modules.keys() - {name} for name, path in modules.items()}


def room(module: str) -> str:
    """The room of a module in its package: the first folder or file below it, or a nested room."""
    _, *inside = module.split(".")
    nested = ".".join(inside[:2])
    return nested if nested in NESTED else inside[0] if inside else ""


def in_a_circle(arrows: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert not in_a_circle(graph())


def test_a_circle_would_be_found() -> None:
    assert set(in_a_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize("package", FLOORS)
def test_no_room_imports_one_above_it(package: str) -> None:
    floors = FLOORS[package]
    for module, others in graph().items():
        name = room(module)
        if module.split(".")[0] != package or name in ("", "__main__", "control"):
            continue  # The face of the package, or of a room.
        assert name in floors, f"{module} is in no room of {package} that has a floor"
        for other in others:
            if other.split(".")[0] == package and room(other):
                assert floors.index(room(other)) <= floors.index(name), f"{module} imports {other}, which is above it"


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_do_not_import_each_other_in_a_circle(package: str) -> None:
    arrows: dict[str, set[str]] = {}
    for module, others in graph().items():
        name = room(module)
        inside = {room(other) for other in others if other.split(".")[0] == package} - {name, ""}
        if module.split(".")[0] == package and name:
            arrows.setdefault(name, set()).update(inside)
    assert not in_a_circle(arrows)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("strategies", {"orchestrator", "monitoring", "ray", "pydantic", "typer"}),
        ("monitoring", {"orchestrator", "strategies", "ray", "torch", "transformers"}),
    ],
)
def test_strategies_and_monitoring_stand_alone(package: str, forbidden: set[str]) -> None:
    for path in files(package):
        assert not roots(path) & forbidden, path


def test_only_one_room_knows_ray() -> None:
    for package in PACKAGES:
        for path in files(package):
            if path.relative_to(ROOT).parts[:3] != KNOWS_RAY:
                assert "ray" not in roots(path), path


def test_the_state_machine_has_no_clock_and_no_io() -> None:
    for path in files("orchestrator", "control"):
        assert not roots(path) & {"time", "os", "pathlib", "random", "threading", "asyncio", "torch", "socket"}, path


@pytest.mark.parametrize("room_of", ["strategies/layout", "orchestrator/control", "orchestrator/notices"])
def test_what_steers_imports_no_torch_itself(room_of: str) -> None:
    for path in files(*room_of.split("/")):
        names = {
            name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not any(name.split(".")[0] == "torch" for name in names), path


def test_importing_the_packages_does_no_heavy_work() -> None:
    code = (
        "import sys, orchestrator, orchestrator.cli, strategies, monitoring\n"
        "heavy = {'ray', 'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_controller_process_needs_no_torch() -> None:
    """A restarted controller is in charge the sooner the less it imports."""
    code = (
        "import sys, orchestrator.runtime.ray.controller_actor, orchestrator.runtime.training_executor\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
