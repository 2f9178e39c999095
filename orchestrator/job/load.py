"""From a YAML file and the command line's options to a job, or to every mistake in them at once.

The class of the job (`root`) is an argument, so that its own methods can be these.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator.job import checks
from orchestrator.job.explain import Explained, default_at, explain, validate
from orchestrator.job.overrides import apply_override, graft, parse_override, problem_of, read_fault
from orchestrator.job.problems import JobError, Problem
from orchestrator.job.rules import Finding, Get, Unknown
from orchestrator.job.yaml_tree import BROKEN, Mistake, Path, Position, Tree, describe, read

Root = TypeVar("Root", bound=BaseModel)


def load_file(
    root: type[Root], path: str | os.PathLike[str], overrides: Sequence[str] = (), faults: Sequence[str] = ()
) -> Root:
    """See `Job.load`. Raises JobError, also when the file cannot be read or is not UTF-8."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            raw = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise JobError([Problem(name, 0, 0, "", f"cannot be read: {reason}")]) from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        line = raw.count(b"\n", 0, error.start) + 1
        column = len(raw[line_start : error.start].decode("utf-8")) + 1
        reason = f"not UTF-8: the byte 0x{raw[error.start]:02x} does not belong here"
        raise JobError([Problem(name, line, column, "", reason)]) from None
    return load_text(root, text, name, overrides, faults)


def load_text(
    root: type[Root],
    text: str,
    filename: str = "<string>",
    overrides: Sequence[str] = (),
    faults: Sequence[str] = (),
) -> Root:
    """See `Job.loads`. Raises JobError."""
    tree = read(text, Position(filename))
    usable = _is_mapping(root, tree)
    _take_options(tree, overrides, faults, usable)
    job = _validated(root, tree) if usable else None
    if job is None or tree.mistakes:
        raise JobError(_in_order(tree.mistakes))
    return job


def located(
    path: str | os.PathLike[str], overrides: Sequence[str], faults: Sequence[str], findings: Sequence[Finding]
) -> JobError:
    """What was found beyond the job file (a model that cannot be built), with the positions of its fields in it."""
    name = os.fspath(path)
    try:
        with open(name, encoding="utf-8") as file:
            tree = read(file.read(), Position(name))
        _take_options(tree, overrides, faults, usable=isinstance(tree.data, dict))
        return JobError(_in_order([_located(tree, finding) for finding in findings]))
    except (OSError, ValueError, StopIteration):  # The file has changed since it was loaded.
        return JobError([Problem(name, 0, 0, finding.fields[0], finding.reason) for finding in findings])


def mistakes_in(root: type[BaseModel], error: ValidationError, data: object) -> JobError:
    """Every mistake of a job that was made of a mapping and not of a file: those that pydantic found, and those across
    the fields that are valid."""
    if not isinstance(data, dict):
        return JobError([Problem("job", 0, 0, "", f"must be a mapping of fields, got {describe(data)}")])
    found = list(explain(error, root, data))
    mistakes = [Mistake(Position("job"), each.path, each.reason) for each in found]
    for finding in checks.find(_reader(root, data, {each.path for each in found})):
        mistakes.append(Mistake(Position("job"), _path_of(finding.fields[0]), finding.reason))
    return JobError(list(dict.fromkeys(problem_of(mistake) for mistake in mistakes)))


def _is_mapping(root: type[BaseModel], tree: Tree) -> bool:
    if tree.empty:
        required = [name for name, field in root.model_fields.items() if field.is_required()]
        reason = f"the file is empty; a job needs at least {', '.join(required)}"
    elif isinstance(tree.data, dict):
        return True
    elif tree.data is BROKEN:
        return False
    else:
        reason = f"the file must hold a mapping of fields (name: ..., model: ...), got {describe(tree.data)}"
    tree.mistakes.append(Mistake(tree.values[()], (), reason))
    return False


def _take_options(tree: Tree, overrides: Sequence[str], faults: Sequence[str], usable: bool) -> None:
    """Put the options' values into the tree; mistakes in an option are found even if the file is no use."""
    for option, text in enumerate(overrides, 1):
        override = parse_override(text, option)
        if isinstance(override, Mistake):
            tree.mistakes.append(override)
        elif usable:
            apply_override(tree, override)
    for option, text in enumerate(faults, len(overrides) + 1):
        fault = read_fault(text, option)
        tree.mistakes.extend(fault.mistakes)
        if usable and not fault.mistakes:
            entries = tree.data.setdefault("faults", [])
            # A `faults` that is no list is reported as such; there is nothing to append to.
            if isinstance(entries, list):
                entries.append(fault.data)
                graft(tree, ("faults", len(entries) - 1), fault)


def _validated(root: type[Root], tree: Tree) -> Root | None:
    """The job in the tree, if it is valid; adds to the tree's mistakes."""
    job, explained = validate(root, tree.data)
    explained = [found for found in explained if not _under(found.path, tree.broken)]
    tree.mistakes.extend(Mistake(_place_of(tree, found), found.path, found.reason) for found in explained)
    invalid = tree.broken | {found.path for found in explained}
    for finding in checks.find(_reader(root, tree.data, invalid)):
        tree.mistakes.append(_located(tree, finding))
    if job is None and not tree.mistakes:
        raise AssertionError("pydantic refuses a job in which the loader finds nothing wrong")
    return job


def _under(path: Path, roots: set[Path]) -> bool:
    return any(path[:length] in roots for length in range(len(path) + 1))


def _path_of(dotted: str) -> Path:
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))


def _reader(root: type[BaseModel], data: dict[str, Any], invalid: set[Path]) -> Get:
    """`Get` over data of which the values at `invalid` cannot be used."""

    def get(dotted: str) -> Any:
        path = _path_of(dotted)
        value: Any = data
        for depth, part in enumerate(path, 1):
            if path[:depth] in invalid:
                raise Unknown(dotted)
            if isinstance(value, list):
                value = value[int(part)]
            elif isinstance(value, dict) and part in value:
                value = value[part]
            else:
                return default_at(root, path)
        return value

    return get


def _place_of(tree: Tree, found: Explained) -> Position:
    places = tree.keys if found.at_key else tree.values
    return places.get(found.path) or _nearest(tree, found.path)


def _nearest(tree: Tree, path: Path) -> Position:
    """Where the value at `path` stands, or else the smallest mapping or list around it that was written."""
    return next(tree.values[path[:length]] for length in range(len(path), -1, -1) if path[:length] in tree.values)


def _located(tree: Tree, finding: Finding) -> Mistake:
    """The finding at the field most likely meant to change: one from an option, or the first written."""
    paths = [_path_of(field) for field in finding.fields]
    written = [path for path in paths if path in tree.values]
    options = [path for path in written if tree.values[path].option]
    path = (options or written or paths)[0]
    return Mistake(_nearest(tree, path), path, finding.reason)


def _in_order(mistakes: list[Mistake]) -> list[Problem]:
    """The file's mistakes by position, then the options' in the order they were given; each once."""

    def key(mistake: Mistake) -> tuple[int, int, int]:
        return mistake.place.option, mistake.place.line, mistake.place.column

    return list(dict.fromkeys(problem_of(mistake) for mistake in sorted(mistakes, key=key)))
