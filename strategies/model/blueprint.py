"""A network without its weights: its blocks, its slots, how it is split over ranks, and the modules that compute it.

Where a network can be cut is found out by trying (`strategies.model.anatomy`). How it can be split is its own
statement, in the vocabulary of transformers: `tp_plan` gives modules, by pattern, a style of tensor parallelism. It may
also say, as `pp_plan`, the names of its modules in the order in which they are called one after another, from the token
embedding over the list of layers to the head. A module of a user's own may have the same two attributes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from strategies.layout.space import Space
from strategies.model.anatomy import Activations, Anatomy, CannotCut, anatomy_of, find_layers, kinds_of, representatives
from strategies.model.cutting import refuse_cut, shared_reason
from strategies.model.frozen import FrozenWeights, without_memory
from strategies.model.head import logits_of
from strategies.model.parameters import made_up_values, sites_of, split_ties, trained_parameters
from strategies.model.randomness import stream_key, uninstall
from strategies.model.recompute import forget
from strategies.model.stage import Cut, PassThrough, Stage
from strategies.model.tensor_plan import REDUCED, SPLIT, parallel_style, read_styles
from strategies.model.values import BuiltValues, Values


class _Constants(ChainMap[str, torch.Tensor]):
    """Buffers, and frozen parameters, which are read when they are asked for."""

    def __init__(self, buffers: dict[str, torch.Tensor], frozen: Mapping[str, torch.Tensor]) -> None:
        super().__init__(buffers, frozen)  # type: ignore[arg-type]


class Blueprint:
    """See the module. Takes `model` over: its parameters have no memory until they are computed with. First they have
    these `values`, or if none are given those that they have in `model`.

    `buffers` are its persistent ones, which never change, and `frozen` its frozen parameters. Of a trial of the model
    it is known which trained parameters are `unused`, what `caches` it makes for itself, and which module is its `body`
    (see `strategies.model.head`). Modules compute with trained parameters of type `dtype`. With `splits_logits` a head
    that is split gives the logits of its own classes, as a DTensor, where nothing but the loss looks at them.

    Raises ValueError for models whose buffers change in training, that train nothing, that cannot be split over
    `tensor` ranks, or that cannot be cut where that is wanted (`cuts`).

    More than 15 attributes: they describe one model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tensor: int = 1,
        device: torch.device | None = None,
        unused: Collection[str] = (),
        caches: Collection[str] = (),
        body: str | None = None,
        cuts: bool = False,
        dtype: torch.dtype = torch.float32,
        values: Values | None = None,
        splits_logits: bool = False,
    ) -> None:
        _refuse_running_statistics(model)
        self.body, self.dtype, self.splits_logits = body, dtype, splits_logits
        self.unused, self.caches = frozenset(unused), frozenset(caches)
        self.device = torch.device("cpu") if device is None else device
        self.model = model
        self.tensor = tensor
        self.layers, self.cannot_cut = find_layers(model)
        self._chain = _read_chain(model, self.layers)
        self.styles = read_styles(model) if tensor > 1 else {}
        trained = list(trained_parameters(model).items())
        if not trained:
            raise ValueError("the model has no parameter that requires a gradient; nothing to train")
        self._sites, self._aliased = split_ties(model, sites_of(model, dict(trained)))
        one = {id(parameter): name for name, parameter in model.named_parameters()}
        names = {name: one[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self.names = {name: name if name in self._aliased else known for name, known in names.items()}
        """The one name of a parameter, by each that it has: modules may share it. A second use that has a gradient of
        its own has a name of its own."""
        if tensor > 1:
            self._refuse_shared("tensor", tensor)
        self._anatomies: dict[bool, Anatomy] = {}
        self.initial_shapes = {name: p.shape for name, p in trained}
        self.values = BuiltValues(model) if values is None else values
        _take_frozen_from_meta(model)
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.frozen = FrozenWeights(frozen, self.values, dtype)
        self._is_in_order = cuts or self._chain is not None
        self._first = self._first_parameters(cuts)
        self.space = Space.of(
            ((name, p.shape, self._block_of(name), self._dim_of(name)) for name, p in trained), tensor, self.unused,
            {alias: (name, self._block_of(alias)) for alias, name in self._aliased.items()},
        )  # fmt: skip
        across = _across_blocks(model, self.layers, frozen)
        self.divisible_frozen = [name for name in self.frozen.divisible if name not in across]
        """The names of the frozen parameters that can be sharded with the trained ones of their block."""
        persistent = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self.release(model)
        _move_buffers(model, self.device)
        self.buffers = {name: buffer.data for name, buffer in sorted(persistent.items())}

    # ------------------------------------------------------------------------------------ what it is made of

    @property
    def constants(self) -> Mapping[str, torch.Tensor]:
        """What training never changes, by name."""
        return _Constants(self.buffers, self.frozen)

    @property
    def num_layers(self) -> int:
        return len(self._layer_list(self.model)) if self.layers else 0

    def _block_of(self, name: str) -> int:
        """0 for the embedding, then the layers, then norm and head; all 0 where that is not known."""
        if self.layers is None:
            return 0
        if name.startswith(self.layers + "."):
            return 1 + int(name[len(self.layers) + 1 :].split(".")[0])
        return 0 if name in self._first else 1 + self.num_layers

    def _first_parameters(self, cuts: bool) -> frozenset[str]:
        """The parameters that the model uses before its layers: by trying where it is to be cut, else those that it has
        before them."""
        if self.layers is None:
            return frozenset()
        if cuts and not self.cannot_cut:
            try:
                return frozenset(self.names[place] for place in self.anatomy().before)
            except CannotCut as error:
                self.cannot_cut = str(error)
        found = []
        for name in self.names:
            if name.startswith(self.layers + "."):
                break
            found.append(name)
        return frozenset(found)

    def _dim_of(self, name: str) -> int | None:
        owner, _, key = name.rpartition(".")
        style = self.styles.get(owner)
        if style is None or style in REDUCED:
            return None
        linear, embedding, bias = SPLIT[style]
        if key == "bias":
            return bias
        return embedding if isinstance(self.model.get_submodule(owner), nn.Embedding) else linear

    def _refuse_shared(self, what: str, degree: int) -> None:
        shared = [name for name, sites in self._sites.items() if len(sites) > 1]
        if shared:
            raise ValueError(shared_reason(what, degree, shared))

    def check_pipeline(self, stages: int, context: contextlib.AbstractContextManager[Any] | None = None) -> None:
        """Raises ValueError when the network, computed in `context` (autocast), cannot be cut into stages."""
        refuse_cut(self.cannot_cut, self._sites, stages)
        with contextlib.nullcontext() if context is None else context, torch.random.fork_rng():
            try:
                self._check_chain()
            except ValueError as error:
                name = type(self.model).__name__
                raise ValueError(f"pipeline {stages} cannot be used with {name}: {error}") from error

    @torch.no_grad()
    def _check_chain(self) -> None:
        """Computes with made-up values, in a chain of stages and whole; two layers of each kind stand for all. Raises
        ValueError when that differs; whether modules may be called one after another is found out, too."""
        last, kept = self.num_layers + 2, representatives(kinds_of(list(self._layer_list(self.model))))
        runs = [(0, 1), *((number + 1, number + 2) for number in kept), (last - 1, last)]
        whole, *chain = (self._made_up(run, kept) for run in ((0, last), *runs))
        inputs = [torch.tensor([row], device=self.device) for row in ([0, 1, 2, 1], [2, 0, 1, 1])]
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
        stage = self.stage(run).eval()
        layers = self._layer_list(stage.module)
        for number in range(self.num_layers):
            if number not in kept and not isinstance(layers[number], PassThrough):
                layers[number] = PassThrough(in_tuple=self.anatomy().tuples)
        for owner, part in stage.module.named_modules():
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    seed = stream_key("made up", owner, key)
                    values = made_up_values(parameter.shape, seed, self.device, parameter.dtype)
                    part._parameters[key] = nn.Parameter(values, requires_grad=False)
        return stage

    def check_sharded(self) -> None:
        """Raises ValueError when two blocks share a trained parameter: each gathers and reduces its own."""
        check_sharded(self.model)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The layers that `module` (the model, or a stage of it) has; the model's largest list where it has no plan."""
        return _blocks(module, self.layers)

    def numbered_layers(self, module: nn.Module) -> list[tuple[int, nn.Module]]:
        """(number, layer) for those that `module` has; none where it is not known that each is computed once."""
        if self.layers is None or not self._is_in_order:
            return []
        layers = self._layer_list(module.module if isinstance(module, Stage) else module)
        return [(number, layer) for number, layer in enumerate(layers) if not isinstance(layer, PassThrough)]

    def _layer_list(self, module: nn.Module) -> nn.ModuleList:
        found = module.get_submodule(self.layers or "")
        assert isinstance(found, nn.ModuleList)
        return found

    # ------------------------------------------------------------------------------------ modules

    def whole(self) -> Stage:
        """The model itself; its trained parameters have no memory until they are bound."""
        return Stage(self.model, None if self.layers is None else self._layer_list(self.model), self._cut(None))

    def _cut(self, run: tuple[int, int] | None) -> Cut:
        start, stop = (0, self.num_layers + 2) if run is None else run
        before, after = self._chain or (None, None)
        return Cut(start, stop, self.num_layers, before, after, self.body, run is not None and self.anatomy().tuples)

    def stage(self, run: tuple[int, int] | None, own: Collection[str] = (), dtype: torch.dtype | None = None) -> Stage:
        """A copy with the blocks start..stop only (None: all). Buffers are shared, and so are frozen parameters but for
        the `own` ones, which have no memory, like trained parameters. These are of type `dtype` where that is given.

        Takes token ids when it has the embedding, otherwise hidden states; gives logits when it has the head,
        otherwise hidden states.
        """
        shared: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in self.model.buffers()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or name in own:
                kind = dtype or (self.dtype if parameter.requires_grad else parameter.dtype)
                empty = torch.empty(parameter.shape, dtype=kind, device="meta")
                shared[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            else:
                shared[id(parameter)] = parameter
        module: nn.Module = copy.deepcopy(self.model, shared)  # type: ignore[arg-type]
        for part in module.modules():
            uninstall(part)
            forget(part)
        layers = None if self.layers is None else self._layer_list(module)
        cut = self._cut(run)
        if run is not None:
            assert layers is not None
            for index in range(cut.num_layers):
                if not cut.start <= index + 1 < cut.stop:
                    layers[index] = PassThrough(in_tuple=cut.tuples)
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
            stand_in = part if stays else PassThrough()
            for key, parameter in list(part._parameters.items()):
                if parameter is not None and (f"{owner}.{key}" if owner else key) in places:
                    del part._parameters[key]
                    zero = torch.zeros((), dtype=parameter.dtype, device=self.device)
                    # A model may ask for the type or size of what it does not compute with here.
                    setattr(stand_in, key, zero.expand(parameter.shape))
            if not stays:
                above, _, key = owner.rpartition(".")
                setattr(module.get_submodule(above), key, stand_in)

    def _is_first_table(self, owner: str) -> bool:
        """Whether it is the table that token ids are looked up in: the first that the model has."""
        tables = (name for name, part in self.model.named_modules() if isinstance(part, nn.Embedding))
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
        casts = torch.is_autocast_enabled(self.device.type)
        if casts not in self._anatomies:
            try:
                self._anatomies[casts] = self._look(is_fake=True)
            except (RuntimeError, TypeError, AttributeError):
                self._anatomies[casts] = self._look(is_fake=False)
        return self._anatomies[casts]

    def _look(self, *, is_fake: bool) -> Anatomy:
        from strategies.compat import FakeTensorMode

        assert self.layers is not None

        def compute() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            there = dict(self.model.named_parameters(remove_duplicate=False))
            places = {place: self._value(self.names[place], there[place], is_fake=is_fake) for place in there}
            tokens = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
            output = torch.func.functional_call(
                self.model, places, kwargs={"input_ids": tokens}, tie_weights=False
            )  # fmt: skip
            return logits_of(output), places

        mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else contextlib.nullcontext()
        with mode, torch.random.fork_rng():
            return anatomy_of(self.model, self.layers, compute)

    def _value(self, name: str, parameter: nn.Parameter, *, is_fake: bool) -> torch.Tensor:
        """Something to compute with in place of a parameter, which depends on nothing."""
        dtype = self.dtype if self._aliased.get(name, name) in self.initial_shapes else parameter.dtype
        if is_fake:
            value = torch.empty(parameter.shape, dtype=dtype, device=self.device)
        else:
            value = self.values.read(self._aliased.get(name, name)).to(self.device, dtype, copy=True)
        return value.requires_grad_(value.is_floating_point())

    def bind(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Puts parameters (by name) into a module made by this blueprint."""
        inner = module.module if isinstance(module, Stage) else module
        for name, parameter in parameters.items():
            for owner, key in self._sites[name]:
                try:
                    place = inner.get_submodule(owner)
                except AttributeError:
                    continue  # Another stage's.
                if key in place._parameters:
                    place._parameters[key] = parameter

    def release(self, module: nn.Module) -> None:
        """Takes the memory of the trained parameters from a module."""
        for name, sites in self._sites.items():
            current = module.get_submodule(sites[0][0])._parameters[sites[0][1]]
            assert current is not None
            empty = nn.Parameter(torch.empty(current.shape, dtype=self.dtype, device="meta"))
            self.bind(module, {name: empty})

    def parallelize(self, module: nn.Module, mesh: Any) -> None:
        """Splits a module over a tensor-parallel mesh by the model's plan; to be bound afterwards."""
        from torch.distributed.tensor.parallel import parallelize_module

        inner = module.module if isinstance(module, Stage) else module
        plan = {}
        for owner, style in self.styles.items():
            try:
                target = inner.get_submodule(owner)
            except AttributeError:
                continue  # Another stage's.
            if not isinstance(target, PassThrough) and style not in REDUCED:
                is_head = self.body is not None and not owner.startswith(f"{self.body}.")
                plan[owner] = parallel_style(style, target, stays_split=is_head and self.splits_logits)
        parallelize_module(inner, mesh, plan, src_data_rank=None)

    def is_reduced(self, name: str) -> bool:
        """Whether a parameter's gradient is only this coordinate's part of it."""
        return self.styles.get(name.rpartition(".")[0]) in REDUCED


def _in_turn(chain: Sequence[Stage], value: torch.Tensor) -> torch.Tensor:
    for stage in chain:
        value = stage(value)
    return value


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Parameters have no memory."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def _take_frozen_from_meta(model: nn.Module) -> None:
    """Has frozen parameters without memory be of a kind that can be given some."""
    made: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta and not parameter.requires_grad:
                if id(parameter) not in made:
                    zeros = without_memory(parameter.shape, parameter.dtype)
                    made[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
                part._parameters[key] = made[id(parameter)]


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) keeps running statistics, which depend on which rank "
                "saw which data; use a normalisation without them (layer, group or RMS norm)"
            )


def _read_chain(model: nn.Module, layers: str | None) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
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


def _blocks(module: nn.Module, layers: str | None) -> list[nn.Module]:
    """See `Blueprint.blocks`."""
    if layers is None:
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        return list(max(lists, key=len, default=[]))
    found: Any = module.get_submodule(layers)
    return [layer for layer in found if not isinstance(layer, PassThrough)]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def check_sharded(model: nn.Module) -> None:
    """Raises ValueError when the parameters of the model, which may be without weights, cannot be sharded: two blocks
    share a trained one, and each gathers and reduces its own."""
    layers, _ = find_layers(model)
    for places in _across_blocks(model, layers, trained_parameters(model)).values():
        raise ValueError(
            "shard: parameters cannot be used with a trained parameter that two layers share, as each layer gathers "
            f"its own: {', '.join(places)}. Use another shard, which computes with whole parameters"
        )


def _across_blocks(
    model: nn.Module, layers: str | None, parameters: Mapping[str, nn.Parameter]
) -> dict[str, list[str]]:
    """The parameters that two blocks, or a block and what is in none, share, with all the names that each has."""
    blocks = _blocks(model, layers)
    block_of = {id(part): number for number, block in enumerate(blocks) for part in block.modules()}
    return {
        name: [".".join(filter(None, site)) for site in sites]
        for name, sites in sites_of(model, parameters).items()
        if len({block_of.get(id(model.get_submodule(owner)), -1) for owner, _ in sites}) > 1
    }
