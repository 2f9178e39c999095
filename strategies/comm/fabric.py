"""All process groups of a rank in one generation: formed together, left together.

The world is a plain group of ours (`strategies.comm.groups`). Where torch's own parts need groups under torch's global
names (DTensor, pipelining, FSDP2), a c10d default group and a DeviceMesh are made of groups of ours too, by a
registered backend whose creator forms them; so every one of them can be broken out of, and a process can join
generation after generation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from strategies import compat
from strategies.comm import transports
from strategies.comm.faces import Face
from strategies.comm.gloo import Gloo
from strategies.comm.group_errors import PeerLost, raise_of_group
from strategies.comm.groups import Groups
from strategies.comm.ordered_sum import OrderedGroup
from strategies.comm.rendezvous import StoreClient
from strategies.comm.rendezvous_proof import StoreAddress
from strategies.comm.traffic import Traffic
from strategies.comm.transport import Transport
from strategies.comm.transports import HOST
from strategies.layout.parallel import ParallelLayout
from strategies.layout.replicas import island_of

BACKEND = "elastic"
AXES = ("data", "pipeline", "tensor")
"""The axes of the mesh, as ranks are numbered."""

_forming: Callable[[Any], Any] | None = None
"""Makes a group of c10d's options, while a fabric has c10d make its own."""


@dataclass(frozen=True)
class Hierarchy:
    """The ranks of a data-parallel group by node, as many on each: `nodes` has them by their numbers in the group. This
    rank's node and its place there are numbers too; `inner` are the ranks of its node in order, `rail` those with its
    place on all nodes."""

    nodes: tuple[tuple[int, ...], ...]
    node: int
    place: int
    inner: Groups
    rail: Groups


@dataclass(frozen=True)
class Island:
    """The ranks that compute the same virtual replicas as this one (`strategies.layout.replicas`): all of them, in
    order, and in `inner` those with the same part of the model. `control` has all of them, from host to host."""

    ranks: tuple[int, ...]
    control: Groups
    inner: Groups


