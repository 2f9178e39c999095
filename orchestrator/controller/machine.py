"""The controller's state machine.

One run goes WAITING -> FORMING -> RUNNING, and from there to SETTLING whenever the membership must change: all members
leave the generation (by agreement at a step boundary, or by interruption), the machine looks at who is left and at
what state they hold, and forms the next generation or waits for workers. It ends through FINALIZING.

Everything is a function of the events and their times; see `orchestrator.controller.protocol`. A message costs the
same however many workers there are; what looks at all of them happens on a tick or when a membership changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.controller import policy
from orchestrator.controller.history import History
from orchestrator.controller.incidents import Incident, IncidentBook, StepFailures
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
    StepCommitted,
    Stop,
    TakeOver,
    Tick,
)
from orchestrator.controller.views import (
    ControllerConfig,
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
    holds (a resumed run, a restarted controller), `generation` the last number used, `incarnations` the last
    incarnation of each slot ever asked for. `resumed` takes all of that, and what else there is to know, from the
    records of the run.
    """

    def __init__(
        self,
        config: ControllerConfig,
        *,
        checkpoints: dict[int, str] | None = None,
        committed: int = 0,
        generation: int = -1,
        fired_faults: Iterable[int] = (),
        incarnations: Mapping[int, int] | None = None,
    ) -> None:
        self.config = config
        self.state = RunState.WAITING
        self.target = self._within_limits(config.max_workers)
        self.workers: dict[WorkerId, WorkerView] = {}
        self.generation: Generation | None = None
        self.last_number = generation
        self.progress = Progress(committed=committed)
        self.checkpoints = dict(checkpoints or {})
        self.fired_faults = set(fired_faults)
        self.status: str | None = None
        self._book = IncidentBook()
        self._failures = StepFailures(config.max_failures_per_step)
        self._stop: str | None = None
        self._drains: dict[WorkerId, float] = {}
        self._last_members: set[WorkerId] = set()
        self._known_gone: set[WorkerId] = set()
        self._incarnations = dict(incarnations or {})
        self._alive: dict[WorkerId, WorkerView] = {}
        # The members of the current generation, until all have left it; those still in it; those not joined yet.
        self._members: dict[WorkerId, WorkerView] = {}
        self._inside: set[WorkerId] = set()
        self._unjoined: set[WorkerId] = set()
        self._interrupted_at: float | None = None
        self._waiting_since: float | None = None
        self._progress_at = 0.0
        self._now: float | None = None
        self._digests: dict[WorkerId, str] = {}
        self._finalize_asked: tuple[WorkerId, ...] = ()
        self._finalizing_since = 0.0
        self._start_failures = 0
        self._has_run = False
        self._next_request_at = 0.0
        self._out: list[Action] = []

    @classmethod
    def resumed(
        cls, config: ControllerConfig, history: History, checkpoints: dict[int, str] | None = None
    ) -> Controller:
        """A controller that knows what its predecessors put on record."""
        controller = cls(
            config,
            checkpoints=checkpoints,
            committed=history.committed,
            generation=history.generation,
            fired_faults=history.fired_faults,
            incarnations=history.incarnations,
        )
        controller._book = IncidentBook(history.incidents)
        controller._stop = history.stop
        controller._drains = dict(history.draining)
        controller._last_members = set(history.members)
        controller._known_gone = set(history.gone)
        controller.progress.step_seconds = list(history.step_seconds)
        controller.progress.last_commit_at = history.last_commit_at
        if history.target is not None:
            controller.target = controller._within_limits(history.target)
        return controller

    @property
    def incidents(self) -> list[Incident]:
        """Those that the run has not recovered from yet, oldest first."""
        return self._book.open

    # ------------------------------------------------------------------------------------ events

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes one event that happened at `now` (seconds since the epoch)."""
        if self.state is RunState.OVER:
            return []
        self._out = []
        gap = 0.0 if self._now is None else now - self._now
        self._now = now
        if gap > self.config.heartbeat_timeout_s / 2:
            self._overslept(gap, now)
        match event:
            case Start():
                # A run begun anew has the size of its job file and no wish to stop, whatever was asked of the last one.
                self._stop, self.target = None, self._within_limits(self.config.max_workers)
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

    def _overslept(self, gap: float, now: float) -> None:
        """The controller itself slept (an overloaded or suspended machine): nobody could be heard meanwhile, and no
        patience has run out."""
        for view in self._alive.values():
            view.last_heard = max(view.last_heard, now)
            if view.placed_at is not None:
                view.placed_at += gap
        self._progress_at = now
        self._finalizing_since += gap
        if self._interrupted_at is not None:
            self._interrupted_at += gap

    def _tick(self, now: float) -> None:
        self._find_hung(now)
        self._find_stalled(now)
        self._find_slow_starters(now)
        self._find_slow_finishers(now)
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
        view.initial = event.initial
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
            if self.generation.members[0].worker == event.worker:
                # No step is committed without every member, so rank 0 speaks for all; others may keep quiet.
                for worker in self._inside:
                    member = self._members[worker]
                    member.last_heard = now
        if view.fault_at is not None:
            # Whoever commits another step has outlived its fault; a later trouble is measured from its own time.
            if view.fault_committed is None:
                view.fault_committed = event.committed
            elif event.committed > view.fault_committed:
                view.fault_at = view.fault_committed = None

    def _joined(self, event: Joined, now: float) -> None:
        view = self._member(event.worker, event.generation)
        if view is None or view.joined:
            return
        assert self.generation is not None
        view.joined, view.last_heard = True, now
        view.committed = max(view.committed, self.generation.committed)
        view.has_trained, view.torn = True, False
        if self.generation.committed == 0:
            view.initial = f"of generation {event.generation}"
        self._unjoined.discard(event.worker)
        self._progress_at = now
        self._book.moved(event.generation, event.bytes_moved)
        if self.state is RunState.FORMING and not self._unjoined:
            self._run(now)

    def _run(self, now: float) -> None:
        """All members have joined."""
        assert self.generation is not None
        self.state, self._has_run = RunState.RUNNING, True
        self._progress_at = now
        self._out.append(Record("generation_running", {"generation": self.generation.number}))
        if self._stop is not None:
            self._pause()
        else:
            self._adjust(now)

    def _left(self, event: Left, now: float) -> None:
        view = self._member(event.worker, event.generation)
        if view is not None and view.left is None:
            self._take_leave(view, event, now)
            self._conclude(now)

    def _take_leave(self, view: WorkerView, event: Left, now: float) -> None:
        assert self.generation is not None
        view.left, view.state, view.last_heard = event, WorkerState.IDLE, now
        view.committed, view.prepared = event.committed, event.prepared
        self._inside.discard(event.worker)
        self._take_reports(event.reports, now)
        cause = event.cause
        if cause == "restore" and (self.generation.restore is None or view.joined):
            # Nothing was restored here: something else could not be read.
            cause = "exception"
        match cause:
            case "exception":
                self._step_raised(view, event, now)
            case "restore":
                self._bad_checkpoint(event)
                self._settle(now, interrupt=True)
            case "peer":
                self._settle(now, interrupt=True)
            case "pause" | "complete":
                self._settle(now, interrupt=False)

    def _step_raised(self, view: WorkerView, event: Left, now: float) -> None:
        """An exception changes no state: who alone holds it tries again, others are replaced."""
        cause = f"worker {event.worker.slot} raised: {event.detail}"
        others = [v for v in self._members.values() if v is not view and v.alive and not v.torn]
        if others or view.torn:
            self._worker_lost(
                view, "crash", cause, event.at or None, now, weight=1.0, kill=f"its step raised: {event.detail}"
            )
            return
        self._incident("crash", cause, view, event.at or None, now)
        self._settle(now, interrupt=True)
        self._count_failure(cause, 1.0)

    def _died(self, event: Died, now: float) -> None:
        view = self.workers.get(event.worker)
        if view is None or not view.alive:
            return
        slot = event.worker.slot
        was = view.state
        self._out.append(
            Record(
                "worker_died",
                {"worker": slot, "incarnation": event.worker.incarnation, "node": view.node,
                 "node_lost": event.node_lost, "detail": event.detail},
            )
        )  # fmt: skip
        if event.node_lost and view.node:
            self._node_lost(view, now)
            return
        kind = "drain" if view.draining else "kill"
        what = f"worker {slot} died: {event.detail}"
        self._worker_lost(view, kind, what, None, now, weight=0.0 if kind == "drain" else 1 / 4)
        if was in (WorkerState.REQUESTED, WorkerState.STARTING) and kind == "kill":
            self._start_failed(event.detail, now)
        self._fill(now)
        self._conclude(now)

    def _node_lost(self, view: WorkerView, now: float) -> None:
        """Everything on the node of `view` went at once: one incident, however many workers it took."""
        victims = [view] + [v for v in self._alive.values() if v.node == view.node and v is not view]
        counted = [v for v in victims if v.worker in self._members or self._is_last_holder(v)]
        slots = ", ".join(str(v.worker.slot) for v in sorted(counted or victims, key=lambda v: v.worker))
        # The worker whose fault it was, if one was injected, knows the true time.
        victims.sort(key=lambda v: (v.worker not in self._members, v.fault_at is None, v.worker))
        for number, victim in enumerate(victims):
            self._worker_lost(
                victim, "node", f"the node of worker {slots} was lost", None, now,
                kill=None if victim is view else "its node was lost", quiet=number > 0,
            )  # fmt: skip
        self._fill(now)
        self._conclude(now)

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
                    {"worker": view.worker.slot, "incarnation": view.worker.incarnation, "node": view.node,
                     "reason": event.reason, "deadline": event.deadline},
                )
            )  # fmt: skip
            if view.worker in self._inside:
                self._incident("drain", f"worker {view.worker.slot} must leave: {event.reason}", view, now, now)
            elif view.state in (WorkerState.REQUESTED, WorkerState.STARTING):
                self._release(view, "its node drains")
            # An idle one may hold state that is needed; `_fill` knows.
        self._fill(now)
        if self.state is RunState.RUNNING:
            self._adjust(now)

    def _resize(self, event: Resize, now: float) -> None:
        wanted = self._within_limits(event.workers)
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
            self._pause()
        elif self.state is RunState.WAITING:
            self._after_settled(now)
        # While a generation forms or settles, or the run ends anyway, the stop takes its turn after that.

    def _finalized(self, event: Finalized, now: float) -> None:
        view = self.workers.get(event.worker)
        if view is None or self.state is not RunState.FINALIZING:
            return
        view.last_heard = now
        if event.worker not in self._finalize_asked or not view.alive:
            return
        if event.error:
            self._worker_lost(
                view, "crash", f"worker {event.worker.slot} could not finish: {event.error}", None, now,
                kill=f"it could not finish: {event.error}",
            )  # fmt: skip
            self._count_failure(f"worker {event.worker.slot} could not finish: {event.error}", 1.0)
        else:
            self._digests[event.worker] = event.digest
        self._conclude(now)

    def _fault_fired(self, event: FaultFired) -> None:
        self.fired_faults.add(event.index)
        view = self.workers.get(event.worker) if event.worker is not None else None
        if view is not None:
            view.fault_at, view.fault_committed = event.at, None
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
            before, median = self.progress.last_commit_at, self.progress.median_step_s()
            self.progress.committed += 1
            self.progress.last_commit_at = report.committed_at
            self.progress.step_seconds.append(report.seconds)
            del self.progress.step_seconds[:-200]
            self._progress_at = now
            self._failures.forget_before(self.progress.committed)
            self._out.append(StepCommitted(report))
            if self._book.open:
                self._out += self._book.recovered(report, before, median)

    # ------------------------------------------------------------------------------------ finding trouble

    def _find_hung(self, now: float) -> None:
        """A worker that is silent for too long is ended for good and fenced off."""
        limit = self.config.heartbeat_timeout_s
        silent = [
            view
            for view in self._alive.values()
            if now - view.last_heard > limit and view.state in (WorkerState.IDLE, WorkerState.MEMBER)
        ]
        for view in silent:
            self._worker_lost(
                view, "hang", f"worker {view.worker.slot} has been silent for {limit:.1f} s", view.last_heard, now,
                kill=f"silent for more than {limit:.1f} s (elastic.heartbeat_timeout_s)",
            )  # fmt: skip
        if silent:
            self._conclude(now)

    def _find_stalled(self, now: float) -> None:
        """Everyone is heard and nothing moves: the member that is furthest behind holds the others up."""
        if not self._inside:
            return
        # While members join, state is moved and checkpoints are read; the pace of steps says nothing about that.
        limit = self.config.progress_timeout_s
        if not self._unjoined:
            limit = policy.progress_limit_s(limit, self.progress.step_seconds)
        if self._interrupted_at is not None:
            self._find_stuck(limit, self._interrupted_at, now)
            return
        if now - self._progress_at <= limit:
            return
        members = [self._members[worker] for worker in sorted(self._inside)]
        culprits = policy.furthest_behind([(view.worker, view.position, view.phase) for view in members])
        for worker in culprits:
            view = self.workers[worker]
            self._worker_lost(
                view, "stall", f"worker {worker.slot} made no progress for {limit:.0f} s in {view.phase}",
                self._progress_at, now, weight=1 / 2,
                kill=f"no progress for {limit:.0f} s in {view.phase} (elastic.progress_timeout_s)",
            )  # fmt: skip
        if not culprits:
            self._incident("stall", f"no member made progress for {limit:.0f} s", None, self._progress_at, now)
            self._settle(now, interrupt=True)
            self._count_failure(f"no progress for {limit:.0f} s", 1 / 2)
        self._conclude(now)

    def _find_stuck(self, limit: float, interrupted_at: float, now: float) -> None:
        """Whoever is told to break out of a collective does so at once; a computation has to come to its end."""
        for worker in sorted(self._inside):
            view = self._members[worker]
            patience = self.config.interrupt_timeout_s if policy.is_collective(view.phase) else limit
            if now - interrupted_at > patience:
                self._worker_lost(
                    view, "stall", f"worker {worker.slot} did not leave its step ({view.phase})", interrupted_at, now,
                    kill=f"stuck in {view.phase} for {patience:.1f} s after it was told to leave",
                )  # fmt: skip
        self._conclude(now)

    def _find_slow_starters(self, now: float) -> None:
        limit = self.config.start_timeout_s
        for view in list(self._alive.values()):
            if view.state is WorkerState.STARTING and view.placed_at is not None and now - view.placed_at > limit:
                self._lose(view, f"not ready {limit:.0f} s after it was placed (elastic.start_timeout_s)")
                self._start_failed("start timed out", now)

    def _find_slow_finishers(self, now: float) -> None:
        limit = self.config.finalize_timeout_s
        if self.state is not RunState.FINALIZING or now - self._finalizing_since <= limit:
            return
        for worker in self._finalize_asked:
            view = self.workers[worker]
            if view.alive and worker not in self._digests:
                self._worker_lost(
                    view, "stall", f"worker {worker.slot} did not give its final state", self._finalizing_since, now,
                    kill=f"it did not give its final state within {limit:.0f} s",
                )  # fmt: skip
        self._count_failure(f"no final state within {limit:.0f} s", 1 / 2)
        self._conclude(now)

    def _start_failed(self, detail: str, now: float) -> None:
        self._start_failures += 1
        self._next_request_at = now + min(30.0, 0.25 * 2 ** min(self._start_failures, 10))
        if self._start_failures >= self.config.max_start_failures and not self._members:
            self._finish("failed", f"{self._start_failures} workers in a row died while starting: {detail}")

    def _worker_lost(
        self,
        view: WorkerView,
        kind: str,
        cause: str,
        at: float | None,
        now: float,
        *,
        weight: float = 1 / 4,
        kill: str | None = None,
        quiet: bool = False,
    ) -> None:
        """A warm worker is gone, or with `kill` is ended here; `weight` says how likely its step is to blame.

        Losing a member is an incident, and so is losing the last holder of the state, unless `quiet`: it is part of
        one that is told already. Callers `_conclude` when they are through with all they lost.
        """
        incident = not quiet and (view.worker in self._members or self._is_last_holder(view))
        inside = view.worker in self._inside or (view.left is not None and view.left.cause == "exception")
        if kill is None:
            self._gone(view)
        else:
            self._lose(view, kill)
        if incident:
            self._incident(kind, cause, view, at, now)
        if inside and view.worker in self._members:
            self._settle(now, interrupt=True)
            if weight:
                self._count_failure(cause, weight)

    def _is_last_holder(self, view: WorkerView) -> bool:
        """Whether committed steps are lost with an idle worker."""
        if view.state is not WorkerState.IDLE or self.state not in (RunState.WAITING, RunState.FINALIZING):
            return False
        idle = self._idle()
        before = policy.state_at_hand(idle, self.progress.committed)
        after = policy.state_at_hand([other for other in idle if other is not view], self.progress.committed)
        return before is not None and before.committed > (0 if after is None else after.committed)

    def _count_failure(self, detail: str, weight: float) -> None:
        """A step that fails again and again fails for a reason of its own: the run ends and says which."""
        step = self.progress.committed
        times = self._failures.add(step, self.last_number, weight)
        if times is not None:
            self._finish("failed", f"step {step} failed {times} times, last: {detail}")

    def _incident(self, kind: str, cause: str, view: WorkerView | None, at: float | None, now: float) -> None:
        """Opens an incident that began at `at`, or when the worker's injected fault was fired."""
        started = now if at is None else at
        if view is not None and view.fault_at is not None:
            started = view.fault_at
        worker = None if view is None else view.worker
        incident = Incident(kind, cause, worker, started, now, self.progress.committed)
        if self._book.add(incident):
            self._out.append(incident.opening())

    # ------------------------------------------------------------------------------------ leaving a generation

    def _pause(self) -> None:
        """All members leave at the next step boundary, by agreement in the vote."""
        assert self.generation is not None
        self.state = RunState.SETTLING
        self._interrupted_at = None
        self._out.append(Pause(tuple(sorted(self._inside)), self.generation.number))

    def _settle(self, now: float, *, interrupt: bool) -> None:
        """The generation is over; with `interrupt` whoever is still in it is told to break out."""
        if self.generation is None or self.state in (RunState.WAITING, RunState.FINALIZING, RunState.OVER):
            return
        if self.state is not RunState.SETTLING:
            self.state = RunState.SETTLING
            self._interrupted_at = None
        if interrupt and self._interrupted_at is None:
            self._interrupted_at = now
            if self._inside:
                self._out.append(Interrupt(tuple(sorted(self._inside)), self.generation.number))

    def _conclude(self, now: float) -> None:
        """Goes on when nobody is left to wait for."""
        if self.state is RunState.SETTLING and not self._inside:
            self._after_settled(now)
        elif self.state is RunState.FINALIZING:
            self._check_finalized(now)

    def _after_settled(self, now: float) -> None:
        """No member is in the generation any more: finish, stop, or form the next one."""
        lefts = [view.left for view in self._members.values() if view.left is not None]
        self._members, self._unjoined = {}, set()
        self._refuse_unrecorded()
        survivors = [view for view in self._idle() if not view.torn and view.has_trained]
        done = [view for view in survivors if view.committed == self.config.total_steps]
        if done:
            self._finalize(done, now)
            return
        if self._stop is not None:
            newest = max((view.committed for view in survivors), default=0)
            holders = [view for view in survivors if view.committed == newest]
            if holders and newest >= self.progress.committed:
                self._finalize(holders, now)
            else:
                self._finish("stopped", self._stop)
            return
        self._explain(lefts, now)
        if self.state is RunState.OVER:
            return
        self.state = RunState.WAITING
        self._waiting_since = now
        self._fill(now)
        self._try_form(now)
        if self.state is RunState.WAITING:
            self._out.append(Record("waiting", {"workers": len(self._idle()), "needed": self.config.min_workers}))

    def _explain(self, lefts: list[Left], now: float) -> None:
        """Members lost each other, yet all are alive and nothing else happened: the network failed them."""
        lost = [left for left in lefts if left.cause == "peer"]
        if not lost or self._book.unanswered() or any(left.cause == "restore" for left in lefts):
            return
        at = min((left.at for left in lost if left.at), default=now)
        what = f"all workers live, but worker {lost[0].worker.slot} lost a peer: {lost[0].detail}"
        self._incident("network", what, None, at, now)
        self._count_failure(what, 1 / 2)

    def _finalize(self, views: list[WorkerView], now: float) -> None:
        self.state = RunState.FINALIZING
        self._digests = {}
        for view in views:
            view.last_heard = now
        self._finalizing_since = now
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
        if status != "failed":
            assert self._now is not None
            last = self.progress.last_commit_at
            self._out += self._book.close_all(self.last_number, self._now, last, self.progress.median_step_s())
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
        able = policy.usable(idle, self.config.min_workers, now)
        if len(able) < self.config.min_workers:
            return
        fresh_run = not any(view.has_trained for view in idle)
        if fresh_run and len(able) < self.target:
            # Nothing waits for these workers yet; those already placed are worth the seconds they need to warm up.
            waited = now - (self._waiting_since if self._waiting_since is not None else now)
            soon = {WorkerState.STARTING}
            if waited < self.config.placement_grace_s:
                soon.add(WorkerState.REQUESTED)
            if any(view.state in soon for view in self._alive.values()):
                return
        self._form(now)

    def _form(self, now: float) -> None:
        """Forms a generation from the newest state there is: that of living workers, or a newer one in storage."""
        self._refuse_unrecorded()
        idle = self._idle()
        recorded = self.progress.committed
        at_hand = policy.state_at_hand(idle, recorded)
        stored = max((step for step in self.checkpoints if step <= recorded), default=0)
        if stored > (0 if at_hand is None else at_hand.committed):
            start, restore, at_hand = stored, self.checkpoints[stored], None
        elif at_hand is not None:
            start, restore = at_hand.committed, None
        else:
            # All were torn when the last holder went, and there is no checkpoint: only new workers have a state.
            for view in idle:
                self._release(view, "its state is incomplete, and nobody can complete it")
            self._fill(now)
            return
        self._roll_back(recorded - start, now)
        sources = frozenset() if at_hand is None else at_hand.sources
        plan = policy.choose_members(
            idle, sources, self.target, self.config.virtual_workers, self.config.min_workers, now
        )
        self.last_number += 1
        opened = self._book.unanswered()
        cause = "; ".join(incident.cause for incident in opened) or ("start" if self.generation is None else "regroup")
        source = "peers" if restore is None else "checkpoint"
        ranks = range(len(plan.members))
        self.generation = Generation(
            number=self.last_number,
            epoch=self.config.epoch,
            committed=start,
            cause=cause,
            members=tuple(_member(view) for view in plan.members),
            assignment=plan.assignment,
            holders=tuple(r for r in ranks if at_hand is not None and plan.members[r].worker in at_hand.holders),
            roll_forward=tuple(r for r in ranks if at_hand is not None and plan.members[r].worker in at_hand.rolling),
            restore=restore,
            fired_faults=tuple(sorted(self.fired_faults)),
        )
        self._book.answered(self.last_number, source, start)
        self._enter(plan.members, sources, now)
        self._out += [
            Record(
                "generation",
                {"generation": self.last_number, "start_step": start, "cause": cause,
                 "workers": [
                     {"worker": m.worker.slot, "incarnation": m.worker.incarnation, "node": m.node, "pid": m.pid}
                     for m in self.generation.members
                 ],
                 "layout": {"data": len(plan.members), "tensor": 1, "pipeline": 1, "shard": "none"},
                 "restore": restore, "source": source, "steps_lost": recorded - start},
            ),
            StartGeneration(self.generation),
        ]  # fmt: skip
        self._fill(now)

    def _refuse_unrecorded(self) -> None:
        """A state of more steps than are on record is not used, or those steps would never be on it.

        Workers keep the reports of steps that are not on record, so this takes a predecessor that rolled back and died
        before it had ended this worker.
        """
        for view in self._idle():
            if view.committed > self.progress.committed and not view.torn:
                view.torn = True
                self._out.append(
                    Record(
                        "state_refused",
                        {"worker": view.worker.slot, "incarnation": view.worker.incarnation,
                         "committed": view.committed, "recorded": self.progress.committed},
                    )
                )  # fmt: skip

    def _roll_back(self, steps: int, now: float) -> None:
        """Takes the last `steps` off the record and puts them on the account of an incident."""
        if steps == 0:
            return
        if not self._book.charge(steps):
            # Nobody saw the loss happen: the whole cluster went, and the controller with it.
            self._incident(
                "restart", f"the run began again, {steps} steps before the end of its record", None, now, now
            )
            self._book.charge(steps)
        self.progress.committed -= steps
        self._out.append(Rollback(self.progress.committed))

    def _enter(self, members: Iterable[WorkerView], sources: frozenset[WorkerId], now: float) -> None:
        """A new generation begins for these members; who is no source has no whole state until it has joined."""
        assert self.generation is not None
        self._members = {view.worker: view for view in members}
        self._inside, self._unjoined = set(self._members), set(self._members)
        for view in self._members.values():
            view.state, view.left, view.joined, view.last_heard = WorkerState.MEMBER, None, False, now
            view.position, view.phase, view.prepared = (self.generation.committed, -1), "form", False
            view.torn = view.worker not in sources
        self.state = RunState.FORMING
        self._interrupted_at = None
        self._progress_at = now

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
        self._pause()

    # ------------------------------------------------------------------------------------ workers come and go

    def _fill(self, now: float) -> None:
        """Asks for the workers that are missing and releases those that are too many."""
        if self._stop is not None or self.state in (RunState.FINALIZING, RunState.OVER):
            return
        # The first generation does not share its start-up with workers that would only wait.
        wanted = self.target + (self.config.standby if self._has_run else 0)
        staying = [view for view in self._alive.values() if not view.draining]
        missing = wanted - len(staying)
        if missing > 0 and now >= self._next_request_at:
            self._request(missing, now)
        elif missing < 0:
            order = list(WorkerState)
            spare = [view for view in staying if view.worker not in self._members]
            # Before a generation is formed the idle ones may hold its state: the newest goes last.
            spare.sort(key=lambda v: (order.index(v.state), not v.torn and v.has_trained, v.committed, -v.worker.slot))
            for view in spare[:-missing]:
                self._release(view, "more workers than the job wants")
        if self.state is not RunState.SETTLING and len(staying) < len(self._alive):
            for view in list(self._alive.values()):
                if view.draining and view.worker not in self._members and view.state is WorkerState.IDLE:
                    needed = self.state is RunState.WAITING and view.has_trained and not view.torn
                    if not needed:
                        self._release(view, "its node drains")

    def _request(self, number: int, now: float) -> None:
        taken = {worker.slot for worker in self._alive}
        slots = (slot for slot in range(number + len(taken)) if slot not in taken)
        for slot in [next(slots) for _ in range(number)]:
            worker = WorkerId(slot, self._incarnations.get(slot, -1) + 1)
            self._incarnations[slot] = worker.incarnation
            self._add(WorkerView(worker, requested_at=now))
            self._out += [
                Record("worker_requested", {"worker": slot, "incarnation": worker.incarnation}),
                RequestWorker(worker),
            ]

    def _add(self, view: WorkerView) -> None:
        self.workers[view.worker] = self._alive[view.worker] = view
        view.draining_until = self._drains.get(view.worker)

    def _gone(self, view: WorkerView) -> None:
        view.state = WorkerState.GONE
        self._alive.pop(view.worker, None)
        self._inside.discard(view.worker)
        self._unjoined.discard(view.worker)

    def _release(self, view: WorkerView, reason: str) -> None:
        self._gone(view)
        self._out += [
            ReleaseWorker(view.worker, reason),
            Record(
                "worker_released",
                {"worker": view.worker.slot, "incarnation": view.worker.incarnation, "reason": reason},
            ),
        ]

    def _lose(self, view: WorkerView, reason: str) -> None:
        """Ends a worker that cannot be trusted any more; what it may still say is not listened to."""
        self._gone(view)
        self._out += [
            KillWorker(view.worker, reason),
            Record(
                "worker_killed",
                {"worker": view.worker.slot, "incarnation": view.worker.incarnation, "reason": reason},
            ),
        ]

    def _bad_checkpoint(self, event: Left) -> None:
        bad = None if self.generation is None else self.generation.restore
        for step in [step for step, path in self.checkpoints.items() if path == bad]:
            del self.checkpoints[step]
        self._out.append(Record("checkpoint_invalid", {"path": bad, "reason": event.detail}))

    def _take_over(self, event: TakeOver, now: float) -> None:
        """A restarted controller: the workers' own accounts say which generation is the current one."""
        self._waiting_since = now
        statuses = {}
        for status in event.workers:
            worker = status.ready.worker
            self._incarnations[worker.slot] = max(self._incarnations.get(worker.slot, -1), worker.incarnation)
            if worker in self._known_gone:
                self._out.append(KillWorker(worker, "an earlier controller had given it up"))
                continue
            statuses[worker] = status
            self._add(_view_of(status, now))
        for status in statuses.values():
            self._take_reports(status.reports, now)
        generations = [status.generation for status in statuses.values() if status.generation is not None]
        self.generation = current = max(generations, key=lambda g: g.number, default=None)
        recorded = self.last_number
        intact = current is not None and current.number >= recorded
        if current is not None:
            self.last_number = max(recorded, current.number)
            self.fired_faults |= set(current.fired_faults)
            if intact:
                intact = self._retake(current, statuses, now)
        for worker in sorted(self._last_members - statuses.keys() - self._members.keys()):
            # A member of a generation of which nobody is left, or which nobody heard of.
            self._incident("kill", _not_found(worker), WorkerView(worker, requested_at=now), None, now)
        if not intact and statuses and self.last_number >= 0:
            # Also those that seem to be out of it: an order of the predecessor may have reached them since they spoke.
            self._out.append(Interrupt(tuple(sorted(statuses)), self.last_number))
            if not self._members and not self._book.unanswered():
                what = f"the controller was lost before anybody heard of generation {self.last_number}"
                self._incident("controller", what, None, now, now)
        if self._stop is not None and self.state is RunState.RUNNING:
            self._pause()
        if self.state is RunState.WAITING:
            self._fill(now)
            self._try_form(now)
        else:
            self._conclude(now)
            self._fill(now)

    def _retake(self, current: Generation, statuses: Mapping[WorkerId, Status], now: float) -> bool:
        """Takes the members of the newest generation for what they say they are; True when the generation may go on."""
        self.state, self._progress_at, self._has_run = RunState.RUNNING, now, True
        lefts: list[Left] = []
        missing: list[WorkerView] = []
        unaware: list[WorkerView] = []
        for member in current.members:
            found = statuses.get(member.worker)
            if found is None and member.worker in self._known_gone:
                # The predecessor dealt with it.
                continue
            if found is None:
                self._add(WorkerView(member.worker, requested_at=now, node=member.node, last_heard=now))
                missing.append(self.workers[member.worker])
            view = self._members[member.worker] = self.workers[member.worker]
            if found is not None and (found.generation is None or found.generation.number < current.number):
                view.left = Left(member.worker, current.number, "peer", found.committed, found.prepared)
                unaware.append(view)
                continue
            view.state, view.joined = WorkerState.MEMBER, found is not None and found.joined
            self._inside.add(member.worker)
            if not view.joined:
                self._unjoined.add(member.worker)
            if found is not None and found.left is not None:
                lefts.append(found.left)
        if self._unjoined:
            self.state = RunState.FORMING
        whole = len(self._members) == len(current.members) and not missing and not unaware
        if not whole or any(left.cause not in ("pause", "complete") for left in lefts):
            # The order to leave goes to everyone, see above; the time to obey it runs from here.
            self.state, self._interrupted_at = RunState.SETTLING, now
        for left in lefts:
            self._take_leave(self._members[left.worker], left, now)
        for view in missing:
            self._worker_lost(
                view, "kill", _not_found(view.worker), None, now, kill="it was not found by the restarted controller"
            )
        if unaware and not self._book.unanswered():
            slots = ", ".join(str(view.worker.slot) for view in unaware)
            what = f"the controller was lost before worker {slots} heard of its generation"
            self._incident("controller", what, None, now, now)
        return self._interrupted_at is None

    # ------------------------------------------------------------------------------------ small helpers

    def _idle(self) -> list[WorkerView]:
        return [view for view in self._alive.values() if view.state is WorkerState.IDLE]

    def _within_limits(self, workers: int) -> int:
        """A virtual worker is not divided, so there is never work for more workers than that."""
        limit = min(self.config.max_workers, self.config.virtual_workers)
        return min(max(workers, self.config.min_workers), limit)

    def _member(self, worker: WorkerId, generation: int) -> WorkerView | None:
        """The member's view, if the message speaks of the current generation and the member still counts."""
        if self.generation is None or generation != self.generation.number:
            return None
        view = self._members.get(worker)
        return view if view is not None and view.alive else None


def _member(view: WorkerView) -> Member:
    ready = view.ready
    assert ready is not None
    return Member(view.worker, ready.node, ready.pid, ready.host, ready.store_port)


def _not_found(worker: WorkerId) -> str:
    return f"worker {worker.slot} was not found by the restarted controller"


def _view_of(status: Status, now: float) -> WorkerView:
    """A worker by its own account. Between its start in a generation and its joining, only who brought the state along
    has a whole one."""
    worker, generation = status.ready.worker, status.generation
    view = WorkerView(
        worker,
        requested_at=now,
        state=WorkerState.IDLE,
        node=status.ready.node,
        ready=status.ready,
        committed=status.committed,
        prepared=status.prepared,
        has_trained=generation is not None,
        initial=status.ready.initial,
        last_heard=now,
    )
    if generation is not None and not status.joined:
        sources = generation.holders + generation.roll_forward
        view.torn = generation.restore is not None or generation.rank_of(worker) not in sources
    elif generation is not None and generation.committed == 0:
        view.initial = f"of generation {generation.number}"
    return view
