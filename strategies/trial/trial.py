"""The trial of a model, whole and with its first weights, before any layout: what would make results wrong is refused.

What a virtual worker computes must be a function of weights, tokens and random streams. A model can break that by what
it keeps for itself (buffers, attributes, closures, random generators of its own), which each rank would have of its
own. So the model is given two inputs in several orders: loss and gradients must be the same to the last bit whatever it
saw before, and what it keeps must not tell how often it was called. What it makes once and reads again (rotary tables,
masks) passes.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from strategies.gradient.spec import StepSpec, first_pass
from strategies.model.head import find_body
from strategies.model.joined import join_inputs, part_inputs
from strategies.model.model_stages import read_chain
from strategies.model.randomness import seed_stream
from strategies.model.stage import Stage, whole_model
from strategies.objective.rows import Rows
from strategies.trial.copies import Copies
from strategies.trial.document_mask import refuse_leaks
from strategies.trial.footprint import Footprint, changed, footprint, own_attributes, value_sums
from strategies.trial.leaks import nothing_hidden, refuse_foresight

ADVICE = (
    "each rank would have its own, and the result would depend on which rank saw which data. Compute it from the "
    "input, or make it a trained parameter; a buffer with persistent=False or a plain attribute is no way around it"
)
"""What is wrong with a model that changes what it keeps, and what to do."""
_LONGEST_ON_CPU = 64
"""Tokens a row has when a model that does not fit its device is tried on the processor."""
_MOST_NAMES = 5


@dataclass(frozen=True)
class Trial:
    """What was found out. `unused` are the trained parameters that the loss does not depend on; `caches` what the model
    makes for itself and that proved to be a function of its input; `body` the module that gives the hidden states which
    the head makes logits of (see `strategies.model.head`); `order` the numbers of the layers as a pass computes them,
    where the model has a list of them; `draws` whether a pass draws random numbers."""

    unused: frozenset[str] = frozenset()
    caches: frozenset[str] = frozenset()
    body: str | None = None
    order: tuple[int, ...] | None = None
    draws: bool = False


def try_model(
    model: nn.Module, spec: StepSpec, *, vocabulary: int, length: int, device: torch.device, is_ragged: bool = False
) -> Trial:
    """Tries `model` with rows of `length` made-up tokens below `vocabulary`, and with shorter ones where the rows of
    the job are of several lengths (`is_ragged`). Leaves it, and all random numbers, as they were.

    Raises ValueError for a model that cannot be computed, whose result depends on what it computed before, that draws
    random numbers which are not keyed, or that lets a position see later ones (or other documents).
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return Trial()  # There is nothing to train, which is refused elsewhere.
    where = _place_for(model, device)
    if where != device:
        length = min(length, _LONGEST_ON_CPU)
    states = random.getstate(), np.random.get_state()
    is_real = not any(parameter.is_meta for parameter in model.parameters())
    if is_real:
        model.to(where)
    try:
        with torch.random.fork_rng(), first_pass(model, length):
            return _try(model, spec, _inputs(vocabulary, length, where, spec, is_ragged=is_ragged))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for parameter in model.parameters():
            parameter.grad = None
        if is_real:
            model.to("cpu")


