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
import torch.nn.functional as F
from torch import nn

from strategies.flat import FlatState
from strategies.groups import Groups
from strategies.layout import ParallelLayout
from strategies.optimizers import ScheduleSpec
from strategies.randomness import seed_stream
from strategies.reduction import Reducer, block_squares, norm_of
from strategies.tree import Node, split

PHASES = ("data", "compute", "reduce", "gather", "vote", "commit")
"""The phases of a step in order: the first two, taken in turns for every virtual worker, are local; the next three are
collectives; the last is local."""

Fetch = Callable[[int, int], tuple[np.ndarray, np.ndarray, int]]
"""(step, virtual worker) -> token ids int64 [samples, length + 1], sample ids int64 [samples], hash of the ids."""


@dataclass(frozen=True)
class StepSpec:
    """What decides the numbers of a step; a function of the job file."""

    seed: int
    micro_batch: int
    tokens_per_batch: int
    base_lr: float
    schedule: ScheduleSpec
    clip_norm: float | None = 1.0
    precision: str = "fp32"
    native_reduction: bool = False
    compile: bool = False


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
    """What all ranks agreed on at the end of a step: the block squares, losses and hashes of all, and any request to
    pause after this step."""

    squares: list[float]
    losses: list[float]
    hashes: tuple[int, ...]
    pause: bool


