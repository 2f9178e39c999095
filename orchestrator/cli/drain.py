"""`orchestrator drain`: planned maintenance of one node."""

from __future__ import annotations

import time

from monitoring.outside import json_text


def drain(node: str, *, deadline_s: float, reason: str, address: str | None, as_json: bool) -> None:
    """Drains the node that `node` names and says how to watch it.

    Raises NodeError (no such node, several, the head, refused), GcsError.
    """
    from orchestrator.runtime.ray.nodes import Gcs, resolve_address
    from orchestrator.runtime.ray.nodes import drain as drain_named

    done = drain_named(Gcs(resolve_address(address)), node, reason, time.time() + deadline_s)
    if as_json:
        content = {
            "node_id": done.node.node_id,
            "address": done.node.address,
            "name": done.node.name,
            "deadline": round(done.deadline, 3),
            "reason": reason,
            "was_draining": done.was_draining,
        }
        print(json_text(content))
        return
    until = time.strftime("%H:%M:%S", time.localtime(done.deadline))
    again = ", which replaces its earlier deadline" if done.was_draining else ""
    print(f"node {done.node} drains until {until} ({deadline_s:.0f} s from now{again}): {reason}")
    print("Runs leave it at their next step boundary; watch one with `orchestrator events RUN --kind drain_notice`.")
    print(
        "Its Ray ends when nothing runs on it any more. A drain cannot be withdrawn: start Ray there again afterwards."
    )
