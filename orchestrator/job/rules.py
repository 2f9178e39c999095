"""What a rule about several fields is: it asks for values and finds what does not fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

OWN_WORDS = "job"
"""The type of pydantic error whose message is already in our own words."""
ACROSS_FIELDS = "job_across_fields"
"""The same for mistakes across fields, which the loader finds by itself, with positions."""

Get = Callable[[str], Any]
"""The value at a dotted path, defaults included; raises Unknown when it is missing or not valid by itself."""


class Unknown(Exception):
    """A value a rule needs is missing or not valid by itself, so that the rule has nothing to say."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that does not hold. `fields`: the dotted paths involved, the most relevant first."""

    fields: tuple[str, ...]
    reason: str


Rule = Callable[[Get], Iterator[Finding]]
