"""Layers that keep little for the backward pass, and compute the rest again in it (activation checkpointing).

On torch.utils.checkpoint. What is computed again is computed by the same operations from the same values and random
numbers, so that gradients are the same to the last bit. `selective` keeps the products of matrices, which take most of
the time, and attention; what lies between them is cheap to compute and large to keep (Korthikanti et al. 2022,
arXiv:2205.05198).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from strategies.model.stage import PassThrough

Mode = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Recompute:
    """What of a layer is computed again, for layers number 0, `every`, 2 x `every`, ..."""

    mode: Mode = "none"
    every: int = 1

    def applies_to(self, layer: int) -> bool:
        return self.mode != "none" and layer % self.every == 0


NOTHING_AGAIN = Recompute()
_KEPT = (
    "aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_fused_attention_overrideable",
    "flex_attention",
)  # fmt: skip
"""The operations whose results `selective` keeps."""


def is_kept(operation: Any) -> bool:
    """Whether `selective` keeps what an operation gives."""
    name = operation.name() if hasattr(operation, "name") and callable(operation.name) else str(operation)
    return name.partition(".")[0] in _KEPT


def recompute(layers: Iterable[tuple[int, nn.Module]], spec: Recompute, *, draws: bool) -> None:
    """Has these numbered layers recompute what they are to, and no others. `draws` says that they draw random numbers,
    which are then drawn again."""
    for number, layer in layers:
        if isinstance(layer, PassThrough):
            continue
        forget(layer)
        if spec.applies_to(number):
            layer.forward = _Recomputed(layer.forward, selective=spec.mode == "selective", draws=draws)


def forget(layer: nn.Module) -> None:
    """Takes from a layer, or a copy of it, that it recomputes."""
    if isinstance(layer.__dict__.get("forward"), _Recomputed):
        del layer.forward


class _Recomputed:
    """Stands for the `forward` of a layer. What is hung up at the layer itself is not run again."""

    def __init__(self, forward: Callable[..., Any], *, selective: bool, draws: bool) -> None:
        functools.update_wrapper(self, forward)
        self._forward = forward
        self._more: dict[str, Any] = {"preserve_rng_state": draws}
        if selective:
            self._more["context_fn"] = functools.partial(_selective_contexts, draws)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self._forward, *args, use_reentrant=False, **self._more, **kwargs)


def _selective_contexts(draws: bool) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        # Numbers that are not drawn again would be drawn by what comes after.
        skips = draws and torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())
        return CheckpointPolicy.MUST_SAVE if is_kept(operation) and not skips else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
