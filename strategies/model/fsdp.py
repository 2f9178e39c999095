"""Sharded parameters (ZeRO stage 3), on FSDP2 (torch.distributed.fsdp.fully_shard).

FSDP2 gathers a block's parameters before it is computed and hands its gradients out after. What it communicates with is
ours, which can be broken out of; and in place of a reduce-scatter every owner is sent its rows from every replica, to
add them up per virtual worker and along the tree. All replicas make the same backward passes, one virtual worker each
at a time; one that has fewer computes made-up work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from strategies.comm.fabric import Fabric
from strategies.comm.groups import Groups
from strategies.compat import AllGather, ReduceScatter, hand_on_unused, keep_in
from strategies.layout.space import FlatRanges, Slot
from strategies.model.blueprint import Blueprint
from strategies.model.frozen_parts import FrozenParts
from strategies.model.model_part import Runs, add_up
from strategies.model.stage import Stage
from strategies.reduction.tree import Subtree
from strategies.reduction.tree_sum import TreeSum


class ShardedModelPart:
    """The model parts of a rank, of whose parameters it has only its rows. Has the interface of `ModelPart`."""

    is_sharded = True

    def __init__(self, blueprint: Blueprint, runs: Runs, fabric: Fabric) -> None:
        self.blueprint = blueprint
        self.runs = None if runs is None else tuple(runs)
        self.device = blueprint.device
        self._data_group = fabric.data_group
        self._frozen = FrozenParts(blueprint, self.runs, fabric.layout.tensor)
        sharded = self._frozen.needed.intersection(blueprint.divisible_frozen) - self._frozen.in_both_ways
        self.kept_frozen = self._frozen.whole - sharded
        """The frozen parameters that it computes with as the model has them."""
        blueprint.frozen.keep_on(self.device, self.kept_frozen)
        self.modules: list[Stage] = [
            blueprint.stages.make(run, sharded | self._frozen.split, torch.float32)
            for run in (self.runs if self.runs is not None else [None])
        ]
        self.groups: list[list[_Group]] = []
        self._untrained: list[list[Any]] = []
        self._in_place: set[str] = set()
        self.swapped: set[str] = set()
        """The frozen parameters, by their places in modules, where FSDP2 puts gathered ones and rows in turn."""
        for module in self.modules:
            if fabric.layout.tensor > 1:
                blueprint.parallelize(module, fabric.axis("tensor"))
                self._frozen.fill(module.module, self._frozen.split - sharded, fabric.axis("tensor"))
            # FSDP2 gathers what no block has when the model is called as a module.
            module.enter_by_root()
            self.groups.append(self._shard(module.module, fabric))
            module.train()

    def _shard(self, inner: nn.Module, fabric: Fabric) -> list[_Group]:
        blocks = self.blueprint.blocks(inner)
        # What is trained and exchanged as a gradient is fp32; what is gathered to compute with may be less.
        policy = MixedPrecisionPolicy(self.blueprint.dtype, torch.float32, cast_forward_inputs=False)
        whole = {p for p in inner.parameters() if not (p.requires_grad or p.is_meta)}
        for block in (*blocks, inner):
            fully_shard(block, mesh=fabric.axis("data"), ignored_params=whole, mp_policy=policy)
        # Not touched before rows are loaded, or never where they are gathered from elsewhere (`keep_in`).
        inner._apply(lambda t: torch.empty_like(t, device=self.device) if t.is_meta else t)
        # Transformers returns a view of the logits, of which nothing here makes anything in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        places = {id(parameter): place for place, parameter in inner.named_parameters()}
        names = {key: self.blueprint.names[place] for key, place in places.items()}
        space = self.blueprint.space
        slots = {slot.name: slot for slot in space.slots}
        slots |= {a.name: replace(a.slot, name=a.name, block=a.block) for a in space.aliases}
        groups = []
        untrained = []
        sharded: list[Any] = [*blocks, inner]
        for block in sharded:
            group = block._get_fsdp_state()._fsdp_param_group
            if group is None:
                continue
            params = [(names[id(p.sharded_param)], p) for p in group.fsdp_params if id(p.sharded_param) in names]
            entries = [(slots[name], p) for name, p in params if name in slots]
            frozen = [(places[id(p.sharded_param)], p) for name, p in params if name not in slots]
            self._read_frozen(frozen, fabric)
            self.swapped.update(place for place, _ in frozen)
            for _, parameter in entries:
                parameter.sharded_param.register_post_accumulate_grad_hook(_forget_gradient)
            groups.append(_Group(entries, fabric.data_group))
            if not entries:
                untrained.append(block)
            if fabric.layout.tensor > 1:
                parts = [slot.name for slot, _ in entries if self.blueprint.plan.is_reduced(slot.name)]
                groups[-1].add_over(fabric.axis("tensor"), parts)
            block.set_custom_all_gather(_Gather(fabric.data_group))
            block.set_custom_reduce_scatter(groups[-1])
            block.set_gradient_divide_factor(1.0)
            # Else FSDP2 hands on nothing of what a pass did not use (an expert without tokens, or what no loss depends
            # on), which would shift what is behind it.
            hand_on_unused(block)
        self._untrained.append(untrained)
        return groups

    def _read_frozen(self, params: Sequence[tuple[str, Any]], fabric: Fabric) -> None:
        """This rank's rows of the frozen parameters in these places, from their source."""
        group, coordinate = fabric.data_group, fabric.axis("tensor").get_local_rank() if fabric.layout.tensor > 1 else 0
        with torch.no_grad():
            for place, parameter in params:
                name, cut = self.blueprint.names[place], self._frozen.cut(place, coordinate)
                rows = self.blueprint.frozen.rows(name, group.rank, group.world_size, cut)
                parameter.sharded_param._local_tensor.copy_(rows)

    def backward_is_over(self, module: int) -> None:
        """Waits for what was exchanged in it, as far as that goes on by itself. Drops the gathered copies that FSDP2
        would keep: those of blocks that a backward pass does not reach. Raises PeerLost."""
        self._data_group.settle()
        for block in self._untrained[module]:
            block.reshard()

    def reshard(self) -> None:
        """Drops the gathered copies that forward passes without backward ones have left."""
        self._data_group.settle()
        for module in self.modules:
            for block in (*self.blueprint.blocks(module.module), module.module):
                block.reshard()  # type: ignore[operator]

    def rows(self) -> Iterator[tuple[Slot, Any, _Group, int]]:
        """(slot, FSDP2's parameter, its group, where its rows are in the group's slice) of all trained parameters."""
        for groups in self.groups:
            for group in groups:
                offset = 0
                for slot, parameter in group.entries:
                    yield slot, parameter, group, offset
                    offset += parameter.padded_sharded_param_size.numel()

    def rows_of(self, name: str) -> torch.Tensor:
        """This rank's rows of a parameter, laid flat: fp32, what it computes with."""
        parameter = next(parameter for slot, parameter, _, _ in self.rows() if slot.name == name)
        rows: torch.Tensor = parameter.sharded_param._local_tensor.view(-1)
        return rows

    def gradient_rows_of(self, name: str) -> torch.Tensor:
        """The same of the reduced gradient."""
        group, start = next((group, start) for slot, _, group, start in self.rows() if slot.name == name)
        return group.total()[start : start + self.rows_of(name).numel()]

    def keep_in(self, weights: torch.Tensor, flat: FlatRanges) -> None:
        """Has this rank's rows gathered from where they are in `weights` [flat.size], which it trains: all that need no
        padding, and are on the device that is computed on."""
        for slot, parameter, _, _ in self.rows() if weights.device == self.device else ():
            pieces = list(flat.locate(slot.offset, slot.offset + slot.numel))
            padded = parameter.padded_sharded_param_size.numel()
            if len(pieces) == 1 and pieces[0][2] == padded == parameter.sharded_param._local_tensor.numel():
                _, offset, length = pieces[0]
                keep_in(parameter, weights[offset : offset + length])
                self._in_place.add(slot.name)

    def load(self, weights: torch.Tensor, flat: FlatRanges) -> None:
        """Takes this rank's other rows from `weights` [flat.size], which it trains."""
        with torch.no_grad():
            for slot, parameter, _, _ in self.rows():
                if slot.name in self._in_place:
                    continue
                local = parameter.sharded_param._local_tensor.view(-1)
                for _, offset, length in flat.locate(slot.offset, slot.offset + slot.numel):
                    local[:length].copy_(weights[offset : offset + length])

    def unload(self, gradient: torch.Tensor, flat: FlatRanges) -> None:
        """Puts this rank's rows of the reduced gradient into `gradient` [flat.size]."""
        second = {alias.name for alias in self.blueprint.space.aliases}
        for is_second in (False, True):
            for slot, _, group, start in self.rows():
                if (slot.name in second) != is_second:
                    continue
                for _, offset, length in flat.locate(slot.offset, slot.offset + slot.numel):
                    rows = group.total()[start : start + length]
                    if is_second:
                        gradient[offset : offset + length].add_(rows)
                    else:
                        gradient[offset : offset + length].copy_(rows)

    def free_sums(self) -> None:
        """Gives up the memory of the reduced gradient."""
        for groups in self.groups:
            for group in groups:
                group.free()

    def close(self) -> None:
        """Gives the modules up."""
        self.modules, self.groups = [], []


