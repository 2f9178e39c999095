"""The members of the current generation, from its start until all have left it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training.protocol import Action
from orchestrator.control.training.views import WorkerView, phase_index
from orchestrator.training.messages import Generation, Heartbeat, Left
from orchestrator.training.orders import Interrupt, Pause
from strategies.layout.statemap import NOTHING


class Membership:
    """Who is in `generation` (None: there was none yet).

    `members` are all of them until the generation is over, also those that left or died; `inside` are those still in
    it, `unjoined` those that never joined it, `spares` those without a part in the work. `interrupted_at` is when they
    were told to break out, `moved_at` when anything last moved, `stalled_since` since when nothing did, if nobody in
    particular was found to be the cause. The sets are kept beside the views so that a message costs the same however
    many there are.
    """

    def __init__(
        self, generation: Generation | None = None, views: Iterable[WorkerView] = (), now: float = 0.0
    ) -> None:
        self.generation = generation
        self.members = {view.worker: view for view in views}
        self.inside = {worker for worker, view in self.members.items() if view.state is WorkerState.MEMBER}
        self.unjoined = {worker for worker in self.inside if not self.members[worker].joined}
        self.spares: frozenset[WorkerId] = frozenset()
        if generation is not None:
            self.spares = frozenset(member.worker for member in generation.members[generation.layout.num_placed :])
        # Of virtual things, each member has its own.
        has_more = any(view.has_virtual for view in self.members.values())
        self._is_replicated = generation is not None and generation.layout.is_replicated and not has_more
        self.interrupted_at: float | None = None
        self.moved_at = now
        self.stalled_since: float | None = None

    @classmethod
    def formed(cls, generation: Generation, views: Iterable[WorkerView], now: float) -> Self:
        """A new generation of these members, in rank order. Until it has joined, or says what it has, a member counts
        as having what it was told to bring along."""
        members = list(views)
        for view, held in zip(members, generation.held, strict=True):
            view.state, view.left, view.joined, view.last_heard = WorkerState.MEMBER, None, False, now
            view.position, view.phase, view.prepared = (generation.committed, -1), "form", 0
            view.held, view.moved_at = held, now
        return cls(generation, members, now)

    def find(self, worker: WorkerId, generation: int) -> WorkerView | None:
        """The member's view, if the message speaks of the current generation and the member still counts."""
        if self.generation is None or generation != self.generation.number:
            return None
        view = self.members.get(worker)
        return view if view is not None and view.alive else None

    def present(self) -> list[WorkerView]:
        """Those still in it, in the order of their names."""
        return [self.members[worker] for worker in sorted(self.inside)]

    # ------------------------------------------------------------------------------------ what members say

    def joined(self, view: WorkerView, now: float) -> None:
        """Its state is in place."""
        generation = self.generation
        assert generation is not None
        view.joined, view.last_heard = True, now
        view.committed = max(view.committed, generation.committed)
        if generation.number and not view.has_trained:
            view.joined_at = now
        view.has_trained = True
        if not generation.collect:
            holds_all = self._is_replicated and view.worker not in self.spares
            view.held = view.whole if holds_all else NOTHING
        if generation.committed == 0:
            view.initial = initial_of(generation)
        self.unjoined.discard(view.worker)
        self.moved_at = view.moved_at = now

    def heard(self, view: WorkerView, event: Heartbeat, now: float) -> None:
        """A worker says where it is; it need not be a member, nor know of this generation."""
        if self.generation is None or event.generation != self.generation.number or view.worker not in self.inside:
            return
        position = (event.step, phase_index(event.phase))
        if position != view.position or event.moves != view.moves:
            view.position, view.moves = position, event.moves
            self.moved_at = view.moved_at = now
        view.phase = event.phase
        if event.committed > view.committed:
            view.committed = event.committed
            self.moved_at = now
            if self.generation.members[0].worker == view.worker:
                # No step is committed without every member, so rank 0 speaks for all; others may keep quiet.
                for worker in self.inside:
                    self.members[worker].last_heard = now
        if view.fault_at is not None:
            # A worker that commits another step has outlived its fault; a later trouble is measured from its own time.
            if view.fault_committed is None:
                view.fault_committed = event.committed
            elif event.committed > view.fault_committed:
                view.fault_at = view.fault_committed = None

    def left(self, view: WorkerView, event: Left, now: float) -> None:
        """It is out, and waits for the next generation."""
        view.left, view.state, view.last_heard = event, WorkerState.IDLE, now
        view.committed, view.prepared, view.held = event.committed, event.prepared, event.held
        self.inside.discard(view.worker)

    # ------------------------------------------------------------------------------------ how it ends

    def remove(self, worker: WorkerId) -> None:
        """The worker is gone."""
        self.inside.discard(worker)
        self.unjoined.discard(worker)

    def pause(self) -> list[Action]:
        """Asks all to leave at the next step boundary, by agreement in the vote."""
        assert self.generation is not None
        return [Pause(tuple(sorted(self.inside)), self.generation.number)]

    def interrupt(self, now: float) -> list[Action]:
        """Tells members that are still in it to break out. Once: after that, patience with them runs out."""
        if self.interrupted_at is not None:
            return []
        self.interrupted_at = now
        if not self.inside:
            return []
        assert self.generation is not None
        return [Interrupt(tuple(sorted(self.inside)), self.generation.number)]

    def dissolve(self) -> list[Left]:
        """All are out of it, and nobody is a member any more; what those said that left."""
        assert not self.inside
        lefts = [view.left for view in self.members.values() if view.left is not None]
        self.members, self.unjoined = {}, set()
        return lefts

    def skip_gap(self, gap_s: float, now: float) -> None:
        """Nobody could be heard for this long."""
        self.moved_at = now
        for worker in self.inside:
            self.members[worker].moved_at = now
        if self.interrupted_at is not None:
            self.interrupted_at += gap_s


def initial_of(generation: Generation) -> str:
    """The name of the state at step 0 that the members of a generation share, whatever each had built itself."""
    return f"of generation {generation.number}"
