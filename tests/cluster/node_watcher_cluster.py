"""A Ray with token authentication in a process of its own: a head and one node. Told on standard input what to do.

python node_watcher_cluster.py HOME     prints {"address": ..., "head": ..., "node": ...}, then obeys:
place NAME NODE_ID                      an actor of ours on that node; answers its name
kill NAME                               ends it
draining                                answers {node id: deadline in ms}, as Ray's own state has it
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray
from ray._private.state import state
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.runtime.ray.session import _FRUGAL, _without_idle_services

OBJECT_STORE_BYTES = 80 << 20


class Busy:
    """Keeps a node busy, so that it does not end as soon as it drains."""

    def ready(self) -> bool:
        return True


def answer(content: Any) -> None:
    print(json.dumps(content), flush=True)


def main(home: str) -> None:
    os.environ["RAY_TMPDIR"] = home
    with _without_idle_services():
        cluster = Cluster(
            initialize_head=True, shutdown_at_exit=False,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES,
                            "_system_config": _FRUGAL},
        )  # fmt: skip
        try:
            node = cluster.add_node(wait=True, num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
            ray.init(address=cluster.address, namespace="orchestrator", log_to_driver=False)
            answer({"address": cluster.address, "head": cluster.head_node.node_id, "node": node.node_id})
            for line in sys.stdin:
                obey(line.split())
        finally:
            ray.shutdown()
            cluster.shutdown()


def obey(words: list[str]) -> None:
    match words:
        case ["place", name, node_id]:
            where = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
            actor = ray.remote(Busy).options(name=name, lifetime="detached", num_cpus=0, scheduling_strategy=where)
            ray.get(actor.remote().ready.remote(), timeout=60)
            answer(name)
        case ["kill", name]:
            ray.kill(ray.get_actor(name), no_restart=True)
            answer(name)
        case ["alive"]:
            answer({node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
        case ["draining"]:
            answer(state.get_draining_nodes())


if __name__ == "__main__":
    main(sys.argv[1])
