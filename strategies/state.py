"""State as a map from chunks to holders, and the plan that brings chunks to the ranks that lack them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
import xxhash

from strategies.groups import PATIENCE, Groups, PeerLost

CHUNK_BYTES = 16 << 20
"""Transfers move chunks of at most this size, so that several sources can share the work."""


class StateCorrupt(RuntimeError):
    """A chunk arrived with other bytes than its holder sent."""


@dataclass(frozen=True, order=True)
class Chunk:
    """A range of one flat state tensor: `offset` and `length` in elements, `num_bytes` in all."""

    name: str
    offset: int
    length: int
    num_bytes: int


@dataclass(frozen=True)
class Transfer:
    """One chunk on its way from one rank to another."""

    chunk: Chunk
    source: int
    target: int


def chunks_of(ranges: Mapping[str, torch.Tensor], chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """Cuts flat tensors into chunks, in name order."""
    chunks = []
    for name in sorted(ranges):
        tensor = ranges[name]
        step = max(1, chunk_bytes // tensor.element_size())
        for offset in range(0, tensor.numel(), step):
            length = min(step, tensor.numel() - offset)
            chunks.append(Chunk(name, offset, length, length * tensor.element_size()))
    return chunks


def plan_transfers(
    chunks: Iterable[Chunk],
    holders: Mapping[Chunk, Collection[int]],
    wanted: Mapping[Chunk, Collection[int]],
) -> list[Transfer]:
    """Who sends which chunk to whom: nothing that is in place moves, and sources share the bytes evenly.

    Deterministic, so that every rank can compute the plan for itself. Raises ValueError when a wanted chunk has no
    holder.
    """
    sent = dict.fromkeys((rank for ranks in holders.values() for rank in ranks), 0)
    plan = []
    for chunk in sorted(chunks):
        have = frozenset(holders.get(chunk, ()))
        for target in sorted(frozenset(wanted.get(chunk, ())) - have):
            if not have:
                raise ValueError(f"no living holder of {chunk.name}[{chunk.offset}:+{chunk.length}]")
            source = min(have, key=lambda rank: (sent[rank], rank))
            sent[source] += chunk.num_bytes
            plan.append(Transfer(chunk, source, target))
    return plan


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    host = tensor.detach().cpu().contiguous().view(torch.uint8)
    value = xxhash.xxh3_128_digest(host.numpy().data)
    return torch.frombuffer(bytearray(value), dtype=torch.int64)


def execute(plan: Iterable[Transfer], ranges: Mapping[str, torch.Tensor], groups: Groups) -> int:
    """Carries out the part of `plan` that concerns this rank; returns the bytes it received.

    Chunks go straight from the source's tensor into the target's, all pairs at once. Each is followed by its digest
    (xxh3-128), checked on arrival.

    Raises PeerLost when a peer is gone, StateCorrupt when a digest does not fit.
    """
    rank = groups.rank
    mine = [transfer for transfer in plan if rank in (transfer.source, transfer.target)]
    incoming: list[tuple[Chunk, torch.Tensor, torch.Tensor]] = []
    works = []
    kept = []
    for tag, transfer in enumerate(mine):
        chunk = transfer.chunk
        view = ranges[chunk.name][chunk.offset : chunk.offset + chunk.length]
        # Tags number the transfers of one pair of ranks; both ends see that pair's transfers in the same order.
        pair = sum(1 for t in mine[:tag] if (t.source, t.target) == (transfer.source, transfer.target))
        if transfer.source == rank:
            digest = _digest(view).to(view.device)
            works += [
                groups.send(view, transfer.target, 2 * pair),
                groups.send(digest, transfer.target, 2 * pair + 1),
            ]
            kept.append(digest)
        else:
            digest = torch.zeros(2, dtype=torch.int64, device=view.device)
            works += [
                groups.receive(view, transfer.source, 2 * pair),
                groups.receive(digest, transfer.source, 2 * pair + 1),
            ]
            incoming.append((chunk, view, digest))
    try:
        for work in works:
            work.wait(PATIENCE)
            groups.check()
    except RuntimeError as error:
        raise PeerLost(f"state transfer: {error}") from error
    for chunk, view, digest in incoming:
        if not torch.equal(_digest(view), digest.cpu()):
            raise StateCorrupt(f"{chunk.name}[{chunk.offset}:+{chunk.length}] arrived with other bytes than were sent")
    return sum(chunk.num_bytes for chunk, _, _ in incoming)
