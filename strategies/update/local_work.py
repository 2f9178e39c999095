"""What a rank does in a round of local steps: trains its virtual replicas, one after the other, and takes part in the
exchange.

Nothing of it changes what counts. A replica that was trained is kept until the round is committed, and one that was
interrupted is gone on with, as long as the rank still has it; one whose ranks were lost is trained again from the outer
weights, by those who have it then. So replicas of others are never waited for before they are needed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed

import numpy as np
import torch

from strategies.comm.fabric import Fabric
from strategies.comm.island import IslandFabric
from strategies.gradient.compute import Enter, LocalGradients
from strategies.gradient.work import Computed, GradientWork, LocalWork
from strategies.layout.parallel import ParallelLayout
from strategies.layout.replicas import across, replicas_at, within
from strategies.layout.space import FlatRanges
from strategies.model.model_part import ModelPart
from strategies.reduction.coded import CodedReducer, Residual, Rounding
from strategies.reduction.norm import from_words, norm_of, to_words
from strategies.reduction.reducer import Reducer
from strategies.reduction.tree import Subtree
from strategies.reduction.tree_sum import Summing
from strategies.state.shard import StateShard
from strategies.state.training_state import Arrangement
from strategies.state.virtual_shard import VirtualShard
from strategies.update.counting import counted, square_sum_of
from strategies.update.outer import MOMENTUM, OWN_WEIGHTS, LocalSettings, Replicas, outer_step
from strategies.update.setting import Setting
from strategies.update.vote import exchange
from strategies.wire.blocks import Blocks
from strategies.wire.codecs import codec_of

KEPT = "local"


@dataclass
class _Replica:
    """How far a virtual replica is in a round: what it has computed of each step, and in the end its weights. `sharers`
    are the ranks that train it together, which all are as far."""

    sharers: int
    computed: list[Computed] = field(default_factory=list)
    weights: torch.Tensor | None = None


@dataclass
class _Progress:
    """What a rank keeps of a round that is interrupted. `inner` is where a replica is trained; it has that of replica
    `at`."""

    part: ModelPart
    inner: StateShard
    first: int = -1
    at: int = -1
    replicas: dict[int, _Replica] = field(default_factory=dict)

    def begin(self, first: int) -> None:
        """The round that begins with this step, which may have been begun before."""
        if first != self.first:
            self.first, self.at, self.replicas = first, -1, {}


class LocalStepsWork:
    """See the module. More than 15 attributes: what is exchanged, by whom, and what trains here."""

    def __init__(
        self, settings: LocalSettings, replicas: Replicas, setting: Setting, plain: GradientWork
    ) -> None:  # fmt: skip
        self._settings, self._replicas, self._setting, self._plain = settings, replicas, setting, plain
        arrangement, layout, fabric = setting.state.arrangement, setting.layout, setting.fabric
        place = layout.place(fabric.rank)
        assert place is not None
        assert arrangement.own is not None
        assert isinstance(arrangement.part, ModelPart)
        self._place, self._own, self._part = place, arrangement.own, arrangement.part
        self._here = replicas_at(layout, place.data)
        self._progress = self._take_up(setting)
        self._total = setting.spec.total_steps
        self._across = across(layout)
        self._is_local = False
        self._works: dict[int, tuple[GradientWork, Fabric, ParallelLayout]] = {}
        self._exchanges: dict[int, _Exchange] = {}

    @classmethod
    def where_placed(cls, settings: LocalSettings, replicas: Replicas, setting: Setting) -> GradientWork:
        """A rank without a part of the model has nothing to do."""
        plain = setting.plain()
        return plain if setting.layout.place(setting.fabric.rank) is None else cls(settings, replicas, setting, plain)

    def _take_up(self, setting: Setting) -> _Progress:
        """What is kept of an interrupted round, if this rank has the same part of the model."""
        kept = setting.kept.get(KEPT)
        if not isinstance(kept, _Progress) or kept.part is not self._part:
            state = setting.state
            inner = StateShard(
                self._own.coordinate, self._part.flat, state.spec, state.device, spaces=state.spaces
            )  # fmt: skip
            setting.kept[KEPT] = kept = _Progress(self._part, inner)
        return kept

    @property
    def local(self) -> LocalGradients | None:
        """What computes here, if one stage has the whole model."""
        return self._plain.local if isinstance(self._plain, LocalWork) else None

    # ------------------------------------------------------------------------------------ what a step asks

    def of_step(self, step: int) -> Computed:
        if not self._is_local:
            return self._plain.of_step(step)
        losses: dict[int, torch.Tensor] = {}
        hashes: dict[int, int] = {}
        norms: dict[int, float] = {}
        for number in self._here:
            found = self._progress.replicas[number].computed[step - self._progress.first]
            losses |= found.losses
            hashes |= found.hashes
            norms |= found.norms
        return Computed(losses, hashes, norms)

    def refresh(self, enter: Callable[[str], None]) -> None:
        self._plain.refresh(enter)

    def prepare_again(self) -> None:
        self._plain.prepare_again()

    def inject_nan(self) -> None:
        self._plain.inject_nan()

    def discard(self) -> None:
        """Forgets the round."""
        self._plain.discard()
        self._progress.begin(-1)

    def run(self, step: int, enter: Enter, check: Callable[[], None]) -> None:
        self._is_local = step >= self._settings.warmup_steps
        if not self._is_local:
            if self._works:
                self._plain.prepare_again()
            self._plain.run(step, enter, check)
            return
        self._progress.begin(step)
        fragments = self._settings.exchanged(step, self._total)
        ahead: _Ahead | None = None
        if self._settings.overlaps(step, self._total) and fragments:
            ahead = _Ahead(
                self._exchange_for(fragments[0]), {n: self._began_with(n, step) for n in self._here}, self._own
            )
        try:
            for number in self._here:
                self._train(number, step, enter, check, ahead)
            means = [self._exchange(f, step, enter) for f in fragments] if ahead is None else [ahead.mean()]
        except BaseException:
            if ahead is not None:
                ahead.leave()
            raise
        self._own.gradient.zero_()
        for fragment, mean in zip(fragments, means, strict=True):
            self._exchange_for(fragment).spread(mean, self._own.gradient, self._own.flat)
        self._prepare_states(step, fragments if ahead is None else ())

    # ------------------------------------------------------------------------------------ a replica

    def _virtual(self, number: int) -> VirtualShard:
        return self._setting.state.arrangement.made(self._replicas, number, self._place.tensor)

    def _began_with(self, number: int, first: int) -> torch.Tensor:
        """A replica's weights when the round began."""
        if self._settings.keeps_weights and first > self._settings.warmup_steps:
            return self._virtual(number).now(OWN_WEIGHTS)
        return self._own.weights

    def _begin(self, number: int, first: int) -> _Replica:
        """A replica as it was when the round began, or as far as it is in it."""
        progress, inner = self._progress, self._progress.inner
        work, fabric, layout = self._work_of(number)
        sharers = layout.num_placed
        replica = progress.replicas.get(number)
        done = 0
        if replica is not None and replica.sharers == sharers and self._is_here(number, replica):
            done = len(replica.computed)
        if sharers > 1:
            # Who has lost it, or came later, has done nothing of it: then all begin anew.
            row = np.array([done])
            if len({int(each) for each in exchange(fabric.control, row, [1] * sharers)}) > 1:
                done = 0
        if replica is not None and done:
            return replica
        progress.replicas[number] = replica = _Replica(sharers)
        progress.at = number
        work.discard()
        inner.weights.copy_(self._began_with(number, first))
        is_first = first <= self._settings.warmup_steps
        for kind, buffer in inner.moments.items():
            source = self._own.moments[kind].values if is_first else self._virtual(number).now(kind)
            buffer.values.copy_(source)
        inner.set_updates(self._setting.state.updates)
        return replica

    def _is_here(self, number: int, replica: _Replica) -> bool:
        """Whether what a replica has come to is still here. What was prepared of its moments is not if this rank had
        given it away meanwhile."""
        if replica.weights is None:
            return self._progress.at == number
        return not self._replicas.kinds or self._virtual(number).has_prepared(self._progress.inner.moments)

    def _train(
        self, number: int, first: int, enter: Enter, check: Callable[[], None], ahead: _Ahead | None
    ) -> None:  # fmt: skip
        """The inner steps of a replica."""
        replica = self._begin(number, first)
        if replica.weights is not None:
            return
        spec, inner, end = self._setting.spec, self._progress.inner, self._settings.end_of(first, self._total)
        work, _, layout = self._work_of(number)
        self._setting.expect(layout.assignment[self._island_place(number)])
        work.prepare_again()
        for step in range(first + len(replica.computed), end):
            if ahead is not None and step == first + self._settings.overlap_steps:
                self._mix(inner.weights, ahead)
            found = self._compute(number, work, step, enter, check)
            norm = found.norms[number]
            enter("update", step)
            if math.isfinite(norm):
                if spec.clip_norm is not None and norm > spec.clip_norm:
                    inner.gradient.mul_(spec.clip_norm / norm)
                inner.apply(spec.base_lr * spec.schedule.factor(step))
            replica.computed.append(found)
            work.discard()
        if ahead is not None and end <= first + self._settings.overlap_steps:
            self._mix(inner.weights, ahead)
        replica.weights = inner.weights.clone()
        if self._replicas.kinds:
            for kind, buffer in inner.moments.items():
                self._virtual(number).prepared(kind).copy_(buffer.values)

    def _compute(
        self, number: int, work: GradientWork, step: int, enter: Enter, check: Callable[[], None]
    ) -> Computed:  # fmt: skip
        """The gradient of a step, for the mean over the replica's own share of the batch; once more if it is not
        finite."""
        inner = self._progress.inner
        for is_last in (False, True):
            work.refresh(lambda phase: enter(phase, step))
            if self._setting.is_nan(step):
                work.inject_nan()
            work.run(step, enter, check)
            inner.gradient.mul_(self._settings.replicas)
            norm = self._norm(number)
            if math.isfinite(norm) or is_last:
                break
            work.discard()
        found = work.of_step(step)
        return Computed(dict(found.losses), dict(found.hashes), {number: norm})

    def _norm(self, number: int) -> float:
        """Of a replica's gradient, wherever its parts are."""
        _, fabric, layout = self._work_of(number)
        place = layout.place(fabric.rank)
        inner = self._progress.inner
        mine = square_sum_of(inner, counted(self._setting.state.space, inner, layout, place))
        if layout.num_placed == 1:
            return norm_of([mine])
        words = to_words(mine)
        found = exchange(fabric.control, np.array(words), [len(words)] * layout.num_placed)
        return norm_of([from_words(row) for row in found.reshape(-1, len(words)).tolist()])

    def _island_place(self, number: int) -> int:
        _, fabric, layout = self._work_of(number)
        place = layout.place(fabric.rank)
        assert place is not None
        return place.data

    def _work_of(self, number: int) -> tuple[GradientWork, Fabric, ParallelLayout]:
        """What trains a replica, the fabric and the layout in which it does."""
        if number not in self._works:
            setting, layout = self._setting, within(self._setting.layout, number)
            assert setting.fabric.island is not None
            fabric = IslandFabric(setting.fabric, layout, setting.fabric.island.ranks)
            arrangement = Arrangement(self._part, self._progress.inner)
            work = changed(setting, local=self.local).in_layout(arrangement, layout, fabric)
            self._works[number] = work, fabric, layout
        return self._works[number]

    # ------------------------------------------------------------------------------------ the exchange

    def _exchange_for(self, fragment: int) -> _Exchange:
        if fragment not in self._exchanges:
            self._exchanges[fragment] = _Exchange(
                self._settings, self._setting, self._across, self._place.data, self._part, fragment
            )  # fmt: skip
        return self._exchanges[fragment]

    def _exchange(self, fragment: int, first: int, enter: Enter) -> torch.Tensor:
        """The mean over replicas of what they have come to, of a fragment."""
        step = self._settings.end_of(first, self._total) - 1
        brought = {}
        for number in self._here:
            weights = self._progress.replicas[number].weights
            assert weights is not None
            brought[number] = weights
        return self._exchange_for(fragment).mean(brought, self._own, lambda phase: enter(phase, step))

    def _mix(self, weights: torch.Tensor, ahead: _Ahead) -> None:
        """A replica takes what the exchange that goes on beside it has given."""
        exchange_, mean = ahead.exchange, ahead.mean()
        exchange_.mix(weights, self._own, mean)

    def _prepare_states(self, first: int, fragments: tuple[int, ...]) -> None:
        """The weights that replicas go on with, where they have their own."""
        if not self._settings.keeps_weights:
            return
        for number in self._here:
            weights = self._progress.replicas[number].weights
            assert weights is not None
            after = self._virtual(number).prepared(OWN_WEIGHTS)
            after.copy_(weights)
            for fragment in fragments:
                self._exchange_for(fragment).mix(after, self._own, None)


