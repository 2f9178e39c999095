"""Moving state between ranks: a plan of transfers (`strategies.layout.statemap`) carried out over a process group."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strategies.comm.groups import Groups
from strategies.layout.statemap import MAX_TRANSFER, Span, Transfer
from strategies.state.buffers import Buffer, Spaces, part_of_span, whole_of_span
from strategies.state.digests import DIGEST_ELEMENTS, digest_of
from strategies.state.shard import StateShard
from strategies.state.virtual_shard import VirtualShard

Holder = StateShard | VirtualShard
"""Where state is."""

WINDOW = 2
"""Transfers that a rank has on their way at once; with their buffers it needs no more memory."""


class StateCorrupt(RuntimeError):
    """A part of the state arrived with other bytes than its holder sent."""


@dataclass(frozen=True)
class Resharded:
    """What a reshard took on this rank, in bytes: received, and the most that buffers needed at once."""

    received_bytes: int = 0
    buffer_bytes: int = 0


def copy_within(sources: Sequence[Holder], targets: Sequence[Holder], spans: Iterable[Span]) -> None:
    """Copies what is here already from one set of state shards to another, wherever it is in them."""
    for span in spans:
        for target in targets:
            for start, _, length in target.locate(span):
                inner = Span(span.tensor, start, start + length)
                for source in sources:
                    if source is target:
                        continue
                    for first, _, count in source.locate(inner):
                        _copy_kinds(source, target, first, first + count)


def _copy_kinds(source: Holder, target: Holder, start: int, stop: int) -> None:
    """Copies all that is kept of elements start..stop, which both have."""
    for kind, buffer in target.kinds().items():
        for first, offset, length in buffer.locate(start, stop):
            for begin, place, count in source.kinds()[kind].locate(first, first + length):
                for done in range(0, count, MAX_TRANSFER):
                    some = min(MAX_TRANSFER, count - done)
                    values = source.kinds()[kind].read(place + done, some)
                    buffer.write(offset + begin - first + done, values)


def execute(
    plan: Iterable[Transfer],
    sources: Sequence[Holder],
    targets: Sequence[Holder],
    spaces_at: Callable[[int], Spaces],
    groups: Groups,
) -> Resharded:
    """Carries out the part of `plan` that concerns this rank: sends out of `sources`, receives into `targets`; each
    span with all kinds of its tensors, of which `spaces_at` gives the spaces by coordinate.

    All ranks take the transfers in the order of the plan, at most WINDOW of their own at once, so none can wait for
    another in a circle while different pairs work side by side. Each is checked against its digest on arrival.

    Raises PeerLost when a peer is gone, StateCorrupt when a digest does not fit.
    """
    rank = groups.rank
    pairs: dict[tuple[int, int], int] = {}
    under_way: deque[_Move] = deque()
    received = most = 0
    for transfer in plan:
        if rank not in (transfer.source, transfer.target):
            continue
        if len(under_way) == WINDOW:
            under_way.popleft().finish(groups)
        pair = (transfer.source, transfer.target)
        tag = pairs[pair] = pairs.get(pair, -1) + 1
        kinds = spaces_at(transfer.span.tensor)
        move = _Move(transfer, sources if transfer.source == rank else targets, kinds, tag, groups)
        under_way.append(move)
        most = max(most, sum(4 * each.buffer.numel() for each in under_way))
        if transfer.target == rank:
            received += move.num_bytes
    while under_way:
        under_way.popleft().finish(groups)
    return Resharded(received, most)


class _Move:
    """One transfer on its way: all kinds of tensors of its span, then their digest."""

    def __init__(
        self, transfer: Transfer, state_shards: Sequence[Holder], kinds: Spaces, tag: int, groups: Groups
    ) -> None:
        self.transfer = transfer
        self._state_shards = state_shards
        span, model = transfer.span, next(iter(kinds.values()))
        self._in_message = {
            kind: whole_of_span(span) if space is model else part_of_span(space, span) for kind, space in kinds.items()
        }
        sizes = [flat.size for flat in self._in_message.values()]
        self.num_bytes = 4 * sum(sizes)
        self.buffer = torch.empty(sum(sizes) + DIGEST_ELEMENTS, device=groups.device)
        self._parts = dict(zip(kinds, self.buffer[:-DIGEST_ELEMENTS].split(sizes), strict=True))
        self._is_source = transfer.source == groups.rank
        self._work: Any
        if self._is_source:
            found = self._each(lambda buffer, offset, part: part.copy_(buffer.read(offset, len(part))))
            assert found >= span.length, f"{span} is not here to be sent"
            self.buffer[-DIGEST_ELEMENTS:].copy_(self._digest())
            self._work = groups.send(self.buffer, transfer.target, tag)
        else:
            self._work = groups.receive(self.buffer, transfer.source, tag)

    def _each(self, copy: Callable[[Buffer, int, torch.Tensor], object]) -> int:
        """Calls `copy` with a buffer of the state, a place in it, and the part of the message that goes with it, for
        all of the span that is here; how many elements that is (one that two state shards have counts twice)."""
        found = 0
        for state_shard in self._state_shards:
            for start, _, length in state_shard.locate(self.transfer.span):
                for kind, buffer in state_shard.kinds().items():
                    for first, offset, count in buffer.locate(start, start + length):
                        for begin, at, some in self._in_message[kind].locate(first, first + count):
                            copy(buffer, offset + begin - first, self._parts[kind][at : at + some])
                found += length
        return found

    def _digest(self) -> torch.Tensor:
        return digest_of(self.buffer[:-DIGEST_ELEMENTS])

    def finish(self, groups: Groups) -> None:
        groups.finish(self._work, "state transfer")
        if self._is_source:
            return
        if not torch.equal(self._digest().view(torch.int32), self.buffer[-DIGEST_ELEMENTS:].view(torch.int32)):
            raise StateCorrupt(f"{self.transfer.span} arrived with other bytes than were sent")
        self._each(lambda buffer, offset, part: buffer.write(offset, part))
