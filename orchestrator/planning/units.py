"""Sizes, rates and lists of numbers as people write them on a command line, and back."""

from __future__ import annotations

import re

from orchestrator.errors import PlanError

_FACTORS = {
    "": 1.0,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "t": 1e12,
    "ki": 2.0**10,
    "mi": 2.0**20,
    "gi": 2.0**30,
    "ti": 2.0**40,
}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*"
MOST_WORKERS = 1_000_000
_MOST_COUNTS = 4096


def parse_bytes(text: str, option: str) -> float:
    """Bytes in `80GiB`, `80 GB`, `1.5TiB`. Raises PlanError naming `option`."""
    found = re.fullmatch(_NUMBER + r"([kmgt]i?)?b?", text, re.IGNORECASE)
    return _positive(found, text, option, "a size such as 80GiB or 24GB", _FACTORS)


def parse_rate(text: str, option: str) -> float:
    """Bytes per second in `25GB/s` or `200Gbit/s` (eight bits are a byte). Raises PlanError naming `option`."""
    found = re.fullmatch(_NUMBER + r"([kmgt]i?)?(b|bit)?(?:/s|ps)?", text, re.IGNORECASE)
    example = "a rate such as 25GB/s or 200Gbit/s"
    rate = _positive(found, text, option, example, _FACTORS)
    return rate / 8 if found and (found.group(3) or "").lower() == "bit" else rate


def parse_seconds(text: str, option: str) -> float:
    """Seconds in `5us`, `0.1ms`, `2e-6s`. Raises PlanError naming `option`."""
    found = re.fullmatch(_NUMBER + r"(ms|us|µs|ns|s)", text)
    return _positive(found, text, option, "a time such as 5us or 0.1ms", _TIMES)


def _positive(found: re.Match[str] | None, text: str, option: str, example: str, factors: dict[str, float]) -> float:
    value = float(found.group(1)) * factors[(found.group(2) or "").lower()] if found else 0.0
    if not 0 < value < float("inf"):
        raise PlanError(f"{option} must be {example}, more than 0, got {text!r}")
    return value


def parse_counts(text: str, option: str, at_most: int = MOST_WORKERS) -> tuple[int, ...]:
    """The ascending numbers in `8`, `1,2,4` or `1..64` (both ends included), also mixed. Raises PlanError."""
    counts: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", part)
        if not found:
            raise PlanError(f"{option} must be a number, a list such as 1,2,4 or a range such as 1..64, got {text!r}")
        first, last = int(found.group(1)), int(found.group(2) or found.group(1))
        if last < first:
            raise PlanError(f"{option} {part.strip()} runs backwards; write {last}..{first}")
        if first < 1 or last > at_most:
            raise PlanError(f"{option} must be between 1 and {at_most:,}, got {part.strip()}")
        if last - first >= _MOST_COUNTS:
            raise PlanError(
                f"{option} {part.strip()} is {last - first + 1:,} numbers; at most {_MOST_COUNTS:,} at once"
            )
        counts.update(range(first, last + 1))
    return tuple(sorted(counts))


def show_bytes(size: float) -> str:
    """`14.0 GiB`, `3.2 MiB`.

    >>> show_bytes(15 * 2**30)
    '15.0 GiB'
    """
    for unit, factor in (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def show_seconds(seconds: float) -> str:
    """`1.24 s`, `38.1 ms`, `52 us`."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} us" if seconds else "0"


def show_runs(numbers: list[int] | tuple[int, ...]) -> str:
    """Ascending numbers with runs folded.

    >>> show_runs([1, 2, 3, 5])
    '1..3, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}..{run[1]}" if len(run) > 1 else str(run[0]) for run in runs)
