"""Finding trouble with training: steps that raise, members that hold the others up, a state that is not given.

As `orchestrator.control.core.detection` does for processes. What is found is acted on by
`orchestrator.control.training.lifecycle`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.control.core.detection import Failure, stretched_s
from orchestrator.control.training.finalizing import Finalization
from orchestrator.control.training.membership import Membership
from orchestrator.control.training.views import ControllerConfig, Progress, WorkerView, is_collective
from orchestrator.training.messages import Finalized, Left
from strategies.layout.parallel import ParallelLayout

# ---------------------------------------------------------------------------------------- what is reported


def raised(view: WorkerView, event: Left, *, spared: bool) -> Failure[WorkerView]:
    """A step raised an exception."""
    return Failure(
        "crash", f"worker {event.worker.slot} raised: {event.detail}", view, event.at or None, weight=1.0,
        kill=f"its step raised: {event.detail}", spared=spared,
    )  # fmt: skip


def device_failed(view: WorkerView, event: Left) -> Failure[WorkerView]:
    """What was on its device is gone, and nothing can be computed there."""
    return Failure(
        "device", f"the device of worker {event.worker.slot} failed: {event.detail}", view, event.at or None,
        kill=f"its device failed: {event.detail}",
    )  # fmt: skip


def gpu_faulty(view: WorkerView, detail: str) -> Failure[WorkerView]:
    """Its driver says so, whatever the worker itself has noticed: nothing that it holds is to be trusted."""
    what = f"the GPU of worker {view.worker.slot}: {detail}"
    return Failure("device", what, view, weight=0.0, kill=f"its GPU: {detail}")


def out_of_memory(view: WorkerView, event: Left, config: ControllerConfig) -> Failure[WorkerView]:
    """Memory that others had, or that was in pieces, may be there the next time. If it is not, the job does not fit."""
    cause = f"worker {event.worker.slot} ran out of memory: {event.detail}"
    advice = "take a smaller train.micro_batch or data.sequence_length, or spread the model (strategy.shard, .pipeline)"
    return Failure(
        "memory", cause, view, event.at or None, weight=config.max_failures_per_step / 2,
        failure=f"{cause}; if nothing else uses that device, the job does not fit there: {advice}", spared=True,
    )  # fmt: skip


def could_not_finish(view: WorkerView, event: Finalized) -> Failure[WorkerView]:
    """It failed to give its final state."""
    return Failure(
        "crash", f"worker {event.worker.slot} could not finish: {event.error}", view,
        kill=f"it could not finish: {event.error}",
    )  # fmt: skip


def lost_each_other(lefts: Iterable[Left], now: float) -> Failure[WorkerView] | None:
    """Members lost their peers, yet all are alive and nothing else happened: the network failed them."""
    lost = [left for left in lefts if left.cause == "peer"]
    if not lost:
        return None
    at = min((left.at for left in lost if left.at), default=now)
    what = f"all workers live, but worker {lost[0].worker.slot} lost a peer: {lost[0].detail}"
    return Failure("network", what, at=at, weight=1 / 2)


# ---------------------------------------------------------------------------------------- what is not


def find_stalled(
    membership: Membership, config: ControllerConfig, progress: Progress, now: float, lateness_s: float = 0.0
) -> list[Failure[WorkerView]]:
    """Everyone is heard and nothing moves: the member that is furthest behind holds the others up.

    When none can be named, all are told to leave, and those that are stuck do not.
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


def nobodys_stall(since: float, now: float, *, pending: bool = False) -> Failure[WorkerView]:
    """Nothing moved, and all left when they were told to."""
    what = f"progress for {now - since:.0f} s"
    return Failure("stall", f"no member made {what}", at=since, weight=1 / 2, failure=f"no {what}", pending=pending)


def _find_stuck(
    membership: Membership, interrupted_at: float, limit: float, interrupt_timeout_s: float, now: float
) -> list[Failure[WorkerView]]:
    """A worker that is told to break out of a collective does so at once; a computation has to come to its end.

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


def find_slow_finishers(finalization: Finalization, config: ControllerConfig, now: float) -> list[Failure[WorkerView]]:
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
