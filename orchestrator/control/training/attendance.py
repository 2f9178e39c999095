"""Who comes and who goes: workers that are warm, that die, whose place goes away, whose GPU fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monitoring.events import GpuFaulty
from orchestrator.control.core import detection
from orchestrator.control.core.detection import Failure
from orchestrator.control.core.protocol import Died, DrainNotice, ReleaseWorker
from orchestrator.control.core.roster import death_of, notice_of
from orchestrator.control.core.workers import WorkerState
from orchestrator.control.training import failures
from orchestrator.control.training.lifecycle import Lifecycle
from orchestrator.control.training.run import Run
from orchestrator.control.training.views import WorkerView
from orchestrator.training.messages import GpuTrouble, Ready

_ON_ITS_WAY = (WorkerState.REQUESTED, WorkerState.STARTING)


class Attendance:
    """Takes what is said of processes, by themselves or by who watches over them."""

    def __init__(self, run: Run, life: Lifecycle) -> None:
        self._run = run
        self._life = life

    def ready(self, event: Ready, now: float) -> None:
        view = self._run.roster.living(event.worker)
        if view is None:
            self._run.out.append(ReleaseWorker(event.worker, "this run no longer expects it"))
        elif view.state in _ON_ITS_WAY:
            if (refusal := self._run.alike.refusal(event)) is not None:
                self._run.out += self._run.roster.kill(view, refusal)
                self._run.out += self._run.roster.suspect(event.node, refusal)
                self._life.start_failed(refusal, now)
                return
            self._run.out += self._run.roster.ready(
                view, event.node, event.pid, now, lateness_s=event.lateness_s, facts=facts_of(event)
            )
            view.ready, view.initial = event, event.initial
            view.held = view.whole = event.whole_state(self._run.config.tensor)
            self._life.warm(event, now)

    def died(self, event: Died, now: float) -> None:
        view = self._run.roster.living(event.worker)
        if view is None:
            return
        self._run.out.append(death_of(view, event))
        if event.node_lost and view.node:
            found = detection.node_lost(
                view, self._run.roster.alive(), self._run.membership.members, self._life.is_missed
            )
        else:
            found = [detection.died(view, event)]
        never_ready = view.state in _ON_ITS_WAY and found[0].kind == "kill"
        self._lost(found, (event.detail or "it ended") if never_ready else "", now)

    def _lost(self, found: Sequence[Failure[WorkerView]], start_failed: str, now: float) -> None:
        """Workers are gone, or are to be ended; `start_failed` is why one was never ready ("": all were)."""
        for failure in found:
            self._life.handle_failure(failure, now)
        if start_failed:
            self._life.start_failed(start_failed, now)
        self._life.review_saves(now)
        self._life.staffing.fill(now)
        self._life.conclude(now)

    def notice(self, event: DrainNotice, now: float) -> None:
        for view in self._run.roster.notice(event):
            self._run.out.append(notice_of(view, event))
            if view.worker in self._run.membership.inside:
                cause = f"worker {view.worker.slot} must leave: {event.reason}"
                self._run.out += self._run.record.incident("drain", cause, now, view)
                self._run.scale_up.lost(view, now)
                # Who is told of one node may soon be told of all.
                self._run.save_soon()
            elif view.state in _ON_ITS_WAY:
                self._run.out += self._run.roster.release(view, "its node drains")
            # An idle one may hold state that is needed; `fill` knows.
        self._life.staffing.fill(now)
        self._life.adjust(now)

    def gpu_trouble(self, event: GpuTrouble, now: float) -> None:
        """It is told again with every heartbeat."""
        view = self._run.roster.living(event.worker)
        if view is None:
            return
        roster, told = (
            self._run.roster,
            GpuFaulty(*event.worker, node=view.node, action=event.action, detail=event.detail),
        )
        if event.action == "none":
            self._run.out.append(told)
            return
        if view.gpu_trouble == event:
            return
        view.gpu_trouble = event
        if event.action == "retire":
            self._run.out += [*roster.retire(view, event.detail), *roster.suspect(view.node, event.detail)]
            self._life.staffing.fill(now)
            self._life.adjust(now)
            return
        self._run.out += [told, *roster.suspect(view.node, event.detail), *roster.retire_unit(view)]
        failure = failures.gpu_faulty(view, event.detail)
        self._lost([failure], failure.cause if view.state in _ON_ITS_WAY else "", now)


def facts_of(event: Ready) -> dict[str, Any]:
    """What a worker says of its model and device, for the record."""
    facts: dict[str, Any] = {}
    if event.flops_per_token and event.peak_flops:
        facts |= {"flops_per_token": event.flops_per_token, "peak_flops": event.peak_flops}
    if event.probe:
        facts |= {"device": event.device, "probe": event.probe}
    return facts
