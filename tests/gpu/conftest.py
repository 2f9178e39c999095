"""Tests that need a GPU: skipped without one, and run with `make test-gpu`. They need neither Ray nor pydantic."""

from __future__ import annotations

import os

import pytest
import torch

from strategies.model.same_bits import settle_kernels
from tests.gpu.figures import Figures

PRETEND = os.environ.get("GPU_TESTS_ON_CPU") == "1"
"""Goes through them on a CPU, to see that they run; it says nothing about GPUs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not (torch.cuda.is_available() or PRETEND):
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture
def device() -> torch.device:
    """As a worker has it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.device("cuda", 0)
    settle_kernels(found)
    return found


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Figures:
    return Figures(request.module.__name__.rpartition("test_")[2])
