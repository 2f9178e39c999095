"""The frozen base of an adapter in fewer bits: its linear modules replaced, their values quantized when read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.models.problems import refused
from orchestrator.models.weights import TensorInfo, WeightSource

if TYPE_CHECKING:
    import torch
    from torch import nn

    from strategies.model.values import Values

_PARTS = (".codes", ".scales")


def quantize_base(model: nn.Module, values: Values, kind: str) -> Values:
    """Replaces the linear modules of a model whose weights are frozen, but for its head; and the values for it. Raises
    ModelError where there is none, or one whose rows cannot be cut into blocks."""
    from torch import nn

    from strategies.model.quantized import QuantizedLinear

    given: Any = model
    head = given.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # With an adapter it is a module with the matrix in it.
    kept = set() if head is None else set(head.modules())
    found = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and part not in kept and not part.weight.requires_grad
    ]
    if not found:
        raise refused("finds no frozen linear module to quantize", "adapter.quantize_base")
    for name, part in found:
        owner, _, key = name.rpartition(".")
        try:
            setattr(model.get_submodule(owner), key, QuantizedLinear(part, kind))
        except ValueError as error:
            raise refused(f"{name}: {error}", "adapter.quantize_base") from None
    return QuantizedValues(values, [name for name, _ in found], kind)


class QuantizedValues:
    """Those of a model whose linear modules `names` are quantized: from those that it has without. See `Values`."""

    def __init__(self, base: Values, names: list[str], kind: str) -> None:
        self._base, self._kind = base, kind
        self._names = {f"{name}{part}": name for name in names for part in _PARTS}
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        """See `Values`."""
        owner = self._names.get(name)
        if owner is None:
            return self._base.read(name)
        with self._lock:
            if self._last[0] != owner:
                from strategies.model.quantized import quantize

                codes, scales = quantize(self._base.read(f"{owner}.weight"), self._kind)
                self._last = owner, {f"{owner}.codes": codes, f"{owner}.scales": scales}
            return self._last[1][name]

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Values`."""
        if name in self._names:
            return self.read(name).reshape(-1)[start:stop]
        return self._base.read_range(name, start, stop)

    def is_at_hand(self, name: str) -> bool:
        """See `Values`."""
        return self._last[0] == self._names[name] if name in self._names else self._base.is_at_hand(name)

    def forget(self) -> None:
        """See `Values`."""
        with self._lock:
            self._last = ("", {})
        self._base.forget()

    @property
    def is_stored(self) -> bool:
        """See `Values`."""
        return self._base.is_stored


class DequantizedWeights:
    """The weights of a run with a quantized base as those of a model without: what it computed with. See
    `WeightSource`."""

    def __init__(self, weights: WeightSource) -> None:
        import torch

        self._weights = weights
        there = weights.tensors()
        self._tensors: dict[str, TensorInfo] = {}
        for name, info in there.items():
            owner, _, part = name.rpartition(".")
            if part == "codes" and f"{owner}.scales" in there:
                rows, width = info.shape
                shape = (rows, width if info.dtype == torch.int8 else 2 * width)
                self._tensors[f"{owner}.weight"] = TensorInfo(torch.float32, shape)
            elif not (part == "scales" and f"{owner}.codes" in there):
                self._tensors[name] = info

    @property
    def name(self) -> str:
        return self._weights.name

    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `WeightSource`."""
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        """See `WeightSource`."""
        from strategies.model.quantized import dequantize

        owner, _, part = name.rpartition(".")
        if part == "weight" and f"{owner}.codes" in self._weights.tensors():
            return dequantize(self._weights.read(f"{owner}.codes"), self._weights.read(f"{owner}.scales"))
        return self._weights.read(name)
