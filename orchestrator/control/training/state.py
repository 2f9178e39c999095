"""What state there is, and where: at which workers, of how many steps, or in storage.

A worker says what it holds (`WorkerView.held`) of the state after `committed` steps, and by how many it can roll
forward (`prepared`). What that makes together is decided here. Between two generations every worker is at the same step
or one round behind, and older states are those of workers that have been idle since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from monitoring.events import StateRefused
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.views import Progress, WorkerView
from strategies.layout.statemap import NOTHING, Spans, cut_up, subtract, union


@dataclass(frozen=True)
class Origin:
    """The state a generation starts from: of how many steps, where it is, and `everything` there is of it.

    Either living workers have it: `held` says who has what of it, those in `rolling` once they have applied the reduced
    gradient of its last step, whose global norm is `norm`. Or it is read from the checkpoint `restore`.
    """

    committed: int
    held: Mapping[WorkerId, Spans] = field(default_factory=dict)
    everything: Spans = NOTHING
    rolling: frozenset[WorkerId] = frozenset()
    norm: float | None = None
    restore: str | None = None

    @property
    def kind(self) -> str:
        """As recoveries name it, of a run that had not to begin anew."""
        return "peers" if self.restore is None else "checkpoint"

    def source(self, steps_lost: int) -> str:
        """The same; "initial" when all there was is lost, and workers make the state of step 0 again."""
        return "initial" if self.restore is None and self.committed == 0 and steps_lost else self.kind


def newest_state(idle: Sequence[WorkerView], progress: Progress, checkpoints: Mapping[int, str]) -> Origin | None:
    """The newest state there is: that of these workers, or a newer one in storage. None when there are no workers."""
    at_hand = state_at_hand(idle, progress)
    stored = max((step for step in checkpoints if step <= progress.committed), default=0)
    if stored > (0 if at_hand is None else at_hand.committed):
        return Origin(stored, restore=checkpoints[stored])
    return at_hand


def state_at_hand(idle: Sequence[WorkerView], progress: Progress) -> Origin | None:
    """The newest state that these workers have all parts of; at worst that of step 0, which they can make again."""
    steps = {view.committed + rolls for view in idle if view.held for rolls in {0, view.prepared}}
    for committed in sorted(steps - {0}, reverse=True):
        if (origin := _state_after(committed, idle, progress)) is not None:
            return origin
    return _state_of_step_0(idle)


def _state_after(committed: int, idle: Iterable[WorkerView], progress: Progress) -> Origin | None:
    """The state after this many steps, if these workers have all parts of it.

    Who prepared a round that is on record can roll forward over it: after the vote the gradient it holds is the one
    that was applied. (What is not on record is simply run again.)
    """
    held: dict[WorkerId, Spans] = {}
    rolling: set[WorkerId] = set()
    whole = NOTHING
    may_roll = committed == progress.committed and progress.norm is not None
    for view in idle:
        whole = view.whole or whole
        if view.held and view.committed == committed:
            held[view.worker] = view.held
        elif view.held and view.prepared and may_roll and view.committed == committed - view.prepared:
            held[view.worker] = view.held
            rolling.add(view.worker)
    if not held or subtract(whole, all_of(held.values())):
        return None
    return Origin(committed, held, whole, frozenset(rolling), progress.norm if rolling else None)


def _state_of_step_0(idle: Sequence[WorkerView]) -> Origin | None:
    """The state that training starts from. Any worker can make all of it, again and again; models built apart must
    agree to count as copies, and those that have trained set the standard as long as they have it."""
    trained = [view for view in idle if view.has_state and view.committed == 0]
    for initial in sorted({view.initial for view in trained}):
        held = {view.worker: view.held for view in trained if view.initial == initial}
        if not subtract(trained[0].whole, all_of(held.values())):
            return Origin(0, held, trained[0].whole)
    makers = [view for view in idle if not view.has_trained] or idle
    if not makers:
        return None
    first = min(makers, key=lambda view: view.worker)
    held = {view.worker: view.whole for view in makers if built(view) == built(first)}
    return Origin(0, held, first.whole)


def built(view: WorkerView) -> str:
    """The name of the step-0 state that a worker makes by itself."""
    return view.initial if view.ready is None else view.ready.initial


def all_of(held: Iterable[Spans]) -> Spans:
    """What these have together. Copies, of which there may be thousands, are looked at once."""
    return union(*set(held))


def is_last_holder(view: WorkerView, idle: Sequence[WorkerView], progress: Progress) -> bool:
    """Whether committed steps are lost with this one of the idle workers."""
    before = state_at_hand(idle, progress)
    after = state_at_hand([other for other in idle if other is not view], progress)
    return before is not None and before.committed > (0 if after is None else after.committed)


def holds_alone(view: WorkerView, members: Iterable[WorkerView]) -> bool:
    """Whether this member has a part of the state that no other is known to have."""
    others = all_of(other.held for other in members if other is not view and other.alive)
    return bool(subtract(view.held, others))


def final_state(idle: Sequence[WorkerView], progress: Progress, total_steps: int, *, stopping: bool) -> Origin | None:
    """The state the run ends with; None when it is not at its end, or no living worker has it.

    That is the state after the last step, or, when the run is `stopping`, the newest if nothing on record is missing
    in it.
    """
    ends = [total_steps, progress.committed] if stopping else [total_steps]
    trained = [view for view in idle if view.has_state]
    return next((found for end in ends if (found := _state_after(end, trained, progress)) is not None), None)


def whole_holders(origin: Origin, idle: Iterable[WorkerView]) -> list[WorkerView]:
    """The workers that have all of it, as it is."""
    return [
        view
        for view in idle
        if view.worker in origin.held
        and view.worker not in origin.rolling
        and not subtract(origin.everything, origin.held[view.worker])
    ]


def pick_holders(wanted: Spans, held: Mapping[WorkerId, Spans], candidates: Iterable[WorkerId]) -> list[WorkerId]:
    """Few of the candidates that hold together what is `wanted`, as far as they do: who adds most, first, and of
    those that add as much the first."""
    first: dict[Spans, WorkerId] = {}
    for worker in sorted(candidates):
        first.setdefault(held[worker], worker)
    pieces = cut_up([wanted, *first])
    own = dict(zip(first.values(), pieces.of[1:], strict=True))
    missing = np.zeros(len(pieces), np.int64)
    missing[pieces.of[0]] = pieces.lengths[pieces.of[0]]

    def adds(worker: WorkerId) -> int:
        return int(missing[own[worker]].sum())

    # The more is found the less others add, so that who was first in the queue is looked at again.
    queue = [(-adds(worker), worker) for worker in own]
    heapify(queue)
    picked: list[WorkerId] = []
    left = int(missing.sum())
    while queue and left:
        most, worker = heappop(queue)
        if (now := adds(worker)) < -most:
            heappush(queue, (-now, worker))
        elif now:
            picked.append(worker)
            missing[own[worker]] = 0
            left -= now
    return picked


def refuse_unrecorded(idle: Iterable[WorkerView], recorded: int) -> list[StateRefused]:
    """A state of more steps than are on record is not used, or those steps would never be on it.

    Workers keep the reports of steps that are not on record, so this takes a predecessor that rolled back and died
    before it had ended this worker.
    """
    records = []
    for view in idle:
        if view.committed > recorded and view.held:
            view.held, view.prepared = NOTHING, 0
            records.append(StateRefused(*view.worker, committed=view.committed, recorded=recorded))
    return records
