"""A worker's training state from generation to generation: where it comes from, and of how many steps it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.training.messages import Generation
from orchestrator.training.restoring import open_checkpoint, read_checkpoint
from orchestrator.training.worker_protocol import Holds
from strategies.comm.fabric import Fabric
from strategies.comm.groups import PeerLost
from strategies.layout.placement import Domain
from strategies.layout.statemap import NOTHING, Spans, subtract
from strategies.state.chunk_loader import ChunkLoader
from strategies.state.reshard import Resharded, StateCorrupt
from strategies.state.training_state import TrainingState
from strategies.update.engine import StepEngine
from strategies.update.vote import exchange

log = logging.getLogger(__name__)


class StateKeeper:
    """`committed` is the number of steps that the state of this worker holds; `moves` counts chunks received and
    tensors read. `copies` holders of every part are kept."""

    def __init__(self, state: TrainingState, engine: StepEngine, catalog: Catalog, copies: int) -> None:
        self.committed = 0
        self.moves = 0
        self._state = state
        self._engine = engine
        self._catalog = catalog
        self._copies = copies
        self._is_lost = False

    def holds(self) -> Holds:
        """What this worker has."""
        if self._is_lost:
            return Holds(0, NOTHING, prepared=0)
        return Holds(self.committed, self._state.held, prepared=self._engine.prepared_after(self.committed))

    def roll_forward(self, generation: Generation, rank: int) -> None:
        """Applies the round that this rank only missed the news of."""
        steps = self._engine.prepared_after(self.committed)
        if rank in generation.roll_forward and steps and self.committed == generation.committed - steps:
            assert generation.norm is not None
            self._engine.commit(self.committed, generation.norm)
            self.committed += steps

    def bring(self, generation: Generation, rank: int, fabric: Fabric, on_restore: Callable[[], None]) -> Resharded:
        """After this, every member has its part of the state of `generation.committed` steps. `on_restore` is called
        before a checkpoint is read. Raises PeerLost, and what `open_checkpoint` and `read_checkpoint` raise."""
        held = list(generation.held)
        read: Callable[[ChunkLoader], None] | None = None
        if generation.restore is not None:
            # Reading a checkpoint takes as long as it takes; the controller is told, and does not call it stuck.
            on_restore()
            saved = open_checkpoint(self._catalog, generation.committed, self._state)
            read = lambda loader: read_checkpoint(saved, loader, self._moved)  # noqa: E731
            self.invalidate()
            log.info("restoring the checkpoint of %d steps from %s", generation.committed, generation.restore)
            updates = saved.manifest.updates
        else:
            if held[rank] and (self.committed != generation.committed or subtract(held[rank], self._state.held)):
                self._start_over(generation)
            updates = self._agree_on_updates(fabric, held)
            if not held[rank]:
                self.invalidate()
        domains = [Domain(member.zone, member.node) for member in generation.members]
        try:
            moved = self._state.adopt_layout(
                generation.layout, fabric, held, domains, self._copies, updates,
                barrier=lambda: self._agree(fabric, 0), read=read, read_by_node=not self._catalog.storage.is_remote,
            )  # fmt: skip
        except StateCorrupt as error:
            raise PeerLost(str(error)) from error
        self.committed, self._engine.applying = generation.committed, False
        return moved

    def collect(self, generation: Generation, fabric: Fabric) -> Resharded:
        """Brings the whole state to rank 0. Raises PeerLost."""
        self._state.updates = self._agree_on_updates(fabric, generation.held)
        try:
            moved = self._state.collect(generation.held, fabric)
            self._agree(fabric, 0)
        except StateCorrupt as error:
            raise PeerLost(str(error)) from error
        self.committed = generation.committed
        return moved

    def lose(self) -> None:
        """Nothing that is here can be read any more, nor anything be put here."""
        self._is_lost, self.committed = True, 0

    def invalidate(self) -> None:
        """From here until another state is in place, nothing of this one counts: a worker that is interrupted now is
        back at step 0, which it can make again by itself."""
        self.committed, self._engine.prepared = 0, None
        self._state.invalidate()
        self._engine.discard()

    def _start_over(self, generation: Generation) -> None:
        """Makes the state of step 0 again, which is the only one that a worker can be taken to have and has not."""
        if generation.committed:
            raise RuntimeError(f"this worker has the state of step {self.committed}, not of {generation.committed}")
        self.invalidate()
        self._state.start_over()

    def _moved(self) -> None:
        self.moves += 1

    def _agree_on_updates(self, fabric: Fabric, held: Sequence[Spans]) -> int:
        """The optimizer's own step count travels with the state. Nobody is past this before every rank is here."""
        values = self._agree(fabric, self._state.updates if held[fabric.rank] else -1)
        known = {value for value in values if value >= 0}
        if len(known) != 1:
            raise RuntimeError(f"the holders of the state disagree about its number of updates: {sorted(known)}")
        return known.pop()

    def _agree(self, fabric: Fabric, value: int) -> list[int]:
        """Everyone's value, by rank; nobody is past this before every rank is here."""
        return [int(each) for each in exchange(fabric.control, np.array([value]), [1] * fabric.control.world_size)]
