"""What a worker needs of a node, which nodes have it, and why none has."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.job import Job
from orchestrator.runtime.ray import compat

MARKET_LABEL = "ray.io/market-type"
KIND_LABEL = "ray.io/accelerator-type"


@dataclass(frozen=True)
class Need:
    """A place: `tensor` workers on one node, each with the resources of `bundle`; `labels` are conditions in Ray's
    notation (`value`, `!value`, `in(a,b)`, `!in(a,b)`) that the labels of the node must meet."""

    bundle: Mapping[str, float]
    tensor: int
    labels: Mapping[str, str]

    @classmethod
    def of(cls, job: Job, market: str = "") -> Need:
        resources = job.resources
        bundle = {"CPU": float(resources.cpu)} | ({"GPU": float(resources.gpu)} if resources.gpu else {})
        labels = dict(resources.labels)
        if kinds := resources.kinds:
            labels[KIND_LABEL] = f"in({','.join(kinds)})"
        if market:
            labels[MARKET_LABEL] = market
        return cls(bundle, job.strategy.tensor, labels)

    def __str__(self) -> str:
        amounts = ", ".join(f"{amount * self.tensor:g} {kind}" for kind, amount in self.bundle.items())
        labels = "".join(f", {key}: {condition}" for key, condition in self.labels.items())
        return f"{{{amounts}{labels}}}"

    def fits(self, has: Mapping[str, float], labels: Mapping[str, str]) -> bool:
        """Whether a node with these resources and labels could take it."""
        enough = all(has.get(kind, 0.0) >= amount * self.tensor for kind, amount in self.bundle.items())
        return enough and all(meets(labels.get(key), condition) for key, condition in self.labels.items())


def meets(label: str | None, condition: str) -> bool:
    """Whether a node's label (None: it has none) meets a condition in Ray's notation."""
    negated, text = condition.startswith("!"), condition.removeprefix("!")
    group = re.fullmatch(r"in\((.*)\)", text)
    values = [value.strip() for value in group[1].split(",")] if group else [text]
    return (label in values) != negated


def has_room(need: Need, avoid: Collection[str] = ()) -> bool:
    """Whether a node that may be used, and is not to be avoided, has so much free as it is just now."""
    free: Mapping[str, Mapping[str, float]] = compat.state.available_resources_per_node()
    nodes = [node for node in _usable_nodes() if node["NodeID"] not in avoid]
    return any(need.fits(free.get(node["NodeID"], {}), node.get("Labels", {})) for node in nodes)


def why_no_room(need: Need) -> str:
    """Why a place for it has not been found, as far as nodes and the autoscaler tell."""
    try:
        return _why_no_room(need)
    except Exception as error:
        return f"the cluster cannot be asked why: {type(error).__name__}: {error}"


def _why_no_room(need: Need) -> str:
    nodes = _usable_nodes()
    fitting = [node for node in nodes if need.fits(node["Resources"], node.get("Labels", {}))]
    if fitting:
        reason = f"{need} would fit on {len(fitting)} of {len(nodes)} nodes, which have not that much free"
    else:
        reason = f"none of {len(nodes)} nodes could hold {need}"
    with suppress(Exception):  # What the autoscaler says is a help; that it cannot be asked is no news.
        reason += _says_the_autoscaler()
    return reason


def nodes_starting() -> int:
    """How many nodes the autoscaler has got from its cloud and is setting up. 0 when there is none to ask."""
    with suppress(Exception):
        client, state = _autoscaler()
        if _is_second(state):
            return len(state.pending_instances)
        report = _report_of_the_first(client)
        return len(report.get("pending_nodes") or ()) if report is not None else 0
    return 0


def nodes_by_id(ids: Collection[str]) -> list[dict[str, Any]]:
    """Those of these nodes that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] in ids]


def _usable_nodes() -> list[dict[str, Any]]:
    draining = compat.state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def _autoscaler() -> tuple[Any, Any]:
    """A client of the GCS, and what autoscaler v2 has told it last."""
    client = compat.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = compat.GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=5))
    return client, reply.autoscaling_state


def _is_second(state: Any) -> bool:
    return bool(state.autoscaler_state_version or state.last_seen_cluster_resource_state_version)


def _says_the_autoscaler() -> str:
    client, state = _autoscaler()
    return _of_the_second(state) if _is_second(state) else _of_the_first(client)


def _of_the_second(state: Any) -> str:
    """What autoscaler v2 reports: launches that failed, launches under way, demands that no node type meets."""
    said = []
    failed = Counter(
        f"launching {request.ray_node_type_name} failed: {request.reason}"
        for request in state.failed_instance_requests
    )  # fmt: skip
    said += [f"{text} ({times} x)" if times > 1 else text for text, times in failed.items()]
    said += [f"{request.count} x {request.ray_node_type_name} are being launched"
             for request in state.pending_instance_requests]  # fmt: skip
    if state.pending_instances:
        said.append(f"{len(state.pending_instances)} nodes are starting")
    if state.infeasible_gang_resource_requests:
        said.append("no node type of its configuration meets the request")
    return f"; the autoscaler: {_joined(said)}"


def _of_the_first(client: Any) -> str:
    """What autoscaler v1 reports. It does not see labels, so that a request by labels may never be met."""
    report = _report_of_the_first(client)
    if report is None:
        return "; the cluster has no autoscaler"
    said = [f"{len(report['pending_nodes'])} nodes are starting"] if report.get("pending_nodes") else []
    said += [f"{count} x {kind} are being launched" for kind, count in (report.get("pending_launches") or {}).items()]
    summary = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    for kind, known in summary.items():
        if not known.get("is_available", True):
            about = known.get("unavailable_node_information") or {}
            said.append(f"{kind} is unavailable: {about.get('category')}, {about.get('description')}")
    return f"; the autoscaler (version 1, which does not see labels): {_joined(said)}"


def _report_of_the_first(client: Any) -> dict[str, Any] | None:
    raw = client.internal_kv_get(b"__autoscaling_status", None)
    return None if raw is None else json.loads(raw).get("autoscaler_report") or {}


def _joined(said: Sequence[str]) -> str:
    return "; ".join(said) if said else "it has said nothing of it; its limits (max_workers) may be reached"
