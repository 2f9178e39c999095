"""How much a forward pass keeps for the backward pass, found by running it on tensors without data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.compat import FAKE_TENSOR_LOGGER

if TYPE_CHECKING:
    import torch
    from torch import nn

    from strategies.objective.objective import Objective


class CannotTrace(Exception):
    """The network does not run on tensors without data; the text says why."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one sample that a block's forward pass keeps: all, or what it keeps if the rest is computed again
    selectively (`strategies.model.recompute`)."""

    everything: float
    selected: float


def kept_bytes_per_sample(
    build: Callable[[], nn.Module],
    layers_of: Callable[[nn.Module], nn.ModuleList],
    length: int,
    bf16: bool,
    objective: Objective,
) -> list[Kept]:
    """What is kept of a sample of `length` tokens by the embedding, each layer, and the head with its loss.

    Runs the forward pass with torch's fake tensors (shapes and operators of the CPU, no data) for batches of one and
    of two samples: the difference is what grows with the samples, without the weights. Raises CannotTrace.
    """
    import torch

    from strategies.compat import FakeTensorMode
    from strategies.model.anatomy import kinds_of, representatives, set_aside

    with _quiet():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                module = build().train()
                if bf16:
                    _compute_with(module, torch.bfloat16)
                if getattr(getattr(module, "config", None), "use_cache", None):
                    module.config.use_cache = False  # type: ignore[union-attr]
                layers = layers_of(module)
                kinds = kinds_of(list(layers))
                # Two of each kind stand for all.
                set_aside(layers, representatives(kinds))
                one, two = (_kept(module, layers, batch, length, bf16, objective) for batch in (1, 2))
        except Exception as error:
            # Any operator of any network may refuse; the caller says so and estimates instead.
            reason = str(error).strip().splitlines() or [""]
            raise CannotTrace(f"{type(error).__name__}: {reason[0]}") from error
    found = [
        Kept(after.everything - before.everything, after.selected - before.selected)
        for before, after in zip(one, two, strict=True)
    ]
    for numbers in kinds:
        for number in numbers[2:]:
            found[1 + number] = found[1 + numbers[1]]
    return found


def _kept(
    module: nn.Module, layers: nn.ModuleList, batch: int, length: int, bf16: bool, objective: Objective
) -> list[Kept]:
    import torch

    from strategies.compat import TorchDispatchMode
    from strategies.model.recompute import is_kept
    from strategies.objective.rows import Rows

    weights = {_storage(parameter) for parameter in module.parameters()}
    kept: list[dict[int, tuple[int, Any]]] = [{} for _ in range(len(layers) + 2)]
    seen: set[int] = set()
    at = 0

    selected = [0.0] * len(kept)

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = operation(*args, **(kwargs or {}))
            if is_kept(operation):
                given = found if isinstance(found, (tuple, list)) else (found,)
                sizes = [each.numel() * each.element_size() for each in given if torch.is_tensor(each)]
                selected[at] += sum(sizes)
            return found

    def enter(index: int) -> None:
        nonlocal at
        at = index

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = _storage(tensor)
        if key not in weights and key not in seen:
            seen.add(key)
            # With the storage itself, so that its address is not given to another one.
            kept[at][key] = (tensor.untyped_storage().nbytes(), tensor.untyped_storage())
        return tensor

    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: enter(index)) for index, layer in enumerate(layers, 1)
    ]
    hooks.append(layers[-1].register_forward_hook(lambda *_: enter(len(layers) + 1)))
    tokens = torch.zeros((batch, length + 1), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Watch():  # type: ignore[no-untyped-call]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            rows = objective.invented(Rows(tokens))
            output = module(input_ids=rows.tokens[:, :-1])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        objective.loss(logits, rows)
    for hook in hooks:
        hook.remove()
    return [
        Kept(float(sum(size for size, _ in block.values())), few) for block, few in zip(kept, selected, strict=True)
    ]


def _compute_with(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a network weights of this type."""
    from torch import nn

    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                part._parameters[key] = made[id(parameter)]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs an operator that fails on fake tensors, with its traceback; here it is caught and told in a line."""
    logger = logging.getLogger(FAKE_TENSOR_LOGGER)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
