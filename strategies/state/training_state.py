"""What a rank has of the training state, and how it takes its place in a layout.

A rank computes with a part of the model and trains shards of the state (`strategies.layout.placement`). When the layout
changes it makes room for what it is to have, copies what it has already, and is sent the rest; what it had before
counts until every rank has what it needs. So a rank that is interrupted on the way has lost nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from strategies.comm.fabric import Fabric
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain, Shard, place_state, trained_spans
from strategies.layout.space import FlatRanges, Slot
from strategies.layout.statemap import (
    NOTHING,
    Span,
    Spans,
    intersect,
    plan_transfers,
    share_out,
    subtract,
    union,
)
from strategies.layout.virtual import VirtualPart, VirtualState, VirtualStates, held_spans
from strategies.model.blueprint import Blueprint
from strategies.model.model_part import ModelPart
from strategies.optim.spec import OptimizerSpec
from strategies.state.buffers import Spaces
from strategies.state.chunk_loader import ChunkLoader
from strategies.state.chunks import full_shape
from strategies.state.host_copies import SideCopies
from strategies.state.initial import fill
from strategies.state.kinds_of_state import KindsOfState
from strategies.state.reshard import Resharded, copy_within, execute
from strategies.state.shard import KEPT, WEIGHTS, StateShard
from strategies.state.virtual_shard import VirtualShard

if TYPE_CHECKING:
    from strategies.model.fsdp import ShardedModelPart


def _check_names(kept: Sequence[str]) -> None:
    if len({*kept}) < len(kept) or not all(kind.startswith(KEPT) for kind in kept):
        raise ValueError(
            f"the kinds of state of an update rule are {', '.join(kept)}: each must begin with {KEPT!r}, and be there "
            "once"
        )


@dataclass
class Arrangement:
    """A rank's place in a layout: the part it computes with (None for a spare), what it trains of it itself, what it
    mirrors of others, and what it has of virtual state. `shards` are everybody's, and so are `virtual_parts`."""

    part: ModelPart | ShardedModelPart | None = None
    own: StateShard | None = None
    mirrors: dict[int, StateShard] = field(default_factory=dict)
    """By the owner's rank."""
    shards: Sequence[Shard] = ()
    virtual_parts: Sequence[VirtualPart] = ()
    virtual: dict[VirtualPart, VirtualShard] = field(default_factory=dict)
    states: VirtualStates | None = None

    @property
    def state_shards(self) -> list[StateShard]:
        return [*([self.own] if self.own is not None else []), *self.mirrors.values()]

    def held(self, layout: ParallelLayout) -> list[Spans]:
        """What each rank has, by rank, once it has taken its place."""
        return held_spans(layout, trained_spans(layout, self.shards), self.virtual_parts)

    def made(self, state: VirtualState, number: int, tensor: int) -> VirtualShard:
        """What this rank computes of what a thing has; of one thing a rank computes one part."""
        assert self.states is not None
        coordinate = self.states.coordinate_of(state, number, tensor)
        return next(shard for shard in self.virtual.values() if shard.coordinate == coordinate and shard.is_made)

    def begin(self) -> None:
        """It counts from now on. Before, this rank might have gone back to computing with all frozen parameters."""
        if self.part is not None:
            frozen = self.part.blueprint.frozen
            frozen.drop(frozen.keys() - self.part.kept_frozen)


