"""Whether processes and nodes are still there, seen from the ports on which they listen: without Ray's bookkeeping,
which takes its time, and without the GCS, which may be away."""

from __future__ import annotations

import socket
from collections.abc import Set

import ray


def refuses_connections(host: str, port: int) -> bool:
    """Whether a process that listened on a port is gone: its machine answers, and says that nobody is there.

    The kernel tells within a millisecond what Ray's own bookkeeping tells within tens, or not at all when the node's
    raylet died with it. A stopped process still accepts, so it is not taken for dead.
    """
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


class Raylets:
    """Where those of the nodes listen, so that it is seen without the GCS whether a node is still there."""

    def __init__(self) -> None:
        self._addresses: dict[str, tuple[str, int] | None] = {}

    def learn(self, nodes: Set[str]) -> None:
        """Looks up those of these nodes that are not known yet; waits for a GCS that does not answer."""
        if nodes <= self._addresses.keys():
            return
        found = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for node in nodes - self._addresses.keys():
            entry = found.get(node)
            self._addresses[node] = entry and (entry["NodeManagerAddress"], entry["NodeManagerPort"])

    def is_gone(self, node: str) -> bool:
        """Whether the raylet of a node that has been looked up no longer answers its port. Ray itself takes 12 s and
        more to say so."""
        if node not in self._addresses:
            return False
        if (address := self._addresses[node]) is None:
            return True
        try:
            socket.create_connection(address, timeout=0.5).close()
        except OSError:
            return True
        return False
