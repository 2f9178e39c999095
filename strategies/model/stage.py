"""A pipeline stage: a model cut down to some of its blocks, as a function of one tensor. The whole model is one, too.

Layers of other stages stand aside, and the model's own forward does the rest. What it does before its layers counts in
the first stage only, and what it does after them in the last: a later stage gives its first layer what it was given
itself, whatever the forward has made of that on the way, and an earlier one hands on what its last layer gave. What the
forward prepares for layers (masks, position embeddings) it prepares anew for every micro-batch and in every stage; so
once two different inputs have shown that this depends on their shape alone, the modules of the stage are called
directly with what was prepared before, where modules are all that the model is made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strategies.model.anatomy import HIDDEN
from strategies.model.head import Head, Score, logits_of, trained_in

Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""What each layer is given beside hidden states."""


class PassThrough(nn.Module):
    """Stands where another pipeline stage has a module: gives its first argument back; where layers do, in a tuple of
    that length (`elements`), in which nothing else is. What a model asks of a layer (its kind) it says like the one
    that it stands for."""

    def __init__(self, elements: int = 0, stands_for: nn.Module | None = None) -> None:
        super().__init__()
        self._elements = elements
        for key, value in vars(stands_for).items() if stands_for is not None else ():
            if isinstance(value, (str, int, float)) and not key.startswith("_"):
                setattr(self, key, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = args[0] if args else kwargs[HIDDEN]
        return _in_tuple(value, self._elements)


@dataclass
class _Prepared:
    """What the layers were given with `first`; whether another input of its shape got the same (None: not known)."""

    first: torch.Tensor
    arguments: Arguments
    is_same: bool | None = None


@dataclass(frozen=True)
class Cut:
    """What of a model a stage is: blocks `start` to `stop` of `num_layers` layers and the two blocks around them. The
    modules `before` and `after` are called one after another around the layers where the stage has them; without them
    (None) the model does more there than call modules. `body` is the name of the module that gives the hidden states
    which the head makes logits of; None where that is not known. Layers give their hidden states in a tuple of
    length `elements`, or as they are (0). No loss depends on the parameters `unused`, by name.
    """

    start: int
    stop: int
    num_layers: int
    before: tuple[str, ...] | None = None
    after: tuple[str, ...] | None = None
    body: str | None = None
    elements: int = 0
    unused: frozenset[str] = frozenset()

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop > self.num_layers + 1


class Stage(nn.Module):
    """`module` is the whole model with other stages' modules standing aside, `layers` its list of layers. Unless
    `may_call_directly`, the model's own forward is always gone through.

    With a `score`, given for one call or for all, it is the loss that the last stage gives.
    """

    module: nn.Module
    score: Score | None

    def __init__(self, module: nn.Module, layers: nn.ModuleList | None, cut: Cut) -> None:
        super().__init__()
        self.module = module
        self.cut = cut
        self.may_call_directly = not (cut.is_first and cut.is_last)
        self.score = None
        takes = inspect.signature(module.forward).parameters
        self._embedding_size = _embedding_size(module)
        self._argument = "inputs_embeds" if not cut.is_first and "inputs_embeds" in takes else "input_ids"
        self._forward = module.forward
        self._by_root = False
        self._layers = [] if layers is None else list(layers)
        self._own = [layer for layer in self._layers if not isinstance(layer, PassThrough)]
        self._prepared: dict[tuple[torch.Size, torch.dtype], _Prepared] = {}
        self._crossing = _Crossing(cut)
        self._is_watched = False
        self._held: list[nn.Parameter] | None = None

    def hold_parameters(self) -> None:
        """They stay those that they are now: pipelining asks for them with every half of a backward pass."""
        self._held = list(self.module.parameters())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the module, or those that were held."""
        return super().parameters(recurse) if self._held is None else iter(self._held)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """All that the model has, and what stands aside for those of other stages."""
        return self._layers

    def enter_by_root(self) -> None:
        """The model is always to be called as a module: what others have hung up there (hooks) is to be run."""
        self._by_root, self.may_call_directly = True, False
        self.module.forward = self._inside

    def forward(
        self, value: torch.Tensor, position_ids: torch.Tensor | None = None, score: Score | None = None
    ) -> torch.Tensor:
        """Token ids int64 [batch, length] or hidden states [batch, length, width] to hidden states, logits or a loss.
        With `position_ids` int64 [batch, length] what the layers are given depends on more than the shape."""
        score = (score or self.score) if self.cut.is_last else None
        if position_ids is not None:
            return self._of_the_model(value, score, position_ids=position_ids)
        known = self._prepared.get((value.shape, value.dtype))
        if not (self.may_call_directly and self._is_chain) or (known is not None and known.is_same is False):
            return self._of_the_model(value, score)
        if known is not None and known.is_same:
            return self._directly(value, known.arguments, score)
        output, arguments = self._watched(value, score)
        if known is None:
            self._prepared[value.shape, value.dtype] = _Prepared(value.detach(), arguments)
        elif not torch.equal(known.first, value):
            known.is_same = _same(known.arguments, arguments)
        return output

    # ------------------------------------------------------------------------------------ module by module

    @property
    def _is_chain(self) -> bool:
        cut = self.cut
        return (not cut.is_first or cut.before is not None) and (not cut.is_last or cut.after is not None)

    def _directly(self, value: torch.Tensor, arguments: Arguments, score: Score | None) -> torch.Tensor:
        cut = self.cut
        for name in (cut.before or ()) if cut.is_first else ():
            value = self.module.get_submodule(name)(value)
        for layer, (more, named) in zip(self._own, arguments, strict=True):
            output = layer(value, *more, **named)
            value = output[0] if cut.elements else output
        if not cut.is_last:
            return _not_a_view(value)
        if not self._own:
            value = self._layers[-1](value)  # What is hung up there is run.
            value = value[0] if cut.elements else value
        *between, head = [self.module.get_submodule(name) for name in cut.after or ()]
        for module in between:
            value = module(value)
        if score is None:
            return _not_a_view(head(value))
        if cut.body is None:
            return score(head(value), None)
        name = (cut.after or ())[-1]
        parts = ((f"{name}.{inner}".rstrip("."), part) for inner, part in head.named_modules())
        return score(value, Head(head, [p for owner, part in parts for p in trained_in(owner, part, cut.unused)]))

    def _watched(self, value: torch.Tensor, score: Score | None) -> tuple[torch.Tensor, Arguments]:
        arguments: Arguments = []

        def watch(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            # Who names the hidden states too is not called directly: they are among what differs.
            arguments.append((given[1:], named))

        handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in self._own]
        try:
            return self._of_the_model(value, score), arguments
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------------------------ by the model's own forward

    def _of_the_model(self, value: torch.Tensor, score: Score | None, **more: torch.Tensor) -> torch.Tensor:
        if not self._is_watched:
            # After those that others have hung up: what goes in is exchanged before them, what comes out is theirs.
            self._crossing.watch(self._layers)
            self._is_watched = True
        call = self.module if self._by_root else self._inside
        output: torch.Tensor = call(value, score, **more)
        return output

    def _inside(self, value: torch.Tensor, score: Score | None, **more: torch.Tensor) -> torch.Tensor:
        cut = self.cut
        body: Any = self._forward if cut.body is None else self.module.get_submodule(cut.body)
        given = {self._argument: value if cut.is_first else self._like_embeddings(value.detach()), **more}
        with self._crossing.of(value) as crossing:
            if not cut.is_last:
                body(**given)
                return _not_a_view(crossing.taken)
            if score is None:
                return _not_a_view(logits_of(self._forward(**given)))
            if cut.body is None:
                return score(logits_of(self._forward(**given)), None)
            outputs = body(**given)
        return score(*Head.behind(self.module, self._forward, cut.body, outputs, cut.unused))

    def _like_embeddings(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states, or zeros where the model makes these of something of another size."""
        if self._argument == "input_ids" or (self._embedding_size in (None, hidden.shape[-1]) and hidden.dim() == 3):
            return hidden
        return hidden.new_zeros((*hidden.shape[:2], self._embedding_size or hidden.shape[-1]))


def whole_model(model: nn.Module, body: str | None = None) -> Stage:
    """A model that nobody has cut, as it is; for its `body` see `strategies.model.head`."""
    return Stage(model, None, Cut(0, 2, 0, body=body))


class Resized(PassThrough):
    """Stands where another pipeline stage has a linear module that what is given does not go through: gives zeros of
    its size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = super().forward(*args, **kwargs)
        return given.new_zeros((*given.shape[:-1], self._size))


def _embedding_size(model: Any) -> int | None:
    """The width of what the model looks up for tokens; None where that is not known."""
    try:
        return int(model.get_input_embeddings().embedding_dim)
    except (AttributeError, NotImplementedError):
        return None


class _Crossing:
    """Exchanges what goes into the first layer of a stage, and takes what comes out of its last."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._value: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None

    @property
    def taken(self) -> torch.Tensor:
        assert self._taken is not None, "the layers were not computed"
        return self._taken

    @contextmanager
    def of(self, value: torch.Tensor) -> Iterator[_Crossing]:
        self._value, self._taken = value, None
        try:
            yield self
        finally:
            self._value = self._taken = None

    def watch(self, layers: Sequence[nn.Module]) -> None:
        """To be called once, with all layers of the model, those that stand aside too."""
        cut = self._cut
        if not cut.is_first:
            if cut.start <= cut.num_layers:
                layers[cut.start - 1].register_forward_pre_hook(self._put_in, with_kwargs=True, prepend=True)
            else:
                layers[-1].register_forward_hook(self._put_out)
        if not cut.is_last:
            if cut.stop > 1:
                layers[cut.stop - 2].register_forward_hook(self._take_output)
            else:
                layers[0].register_forward_pre_hook(self._take_input, with_kwargs=True)

    def _put_in(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._value is None:
            return None
        return ((self._value, *given[1:]), named) if given else (given, {**named, HIDDEN: self._value})

    def _put_out(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        return _in_tuple(self._value, self._cut.elements)

    def _take_output(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self._taken = output[0] if self._cut.elements else output

    def _take_input(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._taken = given[0] if given else named[HIDDEN]


def _in_tuple(hidden: Any, elements: int) -> Any:
    """As layers give it."""
    return (hidden, *[None] * (elements - 1)) if elements else hidden


def _same(first: Any, second: Any) -> bool:
    """Whether two arguments are equal to the last bit, and constants."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return not first.requires_grad and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return isinstance(first, (type(None), bool, int, float, str)) and bool(first == second)


def _not_a_view(output: torch.Tensor) -> torch.Tensor:
    """The same values as a tensor of its own: pipelining lets go of a stage's graph by detaching its output in place,
    which views do not allow. (Transformers gives a view of all hidden states.)"""
    base = output._base
    if base is None:
        return output
    same = base.shape == output.shape and base.stride() == output.stride() and base.grad_fn is not None
    # FSDP2 learns from a hook on what a module returns that a backward pass begins; then that must be part of it.
    return base if same and not output._backward_hooks else output.clone()
