"""Parts of the platform that other packages bring: found by name, through entry points (docs/contributing.md).

A package that has, say, an optimizer says so in its pyproject.toml, and a job file may name it from then on:

    [project.entry-points."elastic_orchestrator.optimizers"]
    lion = "my_package.lion:LION"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from orchestrator.errors import PluginError

PREFIX = "elastic_orchestrator."
T = TypeVar("T")


@cache
def _of_packages(kind: str) -> dict[str, EntryPoint]:
    """By name. Of several packages with one name, none is taken: which one it is must not depend on the machine."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=PREFIX + kind):
        found.setdefault(entry.name, []).append(entry)
    return {name: entries[0] for name, entries in found.items() if len({entry.value for entry in entries}) == 1}


def names(kind: str, own: Iterable[str]) -> list[str]:
    """All of a kind ("optimizers"): our own, then those of installed packages."""
    ours = list(own)
    return [*ours, *sorted(_of_packages(kind).keys() - set(ours))]


def find_callable(kind: str, name: str, own: Mapping[str, Callable[..., T]]) -> Callable[..., T]:
    """Likewise, where a kind's parts are made by calling what is named."""
    return find(kind, name, own, Callable)  # type: ignore[arg-type]


def find(kind: str, name: str, own: Mapping[str, T], base: type[T]) -> T:
    """The one of a kind that has this name, ours before others; an instance of `base`.

    Raises PluginError when there is none, when its package fails, or when it is something else.
    """
    if name in own:
        return own[name]
    entry = _of_packages(kind).get(name)
    if entry is None:
        known = ", ".join(names(kind, own))
        raise PluginError(f"there is none of the {kind} named {name!r}; {f'known are {known}' if known else 'none is'}")
    try:
        found = entry.load()
    except Exception as error:  # A package of somebody else's can fail with anything.
        raise PluginError(f"{name!r} of the {kind}: {entry.value} fails: {type(error).__name__}: {error}") from error
    if not isinstance(found, base):
        raise PluginError(f"{name!r} of the {kind}: {entry.value} is a {type(found).__name__}, not a {base.__name__}")
    return found
