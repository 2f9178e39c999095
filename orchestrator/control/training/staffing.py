"""How many workers there are to be, and which of them: asked for, kept, let go, given up for another run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from monitoring.events import GaveWay, GivesWayNoMore
from orchestrator.control.core.machine import WantsRoom
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training import policy, state
from orchestrator.control.training.run import Run
from orchestrator.control.training.views import RunState, WorkerView


class Staffing:
    """`gives_way_to` is another run that has room before this one ("": none), `wants_room` as of the last look."""

    def __init__(self, run: Run) -> None:
        self.gives_way_to = ""
        self.wants_room: WantsRoom = "no"
        self._run = run

    def fill(self, now: float) -> None:
        """Sees to it that there are as many workers as are wanted."""
        run = self._run
        if run.stop is not None or run.state in (RunState.FINALIZING, RunState.OVER) or run.is_collecting:
            run.out += run.roster.withdraw("the run ends")
            return
        if self.gives_way_to:
            return  # It has nobody, and asks for nobody.
        # The first generation does not share its start-up with workers that would only wait.
        wanted = self.wanted() + (run.config.standby if run.has_run else 0)
        run.out += run.roster.fill(
            wanted, run.membership.members, now, needed=self._needed, may_leave=self._may_leave, worth=_worth
        )

    def look_for_room(self) -> None:
        """Sees whether those that have a place are too few to train with, while there has been none for others for
        long: "firmly" so when some hold state, which would be lost if they gave their places back."""
        run = self._run
        self.wants_room = "no"
        if run.state is not RunState.WAITING or run.stop is not None or not run.roster.is_short:
            return
        placed = [view for view in run.roster.alive() if view.state is not WorkerState.REQUESTED]
        able = len(policy.whole_units(placed, run.config)) * run.config.tensor
        if able < run.layouts.fewest(run.config.least, placed):
            self.wants_room = "firmly" if any(view.has_state for view in placed) else "yes"

    def give_way(self, to: str, now: float) -> None:
        """Gives back all places, for another run that waits too, and asks for none until `to` is ""; unless there has
        been room meanwhile."""
        run = self._run
        self.look_for_room()
        if to and self.wants_room != "yes":
            return
        if to and not self.gives_way_to:
            gone = run.roster.alive()
            run.out.append(GaveWay(to=to, workers=[view.worker.slot for view in gone]))
            for view in gone:
                run.out += run.roster.release(view, "another run has the room first")
        elif not to and self.gives_way_to:
            run.out.append(GivesWayNoMore(to=self.gives_way_to))
        self.gives_way_to = to
        self.fill(now)

    def wanted(self) -> int:
        """The target, or what the smallest layout takes if that is more; but no more than have work in the layout that
        is best for this many."""
        run = self._run
        alive = run.roster.alive()
        most = run.layouts.fewest(run.target, alive)
        if run.layouts.costs(alive) is None:
            return most  # Nobody is there who could say what the model costs, or there is only one way to lay it out.
        useful = run.layouts.ranks(most, alive)
        return max(useful, run.layouts.fewest(run.config.least, alive)) if useful else most

    def _may_leave(self, view: WorkerView) -> bool:
        """Whether an idle worker is of no use if it cannot stay: the next generation may need its state, and a
        checkpoint its part."""
        run = self._run
        if view.worker in run.saving.writing():
            return False
        if run.state is RunState.SETTLING:
            return False
        if run.state is RunState.FORMING:
            return not view.holds_part
        return run.state is not RunState.WAITING or not view.has_state

    def _needed(self) -> Collection[WorkerId]:
        """Idle workers that hold the state of the next generation: one that holds all of it, or all that hold a part,
        until there is a generation in which others do."""
        run = self._run
        idle = run.roster.idle()
        if run.state not in (RunState.WAITING, RunState.SETTLING, RunState.FORMING):
            return run.saving.writing()
        parts = {view.worker for view in idle if view.holds_part} | run.saving.writing()
        origin = state.state_at_hand(idle, run.record.progress)
        if origin is None or not origin.committed or run.state is RunState.FORMING:
            return parts
        everything = origin.everything
        parts |= {worker for worker, held in origin.held.items() if held != everything}
        return parts | set(sorted(worker for worker, held in origin.held.items() if held == everything)[:1])


def _worth(unit: Sequence[WorkerView]) -> tuple[bool, int]:
    """How much a unit has of training: the idle ones may hold the state of the next generation."""
    return any(view.has_state for view in unit), max(view.committed for view in unit)
