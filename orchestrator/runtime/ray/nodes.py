"""The nodes of a Ray cluster as its GCS knows them, and how to drain one.

The GCS is asked over gRPC with Ray's own stubs, channel and token, not with Ray's `GcsClient`: making one of those
takes 40 s when the GCS does not answer, which is longer than some clouds' notice; a call here fails at once. Ray is
imported when the first question is asked.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from monitoring.errors import UserError
from orchestrator.runtime.ray import compat

_TIMEOUT_S = 3.0
_ALIVE = 2
"""`ActorTableData.ActorState.ALIVE`."""
_PREEMPTION = 2
"""`DRAIN_NODE_REASON_PREEMPTION`: the reason a raylet cannot refuse."""


class NodeError(UserError, RuntimeError):
    """A node cannot be drained as asked; says which one, why, and what to do."""


class HeadNodeError(NodeError):
    """The node is the head, which cannot be drained."""


class GcsError(UserError, RuntimeError):
    """The cluster's GCS cannot be found or does not answer; says where it was looked for."""

    exit_code = 1


@dataclass(frozen=True)
class Node:
    """One raylet. `node_id` is its Ray node id in hex."""

    node_id: str
    address: str
    name: str
    hostname: str
    is_head: bool
    is_alive: bool

    def __str__(self) -> str:
        names = dict.fromkeys(name for name in (self.address, self.name, self.hostname) if name)
        return f"{self.node_id[:8]} ({', '.join([*names, *(['head'] if self.is_head else [])])})"


@dataclass(frozen=True)
class Drain:
    """A drain that was accepted, until `deadline` (seconds since the epoch), and whether one was under way before."""

    node: Node
    deadline: float
    was_draining: bool


def resolve_address(address: str | None) -> str:
    """`host:port` of the GCS: the `address` given, or that of RAY_ADDRESS, or what Ray itself finds on this machine.

    Raises GcsError.
    """
    try:
        found: str = compat.services.canonicalize_bootstrap_address_or_die(address or "auto")
    except (ConnectionError, ValueError, OSError) as error:
        raise GcsError(f"no Ray cluster found ({error}); give --address HOST:PORT or set RAY_ADDRESS") from error
    if "://" in found:
        raise GcsError(f"{found} is not the address of a GCS; give --address HOST:PORT, usually port 6379 of the head")
    return found


class Gcs:
    """Questions to the GCS at `address` (`host:port`). Holds no connection, so that a GCS that was away and came back,
    or moved behind its name, is found again. Every call raises GcsError when there is no answer within 3 s."""

    def __init__(self, address: str) -> None:
        self.address = address

    def nodes(self) -> list[Node]:
        """All nodes the GCS remembers, dead ones too."""
        messages, services = compat.generated("gcs_service_pb2"), compat.generated("gcs_service_pb2_grpc")
        with self._channel() as channel:
            reply = services.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(
                messages.GetAllNodeInfoRequest(), timeout=_TIMEOUT_S
            )
        return [
            Node(
                info.node_id.hex(), info.node_manager_address, info.node_name, info.node_manager_hostname,
                info.is_head_node, info.state == 0,
            )
            for info in reply.node_info_list
        ]  # fmt: skip

    def draining(self) -> dict[str, float]:
        """The deadline, in seconds since the epoch, of each draining node by its id; 0 when it has none."""
        messages, services = compat.generated("gcs_service_pb2"), compat.generated("gcs_service_pb2_grpc")
        with self._channel() as channel:
            reply = services.NodeResourceInfoGcsServiceStub(channel).GetDrainingNodes(
                messages.GetDrainingNodesRequest(), timeout=_TIMEOUT_S
            )
        return {node.node_id.hex(): node.draining_deadline_timestamp_ms / 1000 for node in reply.draining_nodes}

    def living_actors(self, namespace: str, node_ids: Collection[str]) -> list[str]:
        """Names of the living actors of a Ray namespace on these nodes."""
        messages, services = compat.generated("gcs_service_pb2"), compat.generated("gcs_service_pb2_grpc")
        request = messages.GetAllActorInfoRequest(filters=messages.GetAllActorInfoRequest.Filters(state=_ALIVE))
        with self._channel() as channel:
            reply = services.ActorInfoGcsServiceStub(channel).GetAllActorInfo(request, timeout=_TIMEOUT_S)
        return [
            actor.name or actor.class_name
            for actor in reply.actor_table_data
            if actor.ray_namespace == namespace and actor.address.node_id.hex() in node_ids
        ]

    def ask_drain(self, node_id: str, message: str, deadline: float) -> str:
        """Asks for a drain; returns why it was refused, or "". The GCS says yes to ids that it does not know too."""
        messages, services = compat.generated("autoscaler_pb2"), compat.generated("autoscaler_pb2_grpc")
        request = messages.DrainNodeRequest(
            node_id=bytes.fromhex(node_id),
            reason=_PREEMPTION,
            reason_message=message,
            deadline_timestamp_ms=int(deadline * 1000),
        )
        with self._channel() as channel:
            reply = services.AutoscalerStateServiceStub(channel).DrainNode(request, timeout=_TIMEOUT_S)
        return "" if reply.is_accepted else reply.rejection_reason_message or "no reason given"

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        import grpc
        from ray.exceptions import RayError

        try:
            with compat.init_grpc_channel(self.address) as channel:
                yield channel
        except (grpc.RpcError, RayError) as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code == grpc.StatusCode.UNAUTHENTICATED:
                detail = "it wants another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN)"
            elif code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                detail = "it does not answer; is the head node up, and its port open from here?"
            else:
                detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise GcsError(f"GCS at {self.address}: {detail}") from error


