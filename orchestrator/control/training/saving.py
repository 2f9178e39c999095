"""Checkpoints in the making: who writes which part of which attempt, and what becomes of it.

The ranks decide together at which step boundary they save (in the vote); the controller asks for that, hears from every
rank what it wrote, and has one of them complete the checkpoint, or discard it when a part will never come. An attempt
outlives its generation: the writers that live go on writing, wherever training is meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from monitoring.events import ABSENT, CheckpointComplete, CheckpointFailed, CheckpointInvalid
from orchestrator.checkpoint.names import Save
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.protocol import Action
from orchestrator.training.messages import CheckpointSaved, PartSaved, SaveBegun, SavePlan
from orchestrator.training.orders import CommitCheckpoint, DiscardCheckpoint

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""Before another attempt at the checkpoint that a run ends with, when a storage has refused one: they grow."""


@dataclass
class _Last:
    """Attempts at the checkpoint that a run ends with; the next is made at `again_at`, unless it `is_over`."""

    attempts: int = 0
    refusals: int = 0
    again_at: float = 0.0
    error: str = ""
    is_over: bool = False

    def refused(self, error: str, now: float) -> None:
        self.again_at = now + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self.refusals)
        self.refusals += 1
        self.error = error


@dataclass
class Attempt:
    """One attempt at a checkpoint. `parts` is what each writer wrote (its rank and the digest of its list), `lost` why
    others never will; `committer` is who completes it."""

    plan: SavePlan
    since: float
    parts: dict[WorkerId, tuple[int, str]] = field(default_factory=dict)
    lost: dict[WorkerId, str] = field(default_factory=dict)
    refused: bool = False
    """A storage would not take it; so another attempt at once makes no sense."""
    committer: WorkerId | None = None
    blocked_s: float = 0.0
    seconds: float = 0.0

    @property
    def missing(self) -> set[WorkerId]:
        """Those who have yet to say how it went."""
        return set(self.plan.writers) - self.parts.keys() - self.lost.keys()


