"""Moving state between ranks: a plan of transfers (`strategies.layout.statemap`) carried out over a process group."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strategies.comm.groups import Groups
from strategies.layout.statemap import Span, Transfer
from strategies.state.digests import DIGEST_ELEMENTS, digest_of
from strategies.state.shard import StateShard

WINDOW = 2
"""Transfers that a rank has on their way at once; with their buffers it needs no more memory."""


class StateCorrupt(RuntimeError):
    """A part of the state arrived with other bytes than its holder sent."""


@dataclass(frozen=True)
class Resharded:
    """What a reshard took on this rank, in bytes: received, and the most that buffers needed at once."""

    received_bytes: int = 0
    buffer_bytes: int = 0


def copy_within(sources: Sequence[StateShard], targets: Sequence[StateShard], spans: Iterable[Span]) -> None:
    """Copies what is here already from one set of state shards to another, wherever it is in them."""
    for span in spans:
        for target in targets:
            for start, offset, length in target.locate(span):
                inner = Span(span.tensor, start, start + length)
                for source in sources:
                    if source is target:
                        continue
                    for first, place, count in source.locate(inner):
                        at = offset + first - start
                        for kind, buffer in target.kinds().items():
                            buffer[at : at + count].copy_(source.kinds()[kind][place : place + count])


def execute(
    plan: Iterable[Transfer],
    sources: Sequence[StateShard],
    targets: Sequence[StateShard],
    kinds: Sequence[str],
    groups: Groups,
) -> Resharded:
    """Carries out the part of `plan` that concerns this rank: sends out of `sources`, receives into `targets`; each
    span with all `kinds` of its tensors.

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
        self, transfer: Transfer, state_shards: Sequence[StateShard], kinds: Sequence[str], tag: int, groups: Groups
    ) -> None:
        self.transfer = transfer
        self._state_shards = state_shards
        length = transfer.span.length
        self.num_bytes = 4 * len(kinds) * length
        self.buffer = torch.empty(len(kinds) * length + DIGEST_ELEMENTS, device=groups.device)
        self._parts = dict(zip(kinds, self.buffer[:-DIGEST_ELEMENTS].split(length), strict=True))
        self._is_source = transfer.source == groups.rank
        self._work: Any
        if self._is_source:
            found = self._each(lambda inside, part: part.copy_(inside))
            assert found >= length, f"{transfer.span} is not here to be sent"
            self.buffer[-DIGEST_ELEMENTS:].copy_(self._digest())
            self._work = groups.send(self.buffer, transfer.target, tag)
        else:
            self._work = groups.receive(self.buffer, transfer.source, tag)

    def _each(self, copy: Callable[[torch.Tensor, torch.Tensor], object]) -> int:
        """Calls `copy` with a view of the state and the view of the buffer that goes with it, for all of the span that
        is here; how many elements that is (one that two state shards have counts twice)."""
        span = self.transfer.span
        found = 0
        for state_shard in self._state_shards:
            for start, offset, length in state_shard.locate(span):
                at = start - span.start
                for kind, tensor in state_shard.kinds().items():
                    copy(tensor[offset : offset + length], self._parts[kind][at : at + length])
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
        self._each(lambda inside, part: inside.copy_(part))
