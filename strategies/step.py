"""The training step as a transaction: compute and reduce, vote, commit.

Until the vote nothing has changed; after it no communication is needed to finish. A step that fails is simply run
again, by the same or by other ranks, and gives the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from strategies.compute import Fetch, LocalGradients, StepSpec
from strategies.flat import FlatState
from strategies.groups import Groups
from strategies.layout import ParallelLayout
from strategies.norm import WORDS, from_words, norm_of, square_sum, to_words
from strategies.reduction import Reducer

PHASES = ("data", "compute", "reduce", "gather", "vote", "commit")
"""The phases of a step in order: the first two, taken in turns for every virtual worker, are local; the next three are
collectives; the last is local."""


@dataclass(frozen=True)
class StepRecord:
    """What a committed step was; identical on every rank but for the times. `loss` is nats per token."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    hashes: tuple[int, ...]
    skipped: bool
    generation: int
    committed_at: float
    seconds: float
    phase_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Vote:
    """What all ranks agreed on at the end of a step: the gradient's norm (NaN when it is not finite), the losses and
    hashes of all virtual workers, and any request to pause after this step."""

    norm: float
    losses: list[float]
    hashes: tuple[int, ...]
    pause: bool


class StepEngine:
    """Runs steps of one replica on one rank, generation after generation.

    `on_phase(phase, step)` is called at the start of every phase (heartbeats, fault injection). For the model see
    `strategies.compute.LocalGradients`.
    """

    def __init__(
        self,
        model: nn.Module,
        state: FlatState,
        spec: StepSpec,
        fetch: Fetch,
        on_phase: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.state = state
        self.spec = spec
        self.local = LocalGradients(model, state, spec, fetch)
        self.on_phase = on_phase
        self.pause_requested = False
        self.poison_step: int | None = None
        self.prepared_step: int | None = None
        # True after an exception in the middle of an update: the state is then neither the old nor the new one.
        self.applying = False
        self._times: dict[str, float] = {}

    def bind(self, groups: Groups, layout: ParallelLayout, generation: int) -> None:
        """Takes a place in a generation: the collectives go over `groups`, the work is dealt by `layout`."""
        self.groups = groups
        self.layout = layout
        self.generation = generation
        self.held = layout.assignment[groups.rank]
        self.prepared_step = None
        self.reducer = Reducer(groups, layout, self.state.size, self.state.device, native=self.spec.native_reduction)

    def run(self, step: int) -> tuple[StepRecord, bool]:
        """Prepares, votes and commits `step`; returns its record and whether all agreed to pause after it.

        A gradient that is not finite is computed once more from the start: what a failing device corrupted comes out
        right, and what the data caused comes out the same and then skips the update on every rank alike.

        Raises PeerLost when a peer is gone or the group was aborted; the state is then as before the step, unless
        `prepared_step` says that only the news of the vote is missing.
        """
        started = time.perf_counter()
        self._times = dict.fromkeys(PHASES, 0.0)
        for attempt in range(2):
            losses, hashes = self.prepare(step)
            vote = self.vote(step, losses, hashes)
            norm = vote.norm
            if math.isfinite(norm):
                break
            if attempt == 0:
                self.prepared_step = None
                self.local.discard()
        lr = self.commit(step, norm)
        record = StepRecord(
            step=step,
            loss=math.fsum(vote.losses),
            grad_norm=norm,
            lr=lr,
            tokens=self.spec.tokens_per_batch,
            hashes=vote.hashes,
            skipped=not math.isfinite(norm),
            generation=self.generation,
            committed_at=time.time(),
            seconds=time.perf_counter() - started,
            phase_seconds=self._times,
        )
        return record, vote.pause

    def prepare(self, step: int) -> tuple[list[float], list[int]]:
        """Computes this rank's virtual workers and reduces; `state.gradient` then holds the whole reduced gradient.

        Returns the loss (its share of the global mean) and the sample hash of each of this rank's virtual workers.
        """
        pieces = self.local.compute(
            step, self.held, self.layout.virtual_workers, enter=self._enter, check=self.groups.check
        )
        if self.poison_step == step:
            self.poison_step = None
            for piece in pieces.values():
                piece[0] = math.nan
        self._enter("reduce", step)
        reduced = self.reducer.reduce(pieces)
        self._enter("gather", step)
        assert reduced is not None
        self.reducer.gather(reduced, self.state.gradient)
        self.prepared_step = step
        return [float(self.local.losses[index]) for index in self.held], [self.local.hashes[i] for i in self.held]

    def vote(self, step: int, losses: list[float], hashes: list[int]) -> Vote:
        """Tells everyone that this rank holds the reduced gradient, and learns that all others do."""
        self._enter("vote", step)
        layout, rank = self.layout, self.groups.rank
        words = to_words(square_sum(self.reducer.own_slice(self.state.gradient)))
        floats = np.array([float(self.pause_requested), *losses], dtype=np.float64)
        row = np.concatenate([floats.view(np.int64), np.array([*words, *hashes], dtype=np.int64)])
        sizes = [1 + WORDS + 2 * len(held) for held in layout.assignment]
        if layout.world_size == 1:
            everyone = row
        else:
            device = self.state.device
            sent = torch.from_numpy(np.tile(row, layout.world_size)).to(device)
            received = torch.empty(sum(sizes), dtype=torch.int64, device=device)
            self.groups.all_to_all(received, sent, sizes, [len(row)] * layout.world_size)
            everyone = received.cpu().numpy()
        assert len(row) == sizes[rank]
        sums: list[int | None] = []
        loss_of: dict[int, float] = {}
        hash_of: dict[int, int] = {}
        pause = False
        for held, part in zip(layout.assignment, np.split(everyone, np.cumsum(sizes)[:-1]), strict=True):
            values = part[: 1 + len(held)].view(np.float64)
            pause = pause or bool(values[0])
            loss_of |= dict(zip(held, values[1:].tolist(), strict=True))
            sums.append(from_words(part[1 + len(held) :][:WORDS].tolist()))
            hash_of |= dict(zip(held, part[1 + len(held) + WORDS :].tolist(), strict=True))
        order = range(layout.virtual_workers)
        return Vote(norm_of(sums), [loss_of[i] for i in order], tuple(hash_of[i] for i in order), pause)

    def commit(self, step: int, norm: float | None = None) -> float:
        """Applies the held reduced gradient of `step`; local, cannot fail for want of a peer. Returns the rate used.

        Without `norm` (a rank that missed the news of the vote rolls forward) it is taken from the gradient held,
        with the same result.
        """
        self._enter("commit", step)
        if self.prepared_step != step:
            raise RuntimeError(f"step {step} is not prepared here (prepared: {self.prepared_step})")
        if norm is None:
            norm = norm_of([square_sum(self.state.gradient)])
        lr = self.spec.base_lr * self.spec.schedule.factor(step)
        if math.isfinite(norm):
            self.applying = True
            if self.spec.clip_norm is not None and norm > self.spec.clip_norm:
                self.state.gradient.mul_(self.spec.clip_norm / norm)
            self.state.apply(lr)
            self.applying = False
        self.prepared_step = None
        self.local.discard()
        self._leave()
        return lr

    def _enter(self, phase: str, step: int) -> None:
        now = time.perf_counter()
        self._leave(now)
        self._phase, self._entered = phase, now
        self.on_phase(phase, step)

    _phase: str | None = None
    _entered: float = 0.0

    def _leave(self, now: float | None = None) -> None:
        if self._phase is not None and self._phase in self._times:
            self._times[self._phase] += (time.perf_counter() if now is None else now) - self._entered
        self._phase = None
