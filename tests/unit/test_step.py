"""The step on one rank: what it computes, what it keeps when it is interrupted, what it commits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from strategies.comm.groups import PeerLost
from strategies.gradient.compute import Fetch, LocalGradients
from strategies.gradient.spec import StepSpec
from strategies.objective.batch import Batch
from strategies.objective.rows import Rows
from strategies.optim.optimizer import Optimizer
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.spec import OPTIMIZERS, OptimizerSpec
from strategies.reduction.tree import Subtree, cover
from strategies.state.shard import StateShard
from strategies.state.training_state import TrainingState, state_digest
from strategies.update.engine import StepEngine, StepRecord
from strategies.update.phases import PHASES
from strategies.update.vote import Agreement
from strategies.update.warm_up import warm_up
from tests.batches import plain_batch
from tests.plugin_package.example_plugin.tiger import TIGER
from tests.unit.tiny_model import (
    VOCABULARY,
    TinyModel,
    bits,
    make,
    one_thread,  # noqa: F401 (autouse)
    settle,
    state_of,
)

LENGTH = 4


def fetch_for(virtual_workers: int) -> Fetch:
    def fetch(step: int, virtual_worker: int) -> Batch:
        rng = np.random.default_rng((step, virtual_worker))
        tokens = rng.integers(0, VOCABULARY, size=(2, LENGTH + 1), dtype=np.int64)
        return plain_batch(tokens, np.arange(2), 1000 * step + virtual_worker, virtual_workers)

    return fetch


fetch = fetch_for(4)
SPEC = StepSpec(seed=1, micro_batch=1, micro_batches=2, base_lr=1e-2, schedule=ScheduleSpec("constant"))


def engine_of(state: TrainingState, virtual_workers: int = 4, **changes: object) -> StepEngine:
    """An engine that has no place yet."""
    on_phase = changes.pop("on_phase", lambda phase, step: None)
    assert callable(on_phase)
    spec = replace(SPEC, **changes)  # type: ignore[arg-type]
    return StepEngine(state, spec, fetch_for(virtual_workers), on_phase)


def engine(
    dropout: float = 0.1,
    clip_norm: float | None = 1.0,
    on_phase: Callable[[str, int], None] = lambda phase, step: None,
    virtual_workers: int = 4,
    native: bool = False,
) -> StepEngine:
    state = make(dropout)
    made = engine_of(state, virtual_workers, clip_norm=clip_norm, native_reduction=native, on_phase=on_phase)
    begin(made, virtual_workers)
    return made


def begin(made: StepEngine, virtual_workers: int = 4) -> None:
    fabric = settle(made.state, virtual_workers)
    made.bind(fabric, fabric.layout, 0)


def local_of(made: StepEngine) -> LocalGradients:
    assert made.local is not None
    return made.local


def own_of(made: StepEngine) -> StateShard:
    assert made.state.arrangement.own is not None
    return made.state.arrangement.own


def gradient_of(local: LocalGradients, step: int, index: int, virtual_workers: int = 4) -> torch.Tensor:
    pieces = local.compute(step, [index], (0, virtual_workers), enter=lambda phase, step: None, check=lambda: None)
    return pieces[index, index + 1].clone()


def numbers(record: StepRecord) -> tuple[object, ...]:
    return record.step, record.loss, record.grad_norm, record.lr, record.hashes, record.skipped


def test_the_same_step_twice_gives_the_same_bits() -> None:
    first, second = engine(), engine()
    torch.manual_seed(1234)  # whatever state the generators are in
    for step in range(3):
        (a,), _ = first.run(step)
        torch.rand(7)
        (b,), _ = second.run(step)
        assert numbers(a) == numbers(b)
        assert a.hashes == tuple(1000 * step + index for index in range(4))
        assert not a.skipped
    assert state_digest(first.state) == state_digest(second.state)
    assert first.state.updates == 3


def test_a_prepared_step_changes_nothing_until_its_commit() -> None:
    ours = engine()
    before = state_digest(ours.state)
    ours.prepare(0)
    assert ours.prepared == (0, 1)
    vote = ours.vote(0)
    assert state_digest(ours.state) == before
    ours.commit(0, vote.norm)
    assert state_digest(ours.state) != before
    with pytest.raises(RuntimeError, match=r"step 0 is not prepared here \(prepared: None\)"):
        ours.commit(0, vote.norm)


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_rolling_forward_with_another_ranks_vote_gives_the_same_bits(clip_norm: float | None) -> None:
    usual, forward = engine(clip_norm=clip_norm), engine(clip_norm=clip_norm)
    (record,), _ = usual.run(0)
    forward.prepare(0)
    forward.commit(0, record.grad_norm)
    assert state_digest(forward.state) == state_digest(usual.state)


def test_dropout_belongs_to_the_virtual_worker_not_to_its_holder() -> None:
    """Each virtual worker's gradient does not depend on what is computed beside it, nor on the order."""
    ours = engine(dropout=0.5)

    def gradients(order: Sequence[int]) -> dict[int, bytes]:
        local_of(ours).discard()
        return {index: bits(gradient_of(local_of(ours), 0, index)) for index in order}

    together = gradients([0, 1, 2, 3])
    assert gradients([3, 1]) == {index: together[index] for index in (3, 1)}
    assert gradients([2]) == {2: together[2]}
    assert len(set(together.values())) == 4


