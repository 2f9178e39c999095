"""A rank dies or falls silent in the middle of a step or of a reshard: the others notice, and go on without it."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

import strategies.state.training_state
from strategies.comm.fabric import Fabric
from strategies.comm.groups import PeerLost
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain, place_state, trained_spans
from strategies.layout.statemap import NOTHING, Spans, subtract, whole
from strategies.update.engine import StepEngine
from tests.ranks.laid_out import CPU, Stretch, Trained, barrier, layout_of, make_engine, run_stretch, train
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks
from tests.selection import nightly

SECONDS = 10.0
"""What a loaded machine may take to notice; what it takes without load is a tenth of a second."""
SILENCE_S = 1.5
"""After this the test does what the controller does about a rank without progress: it aborts the others."""
ON_THE_WAY = ("transfers", "barrier")
"""Where a rank can be lost before the layout counts."""
STEPS = 3


@dataclass(frozen=True)
class Loss:
    """The `victim` (a process) of the second layout is killed or stopped, in step 1 or on the way to it: at its n-th
    look at the group (`check`, before every micro-batch), or at the n-th `gather` of parameters, or at the start of a
    `phase`, or of the transfers, or where all wait for all to have theirs."""

    victim: int
    how: str
    check: int = 0
    phase: str = ""
    gather: int = 0

    def strike(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL if self.how == "killed" else signal.SIGSTOP)
        raise AssertionError("a stopped process was continued")


@dataclass
class Survivor:
    """What a survivor saw: how it learned of the loss and after how long, and what it trained afterwards."""

    error: str
    seconds: float
    trained: Trained


Legs = tuple[Stretch, Stretch, Stretch]


def survive(rank: int, address: Endpoint, legs: Legs, loss: Loss, tensor: int, model: str) -> Survivor:
    """A step in the first layout, an attempt in the second, and the rest without the victim in the third."""
    engine = make_engine(0.0 if tensor > 1 else 0.1, tensor, model=model)
    first, second, third = legs
    held_by = dict.fromkeys(range(len(members_of(first))), whole(engine.state.space.size, tensor))
    journey = Journey(engine, address)
    journey.go(rank, first, held_by, 0)
    held_by = held_after(engine, first)
    seconds, error = journey.lose(rank, second, held_by, loss)
    if loss.phase not in ON_THE_WAY:
        held_by = held_after(engine, second)
    if rank in members_of(second):
        assert not subtract(held_by.get(rank, NOTHING), engine.state.held), "it still has what all think it has"
    journey.go(rank, third, held_by, 1)
    return Survivor(error, seconds, journey.seen)


def members_of(stretch: Stretch) -> tuple[int, ...]:
    return stretch.ranks or tuple(range(stretch.layout.world_size))


def nodes_of(stretch: Stretch) -> list[Domain]:
    return [Domain("", str(member)) for member in members_of(stretch)]


def held_after(engine: StepEngine, stretch: Stretch) -> dict[int, Spans]:
    """By process, once it has taken its place."""
    shards = place_state(stretch.layout, engine.state.space, nodes_of(stretch), 2)
    return dict(zip(members_of(stretch), trained_spans(stretch.layout, shards), strict=True))


class Journey:
    """One process from layout to layout. Several of the same ranks need a `name` each."""

    def __init__(self, engine: StepEngine, address: Endpoint, name: str = "") -> None:
        self.engine = engine
        self.address = address
        self.name = name
        self.seen = Trained()
        self.legs = 0

    def form(self, rank: int, stretch: Stretch) -> Fabric:
        self.legs += 1
        fabric = Fabric(rank=members_of(stretch).index(rank), layout=stretch.layout, device=CPU)
        fabric.form(store_address=self.address, prefix=f"{self.name}leg{self.legs}", host=HOST, timeout_s=PATIENCE_S)
        return fabric

    def go(self, rank: int, stretch: Stretch, held_by: dict[int, Spans], step: int) -> None:
        members = members_of(stretch)
        if rank not in members:
            self.legs += 1
            return
        fabric = self.form(rank, stretch)
        try:
            held = [held_by.get(member, NOTHING) for member in members]
            if not held[fabric.rank]:
                self.engine.state.invalidate()
            run_stretch(self.engine, fabric, stretch, held, nodes_of(stretch), 2, step, self.seen)
        finally:
            fabric.drop()

    def lose(self, rank: int, stretch: Stretch, held_by: dict[int, Spans], loss: Loss) -> tuple[float, str]:
        """Seconds until this rank knew (from the abort on, where the victim is stopped), and what it was told."""
        engine = self.engine
        members = members_of(stretch)
        if rank not in members:
            self.legs += 1
            return 0.0, ""
        fabric = self.form(rank, stretch)
        is_silent = loss.how == "stopped" and rank != loss.victim
        started = time.monotonic() + (SILENCE_S if is_silent else 0.0)
        timer = threading.Timer(SILENCE_S, fabric.abort)
        if rank == loss.victim:
            arm(engine, fabric, loss)
        try:
            if is_silent and loss.phase in ON_THE_WAY:
                timer.start()
            held = [held_by.get(member, NOTHING) for member in members]
            if not held[fabric.rank]:
                engine.state.invalidate()
            wait = arm_barrier(fabric, loss) if rank == loss.victim else lambda: barrier(fabric)
            engine.state.adopt_layout(stretch.layout, fabric, held, nodes_of(stretch), 2, 1, wait)
            engine.bind(fabric, stretch.layout, 1)
            if is_silent and loss.phase not in ON_THE_WAY:
                started = time.monotonic() + SILENCE_S
                timer.start()
            engine.run(1)
        except PeerLost as error:
            return time.monotonic() - started, str(error)
        finally:
            timer.cancel()
            fabric.drop()
        raise AssertionError(f"rank {rank} finished a step that another did not")


def arm(engine: StepEngine, fabric: Fabric, loss: Loss) -> None:
    checks = 0
    inner = fabric.check

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == loss.check:
            loss.strike()
        inner()

    gathers = 0
    gather_all = fabric.data_group.all_gather

    def gather(*arguments: Any, **named: Any) -> None:
        nonlocal gathers
        gathers += 1
        if gathers == loss.gather:
            loss.strike()
        gather_all(*arguments, **named)

    def on_phase(phase: str, step: int) -> None:
        if phase == loss.phase:
            loss.strike()

    def execute(*arguments: Any) -> NoReturn:
        loss.strike()

    fabric.check = check  # type: ignore[method-assign]
    fabric.data_group.all_gather = gather  # type: ignore[method-assign]
    engine.phases.on_phase = on_phase
    if loss.phase == "transfers":
        strategies.state.training_state.execute = execute


def arm_barrier(fabric: Fabric, loss: Loss) -> Callable[[], object]:
    return loss.strike if loss.phase == "barrier" else lambda: barrier(fabric)


def without(victim: int, members: tuple[int, ...], layout: ParallelLayout) -> Stretch:
    left = tuple(member for member in members if member != victim)
    return Stretch(layout, STEPS - 1, left)


@functools.cache
def one_rank(tensor: int, model: str) -> Trained:
    stretch = Stretch(layout_of(tensor=tensor), STEPS)
    dropout = 0.0 if tensor > 1 else 0.1
    return run_ranks(tensor, train, [stretch], dropout, 2, "fp32", None, model)[0]  # type: ignore[no-any-return]


def assert_survived(legs: Legs, loss: Loss, tensor: int = 1, model: str = "own") -> None:
    expected = one_rank(tensor, model)
    world = 1 + max(member for stretch in legs for member in members_of(stretch))
    print(loss, [(*stretch.layout.describe().values(), members_of(stretch)) for stretch in legs])
    by_process = run_ranks(world, survive, legs, loss, tensor, model, timeout_s=240.0, lost={loss.victim})
    for process in members_of(legs[1]):
        if process == loss.victim:
            continue
        survivor = by_process[process]
        print(f"process {process}: {survivor.seconds:.2f} s, {survivor.error}")
        assert survivor.seconds < SECONDS
        assert survivor.error
    assert by_process[members_of(legs[2])[0]].trained.digest == expected.digest
    for process in members_of(legs[2]):
        trained = by_process[process].trained
        assert len(trained.losses) >= STEPS - 1
        assert trained.losses == expected.losses[-len(trained.losses) :]
        assert trained.norms == expected.norms[-len(trained.norms) :]


FOUR = {
    "pipeline": layout_of(2, 2),
    "zero bubble": layout_of(2, 2, 1, "gradients", "zero-bubble"),
    "tensor": layout_of(2, 1, 2),
    "fsdp": layout_of(4, 1, 1, "parameters"),
    "fsdp and pipeline": layout_of(2, 2, 1, "parameters"),
    "tensor and pipeline": layout_of(1, 2, 2, "optimizer"),
}
"""Layouts of four ranks, of which one is lost."""
RANKS = (2, 1, 3, 0)
"""Which process is which rank. Process 0 serves the store and is never lost."""


@pytest.mark.parametrize(
    ("name", "victim", "how"),
    [
        ("pipeline", 1, "killed"), ("fsdp", 1, "killed"), ("fsdp and pipeline", 2, "stopped"),
        *nightly(
            [
                ("tensor", 3, "stopped"),
                ("pipeline", 1, "stopped"), ("zero bubble", 2, "killed"), ("zero bubble", 2, "stopped"),
                ("tensor", 3, "killed"), ("fsdp", 1, "stopped"), ("fsdp and pipeline", 2, "killed"),
                ("tensor and pipeline", 3, "killed"), ("tensor and pipeline", 3, "stopped"),
            ]
        ),
    ],
)  # fmt: skip
def test_a_rank_lost_in_the_middle_of_computing(name: str, victim: int, how: str) -> None:
    layout = FOUR[name]
    tensor = layout.tensor
    after = layout_of(1, 1, tensor, spares=1) if tensor > 1 else layout_of(1, 3)
    legs = (Stretch(layout, 1, (0, 1, 2, 3)), Stretch(layout, 1, RANKS), without(victim, RANKS, after))
    assert_survived(legs, Loss(victim, how, check=4), tensor)


@pytest.mark.parametrize("gather", [3, *nightly([2, 5, 7, 9])])
def test_a_rank_lost_while_frozen_rows_are_gathered(gather: int) -> None:
    """In the middle of a pass FSDP2 has put whole parameters in the places of rows: nothing has changed the model."""
    layout = layout_of(3, 1, 1, "parameters")
    legs = (Stretch(layout, 1, (0, 1, 2)), Stretch(layout, 1, (0, 1, 2)), Stretch(layout_of(2), STEPS - 1, (0, 2)))
    assert_survived(legs, Loss(1, "killed", gather=gather), model="frozen")


@pytest.mark.parametrize(("victim", "how"), [(1, "killed"), (2, "stopped")])
@pytest.mark.parametrize(
    "layout", [layout_of(1, 2), layout_of(1, 1, 2), layout_of(2, 1, 1, "parameters")], ids=["pp", "tp", "fsdp"]
)
def test_one_of_two_ranks_lost_leaves_the_other_with_everything(layout: ParallelLayout, victim: int, how: str) -> None:
    """It goes on alone, or with a process that has nothing where a tensor-parallel group needs two."""
    ranks = (3 - victim, 0)[: layout.tensor]
    third = Stretch(layout_of(tensor=layout.tensor), STEPS - 1, ranks)
    legs = (Stretch(layout, 1, (1, 2)), Stretch(layout, 1, (2, 1)), third)
    assert_survived(legs, Loss(victim, how, check=7), layout.tensor)


@pytest.mark.parametrize(
    ("phase", "how", "shard"),
    [
        ("reduce", "stopped", "optimizer"), ("gather", "killed", "gradients"), ("vote", "stopped", "optimizer"),
        ("transfers", "killed", "optimizer"), ("barrier", "killed", "gradients"),
        *nightly(
            [
                ("refresh", "killed", "optimizer"), ("vote", "killed", "gradients"),
                ("transfers", "stopped", "gradients"), ("barrier", "stopped", "optimizer"),
            ]
        ),
    ],
)  # fmt: skip
def test_a_rank_lost_where_ranks_wait_for_each_other(phase: str, how: str, shard: str) -> None:
    """A rank that is interrupted on the way to a layout has what it had before."""
    victim = 3
    before = layout_of(3, 1, 1, shard)
    layout = layout_of(2, 2, 1, shard)
    legs = (
        Stretch(before, 1, (1, 3, 2)), Stretch(layout, 1, RANKS), without(victim, RANKS, layout_of(3, 1, 1, shard)),
    )  # fmt: skip
    assert_survived(legs, Loss(victim, how, phase=phase))
