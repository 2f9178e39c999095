"""Verdicts on what is between nodes: clocks, connections, bandwidth; and who is measured with whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from orchestrator.doctor.check import CLUSTER, HERE, NOTE, OK, PROBLEM, WARNING, Check, size, speed

Pair = tuple[str, str]

CLOCK_OFFSET_S = 1.0
"""Deadlines of drains, ages of checkpoints and the times of events of different nodes are compared as they are."""
SLOW_SHARE = 0.5
"""A node that moves less than this share of what the middle one moves holds up every step."""
ALL_PAIRS_NODES = 8
"""Up to this many nodes, everyone connects to everyone; beyond, along a ring in both directions."""


# ---------------------------------------------------------------------------------------- clocks


@dataclass(frozen=True)
class ClockReading:
    """When a question was sent, what the other clock said, when the answer was back; seconds."""

    sent_s: float
    there_s: float
    back_s: float


def clock_offset_s(readings: Sequence[ClockReading]) -> tuple[float, float]:
    """How far another clock is ahead, and by how much that may be wrong: half of the shortest round trip (Cristian's
    algorithm)."""
    best = min(readings, key=lambda reading: reading.back_s - reading.sent_s)
    return best.there_s - (best.sent_s + best.back_s) / 2, (best.back_s - best.sent_s) / 2


def judge_clock(node: str, readings: Sequence[ClockReading]) -> Check:
    offset_s, error_s = clock_offset_s(readings)
    found = f"{abs(offset_s):.3f} s {'ahead of' if offset_s > 0 else 'behind'} {HERE} (± {error_s:.3f} s)"
    if abs(offset_s) - error_s > CLOCK_OFFSET_S:
        return Check("clock", node, WARNING, found, "let chrony or systemd-timesyncd set the clocks of all nodes")
    if abs(offset_s) <= error_s:
        found = f"as {HERE}'s (± {error_s:.3f} s)"
    return Check("clock", node, OK, found)


# ---------------------------------------------------------------------------------------- connections


def connections(nodes: Sequence[str]) -> list[Pair]:
    """Who tries to connect to whom."""
    if len(nodes) <= ALL_PAIRS_NODES:
        return [(one, other) for one in nodes for other in nodes if one != other]
    ring = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    return ring + [(other, one) for one, other in ring]


def judge_connections(seconds: Mapping[Pair, float | str]) -> list[Check]:
    """By how long each connection took, or why there was none."""
    failed = {pair: reason for pair, reason in seconds.items() if isinstance(reason, str)}
    took = [value for value in seconds.values() if not isinstance(value, str)]
    checks = [
        Check("ports", one, PROBLEM, f"cannot connect to {other}: {reason}",
              "let the nodes reach each other on all ports (security group, firewall, NetworkPolicy): workers listen "
              "on ports that the system chooses")
        for (one, other), reason in failed.items()
    ]  # fmt: skip
    if took:
        nodes = {node for pair in seconds for node in pair}
        found = (
            f"{len(took)} of {len(seconds)} connections between {len(nodes)} nodes, {max(took) * 1e3:.1f} ms at most"
        )
        checks.append(Check("ports", CLUSTER, OK if not failed else NOTE, found))
    return checks


# ---------------------------------------------------------------------------------------- interfaces


def judge_interface(node: str, facts: Mapping[str, Any]) -> Check:
    """By which interface workers on a node reach others: the one with the address that Ray knows the node by, if there
    is nothing else in the environment."""
    name, host, chosen = facts["name"], facts["host"], facts["chosen"]
    if chosen:
        return Check("interface", node, NOTE, f"NCCL_SOCKET_IFNAME is {chosen} there, and NCCL keeps to that")
    if name is None:
        found = f"none has the address {host}, by which Ray knows the node: NCCL will take the first that it finds"
        advice = "name one, as resources.env: {NCCL_SOCKET_IFNAME: eth0}, or start Ray with --node-ip-address"
        return Check("interface", node, WARNING, found, advice)
    rate = facts["bits_per_second"]
    return Check("interface", node, OK, f"{name} has its address" + (f", {rate / 1e9:g} Gbit/s" if rate else ""))


# ---------------------------------------------------------------------------------------- bandwidth


def rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Disjoint pairs, round by round, so that every node is measured with two partners: a slow one is then told from
    its partner. Two rounds; three when the number of nodes is odd; one when there are only two nodes."""
    count = len(nodes)
    if count < 2:
        return []
    even = [(nodes[i], nodes[i + 1]) for i in range(0, count - 1, 2)]
    odd = [(nodes[i], nodes[i + 1]) for i in range(1, count - 1, 2)]
    closing = (nodes[-1], nodes[0])
    if count == 2:
        return [even]
    return [even, [*odd, closing]] if count % 2 == 0 else [even, odd, [closing]]


@dataclass
class Speeds:
    """What was measured: bytes per second of each repetition of a pair, or why there are none."""

    num_bytes: int
    backend: str
    pairs: dict[Pair, list[float] | str] = field(default_factory=dict)

    def of_pair(self, pair: Pair) -> float | None:
        found = self.pairs[pair]
        return None if isinstance(found, str) else median(found)

    def partners(self, node: str) -> Iterator[tuple[str, float | None]]:
        for pair in self.pairs:
            if node in pair:
                yield pair[1] if pair[0] == node else pair[0], self.of_pair(pair)

    def of_node(self, node: str) -> float | None:
        """The best that it did with any partner: with a slow partner even a fast node is slow."""
        return max((value for _, value in self.partners(node) if value is not None), default=None)


def judge_bandwidth(speeds: Speeds) -> list[Check]:
    """A check for each node, with what it did with each partner. Of two nodes, or of one that is fast only between two
    slow ones, this cannot tell who is to blame."""
    nodes = list(dict.fromkeys(node for pair in speeds.pairs for node in pair))
    best = {node: value for node in nodes if (value := speeds.of_node(node)) is not None}
    middle = median(best.values()) if best else 0.0
    checks = []
    for node in nodes:
        found = ", ".join(
            f"{'nothing' if value is None else speed(value)} with {partner}" for partner, value in speeds.partners(node)
        )
        found = f"{speeds.backend}, {size(speeds.num_bytes)} each way: {found}"
        if node not in best:
            why = next(reason for pair, reason in speeds.pairs.items() if node in pair and isinstance(reason, str))
            checks.append(Check("bandwidth", node, PROBLEM, f"{found} ({why})",
                                "see the checks of ports; take the node out if it is the only one"))  # fmt: skip
        elif best[node] < middle * SLOW_SHARE:
            checks.append(Check("bandwidth", node, WARNING, f"slow node: {found}; the median of all is {speed(middle)}",
                                "drain this node and replace it; see its network card, its placement and who else uses "
                                "it"))  # fmt: skip
        else:
            checks.append(Check("bandwidth", node, OK, found))
    return checks + _lone_failures(speeds, best)


def _lone_failures(speeds: Speeds, best: Mapping[str, float]) -> list[Check]:
    """Pairs that moved nothing although both did with others."""
    return [
        Check("bandwidth", one, PROBLEM, f"moves nothing to and from {other}: {reason}",
              "see whether a firewall or a route is between these two")
        for (one, other), reason in speeds.pairs.items()
        if isinstance(reason, str) and one in best and other in best
    ]  # fmt: skip
