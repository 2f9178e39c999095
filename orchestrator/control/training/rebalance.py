"""Uneven speeds: what is known of them, and what is done about it.

Three remedies, mildest first: virtual workers are dealt anew, which costs nothing and is in force at a step boundary of
the generation there is; the stages of a pipeline are cut anew, which takes another generation, as state moves; a worker
that stays far behind is replaced by another, if one can be had. None of them changes a bit of the result.

Pure like everything here: times are those that workers report. What is decided comes back as values and records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from monitoring.events import (
    ABSENT,
    Evicted,
    EvictionWithdrawn,
    Rebalanced,
    RebalanceMeasured,
    Recovered,
    SkewFound,
    SkewOver,
)
from monitoring.goodput import VOLUNTARY
from monitoring.skew import Detector, RankAccount, Rating, SkewFinding, Window, Windows
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.layouts import Layouts
from orchestrator.control.training.protocol import Action
from orchestrator.control.training.views import RebalanceRules, WorkerView
from orchestrator.planning.balance import Assignment, best_deal, replica_seconds, seconds_of, stage_shares
from orchestrator.training.messages import Generation, StepReport
from orchestrator.training.orders import Deal
from strategies.layout.assignment import deal_subtrees
from strategies.layout.parallel import ParallelLayout

CALIBRATION_ERROR = 0.35
"""Devices whose speeds differ by no more than this share, before they have trained, count as equal."""
CERTAINTY = 3.0
"""How many times its own uncertainty a predicted gain must be."""
EVIDENCE = (2, 4, 8)
"""Over how many windows in a row speeds are looked at: over few to act soon, over more to be sure of small gains."""
MOVE_STATE_S = 1.0
"""What a change of stages is taken to cost while none was measured, in seconds."""
WORTH = 3.0
"""How many times over a change must win back what it costs, in the steps that are left."""
MAX_WAITED = 4
"""Windows to wait for a deal to be in force; it takes a step or two."""
KEEP_ABOVE = 1.2
"""How far above the limit a speed must be to count as no longer below it."""
MAX_PATIENCE = 64
"""The most windows to wait after changes that did not help."""


@dataclass
class _Change:
    """What was changed, from `before` to `after`, until its gain is measured in the windows that follow."""

    what: str
    number: int
    before: ParallelLayout
    after: ParallelLayout
    predicted_gain: float
    before_s: float
    windows: list[Window] = field(default_factory=list)
    waited: int = 0
    """Windows for which a deal was not in force yet."""


@dataclass(frozen=True)
class Proposal:
    """Another deal or cut. Seconds are those of work in a step as it is, and as it would be."""

    what: str
    layout: ParallelLayout
    now_s: float
    then_s: float


@dataclass(frozen=True)
class Verdict:
    """What follows from a step: actions, another cut of the model to change to, workers to replace or to keep."""

    actions: tuple[Action, ...] = ()
    cut: ParallelLayout | None = None
    evict: tuple[WorkerId, ...] = ()
    keep_on: tuple[WorkerId, ...] = ()


class Rebalancer:
    """Looks at what ranks spend on steps. `assignment` is the deal in force in the current generation, `evicting` are
    those that are to be replaced.

    More than 15 attributes, in more than 300 lines: what is measured, what was dealt and what came of it are looked
    at together at every step.
    """

    def __init__(self, rules: RebalanceRules, layouts: Layouts, term: int, total_steps: int) -> None:
        self.rules = rules
        self.assignment: Assignment = ()
        self.findings = Detector()
        self.window: Window | None = None
        """The last one."""
        self._layouts = layouts
        self._windows = Windows()
        self._rates: dict[WorkerId, float] = {}
        self._recent: deque[Window] = deque(maxlen=max(EVIDENCE))
        self._deals: dict[int, Assignment] = {}
        self._number = term << 32
        self._deal = 0
        self._generation = -1
        self._slow_since: dict[WorkerId, float] = {}
        self.evicting: set[WorkerId] = set()
        self._change: _Change | None = None
        self._rest = 0
        self._patience = 1
        self._total_steps = total_steps
        self._move_s = MOVE_STATE_S

    # ------------------------------------------------------------------------------------ for other generations

    def rates(self, views: Sequence[WorkerView]) -> list[float] | None:
        """What each of these needs for an average virtual worker, in a unit of their own; None when too little is
        known. What has trained is known by that; devices that have not, by how they were measured beside those that
        have."""
        measured = [self._rates.get(view.worker) for view in views]
        tried = [0.0 if view.ready is None else view.ready.unit_seconds for view in views]
        if all(rate is not None for rate in measured):
            return [rate for rate in measured if rate is not None]
        if not all(seconds > 0 for seconds in tried):
            return None
        both = sorted(rate / seconds for rate, seconds in zip(measured, tried, strict=True) if rate is not None)
        scale = both[len(both) // 2] if both else 1.0
        tried = alike(tried, CALIBRATION_ERROR)
        return [
            seconds * scale if rate is None else rate for rate, seconds in zip(measured, tried, strict=True)
        ]  # fmt: skip

    def deal(self, layout: ParallelLayout, views: Sequence[WorkerView]) -> ParallelLayout:
        """A layout to be formed, with its virtual workers dealt by what is known of the speeds of these workers, which
        are by rank; as it is where that is predicted to save too little."""
        rates = self.rates(views[: layout.num_placed]) if self.rules.enabled else None
        if rates is None or self._is_rigid(layout):
            return layout
        replicas = replica_seconds(layout, rates, stage_shares(layout, self._layouts.costs(views)))
        best = best_deal(layout, replicas)
        if best.seconds > (1 - self.rules.min_gain) * seconds_of(layout, layout.assignment, replicas):
            return layout
        return replace(layout, assignment=best.assignment)

    def begin(self, generation: Generation, assignment: Assignment = ()) -> None:
        """A generation begins to train, or is taken over while it does, with another deal than its layout's."""
        self.assignment = assignment or generation.layout.assignment
        self._generation, self._deal, self._deals = generation.number, 0, {}
        self._windows.restart()
        self._recent.clear()
        self._slow_since.clear()
        change = self._change
        if change is not None and (change.what, change.after.parts) != ("stages", generation.layout.parts):
            self._change = None

    def learn(self, actions: Sequence[Action]) -> None:
        """What it costs to change to another generation is known once that was done."""
        for action in actions:
            if isinstance(action, Recovered) and action.incident in VOLUNTARY:
                self._move_s = action.stall_seconds

    # ------------------------------------------------------------------------------------ while a generation trains

    def observe(self, report: StepReport, generation: Generation, views: Mapping[WorkerId, WorkerView]) -> Verdict:
        """A step of the generation was committed."""
        layout = generation.layout
        if report.generation != self._generation or len(report.ranks) != layout.world_size:
            return Verdict()
        if report.deal != self._deal:
            self._deal = report.deal
            self.assignment = self._deals.get(report.deal, self.assignment)
            self._windows.restart()
            self._recent.clear()
            return Verdict()  # The first step of a deal sets things up.
        counts = [len(report.ranks[layout.rank_of(replica)].busy) for replica in range(layout.data)]
        if counts != [len(held) for held in self.assignment]:
            # A predecessor's deal that came to nothing, or did after all. How much each has is all that counts here.
            self.assignment = deal_subtrees(counts)
        if report.step == generation.committed:
            return Verdict()
        members = [views[member.worker] for member in generation.members[: layout.num_placed]]
        shares = stage_shares(layout, self._layouts.costs(members))
        window = self._windows.add(report.seconds, self._accounts(report, layout, members, shares))
        if window is None:
            return Verdict()
        return self._judge(window, report, generation, members, shares)

    def _accounts(
        self, report: StepReport, layout: ParallelLayout, members: Sequence[WorkerView], shares: Sequence[float]
    ) -> dict[Any, RankAccount]:
        accounts: dict[Any, RankAccount] = {}
        for rank, view in enumerate(members):
            times, place = report.ranks[rank], layout.place(rank)
            assert place is not None
            # A virtual worker that was computed before an interruption took no time now.
            complete = all(seconds > 0 for seconds in times.busy)
            accounts[view.worker] = RankAccount(
                node=view.node, busy=sum(times.busy) if complete else 0.0, data=times.data, wait=times.wait,
                cost=times.cost, held=len(times.busy), tokens=times.tokens, padding=times.padding, stage=place.stage,
                share=shares[place.stage],
            )  # fmt: skip
        return accounts

    def _judge(
        self,
        window: Window,
        report: StepReport,
        generation: Generation,
        members: Sequence[WorkerView],
        shares: Sequence[float],
    ) -> Verdict:
        layout = generation.layout
        self._recent.append(window)
        self.window = window
        for worker, rating in window.workers.items():
            assert isinstance(worker, WorkerId)
            self._rates[worker] = rating.rate
        news = self.findings.look(window)
        actions: list[Action] = [SkewFound(**_described(_explained(finding, members))) for finding in news.opened]
        actions += [SkewOver(**_described(finding)) for finding in news.closed]
        actions += self._measure(window, report, members)
        steps_left = self._total_steps - report.step - 1
        evict, keep_on = self._look_for_hopeless(window, members, report.committed_at) if steps_left else ([], [])
        actions += [self._eviction(worker, window, report.committed_at) for worker in evict]
        for worker in keep_on:
            rating = window.workers[worker]
            actions.append(EvictionWithdrawn(*worker, node=rating.node, speed=round(rating.speed, 3)))
        self._rest = max(0, self._rest - 1)
        cut = None
        # Who is about to be replaced is nobody to cut a model for.
        if self.rules.enabled and self._change is None and not self._rest and not evict:
            found = None
            for number in EVIDENCE:
                found = found or self._propose(layout, members, shares, number, steps_left)
            if found is not None:
                actions += self._carry_out(found, window, report, members, generation)
                cut = found.layout if found.what == "stages" else None
        return Verdict(tuple(actions), cut, tuple(evict), tuple(keep_on))

    def _propose(
        self,
        layout: ParallelLayout,
        members: Sequence[WorkerView],
        shares: Sequence[float],
        number: int,
        steps_left: int,
    ) -> Proposal | None:
        """The best change for the mean of the last `number` windows, if each half of them speaks for it too. The more
        there are, the smaller a gain is certain."""
        windows = list(self._recent)[-number:]
        rates = [_rates_of(window, members) for window in windows]
        if len(windows) < number or not all(rates):
            return None
        half = number // 2
        first, second = _mean(rates[:half]), _mean(rates[half:])
        noise = max(window.noise for window in windows) / half**0.5
        mean = alike(_mean([first, second]), 2 * noise)
        step_s = windows[-1].step_seconds
        found = self._best(layout, members, shares, mean, step_s, steps_left)
        if found is None or found.now_s - found.then_s < CERTAINTY * noise * found.now_s:
            return None
        held = replace(layout, assignment=self.assignment)
        for each in (first, second):
            saved_s = self._work_s(held, each, members) - self._work_s(found.layout, each, members)
            if saved_s < self.rules.min_gain * step_s:
                return None
        return found

    def _best(
        self,
        layout: ParallelLayout,
        members: Sequence[WorkerView],
        shares: Sequence[float],
        rates: Sequence[float],
        step_s: float,
        steps_left: int,
    ) -> Proposal | None:
        replicas = replica_seconds(layout, rates, shares)
        now = seconds_of(layout, self.assignment, replicas)
        dealt = best_deal(layout, replicas)
        found = None
        if not self._is_rigid(layout) and self._is_worth(now - dealt.seconds, step_s, steps_left, cost_s=0.0):
            found = Proposal("deal", replace(layout, assignment=dealt.assignment), now, dealt.seconds)
        recut = self._layouts.recut(layout, members, rates)
        if recut is not None:
            replicas = replica_seconds(recut, rates, stage_shares(recut, self._layouts.costs(members)))
            balance = best_deal(recut, replicas)
            least = now if found is None else found.then_s
            if self._is_worth(least - balance.seconds, step_s, steps_left, cost_s=self._move_s):
                found = Proposal("stages", replace(recut, assignment=balance.assignment), now, balance.seconds)
        return found

    def _is_rigid(self, layout: ParallelLayout) -> bool:
        """Whether a replica takes as long for a round in which it has no virtual worker, or virtual workers have state
        of their own, which would have to move with them."""
        return self.rules.has_own_state or (layout.shard == "parameters" and not self.rules.has_short_rounds)

    def _is_worth(self, saved_s: float, step_s: float, steps_left: int, cost_s: float) -> bool:
        return saved_s >= self.rules.min_gain * step_s and saved_s * steps_left >= WORTH * cost_s

    def _carry_out(
        self,
        found: Proposal,
        window: Window,
        report: StepReport,
        members: Sequence[WorkerView],
        generation: Generation,
    ) -> list[Action]:
        self._number += 1
        predicted = (found.now_s - found.then_s) / window.step_seconds
        before = replace(generation.layout, assignment=self.assignment)
        self._change = _Change(found.what, self._number, before, found.layout, predicted, window.step_seconds)
        event = Rebalanced(
            change=found.what,
            deal=self._number,
            step=report.step,
            from_=[len(held) for held in self.assignment],
            to=[len(held) for held in found.layout.assignment],
            speeds={str(view.worker.slot): round(window.workers[view.worker].speed, 3) for view in members},
            step_seconds=round(window.step_seconds, 4),
            predicted_gain=round(predicted, 4),
            stages=[list(part) for part in found.layout.parts] if found.what == "stages" else ABSENT,
        )
        if found.what == "stages":
            return [event]
        self._deals[self._number] = found.layout.assignment
        workers = tuple(member.worker for member in generation.members)
        order = Deal(workers, report.generation, self._number, found.layout.assignment)
        return [event, order]

    def _measure(self, window: Window, report: StepReport, members: Sequence[WorkerView]) -> list[Action]:
        """Two windows after a change it is seen what it brought. One that brought little is no reason to try the next
        one soon; that is judged by what the work would take now had nothing been changed, as speeds may have changed
        since."""
        change = self._change
        if change is None:
            return []
        if change.what == "deal" and self._deal != change.number:
            change.waited += 1
            # Somebody did not hear of it, and so it never will be; another may.
            self._change = change if change.waited < MAX_WAITED else None
            return []
        change.windows.append(window)
        if len(change.windows) < 2:
            return []
        self._change = None
        after_s = sum(each.step_seconds for each in change.windows) / len(change.windows)
        rates = [_rates_of(each, members) for each in change.windows]
        saved = 0.0
        if all(rates):
            mean = _mean(rates)
            saved = (self._work_s(change.before, mean, members) - self._work_s(change.after, mean, members)) / after_s
        self._patience = 1 if saved >= change.predicted_gain / 2 else min(MAX_PATIENCE, 2 * self._patience)
        self._rest = self._patience
        return [
            RebalanceMeasured(
                change=change.what,
                deal=change.number,
                step=report.step,
                predicted_gain=round(change.predicted_gain, 4),
                work_gain=round(saved, 4),
                measured_gain=round(1 - after_s / change.before_s, 4),
            )
        ]

    def _work_s(self, layout: ParallelLayout, rates: Sequence[float], members: Sequence[WorkerView]) -> float:
        """Seconds of work in a step of a layout, with ranks of these rates."""
        shares = stage_shares(layout, self._layouts.costs(members))
        return seconds_of(layout, layout.assignment, replica_seconds(layout, rates, shares))

    # ------------------------------------------------------------------------------------ those that stay behind

    def _look_for_hopeless(
        self, window: Window, members: Sequence[WorkerView], now: float
    ) -> tuple[list[WorkerId], list[WorkerId]]:
        """Who has been too slow for too long, and who no longer is. Where a job has several kinds of devices, each is
        compared with what its kind can do."""
        evict, keep_on = [], []
        expected = self._expected(members)
        for worker, rating in window.workers.items():
            assert isinstance(worker, WorkerId)
            speed = rating.speed / expected.get(worker, 1.0)
            if speed >= KEEP_ABOVE * self.rules.evict_below:
                self._slow_since.pop(worker, None)
                if worker in self.evicting:
                    self.evicting.discard(worker)
                    keep_on.append(worker)
            elif speed < self.rules.evict_below:
                since = self._slow_since.setdefault(worker, now)
                if self.rules.enabled and now - since >= self.rules.evict_after_s and worker not in self.evicting:
                    self.evicting.add(worker)
                    evict.append(worker)
        return evict, keep_on

    def _expected(self, members: Sequence[WorkerView]) -> dict[WorkerId, float]:
        """The speeds of their devices as they were measured before training, where they may be of several kinds."""
        tried = {view.worker: view.ready.unit_seconds for view in members if view.ready is not None}
        if not self.rules.has_kinds or not tried or not all(seconds > 0 for seconds in tried.values()):
            return {}
        fastest = min(tried.values())
        return {worker: fastest / seconds for worker, seconds in tried.items()}

    def _eviction(self, worker: WorkerId, window: Window, now: float) -> Evicted:
        rating: Rating = window.workers[worker]
        return Evicted(
            *worker,
            node=rating.node,
            speed=round(rating.speed, 3),
            own_speed=round(rating.own_speed, 3),
            seconds=round(now - self._slow_since[worker], 1),
        )


