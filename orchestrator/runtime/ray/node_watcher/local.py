"""Which raylets are on this machine, and how they are drained."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil

from orchestrator.runtime.ray.nodes import Gcs, Node, NodeError, drain_node, find_nodes, resolve_address

NAMESPACE = "orchestrator"
"""Of our actors; as in `placement.py`, which a process this small does not import."""


class ThisNode:
    """The node, or nodes, that this watcher answers for. Safe to use from several threads.

    They are the one of `node_id`, if given; else the raylets below the process `parent`, if given and there are any;
    else those that registered with one of this machine's addresses. The GCS is the one at `address`, or that of the
    raylet below `parent`, or what Ray finds by itself.
    """

    def __init__(self, address: str | None, node_id: str | None, parent: int | None = None) -> None:
        self._address = address
        self._node_id = node_id
        self._parent = parent
        self._deadlines: dict[str, float] = {}
        self._seen_below: dict[str, str] = {}

    def drain(self, reason: str, deadline: float) -> str:
        """Drains what is here until `deadline` (seconds since the epoch), and says what. What this process drained
        before keeps its deadline, unless the new one is sooner.

        Raises GcsError, NodeError (nothing is here, yet), HeadNodeError (only the head is here).
        """
        gcs, nodes = self._find()
        if not nodes:
            if self._deadlines:
                return "drained before, and gone since: " + ", ".join(node[:8] for node in self._deadlines)
            raise NodeError(f"no node of the cluster at {gcs.address} is on this machine; name it with --node-id")
        # Beside other raylets, as on a machine for tests, the head is left alone; alone, it says that it is the head.
        workers = [node for node in nodes if not node.is_head] or nodes
        told = []
        for node in workers:
            if self._deadlines.get(node.node_id, float("inf")) <= deadline + 1.0:
                told.append(f"node {node} drains already")
                continue
            drained = drain_node(gcs, node, reason, deadline)
            self._deadlines[node.node_id] = deadline
            told.append(f"node {node} drains for {max(drained.deadline - time.time(), 0.0):.0f} s")
        return "; ".join(told)

    def busy(self) -> list[str]:
        """Names of our living actors on the nodes that were drained. Raises GcsError."""
        gcs, nodes = self._find()
        drained = {node.node_id for node in nodes} & self._deadlines.keys()
        return gcs.living_actors(NAMESPACE, drained) if drained else []

    def _find(self) -> tuple[Gcs, list[Node]]:
        if self._parent is not None:
            self._seen_below |= raylets_below(self._parent)
        gcs = Gcs(resolve_address(self._address or next(iter(self._seen_below.values()), None)))
        if self._node_id is not None:
            try:
                return gcs, find_nodes(gcs, self._node_id)
            except NodeError:
                if self._deadlines:
                    return gcs, []
                raise
        nodes = [node for node in gcs.nodes() if node.is_alive]
        if self._seen_below:
            return gcs, [node for node in nodes if node.node_id in self._seen_below]
        addresses = own_addresses()
        return gcs, [node for node in nodes if node.address in addresses]


def raylets_below(parent: int) -> dict[str, str]:
    """The GCS address of each raylet that descends from a process, by node id, as their command lines say."""
    found = {}
    with suppress(psutil.Error):
        for process in psutil.Process(parent).children(recursive=True):
            with suppress(psutil.Error):
                options = dict(part.lstrip("-").split("=", 1) for part in process.cmdline() if "=" in part)
                if "raylet_socket_name" in options and "node_id" in options and "gcs-address" in options:
                    found[options["node_id"]] = options["gcs-address"]
    return found


def own_addresses() -> set[str]:
    """The IP addresses of this machine's interfaces."""
    return {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
