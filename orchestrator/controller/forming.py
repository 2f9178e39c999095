"""Forming a generation: what state there is, where it is, and who takes it from there with which share of the work.

What a worker says of its state is in its view (`committed`, `prepared`, `torn`). What that makes together is decided
here: so far a worker holds the whole state or none that is of use, and where the state is, is a set of holders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.controller import policy
from orchestrator.controller.protocol import Record
from orchestrator.controller.views import ControllerConfig, WorkerView
from orchestrator.messages import Generation, Member, WorkerId
from strategies.layout import deal

# ---------------------------------------------------------------------------------------- the state there is


@dataclass(frozen=True)
class Origin:
    """The state a generation starts from: of how many steps, and where it is.

    Either living workers have it: `holders` do, and those in `rolling` can roll forward to it (they hold the state of
    one step less, and the reduced gradient of the missing step). Or it is read from the checkpoint `restore`.
    """

    committed: int
    holders: frozenset[WorkerId] = frozenset()
    rolling: frozenset[WorkerId] = frozenset()
    restore: str | None = None

    @property
    def workers(self) -> frozenset[WorkerId]:
        """All living workers that can give it."""
        return self.holders | self.rolling

    @property
    def kind(self) -> str:
        """As recoveries name it."""
        return "peers" if self.restore is None else "checkpoint"


def newest_state(idle: Sequence[WorkerView], recorded: int, checkpoints: Mapping[int, str]) -> Origin | None:
    """The newest state there is: that of these workers, or a newer one in storage. `recorded` steps are on record.

    None when there is no checkpoint and no state among the workers is whole.
    """
    at_hand = state_at_hand(idle, recorded)
    stored = max((step for step in checkpoints if step <= recorded), default=0)
    if stored > (0 if at_hand is None else at_hand.committed):
        return Origin(stored, restore=checkpoints[stored])
    return at_hand


def state_at_hand(idle: Sequence[WorkerView], recorded: int) -> Origin | None:
    """The newest state among these workers; None when no state among them is whole.

    When the last holder of a step on record is gone, those that prepared it can still roll forward: after the vote the
    gradient they hold is the one that was applied. (What is not on record is simply run again.)
    """
    whole = [view for view in idle if not view.torn]
    if not whole:
        return None
    newest = max(view.committed for view in whole)
    top = [view for view in whole if view.committed == newest]
    if newest + 1 == recorded and any(view.prepared for view in top):
        return Origin(recorded, rolling=frozenset(v.worker for v in top if v.prepared))
    if newest == 0:
        # Models built apart must agree to count as copies; one that has trained sets the standard.
        first = min(top, key=lambda view: (not view.has_trained, view.worker))
        return Origin(0, frozenset(v.worker for v in top if v.initial == first.initial))
    return Origin(
        newest,
        frozenset(view.worker for view in top),
        frozenset(view.worker for view in whole if view.prepared and view.committed == newest - 1),
    )


def is_last_holder(view: WorkerView, idle: Sequence[WorkerView], recorded: int) -> bool:
    """Whether committed steps are lost with this one of the idle workers."""
    before = state_at_hand(idle, recorded)
    after = state_at_hand([other for other in idle if other is not view], recorded)
    return before is not None and before.committed > (0 if after is None else after.committed)


def holds_alone(view: WorkerView, members: Iterable[WorkerView]) -> bool:
    """Whether this member has a state that no other has."""
    return not view.torn and not any(other is not view and other.alive and not other.torn for other in members)


def final_holders(idle: Sequence[WorkerView], recorded: int, total_steps: int, *, stopping: bool) -> list[WorkerView]:
    """The workers whose state is the one the run ends with; empty when it is not at its end.

    That is the state after the last step, or, when the run is `stopping`, the newest if nothing on record is missing
    in it.
    """
    holders = [view for view in idle if view.has_state]
    if done := [view for view in holders if view.committed == total_steps]:
        return done
    newest = max((view.committed for view in holders), default=0)
    if not stopping or newest < recorded:
        return []
    return [view for view in holders if view.committed == newest]


def refuse_unrecorded(idle: Iterable[WorkerView], recorded: int) -> list[Record]:
    """A state of more steps than are on record is not used, or those steps would never be on it.

    Workers keep the reports of steps that are not on record, so this takes a predecessor that rolled back and died
    before it had ended this worker.
    """
    records = []
    for view in idle:
        if view.committed > recorded and not view.torn:
            view.torn = True
            records.append(
                Record(
                    "state_refused",
                    {"worker": view.worker.slot, "incarnation": view.worker.incarnation,
                     "committed": view.committed, "recorded": recorded},
                )
            )  # fmt: skip
    return records


# ---------------------------------------------------------------------------------------- the next generation


@dataclass(frozen=True)
class Ranks:
    """The members of the next generation in rank order, with the virtual workers each gets."""

    members: tuple[WorkerView, ...]
    assignment: tuple[tuple[int, ...], ...]


def choose_ranks(
    idle: Sequence[WorkerView], sources: frozenset[WorkerId], target: int, config: ControllerConfig, now: float
) -> Ranks:
    """Who is in the next generation; `sources` have the state it starts from (empty: it comes from storage).

    Those with the state come first, then lower slots, up to `target`. When none of the chosen has it, up to two
    draining workers that do come along without work, to hand it over. Ranks are ordered by node, so that neighbours in
    the summation tree share one.
    """
    able = policy.usable(idle, config.min_workers, now)
    able.sort(key=lambda view: (view.draining, view.worker not in sources, view.worker))
    chosen = able[: max(1, min(target, config.virtual_workers))]
    donors: list[WorkerView] = []
    if sources and not any(view.worker in sources for view in chosen):
        # Able or not, only draining workers can be left: a staying source would have been chosen.
        donors = sorted((v for v in idle if v.draining and v.worker in sources), key=lambda v: v.worker)[:2]
    members = sorted((*chosen, *donors), key=lambda v: (v.node, v.worker))
    idlers = {view.worker for view in donors}
    speeds = [0.0 if view.worker in idlers else 1.0 for view in members]
    return Ranks(tuple(members), deal(config.virtual_workers, speeds))


def make_generation(
    number: int, epoch: int, cause: str, origin: Origin, ranks: Ranks, fired_faults: Iterable[int]
) -> Generation:
    """What every member is told."""
    workers = [view.worker for view in ranks.members]
    return Generation(
        number=number,
        epoch=epoch,
        committed=origin.committed,
        cause=cause,
        members=tuple(_member(view) for view in ranks.members),
        assignment=ranks.assignment,
        holders=tuple(rank for rank, worker in enumerate(workers) if worker in origin.holders),
        roll_forward=tuple(rank for rank, worker in enumerate(workers) if worker in origin.rolling),
        restore=origin.restore,
        fired_faults=tuple(sorted(fired_faults)),
    )


def generation_record(generation: Generation, origin: Origin, steps_lost: int) -> Record:
    """What the event log says of a generation; `steps_lost` is how far it begins before the end of the record."""
    return Record(
        "generation",
        {"generation": generation.number, "start_step": generation.committed, "cause": generation.cause,
         "workers": [
             {"worker": m.worker.slot, "incarnation": m.worker.incarnation, "node": m.node, "pid": m.pid}
             for m in generation.members
         ],
         "layout": {"data": len(generation.members), "tensor": 1, "pipeline": 1, "shard": "none"},
         "restore": generation.restore, "source": origin.kind, "steps_lost": steps_lost},
    )  # fmt: skip


def _member(view: WorkerView) -> Member:
    ready = view.ready
    assert ready is not None
    return Member(view.worker, ready.node, ready.pid, ready.host, ready.store_port)
