"""What an examination says: one finding a check, and how a list of them reads as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

OK, NOTE, WARNING, PROBLEM = LEVELS = ("ok", "note", "warning", "problem")
"""From harmless to serious: a note is worth knowing, a warning may cost a run, a problem will."""

HERE = "this machine"
CLUSTER = "cluster"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at on one node: a name, a level, what was found, and what to do about it if that is
    bad. `seconds` is how long its stage of the examination took."""

    name: str
    node: str
    level: str
    found: str
    advice: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level
        assert self.advice or self.level in (OK, NOTE), f"{self.name}: nothing is said about what to do"

    def took(self, seconds: float) -> Check:
        return replace(self, seconds=round(seconds, 3))


def lines_of(checks: Sequence[Check]) -> list[str]:
    """A line a check, and below it what to do. Nodes of which the same is to be said share one."""
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    for check in checks:
        nodes = merged.setdefault((check.name, check.level, check.found, check.advice), [])
        if check.node not in nodes:
            nodes.append(check.node)
    lines = []
    for (name, level, found, advice), nodes in merged.items():
        where = nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes"
        if len(nodes) > 1 and level in (WARNING, PROBLEM):
            where = ", ".join(nodes)
        lines.append(f"{level:<8} {name:<15} {where}: {found}")
        if advice:
            lines.append(f"{'':<8} {'':<15} do: {advice}")
    return lines


def is_ok(checks: Iterable[Check]) -> bool:
    """Whether there is no problem; warnings do not count."""
    return all(check.level != PROBLEM for check in checks)


def summary(checks: Sequence[Check]) -> str:
    """One line at the end."""
    counts = {level: sum(1 for check in checks if check.level == level) for level in LEVELS}
    said = ", ".join(_count(counts[level], level) for level in (PROBLEM, WARNING, NOTE))
    return f"{_count(len(checks), 'check')}: {said}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """{"checks": [{name, node, level, found, advice, seconds}], "ok"}."""
    return {"checks": [asdict(check) for check in checks], "ok": is_ok(checks)}


def size(num_bytes: float) -> str:
    """Bytes as people say them, in powers of ten: 64 MB, 1.3 GB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def speed(bytes_per_s: float) -> str:
    """In MB/s, as the command line's help promises."""
    return f"{bytes_per_s / 1e6:,.0f} MB/s" if bytes_per_s >= 10e6 else f"{bytes_per_s / 1e6:.2f} MB/s"
