"""How much state a change of layout moves: an estimate to choose between layouts that are equally fast."""

from __future__ import annotations

from orchestrator.planning.work import Degrees, Work


def moved_bytes(work: Work, before: Degrees, after: Degrees) -> float:
    """Bytes that ranks need after the change and do not have before it.

    Rank r keeps its number; ranks above the old layout start empty. The model is a line of equal parameters, of which
    stage s of p has [s/p, (s+1)/p), and replica i of d has the i-th part of that where it is sharded. The reshard
    planner, which knows every chunk, moves no more than this but for the cuts being unequal. A change of the tensor
    degree moves everything.
    """
    parameters = work.model.parameters
    if before.tensor != after.tensor:
        fresh_weights = fresh_optimizer = float(after.data)
        if after.shard == "parameters":
            fresh_weights = 1.0
        if after.shard != "none":
            fresh_optimizer = 1.0
    else:
        fresh_weights = _fresh(before, after, weights=True)
        fresh_optimizer = _fresh(before, after, weights=False)
    return parameters * (work.state.weights * fresh_weights + work.state.optimizer * fresh_optimizer)


def _fresh(before: Degrees, after: Degrees, weights: bool) -> float:
    """How many whole models all ranks together need and do not have."""
    total = 0.0
    places = before.data * before.pipeline
    for place in range(after.data * after.pipeline):
        needed = _has(after, place, weights)
        had = _has(before, place, weights) if place < places else (0.0, 0.0)
        total += needed[1] - needed[0] - max(0.0, min(needed[1], had[1]) - max(needed[0], had[0]))
    return total


def _has(degrees: Degrees, place: int, weights: bool) -> tuple[float, float]:
    """The stretch of the model at this place (all tensor ranks of a stage of a replica)."""
    replica, stage = divmod(place, degrees.pipeline)
    length = 1 / degrees.pipeline
    start = stage * length
    sharded = degrees.shard == "parameters" if weights else degrees.shard != "none"
    if sharded:
        length /= degrees.data
        start += replica * length
    return start, start + length
