"""Finding trouble: what goes wrong, whose it is, and since when.

Pure functions of what is known of the workers, the configuration and the time. What is found is acted on by
`orchestrator.control.lifecycle`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from orchestrator.control.finalizing import Finalization
from orchestrator.control.membership import Membership
from orchestrator.control.protocol import Died
from orchestrator.control.views import ControllerConfig, Progress, WorkerState, WorkerView, is_collective
from orchestrator.training.messages import Finalized, Left, WorkerId
from strategies.layout.parallel import ParallelLayout


@dataclass(frozen=True)
class Failure:
    """Something that went wrong: the `kind` and `cause` of its incident, and `at` what time it began (None: now).

    `view` is the worker whose trouble it is, None when it is nobody's in particular. That worker is lost with it: it is
    gone already, or to be ended, for the reason in `kill`; unless it is `spared`. `weight` says how likely the step is
    to blame, and `failure` what is said of it if the run ends for that ("": the cause). `quiet` is what is part of
    another trouble that is told already. While it is `pending` it is not known whose it is: all members are told to
    leave, and who is stuck does not.
    """

    kind: str
    cause: str
    view: WorkerView | None = None
    at: float | None = None
    weight: float = 1 / 4
    failure: str = ""
    kill: str | None = None
    spared: bool = False
    quiet: bool = False
    pending: bool = False


# ---------------------------------------------------------------------------------------- what is reported


def died(view: WorkerView, event: Died) -> Failure:
    """A process is gone. Who had to leave anyway is no argument against the step it was in."""
    kind, weight = ("drain", 0.0) if view.draining else ("kill", 1 / 4)
    return Failure(kind, f"worker {view.worker.slot} died: {event.detail}", view, weight=weight)


def node_lost(
    first: WorkerView,
    alive: Iterable[WorkerView],
    members: Collection[WorkerId],
    is_missed: Callable[[WorkerView], bool],
) -> list[Failure]:
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


def raised(view: WorkerView, event: Left, *, spared: bool) -> Failure:
    """A step raised an exception."""
    return Failure(
        "crash", f"worker {event.worker.slot} raised: {event.detail}", view, event.at or None, weight=1.0,
        kill=f"its step raised: {event.detail}", spared=spared,
    )  # fmt: skip


def could_not_finish(view: WorkerView, event: Finalized) -> Failure:
    """It failed to give its final state."""
    return Failure(
        "crash", f"worker {event.worker.slot} could not finish: {event.error}", view,
        kill=f"it could not finish: {event.error}",
    )  # fmt: skip


def lost_each_other(lefts: Iterable[Left], now: float) -> Failure | None:
    """Members lost their peers, yet all are alive and nothing else happened: the network failed them."""
    lost = [left for left in lefts if left.cause == "peer"]
    if not lost:
        return None
    at = min((left.at for left in lost if left.at), default=now)
    what = f"all workers live, but worker {lost[0].worker.slot} lost a peer: {lost[0].detail}"
    return Failure("network", what, at=at, weight=1 / 2)


# ---------------------------------------------------------------------------------------- what is not

HOPS = 4.0
"""What is heard of a worker goes through so many threads and processes, each of which may be as late as the next."""
USUAL_LATENESS_S = 0.1
"""Nobody is called late for less: deadlines have room for that."""
MOST_STRETCH = 4.0
"""By how much of itself a deadline is stretched at most."""


def stretched_s(configured_s: float, lateness_s: float) -> float:
    """A deadline on a machine where things have come `lateness_s` late: never less than what is configured."""
    return configured_s + min(HOPS * max(0.0, lateness_s - USUAL_LATENESS_S), MOST_STRETCH * configured_s)


def _said_of(configured_s: float, limit_s: float) -> str:
    return "" if limit_s == configured_s else f", stretched from {configured_s:.1f} s as the machine is busy"


def find_hung(
    alive: Iterable[WorkerView], config: ControllerConfig, now: float, lateness_s: float = 0.0
) -> list[Failure]:
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
    gone: dict[str, list[WorkerView]] = {view.node: [] for view in silent if view.node}
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


def find_stalled(
    membership: Membership, config: ControllerConfig, progress: Progress, now: float, lateness_s: float = 0.0
) -> list[Failure]:
    """Everyone is heard and nothing moves: the member that is furthest behind holds the others up.

    When none can be named, all are told to leave, and whoever is stuck does not.
    """
    if not membership.inside:
        return []
    # While members join, state is moved and checkpoints are read; the pace of steps says nothing about that.
    limit = config.progress_timeout_s
    if not membership.unjoined:
        limit = progress_limit_s(limit, progress.step_seconds)
    late = max([lateness_s, *(view.lateness_s for view in membership.present())])
    limit = stretched_s(limit, late)
    if membership.interrupted_at is not None:
        patience = stretched_s(config.interrupt_timeout_s, late)
        return _find_stuck(membership, membership.interrupted_at, limit, patience, now)
    since = membership.moved_at
    if now - since <= limit:
        return []
    assert membership.generation is not None
    culprits = furthest_behind(membership.present(), membership.generation.layout)
    if not culprits:
        return [nobodys_stall(since, now, pending=True)]
    return [
        Failure(
            "stall", f"worker {view.worker.slot} made no progress for {limit:.0f} s in {view.phase}", view, since,
            weight=1 / 2, kill=f"no progress for {limit:.0f} s in {view.phase} (elastic.progress_timeout_s)",
        )
        for view in culprits
    ]  # fmt: skip


def nobodys_stall(since: float, now: float, *, pending: bool = False) -> Failure:
    """Nothing moved, and all left when they were told to."""
    what = f"progress for {now - since:.0f} s"
    return Failure("stall", f"no member made {what}", at=since, weight=1 / 2, failure=f"no {what}", pending=pending)


def _find_stuck(
    membership: Membership, interrupted_at: float, limit: float, interrupt_timeout_s: float, now: float
) -> list[Failure]:
    """Whoever is told to break out of a collective does so at once; a computation has to come to its end.

    A phase that is both is given the time of a computation, counted from when the member last moved.
    """
    assert membership.generation is not None
    layout = membership.generation.layout
    since = interrupted_at if membership.stalled_since is None else membership.stalled_since
    found = []
    for view in membership.present():
        patience = interrupt_timeout_s
        if not is_collective(view.phase, layout):
            patience = limit
        elif view.phase == "compute":
            patience = max(patience, view.moved_at + limit - interrupted_at)
        if now - interrupted_at > patience:
            found.append(
                Failure(
                    "stall", f"worker {view.worker.slot} did not leave its step ({view.phase})", view, since,
                    kill=f"stuck in {view.phase} for {patience:.1f} s after it was told to leave",
                )
            )  # fmt: skip
    return found


def find_slow_starters(alive: Iterable[WorkerView], config: ControllerConfig, now: float) -> list[WorkerView]:
    """Those that were placed long ago and are not ready. Nobody misses them."""
    limit = config.start_timeout_s
    return [
        view
        for view in alive
        if view.state is WorkerState.STARTING and view.placed_at is not None and now - view.placed_at > limit
    ]


def find_slow_finishers(finalization: Finalization, config: ControllerConfig, now: float) -> list[Failure]:
    limit = config.finalize_timeout_s
    if now - finalization.since <= limit:
        return []
    return [
        Failure(
            "stall", f"worker {view.worker.slot} did not give its final state", view, finalization.since,
            kill=f"it did not give its final state within {limit:.0f} s",
        )
        for view in finalization.unanswered()
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- how it is judged


def progress_limit_s(configured_s: float, step_seconds: Sequence[float]) -> float:
    """How long nothing may move before somebody is taken to be stuck, in seconds.

    Twenty median steps once the run knows its pace, at least 5 s and at most what the job file says.
    """
    if len(step_seconds) < 5:
        return configured_s
    recent = sorted(step_seconds[-100:])
    return min(configured_s, max(5.0, 20 * recent[len(recent) // 2]))


def furthest_behind(members: Sequence[WorkerView], layout: ParallelLayout) -> list[WorkerView]:
    """The members that hold the others up: behind at least one other (or alone), in a phase of their own making.

    Empty when all are equally far or those behind are themselves inside a collective (a partition, not a culprit).
    """
    if not members:
        return []
    positions = [view.position for view in members]
    last = min(positions)
    if len(members) > 1 and last == max(positions):
        return []
    return [view for view in members if view.position == last and not is_collective(view.phase, layout)]