def by_node(names: Sequence[str]) -> tuple[tuple[int, ...], ...] | None:
    """Ranks by the names of their nodes; None unless there are several nodes with several ranks, as many on each."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    counts = {len(ranks) for ranks in nodes.values()}
    if len(nodes) < 2 or len(counts) != 1 or counts == {1}:
        return None
    return tuple(map(tuple, nodes.values()))


class Fabric:
    """`control` and `world` have all ranks of a generation, `data_group` those that compute the same part of the model
    in all replicas.

    Tensors on `device` go over `world` and `data_group`, by the `transport` that the job asks for. What ranks tell each
    other and agree upon goes over `control`, from host memory to host memory: no device has a part in the decision to
    commit, and a peer that dies is noticed there in milliseconds. It is the same group where the device is a CPU.

    `mesh` is a DeviceMesh with AXES, None where no part of torch's needs one and for spares. `nodes` names the node of
    each rank, where they are known; `hierarchy` is what follows from them for `data_group`, if anything does.

    More than 15 attributes: the groups of a generation, what c10d makes of them, and what ends them.
    """

    def __init__(
        self,
        *,
        rank: int,
        layout: ParallelLayout,
        device: torch.device,
        transport: str = "auto",
        nodes: Sequence[str] = (),
    ) -> None:
        self.rank = rank
        self.nodes = tuple(nodes)
        self.hierarchy: Hierarchy | None = None
        self.island: Island | None = None
        self.layout = layout
        self.device = device
        between_hosts = self._between_hosts = Gloo()
        self.traffic = Traffic()
        self.control = Groups(
            rank=rank, world_size=layout.world_size, device=HOST, transport=between_hosts, traffic=self.traffic
        )  # fmt: skip
        between_devices = transports.choose(device, transport, between_hosts)
        self._transport: Callable[[], Transport] = between_devices or Gloo
        self.world = self.control if between_devices is None else self._groups(rank, layout.world_size)
        self.data_group = self.world
        self.mesh: Any = None
        self._axes: tuple[str, ...] = AXES
        self._others: list[Groups] = []
        self._by_group: dict[int, Groups] = {}
        self._store: StoreClient | None = None
        self._lock = threading.Lock()
        self._aborted = False

    @property
    def moves(self) -> int:
        """Counts what gets done in any of the groups."""
        return self.control.moves + sum(groups.moves for groups in self._others)

    @property
    def waited_s(self) -> float:
        """Seconds spent in exchanges of any of the groups."""
        return self.control.waited_s + sum(groups.waited_s for groups in self._others)

    @property
    def is_aborted(self) -> bool:
        return self._aborted

    def form(self, *, store_address: StoreAddress, prefix: str, host: str, timeout_s: float) -> None:
        """Joins the other ranks, as `Groups.form`. Raises PeerLost."""
        where: dict[str, Any] = {"store_address": store_address, "host": host, "timeout_s": timeout_s}
        # A rank that is past this knows that all are here: what forms after it need not wait for anybody.
        self.control.form(prefix=f"{prefix}/control", **where)
        if self.world is not self.control:
            self._adopt(self.world)
            self.world.form(prefix=f"{prefix}/world", **where)
        if self.layout.place(self.rank) is None:
            self.data_group = self._groups(0, 1)
            return
        if self.layout.computes_together:
            try:
                self._form_mesh(store_address, f"{prefix}/mesh", host, timeout_s)
            except RuntimeError as error:
                raise_of_group(error, f"could not form the groups of {prefix}")
        elif self.layout.spares:
            self.data_group = self._part(list(range(self.layout.num_placed)), f"{prefix}/data", where)
        self._form_hierarchy(f"{prefix}/hierarchy", where)
        self._form_island(f"{prefix}/island", where)

    def _form_island(self, prefix: str, where: dict[str, Any]) -> None:
        """The groups of those who share virtual replicas, where there are such."""
        layout, place = self.layout, self.layout.place(self.rank)
        if not layout.virtual_replicas or place is None:
            return
        island = island_of(layout, place.data)
        size = layout.pipeline * layout.tensor
        ranks = [rank for data in island for rank in range(data * size, (data + 1) * size)]
        inner = [layout.rank_of(data, place.stage, place.tensor) for data in island]
        self.island = Island(
            tuple(ranks), self._part(ranks, f"{prefix}/{ranks[0]}/control", where, on_hosts=True),
            self._part(inner, f"{prefix}/{inner[0]}/inner", where),
        )  # fmt: skip

    def _form_hierarchy(self, prefix: str, where: dict[str, Any]) -> None:
        """The parts of the data-parallel group by node, where there are such."""
        ranks = self.layout.data_group(self.rank)
        reduces_at_once = self.layout.effective_shard in ("none", "optimizer")
        nodes = by_node([self.nodes[rank] for rank in ranks]) if self.nodes and reduces_at_once else None
        if nodes is None:
            return
        own = ranks.index(self.rank)
        node = next(number for number, members in enumerate(nodes) if own in members)
        place = nodes[node].index(own)
        inner = [ranks[member] for member in nodes[node]]
        rail = [ranks[members[place]] for members in nodes]
        self.hierarchy = Hierarchy(
            nodes, node, place, self._part(inner, f"{prefix}/{ranks[0]}/node{node}", where),
            self._part(rail, f"{prefix}/{ranks[0]}/rail{place}", where),
        )  # fmt: skip

    def _groups(self, rank: int, world_size: int) -> Groups:
        return Groups(
            rank=rank, world_size=world_size, device=self.device, transport=self._transport(), traffic=self.traffic
        )  # fmt: skip

    def _part(
        self, ranks: list[int], prefix: str, where: dict[str, Any], *, on_hosts: bool = False
    ) -> Groups:  # fmt: skip
        if on_hosts:
            groups = Groups(
                rank=ranks.index(self.rank), world_size=len(ranks), device=HOST, transport=Gloo(), traffic=self.traffic
            )  # fmt: skip
        else:
            groups = self._groups(ranks.index(self.rank), len(ranks))
        self._adopt(groups)
        groups.form(prefix=prefix, **where)
        return groups

    def _adopt(self, groups: Groups) -> None:
        with self._lock:
            self._others.append(groups)
            if self._aborted:
                groups.abort()

    def _form_mesh(self, address: StoreAddress, prefix: str, host: str, timeout_s: float) -> None:
        global _forming
        from torch.distributed.device_mesh import init_device_mesh

        _register()
        layout = self.layout
        store = StoreClient(address, prefix, timeout_s)
        with self._lock:
            self.check()
            self._store = store
        store.connect()
        _forming = partial(self._create, host, timeout_s)
        try:
            dist.init_process_group(
                BACKEND, store=store, rank=self.rank, world_size=layout.num_placed, timeout=timedelta(hours=24)
            )
            shape = (layout.data, layout.pipeline, layout.tensor)
            # By their names too, DTensor is to tell the meshes of generations apart in which this process has another
            # place: which share is whose is part of what it remembers.
            self._axes = tuple(f"{axis} {at}" for axis, at in zip(AXES, layout.place(self.rank) or (), strict=True))
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=self._axes)
            _name_groups(self.mesh)
            self.data_group = self.groups_of(self.group("data"))
        finally:
            _forming = None

    def _create(self, host: str, timeout_s: float, options: Any) -> Any:
        """A process group for c10d, made by us."""
        rank, size = options.group_rank, options.group_size
        groups = self._groups(rank, size)
        self._adopt(groups)
        group = groups.form_on(options.store, host, timeout_s)
        self._by_group[id(group)] = groups
        first = self.rank - self.rank % self.layout.tensor
        ranks = list(options.global_ranks_in_group) or list(range(size))  # The group of all has none there.
        is_tensor = ranks == list(range(first, first + self.layout.tensor))
        if is_tensor and size > 2 and not isinstance(group, Face):
            return OrderedGroup(group, rank, size, self.device)
        return group

    def axis(self, name: str) -> Any:
        """The part of the mesh along one of AXES that this rank is in."""
        return self.mesh[self._axes[AXES.index(name)]]

    def group(self, name: str) -> Any:
        """The process group of `axis`."""
        return self.mesh.get_group(AXES.index(name))

    def groups_of(self, group: Any) -> Groups:
        """Our groups behind a process group that c10d made of them."""
        return self._by_group.get(id(group)) or self._by_group[id(group._get_backend(self.device))]

    def check(self) -> None:
        """Raises PeerLost when the groups were aborted or left; counts as a move."""
        self.control.check()

    def look(self) -> None:
        """Like `check`; where the host is ahead of its device, it also raises PeerLost when the process of another rank
        is gone: what waits for that on the device does not say so."""
        self.check()
        if self.world is not self.control and self._between_hosts.has_lost_a_peer():
            raise PeerLost("the process of a peer is gone")

    def abort(self) -> None:
        """Makes every collective of this rank in flight, and every later one, raise. From any thread."""
        with self._lock:
            self._aborted = True
            others = list(self._others)
            if self._store is not None:
                self._store.abort()
        everything = [self.control, *others]
        # All are marked before any is ended: one that ends another's wait must not find it going on to the next.
        for groups in everything:
            groups.mark_aborted()
        for groups in everything:
            groups.abort()

    def drop(self) -> None:
        """Leaves all groups for good; neighbours still waiting for this rank see an error at once. Waits for nothing:
        see `is_gone`."""
        self.abort()
        if self.mesh is not None or dist.is_initialized():
            self.mesh = None
            compat.forget_groups()
        self._by_group = {}
        for groups in (self.control, *self._others):
            groups.drop()

    def is_gone(self, timeout_s: float) -> bool:
        """Waits until nothing is left of what was dropped, so that a backend can form other groups; whether it is. A
        process of which something is left for good is of no use any more."""
        deadline = time.monotonic() + timeout_s
        everything = [self.control, *self._others]
        return all(groups.transport.is_gone(max(0.0, deadline - time.monotonic())) for groups in everything)


def _name_groups(mesh: Any) -> None:
    """Gives the groups of a mesh names that are the same in every generation.

    DTensor remembers what it has worked out, and the mesh with it, for the life of the process; it takes the mesh of
    another generation with as many ranks for the same one, and finds the group of a collective by the name that the
    remembered one has. c10d's own names are numbers, which depend on the shape of the mesh and on the rank.
    """
    names = [dist.GroupName(f"{BACKEND}/{axis}") for axis in AXES]
    # What is remembered must not keep the groups of its generation alive.
    compat.name_groups(mesh, names)


def _create(options: Any, _: Any = None) -> Any:
    if _forming is None:
        raise RuntimeError("process groups of this backend are formed by a Fabric only")
    return _forming(options)


def _register() -> None:
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
