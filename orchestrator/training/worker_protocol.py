"""A worker's side of what it and controllers say to each other. Pure: no process, no clock, no collectives.

Which orders it obeys (those of the newest controller, about its own generation), what it wants of the next vote, which
steps it still has to tell of, and its account of itself. The real worker and the simulation of the tests go by this.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from orchestrator.control.core.orders import Order
from orchestrator.control.core.workers import WorkerId
from orchestrator.evaluation.judge import EvaluationRules, Judgement, judge
from orchestrator.training.messages import (
    EvaluationReport,
    Generation,
    Left,
    LeftCause,
    PartSaved,
    Ready,
    Reply,
    Status,
    StepReport,
)
from orchestrator.training.orders import Deal, Interrupt, Pause, RequestSave, StartGeneration
from strategies.layout.statemap import Spans

MAX_REPORTS = 100_000
"""Of steps that are not on record yet; there are many only where the run directory cannot be written for long."""


@dataclass(frozen=True)
class Holds:
    """What a worker has: `held` of the state after `committed` steps, and the reduced gradient of the next round for
    all of that, which has `prepared` steps (0: it has none)."""

    committed: int
    held: Spans
    prepared: int


class WorkerProtocol:
    """See the module.

    `term` is that of the newest controller it has heard of, `accepted` the newest generation it was told to join, and
    `generation` the one that it is in, or was in last. `pause_requested` and `save_requested` are what it wants of the
    next vote.
    """

    def __init__(self, worker: WorkerId) -> None:
        self.worker = worker
        self.term = -1
        self.accepted = -1
        self.generation: Generation | None = None
        self.left: Left | None = None
        self.is_joined = False
        self.pause_requested = False
        self.save_requested = False
        self.reports: deque[StepReport] = deque(maxlen=MAX_REPORTS)
        self.evaluations: deque[EvaluationReport] = deque(maxlen=MAX_REPORTS)
        self.judged = Judgement()
        """What evaluations have come to, of the state that it has."""
        self._interrupted = -1
        self._pause_wanted = -1
        self._save_delayed = False
        self._known = 0

    # ------------------------------------------------------------------------------------ orders

    def obeys(self, term: int) -> bool:
        """Whether a controller of this term is not an older one; from now on only it and its successors are obeyed."""
        if term < self.term:
            return False
        self.term = term
        return True

    def takes(self, order: Order, term: int) -> bool:
        """Takes note of an order; whether there is anything to be done about it. One of an older controller, or about
        another generation than the one it is in, is nothing; nor is a generation that is not newer than the last."""
        if isinstance(order, StartGeneration):
            if term < self.term or order.generation.number <= self.accepted:
                return False
            self.term, self.accepted = term, order.generation.number
            return True
        if not self.obeys(term):
            return False
        match order:
            case Interrupt(generation=number):
                self._interrupted = max(self._interrupted, number)
            case Pause(generation=number):
                self._pause_wanted = max(self._pause_wanted, number)
                if self._is_in(number):
                    self.pause_requested = True
            case RequestSave(generation=number):
                if not self._is_in(number):
                    return False
                self.save_requested = True
            case Deal(generation=number):
                return self._is_in(number)
        return True

    def _is_in(self, number: int) -> bool:
        return self.generation is not None and self.generation.number == number

    @property
    def is_interrupted(self) -> bool:
        """Whether it was told to break out of the generation that it is in; perhaps before it got there."""
        return self.generation is not None and self.generation.number <= self._interrupted

    # ------------------------------------------------------------------------------------ a generation

    def enters(self, generation: Generation) -> None:
        """It begins to take part."""
        self.generation, self.left, self.is_joined = generation, None, False
        self.judged = generation.judged
        self.pause_requested = self._pause_wanted >= generation.number

    @property
    def is_first(self) -> bool:
        """Whether it is the rank that tells of steps for all."""
        return self.generation is not None and self.generation.members[0].worker == self.worker

    def begins_at(self, committed: int) -> None:
        """All have met, and steps from `committed` on are run again, and will be told of again."""
        kept = [report for report in self.reports if report.step < committed]
        self.reports = deque(kept, maxlen=MAX_REPORTS)
        self.evaluations = deque([e for e in self.evaluations if e.step <= self.judged.step], maxlen=MAX_REPORTS)

    def evaluated(self, report: EvaluationReport, rules: EvaluationRules) -> Judgement:
        """The weights that all members have were evaluated, which all find alike; what it comes to."""
        self.evaluations.append(report)
        self.judged = judge(self.judged, report.step, report.metrics, rules)
        return self.judged

    def saves(self, *, is_due: bool, is_busy: bool, is_last: bool) -> tuple[bool, bool]:
        """At a step boundary, which all ranks see alike: whether to save now, and whether to tell that it has to wait.

        `is_due` says that it is time to, or that any rank wanted it; while any `is_busy` with an earlier one it waits,
        so that snapshots do not pile up; after the last step those that have the state are asked when they are free.
        """
        is_delayed = is_due and is_busy and not is_last
        tells = is_delayed and not self._save_delayed
        self._save_delayed = self.save_requested = is_delayed
        return is_due and not is_busy, tells

    def leaves(self, cause: LeftCause, holds: Holds, at: float, detail: str = "") -> Left:
        """It is out of its generation."""
        assert self.generation is not None
        self.left = Left(
            self.worker, self.generation.number, cause, holds.committed, holds.held, holds.prepared, detail,
            tuple(self.reports), at, tuple(self.evaluations),
        )  # fmt: skip
        return self.left

    # ------------------------------------------------------------------------------------ reports

    def unknown(self) -> tuple[StepReport, ...]:
        """The steps that the controller is to be told of with the next heartbeat: by the first rank only."""
        return tuple(report for report in self.reports if report.step >= self._known) if self.is_first else ()

    def untold(self) -> tuple[EvaluationReport, ...]:
        """The evaluations that the controller is to be told of with the next heartbeat: by the first rank only."""
        return tuple(self.evaluations) if self.is_first else ()

    def heeds(self, reply: Reply) -> bool:
        """Takes the controller's answer; whether the worker is to end."""
        self._known = reply.known
        while self.evaluations and self.evaluations[0].step <= reply.evaluated:
            self.evaluations.popleft()
        while self.reports and self.reports[0].step < reply.recorded:
            self.reports.popleft()
        return reply.shutdown

    def status(
        self, term: int, ready: Ready, holds: Holds, part: PartSaved | None, assignment: tuple[tuple[int, ...], ...]
    ) -> Status | None:
        """Its account of itself for a controller of this term, which it obeys from now on; None for an older one."""
        if not self.obeys(term):
            return None
        return Status(
            ready=ready,
            generation=self.generation,
            left=self.left,
            committed=holds.committed,
            held=holds.held,
            prepared=holds.prepared,
            joined=self.is_joined,
            term=self.term,
            reports=tuple(self.reports),
            evaluations=tuple(self.evaluations),
            part=part,
            assignment=assignment if self.generation is not None and self.is_joined else (),
        )
