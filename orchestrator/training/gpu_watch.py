"""What the driver says of a worker's GPU (NVML, by the package nvidia-ml-py where that is installed): how it does, and
what goes wrong with it, which may be known here before any of the worker's own calls fails."""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

from orchestrator.training.messages import GpuAction, GpuReading

log = logging.getLogger(__name__)

T = TypeVar("T")

READ_S = 5.0
"""How often it is read."""
STALE_S = 30.0
LISTEN_S = 1.0
"""For how long it is listened for errors at a time."""
REPEAT_S = 60.0
"""An error that is no reason to do anything is told again after this time at the soonest."""
FATAL = {
    48: "a memory error that cannot be corrected",
    64: "a row of its memory that cannot be replaced",
    79: "it has fallen off the bus",
    95: "a memory error that could not be contained",
    119: "its firmware does not answer",
    120: "its firmware has failed",
    140: "a memory error from which it did not recover",
}
"""Errors after which nothing that it holds or computes is to be trusted, by Xid (NVIDIA, "Xid Errors", in its GPU
deployment and management documentation)."""
_AT_POWER_LIMIT = 0x04
_REASONS = {
    0x08: "a hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "its power supply",
}
"""What slows its clock down, by the bits of NVML's clocks event reasons; of what is set on purpose, and of idling,
nothing is said."""


class Gpu:
    """One GPU, by `nvml`: the module pynvml, initialised."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        """Raises an NVMLError when it does not know it."""
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        # Errors are those of all of a card, also where one has a part of it.
        self._card = self._handle
        if self._ask(lambda: nvml.nvmlDeviceIsMigDeviceHandle(self._handle)):
            self._card = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle)
        self._events = self._ask(self._listening)

    def _listening(self) -> Any:
        events = self._nvml.nvmlEventSetCreate()
        self._nvml.nvmlDeviceRegisterEvents(self._card, self._nvml.nvmlEventTypeXidCriticalError, events)
        return events

    def _ask(self, question: Callable[[], T]) -> T | None:
        """None where this card, its driver or the package does not know. Raises NVMLError when the card is gone."""
        try:
            return question()
        except AttributeError:
            return None
        except self._nvml.NVMLError as error:
            if self.is_loss(error):
                raise
            return None

    def is_loss(self, error: Exception) -> bool:
        """Whether an error says that the card is gone."""
        return bool(getattr(error, "value", None) == self._nvml.NVML_ERROR_GPU_IS_LOST)

    def read(self) -> GpuReading:
        """How it is now. Raises NVMLError when the card is gone."""
        nvml, handle, card = self._nvml, self._handle, self._card
        used = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        megahertz = self._ask(lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM))
        milliwatts = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(card))
        reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(card))
        if reasons is None:
            reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card))
        return GpuReading(
            utilization=None if used is None else used.gpu / 100,
            sm_hertz=None if megahertz is None else megahertz * 1e6,
            celsius=self._ask(lambda: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)),
            watts=None if milliwatts is None else milliwatts / 1000,
            free_bytes=None if memory is None else memory.free,
            corrected=self._ecc(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            uncorrected=self._ecc(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            slowed_by=tuple(name for bit, name in _REASONS.items() if (reasons or 0) & bit),
            at_power_limit=bool((reasons or 0) & _AT_POWER_LIMIT),
        )

    def _ecc(self, kind: int) -> int | None:
        """Errors since the driver was loaded."""
        nvml = self._nvml
        return self._ask(lambda: nvml.nvmlDeviceGetTotalEccErrors(self._card, kind, nvml.NVML_VOLATILE_ECC))

    def rows(self) -> tuple[bool, bool]:
        """Whether a row of memory waits to be replaced, which the card's next reset does; and whether one cannot be."""
        found = self._ask(lambda: self._nvml.nvmlDeviceGetRemappedRows(self._card))
        return (False, False) if found is None else (bool(found[2]), bool(found[3]))

    def error(self, wait_s: float) -> int | None:
        """The Xid of an error that comes within this time, if one does. Raises NVMLError when the card is gone."""
        if self._events is None:
            time.sleep(wait_s)
            return None
        try:
            event = self._nvml.nvmlEventSetWait_v2(self._events, int(1000 * wait_s))
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) != self._nvml.NVML_ERROR_TIMEOUT:
                if self.is_loss(error):
                    raise
                time.sleep(wait_s)
            return None
        return int(event.eventData)


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that torch calls this; None for a CPU, and where NVML is not to be had or does not know it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # Of the package, or of the driver's library.
        log.info("the GPU is not watched: %s: %s", type(error).__name__, error)
        return None
    for name in (f"GPU-{uuid}", f"MIG-{uuid}"):
        with suppress(nvml.NVMLError):
            return Gpu(nvml, name)
    log.warning("the GPU is not watched: NVML does not know %s", uuid)
    return None


class GpuWatch:
    """Reads a GPU, and listens for its errors, on a thread of its own, which may hang with the card. What is wrong goes
    to `tell`, in words, with what is to be done about it."""

    def __init__(self, gpu: Gpu | None, tell: Callable[[GpuAction, str], None]) -> None:
        self._reading: tuple[float, GpuReading] | None = None
        self._gpu = gpu
        self._tell = tell
        self._told: dict[int, float] = {}
        self._has_failed = False
        self._waits = False
        """Whether it is known that a row of memory waits to be replaced."""

    @property
    def reading(self) -> GpuReading | None:
        """The newest; None when that is old, as the driver does not answer any more."""
        if self._reading is None or time.monotonic() - self._reading[0] > STALE_S:
            return None
        return self._reading[1]

    def start(self) -> None:
        """Of a card that was like that before it is not said that it ought to be reset: it is what there is. What is
        wrong with it otherwise is told before this returns."""
        if self._gpu is None:
            return
        with suppress(Exception):
            self._waits, cannot = self._gpu.rows()
            if cannot:
                self._fail(FATAL[64])
        if self._waits:
            log.warning("the GPU waits for a reset, to replace a row of its memory")
        threading.Thread(target=self._loop, args=(self._gpu,), name="gpu", daemon=True).start()

    def _loop(self, gpu: Gpu) -> None:
        next_reading = 0.0
        while not self._has_failed:
            try:
                if time.monotonic() >= next_reading:
                    self._look(gpu)
                    next_reading = time.monotonic() + READ_S
                if (xid := gpu.error(LISTEN_S)) is not None:
                    self._hear(xid)
            except Exception as error:
                if gpu.is_loss(error):
                    self._fail(f"NVML: {error}")
                else:
                    log.warning("the GPU is not watched any more: %s: %s", type(error).__name__, error)
                return

    def _look(self, gpu: Gpu) -> None:
        self._reading = time.monotonic(), gpu.read()
        waits, cannot = gpu.rows()
        if cannot:
            self._fail(FATAL[64])
        elif waits and not self._waits:
            self._waits = True
            self._tell("retire", "a row of its memory is to be replaced, for which it has to be reset")

    def _hear(self, xid: int) -> None:
        if xid in FATAL:
            self._fail(f"Xid {xid}: {FATAL[xid]}")
        elif time.monotonic() - self._told.get(xid, -REPEAT_S) >= REPEAT_S:
            self._told[xid] = time.monotonic()
            self._tell("none", f"Xid {xid}")

    def _fail(self, detail: str) -> None:
        self._has_failed = True
        self._tell("replace", detail)
