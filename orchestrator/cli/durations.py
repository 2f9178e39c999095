"""Lengths of time on the command line."""

from __future__ import annotations

import re

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(option: str, text: str) -> float:
    """Seconds of `90`, `90s`, `10m`, `2h` or `1d`. Raises ValueError that names the `option`."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip()):
        return float(found[1]) * _UNITS_S[found[2] or "s"]
    raise ValueError(f"{option} {text}: give a length of time such as 90s, 10m, 2h or 1d")
