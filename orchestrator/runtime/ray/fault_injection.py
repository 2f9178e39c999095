"""Faults that happen to a cluster and not to a process: a node that drains, or is lost."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import psutil
import ray

from orchestrator.control.core.protocol import DrainNotice
from orchestrator.control.core.workers import WorkerId
from orchestrator.job.sections.faults import Fault
from orchestrator.runtime.ray.nodes import Gcs, GcsError

NOTICE_S = 30.0
"""How long before it goes a node drains, when the fault does not say."""


def practise(fault: Fault, worker: WorkerId, node: str, now: float) -> DrainNotice | None:
    """Makes the node of a worker drain, or go. Where that cannot be done (we are there too, or the cluster does not
    answer), the notice to act on instead, with its deadline counted from `now`."""
    if fault.kind == "node":
        threading.Thread(target=_lose_node, args=(node,), daemon=True).start()
    elif fault.kind == "drain":
        left_s = NOTICE_S if fault.seconds is None else fault.seconds
        if node != ray.get_runtime_context().get_node_id():
            with suppress(GcsError):
                gcs = Gcs(ray.get_runtime_context().gcs_address)
                gcs.ask_drain(node, "injected by a fault of the job", time.time() + left_s)
                return None
        return DrainNotice((worker,), "injected notice", now + left_s)
    return None


def _lose_node(node: str) -> None:
    """Ends a raylet of this machine and everything that runs under it, at once, as a lost node would."""
    name = next((n["RayletSocketName"] for n in ray.nodes() if n["NodeID"] == node), None)
    for process in psutil.process_iter(["name", "cmdline"]):
        line = process.info["cmdline"] or []
        if process.info["name"] == "raylet" and any(part.endswith(f"={name}") for part in line):
            for victim in [process, *process.children(recursive=True)]:
                with suppress(psutil.Error):
                    victim.send_signal(signal.SIGKILL)
