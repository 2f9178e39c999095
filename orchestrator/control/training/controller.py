"""The controller's state machine: events in, actions out.

Everything is a function of the events and their times; see `orchestrator.control.training.protocol`. This module says
what each event means; what follows from it for the run is in `orchestrator.control.training.lifecycle`. A message costs
the same however many workers there are; what looks at all of them happens on a tick or when a membership changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monitoring.events import CheckpointDelayed, ResizeRequested, StopRequested
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
    Resize,
    Start,
    Stop,
    Tick,
)
from orchestrator.control.core.roster import Roster
from orchestrator.control.core.scale_up import ScaleUpBackoff
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training import failures
from orchestrator.control.training.alike import Alike
from orchestrator.control.training.attendance import Attendance
from orchestrator.control.training.history import History
from orchestrator.control.training.layouts import Layouts
from orchestrator.control.training.lifecycle import Lifecycle
from orchestrator.control.training.members import Members
from orchestrator.control.training.protocol import Action, Event, SaveRequested, TakeOver
from orchestrator.control.training.rebalance import Rebalancer
from orchestrator.control.training.run import Run
from orchestrator.control.training.run_record import RunRecord
from orchestrator.control.training.saving import Saving
from orchestrator.control.training.takeover import TakingOver
from orchestrator.control.training.views import ControllerConfig, Progress, RunState, WorkerView
from orchestrator.evaluation.judge import Judgement
from orchestrator.training.messages import (
    CheckpointSaved,
    Finalized,
    Generation,
    GpuTrouble,
    Heartbeat,
    Joined,
    Left,
    PartSaved,
    Ready,
    SaveBegun,
    SaveDelayed,
)


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
        layouts = Layouts(config)
        self._run = Run(
            config, self._roster, self._record, self._out, Saving(checkpoints or {}, config.save_every_s), layouts,
            Rebalancer(config.rebalance, layouts, config.term, config.total_steps), ScaleUpBackoff(config.scaling),
            target=config.within_limits(config.max_workers if history.target is None else history.target),
            alike=Alike(config.mixed_numerics), stop=history.stop,
        )  # fmt: skip
        if history.probe is not None:
            self._run.alike.learn(*history.probe)
        self._life = Lifecycle(self._run)
        self._staffing = self._life.staffing
        self._members = Members(self._run, self._life)
        self._attendance = Attendance(self._run, self._life)
        self._taking_over = TakingOver(self._run, self._life, self._members, history.warm)
        self._last_members = set(history.members)
        self._now: float | None = None
        self._ticked_at = 0.0

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
    def judged(self) -> Judgement:
        """What evaluations on record have come to."""
        return self._record.evaluations.judged

    @property
    def evaluated(self) -> int:
        """Of how many steps the newest evaluation on record is; -1: there is none."""
        return self.judged.step

    @property
    def checkpoints(self) -> dict[int, str]:
        return self._run.saving.checkpoints

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is under way."""
        return bool(self._run.saving.writing())

    @property
    def wants_room(self) -> WantsRoom:
        """Whether the run cannot train because there has been no room for long; "firmly", if what it has got holds
        state. As of the last tick."""
        return self._staffing.wants_room

    @property
    def gives_way_to(self) -> str:
        """Another run that is to have room before this one; "": none."""
        return self._staffing.gives_way_to

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
                self._life.begin(now)
            case TakeOver():
                self._taking_over.take(event, self._last_members, now)
            case Tick():
                self._tick(event, now)
            case Placed():
                self._out += self._roster.placed(event, now)
            case NodesStarting():
                self._roster.nodes_starting(now)
            case GiveWay():
                self._staffing.give_way(event.to, now)
            case Ready():
                self._attendance.ready(event, now)
            case Heartbeat():
                self._members.heartbeat(event, now)
                if event.trouble is not None:
                    self._attendance.gpu_trouble(event.trouble, now)
            case Joined():
                self._members.joined(event, now)
            case Left():
                self._members.left(event, now)
            case Died():
                self._attendance.died(event, now)
            case DrainNotice():
                self._attendance.notice(event, now)
            case GpuTrouble():
                self._attendance.gpu_trouble(event, now)
            case Resize():
                self._resize(event, now)
            case Stop():
                self._stop(event, now)
            case Abort():
                # Once a generation was formed, the job is known to be sound: it is that machine which is not.
                if self._record.last_generation < 0:
                    self._run.finish("failed", event.reason, now)
            case Finalized():
                self._members.finalized(event, now)
            case FaultFired():
                self._fault_fired(event)
            case SaveRequested():
                self._run.save_soon()
            case SaveDelayed():
                self._out.append(CheckpointDelayed(committed=event.committed))
            case SaveBegun() | PartSaved() | CheckpointSaved():
                self._saving(event, now)
                self._life.review_saves(now)
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
                    self._life.take_reports(event.reports, now)
                self._run.saving.wrote(event, now)
            case CheckpointSaved():
                self._out += self._run.saving.saved(event, now)

    def _skip_gap(self, gap_s: float, now: float) -> None:
        """The controller itself slept (an overloaded or suspended machine): nobody could be heard meanwhile, and no
        patience has run out."""
        self._roster.skip_gap(gap_s, now)
        self._life.skip_gap(gap_s, now)

    def _tick(self, event: Tick, now: float) -> None:
        run, roster, config, lateness_s = self._run, self._roster, self.config, event.lateness_s
        if event.asks_in_vain:
            self._out += roster.hold_requests(now - self._ticked_at if self._ticked_at else 0.0)
        else:
            roster.hold_no_more()
        self._ticked_at = now
        self._handle_failures(detection.find_hung(roster.alive(), config, now, lateness_s), now)
        self._handle_failures(failures.find_stalled(run.membership, config, self.progress, now, lateness_s), now)
        for view in detection.find_slow_starters(roster.alive(), config, now):
            late = f"not ready {config.start_timeout_s:.0f} s after it was placed (elastic.start_timeout_s)"
            self._out += roster.kill(view, late)
            self._life.start_failed("start timed out", now)
        self._find_slow_finishers(now)
        self._life.review_saves(now)
        self._staffing.fill(now)
        if not self._staffing.gives_way_to:
            self._out += roster.tell_shortage(now)
        self._staffing.look_for_room()
        self._life.reconsider(now)
        self._life.wait_no_longer(now)

    def _find_slow_finishers(self, now: float) -> None:
        if self.state is not RunState.FINALIZING or self._run.finalization is None:
            return
        found = failures.find_slow_finishers(self._run.finalization, self.config, now)
        for failure in found:
            self._life.handle_failure(failure, now)
        if found:
            self._life.count_failure(f"no final state within {self.config.finalize_timeout_s:.0f} s", 1 / 2, now)
            self._life.conclude(now)

    def _handle_failures(self, found: Sequence[Failure[WorkerView]], now: float) -> None:
        for failure in found:
            self._life.handle_failure(failure, now)
        if found:
            self._life.conclude(now)

    # ------------------------------------------------------------------------------------ requests

    def _resize(self, event: Resize, now: float) -> None:
        wanted = self.config.within_limits(event.workers)
        if wanted == self.target:
            return
        self._out.append(ResizeRequested(from_=self.target, to=wanted))
        self._run.target = wanted
        self._run.scale_up.asked_to_resize()
        self._staffing.fill(now)
        self._life.reconsider(now)

    def _stop(self, event: Stop, now: float) -> None:
        if self._run.stop is None:
            self._out.append(StopRequested(reason=event.reason))
            self._life.end_early(event.reason, now)
            self._life.conclude(now)

    def _fault_fired(self, event: FaultFired) -> None:
        view = self.workers.get(event.worker) if event.worker is not None else None
        if view is not None:
            view.fault_at, view.fault_committed = event.at, None
        self._out += self._record.fault_fired(event)