def _forget_gradient(parameter: torch.Tensor) -> None:
    """What FSDP2 takes for the reduced gradient of its rows says nothing (`_Group`)."""
    parameter.grad = None


class _Gather(AllGather):
    """An all-gather by groups of ours."""

    def __init__(self, data_group: Groups) -> None:
        self._data_group = data_group

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> None:
        with self._data_group.traffic.of("weights"):
            self._data_group.all_gather(output_tensor.view(-1), input_tensor.reshape(-1), at_once=False)


class _Group(ReduceScatter):
    """What FSDP2 treats as one: a block's parameters. Adds up this rank's rows of their gradients, and leaves what
    FSDP2 gives it for the result as it is."""

    def __init__(self, entries: list[tuple[Slot, Any]], data_group: Groups) -> None:
        self.entries = entries
        self._data_group = data_group
        self._length = sum(p.padded_sharded_param_size.numel() for _, p in entries)
        self._pool: list[torch.Tensor] = []
        self._open: dict[int, torch.Tensor] = {}
        self._workers: list[tuple[int, int]] = []
        self._is_last = False
        self._sums: TreeSum | None = None
        self._add_up: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._parts: Collection[str] = ()
        self.is_nan_next = False

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def add_over(self, tensor_mesh: Any, names: Collection[str]) -> None:
        """The gradients of these parameters are to be added up over the tensor-parallel ranks."""
        self._add_up, self._parts = add_up(tensor_mesh), names

    def start(self, root: Subtree) -> None:
        """A step begins."""
        self._pool += self._open.values()
        self._open = {}
        if self._sums is not None:
            self._sums.clear()
        self._sums = TreeSum(root, self._pool)

    def expect(self, workers: list[tuple[int, int]], *, is_last: bool) -> None:
        """The next backward pass is of these (replica, virtual worker), for the last time if `is_last`; other replicas'
        work is made up."""
        self._workers, self._is_last = workers, is_last

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        ranks, length = self._data_group.world_size, self._length
        if input_tensor.numel() != ranks * length:
            names = ", ".join(slot.name for slot, _ in self.entries[:3])
            raise RuntimeError(
                f"the gradients of {names}, ... have {input_tensor.numel()} elements, not {ranks * length}: a pass did "
                f"not use all of them, which torch {torch.__version__} cannot do with strategy.shard: parameters"
            )
        if self.is_nan_next:
            input_tensor.fill_(torch.nan)
            self.is_nan_next = False
        self._complete(input_tensor.view(ranks, length))
        received = torch.empty_like(input_tensor)
        with self._data_group.traffic.of("gradients"):
            self._data_group.all_to_all(received, input_tensor, [length] * ranks, [length] * ranks, at_once=False)
        parts = received.split(length) if length else [received] * ranks
        assert self._sums is not None
        done = []
        for replica, worker in self._workers:
            if self._is_last:
                if (before := self._open.pop(worker, None)) is not None:
                    parts[replica].add_(before)
                    self._pool.append(before)
                done.append(((worker, worker + 1), parts[replica]))
                continue
            if worker not in self._open:
                own = self._pool.pop() if self._pool else torch.empty(length, device=received.device)
                self._open[worker] = own.zero_()
            self._open[worker].add_(parts[replica])
        self._sums.add_round(done)

    def _complete(self, gradients: torch.Tensor) -> None:
        """Adds up, in place, what tensor-parallel ranks have only parts of; `gradients` [ranks, rows of each] is padded
        where rows do not divide. Whole parameters, as without shards: the order of a sum may depend on the shape."""
        offset = 0
        for slot, parameter in self.entries:
            size = parameter.padded_sharded_param_size.numel()
            if slot.name in self._parts and self._add_up is not None:
                rows = gradients[:, offset : offset + size]
                padded = rows.reshape(-1)
                padded[: slot.numel] = self._add_up(padded[: slot.numel].view(slot.shape)).reshape(-1)
                rows.copy_(padded.view_as(rows))
            offset += size

    def free(self) -> None:
        """Gives up the memory of sums, which are over."""
        if self._sums is not None:
            self._sums.clear()
        self._pool.clear()

    def total(self) -> torch.Tensor:
        """The sum over all virtual workers of this rank's rows, padding included."""
        assert self._sums is not None
        return self._sums.total()
