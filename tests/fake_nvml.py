"""What nvidia-ml-py offers of one GPU, without one."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As the package's: `value` is the driver library's code."""

    def __init__(self, value: int) -> None:
        super().__init__({15: "GPU is lost", 3: "Not Supported", 6: "Not Found", 10: "Timeout"}[value])
        self.value = value


@dataclass
class Card:
    """What is asked for. `unknown` is what it does not say."""

    uuid: str = "GPU-1"
    utilization: int = 87
    megahertz: int = 1410
    celsius: int = 61
    milliwatts: int = 312_500
    free: int = 3 << 30
    corrected: int = 2
    uncorrected: int = 0
    reasons: int = 0
    pending: int = 0
    failed: int = 0
    is_lost: bool = False
    unknown: frozenset[str] = frozenset()


class FakeNvml:
    """In the place of the module pynvml; `xids` are errors that are yet to be heard of.

    More than 15 attributes: the constants that are used of it, by their names.
    """

    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_TIMEOUT = 10
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    nvmlEventTypeXidCriticalError = 8

    def __init__(self, card: Card | None = None) -> None:
        self.card = card or Card()
        self.xids: queue.Queue[int] = queue.Queue()

    def _answer(self, function: str, answer: Any) -> Any:
        if self.card.is_lost:
            raise NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        if function in self.card.unknown:
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return answer

    def nvmlInit(self) -> None:
        """Nothing to begin."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.card.uuid:
            raise NVMLError(self.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> int:
        return int(handle.startswith("MIG-"))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return "GPU-of-" + handle

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle.startswith("MIG-"):
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return self._answer("utilization", SimpleNamespace(gpu=self.card.utilization, memory=10))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return self._answer("memory", SimpleNamespace(free=self.card.free, total=80 << 30, used=77 << 30))

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return int(self._answer("clock", self.card.megahertz))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self._answer("power", self.card.milliwatts))

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return int(self._answer("temperature", self.card.celsius))

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return int(self._answer("event reasons", self.card.reasons))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return int(self._answer("throttle reasons", self.card.reasons))

    def nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        return int(self._answer("ecc", self.card.uncorrected if kind else self.card.corrected))

    def nvmlDeviceGetRemappedRows(self, handle: str) -> tuple[int, int, int, int]:
        rows: tuple[int, int, int, int] = self._answer("rows", (1, 0, self.card.pending, self.card.failed))
        return rows

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, handle: str, kinds: int, events: object) -> None:
        assert kinds == self.nvmlEventTypeXidCriticalError
        self._answer("events", None)
        self.listens_to = handle

    def nvmlEventSetWait_v2(self, events: object, milliseconds: int) -> Any:
        if self.card.is_lost:
            raise NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        try:
            xid = self.xids.get(timeout=milliseconds / 1000)
        except queue.Empty:
            raise NVMLError(self.NVML_ERROR_TIMEOUT) from None
        return SimpleNamespace(eventType=self.nvmlEventTypeXidCriticalError, eventData=xid)
