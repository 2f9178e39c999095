"""Imports point one way, and only one room knows Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("orchestrator", "strategies", "monitoring")


def imported(path: Path) -> set[str]:
    """The modules a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def files(*parts: str) -> list[Path]:
    found = sorted(ROOT.joinpath(*parts).rglob("*.py"))
    assert found
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


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


def test_only_the_cluster_room_knows_ray() -> None:
    for package in PACKAGES:
        for path in files(package):
            if "cluster" not in path.relative_to(ROOT).parts:
                assert "ray" not in roots(path), path


def test_the_state_machine_has_no_clock_and_no_io() -> None:
    for path in files("orchestrator", "controller"):
        assert not roots(path) & {"time", "os", "pathlib", "random", "threading", "asyncio", "torch", "socket"}, path


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
    code = "import sys, orchestrator.runtime.ray.controller_actor\nsys.exit('imported torch' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
