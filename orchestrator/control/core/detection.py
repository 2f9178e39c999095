"""Finding trouble with processes: what goes wrong, whose it is, and since when.

Pure functions of what is known of the workers, the configuration and the time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from orchestrator.control.core.config import PoolConfig
from orchestrator.control.core.protocol import Died
from orchestrator.control.core.workers import ProcessView, WorkerId, WorkerState

V = TypeVar("V", bound=ProcessView)


@dataclass(frozen=True)
class Failure(Generic[V]):
    """Something that went wrong: the `kind` and `cause` of its incident, and `at` what time it began (None: now).

    `view` is the worker whose trouble it is, None when it is nobody's in particular. That worker is lost with it: it is
    gone already, or to be ended, for the reason in `kill`; unless it is `spared`. `weight` says how likely the step is
    to blame, and `failure` what is said of it if the run ends for that ("": the cause). `quiet` is what is part of
    another trouble that is told already. While it is `pending` it is not known whose it is: all members are told to
    leave, and who is stuck does not.
    """

    kind: str
    cause: str
    view: V | None = None
    at: float | None = None
    weight: float = 1 / 4
    failure: str = ""
    kill: str | None = None
    spared: bool = False
    quiet: bool = False
    pending: bool = False


def died(view: V, event: Died) -> Failure[V]:
    """A process is gone. Who had to leave anyway is no argument against the step it was in."""
    kind, weight = ("drain", 0.0) if view.draining else ("kill", 1 / 4)
    return Failure(kind, f"worker {view.worker.slot} died: {event.detail}", view, weight=weight)


def node_lost(
    first: V,
    alive: Iterable[V],
    members: Collection[WorkerId],
    is_missed: Callable[[V], bool],
) -> list[Failure[V]]:
    """Everything on the node of `first`, whose process is gone, went at once: one incident, however many workers it
    took. It names those that are missed, if there are any."""
    victims = [first, *(view for view in alive if view.node == first.node and view is not first)]
    missed = [view for view in victims if is_missed(view)]
    slots = ", ".join(str(view.worker.slot) for view in sorted(missed or victims, key=lambda v: v.worker))
    # The worker whose fault it was, if one was injected, knows the true time.
    victims.sort(key=lambda v: (v.worker not in members, v.fault_at is None, v.worker))
    return [
        Failure(
            "node", f"the node of worker {slots} was lost", victim,
            kill=None if victim is first else "its node was lost", quiet=number > 0,
        )
        for number, victim in enumerate(victims)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- what is not reported

HOPS = 4.0
"""What is heard of a worker goes through this many threads and processes, each of which may be as late as the next."""
USUAL_LATENESS_S = 0.1
"""Nobody is called late for less: deadlines have room for that."""
MOST_STRETCH = 4.0
"""By how much of itself a deadline is stretched at most."""


def stretched_s(configured_s: float, lateness_s: float) -> float:
    """A deadline on a machine where things have come `lateness_s` late: never less than what is configured."""
    return configured_s + min(HOPS * max(0.0, lateness_s - USUAL_LATENESS_S), MOST_STRETCH * configured_s)


def _said_of(configured_s: float, limit_s: float) -> str:
    return "" if limit_s == configured_s else f", stretched from {configured_s:.1f} s as the machine is busy"


def find_hung(alive: Iterable[V], config: PoolConfig, now: float, lateness_s: float = 0.0) -> list[Failure[V]]:
    """A worker that is silent for too long is ended for good and fenced off. How long that is depends on how late the
    controller has been lately (`lateness_s`), and the workers of its node.

    When all of a node's workers fall silent together it is the node that is gone, without a word (its power, its
    network): one incident, as for a node that is known to be lost.
    """
    configured = config.heartbeat_timeout_s
    warm = [view for view in alive if view.state in (WorkerState.IDLE, WorkerState.MEMBER)]
    if all(now - view.last_heard <= configured for view in warm):
        return []
    late = {view.node: lateness_s for view in warm}
    for view in warm:
        late[view.node] = max(late[view.node], view.lateness_s)
    limits = {node: stretched_s(configured, lateness) for node, lateness in late.items()}
    silent = [view for view in warm if now - view.last_heard > limits[view.node]]
    if not silent:
        return []
    gone: dict[str, list[V]] = {view.node: [] for view in silent if view.node}
    for node in {view.node for view in warm if now - view.last_heard <= limits[view.node]}:
        gone.pop(node, None)
    for view in silent:
        if view.node in gone:
            gone[view.node].append(view)
    told: set[str] = set()
    found = []
    for view in sorted(silent, key=lambda v: (v.state is not WorkerState.MEMBER, v.worker)):
        fellows, limit = gone.get(view.node or "", []), limits[view.node]
        kill = f"silent for more than {limit:.1f} s (elastic.heartbeat_timeout_s{_said_of(configured, limit)})"
        if len(fellows) < 2:
            what = f"worker {view.worker.slot} has been silent for {limit:.1f} s"
            found.append(Failure("hang", what, view, view.last_heard, kill=kill))
            continue
        slots = ", ".join(str(fellow.worker.slot) for fellow in sorted(fellows, key=lambda v: v.worker))
        what = f"the node of worker {slots} has been silent for {limit:.1f} s"
        found.append(Failure("node", what, view, view.last_heard, kill=kill, quiet=view.node in told))
        told.add(view.node)
    return found


def find_slow_starters(alive: Iterable[V], config: PoolConfig, now: float) -> list[V]:
    """Those that were placed long ago and are not ready. Nobody misses them."""
    limit = config.start_timeout_s
    return [
        view
        for view in alive
        if view.state is WorkerState.STARTING and view.placed_at is not None and now - view.placed_at > limit
    ]
