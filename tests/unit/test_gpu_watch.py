"""What the driver says of a GPU: read, and acted on where it matters."""

from __future__ import annotations

import queue
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.training import gpu_watch
from orchestrator.training.gpu_watch import FATAL, Gpu, GpuWatch, gpu_of
from orchestrator.training.messages import GpuReading
from tests.fake_nvml import Card, FakeNvml, NVMLError

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_watch, "READ_S", 0.0)
    monkeypatch.setattr(gpu_watch, "LISTEN_S", 0.01)


class Watched:
    """A fake card that is watched; `told` is what is said of it."""

    def __init__(self, card: Card) -> None:
        self.nvml = FakeNvml(card)
        self.card = card
        self.told: queue.Queue[tuple[str, str]] = queue.Queue()
        self.watch = GpuWatch(Gpu(self.nvml, card.uuid), lambda action, detail: self.told.put((action, detail)))
        self.watch.start()

    def hears(self) -> tuple[str, str]:
        return self.told.get(timeout=PATIENCE_S)


@pytest.fixture
def watched() -> Iterator[Watched]:
    it = Watched(Card())
    yield it
    it.card.is_lost = True  # which ends the thread


def test_it_is_read() -> None:
    reading = Gpu(FakeNvml(Card(reasons=0x04 | 0x40 | 0x01)), "GPU-1").read()
    assert reading == GpuReading(
        utilization=0.87, sm_hertz=1.41e9, celsius=61, watts=312.5, free_bytes=3 << 30, corrected=2, uncorrected=0,
        slowed_by=("heat (hardware)",), at_power_limit=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("unknown", "field"),
    [("utilization", "utilization"), ("memory", "free_bytes"), ("clock", "sm_hertz"), ("power", "watts"),
     ("temperature", "celsius"), ("ecc", "corrected")],
)  # fmt: skip
def test_what_a_card_does_not_say_is_none(unknown: str, field: str) -> None:
    everything = asdict(Gpu(FakeNvml(Card()), "GPU-1").read())
    reading = asdict(Gpu(FakeNvml(Card(unknown=frozenset({unknown}))), "GPU-1").read())
    assert everything[field] is not None
    assert reading[field] is None
    assert {key for key in reading if reading[key] != everything[key]} <= {field, "uncorrected"}


def test_an_older_driver_says_by_another_name_what_keeps_the_clock_down() -> None:
    card = Card(reasons=0x80, unknown=frozenset({"event reasons"}))
    assert Gpu(FakeNvml(card), "GPU-1").read().slowed_by == ("its power supply",)


def test_of_a_part_of_a_card_errors_are_those_of_the_card() -> None:
    nvml = FakeNvml(Card(uuid="MIG-1"))
    assert Gpu(nvml, "MIG-1").read().utilization is None
    assert nvml.listens_to == "GPU-of-MIG-1"


@pytest.mark.parametrize("xid", sorted(FATAL))
def test_after_an_error_that_nothing_survives_the_worker_is_to_be_replaced(watched: Watched, xid: int) -> None:
    watched.nvml.xids.put(xid)
    assert watched.hears() == ("replace", f"Xid {xid}: {FATAL[xid]}")


def test_errors_of_programs_are_only_told_and_not_over_and_over(watched: Watched) -> None:
    for xid in (13, 13, 31, 13, 79):
        watched.nvml.xids.put(xid)
    assert [watched.hears() for _ in range(3)] == [
        ("none", "Xid 13"), ("none", "Xid 31"), ("replace", f"Xid 79: {FATAL[79]}"),
    ]  # fmt: skip


def test_a_card_that_is_gone_is_told_once(watched: Watched) -> None:
    watched.card.is_lost = True
    assert watched.hears() == ("replace", "NVML: GPU is lost")
    assert watched.told.empty()


def test_a_row_that_waits_to_be_replaced_is_told_once(watched: Watched) -> None:
    watched.card.pending = 1
    assert watched.hears() == ("retire", "a row of its memory is to be replaced, for which it has to be reset")
    watched.nvml.xids.put(13)
    assert watched.hears() == ("none", "Xid 13"), "and nothing in between"


def test_a_row_that_cannot_be_replaced_is_the_end_of_it(watched: Watched) -> None:
    watched.card.failed = 1
    assert watched.hears() == ("replace", FATAL[64])


def test_a_card_that_was_like_that_before_is_what_there_is() -> None:
    it = Watched(Card(pending=1))
    it.nvml.xids.put(13)
    assert it.hears() == ("none", "Xid 13")
    it.card.is_lost = True


def test_what_is_wrong_from_the_beginning_is_told_before_anything_else_is_done() -> None:
    told: list[tuple[str, str]] = []
    nvml = FakeNvml(Card(failed=1))
    GpuWatch(Gpu(nvml, nvml.card.uuid), lambda action, detail: told.append((action, detail))).start()
    assert told == [("replace", FATAL[64])]


def test_what_was_read_long_ago_is_not_how_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = GpuWatch(None, lambda action, detail: None)
    assert watch.reading is None
    watch._look(Gpu(FakeNvml(), "GPU-1"))
    assert watch.reading is not None
    monkeypatch.setattr(gpu_watch, "STALE_S", -1.0)
    assert watch.reading is None


def test_a_card_without_events_is_read_all_the_same() -> None:
    it = Watched(Card(unknown=frozenset({"events"})))
    it.card.failed = 1
    assert it.hears()[0] == "replace"
    assert it.watch.reading is not None


def test_which_card_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(Card(uuid="MIG-a"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    uuid = SimpleNamespace(uuid="a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: uuid)
    assert gpu_of(torch.device("cpu")) is None
    assert gpu_of(torch.device("cuda", 0)) is not None, "a part of a card, as it is no whole one"
    uuid.uuid = "b"
    assert gpu_of(torch.device("cuda", 0)) is None
    monkeypatch.setattr(nvml, "nvmlInit", lambda: (_ for _ in ()).throw(NVMLError(6)))
    uuid.uuid = "a"
    assert gpu_of(torch.device("cuda", 0)) is None, "a driver that says nothing costs nobody a run"


def test_the_package_has_what_is_used_of_it() -> None:
    pynvml: Any = pytest.importorskip("pynvml")
    used = set(re.findall(r"nvml\.(\w+)", Path(gpu_watch.__file__).read_text()))
    assert {"nvmlInit", "nvmlEventSetWait_v2", "NVML_ERROR_GPU_IS_LOST"} <= used
    assert [name for name in sorted(used) if not hasattr(pynvml, name)] == []
    constants = {name: value for name, value in vars(FakeNvml).items() if isinstance(value, int)}
    assert {name: getattr(pynvml, name) for name in constants} == constants
    assert pynvml.NVMLError(15).value == 15