def prepare() -> None:
    """Imports what a question to the GCS needs, so that the first one does not wait a second for it."""
    for name in ("gcs_service_pb2_grpc", "autoscaler_pb2_grpc"):
        compat.generated(name)
    compat.init_grpc_channel  # noqa: B018 (looking it up imports it)


def _names(wanted: str, node: Node) -> bool:
    is_prefix = len(wanted) >= 6 and node.node_id.startswith(wanted.lower())
    return is_prefix or wanted in (node.address, node.name, node.hostname)


def find_nodes(gcs: Gcs, wanted: str) -> list[Node]:
    """The living nodes that `wanted` names: a node id or 6 and more of its first digits, an IP address, a node name or
    a host name.

    Raises NodeError when there is none (and says whether it is dead, or which there are), GcsError.
    """
    nodes = gcs.nodes()
    matching = [node for node in nodes if _names(wanted.strip(), node)]
    living = [node for node in matching if node.is_alive]
    if living:
        return living
    if matching:
        raise NodeError(f"node {matching[-1]} is dead already; there is nothing to drain")
    there = "\n  ".join(str(node) for node in nodes if node.is_alive) or "none"
    raise NodeError(f"no node '{wanted}' in the cluster at {gcs.address}; there are:\n  {there}")


def drain(gcs: Gcs, wanted: str, message: str, deadline: float) -> Drain:
    """Drains the one node that `wanted` names (see `find_nodes`) until `deadline`, in seconds since the epoch.

    Ray places nothing on a draining node any more, and its raylet ends when nothing runs on it. Nobody ends it at the
    deadline: that is left to the provider that takes the machine away. A second drain of a node replaces the deadline.

    Raises NodeError when no node or several match, when it is the head, is dead, or refuses; GcsError.
    """
    found = find_nodes(gcs, wanted)
    if len(found) > 1:
        several = "\n  ".join(str(node) for node in found)
        raise NodeError(f"'{wanted}' names {len(found)} nodes; say which by its id:\n  {several}")
    return drain_node(gcs, found[0], message, deadline)


def drain_node(gcs: Gcs, node: Node, message: str, deadline: float) -> Drain:
    """As `drain`, for a node that was found before."""
    if node.is_head:
        raise HeadNodeError(
            f"node {node} is the head, which cannot be drained: the cluster ends with it. "
            "Stop its runs (`orchestrator stop RUN`) and go on with them on another cluster (`orchestrator resume RUN`)"
        )
    if not node.is_alive:
        raise NodeError(f"node {node} is dead already; there is nothing to drain")
    was_draining = node.node_id in gcs.draining()
    # Ray takes a deadline of 0 for none, and one in the past for a mistake.
    deadline = max(deadline, time.time() + 0.5)
    if refusal := gcs.ask_drain(node.node_id, message, deadline):
        raise NodeError(f"node {node} refuses to drain: {refusal}")
    return Drain(node, deadline, was_draining)
