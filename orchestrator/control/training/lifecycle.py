"""The life of a run: its states and what leads from one to the next.

A run goes WAITING -> FORMING -> RUNNING, and from there to SETTLING whenever the membership must change: all members
leave the generation (by agreement at a step boundary, or by interruption), the run looks at who is left and at what
state they hold, and forms the next generation or waits for workers. It ends through FINALIZING.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.control.core.detection import Failure
from orchestrator.control.core.machine import WantsRoom
from orchestrator.control.core.protocol import Finish, Record
from orchestrator.control.core.roster import Roster
from orchestrator.control.core.scale_up import ScaleUpBackoff
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training import failures, forming, policy, state
from orchestrator.control.training.finalizing import Finalization
from orchestrator.control.training.forming import Ranks
from orchestrator.control.training.history import History
from orchestrator.control.training.layouts import Layouts, memory_of
from orchestrator.control.training.membership import Membership
from orchestrator.control.training.protocol import Action
from orchestrator.control.training.rebalance import Rebalancer
from orchestrator.control.training.run_record import RunRecord
from orchestrator.control.training.saving import Saving
from orchestrator.control.training.state import Origin
from orchestrator.control.training.views import ControllerConfig, RunState, WorkerView
from orchestrator.planning.balance import Assignment
from orchestrator.training.messages import Left, PartSaved, Ready, SavePlan, StepReport
from orchestrator.training.orders import Finalize, RequestSave, SaveState, StartGeneration


@dataclass(frozen=True)
class _Early:
    """It was too early for a first generation: `wanted` workers would be enough, for what was known of their memory and
    of the model, while nobody is removed. As long as others start, fewer are not."""

    wanted: int
    has_costs: bool
    memory_bytes: int
    num_removed: int

    def is_like(self, ready: Ready) -> bool:
        """Whether the wanted number is the same with this worker too."""
        return self.has_costs >= (ready.costs is not None) and ready.memory_bytes == self.memory_bytes


class Lifecycle:
    """Where the run is; what is decided goes to the end of `out`.

    `target` is the number of workers wanted, `stop` why the run is to end early (None: it is not).
    """

    def __init__(
        self,
        config: ControllerConfig,
        history: History,
        roster: Roster[WorkerView],
        record: RunRecord,
        checkpoints: Mapping[int, str],
        out: list[Action],
    ) -> None:
        self.config = config
        self.state = RunState.WAITING
        self.status: str | None = None
        self.target = config.within_limits(config.max_workers if history.target is None else history.target)
        self.stop = history.stop
        self.membership = Membership()
        self.finalization: Finalization | None = None
        self.saving = Saving(checkpoints, config.save_every_s)
        self.waiting_since: float | None = None
        self.gives_way_to = ""
        self.wants_room: WantsRoom = "no"
        self._early: _Early | None = None
        self._has_run = False
        self._layouts = Layouts(config)
        self.scale_up = ScaleUpBackoff(config.scaling)
        self.balance = Rebalancer(config.rebalance, self._layouts, config.term, config.total_steps)
        self._roster = roster
        self._record = record
        self._out = out

    # ------------------------------------------------------------------------------------ beginnings

    def begin(self, now: float) -> None:
        """A run begun anew has the size of its job file and no wish to stop, whatever was asked of the last one."""
        self.stop, self.target = None, self.config.within_limits(self.config.max_workers)
        self.waiting_since = now
        self.fill(now)

    def resume(self, membership: Membership, now: float, *, intact: bool, assignment: Assignment = ()) -> None:
        """A generation of an earlier controller goes on, or is over when it is not `intact`. `assignment` is the newest
        deal that its members know of."""
        self.membership, self._has_run = membership, True
        if membership.generation is not None and not membership.generation.collect:
            self._layouts.trains(membership.generation)
            self.balance.begin(membership.generation, assignment)
            self.balance.evicting |= {view.worker for view in self._roster.alive() if view.evicting}
        if not intact:
            # Everyone is told to leave by the caller; the time to obey runs from here.
            self.state, membership.interrupted_at = RunState.SETTLING, now
        else:
            self.state = RunState.FORMING if membership.unjoined else RunState.RUNNING

    def skip_gap(self, gap_s: float, now: float) -> None:
        """The controller slept for `gap_s` seconds, which count for nothing."""
        self.membership.skip_gap(gap_s, now)
        if self.finalization is not None:
            self.finalization.skip_gap(gap_s)
        self.saving.skip_gap(gap_s)
        if self.waiting_since is not None:
            self.waiting_since += gap_s

    # ------------------------------------------------------------------------------------ steps and losses

    def take_reports(self, reports: Iterable[StepReport], now: float, *, is_over: bool = False) -> None:
        """Puts on record what is not on it yet. Once its generation `is_over`, nothing follows from how it went."""
        for report in reports:
            if actions := self._record.commit(report):
                self.membership.moved_at = now
                self._out += actions
                self.balance.learn(actions)
                self.scale_up.learn(actions, now)
                if not is_over:
                    self._weigh(report, now)

    def _weigh(self, report: StepReport, now: float) -> None:
        """Looks at what ranks spent on a step, and acts on uneven speeds."""
        generation = self.membership.generation
        if self.state is not RunState.RUNNING or generation is None or generation.collect or self.stop is not None:
            return
        verdict = self.balance.observe(report, generation, self._roster.workers)
        self._out += verdict.actions
        for worker in verdict.evict:
            self._roster.evict(worker)
        for worker in verdict.keep_on:
            self._roster.keep_on(worker)
        if verdict.evict or verdict.keep_on:
            self.fill(now)
            self.adjust(now)
        if verdict.cut is not None and self.state is RunState.RUNNING:
            self._layouts.cut_like(verdict.cut)
            stages = ", ".join(f"{stop - start}" for start, stop in verdict.cut.parts)
            self._out += self._record.incident("rebalance", f"stages are cut anew: {stages} blocks", now)
            self.pause()

    def handle_failure(self, failure: Failure[WorkerView], now: float) -> None:
        """Acts on trouble. Callers `conclude` when they are through with all there is.

        Losing a member is an incident, and so is losing the last holder of the state.
        """
        if failure.pending:
            self.membership.stalled_since = failure.at
            self.settle(now, interrupt=True)
            return
        told, breaks = not failure.quiet, True
        if failure.view is not None and not failure.spared:
            told, breaks = told and self.is_missed(failure.view), self._breaks_with(failure.view)
            self.scale_up.lost(failure.view, now)
            self._remove(failure.view, failure.kill)
        if told:
            self._out += self._record.incident(failure.kind, failure.cause, now, failure.view, failure.at)
        if breaks:
            self.settle(now, interrupt=True)
            if failure.weight:
                self.count_failure(failure.failure or failure.cause, failure.weight, now)

    def is_missed(self, view: WorkerView) -> bool:
        """Whether the run is the worse for losing this worker."""
        if view.worker in self.membership.members:
            return True
        if view.state is not WorkerState.IDLE or self.state not in (RunState.WAITING, RunState.FINALIZING):
            return False
        return state.is_last_holder(view, self._roster.idle(), self._record.progress)

    def _breaks_with(self, view: WorkerView) -> bool:
        """Whether the generation is over without this worker: it is still inside, or it is out because it raised."""
        if view.worker not in self.membership.members:
            return False
        return view.worker in self.membership.inside or (view.left is not None and view.left.cause == "exception")

    def _remove(self, view: WorkerView, kill: str | None) -> None:
        if kill is None:
            self._roster.remove(view)
        else:
            self._out += self._roster.kill(view, kill)
        self.membership.remove(view.worker)

    def count_failure(self, detail: str, weight: float, now: float) -> None:
        """The step failed; too often, and the run ends."""
        reason = self._record.step_failed(detail, weight)
        if reason is not None:
            self.finish("failed", reason, now)

    def start_failed(self, detail: str, now: float) -> None:
        """A worker could not be started; too many in a row, and nobody trains meanwhile, and the run ends."""
        reason = self._roster.start_failed(detail, now)
        if reason is not None and not self.membership.members:
            self.finish("failed", reason, now)

    # ------------------------------------------------------------------------------------ workers

    def fill(self, now: float) -> None:
        """Sees to it that there are as many workers as are wanted."""
        if self.stop is not None or self.state in (RunState.FINALIZING, RunState.OVER) or self._collecting:
            self._out += self._roster.withdraw("the run ends")
            return
        if self.gives_way_to:
            return  # It has nobody, and asks for nobody.
        # The first generation does not share its start-up with workers that would only wait.
        wanted = self._wanted() + (self.config.standby if self._has_run else 0)
        self._out += self._roster.fill(
            wanted, self.membership.members, now, needed=self._needed, may_leave=self._may_leave, worth=_worth
        )

    def look_for_room(self) -> None:
        """Sees whether those that have a place are too few to train with, while there has been none for others for
        long: "firmly" so when some hold state, which would be lost if they gave their places back."""
        self.wants_room = "no"
        if self.state is not RunState.WAITING or self.stop is not None or not self._roster.is_short:
            return
        placed = [view for view in self._roster.alive() if view.state is not WorkerState.REQUESTED]
        able = len(policy.whole_units(placed, self.config)) * self.config.tensor
        if able < self._layouts.fewest(self.config.least, placed):
            self.wants_room = "firmly" if any(view.has_state for view in placed) else "yes"

    def give_way(self, to: str, now: float) -> None:
        """Gives back all places, for another run that waits too, and asks for none until `to` is ""; unless there has
        been room meanwhile."""
        self.look_for_room()
        if to and self.wants_room != "yes":
            return
        if to and not self.gives_way_to:
            gone = self._roster.alive()
            self._out.append(Record("gave_way", {"to": to, "workers": [view.worker.slot for view in gone]}))
            for view in gone:
                self._out += self._roster.release(view, "another run has the room first")
        elif not to and self.gives_way_to:
            self._out.append(Record("gives_way_no_more", {"to": self.gives_way_to}))
        self.gives_way_to = to
        self.fill(now)

    def _wanted(self) -> int:
        """The target, or what the smallest layout takes if that is more; but no more than have work in the layout that
        is best for so many."""
        alive = self._roster.alive()
        most = self._layouts.fewest(self.target, alive)
        if self._layouts.costs(alive) is None:
            return most  # Nobody is there who could say what the model costs, or there is only one way to lay it out.
        useful = self._layouts.ranks(most, alive)
        return max(useful, self._layouts.fewest(self.config.least, alive)) if useful else most

    def _may_leave(self, view: WorkerView) -> bool:
        """Whether an idle worker is of no use if it cannot stay: the next generation may need its state, and a
        checkpoint its part."""
        if view.worker in self.saving.writing():
            return False
        if self.state is RunState.SETTLING:
            return False
        if self.state is RunState.FORMING:
            return not view.holds_part
        return self.state is not RunState.WAITING or not view.has_state

    def _needed(self) -> Collection[WorkerId]:
        """Idle workers that hold the state of the next generation: one that holds all of it, or whoever holds a part,
        until there is a generation in which others do."""
        idle = self._roster.idle()
        if self.state not in (RunState.WAITING, RunState.SETTLING, RunState.FORMING):
            return self.saving.writing()
        parts = {view.worker for view in idle if view.holds_part} | self.saving.writing()
        origin = state.state_at_hand(idle, self._record.progress)
        if origin is None or not origin.committed or self.state is RunState.FORMING:
            return parts
        everything = origin.everything
        parts |= {worker for worker, held in origin.held.items() if held != everything}
        return parts | set(sorted(worker for worker, held in origin.held.items() if held == everything)[:1])

    @property
    def _collecting(self) -> bool:
        """Whether the generation there is trains no more."""
        generation = self.membership.generation
        under_way = self.state in (RunState.FORMING, RunState.RUNNING, RunState.SETTLING)
        return generation is not None and generation.collect and under_way

    # ------------------------------------------------------------------------------------ forming a generation

    def reconsider(self, now: float) -> None:
        """There may be reason for another membership than there is."""
        if self.state is RunState.WAITING:
            self.try_form(now)
        else:
            self.adjust(now)

    def warm(self, ready: Ready, now: float) -> None:
        """A worker is warm. Of thousands that come one by one, most make no difference, and get no second look."""
        early = self._early
        if self.state is RunState.WAITING and early is not None and self._roster.num_starting:
            same = early.num_removed == self._roster.num_removed and early.is_like(ready)
            if same and self.stop is None and self._roster.num_warm < early.wanted:
                return
        is_settled = not self._roster.any_leaving and not self.membership.spares
        if self.state is RunState.RUNNING and is_settled and not self.scale_up.may_grow(now):
            return
        self.reconsider(now)

    def try_form(self, now: float) -> None:
        """The run waits for workers: forms a generation if it is time."""
        if self.stop is not None:
            self._after_settled(now)
            return
        waited_s = now - (self.waiting_since if self.waiting_since is not None else now)
        idle, wanted = self._roster.idle(), self._wanted()
        least = self._layouts.fewest(self.config.least, idle)
        self._early = None
        if policy.time_to_form(self._roster.alive(), wanted, least, waited_s, self.config, now):
            self._form(now)
        elif not any(view.has_trained for view in idle):
            costs, memory_bytes = self._layouts.costs(idle), memory_of(idle)
            self._early = _Early(wanted, costs is not None, memory_bytes, self._roster.num_removed)

    def wait_no_longer(self, now: float) -> None:
        """Ends a run that has waited for workers as long as its job allows."""
        limit = self.config.wait_timeout_s
        if self.state is not RunState.WAITING or limit is None or self.waiting_since is None:
            return
        if now - self.waiting_since > limit:
            self.finish(
                "failed",
                f"waited {limit:.0f} s for {self.config.min_workers} workers "
                f"(elastic.workers.min), {len(self._roster.idle())} were there",
                now,
            )

    def _form(self, now: float) -> None:
        """Forms a generation from the newest state there is: that of living workers, or a newer one in storage."""
        record, recorded = self._record, self._record.progress.committed
        self._out += state.refuse_unrecorded(self._roster.idle(), recorded)
        idle = self._roster.idle()
        origin = state.newest_state(idle, record.progress, self.saving.checkpoints)
        assert origin is not None, "workers can always make the state of step 0"
        ranks = forming.choose_ranks(idle, origin, self.target, self._layouts, now, self.balance.deal)
        if ranks is None:
            if (refusal := self._layouts.refusal(self._wanted(), idle)) is not None:
                self.finish("failed", refusal, now)
            return
        self._out += record.roll_back(origin.committed, now)
        self._start_generation(origin, ranks, now, steps_lost=recorded - origin.committed)
        self.fill(now)

    def _start_generation(
        self, origin: Origin, ranks: Ranks, now: float, *, steps_lost: int = 0, collect: bool = False
    ) -> None:
        record = self._record
        record.last_generation += 1
        causes = "; ".join(incident.cause for incident in record.incidents.unanswered())
        otherwise = "collect" if collect else "start" if self.membership.generation is None else "regroup"
        generation = forming.make_generation(
            record.last_generation, self.config.term, causes or otherwise, origin, ranks, record.fired_faults,
            collect=collect,
        )  # fmt: skip
        if not collect:
            self._layouts.trains(generation)
        record.incidents.answered(generation.number, origin.source(steps_lost), origin.committed)
        self.membership = Membership.formed(generation, ranks.members, now)
        self.state = RunState.FORMING
        self._out += [
            forming.generation_record(generation, origin, ranks.num_idle, steps_lost),
            StartGeneration(generation),
        ]

    def train(self, now: float) -> None:
        """All members have joined."""
        assert self.membership.generation is not None
        if not self._has_run:
            for view in self.membership.members.values():
                view.joined_at = None  # All are new, and none has joined the others.
        self.state, self._has_run = RunState.RUNNING, True
        self._out.append(Record("generation_running", {"generation": self.membership.generation.number}))
        if self._collecting:
            return
        self.scale_up.changed(now)
        self.balance.begin(self.membership.generation)
        if self.stop is not None:
            self.pause()
        else:
            self._order_save()
            self.adjust(now)

    def adjust(self, now: float) -> None:
        """While a generation runs: is there a better membership to change to at the next step boundary?"""
        generation = self.membership.generation
        if self.state is not RunState.RUNNING or self.stop is not None or generation is None or generation.collect:
            return
        members, spares = list(self.membership.members.values()), self.membership.spares
        change = policy.wanted_change(members, spares, self._roster.idle(), self._wanted(), self._layouts, now)
        if change is None or (change[0] == "grow" and not self.scale_up.may_grow(now)):
            return
        kind, cause = change
        if kind not in ("drain", "handover"):
            self._out += self._record.incident(kind, cause, now)
        self.pause()

    # ------------------------------------------------------------------------------------ leaving a generation

    def pause(self) -> None:
        """All members leave at the next step boundary, by agreement in the vote."""
        self._order_save()
        self.state = RunState.SETTLING
        self._out += self.membership.pause()

    def settle(self, now: float, *, interrupt: bool) -> None:
        """The generation is over; with `interrupt` whoever is still in it is told to break out."""
        if self.state not in (RunState.FORMING, RunState.RUNNING, RunState.SETTLING):
            return
        self.state = RunState.SETTLING
        if interrupt:
            self._out += self.membership.interrupt(now)

    def conclude(self, now: float) -> None:
        """Goes on when nobody is left to wait for."""
        if self.state is RunState.SETTLING and not self.membership.inside:
            self._after_settled(now)
        elif self.state is RunState.FINALIZING:
            self._check_finalized(now)

    def end_early(self, reason: str, now: float) -> None:
        """Somebody wants the run to end. While a generation forms or settles, that takes its turn after it."""
        self.stop = reason
        self.save_soon()
        if self.state is RunState.RUNNING and not self._collecting:
            self.pause()
        elif self.state is RunState.WAITING:
            self._after_settled(now)
        elif self.state is RunState.FINALIZING and self.finalization is not None:
            # All is done but for a storage that may refuse it: it is not waited for any longer.
            self.saving.try_no_more(self.finalization.committed)

    def _after_settled(self, now: float) -> None:
        """No member is in the generation any more: finish, stop, or form the next one."""
        lefts = self.membership.dissolve()
        progress = self._record.progress
        self._out += state.refuse_unrecorded(self._roster.idle(), progress.committed)
        self._end_raisers(lefts)
        final = state.final_state(
            self._roster.idle(), progress, self.config.total_steps, stopping=self.stop is not None
        )
        if final is not None:
            self._finalize(final, lefts, now)
            return
        if self.stop is not None:
            self.finish("stopped", self.stop, now)
            return
        self._explain(lefts, now)
        if self.state is RunState.OVER:
            return
        self.state = RunState.WAITING
        self.waiting_since = now
        self.fill(now)
        self.try_form(now)
        if self.state is RunState.WAITING:
            idle = len(self._roster.idle())
            self._out.append(Record("waiting", {"workers": idle, "needed": self.config.least}))

    def _end_raisers(self, lefts: Iterable[Left]) -> None:
        """Members that raised and might have held state alone: now that all have said what they hold, those go that
        others can do without."""
        generation = self.membership.generation
        if generation is None or generation.layout.is_replicated:
            return
        for left in lefts:
            view = self._roster.living(left.worker)
            if left.cause != "exception" or view is None:
                continue
            rest = [other for other in self._roster.idle() if other is not view]
            before = state.state_at_hand([*rest, view], self._record.progress)
            after = state.state_at_hand(rest, self._record.progress)
            if before is not None and after is not None and after.committed >= before.committed:
                self._out += self._roster.kill(view, f"its step raised: {left.detail}")

    def _explain(self, lefts: list[Left], now: float) -> None:
        """Every generation ends for a reason; when nothing else is known to have happened, it was the network."""
        if self._record.incidents.unanswered() or any(left.cause == "restore" for left in lefts):
            return
        if (since := self.membership.stalled_since) is not None:
            self.handle_failure(failures.nobodys_stall(since, now), now)
        elif (failure := failures.lost_each_other(lefts, now)) is not None:
            self.handle_failure(failure, now)

    # ------------------------------------------------------------------------------------ checkpoints

    def save_soon(self) -> None:
        """There is reason to save at the next step boundary."""
        if self.config.checkpointing:
            self.saving.is_due = True
            self._order_save()

    def _order_save(self) -> None:
        generation = self.membership.generation
        if self.state is not RunState.RUNNING or generation is None or generation.collect:
            return
        if self.saving.order(generation.number):
            self._out.append(RequestSave(tuple(sorted(self.membership.inside)), generation.number))

    def review_saves(self, now: float) -> None:
        """What is under way goes on, and what is due is begun."""
        if self.state is RunState.RUNNING:
            self.saving.tick(now)
        alive = self._roster.alive()
        hands = {view.worker for view in alive if view.state in (WorkerState.IDLE, WorkerState.MEMBER)}
        self._out += self.saving.review(hands, {view.worker for view in alive}, now)
        self._order_save()
        if self.state is RunState.FINALIZING and self.finalization is not None:
            self._out += self.saving.give_up(self.finalization.committed, now, self.config.finalize_timeout_s)
            self._save_final(now)
            self.conclude(now)

    def recall_saves(self, parts: list[PartSaved], now: float) -> None:
        """What the workers of an earlier controller wrote last. What is older has been dealt with."""
        newest = max((part.plan.save for part in parts), key=lambda save: (save.term, *save), default=None)
        for part in parts:
            if part.plan.save == newest:
                self.saving.wrote(part, now)
        self.review_saves(now)

    def _save_final(self, now: float) -> None:
        """The state that the run ends with is saved by those that have it, unless it was at its last step boundary."""
        asked = self.finalization
        if not self.config.checkpointing or asked is None or not (writers := tuple(asked.living())):
            return
        if now - asked.since > self.config.final_patience_s:
            self.saving.try_no_more(asked.committed)
        save = self.saving.attempt_at(asked.committed, self.config.term, self._record.last_generation, now)
        if save is not None:
            self.saving.expect(SavePlan(save, writers), now)
            self._out.append(SaveState(writers, save))

    # ------------------------------------------------------------------------------------ the end

    def _finalize(self, final: Origin, lefts: list[Left], now: float) -> None:
        """Asks those that have all of the final state; when nobody has, one of those that have parts is given all."""
        idle, generation = self._roster.idle(), self.membership.generation
        assert generation is not None, "it has been trained"
        if holders := state.whole_holders(final, idle):
            self.state = RunState.FINALIZING
            self.finalization = Finalization(final.committed, holders, now)
            self._out.append(Finalize(tuple(self.finalization.asked)))
            self._save_final(now)
            return
        if generation.collect:
            # Another try; what fails again and again must come to an end.
            self._explain(lefts, now)
        if self.state is not RunState.OVER:
            ranks = forming.collect_ranks(idle, final, generation.layout.virtual_workers)
            self._start_generation(final, ranks, now, collect=True)

    def _check_finalized(self, now: float) -> None:
        assert self.finalization is not None
        if self.finalization.unanswered():
            return
        digests = self.finalization.digests()
        if digests and self._may_yet_be_saved(self.finalization.committed):
            return
        if not digests:
            # The last holders died while they were asked: back to the newest checkpoint.
            self._after_settled(now)
        elif len(set(digests.values())) > 1:
            shown = ", ".join(f"worker {worker.slot}: {digest[:23]}" for worker, digest in digests.items())
            self.finish("failed", f"the workers' final states differ, which must never happen: {shown}", now)
        else:
            self._end_well(self.finalization.committed, next(iter(digests.values())), now)

    def _may_yet_be_saved(self, committed: int) -> bool:
        """Whether a checkpoint of the final state is under way, or is tried again: the workers hold it meanwhile."""
        if not self.config.checkpointing or committed in self.saving.checkpoints:
            return False
        return self.saving.is_saving(committed) or not self.saving.has_given_up(committed)

    def _end_well(self, committed: int, digest: str, now: float) -> None:
        """The steps are done and their digest is known; but who has no checkpoint of them has nothing of the last."""
        is_early = self.stop is not None and self._record.progress.committed < self.config.total_steps
        status, reason = ("stopped", self.stop or "") if is_early else ("finished", "all steps committed")
        saved = self.saving.checkpoints
        if self.config.checkpointing and committed not in saved:
            newest = f"the newest checkpoint is of {max(saved)} steps" if saved else "there is no checkpoint"
            reason = (
                f"{reason}, but the state of {committed} steps could not be saved: "
                f"{self.saving.why_unsaved(committed)}; {newest}, and `orchestrator resume` trains the rest again"
            )
            status = "failed"
        self.finish(status, reason, now, digest)

    def finish(self, status: str, reason: str, now: float, digest: str | None = None) -> None:
        if self.state is RunState.OVER:
            return
        if status != "failed" or digest is not None:
            self._out += self._record.close(now)
        self.state, self.status = RunState.OVER, status
        self._out.append(Finish(status, reason, digest))


def _worth(unit: Sequence[WorkerView]) -> tuple[bool, int]:
    """How much a unit has of training: the idle ones may hold the state of the next generation."""
    return any(view.has_state for view in unit), max(view.committed for view in unit)
