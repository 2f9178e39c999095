"""Whether the tokens that a run was made with are still there, all of them, and no others. Knows the entry `store` of
environment.json and nothing else of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.sources import DataError
from orchestrator.data.store import TokenStore


@dataclass
class TokensReport:
    """What became of checking the tokens of a run's stores."""

    num_tokens: int = 0
    """Hashed again and found to be those of the run."""
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """What could not be looked at, and why."""


def rehash_tokens(store: Any) -> TokensReport:
    """Reads every token of the stores that a run used, and compares their digests with those on record."""
    report = TokensReport()
    parts = store.get("parts") if isinstance(store, Mapping) else None
    if not (isinstance(parts, list) and parts and all(_is_part(part) for part in parts)):
        report.unchecked.append("environment.json does not say where they are: the run is of an earlier version")
        return report
    for part in parts:
        location, recorded = str(part["location"]), str(part["digest"])
        try:
            opened = TokenStore(location)
        except DataError as error:
            report.unchecked.append(f"the token store {location} cannot be opened: {error}")
            continue
        try:
            found = opened.rehash()
        except DataError as error:
            report.problems.append(f"tokens: {error}")
            continue
        if found != recorded:
            report.problems.append(f"tokens: {location} gives {found}, the run was made with {recorded}")
        else:
            report.num_tokens += opened.num_tokens
    return report


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and {"location", "digest"} <= part.keys()
