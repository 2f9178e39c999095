"""The nodes of a cluster and an actor on each: how they are asked, with a time limit, and how they are left."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.doctor.check import CLUSTER, HERE, NOTE, PROBLEM, Check
from orchestrator.runtime.ray import compat
from orchestrator.runtime.ray.examination import node as node_module

NAMESPACE = "orchestrator-doctor"
START_S = 60.0
"""How long a node may take to start a process."""


class Unreachable(RuntimeError):
    """The cluster answers, but cannot be joined from here; carries the check that says so."""

    def __init__(self, check: Check) -> None:
        super().__init__(check.found)
        self.check = check


@dataclass(frozen=True)
class Failed:
    """Instead of an answer: why there is none."""

    reason: str


@dataclass(frozen=True)
class LiveNode:
    """What the GCS knows of a node that is alive."""

    label: str
    node_id: str
    host: str
    is_head: bool
    resources: Mapping[str, float]
    session_dir: str


Call = tuple[str, str, tuple[Any, ...]]
"""A node's label, the name of a method of NodeExaminer, its arguments."""


class Nodes:
    """Connected to a cluster, with an actor on every node that lets one start. `silent` says of which nodes nothing can
    be learned, and why."""

    def __init__(self, address: str) -> None:
        self.gcs = compat.GcsClient(address=address)
        self.address = address
        self.all: dict[str, LiveNode] = {}
        self.silent: list[Check] = []
        self._actors: dict[str, Any] = {}

    def connect(self) -> None:
        """Raises Unreachable."""
        alive = self._alive()
        if not set(compat.services.find_node_ids()) & {info.node_id.hex() for info in alive}:
            raise Unreachable(Check("nodes", CLUSTER, PROBLEM, f"{HERE} is no node of the cluster at {self.address}",
                "run this on one of its nodes: `ray job submit --address http://HEAD:8265 --working-dir . -- "
                "orchestrator doctor --address auto`, or `ray exec`, `kubectl exec`"))  # fmt: skip
        try:
            ray.init(address=self.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (RuntimeError, ConnectionError, ValueError, ray.exceptions.RayError) as error:
            if "Version mismatch" in str(error):
                text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
                raise Unreachable(Check("versions", CLUSTER, PROBLEM, text, "use the cluster's versions of Python and "
                                        "Ray here")) from error  # fmt: skip
            raise
        addresses = Counter(info.node_manager_address for info in alive)
        for info in alive:
            node_id, host = info.node_id.hex(), info.node_manager_address
            label = host if addresses[host] == 1 else f"{host}/{node_id[:8]}"
            self.all[label] = LiveNode(
                label, node_id, host, info.is_head_node, dict(info.resources_total), info.session_dir or info.temp_dir
            )
        self._start_actors()

    def _alive(self) -> list[Any]:
        return list(
            self.gcs.get_all_node_info(timeout=5.0, state_filter=compat.GcsNodeInfo.GcsNodeState.ALIVE).values()
        )

    def _start_actors(self) -> None:
        for name in _SENT:
            ray.cloudpickle.register_pickle_by_value(sys.modules[name])
        examiner = ray.remote(node_module.NodeExaminer)
        draining = compat.state.get_draining_nodes()
        for node in self.all.values():
            if node.node_id in draining:
                self.silent.append(Check("nodes", node.label, NOTE, "is being drained, and was not examined"))
                continue
            self._actors[node.label] = examiner.options(
                num_cpus=0, max_restarts=0, max_concurrency=4,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            ).remote()  # fmt: skip
        answers = self.ask({label: (label, "now_s", ()) for label in self._actors}, START_S)
        for label, answer in answers.items():
            if isinstance(answer, Failed):
                self.give_up(label, f"starts no process: {answer.reason}")

    def give_up(self, label: str, reason: str) -> None:
        """A node that is not to be asked again."""
        with suppress(Exception):
            if self.all[label].node_id not in {info.node_id.hex() for info in self._alive()}:
                reason = "has died meanwhile, or did not answer until the head took it for dead"
        self.silent.append(Check("nodes", label, PROBLEM, reason, "see `ray status` and the logs of its raylet; a node "
                                 "that hangs has to be replaced"))  # fmt: skip
        with suppress(Exception):
            ray.kill(self._actors.pop(label))

    def labels(self) -> list[str]:
        """The nodes that answer."""
        return list(self._actors)

    @property
    def head(self) -> str | None:
        """The head, if it answers."""
        return next((label for label in self._actors if self.all[label].is_head), None)

    def ask(self, calls: Mapping[Any, Call], limit_s: float) -> dict[Any, Any]:
        """Calls all at once; an answer for each key, or Failed."""
        references = {
            key: getattr(self._actors[label], method).remote(*arguments)
            for key, (label, method, arguments) in calls.items()
        }
        if references:
            ray.wait(list(references.values()), num_returns=len(references), timeout=limit_s)
        return {key: _answer(reference, limit_s) for key, reference in references.items()}

    def ask_all(self, method: str, *arguments: Any, limit_s: float) -> dict[str, Any]:
        """The same of every node; one that fails is given up."""
        answers = self.ask({label: (label, method, arguments) for label in self.labels()}, limit_s)
        for label, answer in answers.items():
            if isinstance(answer, Failed):
                self.give_up(label, f"cannot be examined ({method}): {answer.reason}")
        return {label: answer for label, answer in answers.items() if not isinstance(answer, Failed)}

    def close(self) -> None:
        """Ends all actors, and waits until the cluster has forgotten them; then leaves it."""
        for actor in self._actors.values():
            with suppress(Exception):
                ray.kill(actor)
        self._actors.clear()
        with suppress(Exception):
            ray.shutdown()


def _answer(reference: Any, limit_s: float) -> Any:
    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        with suppress(Exception):
            ray.cancel(reference)
        return Failed(f"no answer within {limit_s:.0f} s")
    except ray.exceptions.RayTaskError as error:
        return Failed(_first_line(error.cause))
    except ray.exceptions.RayError as error:
        return Failed(_first_line(error))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


_SENT = (
    "orchestrator.runtime.ray.examination.node",
    "orchestrator.doctor.facts",
    "orchestrator.doctor.exchange",
    "orchestrator.doctor.storage_probe",
    "orchestrator.storage",
    "orchestrator.urls",
    "strategies.comm.interfaces",
    "monitoring.errors",
    "monitoring.redaction",
)
"""Modules that go to the nodes by value: all of ours that what is run there imports."""
