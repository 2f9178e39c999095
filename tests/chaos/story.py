"""What happens to a run, drawn from a seed: a layout, faults inside of the job, and what somebody does to it from
outside. Pure: the same seed is the same story on every machine.

Everything that a story holds must leave the result as it is without it (`Story.undisturbed`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

JOB = """
name: chaos
model: {hf: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
             num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 320, attention_dropout: 0.1,
             max_position_embeddings: 128, tie_word_embeddings: false}}
data: {source: python-stdlib, tokenizer: bytes, sequence_length: 64}
train: {steps: 150, global_batch: 16, micro_batch: 1, optimizer: {name: adamw, lr: 1.0e-3},
        schedule: {warmup_steps: 10}, seed: 7}
elastic: {workers: {min: 1, max: 4}, virtual_workers: 8, heartbeat_interval_s: 0.25, heartbeat_timeout_s: 3.0,
          progress_timeout_s: 10.0}
checkpoint: {every_steps: 40}
"""
STEPS = 150


@dataclass(frozen=True)
class Layout:
    """Overrides of JOB. `numerics` are those of them that are part of the numbers, `smallest` the fewest workers."""

    name: str
    numerics: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    smallest: int = 1
    largest: int = 4
    phases: tuple[str, ...] = ("data", "compute", "reduce", "gather", "vote", "commit")


_SHARDED = ("refresh", "data", "compute", "reduce", "gather", "vote", "commit")
_TENSOR = ("strategy.tensor=2", "train.global_batch=8")
"""Less to do: every layer of every micro-batch costs some collectives, each of which may take milliseconds."""
_DEEPER = ("model.hf.num_hidden_layers=4",)
"""Each of the two stages has two parts."""
LAYOUTS = (
    Layout("replicas"),
    Layout("replicas and a standby", others=("elastic.standby=1",), largest=3),
    Layout("optimizer", others=("strategy.shard=optimizer",), phases=_SHARDED),
    Layout("gradients", others=("strategy.shard=gradients",), phases=_SHARDED),
    Layout("parameters", others=("strategy.shard=parameters",), phases=_SHARDED),
    Layout("pipeline", others=("strategy.pipeline=2",)),
    Layout("gpipe, optimizer", others=("strategy={pipeline: 2, schedule: gpipe, shard: optimizer}",), phases=_SHARDED),
    Layout("interleaved", _DEEPER, ("strategy={pipeline: 2, schedule: interleaved-1f1b}",)),
    Layout("zero-bubble", _DEEPER, ("strategy={pipeline: 2, schedule: zero-bubble}",)),
    Layout("tensor", _TENSOR, smallest=2),
    Layout("tensor and pipeline", _TENSOR, ("strategy.pipeline=2",), smallest=2),
    Layout("tensor, optimizer", _TENSOR, ("strategy.shard=optimizer",), smallest=2, phases=_SHARDED),
    Layout("packed", ("data.packing=pack", "data.document_mask=true")),
    Layout("padded", ("data.packing=pad", "train.micro_batch=2")),
    Layout("bf16", ("train.precision=bf16",)),
)

KINDS_INSIDE = ("kill", "segfault", "exit", "raise", "hang", "deadlock", "nan", "slow", "drain", "controller")
"""Of faults in the job file (docs/faults.md)."""
ACTS = ("kill", "freeze", "controller", "resize", "save", "stop", "signal", "driver")
"""From outside: signals to a worker, the controller or the driver, and commands."""
ENDS_THE_DRIVER = ("stop", "signal", "driver")
APART_STEPS = 12
"""Between two things that happen: far enough that one is over, near enough that what follows from it need not be."""


@dataclass(frozen=True)
class Act:
    """Something done from outside once `step` steps are on record. `number` chooses: which worker, how many."""

    step: int
    kind: str
    number: int = 0


@dataclass(frozen=True)
class Story:
    """One run and everything that befalls it."""

    seed: int
    layout: Layout
    workers: int
    faults: tuple[str, ...]
    acts: tuple[Act, ...]
    is_loaded: bool
    """Two more processes compute for all they are worth beside it."""
    steps: int = STEPS
    settings: tuple[str, ...] = ()
    """Overrides beside those of the layout; of the undisturbed run, too."""

    @property
    def overrides(self) -> tuple[str, ...]:
        workers = f"elastic.workers={{min: {self.layout.smallest}, max: {self.workers}}}"
        return (workers, *self.settings, *self._length, *self.layout.numerics, *self.layout.others)

    @property
    def undisturbed(self) -> tuple[str, ...]:
        """The overrides of a run with the same numbers to which nothing happens, by the fewest workers."""
        fewest = self.layout.smallest
        workers = f"elastic.workers={{min: {fewest}, max: {fewest}}}"
        return (workers, *self.settings, *self._length, *self.layout.numerics)

    @property
    def _length(self) -> tuple[str, ...]:
        return () if self.steps == STEPS else (f"train.steps={self.steps}",)

    def __str__(self) -> str:
        acts = [f"{act.kind} {act.number} at {act.step}" for act in self.acts]
        told = "; ".join([*self.faults, *acts]) or "nothing"
        return f"{self.layout.name}, {self.workers} workers{', loaded' if self.is_loaded else ''}: {told}"


def draw(seed: int, *, is_loaded: bool | None = None, steps: int = STEPS) -> Story:
    """The story of a seed, in a run of `steps` steps; the layouts come in turn, so that as many seeds as there
    are layouts have them all."""
    dice = random.Random(f"story {seed}")
    layout = LAYOUTS[seed % len(LAYOUTS)]
    step = layout.smallest
    workers = dice.choice(range(2 * step, layout.largest + 1, step)) if layout.largest > 2 * step else layout.largest
    faults: list[str] = []
    acts: list[Act] = []
    at = dice.randrange(5, 20)
    while at < steps - 5:
        if dice.random() < 0.5:
            faults.append(_fault(dice, layout, workers, at))
        else:
            kind = dice.choice(ACTS)
            number = dice.randrange(layout.smallest, workers + 1, step) if kind == "resize" else dice.randrange(workers)
            acts.append(Act(at, kind, number))
        at += dice.randrange(APART_STEPS, 4 * APART_STEPS)
    # Each end of a driver is another start of a cluster: two are enough for one story.
    ends = [act for act in acts if act.kind in ENDS_THE_DRIVER]
    acts = [act if act not in ends[2:] else replace(act, kind="kill", number=0) for act in acts]
    loaded = dice.random() < 0.5
    return Story(seed, layout, workers, tuple(faults), tuple(acts), loaded if is_loaded is None else is_loaded, steps)


def _fault(dice: random.Random, layout: Layout, workers: int, step: int) -> str:
    kind = dice.choice(KINDS_INSIDE)
    if kind == "controller":
        return f"step={step},kind=controller"
    where = f"step={step},worker={dice.randrange(workers)},kind={kind}"
    if kind == "nan":
        return f"{where},phase={dice.choice(('data', 'compute'))}"
    if kind == "slow":
        return f"{where},factor={dice.choice((2, 3, 5))},steps={dice.randrange(5, 30)}"
    if kind == "drain":
        return f"{where},seconds=20"
    return f"{where},phase={dice.choice(layout.phases)}"
