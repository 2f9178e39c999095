"""What a rank and the links between ranks can do, given or assumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A connection as the alpha-beta model sees it: a message of n bytes takes `latency_s + n / bytes_per_s`."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Hardware:
    """One rank, and its links. All ranks are taken to be alike.

    `memory_bytes` None means unknown: then memory is predicted and never a reason to refuse. `held_back` is the
    fraction of the memory that is not planned with (driver context, allocator fragmentation, what the model forgets).
    `peak_flops` is what the data sheet says in the job's precision, `efficiency` the fraction of it that training
    reaches. `inside` joins ranks of one node, `between` ranks of different nodes; both are per rank and direction.
    """

    peak_flops: float
    efficiency: float
    inside: Link
    between: Link
    ranks_per_node: int
    memory_bytes: float | None = None
    held_back: float = 0.1
    overlaps: bool = False
    """Whether what layers exchange goes on beside what they compute."""
    gather_s: float = 0.0
    """What gathering a block of sharded weights takes a rank, beside its message."""
    step_s: float = 0.0
    """What a step takes beside arithmetic and messages."""

    def __post_init__(self) -> None:
        numbers = (self.peak_flops, self.inside.bytes_per_s, self.between.bytes_per_s, self.ranks_per_node)
        if min(numbers) <= 0 or not 0 < self.efficiency <= 1 or not 0 <= self.held_back < 1:
            raise ValueError(f"a machine needs positive rates and fractions up to 1, got {self}")

    @property
    def flops(self) -> float:
        """FLOP/s that a rank really reaches."""
        return self.peak_flops * self.efficiency

    @property
    def usable_bytes(self) -> float | None:
        """Memory that may be planned with; None when unknown."""
        return None if self.memory_bytes is None else self.memory_bytes * (1 - self.held_back)

    def link(self, span: int) -> Link:
        """The slowest link among `span` ranks that follow one another."""
        return self.inside if span <= self.ranks_per_node else self.between


def ring_all_reduce_s(size_bytes: float, ranks: int, link: Link) -> float:
    """Reduce-scatter and all-gather in a ring: each rank sends 2 (n-1)/n of the data in 2 (n-1) messages.

    Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH".
    """
    return 2 * scatter_s(size_bytes, ranks, link)


def scatter_s(size_bytes: float, ranks: int, link: Link) -> float:
    """One reduce-scatter, all-gather or all-to-all of `size_bytes` per rank: (n-1)/n of it in n-1 messages."""
    if ranks == 1:
        return 0.0
    return (ranks - 1) * (link.latency_s + size_bytes / ranks / link.bytes_per_s)


def send_s(size_bytes: float, link: Link) -> float:
    """One message to one rank."""
    return link.latency_s + size_bytes / link.bytes_per_s
