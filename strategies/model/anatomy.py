"""What of a model runs before its layers, in them and after, found by one pass over two tokens.

Where the layers are a model may say itself (`pp_plan`, in the vocabulary of transformers, names one list of them); else
they are the longest list of modules that is in no other. The pass shows the rest: the layers stand aside, and what they
are given depends on some parameters, what becomes of what they give on others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

HIDDEN = "hidden_states"
"""What layers of transformers call their first argument."""


@dataclass(frozen=True)
class Activations:
    """What a layer, and the whole model, gives for one micro-batch: sizes after [batch, length], and types."""

    hidden_size: torch.Size
    hidden_dtype: torch.dtype
    logits_size: torch.Size
    logits_dtype: torch.dtype


@dataclass(frozen=True)
class Anatomy:
    """`before` and `after` are the places of parameters (a shared one has several) on which depends what the first
    layer is given, and what becomes of what the last one gives. `elements` says of how many elements the tuple is that
    layers give, of which the first is passed on; 0 where they give hidden states as they are."""

    before: frozenset[str]
    after: frozenset[str]
    elements: int
    activations: Activations


class CannotCut(ValueError):
    """Why a model cannot be computed in parts."""


class NotInTurn(CannotCut):
    """Its layers are not computed one after another, each once, but as `calls` says, by number."""

    def __init__(self, model: str, layers: str, calls: Sequence[int]) -> None:
        super().__init__(f"the layers of {model} ({layers}) are not computed one after another, each once")
        self.calls = tuple(calls)


def find_layers(model: nn.Module) -> tuple[str | None, str]:
    """The name of the model's list of layers; or None, and why that is not known."""
    name = type(model).__name__
    plan: Iterable[str] = getattr(model, "pp_plan", None) or ()
    named = [each for each in plan if isinstance(_part(model, each), nn.ModuleList)]
    if len(named) == 1:
        return named[0], ""
    lists = sorted(_outermost_lists(model), key=lambda each: -len(model.get_submodule(each)))  # type: ignore[arg-type]
    if not lists:
        return None, f"{name} has no torch.nn.ModuleList of layers, and no pp_plan that names one"
    return lists[0], ""


