"""The controller's state machine: events in, actions out.

Everything is a function of the events and their times; see `orchestrator.control.training.protocol`. This module says
what each event means; what follows from it for the run is in `orchestrator.control.training.lifecycle`. A message costs
the same however many workers there are; what looks at all of them happens on a tick or when a membership changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from monitoring.skew import Window
from orchestrator.control.core import detection
from orchestrator.control.core.detection import Failure
from orchestrator.control.core.incidents import Incident
from orchestrator.control.core.machine import WantsRoom
from orchestrator.control.core.protocol import (
    Abort,
    Died,
    DrainNotice,
    FaultFired,
    Finish,
    GiveWay,
    NodesStarting,
    Placed,
    Record,
    ReleaseWorker,
    Resize,
    Start,
    Stop,
    Tick,
)
from orchestrator.control.core.roster import Roster, death_record, notice_record
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training import failures, state, takeover
from orchestrator.control.training.history import History
from orchestrator.control.training.lifecycle import Lifecycle
from orchestrator.control.training.membership import Membership
from orchestrator.control.training.protocol import Action, Event, SaveRequested, TakeOver
from orchestrator.control.training.run_record import RunRecord
from orchestrator.control.training.views import ControllerConfig, Progress, RunState, WorkerView
from orchestrator.training.messages import (
    CheckpointSaved,
    Finalized,
    Generation,
    Heartbeat,
    Joined,
    Left,
    PartSaved,
    Ready,
    SaveBegun,
    SaveDelayed,
    Status,
)
from orchestrator.training.orders import Interrupt
from strategies.layout.statemap import whole

_ON_ITS_WAY = (WorkerState.REQUESTED, WorkerState.STARTING)


class Controller:
    """Decides; `handle` takes one event and returns the actions to carry out, in order.

    `history` is what earlier controllers of the run put on record, `checkpoints` maps a number of committed steps to a
    checkpoint of them.
    """

    def __init__(
        self,
        config: ControllerConfig,
        history: History | None = None,
        checkpoints: Mapping[int, str] | None = None,
    ) -> None:
        history = History() if history is None else history
        self.config = config
        self._out: list[Action] = []
        self._roster = Roster(config, history.workers, WorkerView)
        self._record = RunRecord(config, history)
        self._run = Lifecycle(config, history, self._roster, self._record, checkpoints or {}, self._out)
        self._last_members = set(history.members)
        self._now: float | None = None

    # ------------------------------------------------------------------------------------ what others may look at

    @property
    def state(self) -> RunState:
        return self._run.state

    @property
    def is_over(self) -> bool:
        return self.state is RunState.OVER

    @property
    def status(self) -> str | None:
        """How the run ended: finished, stopped or failed; None while it has not."""
        return self._run.status

    def snapshot(self) -> dict[str, Any]:
        states = [view.state for view in list(self.workers.values())]
        return {
            "state": self.state.value,
            "status": self.status,
            "median_step_seconds": self.progress.median_step_s(),
            "workers": states.count(WorkerState.MEMBER),
            "standby": states.count(WorkerState.IDLE),
            "starting": states.count(WorkerState.STARTING) + states.count(WorkerState.REQUESTED),
            "target": self.target,
            "generation": None if self.generation is None else self.generation.number,
        }

    @property
    def target(self) -> int:
        """The number of workers wanted."""
        return self._run.target

    @property
    def workers(self) -> dict[WorkerId, WorkerView]:
        """All that were ever asked for."""
        return self._roster.workers

    @property
    def generation(self) -> Generation | None:
        """The current or last one."""
        return self._run.membership.generation

    @property
    def progress(self) -> Progress:
        return self._record.progress

    @property
    def checkpoints(self) -> dict[int, str]:
        return self._run.saving.checkpoints

    @property
    def is_saving_soon(self) -> bool:
        """Whether a checkpoint is due at the next step boundary."""
        return self._run.saving.is_due

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is under way."""
        return bool(self._run.saving.writing())

    @property
    def wants_room(self) -> WantsRoom:
        """Whether the run cannot train because there has been no room for long; "firmly", if what it has got holds
        state. As of the last tick."""
        return self._run.wants_room

    @property
    def gives_way_to(self) -> str:
        """Another run that is to have room before this one; "": none."""
        return self._run.gives_way_to

    @property
    def window(self) -> Window | None:
        """The last steps, as they were rated."""
        return self._run.balance.window

    @property
    def fired_faults(self) -> set[int]:
        return self._record.fired_faults

    @property
    def incidents(self) -> list[Incident]:
        """Those that the run has not recovered from yet, oldest first."""
        return self._record.incidents.open

    # ------------------------------------------------------------------------------------ events

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes one event that happened at `now` (in seconds, by a clock that never goes back)."""
        if self.is_over:
            return []
        self._out.clear()
        gap = 0.0 if self._now is None else now - self._now
        self._now = now
        if gap > self.config.heartbeat_timeout_s / 2:
            self._skip_gap(gap, now)
        match event:
            case Start():
                self._run.begin(now)
            case TakeOver():
                self._take_over(event, now)
            case Tick():
                self._tick(event.lateness_s, now)
            case Placed():
                self._out += self._roster.placed(event, now)
            case NodesStarting():
                self._roster.nodes_starting(now)
            case GiveWay():
                self._run.give_way(event.to, now)
            case Ready():
                self._ready(event, now)
            case Heartbeat():
                self._heartbeat(event, now)
            case Joined():
                self._joined(event, now)
            case Left():
                self._left(event, now)
            case Died():
                self._died(event, now)
            case DrainNotice():
                self._notice(event, now)
            case Resize():
                self._resize(event, now)
            case Stop():
                self._stop(event, now)
            case Abort():
                # Once a generation was formed, the job is known to be sound: it is that machine which is not.
                if self._record.last_generation < 0:
                    self._run.finish("failed", event.reason, now)
            case Finalized():
                self._finalized(event, now)
            case FaultFired():
                self._fault_fired(event)
            case SaveRequested():
                self._run.save_soon()
            case SaveDelayed():
                self._out.append(Record("checkpoint_delayed", {"committed": event.committed}))
            case SaveBegun() | PartSaved() | CheckpointSaved():
                self._saving(event, now)
                self._run.review_saves(now)
        ends = next((number for number, action in enumerate(self._out, 1) if isinstance(action, Finish)), None)
        return self._out[:ends]  # Nothing follows the end of a run.

    def _saving(self, event: SaveBegun | PartSaved | CheckpointSaved, now: float) -> None:
        if self._roster.living(event.worker) is None:
            return
        match event:
            case SaveBegun():
                self._run.saving.begun(event, now)
            case PartSaved():
                if self.generation is not None and event.plan.save.generation == self.generation.number:
                    self._run.take_reports(event.reports, now)
                self._run.saving.wrote(event, now)
            case CheckpointSaved():
                self._out += self._run.saving.saved(event, now)

    def _skip_gap(self, gap_s: float, now: float) -> None:
        """The controller itself slept (an overloaded or suspended machine): nobody could be heard meanwhile, and no
        patience has run out."""
        self._roster.skip_gap(gap_s, now)
        self._run.skip_gap(gap_s, now)

    def _tick(self, lateness_s: float, now: float) -> None:
        run, roster, config = self._run, self._roster, self.config
        self._handle_failures(detection.find_hung(roster.alive(), config, now, lateness_s), now)
        self._handle_failures(failures.find_stalled(run.membership, config, self.progress, now, lateness_s), now)
        for view in detection.find_slow_starters(roster.alive(), config, now):
            late = f"not ready {config.start_timeout_s:.0f} s after it was placed (elastic.start_timeout_s)"
            self._out += roster.kill(view, late)
            run.start_failed("start timed out", now)
        self._find_slow_finishers(now)
        run.review_saves(now)
        run.fill(now)
        if not run.gives_way_to:
            self._out += roster.tell_shortage(now)
        run.look_for_room()
        run.reconsider(now)
        run.wait_no_longer(now)

    def _find_slow_finishers(self, now: float) -> None:
        if self.state is not RunState.FINALIZING or self._run.finalization is None:
            return
        found = failures.find_slow_finishers(self._run.finalization, self.config, now)
        for failure in found:
            self._run.handle_failure(failure, now)
        if found:
            self._run.count_failure(f"no final state within {self.config.finalize_timeout_s:.0f} s", 1 / 2, now)
            self._run.conclude(now)

    def _handle_failures(self, found: Sequence[Failure[WorkerView]], now: float) -> None:
        for failure in found:
            self._run.handle_failure(failure, now)
        if found:
            self._run.conclude(now)

    # ------------------------------------------------------------------------------------ workers come and go

    def _ready(self, event: Ready, now: float) -> None:
        view = self._roster.living(event.worker)
        if view is None:
            self._out.append(ReleaseWorker(event.worker, "this run no longer expects it"))
        elif view.state in _ON_ITS_WAY:
            self._out += self._roster.ready(
                view, event.node, event.pid, now, lateness_s=event.lateness_s, facts=_speeds(event)
            )
            view.ready, view.initial = event, event.initial
            view.held = view.whole = whole(event.elements, self.config.tensor)
            self._run.warm(event, now)

    def _died(self, event: Died, now: float) -> None:
        view = self._roster.living(event.worker)
        if view is None:
            return
        self._out.append(death_record(view, event))
        if event.node_lost and view.node:
            found = detection.node_lost(view, self._roster.alive(), self._run.membership.members, self._run.is_missed)
        else:
            found = [detection.died(view, event)]
        never_ready = view.state in _ON_ITS_WAY and found[0].kind == "kill"
        for failure in found:
            self._run.handle_failure(failure, now)
        if never_ready:
            self._run.start_failed(event.detail, now)
        self._run.review_saves(now)
        self._run.fill(now)
        self._run.conclude(now)

    def _notice(self, event: DrainNotice, now: float) -> None:
        for view in self._roster.notice(event):
            self._out.append(notice_record(view, event))
            if view.worker in self._run.membership.inside:
                cause = f"worker {view.worker.slot} must leave: {event.reason}"
                self._out += self._record.incident("drain", cause, now, view)
                self._run.scale_up.lost(view, now)
                # Who is told of one node may soon be told of all.
                self._run.save_soon()
            elif view.state in _ON_ITS_WAY:
                self._out += self._roster.release(view, "its node drains")
            # An idle one may hold state that is needed; `fill` knows.
        self._run.fill(now)
        self._run.adjust(now)

    def _resize(self, event: Resize, now: float) -> None:
        wanted = self.config.within_limits(event.workers)
        if wanted == self.target:
            return
        self._out.append(Record("resize_requested", {"from": self.target, "to": wanted}))
        self._run.target = wanted
        self._run.scale_up.asked_to_resize()
        self._run.fill(now)
        self._run.reconsider(now)

    def _stop(self, event: Stop, now: float) -> None:
        if self._run.stop is None:
            self._out.append(Record("stop_requested", {"reason": event.reason}))
            self._run.end_early(event.reason, now)
            self._run.conclude(now)

    def _fault_fired(self, event: FaultFired) -> None:
        view = self.workers.get(event.worker) if event.worker is not None else None
        if view is not None:
            view.fault_at, view.fault_committed = event.at, None
        self._out += self._record.fault_fired(event)

    # ------------------------------------------------------------------------------------ members speak

    def _heartbeat(self, event: Heartbeat, now: float) -> None:
        view = self._roster.living(event.worker)
        if view is None:
            return
        view.last_heard, view.host_bytes, view.device_bytes = now, event.host_bytes, event.device_bytes
        view.lateness_s = event.lateness_s
        self._run.take_reports(event.reports, now)
        self._run.membership.heard(view, event, now)

    def _joined(self, event: Joined, now: float) -> None:
        membership = self._run.membership
        view = membership.find(event.worker, event.generation)
        if view is None or view.joined:
            return
        membership.joined(view, now)
        self._record.incidents.moved(event.generation, event.bytes_moved, event.buffer_bytes)
        if self.state is RunState.FORMING and not membership.unjoined:
            self._run.train(now)

    def _left(self, event: Left, now: float) -> None:
        view = self._run.membership.find(event.worker, event.generation)
        if view is not None and view.left is None:
            self._take_leave(view, event, now)
            self._run.conclude(now)

    def _take_leave(self, view: WorkerView, event: Left, now: float) -> None:
        run, generation = self._run, self.generation
        assert generation is not None
        if event.cause in ("restore", "storage", "unusable") and (generation.restore is None or view.joined):
            # Nothing was restored here: something else could not be read.
            event = replace(event, cause="exception")
        run.membership.left(view, event, now)
        run.take_reports(event.reports, now, is_over=True)
        match event.cause:
            case "exception":
                # It changed no state: who alone holds a part of it tries again, others are replaced.
                alone = state.holds_alone(view, run.membership.members.values())
                run.handle_failure(failures.raised(view, event, spared=alone), now)
            case "restore":
                self._out += run.saving.invalid(generation.restore, event.detail)
                run.settle(now, interrupt=True)
            case "storage":
                run.settle(now, interrupt=True)
                run.count_failure(event.detail, 1.0, now)
            case "unusable" | "job":
                run.finish("failed", event.detail, now)
            case "peer":
                run.settle(now, interrupt=True)
            case "pause" | "complete":
                run.settle(now, interrupt=False)

    def _finalized(self, event: Finalized, now: float) -> None:
        view, asked = self._roster.living(event.worker), self._run.finalization
        if view is None or asked is None or self.state is not RunState.FINALIZING:
            return
        view.last_heard = now
        if event.worker not in asked.asked:
            return
        if event.error:
            failure = failures.could_not_finish(view, event)
            self._run.handle_failure(failure, now)
            self._run.count_failure(failure.cause, 1.0, now)
        else:
            asked.answer(event.worker, event.digest)
        self._run.conclude(now)

    # ------------------------------------------------------------------------------------ a restarted controller

    def _take_over(self, event: TakeOver, now: float) -> None:
        """The workers' own accounts say which generation is the current one."""
        run, record = self._run, self._record
        run.waiting_since = now
        for status in event.workers:
            self._out += self._roster.adopt(takeover.view_of(status, self.config.tensor, now))
        for placed in event.starting:
            self._out += self._roster.adopt(takeover.starting(placed, now))
        statuses = {s.ready.worker: s for s in event.workers if s.ready.worker in self.workers}
        for status in statuses.values():
            run.take_reports(status.reports, now)
        intact = False
        if (current := takeover.newest_generation(statuses.values())) is not None:
            record.fired_faults |= set(current.fired_faults)
            if current.number >= record.last_generation:
                record.last_generation = current.number
                intact = self._retake(current, statuses, now)
            else:
                # It is over: there is a newer one on record, which nobody heard of.
                run.membership = Membership(current)
        members = run.membership.members
        for worker in sorted(self._last_members - statuses.keys() - members.keys()):
            # A member of a generation of which nobody is left, or which nobody heard of.
            self._out += record.incident("kill", takeover.not_found(worker), now, WorkerView(worker, requested_at=now))
        if not intact and statuses and record.last_generation >= 0:
            # Also those that seem to be out of it: an order of the predecessor may have reached them since they spoke.
            self._out.append(Interrupt(tuple(sorted(statuses)), record.last_generation))
            if not members and not record.incidents.unanswered():
                what = f"the controller was lost before anybody heard of generation {record.last_generation}"
                self._out += record.incident("controller", what, now)
        run.recall_saves([status.part for status in statuses.values() if status.part is not None], now)
        if run.stop is not None and self.state is RunState.RUNNING:
            run.pause()
        if self.state is RunState.WAITING:
            run.fill(now)
            run.try_form(now)
        else:
            run.conclude(now)
            run.fill(now)

    def _retake(self, current: Generation, statuses: Mapping[WorkerId, Status], now: float) -> bool:
        """Goes on with the newest generation, or with what is left of it; whether it is intact."""
        found = takeover.retake(current, statuses, self._roster, now)
        first = statuses.get(current.members[0].worker)
        assignment = () if first is None or first.generation != current else first.assignment
        self._run.resume(found.membership, now, intact=found.intact, assignment=assignment)
        for left in found.lefts:
            self._take_leave(self.workers[left.worker], left, now)
        for view in found.missing:
            self._run.handle_failure(takeover.lost_with_the_controller(view), now)
        if found.unaware and not self._record.incidents.unanswered():
            slots = ", ".join(str(view.worker.slot) for view in found.unaware)
            what = f"the controller was lost before worker {slots} heard of its generation"
            self._out += self._record.incident("controller", what, now)
        return found.intact


def _speeds(event: Ready) -> dict[str, float]:
    """What a worker says of its model and device, for the record."""
    if not event.flops_per_token or not event.peak_flops:
        return {}
    return {"flops_per_token": event.flops_per_token, "peak_flops": event.peak_flops}