class Saving:
    """All attempts under way, and whether another is wanted.

    `checkpoints` are those that are complete, by the number of committed steps. `is_due` says that training should save
    at its next step boundary: time has passed, somebody asked, or an attempt came to nothing because a worker was lost.
    """

    def __init__(self, checkpoints: Mapping[int, str], every_seconds: float | None) -> None:
        self.checkpoints = dict(checkpoints)
        self.is_due = False
        self._every_s = every_seconds
        self._attempts: dict[Save, Attempt] = {}
        self._due_from: float | None = None
        self._ordered = -1
        self._lasts: dict[int, _Last] = {}
        self._left: dict[WorkerId, tuple[int, int]] = {}

    # ------------------------------------------------------------------------------------ asking for one

    def tick(self, now: float) -> None:
        """Time has passed while the run trains."""
        if self._due_from is None:
            self._due_from = now
        if self._every_s is not None and now - self._due_from >= self._every_s:
            self.is_due = True

    def order(self, generation: int) -> bool:
        """Whether the members of this generation are to be told now that they shall save; they are told once."""
        if not self.is_due or self._attempts or self._ordered == generation:
            return False
        self._ordered = generation
        return True

    def attempt_at(self, committed: int, term: int, generation: int, now: float) -> Save | None:
        """What to call another attempt at the state that a run ends with, if there should be one now: there is no such
        checkpoint, none is under way, and a storage that refused the last one has had some time."""
        last = self._last(committed)
        if committed in self.checkpoints or self.is_saving(committed) or last.is_over or now < last.again_at:
            return None
        last.attempts += 1
        return Save(committed, term, generation, attempt=last.attempts)

    def _last(self, committed: int) -> _Last:
        return self._lasts.setdefault(committed, _Last())

    def has_given_up(self, committed: int) -> bool:
        """Whether no other attempt at the state that a run ends with is made."""
        return self._last(committed).is_over

    def try_no_more(self, committed: int) -> None:
        """What is under way may go on, but it is the last attempt."""
        self._last(committed).is_over = True

    def why_unsaved(self, committed: int) -> str:
        """What the last attempt failed with."""
        return self._last(committed).error

    def is_saving(self, committed: int) -> bool:
        """Whether a checkpoint of this many steps is under way."""
        return any(save.committed == committed for save in self._attempts)

    def writing(self) -> set[WorkerId]:
        """Workers that have yet to write their part of something."""
        return {worker for attempt in self._attempts.values() for worker in attempt.missing}

    # ------------------------------------------------------------------------------------ how it goes

    def expect(self, plan: SavePlan, now: float) -> None:
        """These workers are told to save."""
        self._attempts.setdefault(plan.save, Attempt(plan, now))

    def begun(self, event: SaveBegun, now: float) -> None:
        """All its writers have taken their snapshots."""
        self.is_due, self._ordered, self._due_from = False, -1, now
        if (attempt := self._known(event.plan, now)) is not None:
            attempt.blocked_s = event.blocked_seconds

    def left(self, worker: WorkerId, generation: int, committed: int) -> None:
        """A worker is out of this generation, with the state of `committed` steps: it took no part in what its fellows
        committed after that, and will not write of it, however long it lives."""
        self._left[worker] = (generation, committed)

    def _missed(self, worker: WorkerId, save: Save) -> bool:
        generation, committed = self._left.get(worker, (-1, 0))
        return generation == save.generation and committed < save.committed

    def wrote(self, event: PartSaved, now: float) -> None:
        """A rank has written its part, or could not."""
        attempt = self._known(event.plan, now)
        if attempt is None or event.worker not in attempt.missing:
            return
        attempt.seconds = max(attempt.seconds, event.seconds)
        if event.error:
            attempt.lost[event.worker] = event.error
            attempt.refused = True
        else:
            attempt.parts[event.worker] = (event.rank, event.digest)

    def _known(self, plan: SavePlan, now: float) -> Attempt | None:
        """The attempt; None for one that is over."""
        if plan.save.committed in self.checkpoints:
            return None
        return self._attempts.setdefault(plan.save, Attempt(plan, now))

    def saved(self, event: CheckpointSaved, now: float) -> list[Action]:
        """A worker has completed a checkpoint, or could not."""
        attempt = self._attempts.pop(event.save, None)
        committed = event.save.committed
        if event.error:
            self._last(committed).refused(event.error, now)
            failed = CheckpointFailed(committed=committed, path=event.path, error=event.error)
            return [DiscardCheckpoint(event.worker, event.save), failed]
        if committed in self.checkpoints:
            return []
        self.checkpoints[committed] = event.path
        writing_s = 0.0 if attempt is None else attempt.seconds
        return [
            CheckpointComplete(
                committed=committed,
                path=event.path,
                bytes=event.num_bytes,
                seconds=round(writing_s + event.seconds, 3),
                blocked_seconds=ABSENT if attempt is None else round(attempt.blocked_s, 4),
                writers=ABSENT if attempt is None else len(attempt.plan.writers),
            )
        ]

    def review(self, hands: Collection[WorkerId], alive: Collection[WorkerId], now: float) -> list[Action]:
        """Goes on with every attempt whose writers have all spoken or are no more; `hands` can be given work."""
        actions: list[Action] = []
        for save, attempt in list(self._attempts.items()):
            for worker in attempt.missing - set(alive):
                attempt.lost[worker] = f"worker {worker.slot} was lost before it had written its part"
            for worker in [worker for worker in attempt.missing if self._missed(worker, save)]:
                attempt.lost[worker] = f"worker {worker.slot} was out of the generation before it had the state to save"
            if attempt.missing or attempt.committer in alive:
                continue
            writers = (worker for worker in attempt.plan.writers if worker in hands)
            hand = next(writers, min(hands, default=None))
            if not attempt.lost:
                # While nobody lives who could complete it, it stays as it is.
                attempt.committer = hand
                if hand is not None:
                    parts = tuple(sorted(attempt.parts.values()))
                    actions.append(CommitCheckpoint(hand, save, parts, attempt.plan.layout))
                continue
            del self._attempts[save]
            # What a storage refuses it would refuse again; the next interval tries.
            self.is_due = self.is_due or not attempt.refused
            why = "; ".join(sorted(set(attempt.lost.values())))
            if attempt.refused:
                self._last(save.committed).refused(why, now)
            if hand is not None:
                actions.append(DiscardCheckpoint(hand, save))
            actions.append(CheckpointFailed(committed=save.committed, error=why))
        return actions

    def give_up(self, committed: int, now: float, patience_s: float) -> list[Action]:
        """Waits no longer for a checkpoint of `committed` steps that was begun `patience_s` ago."""
        actions: list[Action] = []
        for save, attempt in list(self._attempts.items()):
            if save.committed == committed and now - attempt.since > patience_s:
                del self._attempts[save]
                error = f"it was not complete after {patience_s:.0f} s"
                self._last(committed).refused(error, now)
                actions.append(CheckpointFailed(committed=committed, error=error))
        return actions

    def skip_gap(self, gap_s: float) -> None:
        """Nobody could be heard for this long."""
        for attempt in self._attempts.values():
            attempt.since += gap_s

    # ------------------------------------------------------------------------------------ using them

    def invalid(self, path: str | None, reason: str) -> list[Action]:
        """What was restored from this checkpoint is not what was saved: it is not used again. Several ranks may find
        that out; it is said once."""
        steps = [step for step, known in self.checkpoints.items() if known == path]
        for step in steps:
            del self.checkpoints[step]
        return [] if not steps else [CheckpointInvalid(path=path, reason=reason)]
