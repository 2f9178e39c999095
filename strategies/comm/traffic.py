"""How many bytes a rank has sent to others, by what they were. No torch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("gradients", "plain", "outer", "weights", "copies")
"""What of a step is told of: sums of gradients; those of them that a compressed wire sends as they are; outer gradients
of replicas that train by themselves; weights, where those who compute are given them; and what is kept elsewhere, too.
"""
_OF_PHASES = {"refresh": "weights", "reduce": "gradients", "gather": "gradients", "vote": "votes"}
"""Of what is sent in a phase of a step, where nothing else is said."""


class Traffic:
    """Counts for all groups of a rank: what leaves it, not what it keeps. In each thread one kind is sent at a time. Of
    what torch's own parts exchange in groups that c10d made (activations) nothing is known here."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._at = threading.local()

    @property
    def _kind(self) -> str:
        return getattr(self._at, "kind", "other")

    def enter(self, phase: str) -> None:
        """A phase of a step begins."""
        self._at.kind = _OF_PHASES.get(phase, "other")

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What is sent in the block is of this kind."""
        before, self._at.kind = self._kind, kind
        try:
            yield
        finally:
            self._at.kind = before

    def add(self, num_bytes: int) -> None:
        """Of the kind that is being sent."""
        with self._lock:
            self.sent[self._kind] += num_bytes

    def told(self) -> tuple[int, ...]:
        """By KINDS."""
        return tuple(self.sent[kind] for kind in KINDS)

    def relabel(self, kind: str, num_bytes: int) -> None:
        """Of the bytes that were sent last, this many were of another kind."""
        with self._lock:
            self.sent[self._kind] -= num_bytes
            self.sent[kind] += num_bytes
