"""Imports point one way, without a circle, and only one room knows Ray; also between the rooms inside the packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("orchestrator", "strategies", "monitoring")
FLOORS = {
    "strategies": (
        "compat", "layout", "comm", "wire", "reduction", "model", "optim", "state", "objective", "gradient", "trial",
        "update",
    ),
    "orchestrator": (
        "errors", "plugins", "urls", "lateness", "faults", "storage", "job", "rundir", "succession", "data", "models",
        "planning", "checkpoint", "evaluation", "notices", "control.core", "training", "control.training", "doctor",
        "runtime", "runtime.ray", "api", "cli",
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


def test_no_file_name_is_there_thrice() -> None:
    """A reader who is told "protocol.py" should not have to ask which."""
    names = Counter(path.name for package in PACKAGES for path in files(package) if path.name != "__init__.py")
    assert [name for name, times in names.items() if times > 2] == []


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


NOT_PROMISED = re.compile(
    r"(ray\._private|ray\._raylet|ray\.core|ray\.experimental|torch\._|torch\.distributed\._|torch\..*\._)"
)
"""Modules of Ray and torch that may be gone with the next version."""


def test_what_ray_and_torch_do_not_promise_is_used_in_one_place_each() -> None:
    """And in what doctor sends to nodes, where this package may not be."""
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in files(package)
        if any(NOT_PROMISED.match(name) for name in imported(path))
    }
    assert found == {"strategies/compat.py", "orchestrator/runtime/ray/examination/node.py"}


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


MOST_CLASS_LINES, MOST_ATTRIBUTES, MOST_FUNCTION_LINES = 300, 15, 60


def too_large(tree: ast.AST) -> list[str]:
    """Classes of many lines or attributes whose docstrings do not say why, and functions of many lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines > MOST_FUNCTION_LINES:
            found.append(f"{node.name}: {lines} lines, {MOST_FUNCTION_LINES} at most")
        if isinstance(node, ast.ClassDef):
            said = " ".join((ast.get_docstring(node) or "").lower().split())
            attributes = len(attributes_of(node))
            if lines > MOST_CLASS_LINES and f"more than {MOST_CLASS_LINES} lines:" not in said:
                found.append(f'{node.name}: {lines} lines, and no sentence "More than {MOST_CLASS_LINES} lines: why"')
            if attributes > MOST_ATTRIBUTES and f"more than {MOST_ATTRIBUTES} attributes" not in said:
                sentence = f"More than {MOST_ATTRIBUTES} attributes: why"
                found.append(f"{node.name}: {attributes} attributes, and no sentence {sentence!r}")
    return found


def attributes_of(node: ast.ClassDef) -> set[str]:
    """Those that are assigned in its methods, and the fields of a dataclass."""
    fields = {
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    return fields | {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_classes_and_functions_fit_in_a_head(package: str) -> None:
    found = {str(path.relative_to(ROOT)): too_large(ast.parse(path.read_text())) for path in files(package)}
    assert {path: sizes for path, sizes in found.items() if sizes} == {}


def test_what_is_too_large_would_be_found() -> None:
    many = "\n".join(f"        self.a{number} = 0" for number in range(MOST_ATTRIBUTES + 1))
    assert "attributes" in too_large(ast.parse(f"class A:\n    def f(self):\n{many}"))[0]
    assert not too_large(ast.parse(f'class A:\n    """More than 15 attributes: so."""\n    def f(self):\n{many}'))
    long = "\n".join("    pass" for _ in range(MOST_FUNCTION_LINES))
    assert "lines" in too_large(ast.parse(f"def f():\n{long}"))[0]


WALKS = ROOT / "docs" / "how-it-works.md"
STEP = re.compile(r"^- `([a-z_/]+\.py):([A-Za-z_.]+)` ", re.MULTILINE)


def walks() -> list[list[tuple[str, str]]]:
    """(file, function or class) of each walk in the documentation."""
    text = WALKS.read_text(encoding="utf-8").partition("## Three walks")[2].partition("\n## ")[0]
    parts = [STEP.findall(part) for part in re.split(r"\n\n(?=[A-Z])", text)]
    return [part for part in parts if part]


def test_the_walks_lead_where_they_say() -> None:
    assert [len(walk) for walk in walks()] == [5, 9, 11]
    for file, name in (step for walk in walks() for step in walk):
        inside: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            found = [
                each
                for each in inside
                if isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and each.name == part
            ]
            assert found, f"{file} has no {name}"
            inside = found[0].body


def test_a_walk_enters_every_room_once() -> None:
    for walk in walks():
        rooms = [(file.split("/")[0], room(file.removesuffix(".py").replace("/", "."))) for file, _ in walk]
        entered = [each for number, each in enumerate(rooms) if number == 0 or rooms[number - 1] != each]
        assert len(entered) == len(set(entered)), entered
