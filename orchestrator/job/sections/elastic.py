"""`elastic`: what may change while the job runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.job.fields import (
    CIRCUMSTANCES,
    NUMBERS,
    NUMBERS_LATER,
    CountFloat,
    CountInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class Workers(Section):
    min: Annotated[PositiveInt, CIRCUMSTANCES] = 1
    max: Annotated[PositiveInt, CIRCUMSTANCES] = 4


class Rebalance(Section):
    """What is done about workers that are slower than others. None of it changes the numbers."""

    enabled: Annotated[bool, CIRCUMSTANCES] = True
    min_gain: Annotated[float, Field(gt=0, lt=1), CIRCUMSTANCES] = 0.05
    """The least share of a step's time that moving work must be predicted to save."""
    evict_below: Annotated[float, Field(ge=0, lt=1), CIRCUMSTANCES] = 0.5
    """A worker that stays slower than this share of the fastest is replaced, if another can be had."""
    evict_after_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 60.0


class Scaling(Section):
    """How a run takes and asks for nodes that come and go. None of it changes the numbers."""

    settle_s: Annotated[CountFloat, CIRCUMSTANCES] = 2.0
    """How long after a change of its workers a run takes in more, at the least."""
    flap_window_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 120.0
    """A worker that is lost so soon after it joined has flapped. Each time doubles `settle_s`, up to this, until those
    that join stay for this long."""
    shortage_after_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 60.0
    """A worker that finds no room for this long is reported, with the cluster's reason."""
    turn_s: Annotated[float, Field(ge=10), CIRCUMSTANCES] = 120.0
    """How long a run that cannot train for want of room keeps asking before others that wait too have their turn."""
    fallback_after_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 600.0
    """A worker that finds no room for this long, while no nodes are starting, is asked for in the next market of
    `resources.market`."""
    fallback_hold_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 600.0
    """How long others are then asked for there as well, before the first is tried again."""


class Elastic(Section):
    """What may change while the job runs, and how long to wait before it does. `_s` is seconds.

    More than 15 attributes: what a run does about its processes is all looked for here."""

    workers: Annotated[Workers, CIRCUMSTANCES] = Field(default_factory=Workers)
    virtual_workers: Annotated[PositiveInt, NUMBERS] = 8
    """The fixed number of shares a step's batch is cut into; the numbers depend on it."""
    standby: Annotated[CountInt, CIRCUMSTANCES] = 0
    """Started workers kept ready beside the running ones."""
    teachers: Annotated[CountInt, CIRCUMSTANCES] = 0
    """Processes that answer for the teacher of objective distill (`top_k`), each with what `resources` gives a worker.
    0: every worker has the teacher itself."""
    state_copies: Annotated[PositiveInt, CIRCUMSTANCES] = 2
    """Living holders of every chunk of state, in different failure domains."""
    heartbeat_interval_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 1.0
    heartbeat_timeout_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 3.0
    progress_timeout_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 60.0
    interrupt_timeout_s: Annotated[PositiveFloat | None, CIRCUMSTANCES] = None
    """How long a worker has to leave a collective that it was told to break out of, before it is ended. None: 3, or 15
    with GPUs, whose kernels have to end first."""
    start_timeout_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 300.0
    wait_timeout_s: Annotated[PositiveFloat | None, CIRCUMSTANCES] = None
    """How long to wait below `workers.min`. None: for ever."""
    lease_s: Annotated[PositiveFloat, CIRCUMSTANCES] = 30.0
    max_failures_per_step: Annotated[PositiveInt, CIRCUMSTANCES] = 3
    mixed_numerics: Annotated[bool, NUMBERS_LATER] = False
    """Whether workers may take part that compute other bits than the first one. Then which of them computed what shows
    in the result."""
    rebalance: Annotated[Rebalance, CIRCUMSTANCES] = Field(default_factory=Rebalance)
    scaling: Annotated[Scaling, CIRCUMSTANCES] = Field(default_factory=Scaling)
