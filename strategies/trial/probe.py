"""Whether a device computes the bits that others compute: the gradient of a fixed pass, as a digest.

Two devices that give another gradient for the same weights, batch and random numbers (another kind of card, another
version of a library, a card that is failing) cannot take part in one run: which of them computed what would show in the
result. And one that gives another gradient the next time is of no use to any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import xxhash
from torch import nn

from strategies.comm.group_errors import DeviceFailed
from strategies.gradient.compute import LocalGradients
from strategies.gradient.spec import StepSpec, first_pass
from strategies.model.blueprint import Blueprint
from strategies.model.randomness import seed_stream

TIMES = 3

Gradients = Iterable[tuple[str, torch.Tensor]]
"""By the names of the parameters."""


def probe_model(local: LocalGradients) -> str:
    """The digest of the gradient of the job's first micro-batch, by the whole model. Raises DeviceFailed."""
    part = local.part

    def gradients() -> Gradients:
        gradient = local.try_out()
        return ((slot.name, gradient[offset : offset + slot.numel]) for slot, offset in part.slots)

    return _same_each_time(gradients)


def probe_layer(blueprint: Blueprint, spec: StepSpec, length: int) -> str:
    """The same of the model's first layer alone, for hidden states of a micro-batch over `length` tokens: for a model
    that no rank has as a whole. Raises DeviceFailed, and ValueError for a model whose layer fails."""
    device = blueprint.device
    sizes = blueprint.stages.activations(spec.autocast(device))
    module = blueprint.stages.make((1, 2)).train()
    inner: nn.Module = module.module  # type: ignore[assignment]
    there = [blueprint.names[name] for name, p in inner.named_parameters(remove_duplicate=False) if p.is_meta]
    values = {name: blueprint.values.read(name).to(device, blueprint.dtype) for name in dict.fromkeys(there)}
    weights = {name: torch.nn.Parameter(value) for name, value in values.items()}
    blueprint.bind(module, weights)
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (spec.micro_batch, length, *sizes.hidden_size)
    hidden = torch.randn(shape, generator=generator).to(device, sizes.hidden_dtype).requires_grad_()

    def gradients() -> Gradients:
        for tensor in (hidden, *weights.values()):
            tensor.grad = None
        seed_stream(spec.seed, "probe")
        with first_pass(module, length):
            with spec.autocast(device):
                # A copy: some models change what their first layer is to be given.
                output = module(hidden.clone())
            output.float().square().mean().backward()
        found = {"hidden states": hidden.grad} | {name: weight.grad for name, weight in weights.items()}
        return ((name, gradient) for name, gradient in found.items() if gradient is not None)

    return _same_each_time(gradients)


def _same_each_time(gradients: Callable[[], Gradients]) -> str:
    """The digest of gradients that are computed TIMES times, and have to be the same each time."""
    first: dict[str, str] = {}
    for number in range(TIMES):
        digests = {name: _digest(gradient) for name, gradient in gradients()}
        first = first or digests
        if different := [name for name in first if digests[name] != first[name]]:
            raise DeviceFailed(
                f"this device does not compute the same twice: pass {number + 1} over the same micro-batch gave "
                f"another gradient than the first for {len(different)} of {len(first)} parameters, first of all "
                f"{different[0]}. Either it is failing, or the model has an operation that is not deterministic there"
            )
    return xxhash.xxh3_128_hexdigest("".join(f"{name} {first[name]}\n" for name in sorted(first)).encode())


def _digest(tensor: torch.Tensor) -> str:
    host = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(host.numpy().data)
