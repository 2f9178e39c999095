"""Why a worker leaves: by what was raised, and by whether its device still works after that."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch

from orchestrator.training import leaving
from orchestrator.training.leaving import cause_of, still_works
from tests.unit.test_group_errors import ASSERT, UNHANDLED

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("text", "works", "cause"),
    [
        (ASSERT, False, "device"),
        ("CUDA error: invalid configuration argument", True, "exception"),
        (f"{UNHANDLED}Cuda failure 101 'invalid device ordinal'", True, "peer"),
        (f"{UNHANDLED}Cuda failure 719 'unspecified launch failure'", False, "device"),
    ],
)
def test_an_error_of_the_device_is_one_if_it_stays(
    monkeypatch: pytest.MonkeyPatch, text: str, works: bool, cause: str
) -> None:
    monkeypatch.setattr(leaving, "still_works", lambda device: works)
    assert cause_of(RuntimeError(text), cast(Any, None), cast(Any, None), GPU)[0] == cause


def test_a_device_that_says_nothing_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "WORKS_S", 0.05)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: threading.Event().wait(5.0))
    assert not still_works(GPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    assert not still_works(GPU)


def test_of_a_cpu_an_error_is_what_it_says() -> None:
    assert not still_works(torch.device("cpu"))
