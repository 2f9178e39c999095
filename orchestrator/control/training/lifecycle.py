"""The life of a run: its states and what leads from one to the next.

A run goes WAITING -> FORMING -> RUNNING, and from there to SETTLING whenever the membership must change: all members
leave the generation (by agreement at a step boundary, or by interruption), the run looks at who is left and at what
state they hold, and forms the next generation or waits for workers. It ends through FINALIZING.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from monitoring.events import GenerationRunning, Waiting
from orchestrator.control.core.detection import Failure
from orchestrator.control.core.workers import WorkerState
from orchestrator.control.training import failures, forming, policy, state
from orchestrator.control.training.ending import Ending
from orchestrator.control.training.forming import Ranks
from orchestrator.control.training.layouts import memory_of
from orchestrator.control.training.membership import Membership
from orchestrator.control.training.run import Run
from orchestrator.control.training.staffing import Staffing
from orchestrator.control.training.state import Origin
from orchestrator.control.training.views import RunState, WorkerView
from orchestrator.planning.balance import Assignment
from orchestrator.training.messages import EvaluationReport, Left, PartSaved, Ready, StepReport
from orchestrator.training.orders import StartGeneration


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
    """What leads from one state of `run` to the next. More than 300 lines: forming a generation, losing it and going on
    from what is left is one story, whose parts call one another."""

    def __init__(self, run: Run) -> None:
        self.staffing = Staffing(run)
        self._run = run
        self._ending = Ending(run)
        self._early: _Early | None = None

    # ------------------------------------------------------------------------------------ beginnings

    def begin(self, now: float) -> None:
        """A run begun anew has the size of its job file and no wish to stop, whatever was asked of the last one."""
        run = self._run
        run.stop, run.target = None, run.config.within_limits(run.config.max_workers)
        run.waiting_since = now
        self.staffing.fill(now)

    def resume(self, membership: Membership, now: float, *, intact: bool, assignment: Assignment = ()) -> None:
        """A generation of an earlier controller goes on, or is over when it is not `intact`. `assignment` is the newest
        deal that its members know of."""
        run = self._run
        run.membership, run.has_run = membership, True
        if membership.generation is not None and not membership.generation.collect:
            run.layouts.trains(membership.generation)
            run.balance.begin(membership.generation, assignment)
            run.balance.evicting |= {v.worker for v in run.roster.alive() if v.evicting and not v.faulty}
        if not intact:
            # Everyone is told to leave by the caller; the time to obey runs from here.
            run.state, membership.interrupted_at = RunState.SETTLING, now
        else:
            run.state = RunState.FORMING if membership.unjoined else RunState.RUNNING

    def skip_gap(self, gap_s: float, now: float) -> None:
        """The controller slept for `gap_s` seconds, which count for nothing."""
        run = self._run
        run.membership.skip_gap(gap_s, now)
        if run.finalization is not None:
            run.finalization.skip_gap(gap_s)
        run.saving.skip_gap(gap_s)
        if run.waiting_since is not None:
            run.waiting_since += gap_s

    # ------------------------------------------------------------------------------------ steps and losses

    def take_reports(self, reports: Iterable[StepReport], now: float, *, is_over: bool = False) -> None:
        """Puts on record what is not on it yet. Once its generation `is_over`, nothing follows from how it went."""
        run = self._run
        for report in reports:
            if actions := run.record.commit(report):
                run.membership.moved_at = now
                run.out += actions
                run.balance.learn(actions)
                run.scale_up.learn(actions, now)
                if not is_over:
                    self._weigh(report, now)

    def take_evaluations(self, reports: Iterable[EvaluationReport]) -> None:
        """Puts on record what is not on it yet."""
        record = self._run.record
        for report in reports:
            self._run.out += record.evaluations.take(report, record.progress.committed)

    def _weigh(self, report: StepReport, now: float) -> None:
        """Looks at what ranks spent on a step, and acts on uneven speeds."""
        run = self._run
        generation = run.membership.generation
        if run.state is not RunState.RUNNING or generation is None or generation.collect or run.stop is not None:
            return
        verdict = run.balance.observe(report, generation, run.roster.workers)
        run.out += verdict.actions
        for worker in verdict.evict:
            run.roster.evict(worker)
        for worker in verdict.keep_on:
            run.roster.keep_on(worker)
        if verdict.evict or verdict.keep_on:
            self.staffing.fill(now)
            self.adjust(now)
        if verdict.cut is not None and run.state is RunState.RUNNING:
            run.layouts.cut_like(verdict.cut)
            stages = ", ".join(f"{stop - start}" for start, stop in verdict.cut.parts)
            run.out += run.record.incident("rebalance", f"stages are cut anew: {stages} blocks", now)
            self.pause()

    def handle_failure(self, failure: Failure[WorkerView], now: float) -> None:
        """Acts on trouble. Callers `conclude` when they are through with all there is.

        Losing a member is an incident, and so is losing the last holder of the state.
        """
        run = self._run
        if failure.pending:
            run.membership.stalled_since = failure.at
            self.settle(now, interrupt=True)
            return
        told, breaks = not failure.quiet, True
        if failure.view is not None and not failure.spared:
            told, breaks = told and self.is_missed(failure.view), self._breaks_with(failure.view)
            run.scale_up.lost(failure.view, now)
            self._remove(failure.view, failure.kill)
        if told:
            run.out += run.record.incident(failure.kind, failure.cause, now, failure.view, failure.at)
        if breaks:
            self.settle(now, interrupt=True)
            if failure.weight:
                self.count_failure(failure.failure or failure.cause, failure.weight, now)

    def is_missed(self, view: WorkerView) -> bool:
        """Whether the run is the worse for losing this worker."""
        run = self._run
        if view.worker in run.membership.members:
            return True
        if view.state is not WorkerState.IDLE or run.state not in (RunState.WAITING, RunState.FINALIZING):
            return False
        return state.is_last_holder(view, run.roster.idle(), run.record.progress)

    def _breaks_with(self, view: WorkerView) -> bool:
        """Whether the generation is over without this worker: it is still inside, or it is out because it raised."""
        if view.worker not in self._run.membership.members:
            return False
        raised = view.left is not None and view.left.cause in ("exception", "device")
        return view.worker in self._run.membership.inside or raised

    def _remove(self, view: WorkerView, kill: str | None) -> None:
        run = self._run
        if kill is None:
            run.roster.remove(view)
        else:
            run.out += run.roster.kill(view, kill)
        run.membership.remove(view.worker)

    def count_failure(self, detail: str, weight: float, now: float) -> None:
        """The step failed; too often, and the run ends."""
        reason = self._run.record.step_failed(detail, weight)
        if reason is not None:
            self._run.finish("failed", reason, now)

    def start_failed(self, detail: str, now: float) -> None:
        """A worker could not be started; too many in a row, and nobody trains meanwhile, and the run ends."""
        run = self._run
        reason = run.roster.start_failed(detail, now)
        if reason is not None and not run.membership.members:
            run.finish("failed", reason, now)

    # ------------------------------------------------------------------------------------ forming a generation

    def reconsider(self, now: float) -> None:
        """There may be reason for another membership than there is."""
        if self._run.state is RunState.WAITING:
            self.try_form(now)
        else:
            self.adjust(now)

    def warm(self, ready: Ready, now: float) -> None:
        """A worker is warm. Of thousands that come one by one, most make no difference, and get no second look."""
        run = self._run
        early = self._early
        if run.state is RunState.WAITING and early is not None and run.roster.num_starting:
            same = early.num_removed == run.roster.num_removed and early.is_like(ready)
            if same and run.stop is None and run.roster.num_warm < early.wanted:
                return
        is_settled = not run.roster.any_leaving and not run.membership.spares
        if run.state is RunState.RUNNING and is_settled and not run.scale_up.may_grow(now):
            return
        self.reconsider(now)

    def try_form(self, now: float) -> None:
        """The run waits for workers: forms a generation if it is time."""
        run = self._run
        if run.stop is not None:
            self._after_settled(now)
            return
        waited_s = now - (run.waiting_since if run.waiting_since is not None else now)
        idle, wanted = run.roster.idle(), self.staffing.wanted()
        least = run.layouts.fewest(run.config.least, idle)
        self._early = None
        if policy.time_to_form(run.roster.alive(), wanted, least, waited_s, run.config, now):
            self._form(now)
        elif not any(view.has_trained for view in idle):
            costs, memory_bytes = run.layouts.costs(idle), memory_of(idle)
            self._early = _Early(wanted, costs is not None, memory_bytes, run.roster.num_removed)

    def wait_no_longer(self, now: float) -> None:
        """Ends a run that has waited for workers as long as its job allows."""
        run = self._run
        limit = run.config.wait_timeout_s
        if run.state is not RunState.WAITING or limit is None or run.waiting_since is None:
            return
        if now - run.waiting_since > limit:
            run.finish(
                "failed",
                f"waited {limit:.0f} s for {run.config.min_workers} workers "
                f"(elastic.workers.min), {len(run.roster.idle())} were there",
                now,
            )

    def _form(self, now: float) -> None:
        """Forms a generation from the newest state there is: that of living workers, or a newer one in storage."""
        run = self._run
        record, recorded = run.record, run.record.progress.committed
        run.out += state.refuse_unrecorded(run.roster.idle(), recorded)
        idle = run.roster.idle()
        origin = state.newest_state(idle, record.progress, run.saving.checkpoints)
        assert origin is not None, "workers can always make the state of step 0"
        ranks = forming.choose_ranks(idle, origin, run.target, run.layouts, now, run.balance.deal)
        if ranks is None:
            if (refusal := run.layouts.refusal(self.staffing.wanted(), idle)) is not None:
                run.finish("failed", refusal, now)
            return
        run.out += record.roll_back(origin.committed, now)
        self._start_generation(origin, ranks, now, steps_lost=recorded - origin.committed)
        self.staffing.fill(now)

    def _start_generation(
        self, origin: Origin, ranks: Ranks, now: float, *, steps_lost: int = 0, collect: bool = False
    ) -> None:
        run = self._run
        record = run.record
        record.last_generation += 1
        causes = "; ".join(incident.cause for incident in record.incidents.unanswered())
        otherwise = "collect" if collect else "start" if run.membership.generation is None else "regroup"
        generation = forming.make_generation(
            record.last_generation, run.config.term, causes or otherwise, origin, ranks, record.fired_faults,
            collect=collect, judged=record.evaluations.judged_at(origin.committed),
        )  # fmt: skip
        if not collect:
            run.layouts.trains(generation)
        record.incidents.answered(generation.number, origin.source(steps_lost), origin.committed)
        run.membership = Membership.formed(generation, ranks.members, now)
        run.state = RunState.FORMING
        run.out += [
            forming.formed(generation, origin, ranks.num_idle, steps_lost),
            StartGeneration(generation),
        ]

    def train(self, now: float) -> None:
        """All members have joined."""
        run = self._run
        assert run.membership.generation is not None
        if not run.has_run:
            for view in run.membership.members.values():
                view.joined_at = None  # All are new, and none has joined the others.
        run.state, run.has_run = RunState.RUNNING, True
        run.out.append(GenerationRunning(generation=run.membership.generation.number))
        if run.is_collecting:
            return
        run.scale_up.changed(now)
        run.balance.begin(run.membership.generation)
        if run.stop is not None:
            self.pause()
        else:
            run.order_save()
            self.adjust(now)

    def adjust(self, now: float) -> None:
        """While a generation runs: is there a better membership to change to at the next step boundary?"""
        run = self._run
        generation = run.membership.generation
        if run.state is not RunState.RUNNING or run.stop is not None or generation is None or generation.collect:
            return
        members, spares = list(run.membership.members.values()), run.membership.spares
        change = policy.wanted_change(members, spares, run.roster.idle(), self.staffing.wanted(), run.layouts, now)
        if change is None or (change[0] == "grow" and not run.scale_up.may_grow(now)):
            return
        kind, cause = change
        if kind not in ("drain", "handover"):
            run.out += run.record.incident(kind, cause, now)
        self.pause()

    # ------------------------------------------------------------------------------------ leaving a generation

    def pause(self) -> None:
        """All members leave at the next step boundary, by agreement in the vote."""
        run = self._run
        run.order_save()
        run.state = RunState.SETTLING
        run.out += run.membership.pause()

    def settle(self, now: float, *, interrupt: bool) -> None:
        """The generation is over; with `interrupt` members that are still in it are told to break out."""
        run = self._run
        if run.state not in (RunState.FORMING, RunState.RUNNING, RunState.SETTLING):
            return
        run.state = RunState.SETTLING
        if interrupt:
            run.out += run.membership.interrupt(now)

    def conclude(self, now: float) -> None:
        """Goes on when nobody is left to wait for."""
        run = self._run
        if run.state is RunState.SETTLING and not run.membership.inside:
            self._after_settled(now)
        elif run.state is RunState.FINALIZING and not self._ending.check(now):
            # The last holders died while they were asked: back to the newest checkpoint.
            self._after_settled(now)

    def end_early(self, reason: str, now: float) -> None:
        """Somebody wants the run to end. While a generation forms or settles, that takes its turn after it."""
        run = self._run
        run.stop = reason
        run.save_soon()
        if run.state is RunState.RUNNING and not run.is_collecting:
            self.pause()
        elif run.state is RunState.WAITING:
            self._after_settled(now)
        elif run.state is RunState.FINALIZING and run.finalization is not None:
            # All is done but for a storage that may refuse it: it is not waited for any longer.
            run.saving.try_no_more(run.finalization.committed)

    def _after_settled(self, now: float) -> None:
        """No member is in the generation any more: finish, stop, or form the next one."""
        run = self._run
        lefts = run.membership.dissolve()
        progress = run.record.progress
        run.out += state.refuse_unrecorded(run.roster.idle(), progress.committed)
        self._end_raisers(lefts)
        final = state.final_state(run.roster.idle(), progress, run.last_step, stopping=run.stop is not None)
        if final is not None and (run.stop is not None or not run.record.evaluations.lacks(final.committed)):
            self._finalize(final, lefts, now)
            return
        if run.stop is not None:
            run.finish("stopped", run.stop, now)
            return
        self._explain(lefts, now)
        if run.state is RunState.OVER:
            return
        run.state = RunState.WAITING
        run.waiting_since = now
        self.staffing.fill(now)
        self.try_form(now)
        if run.state is RunState.WAITING:
            run.out.append(Waiting(workers=len(run.roster.idle()), needed=run.config.least))

    def _end_raisers(self, lefts: Iterable[Left]) -> None:
        """Members that raised and might have held state alone: now that all have said what they hold, those go that
        others can do without."""
        run = self._run
        generation, idle = run.membership.generation, run.roster.idle()
        if generation is None or (generation.layout.is_replicated and not any(view.has_virtual for view in idle)):
            return
        for left in lefts:
            view = run.roster.living(left.worker)
            if left.cause != "exception" or view is None:
                continue
            rest = [other for other in run.roster.idle() if other is not view]
            before = state.state_at_hand([*rest, view], run.record.progress)
            after = state.state_at_hand(rest, run.record.progress)
            if before is not None and after is not None and after.committed >= before.committed:
                run.out += run.roster.kill(view, f"its step raised: {left.detail}")

    def _explain(self, lefts: list[Left], now: float) -> None:
        """Every generation ends for a reason; when nothing else is known to have happened, it was the network."""
        if self._run.record.incidents.unanswered() or any(left.cause == "restore" for left in lefts):
            return
        if (since := self._run.membership.stalled_since) is not None:
            self.handle_failure(failures.nobodys_stall(since, now), now)
        elif (failure := failures.lost_each_other(lefts, now)) is not None:
            self.handle_failure(failure, now)

    # ------------------------------------------------------------------------------------ checkpoints and the end

    def review_saves(self, now: float) -> None:
        """What is under way goes on, and what is due is begun."""
        run = self._run
        if run.state is RunState.RUNNING:
            run.saving.tick(now)
        alive = run.roster.alive()
        hands = {view.worker for view in alive if view.state in (WorkerState.IDLE, WorkerState.MEMBER)}
        run.out += run.saving.review(hands, {view.worker for view in alive}, now)
        run.order_save()
        if run.state is RunState.FINALIZING and run.finalization is not None:
            self._ending.review(now)
            self.conclude(now)

    def recall_saves(self, parts: list[PartSaved], now: float) -> None:
        """What the workers of an earlier controller wrote last. What is older has been dealt with."""
        newest = max((part.plan.save for part in parts), key=lambda save: (save.term, *save), default=None)
        for part in parts:
            if part.plan.save == newest:
                self._run.saving.wrote(part, now)
        self.review_saves(now)

    def _finalize(self, final: Origin, lefts: list[Left], now: float) -> None:
        """Asks those that have all of the final state; when nobody has, one of those that have parts is given all."""
        run = self._run
        idle, generation = run.roster.idle(), run.membership.generation
        assert generation is not None, "it has been trained"
        if holders := state.whole_holders(final, idle):
            self._ending.ask(final.committed, holders, now)
            return
        if generation.collect:
            # Another try; what fails again and again must come to an end.
            self._explain(lefts, now)
        if run.state is not RunState.OVER:
            ranks = forming.collect_ranks(idle, final, generation.layout.virtual_workers)
            self._start_generation(final, ranks, now, collect=True)
