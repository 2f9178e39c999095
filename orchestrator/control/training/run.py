"""Where a run is: all that its decisions change, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.control.core.protocol import Finish
from orchestrator.control.core.roster import Roster
from orchestrator.control.core.scale_up import ScaleUpBackoff
from orchestrator.control.training.alike import Alike
from orchestrator.control.training.finalizing import Finalization
from orchestrator.control.training.layouts import Layouts
from orchestrator.control.training.membership import Membership
from orchestrator.control.training.protocol import Action
from orchestrator.control.training.rebalance import Rebalancer
from orchestrator.control.training.run_record import RunRecord
from orchestrator.control.training.saving import Saving
from orchestrator.control.training.views import ControllerConfig, RunState, WorkerView
from orchestrator.training.orders import RequestSave


@dataclass
class Run:
    """`target` is the number of workers wanted, `stop` why the run is to end early (None: it is not), `status` how it
    ended; `waiting_since` is when it last began to wait for workers, and it `has_run` once a generation has trained.
    What is decided goes to the end of `out`.

    More than 15 attributes: what each room of decisions keeps has a class of its own, and this is where they meet."""

    config: ControllerConfig
    roster: Roster[WorkerView]
    record: RunRecord
    out: list[Action]
    saving: Saving
    layouts: Layouts
    balance: Rebalancer
    scale_up: ScaleUpBackoff
    target: int
    alike: Alike = field(default_factory=Alike)
    stop: str | None = None
    state: RunState = RunState.WAITING
    status: str | None = None
    membership: Membership = field(default_factory=Membership)
    finalization: Finalization | None = None
    waiting_since: float | None = None
    has_run: bool = False

    @property
    def last_step(self) -> int:
        """How many steps the run has: what the job says, or fewer where it stops early by its evaluations."""
        ends_at = self.record.evaluations.ends_at
        return self.config.total_steps if ends_at is None else ends_at

    @property
    def is_collecting(self) -> bool:
        """Whether the generation there is trains no more."""
        generation = self.membership.generation
        under_way = self.state in (RunState.FORMING, RunState.RUNNING, RunState.SETTLING)
        return generation is not None and generation.collect and under_way

    def finish(self, status: str, reason: str, now: float, digest: str | None = None) -> None:
        """It is over, once. `digest` is that of its final state, if it has one."""
        if self.state is RunState.OVER:
            return
        if status != "failed" or digest is not None:
            self.out += self.record.close(now)
        self.state, self.status = RunState.OVER, status
        self.out.append(Finish(status, reason, digest))

    def save_soon(self) -> None:
        """There is reason to save at the next step boundary."""
        self.saving.is_due = True
        self.order_save()

    def order_save(self) -> None:
        """Tells the members of the generation that a save is due, once."""
        generation = self.membership.generation
        if self.state is not RunState.RUNNING or generation is None or generation.collect:
            return
        if self.saving.order(generation.number):
            self.out.append(RequestSave(tuple(sorted(self.membership.inside)), generation.number))