def test_dropout_differs_from_step_to_step() -> None:
    ours = engine(dropout=0.5)
    local = local_of(ours)
    local.fetch = lambda step, index: fetch(0, index)
    assert bits(gradient_of(local, 0, 0)) != bits(gradient_of(local, 1, 0))


def test_the_gradient_is_that_of_the_mean_loss_over_the_batch() -> None:
    ours = engine(dropout=0.0)
    ours.prepare(0)
    reference: nn.Module = copy.deepcopy(local_of(ours).part.modules[0].module)
    for parameter in reference.parameters():
        parameter.grad = None
    rows = torch.from_numpy(np.concatenate([fetch(0, index).tokens for index in range(4)]))
    logits = reference(input_ids=rows[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    for slot in ours.state.space.slots:
        expected = dict(reference.named_parameters())[slot.name].grad
        assert expected is not None
        ours_here = own_of(ours).gradient[slot.offset : slot.offset + slot.numel].view(slot.shape)
        assert torch.allclose(ours_here, expected, atol=1e-6), slot.name


def test_a_gradient_spoilt_by_accident_is_computed_again() -> None:
    usual, spoilt = engine(), engine()
    spoilt.nan_step = 1
    for step in range(3):
        assert numbers(usual.run(step)[0][0]) == numbers(spoilt.run(step)[0][0])
    assert spoilt.nan_step is None
    assert state_digest(usual.state) == state_digest(spoilt.state)


def test_a_gradient_that_is_never_finite_skips_the_update_and_says_so() -> None:
    computed: list[int] = []

    def count(phase: str, step: int) -> None:
        if phase == "vote":
            computed.append(step)

    ours = engine(on_phase=count)
    ours.run(0)
    before = state_digest(ours.state)
    local = local_of(ours)
    usual = local._loss
    local._loss = lambda *given: usual(*given) * math.nan
    (record,), _ = ours.run(1)
    assert record.skipped
    assert math.isnan(record.grad_norm)
    assert computed == [0, 1, 1], "it is computed twice before it is believed"
    assert state_digest(ours.state) == before
    local._loss = usual
    (record,), _ = ours.run(2)
    assert not record.skipped
    assert math.isfinite(record.loss)


@pytest.mark.parametrize("clip_norm", [1e-3, 0.1, 1e3])
def test_clipping_is_that_of_torch(clip_norm: float) -> None:
    clipped = engine(dropout=0.0, clip_norm=clip_norm)
    clipped.prepare(0)
    slots, own = clipped.state.space.slots, own_of(clipped)
    parameters = [nn.Parameter(torch.zeros(slot.shape)) for slot in slots]
    for slot, parameter in zip(slots, parameters, strict=True):
        parameter.grad = own.gradient[slot.offset : slot.offset + slot.numel].view(slot.shape).clone()
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    clipped.prepared = None
    (record,), _ = clipped.run(0)
    assert record.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for slot, parameter in zip(slots, parameters, strict=True):
        assert parameter.grad is not None
        ours = own.gradient[slot.offset : slot.offset + slot.numel].view(slot.shape)
        # torch divides by (norm + 1e-6), we by the norm: "within rounding" is that much.
        assert torch.allclose(ours, parameter.grad, rtol=2e-6 / float(norm) + 1e-5, atol=1e-9)


def test_the_phases_come_in_order_and_their_times_add_up_to_the_step() -> None:
    seen: list[str] = []
    ours = engine(on_phase=lambda phase, step: seen.append(phase))
    (record,), _ = ours.run(0)
    assert seen == ["data", "compute"] * 4 + ["reduce", "gather", "vote", "commit"]
    assert tuple(record.phase_seconds) == PHASES
    assert sum(record.phase_seconds.values()) <= record.seconds + 1e-3
    assert record.phase_seconds["compute"] > 0


def test_what_happens_after_a_step_is_told_by_the_vote() -> None:
    ours = engine()
    assert ours.run(0)[1] == Agreement()
    ours.pause_requested = True
    assert ours.run(1)[1] == Agreement(pause=True)
    ours.pause_requested, ours.save_requested = False, True
    assert ours.run(2)[1] == Agreement(save=True)
    ours.is_saving = lambda: True
    assert ours.run(3)[1] == Agreement(save=True, saving=True)


@pytest.mark.parametrize("keep", [True, False])
def test_warming_up_changes_no_bit(keep: bool) -> None:
    ours, usual = engine_of(make(0.1)), engine()
    before = state_digest(ours.state)
    warm_up(ours, keep=keep)
    kept = ours.local
    assert state_digest(ours.state) == before
    begin(ours)
    assert (ours.local is kept) == keep, "what the warm-up has allocated is what the first step computes with"
    for step in range(2):
        assert numbers(ours.run(step)[0][0]) == numbers(usual.run(step)[0][0])
    assert state_digest(ours.state) == state_digest(usual.state)


@pytest.mark.parametrize("kind", [*OPTIMIZERS.values(), TIGER], ids=lambda kind: kind.name)
def test_every_optimizer_makes_an_update_before_there_is_a_layout(kind: Optimizer) -> None:
    """As it makes those of a step: also one that takes for granted that what it keeps is there."""
    spec = OptimizerSpec(kind=kind, lr=1e-2)
    ours, usual = engine_of(make(0.1, spec)), engine_of(make(0.1, spec))
    warm_up(ours, keep=True)
    for each in (ours, usual):
        begin(each)
    assert [numbers(ours.run(step)[0][0]) for step in range(2)] == [numbers(usual.run(step)[0][0]) for step in range(2)]
    assert state_digest(ours.state) == state_digest(usual.state)


class Counting(TinyModel):
    """Counts its forward passes in a buffer that is part of the state."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.get_buffer("scale").add_(1.0)
        return super().forward(input_ids)


def test_a_model_that_changes_its_buffers_is_refused_when_it_is_warmed_up() -> None:
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=r"buffer 'scale' in a forward pass.*Compute it from the input"):
        warm_up(engine_of(state_of(Counting())), keep=True)


def test_native_reduction_on_one_rank_is_close() -> None:
    ours, usual = engine(native=True), engine()
    a, b = ours.run(0)[0][0], usual.run(0)[0][0]
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert torch.allclose(own_of(ours).weights, own_of(usual).weights, atol=1e-6)


@pytest.mark.parametrize("virtual_workers", [1, 3, 5, 7])
def test_numbers_of_virtual_workers_that_are_no_power_of_two_work(virtual_workers: int) -> None:
    first, second = engine(virtual_workers=virtual_workers), engine(virtual_workers=virtual_workers)
    assert numbers(first.run(0)[0][0]) == numbers(second.run(0)[0][0])
    assert len(first.run(1)[0][0].hashes) == virtual_workers


# ---------------------------------------------------------------------------------------- interruptions


class Work:
    """Computes shares of step 0 of eight virtual workers of two micro-batches each, and counts the passes."""

    def __init__(self) -> None:
        self.local = local_of(engine(virtual_workers=8))
        self.passes = 0
        self.patience = 10**9
        inner = self.local._loss

        def counted(rows: Rows, targets: float | torch.Tensor) -> torch.Tensor:
            self.passes += 1
            return inner(rows, targets)

        self.local._loss = counted

    def check(self) -> None:
        if self.patience == 0:
            raise PeerLost("a peer is gone")
        self.patience -= 1

    def share(self, held: Sequence[int], step: int = 0) -> dict[Subtree, bytes]:
        pieces = self.local.compute(step, held, (0, 8), enter=lambda phase, step: None, check=self.check)
        assert set(pieces) == set(cover(held, (0, 8)))
        assert set(self.local.losses) == set(self.local.hashes) == set(held)
        return {node: bits(piece) for node, piece in pieces.items()}

    def losses(self) -> dict[int, float]:
        return {index: float(loss) for index, loss in self.local.losses.items()}


@pytest.mark.parametrize("after", range(16))
def test_an_interrupted_share_is_gone_on_with_where_it_was(after: int) -> None:
    usual, broken = Work(), Work()
    expected = usual.share(range(8))
    broken.patience = after
    with pytest.raises(PeerLost):
        broken.share(range(8))
    broken.patience = 10**9
    assert broken.share(range(8)) == expected
    assert broken.passes == usual.passes == 16, "no micro-batch is computed twice"
    assert broken.losses() == usual.losses()


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_ranks_hold_from_try_to_try_the_bits_are_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    broken = Work()
    for _ in range(4):
        held = sorted(rng.choice(8, size=rng.integers(0, 9), replace=False).tolist())
        broken.patience = int(rng.integers(0, 17))
        try:
            broken.share(held)
        except PeerLost:
            continue
    held = sorted(rng.choice(8, size=rng.integers(1, 9), replace=False).tolist())
    broken.patience = 10**9
    usual = Work()
    assert broken.share(held) == usual.share(held), f"seed {seed}, held {held}"
    assert broken.losses() == usual.losses()


def test_what_another_rank_holds_now_is_let_go_and_the_rest_kept() -> None:
    work = Work()
    work.share([0, 1, 2])
    work.passes = 0
    assert work.share([1, 2, 3]) == Work().share([1, 2, 3])
    assert work.passes == 4, "the sum of 0 and 1 cannot be taken apart; 2 is kept"


def test_another_step_begins_anew() -> None:
    work = Work()
    first = work.share([0, 1])
    second = work.share([0, 1], step=1)
    assert work.passes == 8
    assert first != second
    assert second == Work().share([0, 1], step=1)


def test_a_pass_that_fails_leaves_nothing_half_done() -> None:
    """An exception in the middle of a backward pass may have touched the gradient; that virtual worker begins anew."""
    work = Work()
    inner = work.local._loss
    calls = 0

    def failing(rows: Rows, targets: float | torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory")
        return inner(rows, targets)

    work.local._loss = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        work.share([0, 1, 2])
    assert work.share([0, 1, 2]) == Work().share([0, 1, 2])
    assert work.passes == 7, "the first virtual worker is kept, the second begins anew"


def test_a_step_repeated_after_a_lost_vote_computes_nothing_again() -> None:
    computed: list[int] = []
    lost = [True]

    def on_phase(phase: str, step: int) -> None:
        if phase == "vote" and lost.pop():
            lost.append(False)
            raise PeerLost("a peer is gone")

    ours, usual = engine(on_phase=on_phase), engine()
    local = local_of(ours)
    inner = local._loss
    local._loss = lambda *given: (computed.append(1), inner(*given))[1]
    with pytest.raises(PeerLost):
        ours.run(0)
    lost.append(False)
    ours.prepared = None
    assert numbers(ours.run(0)[0][0]) == numbers(usual.run(0)[0][0])
    assert len(computed) == 8
    assert state_digest(ours.state) == state_digest(usual.state)
