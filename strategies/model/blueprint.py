"""A network without its weights: its blocks, its slots, how it is split over ranks, and the modules that compute it.

Where a network can be cut is found out by trying (`strategies.model.anatomy`). How it can be split is its own
statement, in the vocabulary of transformers: `tp_plan` gives modules, by pattern, a style of tensor parallelism. It may
also say, as `pp_plan`, the names of its modules in the order in which they are called one after another, from the token
embedding over the list of layers to the head. A module of a user's own may have the same two attributes.
"""

from __future__ import annotations

import contextlib
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from strategies.layout.space import ALIGNMENT, Cut, Space
from strategies.model.anatomy import CannotCut, find_layers
from strategies.model.cutting import check_cut, check_split, refuse_cut
from strategies.model.frozen import FrozenWeights
from strategies.model.model_stages import Stages
from strategies.model.parameters import sites_of, split_ties, trained_parameters
from strategies.model.partial_sums import SumOfParts, add_up_experts, add_up_rope, divide_input, own_output, share_input
from strategies.model.randomness import draws_random_numbers
from strategies.model.routers import Routers
from strategies.model.sharding import across_blocks, blocks_of, check_sharded
from strategies.model.stage import PassThrough, Stage
from strategies.model.tensor_plan import (
    ADDED_UP,
    IDENTITY,
    LOCAL,
    SPLIT,
    WHOLE,
    TensorPlan,
    parallel_style,
    read_tensor_plan,
)
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
    that is split gives the logits of its own classes, as a DTensor, where nothing but the loss looks at them. `routers`
    are those of a mixture of experts, where their choices are of interest. With a `plan` it is split by that, otherwise
    by the model's own. `order` are the numbers of its layers as a pass computes them, where that was tried. A pass
    `draws` random numbers if that is said, or the model has dropout. With `keeps_whole` no parameter is divided
    among ranks that train the state of replicas, and otherwise in whole blocks of `wire_block` elements.

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
        routers: Routers | None = None,
        plan: TensorPlan | None = None,
        order: Sequence[int] | None = None,
        draws: bool = False,
        keeps_whole: bool = False,
        wire_block: int = ALIGNMENT,
    ) -> None:
        _refuse_running_statistics(model)
        self.body, self.dtype, self.splits_logits, self.routers = body, dtype, splits_logits, routers
        self.unused, self.caches = frozenset(unused), frozenset(caches)
        self.device = torch.device("cpu") if device is None else device
        self.model = model
        self.tensor = tensor
        self.layers, self.cannot_cut = find_layers(model)
        self.plan = TensorPlan() if tensor == 1 else read_tensor_plan(model) if plan is None else plan
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
            check_split(model, self.plan, tensor)
        about = {"body": body, "dtype": dtype, "device": self.device, "unused": self.unused}
        self.stages = Stages(model, self.layers, self._value, **about)  # type: ignore[arg-type]
        self.initial_shapes = {name: p.shape for name, p in trained}
        self.values = BuiltValues(model) if values is None else values
        self.frozen = FrozenWeights.of(model, self.values, dtype)
        self._order = order
        self.draws = draws or draws_random_numbers(model)
        self._is_in_order = self._computes_in_turn(order, cuts)
        self._first = self._first_parameters(cuts)
        self.space = Space.of(
            ((name, p.shape, self.block_of(name), self.dim_of(name)) for name, p in trained), tensor, self.unused,
            {alias: (name, self.block_of(alias)) for alias, name in self._aliased.items()}, self.plan.packs,
            keeps_whole=keeps_whole, wire_block=wire_block,
        )  # fmt: skip
        across = across_blocks(model, self.layers, {n: p for n, p in model.named_parameters() if not p.requires_grad})
        self.divisible_frozen = [name for name in self.frozen.divisible if name not in across]
        """The names of the frozen parameters that can be sharded with the trained ones of their block."""
        persistent = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self.release(model)
        _move_buffers(model, self.device)
        self.buffers = {name: buffer.data for name, buffer in sorted(persistent.items())}

    # ------------------------------------------------------------------------------------ what it is made of

    @property
    def found(self) -> str:
        """What a trial has found out of the model and how it is split, on which all ranks are to agree."""
        plan, order = self.plan, None if self._order is None else list(self._order)
        splits = [sorted(each.items()) for each in (plan.styles, plan.stacks, plan.counts)]
        return repr((self.body, order, self.draws, sorted(self.caches), splits, sorted(plan.sums)))

    @property
    def constants(self) -> Mapping[str, torch.Tensor]:
        """What training never changes, by name."""
        return _Constants(self.buffers, self.frozen)

    def _computes_in_turn(self, order: Sequence[int] | None, cuts: bool) -> bool:
        if order is None:
            return cuts or self.stages.are_stated
        return list(order) == list(range(self.stages.num_layers))

    def block_of(self, name: str) -> int:
        """0 for the embedding, then the layers, then norm and head; all 0 where that is not known."""
        if self.layers is None:
            return 0
        if name.startswith(self.layers + "."):
            return 1 + int(name[len(self.layers) + 1 :].split(".")[0])
        return 0 if name in self._first else 1 + self.stages.num_layers

    def _first_parameters(self, cuts: bool) -> frozenset[str]:
        """The parameters that the model uses before its layers: by trying where it is to be cut, else those that it has
        before them."""
        if self.layers is None:
            return frozenset()
        if cuts and not self.cannot_cut:
            try:
                return frozenset(self.names[place] for place in self.stages.anatomy().before)
            except CannotCut as error:
                self.cannot_cut = str(error)
        found = []
        for name in self.names:
            if name.startswith(self.layers + "."):
                break
            found.append(name)
        return frozenset(found)

    def dim_of(self, name: str) -> int | None:
        """The dimension that tensor parallelism splits of a parameter."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return self.plan.dim_of(name, is_embedding=isinstance(owner, nn.Embedding))

    def check_pipeline(self, stages: int, context: contextlib.AbstractContextManager[Any] | None = None) -> None:
        """Raises ValueError when the network, computed in `context` (autocast), cannot be cut into stages."""
        refuse_cut(self.cannot_cut, self._sites, self.layers, stages)
        with contextlib.nullcontext() if context is None else context:
            check_cut(self.stages, self._sites, type(self.model).__name__, stages)

    def check_sharded(self) -> None:
        """Raises ValueError when two blocks share a trained parameter, or one is not computed once in a pass: each
        gathers and reduces its own, once."""
        check_sharded(self.model, self._order)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The layers that `module` (the model, or a stage of it) has."""
        return blocks_of(module, self.layers)

    def numbered_layers(self, module: nn.Module) -> list[tuple[int, nn.Module]]:
        """(number, layer) for those that `module` has; none where it is not known that each is computed once."""
        if self.layers is None or not self._is_in_order:
            return []
        layers = self.stages.layer_list(module.module if isinstance(module, Stage) else module)
        return [(number, layer) for number, layer in enumerate(layers) if not isinstance(layer, PassThrough)]

    # ------------------------------------------------------------------------------------ modules

    def _value(self, place: str, parameter: nn.Parameter, is_fake: bool) -> torch.Tensor:
        name = self.names[place]
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
        for owner, style in self.plan.styles.items():
            try:
                target = inner.get_submodule(owner)
            except AttributeError:
                continue  # Another stage's.
            if isinstance(target, PassThrough):
                continue
            if style in ADDED_UP or style == LOCAL:
                self._split_stacks(owner, target, mesh)
                if style != LOCAL:
                    add_up_experts(target, mesh)
            elif style == IDENTITY:
                divide_input(target, mesh)
            elif style in WHOLE:
                attention: Any = inner.get_submodule(owner.rpartition(".")[0])
                add_up_rope(target, attention.qk_rope_head_dim, mesh)
            elif style in SPLIT:
                is_head = self.body is not None and not owner.startswith(f"{self.body}.")
                plan[owner] = parallel_style(style, target, stays_split=is_head and self.splits_logits)
        parallelize_module(inner, mesh, plan, src_data_rank=None)
        for owner in plan:
            own_output(inner.get_submodule(owner))
        self._split_linears(inner, mesh)

    def _split_linears(self, inner: nn.Module, mesh: Any) -> None:
        """Those that no style says how to split."""
        for owner in (*self.plan.split_linears, *self.plan.sums):
            target: Any = _part_of(inner, owner)
            if target is None:
                continue
            self._split_stacks(owner, target, mesh)
            if owner in self.plan.sums:
                target.forward = SumOfParts(target, mesh)
            else:
                share_input(target, mesh)
        for owner, attributes in self.plan.counts.items():
            target = _part_of(inner, owner)
            for attribute in attributes if target is not None else ():
                setattr(target, attribute, getattr(target, attribute) // mesh.size())

    def _split_stacks(self, owner: str, module: nn.Module, mesh: Any) -> None:
        """Leaves a module with this rank's share of its own parameters, where they are split."""
        for key, parameter in list(module._parameters.items()):
            if parameter is None or f"{owner}.{key}" not in self.plan.stacks:
                continue
            dim, packs = self.plan.stacks[f"{owner}.{key}"]
            share = Cut(dim, packs, mesh.get_local_rank(), mesh.size()).of(parameter.detach())
            module._parameters[key] = nn.Parameter(share.contiguous(), requires_grad=parameter.requires_grad)


def _part_of(module: nn.Module, name: str) -> nn.Module | None:
    """None where another stage has it."""
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return None if isinstance(found, PassThrough) else found


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Parameters have no memory."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) keeps running statistics, which depend on which rank "
                "saw which data; use a normalisation without them (layer, group or RMS norm)"
            )
