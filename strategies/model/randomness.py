"""Random number streams that belong to the work, never to the rank that happens to do it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def stream_key(*parts: int | str) -> int:
    """A 63-bit key for the random stream named by `parts`, e.g. (seed, step, virtual worker, micro-batch)."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_stream(*parts: int | str) -> None:
    """Points every torch generator (CPU, and CUDA where there is one) at the start of the stream `parts`."""
    key = stream_key(*parts)
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(key)


class Streams:
    """Random numbers by (step, virtual worker, micro-batch) and, where they are installed, by layer: so that a layer
    draws the same numbers, no matter which rank computed those before it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.at: tuple[int, int, int] = (0, 0, 0)

    def install(self, layer: nn.Module, number: int) -> None:
        """Lets a layer take its numbers from its own streams, and from no others."""
        uninstall(layer)
        layer.register_forward_pre_hook(_StreamHook(self, number))

    def install_behind(self, layer: nn.Module, number: int) -> None:
        """Lets what comes after a layer take its numbers from the streams of this number."""
        layer.register_forward_hook(_StreamHook(self, number))

    def enter(self, step: int, virtual_worker: int, micro_batch: int) -> None:
        """A forward pass of this micro-batch begins."""
        self.at = (step, virtual_worker, micro_batch)
        seed_stream(self.seed, "step", *self.at)


class _StreamHook:
    def __init__(self, streams: Streams, number: int) -> None:
        self._streams = streams
        self._number = number

    def __call__(self, module: nn.Module, arguments: Any, output: Any = None) -> None:
        seed_stream(self._streams.seed, "step", *self._streams.at, "layer", self._number)


def uninstall(layer: nn.Module) -> None:
    """Takes streams of its own from a layer."""
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, _StreamHook):
                del hooks[key]


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether the model has any dropout, by its modules and its configuration."""
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
        return True
    config = getattr(model, "config", None)
    values = vars(config) if config is not None else {}
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in values.items())
