"""The modules that compute a model, or a part of it: the model itself, and copies cut down to some of its blocks."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from strategies.model.anatomy import Activations, Anatomy, anatomy_of, kinds_of, representatives
from strategies.model.head import logits_of
from strategies.model.joined import part_inputs
from strategies.model.parameters import made_up_values
from strategies.model.randomness import stream_key, uninstall
from strategies.model.recompute import forget
from strategies.model.stage import Cut, PassThrough, Resized, Stage

ValueOf = Callable[[str, nn.Parameter, bool], torch.Tensor]
"""Something to compute with in place of a parameter, by its place, which depends on nothing: without values, or with
those it has first."""


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """What modules keep, and which there are, is afterwards what it was: some models swap parts of themselves in a pass
    (big_bird its attention), and that of some layers only would not do for others."""
    tables = ("_modules", "_parameters", "_buffers")
    before = [
        (part, dict(vars(part)), {name: dict(vars(part)[name]) for name in tables}) for part in list(model.modules())
    ]
    try:
        yield
    finally:
        for part, kept, entries in before:
            vars(part).clear()
            vars(part).update(kept)
            for name, entry in entries.items():
                vars(part)[name].clear()
                vars(part)[name].update(entry)


class Stages:
    """Stages of `model`, whose list of layers has the name `layers` (None: not known, then there is but the whole
    model). `body` is the module that gives the hidden states which the head makes logits of. Modules compute with
    trained parameters of type `dtype`; no loss depends on those that are `unused`. `value_of` gives values to try the
    model out with.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | None,
        value_of: ValueOf,
        *,
        body: str | None,
        dtype: torch.dtype,
        device: torch.device,
        unused: frozenset[str],
    ) -> None:
        self._model, self._layers = model, layers
        self._value_of = value_of
        self._body, self._dtype, self._device, self._unused = body, dtype, device, unused
        self._chain = read_chain(model, layers)
        self._anatomies: dict[bool, Anatomy] = {}

    @property
    def are_stated(self) -> bool:
        """Whether the model says itself in which order its modules are called."""
        return self._chain is not None

    @property
    def num_layers(self) -> int:
        return len(self.layer_list(self._model)) if self._layers else 0

    def layer_list(self, module: nn.Module) -> nn.ModuleList:
        """The layers of the model or a copy of it, and what stands aside for those that a copy has not."""
        found = module.get_submodule(self._layers or "")
        assert isinstance(found, nn.ModuleList)
        return found

    def whole(self) -> Stage:
        """The model itself; its trained parameters have no memory until they are bound."""
        return Stage(self._model, None if self._layers is None else self.layer_list(self._model), self._cut(None))

    def _cut(self, run: tuple[int, int] | None) -> Cut:
        start, stop = (0, self.num_layers + 2) if run is None else run
        before, after = self._chain or (None, None)
        elements = 0 if run is None else self.anatomy().elements
        return Cut(start, stop, self.num_layers, before, after, self._body, elements, self._unused)

    def make(self, run: tuple[int, int] | None, own: Collection[str] = (), dtype: torch.dtype | None = None) -> Stage:
        """A copy with the blocks start..stop only (None: all). Buffers are shared, and so are frozen parameters but for
        the `own` ones, which have no memory, like trained parameters. These are of type `dtype` where that is given.

        Takes token ids when it has the embedding, otherwise hidden states; gives logits when it has the head,
        otherwise hidden states.
        """
        shared: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in self._model.buffers()}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad or name in own:
                kind = dtype or (self._dtype if parameter.requires_grad else parameter.dtype)
                empty = torch.empty(parameter.shape, dtype=kind, device="meta")
                shared[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            else:
                shared[id(parameter)] = parameter
        for part in self._model.modules():
            # What a model keeps of a pass is no leaf, and cannot be copied.
            kept = (value for value in vars(part).values() if isinstance(value, torch.Tensor) and not value.is_leaf)
            shared |= {id(value): value.detach() for value in kept}
        module: nn.Module = copy.deepcopy(self._model, shared)  # type: ignore[arg-type]
        for part in module.modules():
            uninstall(part)
            part_inputs(part)
            forget(part)
        layers = None if self._layers is None else self.layer_list(module)
        cut = self._cut(run)
        if run is not None:
            assert layers is not None
            for index in range(cut.num_layers):
                if not cut.start <= index + 1 < cut.stop:
                    layers[index] = PassThrough(cut.elements, layers[index])
            anatomy = self.anatomy()
            if not cut.is_first:
                self._set_aside(module, anatomy.before)
            if not cut.is_last:
                self._set_aside(module, anatomy.after)
        return Stage(module, layers, cut)

    def _set_aside(self, module: nn.Module, places: Collection[str]) -> None:
        """Takes the modules that own these parameters out of a copy of the model. What is looked up in a table is not
        what a module was given, and what has other modules inside is needed: these stay, and have zeros for
        parameters, which take no memory."""
        takes_hidden = "inputs_embeds" in inspect.signature(module.forward).parameters
        for owner in {place.rpartition(".")[0] for place in places}:
            part = module.get_submodule(owner)
            is_table = isinstance(part, nn.Embedding) and (takes_hidden or not self._is_first_table(owner))
            stays = not owner or is_table or bool(list(part.children()))
            stand_in = part if stays else _stand_in(part)
            for key, parameter in list(part._parameters.items()):
                if parameter is not None and (f"{owner}.{key}" if owner else key) in places:
                    del part._parameters[key]
                    zero = torch.zeros((), dtype=parameter.dtype, device=self._device)
                    # A model may ask for the type or size of what it does not compute with here.
                    setattr(stand_in, key, zero.expand(parameter.shape))
            if not stays:
                above, _, key = owner.rpartition(".")
                setattr(module.get_submodule(above), key, stand_in)

    def _is_first_table(self, owner: str) -> bool:
        """Whether it is the table that token ids are looked up in: the first that the model has."""
        tables = (name for name, part in self._model.named_modules() if isinstance(part, nn.Embedding))
        return next(tables, None) == owner

    def activations(self, context: contextlib.AbstractContextManager[Any]) -> Activations:
        """What layers and the whole model hand on, when forward passes run in `context` (autocast). Raises ValueError
        for a model that cannot be cut."""
        with context:
            return self.anatomy().activations

    def anatomy(self) -> Anatomy:
        """What runs before the layers and after them, as computed in the present context (autocast). Found once, by
        tracing, or where an operator cannot be traced by computing two tokens with the initial values.

        Raises ValueError when neither works.
        """
        casts = torch.is_autocast_enabled(self._device.type)
        if casts not in self._anatomies:
            try:
                self._anatomies[casts] = self._look(is_fake=True)
            except (RuntimeError, TypeError, AttributeError):
                self._anatomies[casts] = self._look(is_fake=False)
        return self._anatomies[casts]

    def _look(self, *, is_fake: bool) -> Anatomy:
        from strategies.compat import FakeTensorMode

        assert self._layers is not None

        def compute() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            there = self._model.named_parameters(remove_duplicate=False)
            # Only the first layer computes.
            others = [f"{self._layers}.{number}." for number in range(1, self.num_layers)]
            places = {
                place: self._value_of(place, parameter, is_fake)
                for place, parameter in there
                if not place.startswith(tuple(others))
            }
            tokens = torch.zeros((1, 2), dtype=torch.int64, device=self._device)
            output = torch.func.functional_call(
                self._model, places, kwargs={"input_ids": tokens}, tie_weights=False
            )  # fmt: skip
            return logits_of(output), places

        mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else contextlib.nullcontext()
        with mode, torch.random.fork_rng(), _left_as_it_was(self._model):
            return anatomy_of(self._model, self._layers, compute)

    @torch.no_grad()
    def check(self) -> None:
        """Computes with made-up values, in a chain of stages and whole; two layers of each kind stand for all. Raises
        ValueError when that differs; whether modules may be called one after another is found out, too."""
        last, kept = self.num_layers + 2, representatives(kinds_of(list(self.layer_list(self._model))))
        runs = [(0, 1), *((number + 1, number + 2) for number in kept), (last - 1, last)]
        whole, *chain = (self._made_up(run, kept) for run in ((0, last), *runs))
        inputs = [torch.tensor([row], device=self._device) for row in ([0, 1, 2, 1], [2, 0, 1, 1])]
        expected = [whole(tokens) for tokens in inputs]
        for tokens, logits in zip(inputs, expected, strict=True):
            if not torch.equal(_in_turn(chain, tokens), logits):
                raise ValueError(
                    "its layers are given more than what the layer before gave, or give more than one value"
                )
        # By now the stages know what layers are given: this is computed module by module.
        if self._chain is not None and not torch.equal(_in_turn(chain, inputs[0]), expected[0]):
            self._chain = None

    def _made_up(self, run: tuple[int, int], kept: Collection[int]) -> Stage:
        """A stage in evaluation mode that computes with made-up values, and with no layers but these."""
        stage = self.make(run).eval()
        layers = self.layer_list(stage.module)
        for number in range(self.num_layers):
            if number not in kept and not isinstance(layers[number], PassThrough):
                layers[number] = PassThrough(self.anatomy().elements, layers[number])
        for owner, part in stage.module.named_modules():
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    seed = stream_key("made up", owner, key)
                    values = made_up_values(parameter.shape, seed, self._device, parameter.dtype)
                    part._parameters[key] = nn.Parameter(values, requires_grad=False)
        return stage


def _stand_in(part: nn.Module) -> nn.Module:
    is_resized = isinstance(part, nn.Linear) and part.in_features != part.out_features
    return Resized(part.out_features) if is_resized else PassThrough()  # type: ignore[arg-type]


def _in_turn(chain: Sequence[Stage], value: torch.Tensor) -> torch.Tensor:
    for stage in chain:
        value = stage(value)
    return value


def read_chain(model: nn.Module, layers: str | None) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The modules before the layers and after them, by the model's plan; None when it has none."""
    plan: Iterable[str] = getattr(model, "pp_plan", None) or ()
    names = [name for name in plan if _has(model, name)]
    if layers is None or layers not in names:
        return None
    # A head comes last, wherever the plan has it.
    depth = layers.count(".")
    inner = [name for name in names if name.count(".") >= depth]
    outer = [name for name in names if name.count(".") < depth]
    at = inner.index(layers)
    return tuple(inner[:at]), (*inner[at + 1 :], *outer)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