def alike(rates: Sequence[float], tolerance: float) -> list[float]:
    """Rates that differ by no more than a share of the lowest of them count as equal, to their mean: what is dealt is
    not to follow chance.

    >>> alike([1.0, 2.0, 1.1, 2.1], 0.1)
    [1.05, 2.05, 1.05, 2.05]
    """
    ordered = sorted(range(len(rates)), key=lambda rank: rates[rank])
    groups: list[list[int]] = []
    for rank in ordered:
        if groups and rates[rank] <= rates[groups[-1][0]] * (1 + tolerance + 1e-9):
            groups[-1].append(rank)
        else:
            groups.append([rank])
    means = [0.0] * len(rates)
    for group in groups:
        mean = sum(rates[rank] for rank in group) / len(group)
        for rank in group:
            means[rank] = mean
    return means


def _mean(rates: Sequence[Sequence[float]]) -> list[float]:
    """Rank by rank."""
    return [sum(each) / len(each) for each in zip(*rates, strict=True)]


def _rates_of(window: Window, members: Sequence[WorkerView]) -> list[float]:
    """By rank; empty when somebody was not seen at work."""
    ratings = [window.workers.get(view.worker) for view in members]
    return [rating.rate for rating in ratings if rating is not None] if all(ratings) else []


def _explained(finding: SkewFinding, views: Sequence[WorkerView]) -> SkewFinding:
    """With what keeps the clock of a slow device's GPU down, if its driver says so."""
    if finding.kind not in ("slow device", "slow node"):
        return finding
    details = [finding.detail]
    for gpu in (view.gpu for view in views if view.worker in finding.workers and view.gpu is not None):
        heat = "" if gpu.celsius is None else f" ({gpu.celsius:.0f} degrees)"
        if gpu.slowed_by:
            details.append(f"its GPU is slowed down by {' and '.join(gpu.slowed_by)}{heat}")
        elif gpu.at_power_limit:
            details.append(f"its GPU is at its power limit ({gpu.watts or 0:.0f} W)")
    return replace(finding, detail="; ".join(details))


def _described(finding: SkewFinding) -> dict[str, Any]:
    workers = [worker.slot for worker in finding.workers if isinstance(worker, WorkerId)]
    return {
        "finding": finding.kind,
        "workers": workers,
        "node": finding.node,
        "value": round(finding.value, 3),
        "detail": finding.detail,
    }