def _place_for(model: nn.Module, device: torch.device) -> torch.device:
    """The device, or the processor where weights and gradients of the whole model would not fit on that."""
    if device.type != "cuda" or any(parameter.is_meta for parameter in model.parameters()):
        return device
    needed = sum(2.5 * parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return device if needed < torch.cuda.mem_get_info(device)[0] else torch.device("cpu")


def _inputs(
    vocabulary: int, length: int, device: torch.device, spec: StepSpec, *, is_ragged: bool
) -> tuple[torch.Tensor, list[Rows]]:
    """Two rows of `length` ids, nowhere alike, and two micro-batches of one row each."""
    seed_stream(spec.seed, "trial")
    first = torch.randint(vocabulary, (1, length + 1))
    second = (first + torch.randint(1, max(2, vocabulary), (1, length + 1))) % vocabulary
    tokens = torch.cat([first, second]).to(device)
    places = torch.arange(length, device=device)[None] if spec.document_mask else None
    shorter = max(1, length // 2) if is_ragged else length
    rows = [Rows(tokens[:1], None, places)]
    rows.append(Rows(tokens[1:, : shorter + 1], None, None if places is None else places[:, :shorter]))
    return tokens[:, :-1], [spec.objective.invented(each) for each in rows]


def _try(model: nn.Module, spec: StepSpec, inputs: tuple[torch.Tensor, list[Rows]]) -> Trial:
    tokens, rows = inputs
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    copies, watched, order, body = _copies(model, tokens)
    one, other = copies.make(dtype), copies.make(dtype)
    passes = _Passes(spec, rows, body)
    before = footprint(one)
    persistent, weights = set(one.state_dict()), _weights(watched)
    is_joined = not (spec.compile or read_chain(model, copies.layers))
    with _inputs_joined([one, other], copies.layers if is_joined else None):
        passes.run(one, 0)
        passes.run(one, 1)
        passes.run(one, 0)
        settled = footprint(one)
        passes.run(one, 0)
        after = footprint(one)
        passes.run(other, 1)
        passes.run(other, 0)
    touched = set(changed(before, after)) | set(changed(before, settled))
    _refuse_memory(model, [*changed(settled, after), *(touched & persistent), *changed(weights, _weights(watched))])
    _refuse_strange_numbers(model, passes)
    passes.refuse_differences(model, touched)
    if spec.document_mask:
        refuse_leaks(watched, tokens.device)
    if not spec.objective.sees_all:
        refuse_foresight(watched, tokens)
    used = copies.everywhere(passes.used)
    return Trial(unused_of(model, used), copies.everywhere(touched), body, order, passes.draws)


def _copies(
    model: nn.Module, tokens: torch.Tensor
) -> tuple[Copies, nn.Module, tuple[int, ...] | None, str | None]:  # fmt: skip
    """Copies of a model, one of them in fp32, the order in which that computes its layers, and its body."""
    copies = Copies(model, tokens.device)
    try:
        return copies, *_look(copies, tokens)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # All layers would need more.
    except Exception:  # Whatever a model raises that cannot be computed without some of its layers.
        if not copies.stand_for_others:
            raise
    copies = Copies(model, tokens.device, all_layers=True)
    return copies, *_look(copies, tokens)


def _look(copies: Copies, tokens: torch.Tensor) -> tuple[nn.Module, tuple[int, ...] | None, str | None]:
    watched = copies.make(torch.float32)
    order: list[int] = []
    layers: Any = watched.get_submodule(copies.layers) if copies.layers else []
    handles = [
        layer.register_forward_pre_hook(lambda *unused, number=number: order.append(number))
        for number, layer in enumerate(layers)
    ]

    def see_no_more(*unused: Any) -> None:
        for handle in handles:
            handle.remove()

    handles.append(watched.register_forward_hook(see_no_more))
    try:
        with nothing_hidden(watched):
            body = find_body(watched, copies.layers, tokens[:1])
    finally:
        see_no_more()  # What cannot be copied is the model itself.
    return watched, tuple(order) if copies.layers else None, body


@contextlib.contextmanager
def _inputs_joined(models: Sequence[nn.Module], layers: str | None) -> Iterator[None]:
    """Layers as they are trained, which a layer that changes what it is given is not fit for."""
    found: list[Any] = [layer for model in models if layers for layer in model.get_submodule(layers)]  # type: ignore
    for layer in found:
        join_inputs(layer)
    try:
        yield
    finally:
        for layer in found:  # What cannot be copied is the model itself.
            part_inputs(layer)


def _weights(model: nn.Module) -> Footprint:
    return {name: value_sums(parameter) for name, parameter in model.named_parameters()}


class _Passes:
    """Forward and backward passes in training mode, always with the random streams of their input."""

    def __init__(self, spec: StepSpec, rows: Sequence[Rows], body: str | None) -> None:
        self._spec = spec
        self._body = body
        self._rows = rows
        self.results: dict[int, list[Any]] = {}
        self.used: set[str] = set()
        self.draws = False
        self.moved: dict[str, list[bool]] = {"Python's module random": [], "numpy.random": []}

    def run(self, model: nn.Module, which: int) -> None:
        rows = self._rows[which]
        for parameter in model.parameters():
            parameter.grad = None
        before = _foreign_states()
        seed_stream(self._spec.seed, "trial", which)
        device = rows.tokens.device
        seeded = _torch_states(device)
        loss = self._spec.loss(whole_model(model, self._body), rows, rows.tokens.numel())
        gradients: dict[str, Any] = {}
        with _taken_at_once(model, gradients):
            loss.backward()  # type: ignore[no-untyped-call]
        self.draws |= seeded != _torch_states(device)
        for moved, one, two in zip(self.moved.values(), before, _foreign_states(), strict=True):
            moved.append(one != two)
        result: list[Any] = [value_sums(loss)]
        self.used |= gradients.keys()
        result += sorted(gradients.items())
        self.results.setdefault(which, []).append(result)

    def refuse_differences(self, model: nn.Module, touched: Collection[str]) -> None:
        """Raises ValueError when the same input gave other bits."""
        for results in self.results.values():
            if any(result != results[0] for result in results[1:]):
                kept = f" It changes {_listed(sorted(touched))}." if touched else ""
                raise ValueError(
                    f"the model {type(model).__name__} gives another loss or other gradients for the same tokens, "
                    f"weights and random seed, depending on what it computed before.{kept} It remembers something, or "
                    f"draws random numbers that torch's seed does not decide: {ADVICE}"
                )


@contextlib.contextmanager
def _taken_at_once(model: nn.Module, sums: dict[str, Any]) -> Iterator[None]:
    """Of gradients only sums are kept, by name, so that no two have to be there at a time."""

    def take(name: str, parameter: torch.Tensor) -> None:
        # Torch also tells of a gradient that is none: of what a head has and does not use.
        if parameter.grad is not None:
            sums[name] = value_sums(parameter.grad)
            parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(functools.partial(take, name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not parameter.is_meta
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _foreign_states() -> tuple[Any, Any]:
    """Of the process-wide generators that are not torch's."""
    _, keys, position, *_ = np.random.get_state()
    return hash(random.getstate()), (np.asarray(keys).tobytes(), position)


def _torch_states(device: torch.device) -> list[bytes]:
    """Of the generators that are seeded for each micro-batch."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [state.numpy().tobytes() for state in states]


def _refuse_memory(model: nn.Module, names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"the model {type(model).__name__} changes {_listed(sorted(set(names)))} in a forward pass: {ADVICE}"
        )


def _refuse_strange_numbers(model: nn.Module, passes: _Passes) -> None:
    for name, moved in passes.moved.items():
        if all(moved):
            # What other threads draw now and then is not the model's doing.
            raise ValueError(
                f"the model {type(model).__name__} draws from {name} in a forward pass, whose numbers depend on what "
                "else the process has done: draw from torch (torch.rand), which is seeded for each micro-batch"
            )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (f" and {more} more" if more > 0 else "")


def unused_of(model: nn.Module, used: Collection[str]) -> frozenset[str]:
    """The trained parameters not in `used`. An expert that no token was sent to is not unused: one whose name differs
    in the last of several numbers only (experts of one layer) is."""

    def kind(name: str) -> str:
        numbers = list(re.finditer(r"\.\d+\.", name))
        last = numbers[-1] if len(numbers) > 1 else None
        return name if last is None else f"{name[: last.start()]}.*.{name[last.end() :]}"

    kinds = {kind(name) for name in used}
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad and kind(name) not in kinds)


class Constancy:
    """Holds that modules do not change what they keep while they train: what a trial could not see (a change at step
    100) is an error when it happens. `exempt` are the caches that a trial has seen and passed."""

    def __init__(self, modules: Sequence[nn.Module], exempt: Collection[str] = ()) -> None:
        self._watched: list[tuple[str, dict[str, Any], str, Any, int]] = []
        for module in modules:
            inner: nn.Module = module.module if isinstance(module, Stage) else module
            for owner, part in inner.named_modules():
                places = [(part._buffers, key) for key in part._buffers]
                places += [(vars(part), key) for key, _ in own_attributes(part)]
                frozen = [key for key, p in part._parameters.items() if p is not None and not p.requires_grad]
                places += [(part._parameters, key) for key in frozen]
                for place, key in places:
                    name, value = f"{owner}.{key}" if owner else key, place[key]
                    if isinstance(value, (torch.Tensor, int, float)) and name not in exempt:
                        self._watched.append((name, place, key, value, _writes(value)))

    def check(self) -> None:
        """Raises ModelChanged, with names. Reads no tensor's values: microseconds."""
        names = [name for name, place, key, *before in self._watched if _is_new(place.get(key), *before)]
        if names:
            raise ModelChanged(f"the model has changed {_listed(names)} while it computed a step: {ADVICE}")


def _writes(value: Any) -> int:
    """How often a tensor was written to."""
    return value._version if isinstance(value, torch.Tensor) else 0


def _is_new(value: Any, before: Any, writes: int) -> bool:
    if isinstance(before, torch.Tensor):
        return value is not before or value._version != writes
    return isinstance(value, torch.Tensor) or bool(value != before)


class ModelChanged(ValueError):
    """A model changed what it keeps beside its parameters: the job's fault, and final."""