class StepEngine:
    """Runs steps of one replica on one rank, generation after generation.

    `on_phase(phase, step)` is called at the start of every phase (heartbeats, fault injection). The model maps
    `input_ids` int64 [batch, length] to logits [batch, length, vocabulary], plain or as an attribute `logits`.
    """

    def __init__(
        self,
        model: nn.Module,
        state: FlatState,
        spec: StepSpec,
        fetch: Fetch,
        on_phase: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.model = model
        self.state = state
        self.spec = spec
        self.fetch = fetch
        self.on_phase = on_phase
        self.pause_requested = False
        self.poison_step: int | None = None
        self.prepared_step: int | None = None
        # True after an exception in the middle of an update: the state is then neither the old nor the new one.
        self.applying = False
        self._pool: list[torch.Tensor] = []
        self._times: dict[str, float] = {}
        self._loss = torch.compile(self._micro_loss) if spec.compile else self._micro_loss

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
            norm = norm_of(vote.squares)
            if math.isfinite(norm):
                break
            if attempt == 0:
                self.prepared_step = None
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
        losses: list[torch.Tensor] = []
        hashes: list[int] = []
        pieces: dict[Node, torch.Tensor] = {}
        if not self.held:
            self._enter("data", step)
            self._enter("compute", step)
        for index in self.held:
            gradient, loss, digest = self._virtual_worker(step, index)
            losses.append(loss)
            hashes.append(digest)
            self._merge(pieces, (index, index + 1), gradient)
        if self.poison_step == step:
            self.poison_step = None
            for piece in pieces.values():
                piece[0] = math.nan
        self._enter("reduce", step)
        reduced = self.reducer.reduce(pieces)
        self._enter("gather", step)
        assert reduced is not None
        self.reducer.gather(reduced, self.state.gradient)
        self._pool += pieces.values()
        self.prepared_step = step
        return [float(loss) for loss in losses], hashes

    def _virtual_worker(self, step: int, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The gradient [size] of one virtual worker, summed in micro-batch order, its loss and its sample hash."""
        self._enter("data", step)
        tokens, _, digest = self.fetch(step, index)
        batch = torch.from_numpy(tokens).to(self.state.device, non_blocking=True)
        self._enter("compute", step)
        gradient = self._pool.pop() if self._pool else torch.empty_like(self.state.weights)
        gradient.zero_()
        self.state.accumulate_into(gradient)
        total = torch.zeros((), dtype=torch.float64, device=self.state.device)
        for micro, rows in enumerate(batch.split(self.spec.micro_batch)):
            self.groups.check()
            seed_stream(self.spec.seed, "step", step, index, micro)
            loss = self._loss(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return gradient, total, digest

    def _micro_loss(self, rows: torch.Tensor) -> torch.Tensor:
        device = self.state.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.spec.precision == "bf16"):
            output = self.model(input_ids=rows[:, :-1])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        summed = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        return summed / self.spec.tokens_per_batch

    def _merge(self, pieces: dict[Node, torch.Tensor], node: Node, gradient: torch.Tensor) -> None:
        """Adds a finished subtree, and joins it with its left sibling for as long as that one is complete too."""
        parents: list[Node] = []
        at: Node = (0, self.layout.virtual_workers)
        while at != node:
            parents.append(at)
            left, right = split(at)
            at = left if node[1] <= left[1] else right
        while parents:
            left, right = split(parents[-1])
            if node != right or left not in pieces:
                break
            joined = pieces.pop(left).add_(gradient)
            self._pool.append(gradient)
            gradient, node = joined, parents.pop()
        pieces[node] = gradient

    def vote(self, step: int, losses: list[float], hashes: list[int]) -> Vote:
        """Tells everyone that this rank holds the reduced gradient, and learns that all others do."""
        self._enter("vote", step)
        layout, reducer, rank = self.layout, self.reducer, self.groups.rank
        squares = block_squares(reducer.own_slice(self.state.gradient), reducer.block)
        numbers = np.array([float(self.pause_requested), *losses, *squares], dtype=np.float64)
        row = np.concatenate([numbers.view(np.int64), np.array(hashes, dtype=np.int64)])
        sizes = [1 + 2 * len(held) + reducer.blocks_of(peer) for peer, held in enumerate(layout.assignment)]
        if layout.world_size == 1:
            everyone = row
        else:
            device = self.state.device
            sent = torch.from_numpy(np.tile(row, layout.world_size)).to(device)
            received = torch.empty(sum(sizes), dtype=torch.int64, device=device)
            self.groups.all_to_all(received, sent, sizes, [len(row)] * layout.world_size)
            everyone = received.cpu().numpy()
        assert len(row) == sizes[rank]
        all_squares: list[float] = []
        loss_of: dict[int, float] = {}
        hash_of: dict[int, int] = {}
        pause = False
        offset = 0
        for peer, held in enumerate(layout.assignment):
            part = everyone[offset : offset + sizes[peer]]
            offset += sizes[peer]
            values = part.view(np.float64)
            pause = pause or bool(values[0])
            loss_of |= dict(zip(held, values[1 : 1 + len(held)].tolist(), strict=True))
            all_squares += values[1 + len(held) : sizes[peer] - len(held)].tolist()
            hash_of |= dict(zip(held, part[sizes[peer] - len(held) :].tolist(), strict=True))
        order = range(layout.virtual_workers)
        return Vote(all_squares, [loss_of[i] for i in order], tuple(hash_of[i] for i in order), pause)

    def commit(self, step: int, norm: float | None = None) -> float:
        """Applies the held reduced gradient of `step`; local, cannot fail for want of a peer. Returns the rate used.

        Without `norm` (a rank that missed the news of the vote rolls forward) it is taken from the gradient held,
        with the same result.
        """
        self._enter("commit", step)
        if self.prepared_step != step:
            raise RuntimeError(f"step {step} is not prepared here (prepared: {self.prepared_step})")
        if norm is None:
            norm = norm_of(block_squares(self.state.gradient, self.reducer.block))
        lr = self.spec.base_lr * self.spec.schedule.factor(step)
        if math.isfinite(norm):
            self.applying = True
            if self.spec.clip_norm is not None and norm > self.spec.clip_norm:
                self.state.gradient.mul_(self.spec.clip_norm / norm)
            self.state.apply(lr)
            self.applying = False
        self.prepared_step = None
        self._leave()
        return lr

    def warm_up(self) -> None:
        """One forward and backward pass on made-up tokens, its result thrown away.

        The first pass of a process is slow (kernels are chosen, memory is mapped, code is compiled); a standby that
        has done it joins at full speed.
        """
        tokens, _, _ = self.fetch(0, 0)
        rows = torch.from_numpy(tokens[: self.spec.micro_batch]).to(self.state.device)
        scratch = torch.zeros_like(self.state.weights)
        self.state.accumulate_into(scratch)
        self._loss(rows).backward()  # type: ignore[no-untyped-call]
        self.state.release_gradients()
        self._pool.append(scratch)

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