class _Exchange:
    """What is exchanged of a fragment of the model: the part of it that this rank computes with, end to end."""

    def __init__(
        self, settings: LocalSettings, setting: Setting, layout: ParallelLayout, data: int, part: ModelPart,
        fragment: int,
    ) -> None:  # fmt: skip
        self._settings, self._setting, self._layout = settings, setting, layout
        self._led = layout.assignment[data]
        self._part_flat = part.flat
        space = setting.state.space
        wanted = settings.ranges_of(space, fragment)
        ranges = [(start, start + n) for low, high in wanted for start, _, n in part.flat.locate(low, high)]
        self.flat = FlatRanges.of(ranges, space.boundary)
        self._reducer, self._summing = self._make(data, part.device)

    def _make(self, data: int, device: torch.device) -> tuple[Reducer, Summing]:
        group, space, wire = self._setting.fabric.data_group, self._setting.state.space, self._settings.wire
        slices = space.slices(self.flat, self._layout.data)
        if wire.is_exact:
            return Reducer(group, self._layout, self.flat.size, device, slices=slices), Summing()
        blocks = Blocks.of(space, self.flat, codec_of(wire).block)
        start = sum(slices[:data])
        own = Rounding(wire, blocks.cut(start, start + slices[data]), _no_residual)
        reducer = CodedReducer(group, self._layout, blocks, device, slices, own)
        return reducer, Rounding(wire, blocks, _no_residual)

    def take(self, values: torch.Tensor, flat: FlatRanges) -> torch.Tensor:
        """The fragment's elements of a buffer of `flat` ranges, as a buffer of its own."""
        found = torch.zeros(self.flat.size, device=values.device)
        self._each(flat, lambda at, place, length: found[at : at + length].copy_(values[place : place + length]))
        return found

    def spread(self, values: torch.Tensor, into: torch.Tensor, flat: FlatRanges) -> None:
        """The reverse."""
        self._each(flat, lambda at, place, length: into[place : place + length].copy_(values[at : at + length]))

    def _each(self, flat: FlatRanges, do: Callable[[int, int, int], object]) -> None:
        for start, stop in self.flat.ranges:
            for first, at, count in self.flat.locate(start, stop):
                for begin, place, length in flat.locate(first, first + count):
                    do(at + begin - first, place, length)

    def mean(
        self, brought: Mapping[int, torch.Tensor], own: StateShard, enter: Callable[[str], None] = lambda phase: None
    ) -> torch.Tensor:  # fmt: skip
        """Of all replicas: what they differ by from the outer weights, or their weights. `brought` are the weights of
        those that are here. Raises PeerLost."""
        outer = self.take(own.weights, own.flat).to(self._reducer._device)
        sums = self._summing.start(self._layout.root, [])
        for number in self._led:
            value = self.take(brought[number], self._part_flat)
            sums.add((number, number + 1), value if self._settings.averages else outer - value)
        traffic = self._setting.fabric.traffic
        enter("reduce")
        with traffic.of("outer"):
            reduced = self._reducer.reduce(sums.pieces, sums.codes)
        enter("gather")
        with traffic.of("outer"):
            found = torch.empty(self.flat.size, device=reduced.device)
            self._reducer.gather_sum(reduced, found)
        return found.div_(self._settings.replicas)

    def mix(self, weights: torch.Tensor, own: StateShard, mean: torch.Tensor | None) -> None:
        """Has a replica's `weights` [part.flat.size] take the outer ones that the exchange leads to: `mean` is what it
        gave, None: it is in `own.gradient`."""
        outer = self.take(own.weights, own.flat)
        momentum = self.take(own.kept[MOMENTUM], own.flat) if MOMENTUM in own.kept else None
        outer_step(self._settings, outer, momentum, self.take(own.gradient, own.flat) if mean is None else mean)
        alpha = self._settings.mix
        if alpha:
            outer.mul_(1 - alpha).add_(self.take(weights, self._part_flat), alpha=alpha)
        self.spread(outer, weights, self._part_flat)


class _Ahead:
    """An exchange that goes on in a thread of its own while replicas are trained."""

    def __init__(self, exchange_: _Exchange, brought: Mapping[int, torch.Tensor], own: StateShard) -> None:
        self.exchange = exchange_
        self._brought = {number: weights.clone() for number, weights in brought.items()}
        self._own = own
        self._mean: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._mean = self.exchange.mean(self._brought, self._own)
        except BaseException as error:  # raised again by who waits for it
            self._error = error

    def mean(self) -> torch.Tensor:
        """What it gave; waits for it. Raises PeerLost."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._mean is not None
        return self._mean

    def leave(self) -> None:
        """Nobody waits for it any more; the groups are left, which ends it."""
        self._thread.join(timeout=0.0)


def _no_residual(node: Subtree) -> Residual:
    raise AssertionError("outer gradients are rounded without feedback")
