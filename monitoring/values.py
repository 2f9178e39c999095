"""What a value from outside must be: a check says what is wrong with it, or None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monitoring.outside import Check

MOST_S = 1e11
"""Seconds; as a time it is in the year 5138. Beyond lie errors of the functions that show times."""
MOST = 1 << 63


def count(value: Any) -> str | None:
    """A whole number from 0 on, of 63 bits."""
    return None if type(value) is int and 0 <= value < MOST else "is no count"


def whole(value: Any) -> str | None:
    return None if type(value) is int and -MOST < value < MOST else "is no whole number"


def number(value: Any) -> str | None:
    """Of a size that sums and squares of it are finite, too."""
    return None if type(value) in (int, float) and -1e100 < value < 1e100 else "is no number"


def seconds(value: Any) -> str | None:
    """A length of time or a time; a bit below 0 is what clocks of two machines make of a short one."""
    return None if type(value) in (int, float) and -MOST_S < value < MOST_S else "is no time"


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else "is no text"


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is neither true nor false"


def thing(value: Any) -> str | None:
    return None if isinstance(value, dict) else "is no object"


def anything(_value: Any) -> None:
    return None


def maybe(check: Check) -> Check:
    """Or null."""
    return lambda value: None if value is None else check(value)


def many(check: Check) -> Check:
    """A list of such."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, list):
            return "is no list"
        for index, item in enumerate(value):
            if (wrong := check(item)) is not None:
                return _inside(f"[{index}]", wrong)
        return None

    return checked


def by_name(check: Check) -> Check:
    """An object of such."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return "is no object"
        for name, item in value.items():
            if (wrong := check(item)) is not None:
                return _inside(f".{name[:40]}", wrong)
        return None

    return checked


def fields(needed: Mapping[str, Check], **optional: Check) -> Check:
    """An object that has the `needed` fields, and of the others those that it has as they should be."""
    known = [(name, check, name in needed) for name, check in (dict(needed) | optional).items()]

    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return "is no object"
        for name, check, is_needed in known:
            if name not in value:
                if is_needed:
                    return f"has no {name}"
            elif (wrong := check(value[name])) is not None:
                return _inside(f".{name}", wrong)
        return None

    return checked


def _inside(place: str, wrong: str) -> str:
    separator = "" if wrong.startswith((".", "[")) else " "
    return f"{place}{separator}{wrong}"


def both(*checks: Check) -> Check:
    """All of these."""
    return lambda value: next((wrong for check in checks if (wrong := check(value)) is not None), None)