class TrainingState:
    """`held` is what this rank has of the state, whole and of one step; `updates` how many updates that has seen;
    `reads` is what is being copied of it.

    `blueprint` describes the model, and has the values of step 0. `kept` are the kinds of state of the update rule
    (`strategies.update.rule.UpdateRule`), which may have what is computed with kept apart. All state is fp32. Raises
    ValueError for kinds whose names are not an update rule's.
    """

    def __init__(
        self, blueprint: Blueprint, spec: OptimizerSpec, kept: Sequence[str] = (),
        virtual: Sequence[VirtualState] = (), *, computes_apart: bool = False,
    ) -> None:  # fmt: skip
        _check_names(kept)
        self.blueprint = blueprint
        self.space = blueprint.space
        if spec.kind.scope != "element" and not self.space.keeps_whole:
            raise ValueError(f"{spec.kind.name} updates parameters as a whole, and the blueprint would divide them")
        self.spec = spec
        self.spaces: Spaces = {
            WEIGHTS: self.space, **{name: spec.space_of(name, self.space) for name in spec.moments},
            **dict.fromkeys(kept, self.space),
        }  # fmt: skip
        """By kind of state, with the shapes that it has."""
        self.kept = tuple(kept)
        self.computes_apart = computes_apart
        self.kinds = KindsOfState(self.spaces, virtual)
        self.virtual = self.kinds.virtual
        self.device = blueprint.device
        self.arrangement = Arrangement()
        self.reads = SideCopies(self.device)
        self.updates = 0
        self.collected: Sequence[StateShard | VirtualShard] = []
        self.is_initial = True
        """The state is that of step 0, every part of which can be made here."""
        self._held = NOTHING

    # ------------------------------------------------------------------------------------ what is here

    @property
    def held(self) -> Spans:
        if self.is_initial or self.collected:
            return self.everything
        return self._held

    @property
    def everything(self) -> Spans:
        """All there is of the state, wherever it is."""
        return self.virtual.everything(self.space.size)

    @property
    def holders(self) -> Sequence[StateShard | VirtualShard]:
        """Where what is held is. The whole state, if there is one, may be newer than what was trained here before."""
        return self.collected or [*self.arrangement.state_shards, *self.arrangement.virtual.values()]

    def find(self, span: Span) -> Iterator[tuple[int, int, int, StateShard | VirtualShard]]:
        """Where the elements of a span are: (from, position in the buffers, length, of which state shard), each once.

        Raises RuntimeError when not all of it is here.
        """
        left = union((span,))
        for state_shard in self.holders:
            for part in left:
                for start, offset, length in state_shard.locate(part):
                    yield start, offset, length, state_shard
            left = subtract(left, state_shard.spans)
            if not left:
                return
        raise RuntimeError(f"{next(iter(left))} is not on this rank")

    def start_over(self) -> None:
        """Back to the state of step 0."""
        self.collected, self._held, self.updates, self.is_initial = [], NOTHING, 0, True

    def invalidate(self) -> None:
        """Nothing that is here counts any more."""
        self.collected, self._held, self.is_initial = [], NOTHING, False

    def forget_collected(self) -> None:
        """A step is prepared, for what is trained here: from now on that alone counts, and no copy beside it, which
        could not go along."""
        self.collected = []

    def step_committed(self) -> None:
        """A step was committed: what is here is that of a later step than any copy beside it."""
        self.collected, self.is_initial = [], False
        self.blueprint.values.forget()

    def whole_part(self) -> ModelPart:
        """The whole model, with the weights of step 0, to compute with before there is a layout."""
        self.arrangement.part = part = ModelPart(self.blueprint, 0, None)
        with torch.no_grad():
            for slot, offset in part.slots:
                part.weights[offset : offset + slot.numel].copy_(self.blueprint.values.read(slot.name).reshape(-1))
        return part

    # ------------------------------------------------------------------------------------ a new layout

    def adopt_layout(
        self,
        layout: ParallelLayout,
        fabric: Fabric,
        held: Sequence[Spans],
        domains: Sequence[Domain],
        copies: int,
        updates: int,
        barrier: Callable[[], object],
        read: Callable[[ChunkLoader], object] | None = None,
        *,
        read_by_node: bool = False,
    ) -> Resharded:
        """Brings this rank's part of the state here. `held` is what all ranks have, by rank. With `read` nobody has
        anything: what each is to have is shared out, so that all together `read` everything once, and then passed on.
        With `read_by_node` each node reads it once: there a second reader costs less than passing on does.

        Until `barrier` has been passed, which is when every rank has what it needs, what was here before still counts.
        Raises PeerLost, StateCorrupt, and NotCovered when some of the state is nowhere; and what `read` raises.
        """
        rank = fabric.rank
        self.reads.before_change()
        new = self._arrange(layout, fabric, domains, copies)
        wanted = new.held(layout)
        if read is not None:
            held = _by_node(wanted, domains) if read_by_node else share_out(wanted)
        plan = plan_transfers(held, wanted)
        targets: list[StateShard | VirtualShard] = [*new.state_shards, *new.virtual.values()]
        sources: Sequence[StateShard | VirtualShard]
        if read is not None:
            read(ChunkLoader(self.kinds, targets, held[rank], self.blueprint.buffers))
            sources = targets
        elif self.is_initial and held[rank]:
            self._fill(targets)
            sources = self._make_initial() if any(transfer.source == rank for transfer in plan) else []
        else:
            sources = self.holders
            copy_within(sources, targets, intersect(wanted[rank], held[rank]))
        moved = execute(plan, sources, targets, self.kinds.spaces_at, fabric.world)
        barrier()
        old = self.arrangement
        if old.part is not None and old.part is not new.part:
            old.part.close()
        self.arrangement, self._held, self.collected = new, wanted[rank], []
        new.begin()
        self.is_initial = False
        self.updates = updates
        for state_shard in new.state_shards:
            state_shard.set_updates(updates)
        return moved

    def _make_initial(self) -> list[StateShard | VirtualShard]:
        """The whole state of step 0."""
        made = self._room_for_all()
        self._fill(made)
        return made

    def _fill(self, made: Sequence[StateShard | VirtualShard]) -> None:
        fill([each for each in made if isinstance(each, StateShard)], self.blueprint)
        for each in made:
            if isinstance(each, VirtualShard):
                each.zero()

    def _arrange(
        self, layout: ParallelLayout, fabric: Fabric, domains: Sequence[Domain], copies: int
    ) -> Arrangement:  # fmt: skip
        """Room for what this rank is to have; what has the same shape as before is the same memory."""
        shards = place_state(layout, self.space, domains, copies)
        parts = self.virtual.place(layout, self.space, domains, copies)
        place = layout.place(fabric.rank)
        if place is None:
            return Arrangement(shards=shards, virtual_parts=parts)
        virtual = {part: self._virtual_room(part, fabric.rank) for part in parts if fabric.rank in part.holders}
        kind = layout.effective_shard
        shard = shards[fabric.rank]
        runs = layout.blocks_of(place.stage)
        part: ModelPart | ShardedModelPart
        if kind == "parameters":
            from strategies.model.fsdp import ShardedModelPart

            part = ShardedModelPart(self.blueprint, runs, fabric)
            own = self._room(shard, FlatRanges.pieces(shard.ranges, self.space.boundary))
        else:
            part = self._part(place.tensor, runs, fabric)
            if kind == "none" and part.weights.dtype == torch.float32 and not self.computes_apart:
                own = self._room(shard, part.flat, part.state_weights)
            elif kind == "none":
                own = self._room(shard, part.flat)
            else:
                own = self._room(shard, FlatRanges.of(shard.ranges, self.space.boundary))
        pieces = FlatRanges.pieces if kind == "parameters" else FlatRanges.of
        mirrors = {
            other.owner: self._room(other, pieces(other.ranges, self.space.boundary))
            for other in shards
            if fabric.rank in other.mirrors
        }
        return Arrangement(part, own, mirrors, shards, parts, virtual, self.virtual)

    def _virtual_room(self, part: VirtualPart, rank: int) -> VirtualShard:
        """What it was computing of an interrupted step goes on to count."""
        flat = FlatRanges.of(part.ranges, self.space.boundary)
        is_made = rank in part.makers
        for old in self.arrangement.virtual.values():
            if (old.coordinate, old.flat, old.is_made) == (part.coordinate, flat, is_made):
                return old
        thing = self.virtual.find(part.coordinate)
        assert thing is not None
        return VirtualShard(part.coordinate, flat, thing.state.kinds, self.device, is_made=is_made)

    def _part(self, coordinate: int, runs: tuple[tuple[int, int], ...] | None, fabric: Fabric) -> ModelPart:
        old = self.arrangement.part
        mesh = fabric.axis("tensor") if fabric.layout.tensor > 1 else None
        if isinstance(old, ModelPart) and old.is_plain and runs is None and mesh is None:
            return old
        weights = None
        own = self.arrangement.own
        if isinstance(old, ModelPart) and (old.coordinate, old.runs) == (coordinate, runs):
            weights = old.weights if own is not None and own.weights is old.state_weights else None
        return ModelPart(self.blueprint, coordinate, runs, mesh, weights)

    def _room(self, shard: Shard, flat: FlatRanges, weights: torch.Tensor | None = None) -> StateShard:
        """A state shard with these `weights`, or with weights of its own, which nothing computes with."""
        part = self.arrangement.part
        computed_with = part.state_weights if isinstance(part, ModelPart) else None
        for old in self.arrangement.state_shards:
            fits = old.weights is not computed_with if weights is None else old.weights is weights
            if fits and old.coordinate == shard.coordinate and old.flat == flat:
                return old
        return StateShard(shard.coordinate, flat, self.spec, self.device, weights, self.kept, self.spaces)

    # ------------------------------------------------------------------------------------ the whole state

    def collect(self, held: Sequence[Spans], fabric: Fabric) -> Resharded:
        """Brings the whole state to rank 0, beside what is there. Raises PeerLost, StateCorrupt, NotCovered."""
        wanted = [self.everything, *[NOTHING] * (fabric.world.world_size - 1)]
        sources = self._make_initial() if self.is_initial else self.holders
        targets = self._room_for_all() if fabric.rank == 0 else []
        copy_within(sources, targets, held[fabric.rank])
        moved = execute(plan_transfers(held, wanted), sources, targets, self.kinds.spaces_at, fabric.world)
        if fabric.rank == 0:
            self.collected = targets
        return moved

    def _room_for_all(self) -> list[StateShard | VirtualShard]:
        """Shards for the whole state, one per coordinate."""
        flat = FlatRanges.of([(0, self.space.size)], self.space.boundary)
        trained: list[StateShard | VirtualShard] = [
            StateShard(coordinate, flat, self.spec, self.device, kept=self.kept, spaces=self.spaces)
            for coordinate in range(self.space.tensor)
        ]
        things = self.virtual.things()
        return trained + [VirtualShard(at, flat, thing.state.kinds, self.device) for at, thing in things]

    def whole_state(self) -> Sequence[StateShard | VirtualShard] | None:
        """One shard of the whole state per coordinate, in order, if all of it is here."""
        if self.collected:
            return self.collected
        if self.is_initial:
            return self._make_initial()
        if subtract(self.everything, self.held):
            return None
        if (own := self.arrangement.own) is not None and own.spans == self.everything:
            return [own]
        # It is here in pieces: a shard of its own and those of others.
        pieced = self._room_for_all()
        copy_within(self.holders, pieced, self.everything)
        return pieced

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every full parameter, buffer and optimizer tensor under a stable name, in name order.

        Raises RuntimeError when not all of the state is here.
        """
        shards = self.whole_state()
        if shards is None:
            raise RuntimeError("not all of the state is on this rank")
        constants = self.blueprint.constants
        sources: dict[str, tuple[str, str | Slot, int]] = {f"model.{name}": ("", name, 0) for name in constants}
        for name, kind, slot, coordinate in self.kinds.tensors():
            sources[name] = kind, slot, coordinate
        sources["optimizer.updates"] = ("", "", 0)
        for name, (kind, inner, coordinate) in sorted(sources.items()):
            if isinstance(inner, Slot):
                of_it = shards[coordinate : coordinate + self.space.tensor]
                yield name, self.space.assemble(inner, [shard.kinds()[kind].of_slot(inner) for shard in of_it])
            elif inner:
                yield name, constants[inner]
            else:
                yield name, torch.tensor(self.updates, dtype=torch.int64)

    def tensors(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """What a checkpoint has of what `named` gives: dtype and full shape by name. Not frozen parameters, which have
        a source of their own."""
        found = {f"model.{name}": (tensor.dtype, tensor.shape) for name, tensor in self.blueprint.buffers.items()}
        for name, kind, slot, coordinate in self.kinds.tensors():
            shape = full_shape(self.kinds.spaces_at(coordinate)[kind], slot)
            found[name] = torch.float32, torch.Size(shape)
        return found


def _by_node(wanted: Sequence[Spans], domains: Sequence[Domain]) -> list[Spans]:
    """What each rank reads of what it wants, so that every node reads its share of everything, and all ranks of it
    theirs of that."""
    # Of ranks whose node is not known, each is taken to be on one of its own.
    names = [domain if domain.node else rank for rank, domain in enumerate(domains)]
    nodes = list(dict.fromkeys(names))
    by_node = [union(*(want for want, name in zip(wanted, names, strict=True) if name == node)) for node in nodes]
    shares = dict(zip(nodes, share_out(by_node), strict=True))
    return [intersect(want, shares[name]) for want, name in zip(wanted, names, strict=True)]


def state_digest(state: TrainingState) -> str:
    """ "sha256:…" over name, dtype, shape and little-endian bytes of every tensor of the state, in name order.

    Raises RuntimeError when not all of the state is on this rank.
    """
    digest = hashlib.sha256()
    for name, tensor in state.named():
        host = tensor.detach().contiguous().cpu()
        digest.update(f"{name} {str(host.dtype).removeprefix('torch.')} {list(host.shape)}\n".encode())
        digest.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
