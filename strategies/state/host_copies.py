"""Copies of what is on a device, in host memory, made beside whatever else the device does."""

from __future__ import annotations

import logging
import mmap
from contextlib import suppress
from typing import Any

import torch

from strategies.state.buffers import Buffer
from strategies.state.chunks import MAX_CHUNK

log = logging.getLogger(__name__)


class HostMemory:
    """Room for fp32 on the host. For a GPU it is page-locked, of the very size that is asked for: torch's own would be
    rounded up to a power of two, and kept for ever."""

    def __init__(self, num_elements: int, device: torch.device) -> None:
        self._mapped: mmap.mmap | None = None
        self._is_locked = False
        if device.type != "cuda" or not num_elements:
            self.values = torch.empty(num_elements, dtype=torch.float32)
            return
        self._mapped = mmap.mmap(-1, 4 * num_elements)
        self.values = torch.frombuffer(self._mapped, dtype=torch.float32)
        error = int(_runtime().cudaHostRegister(self.values.data_ptr(), 4 * num_elements, 0))
        self._is_locked = error == 0
        if error:
            _forget_error(device)
            log.warning(
                "%d bytes of memory cannot be page-locked (CUDA error %d): copies are slow", 4 * num_elements, error
            )

    def close(self) -> None:
        """Gives it back; nothing may be copied to it any more, and no view of it used."""
        if self._is_locked:
            _runtime().cudaHostUnregister(self.values.data_ptr())
        self._is_locked, self._mapped, self.values = False, None, torch.empty(0)


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the error of a call that failed until somebody asks: else the next kernel would be taken for it."""
    with suppress(Exception):
        torch.zeros(1, device=device)


def _runtime() -> Any:
    return torch.cuda.cudart()


class SideCopies:
    """Copies of tensors on `device`, which on a GPU are made by a stream of their own: what is queued after `end` runs
    while they are under way. Before anything of what is copied is changed, `before_change` has to be called; before the
    copies are read, `finish`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        self._stream: Any = None
        self._copied: Any = None

    def begin(self) -> None:
        """What is queued so far comes first."""
        if self._is_gpu:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: Buffer, offset: int) -> None:
        """Between `begin` and `end`: what `source` has from `offset` on. `target` is host memory, page-locked where
        `source` is on a GPU."""
        for start in range(0, len(target), MAX_CHUNK):
            part = target[start : start + MAX_CHUNK]
            if not self._is_gpu:
                part.copy_(source.read(offset + start, len(part)))
                continue
            with torch.cuda.stream(self._stream):
                found = source.read(offset + start, len(part))
                part.copy_(found, non_blocking=True)
            if found.is_cuda:
                # Should it be freed meanwhile, nobody gets its memory before it has been read.
                found.record_stream(self._stream)

    def end(self) -> None:
        """All of them have been asked for."""
        if self._is_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)

    def before_change(self) -> None:
        """What is queued from here on comes after the copies. Does not wait for anything itself."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def finish(self) -> None:
        """Until they are made. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()
