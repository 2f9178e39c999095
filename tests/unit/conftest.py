"""For all unit tests: what the process was before must not decide them."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test sees no Ray cluster, neither by the environment nor by a test that left the process connected."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if "ray" in sys.modules:
        import ray

        assert not ray.is_initialized(), "an earlier test left this process connected to a Ray"
