"""Training state in flat buffers: weights, optimizer moments and gradients, each one contiguous tensor.

Every parameter is a view into `weights`, every gradient a view into a gradient buffer, so that a step reduces, clips
and updates a handful of large tensors instead of hundreds of small ones, and so that any range of the state can be
named by an offset. Parameters start on 64-byte boundaries: vectorised kernels then treat a value the same way
wherever it is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from strategies.optimizers import OptimizerSpec, build_optimizer

ALIGNMENT = 16
"""Elements of fp32 per 64 bytes, the widest vector register and the allocator's own alignment."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives in every flat buffer: `offset` and `numel` in elements."""

    name: str
    offset: int
    numel: int
    shape: torch.Size


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class FlatState:
    """Owns the full training state of one replica; the model's parameters become views of it.

    `weights`, `gradient` and each of `moments` are fp32 of shape [size]. Parameters with two or more dimensions come
    first (they are weight-decayed), then the others. Parameters that need no gradient and persistent buffers are kept
    beside them as `constants`.

    Raises ValueError for models whose buffers change during training (running statistics of batch normalisation):
    they depend on the order in which ranks see data, which nothing could make reproducible here.
    """

    def __init__(self, model: nn.Module, spec: OptimizerSpec, device: torch.device) -> None:
        for name, module in model.named_modules():
            if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None:
                raise ValueError(
                    f"module {name!r} ({type(module).__name__}) keeps running statistics, which depend on which rank "
                    "saw which data; use a normalisation without them (layer, group or RMS norm)"
                )
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the model has no parameter that requires a gradient; nothing to train")
        trained.sort(key=lambda item: item[1].ndim < 2)
        slots: list[Slot] = []
        offset = boundary = 0
        for name, parameter in trained:
            if parameter.ndim >= 2:
                boundary = offset + _round_up(parameter.numel(), ALIGNMENT)
            slots.append(Slot(name, offset, parameter.numel(), parameter.shape))
            offset += _round_up(parameter.numel(), ALIGNMENT)
        self.slots = tuple(slots)
        self.size = offset
        self.device = device
        self.weights = torch.zeros(self.size, dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.weights)
        self.moments = {name: torch.zeros_like(self.weights) for name in spec.moments}
        self._parameters = [parameter for _, parameter in trained]
        with torch.no_grad():
            for slot, parameter in zip(self.slots, self._parameters, strict=True):
                view = self._view(self.weights, slot)
                view.copy_(parameter)
                parameter.data = view
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        persistent = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self.constants: dict[str, torch.Tensor] = {
            name: tensor.data for name, tensor in sorted((frozen | persistent).items())
        }
        parts = [part for part in (slice(0, boundary), slice(boundary, self.size)) if part.start < part.stop]
        self._flat = [nn.Parameter(self.weights[part]) for part in parts]
        decayed = self._flat[:1] if boundary else []
        self.optimizer = build_optimizer(spec, decayed, self._flat[len(decayed) :])
        self._counters = [torch.zeros((), dtype=torch.float32, device=device) for _ in parts]
        for flat, part, counter in zip(self._flat, parts, self._counters, strict=True):
            flat.grad = self.gradient[part]
            state: dict[str, torch.Tensor] = {n: buffer[part] for n, buffer in self.moments.items()}
            if spec.name == "adamw":
                state["step"] = counter
            self.optimizer.state[flat] = state

    @staticmethod
    def _view(buffer: torch.Tensor, slot: Slot) -> torch.Tensor:
        return buffer[slot.offset : slot.offset + slot.numel].view(slot.shape)

    def accumulate_into(self, buffer: torch.Tensor) -> None:
        """Points every parameter's `.grad` into `buffer` [size]; backward passes add to it in place."""
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            parameter.grad = self._view(buffer, slot)

    def release_gradients(self) -> None:
        """Unbinds the parameters from any accumulation buffer."""
        for parameter in self._parameters:
            parameter.grad = None

    def apply(self, lr: float) -> None:
        """One optimizer update from `gradient` at learning rate `lr`; local, deterministic, no communication."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for counter in self._counters:
            if "step" not in self.optimizer.state[self._flat[0]]:
                counter += 1

    @property
    def updates(self) -> int:
        """How many optimizer updates this state has seen."""
        return int(self._counters[0])

    @updates.setter
    def updates(self, value: int) -> None:
        for counter in self._counters:
            counter.fill_(value)

    def ranges(self) -> dict[str, torch.Tensor]:
        """The whole state as a few 1-D tensors (views), for moving it between ranks."""
        flat = {"weights": self.weights}
        flat |= {f"moment.{name}": buffer for name, buffer in self.moments.items()}
        flat |= {f"constant.{name}": tensor.reshape(-1) for name, tensor in self.constants.items()}
        return flat

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every full parameter, buffer and optimizer tensor under a stable name, in name order (views)."""
        named: dict[str, torch.Tensor] = {f"model.{name}": t for name, t in self.constants.items()}
        for slot in self.slots:
            named[f"model.{slot.name}"] = self._view(self.weights, slot)
            for moment, buffer in self.moments.items():
                named[f"optimizer.{moment}.{slot.name}"] = self._view(buffer, slot)
        named["optimizer.updates"] = torch.tensor(self.updates, dtype=torch.int64)
        for name in sorted(named):
            yield name, named[name]

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over saved tensors, by the names that `tensors` gives.

        Raises ValueError naming every tensor that is missing, unknown or of another shape or dtype.
        """
        own = dict(self.tensors())
        problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
        problems += [f"unknown {name}" for name in tensors.keys() - own.keys()]
        problems += [
            f"{name} is {tensors[name].dtype}{list(tensors[name].shape)}, needed {t.dtype}{list(t.shape)}"
            for name, t in own.items()
            if name in tensors and (tensors[name].shape != t.shape or tensors[name].dtype != t.dtype)
        ]
        if problems:
            raise ValueError("the saved state does not fit this model: " + "; ".join(sorted(problems)[:20]))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        self.updates = int(tensors["optimizer.updates"])


def state_digest(state: FlatState) -> str:
    """ "sha256:…" over name, dtype, shape and little-endian bytes of every tensor of the state, in name order."""
    digest = hashlib.sha256()
    for name, tensor in state.tensors():
        host = tensor.detach().contiguous().cpu()
        digest.update(f"{name} {str(host.dtype).removeprefix('torch.')} {list(host.shape)}\n".encode())
        digest.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