def _part(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            if len(child):
                yield prefix + name
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def kinds_of(layers: Sequence[nn.Module]) -> list[list[int]]:
    """The numbers of layers, those of a kind together. Layers are of a kind when they are made of the same modules,
    with parameters of the same shapes, and call themselves the same (a kind of attention)."""
    kinds: dict[Any, list[int]] = {}
    for number, layer in enumerate(layers):
        parts = list(layer.named_modules())
        said = [(owner, key, value) for owner, part in parts for key, value in vars(part).items() if type(value) is str]
        shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
        kinds.setdefault((type(layer), tuple(said), tuple(shapes)), []).append(number)
    return list(kinds.values())


def representatives(kinds: Sequence[Sequence[int]]) -> list[int]:
    """Two layers of each kind, or one where there are no more: they stand for all."""
    return sorted(number for numbers in kinds for number in numbers[:2])


def set_aside(layers: nn.ModuleList, kept: Collection[int]) -> None:
    """Takes out all layers but those, of which one is the first; what a model asks of the others it is told of that."""
    like = _Like(layers[0])
    for number in range(len(layers)):
        if number not in kept:
            layers[number] = _Aside(like)


class _Like:
    """What layers that stand aside know of the first one, and whom they tell that they were called."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.gave: Any = None
        self.handle = layer.register_forward_hook(self._see)

    def _see(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self.gave = output


class _Layers:
    """Watches a pass: what the first layer is given and gives, and how often each is called. Only the first computes;
    what it gives is handed on as a tensor that nothing is known of."""

    def __init__(self, layers: nn.ModuleList, name: str) -> None:
        self._name = name
        self.calls: list[int] = []
        self.given: torch.Tensor | None = None
        self.handed_on: torch.Tensor | None = None
        self.hidden: torch.Tensor | None = None
        self.elements = 0
        self.trained: list[str] = []
        """The names of arguments beside hidden states that depend on parameters."""
        self._layers = layers

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        real = list(self._layers)
        handles = [
            real[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            real[0].register_forward_hook(self._leave),
        ]
        like = _Like(real[0])
        try:
            for number in range(1, len(real)):
                self._layers[number] = _Aside(like, functools.partial(self.calls.append, number))
            yield
        finally:
            for number, layer in enumerate(real):
                self._layers[number] = layer
            for handle in (*handles, like.handle):
                handle.remove()

    def _enter(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.calls.append(0)
        hidden, more = hidden_of(given, named)
        self.given = hidden
        self.trained += [name for name, value in more.items() if _requires_grad(value)]

    def _leave(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        self.elements = len(output) if isinstance(output, (tuple, list)) else 0
        hidden = output[0] if self.elements else output
        if not isinstance(hidden, torch.Tensor):
            raise CannotCut(f"the layers of {self._name} do not hand on one tensor")
        self.hidden = hidden
        self.handed_on = torch.zeros_like(hidden).requires_grad_()
        return (self.handed_on, *output[1:]) if self.elements else self.handed_on


class _Aside(nn.Module):
    """Stands where a layer is that is not computed: hands on what it is given, with what the first one gave beside."""

    def __init__(self, like: _Like, called: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.__dict__.update(_like=like, _called=called)

    def forward(self, *given: Any, **named: Any) -> Any:
        hidden, _ = hidden_of(given, named)
        self._called()
        gave = self._like.gave
        return (hidden, *gave[1:]) if isinstance(gave, (tuple, list)) else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._like.layer, name)


def hidden_of(given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states among a layer's arguments, and the others by name (or number)."""
    if given:
        return given[0], {str(number): value for number, value in enumerate(given) if number} | dict(named)
    if HIDDEN in named:
        return named[HIDDEN], {name: value for name, value in named.items() if name != HIDDEN}
    raise CannotCut("its layers are given no hidden states")


def _requires_grad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, (tuple, list)):
        return any(map(_requires_grad, value))
    return isinstance(value, dict) and any(map(_requires_grad, value.values()))


def anatomy_of(
    model: nn.Module, layers: str, compute: Callable[[], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
) -> Anatomy:
    """What the pass that `compute` makes shows; it gives logits, and the values of parameters, by place, that it has
    computed with. Raises CannotCut."""
    found = model.get_submodule(layers)
    assert isinstance(found, nn.ModuleList)
    name = type(model).__name__
    watch = _Layers(found, name)
    with watch.watched(), torch.enable_grad():
        logits, places = compute()
    if watch.calls != list(range(len(found))):
        raise NotInTurn(name, layers, watch.calls)
    if watch.trained:
        raise CannotCut(f"the layers of {name} are given what is trained outside of them ({', '.join(watch.trained)})")
    assert watch.given is not None
    assert watch.hidden is not None
    assert watch.handed_on is not None
    sizes = Activations(watch.hidden.shape[2:], watch.hidden.dtype, logits.shape[2:], logits.dtype)
    before, _ = _depends_on(watch.given, places, None)
    after, uses_layers = _depends_on(logits, places, watch.handed_on)
    if not uses_layers:
        raise CannotCut(f"what {name} gives does not depend on its layers ({layers})")
    if both := before & after:
        raise CannotCut(f"{name} uses {', '.join(sorted(both))} before its layers and again after them")
    return Anatomy(before, after, watch.elements, sizes)


def _depends_on(
    output: torch.Tensor, places: Mapping[str, torch.Tensor], leaf: torch.Tensor | None
) -> tuple[frozenset[str], bool]:
    """The places that a tensor depends on, and whether on `leaf`."""
    if not output.requires_grad:
        return frozenset(), False
    names = [name for name, value in places.items() if value.requires_grad]
    asked = [places[name] for name in names] + ([] if leaf is None else [leaf])
    found = torch.autograd.grad(output, asked, torch.ones_like(output), retain_graph=True, allow_unused=True)
    used = frozenset(name for name, gradient in zip(names, found, strict=False) if gradient is not None)
    return used, leaf is not None and found[-1] is not None
