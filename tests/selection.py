"""What is tried in every run of the tests, and what only at night."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def nightly(values: Iterable[Any]) -> list[Any]:
    """Parameters (a tuple is several) of cases that take long and differ little from those of every run.

    Use: `@pytest.mark.parametrize("seed", [0, 1, *nightly(range(2, 8))])`.
    """
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.nightly) for value in values
    ]
