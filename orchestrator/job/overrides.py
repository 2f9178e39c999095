"""Values from the command line: `--set a.b=value` and `--fault step=20,worker=1,kind=kill`.

Both become parts of the job file's tree before it is validated; each part remembers the option it came from,
so that whatever is wrong with it is reported under that option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.job import checks
from orchestrator.job.explain import validate
from orchestrator.job.problems import JobError, Problem
from orchestrator.job.sections.faults import Fault
from orchestrator.job.yaml_tree import BROKEN, Mistake, Path, Position, Tree, describe, one_line, read, shorten


@dataclass(frozen=True, slots=True)
class Override:
    """One `--set`: the value in `tree` is to stand at `path` of the job."""

    path: tuple[str, ...]
    tree: Tree
    place: Position


def parse_override(text: str, option: int) -> Override | Mistake:
    """The override in `a.b=value`; `option` is its position on the command line, from 1."""
    dotted, equals, value = text.partition("=")
    path = tuple(part.strip() for part in dotted.split("."))
    # A user who writes a key where its name belongs does not find it in the log of what went wrong.
    shown = f"{dotted}=..." if path[:2] == ("checkpoint", "encryption") else text
    place = Position(f"--set {one_line(shown)}", option=option)
    if not equals or not all(path):
        return Mistake(place, (), "must read a.b=value, for example train.steps=100")
    tree = read(value, place)
    if tree.mistakes:
        first = tree.mistakes[0]
        return Mistake(place, path + first.path, first.reason)
    return Override(path, tree, place)


def as_mapping(texts: Sequence[str]) -> dict[str, Any]:
    """What several of them set, as nested mappings. Raises JobError."""
    tree = Tree(data={}, values={(): Position("--set")})
    for option, text in enumerate(texts, 1):
        override = parse_override(text, option)
        if isinstance(override, Mistake):
            tree.mistakes.append(override)
        else:
            apply_override(tree, override)
    if tree.mistakes:
        raise JobError([problem_of(mistake) for mistake in tree.mistakes])
    found: dict[str, Any] = tree.data
    return found


def apply_override(tree: Tree, override: Override) -> None:
    """Put the override's value into `tree`, making mappings on the way; a mistake goes to `tree.mistakes`."""
    current: Any = tree.data
    at: Path = ()
    for position, part in enumerate(override.path):
        last = position == len(override.path) - 1
        key: str | int = part
        if current is BROKEN:
            return  # reported where it stands
        if isinstance(current, list):
            if not (part.isascii() and part.isdigit() and int(part) < len(current)):
                entries = f"{len(current)} entr{'y' if len(current) == 1 else 'ies'}"
                reason = f"no entry {part!r}: {_dotted(at)} is a list of {entries}, counted from 0"
                tree.mistakes.append(Mistake(override.place, override.path, reason))
                return
            key = int(part)
        elif not isinstance(current, dict):
            reason = f"cannot be set: {_dotted(at)} is {describe(current)}, which has no fields"
            tree.mistakes.append(Mistake(override.place, override.path, reason))
            return
        at = (*at, key)
        if last:
            _put(tree, at, current, override)
        else:
            missing = isinstance(current, dict) and current.get(part) is None
            if missing:
                current[key] = {}
                tree.keys[at] = tree.values[at] = override.place
            current = current[key]


def _put(tree: Tree, at: Path, parent: Any, override: Override) -> None:
    for places in (tree.keys, tree.values):
        for path in [path for path in places if path[: len(at)] == at]:
            del places[path]
    tree.broken = {path for path in tree.broken if path[: len(at)] != at}
    parent[at[-1]] = override.tree.data
    tree.keys[at] = override.place
    graft(tree, at, override.tree)


def graft(tree: Tree, at: Path, part: Tree) -> None:
    """Take over the places of `part`, whose value now stands at `at`."""
    tree.keys.update({at + path: place for path, place in part.keys.items()})
    tree.values.update({at + path: place for path, place in part.values.items()})


def parse_fault(text: str) -> dict[str, Any]:
    """The fault in `step=20,worker=1,kind=kill`, as the job file would have it. Raises JobError."""
    part = read_fault(text, 1)
    if part.mistakes:
        raise JobError([problem_of(mistake) for mistake in part.mistakes])
    data: dict[str, Any] = part.data
    return data


def read_fault(text: str, option: int) -> Tree:
    """The fault in `text` with its places; `data` is a valid fault unless there are mistakes."""
    place = Position(f"--fault {one_line(text)}", option=option)
    tree = Tree(data={}, values={(): place})
    for item in text.split(","):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not (key and equals and value):
            reason = f"must read like step=20,worker=1,kind=kill, got {shorten(repr(item))}"
            tree.mistakes.append(Mistake(place, (), reason))
        elif key in tree.data:
            tree.mistakes.append(Mistake(place, (key,), "given twice"))
        else:
            inner = read(value, place)
            tree.mistakes.extend(replace(mistake, path=(key,)) for mistake in inner.mistakes[:1])
            tree.data[key] = inner.data
            tree.keys[(key,)] = tree.values[(key,)] = place
    if tree.mistakes:
        return tree
    fault, explained = validate(Fault, tree.data)
    tree.mistakes.extend(Mistake(place, found.path, found.reason) for found in explained)
    if fault is not None:
        alone = checks.reader({"faults": [fault.model_dump()]})
        for finding in checks.fault_kind(alone, "faults.0."):
            tree.mistakes.append(Mistake(place, (finding.fields[0].removeprefix("faults.0."),), finding.reason))
    return tree


def problem_of(mistake: Mistake) -> Problem:
    """The mistake as it is shown."""
    place, path = mistake.place, mistake.path
    if place.file.startswith("--fault ") and path[:1] == ("faults",):
        path = path[2:]  # the user of --fault never saw the list that it goes to
    return Problem(place.file, place.line, place.column, _dotted(path), one_line(mistake.reason))


def _dotted(path: Path) -> str:
    return ".".join(shorten(one_line(str(part))) for part in path)
