"""The controller's state machine.

One run goes WAITING -> FORMING -> RUNNING, and from there to SETTLING whenever the membership must change: all members
leave the generation (by agreement at a step boundary, or by interruption), the machine looks at who is left and at
what state they hold, and forms the next generation or waits for workers. It ends through FINALIZING.

Everything is a function of the events and their times; see `orchestrator.controller.protocol`.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.controller import policy
from orchestrator.controller.protocol import (
    Abort,
    Action,
    Died,
    Event,
    Finalize,
    Finish,
    Interrupt,
    KillWorker,
    Notice,
    Pause,
    Placed,
    Record,
    ReleaseWorker,
    RequestWorker,
    Resize,
    Rollback,
    Start,
    StartGeneration,
    Stop,
    TakeOver,
    Tick,
)
from orchestrator.controller.views import (
    VOLUNTARY,
    ControllerConfig,
    Incident,
    Progress,
    RunState,
    WorkerState,
    WorkerView,
)
from orchestrator.messages import (
    CheckpointSaved,
    FaultFired,
    Finalized,
    Generation,
    Heartbeat,
    Joined,
    Left,
    Member,
    Ready,
    Status,
    StepReport,
    WorkerId,
)


class Controller:
    """Decides; `handle` takes one event and returns the actions to carry out, in order.

    `checkpoints` maps a number of committed steps to a checkpoint of them, `committed` is what the record already
    holds (a resumed run, a restarted controller), `generation` the last number used.
    """

    def __init__(
        self,
        config: ControllerConfig,
        *,
        checkpoints: dict[int, str] | None = None,
        committed: int = 0,
        generation: int = -1,
        fired_faults: Iterable[int] = (),
    ) -> None:
        self.config = config
        self.state = RunState.WAITING
        self.target = config.max_workers
        self.workers: dict[WorkerId, WorkerView] = {}
        self.generation: Generation | None = None
        self.last_number = generation
        self.progress = Progress(committed=committed)
        self.checkpoints = dict(checkpoints or {})
        self.incidents: list[Incident] = []
        self.fired_faults = set(fired_faults)
        self.status: str | None = None
        self._stop: str | None = None
        self._incarnations: dict[int, int] = {}
        self._members: dict[WorkerId, WorkerView] = {}
        self._settling_since = 0.0
        self._interrupted_at: float | None = None
        self._waiting_since: float | None = None
        self._progress_at = 0.0
        self._last_event_at: float | None = None
        self._digests: dict[WorkerId, str] = {}
        self._finalize_asked: tuple[WorkerId, ...] = ()
        self._step_failures: dict[int, list[str]] = {}
        self._start_failures = 0
        self._next_request_at = 0.0
        self._resumed_from_commit: float | None = None
        self._out: list[Action] = []

    # ------------------------------------------------------------------------------------ events

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes one event that happened at `now` (seconds since the epoch)."""
        if self.state is RunState.OVER:
            return []
        self._out = []
        gap = now - (self._last_event_at if self._last_event_at is not None else now)
        self._last_event_at = now
        if gap > self.config.heartbeat_timeout_s / 2:
            # The controller itself slept (an overloaded or suspended machine): nobody could be heard meanwhile.
            for view in self._living():
                view.last_heard = max(view.last_heard, now)
            self._progress_at = now
        match event:
            case Start():
                self._waiting_since = now
                self._fill(now)
            case TakeOver():
                self._take_over(event, now)
            case Tick():
                self._tick(now)
            case Placed():
                self._placed(event, now)
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
            case Notice():
                self._notice(event, now)
            case Resize():
                self._resize(event, now)
            case Stop():
                self._stop_requested(event, now)
            case Abort():
                self._finish("failed", event.reason)
            case Finalized():
                self._finalized(event, now)
            case FaultFired():
                self._fault_fired(event)
            case CheckpointSaved():
                self._checkpoint_saved(event)
        out, self._out = self._out, []
        return out

    def _tick(self, now: float) -> None:
        self._find_hung(now)
        self._find_stalled(now)
        self._find_slow_starters(now)
        self._fill(now)
        if self.state is RunState.WAITING:
            self._try_form(now)
            limit = self.config.wait_timeout_s
            if (
                self.state is RunState.WAITING
                and limit is not None
                and self._waiting_since is not None
                and now - self._waiting_since > limit
            ):
                self._finish(
                    "failed",
                    f"waited {limit:.0f} s for {self.config.min_workers} workers "
                    f"(elastic.workers.min), {len(self._idle())} were there",
                )
        elif self.state is RunState.RUNNING:
            self._adjust(now)

    def _placed(self, event: Placed, now: float) -> None:
        view = self.workers.get(event.worker)
        if view is not None and view.state is WorkerState.REQUESTED:
            view.state, view.node, view.placed_at = WorkerState.STARTING, event.node, now

    def _ready(self, event: Ready, now: float) -> None:
        view = self.workers.get(event.worker)
        if view is None or not view.alive:
            self._out.append(ReleaseWorker(event.worker, "this run no longer expects it"))
            return
        if view.state not in (WorkerState.REQUESTED, WorkerState.STARTING):
            return
        view.state, view.ready, view.node, view.last_heard = WorkerState.IDLE, event, event.node, now
        self._start_failures = 0
        self._out.append(
            Record(
                "worker_ready",
                {"worker": event.worker.slot, "incarnation": event.worker.incarnation, "node": event.node,
                 "pid": event.pid, "start_seconds": round(now - view.requested_at, 3)},
            )
        )  # fmt: skip
        if self.state is RunState.WAITING:
            self._try_form(now)
        elif self.state is RunState.RUNNING:
            self._adjust(now)

    def _heartbeat(self, event: Heartbeat, now: float) -> None:
        view = self.workers.get(event.worker)
        if view is None or not view.alive:
            return
        view.last_heard = now
        self._take_reports(event.reports, now)
        if view.state is not WorkerState.MEMBER or self.generation is None:
            return
        if event.generation != self.generation.number:
            return
        position = (event.step, policy.phase_index(event.phase))
        if position != view.position:
            view.position = position
            self._progress_at = now
        view.phase = event.phase
        if event.committed > view.committed:
            view.committed = event.committed
            self._progress_at = now

    def _joined(self, event: Joined, now: float) -> None:
        view = self._member(event.worker, event.generation)
        if view is None or view.joined:
            return
        assert self.generation is not None
        view.joined, view.last_heard = True, now
        view.committed = max(view.committed, self.generation.committed)
        view.has_trained = True
        for incident in self.incidents:
            if incident.generation == event.generation:
                incident.bytes_moved += event.bytes_moved
        if self.state is RunState.FORMING and all(member.joined for member in self._members.values()):
            self.state = RunState.RUNNING
            self._progress_at = now
            self._out.append(Record("generation_running", {"generation": event.generation}))
            self._adjust(now)

    def _left(self, event: Left, now: float) -> None:
        view = self._member(event.worker, event.generation)
        if view is None or view.left is not None:
            return
        view.left, view.state, view.last_heard = event, WorkerState.IDLE, now
        view.committed, view.prepared = event.committed, event.prepared
        view.has_trained = view.has_trained or event.committed > 0
        self._take_reports(event.reports, now)
        match event.cause:
            case "exception":
                self._incident("crash", f"worker {event.worker.slot} raised: {event.detail}", view, event.at, now)
                self._count_failure(event.committed, f"worker {event.worker.slot}: {event.detail}")
                self._lose(view, f"its step raised: {event.detail}")
            case "restore":
                self._bad_checkpoint(event)
                self._settle(now, interrupt=True)
            case "peer":
                self._settle(now, interrupt=True)
            case "pause" | "complete":
                self._settle(now, interrupt=False)
        self._try_settled(now)

    def _died(self, event: Died, now: float) -> None:
        view = self.workers.get(event.worker)
        if view is None or not view.alive:
            return
        slot = event.worker.slot
        was = view.state
        in_generation = event.worker in self._members and self.state in (
            RunState.RUNNING,
            RunState.FORMING,
            RunState.SETTLING,
            RunState.FINALIZING,
        )
        view.state = WorkerState.GONE
        self._out.append(
            Record(
                "worker_died",
                {"worker": slot, "incarnation": event.worker.incarnation, "node": view.node,
                 "node_lost": event.node_lost, "detail": event.detail},
            )
        )  # fmt: skip
        if in_generation and not (view.left is not None and view.left.cause == "exception"):
            kind = "node" if event.node_lost else "drain" if view.draining else "kill"
            what = f"the node of worker {slot} was lost" if event.node_lost else f"worker {slot} died: {event.detail}"
            if view.left is None or view.left.cause == "peer":
                self._incident(kind, what, view, None, now)
                self._count_failure(self.progress.committed, what, weight=1 / 4)
                self._settle(now, interrupt=True)
            else:
                # It had already left in good order; the next generation simply does without it.
                self._incident(kind, what, view, None, now)
        if was in (WorkerState.REQUESTED, WorkerState.STARTING):
            self._start_failed(event.worker, event.detail, now)
        self._fill(now)
        self._try_settled(now)
        if self.state is RunState.FINALIZING:
            self._check_finalized(now)

    def _notice(self, event: Notice, now: float) -> None:
        noticed = []
        for worker in event.workers:
            view = self.workers.get(worker)
            if view is None or not view.alive:
                continue
            if view.draining_until is None:
                noticed.append(view)
            view.draining_until = event.deadline
        for view in noticed:
            self._out.append(
                Record(
                    "drain_notice",
                    {"worker": view.worker.slot, "node": view.node, "reason": event.reason,
                     "deadline": event.deadline},
                )
            )  # fmt: skip
            if view.worker in self._members and view.left is None:
                self._incident("drain", f"worker {view.worker.slot} must leave: {event.reason}", view, now, now)
            elif view.state is not WorkerState.MEMBER:
                self._release(view, "its node drains")
        self._fill(now)
        if self.state is RunState.RUNNING:
            self._adjust(now)

    def _resize(self, event: Resize, now: float) -> None:
        wanted = min(max(event.workers, self.config.min_workers), self.config.max_workers)
        if wanted == self.target:
            return
        self._out.append(Record("resize_requested", {"from": self.target, "to": wanted}))
        self.target = wanted
        self._fill(now)
        if self.state is RunState.RUNNING:
            self._adjust(now)
        elif self.state is RunState.WAITING:
            self._try_form(now)

    def _stop_requested(self, event: Stop, now: float) -> None:
        if self._stop is not None:
            return
        self._stop = event.reason
        self._out.append(Record("stop_requested", {"reason": event.reason}))
        if self.state is RunState.RUNNING:
            self._pause(now)
        elif self.state is RunState.WAITING:
            self._after_settled(now)

    def _finalized(self, event: Finalized, now: float) -> None:
        view = self.workers.get(event.worker)
        if view is None or self.state is not RunState.FINALIZING:
            return
        view.last_heard = now
        if event.error:
            self._lose(view, f"it could not finish: {event.error}")
        else:
            self._digests[event.worker] = event.digest
        self._check_finalized(now)

    def _fault_fired(self, event: FaultFired) -> None:
        self.fired_faults.add(event.index)
        view = self.workers.get(event.worker) if event.worker is not None else None
        if view is not None:
            view.fault_at = event.at
        self._out.append(
            Record(
                "fault_injected",
                {"fault": event.index, "worker": None if event.worker is None else event.worker.slot,
                 "at": event.at},
            )
        )  # fmt: skip

    def _checkpoint_saved(self, event: CheckpointSaved) -> None:
        fields = {"committed": event.committed, "path": event.path, "seconds": round(event.seconds, 3)}
        if event.error:
            self._out.append(Record("checkpoint_failed", fields | {"error": event.error}))
            return
        self.checkpoints[event.committed] = event.path
        self._out.append(Record("checkpoint_saved", fields | {"bytes": event.num_bytes}))

    # ------------------------------------------------------------------------------------ steps on record

    def _take_reports(self, reports: Iterable[StepReport], now: float) -> None:
        for report in reports:
            if report.step != self.progress.committed:
                continue
            before = self.progress.last_commit_at
            self.progress.committed += 1
            self.progress.last_commit_at = report.committed_at
            self._progress_at = now
            median = self.progress.median_step_s()
            for incident in [i for i in self.incidents if i.generation is not None]:
                if incident.generation is not None and incident.generation <= report.generation:
                    pause_s = 0.0 if before is None else report.committed_at - before
                    self.incidents.remove(incident)
                    self._out.append(Record("recovery", incident.recovery(report.committed_at, pause_s, median)))
            self.progress.step_seconds.append(report.seconds)
            del self.progress.step_seconds[:-200]

    # ------------------------------------------------------------------------------------ finding trouble

    def _find_hung(self, now: float) -> None:
        """A silent member, while nothing moves, is hung: it is ended for good and fenced off."""
        limit = self.config.heartbeat_timeout_s
        for view in list(self._living()):
            if view.state in (WorkerState.REQUESTED, WorkerState.STARTING):
                continue
            if now - view.last_heard <= limit:
                continue
            if view.worker in self._members and view.left is None:
                at = view.fault_at if view.fault_at is not None else view.last_heard
                self._incident("hang", f"worker {view.worker.slot} has been silent for {limit:.1f} s", view, at, now)
                self._settle(now, interrupt=True)
            self._lose(view, f"silent for more than {limit:.1f} s (elastic.heartbeat_timeout_s)")
        self._try_settled(now)

    def _find_stalled(self, now: float) -> None:
        """Everyone is heard and nothing moves: the member that is furthest behind holds the others up."""
        members = [view for view in self._members.values() if view.alive and view.left is None]
        if not members:
            return
        limit = policy.progress_limit_s(self.config.progress_timeout_s, self.progress.step_seconds)
        if self.state is RunState.SETTLING and self._interrupted_at is not None:
            for view in members:
                patience = self.config.interrupt_timeout_s if policy.is_collective(view.phase) else limit
                if now - self._interrupted_at > patience:
                    self._incident("stall", f"worker {view.worker.slot} did not leave its step ({view.phase})",
                                   view, view.fault_at, now)  # fmt: skip
                    self._lose(view, f"stuck in {view.phase} for {patience:.1f} s after it was told to leave")
            self._try_settled(now)
            return
        if self.state not in (RunState.RUNNING, RunState.FORMING, RunState.SETTLING):
            return
        if now - self._progress_at <= limit:
            return
        culprits = policy.furthest_behind([(view.worker, view.position, view.phase) for view in members])
        if culprits:
            for worker in culprits:
                view = self.workers[worker]
                self._incident("stall", f"worker {worker.slot} made no progress for {limit:.0f} s in {view.phase}",
                               view, view.fault_at or self._progress_at, now)  # fmt: skip
                self._lose(view, f"no progress for {limit:.0f} s in {view.phase} (elastic.progress_timeout_s)")
        else:
            self._incident("stall", f"no member made progress for {limit:.0f} s", None, self._progress_at, now)
        self._count_failure(self.progress.committed, f"no progress for {limit:.0f} s", weight=1 / 2)
        self._settle(now, interrupt=True)
        self._try_settled(now)

    def _find_slow_starters(self, now: float) -> None:
        limit = self.config.start_timeout_s
        for view in list(self._living()):
            if view.state is WorkerState.STARTING and view.placed_at is not None and now - view.placed_at > limit:
                self._lose(view, f"not ready {limit:.0f} s after it was placed (elastic.start_timeout_s)")
                self._start_failed(view.worker, "start timed out", now)

    def _start_failed(self, worker: WorkerId, detail: str, now: float) -> None:
        self._start_failures += 1
        self._next_request_at = now + min(30.0, 0.25 * 2**self._start_failures)
        if self._start_failures >= self.config.max_start_failures and not self._members:
            self._finish("failed", f"{self._start_failures} workers in a row died while starting: {detail}")

    def _count_failure(self, step: int, detail: str, weight: float = 1.0) -> None:
        """A step that fails again and again fails for a reason of its own: the run ends and says which."""
        failures = self._step_failures.setdefault(step, [])
        failures.append(detail)
        limit = self.config.max_failures_per_step
        if weight * len(failures) >= limit:
            self._finish("failed", f"step {step} failed {len(failures)} times, last: {detail}")

    def _incident(self, kind: str, cause: str, view: WorkerView | None, at: float | None, now: float) -> None:
        """Opens an incident; one worker's trouble in one generation is one incident, however often it is seen."""
        worker = None if view is None else view.worker
        if worker is not None and any(i.worker == worker and i.kind not in VOLUNTARY for i in self.incidents):
            return
        if worker is not None and kind == "drain" and any(i.worker == worker for i in self.incidents):
            return
        started = now
        if view is not None and view.fault_at is not None:
            started = view.fault_at
        elif at is not None:
            started = at
        incident = Incident(kind, cause, worker, started, now, self.progress.committed)
        self.incidents.append(incident)
        self._out.append(
            Record(
                "incident",
                {"incident": kind, "worker": None if worker is None else worker.slot, "cause": cause,
                 "step": incident.step, "at": started, "detect_seconds": round(max(0.0, now - started), 4)},
            )
        )  # fmt: skip

    # ------------------------------------------------------------------------------------ leaving a generation

    def _pause(self, now: float) -> None:
        """All members leave at the next step boundary, by agreement in the vote."""
        assert self.generation is not None
        self.state = RunState.SETTLING
        self._settling_since, self._interrupted_at = now, None
        staying = tuple(view.worker for view in self._members.values() if view.left is None)
        self._out.append(Pause(staying, self.generation.number))

    def _settle(self, now: float, *, interrupt: bool) -> None:
        """The generation is over; with `interrupt` whoever is still in it is told to break out."""
        if self.generation is None or self.state in (RunState.WAITING, RunState.FINALIZING, RunState.OVER):
            return
        if self.state is not RunState.SETTLING:
            self.state = RunState.SETTLING
            self._settling_since, self._interrupted_at = now, None
        if interrupt and self._interrupted_at is None:
            self._interrupted_at = now
            inside = tuple(v.worker for v in self._members.values() if v.alive and v.left is None)
            if inside:
                self._out.append(Interrupt(inside, self.generation.number))

    def _try_settled(self, now: float) -> None:
        if self.state is not RunState.SETTLING:
            return
        if any(view.alive and view.left is None for view in self._members.values()):
            return
        self._after_settled(now)

    def _after_settled(self, now: float) -> None:
        """No member is in the generation any more: finish, stop, or form the next one."""
        self._members = {}
        survivors = [view for view in self._idle() if view.has_trained]
        done = [view for view in survivors if view.committed == self.config.total_steps]
        if done:
            self._finalize(done, now)
        elif self._stop is not None:
            newest = max((view.committed for view in survivors), default=0)
            holders = [view for view in survivors if view.committed == newest]
            if holders and newest >= self.progress.committed:
                self._finalize(holders, now)
            else:
                self._finish("stopped", self._stop)
        else:
            self.state = RunState.WAITING
            self._waiting_since = now
            self._fill(now)
            self._try_form(now)
            if self.state is RunState.WAITING:
                self._out.append(Record("waiting", {"workers": len(self._idle()), "needed": self.config.min_workers}))

    def _finalize(self, views: list[WorkerView], now: float) -> None:
        self.state = RunState.FINALIZING
        self._digests = {}
        for view in views:
            view.last_heard = now
        self._finalize_asked = tuple(view.worker for view in views)
        self._out.append(Finalize(self._finalize_asked, save=self.config.checkpointing))

    def _check_finalized(self, now: float) -> None:
        living = [worker for worker in self._finalize_asked if self.workers[worker].alive]
        if not living:
            # The last holders died while they were asked: back to the newest checkpoint.
            self._after_settled(now)
        elif all(worker in self._digests for worker in living):
            digests = {self._digests[worker] for worker in living}
            if len(digests) > 1:
                shown = ", ".join(f"worker {w.slot}: {self._digests[w][:23]}" for w in living)
                self._finish("failed", f"the workers' final states differ, which must never happen: {shown}")
            elif self._stop is not None and self.progress.committed < self.config.total_steps:
                self._finish("stopped", self._stop, digests.pop())
            else:
                self._finish("finished", "all steps committed", digests.pop())

    def _finish(self, status: str, reason: str, digest: str | None = None) -> None:
        if self.state is RunState.OVER:
            return
        self.state, self.status = RunState.OVER, status
        self._out.append(Finish(status, reason, digest))

    # ------------------------------------------------------------------------------------ forming a generation

    def _try_form(self, now: float) -> None:
        """Forms a generation when enough workers are warm and none that is worth waiting for is on its way."""
        if self.state is not RunState.WAITING:
            return
        if self._stop is not None:
            self._after_settled(now)
            return
        idle = self._idle()
        usable = [view for view in idle if not view.draining]
        if len(usable) < self.config.min_workers:
            return
        fresh_run = not any(view.has_trained for view in idle)
        if fresh_run and len(usable) < self.target:
            # Nothing waits for these workers yet; those already placed are worth the seconds they need to warm up.
            waited = now - (self._waiting_since if self._waiting_since is not None else now)
            on_the_way = [v for v in self._living() if v.state is WorkerState.STARTING]
            unplaced = [v for v in self._living() if v.state is WorkerState.REQUESTED]
            if on_the_way or (unplaced and waited < self.config.placement_grace_s):
                return
        self._form(now)

    def _form(self, now: float) -> None:
        plan = policy.choose_members(self._idle(), self.target, self.config.virtual_workers)
        newest = max((view.committed for view in plan.members), default=0)
        restore: str | None = None
        source = "peers"
        lost = 0
        if newest < self.progress.committed:
            usable = [step for step in self.checkpoints if step <= self.progress.committed]
            best = max(usable, default=0)
            if best > newest:
                newest, restore = best, self.checkpoints[best]
            source = "checkpoint"
            lost = self.progress.committed - newest
            if lost:
                self._out.append(Rollback(newest))
                self.progress.committed = newest
        rolls = tuple(
            rank for rank, v in enumerate(plan.members) if v.has_trained and v.prepared and v.committed == newest - 1
        )
        if restore is not None:
            holders: tuple[int, ...] = ()
            rolls = ()
        elif newest == 0:
            first = plan.members[0].ready
            assert first is not None
            holders = tuple(
                rank
                for rank, v in enumerate(plan.members)
                if v.committed == 0 and v.ready is not None and v.ready.initial == first.initial
            )
        else:
            holders = tuple(r for r, v in enumerate(plan.members) if v.committed == newest and v.has_trained)
        self.last_number += 1
        members = []
        for view in plan.members:
            assert view.ready is not None
            ready = view.ready
            members.append(Member(view.worker, ready.node, ready.pid, ready.host, ready.store_port))
        opened = [incident for incident in self.incidents if incident.generation is None]
        cause = "; ".join(incident.cause for incident in opened) or ("start" if self.generation is None else "regroup")
        self.generation = Generation(
            number=self.last_number,
            epoch=self.config.epoch,
            committed=newest,
            cause=cause,
            members=tuple(members),
            assignment=plan.assignment,
            holders=holders,
            roll_forward=rolls,
            restore=restore,
            fired_faults=tuple(sorted(self.fired_faults)),
        )
        for incident in self.incidents:
            incident.generation = self.generation.number
            incident.steps_lost += lost
            if source == "checkpoint":
                incident.source = source
        self._members = {view.worker: view for view in plan.members}
        for view in plan.members:
            view.state, view.left, view.joined, view.last_heard = WorkerState.MEMBER, None, False, now
            view.position, view.phase, view.prepared = (newest, -1), "form", False
        self.state = RunState.FORMING
        self._interrupted_at = None
        self._progress_at = now
        self._out += [
            Record(
                "generation",
                {"generation": self.generation.number, "start_step": newest, "cause": cause,
                 "workers": [{"worker": m.worker.slot, "node": m.node, "pid": m.pid} for m in members],
                 "layout": {"data": len(members), "tensor": 1, "pipeline": 1, "shard": "none"},
                 "restore": restore},
            ),
            StartGeneration(self.generation),
        ]  # fmt: skip
        self._fill(now)

    def _adjust(self, now: float) -> None:
        """A running generation: is there a better membership to change to at the next step boundary?"""
        if self.state is not RunState.RUNNING or self._stop is not None:
            return
        change = policy.wanted_change(
            list(self._members.values()), self._idle(), self.target, self.config.min_workers, now
        )
        if change is None:
            return
        kind, cause = change
        if kind != "drain":
            self._incident(kind, cause, None, now, now)
        self._pause(now)

    # ------------------------------------------------------------------------------------ workers come and go

    def _fill(self, now: float) -> None:
        """Asks for the workers that are missing and releases those that are too many."""
        if self._stop is not None or self.state in (RunState.FINALIZING, RunState.OVER):
            return
        wanted = self.target + self.config.standby
        staying = [view for view in self._living() if not view.draining]
        missing = wanted - len(staying)
        if missing > 0 and now >= self._next_request_at:
            taken = {view.worker.slot for view in self._living()}
            slots = (slot for slot in range(wanted + len(self.workers) + 1) if slot not in taken)
            for slot in [next(slots) for _ in range(missing)]:
                incarnation = self._incarnations.get(slot, -1) + 1
                self._incarnations[slot] = incarnation
                worker = WorkerId(slot, incarnation)
                self.workers[worker] = WorkerView(worker, requested_at=now)
                self._out.append(RequestWorker(worker))
        elif missing < 0:
            spare = [view for view in staying if view.worker not in self._members]
            spare.sort(key=lambda view: (list(WorkerState).index(view.state), -view.worker.slot))
            for view in spare[:-missing]:
                self._release(view, "more workers than the job wants")
        if self.state is not RunState.SETTLING:
            for view in self._living():
                if view.draining and view.worker not in self._members and view.state is WorkerState.IDLE:
                    needed = self.state is RunState.WAITING and view.has_trained
                    if not needed:
                        self._release(view, "its node drains")

    def _release(self, view: WorkerView, reason: str) -> None:
        view.state = WorkerState.GONE
        self._out += [
            ReleaseWorker(view.worker, reason),
            Record("worker_released", {"worker": view.worker.slot, "reason": reason}),
        ]

    def _lose(self, view: WorkerView, reason: str) -> None:
        """Ends a worker that cannot be trusted any more; what it may still say is not listened to."""
        view.state = WorkerState.GONE
        self._out += [
            KillWorker(view.worker, reason),
            Record("worker_killed", {"worker": view.worker.slot, "reason": reason}),
        ]

    def _bad_checkpoint(self, event: Left) -> None:
        bad = None if self.generation is None else self.generation.restore
        for step in [step for step, path in self.checkpoints.items() if path == bad]:
            del self.checkpoints[step]
        self._out.append(Record("checkpoint_invalid", {"path": bad, "reason": event.detail}))

    def _take_over(self, event: TakeOver, now: float) -> None:
        """A restarted controller: the workers' own accounts say which generation is the current one."""
        self._waiting_since = now
        statuses = {status.ready.worker: status for status in event.workers}
        for worker, status in statuses.items():
            self._incarnations[worker.slot] = max(self._incarnations.get(worker.slot, -1), worker.incarnation)
            self.workers[worker] = WorkerView(
                worker,
                requested_at=now,
                state=WorkerState.IDLE,
                node=status.ready.node,
                ready=status.ready,
                committed=status.committed,
                prepared=status.prepared,
                has_trained=status.generation is not None,
                last_heard=now,
            )
        generations = [s.generation for s in event.workers if s.generation is not None]
        for status in event.workers:
            self._take_reports(status.reports, now)
        current = max(generations, key=lambda g: g.number, default=None)
        self.generation = current
        if current is None:
            self._fill(now)
            self._try_form(now)
            return
        self.last_number = max(self.last_number, current.number)
        self.fired_faults |= set(current.fired_faults)
        self.state = RunState.RUNNING
        self._progress_at = now
        missing = []
        for member in current.members:
            found = statuses.get(member.worker)
            if found is None:
                missing.append(member)
                view = WorkerView(member.worker, requested_at=now, state=WorkerState.MEMBER, node=member.node)
                self.workers[member.worker] = view
                self._members[member.worker] = view
                view.last_heard = now
                continue
            view = self.workers[member.worker]
            self._members[member.worker] = view
            if self._inside(found, current):
                view.state, view.joined = WorkerState.MEMBER, found.joined
            else:
                # It left, or never heard of this generation: either way it is not in it.
                view.left = found.left or Left(member.worker, current.number, "peer", found.committed, found.prepared)
        if all(view.left is None for view in self._members.values()) and not missing:
            self.state = RunState.RUNNING if all(v.joined for v in self._members.values()) else RunState.FORMING
        else:
            self._settle(now, interrupt=True)
        for member in missing:
            self._died(Died(member.worker, "not found by the restarted controller"), now)
        self._try_settled(now)
        self._fill(now)

    @staticmethod
    def _inside(status: Status, current: Generation) -> bool:
        left = status.left
        return (
            status.generation is not None
            and status.generation.number == current.number
            and (left is None or left.generation != current.number)
        )

    # ------------------------------------------------------------------------------------ small helpers

    def _living(self) -> list[WorkerView]:
        return [view for view in self.workers.values() if view.alive]

    def _idle(self) -> list[WorkerView]:
        return [view for view in self._living() if view.state is WorkerState.IDLE]

    def _member(self, worker: WorkerId, generation: int) -> WorkerView | None:
        """The member's view, if the message speaks of the current generation and the member still counts."""
        if self.generation is None or generation != self.generation.number:
            return None
        view = self._members.get(worker)
        return view if view is not None and view.alive else None
