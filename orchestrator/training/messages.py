"""What workers and the controller say to each other. Plain values: no Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from orchestrator.checkpoint.names import Save
from orchestrator.control.core.protocol import FaultFired
from orchestrator.control.core.workers import WorkerId
from orchestrator.evaluation.judge import NOT_YET, Judgement
from orchestrator.models.costs import ModelCosts
from strategies.layout.parallel import ParallelLayout
from strategies.layout.statemap import Spans, whole
from strategies.update.timing import RankTimes


@dataclass(frozen=True)
class Member:
    """One rank of a generation. `host`:`store_port` is the rendezvous store that its process serves.

    What is on one `node` fails together, and so does what is in one `zone` ("": not known).
    """

    worker: WorkerId
    node: str
    pid: int
    host: str
    store_port: int
    zone: str = ""


@dataclass(frozen=True)
class Generation:
    """A numbered membership: everything a worker needs to take its place. Members are in rank order, spares last.

    `committed` is the number of steps the state holds when the generation starts, so also the first step to run.
    `held` is by rank what of that state each has, those in `roll_forward` after they have applied the reduced gradient
    of its last step, whose global norm is `norm`: they missed the news of the vote. With `restore`, the place of the
    checkpoint of that many steps, nobody holds anything, and all read it. A generation to `collect` trains nothing:
    rank 0 is given the whole state, for the digest of the run's end, and all leave.
    """

    number: int
    term: int
    committed: int
    cause: str
    members: tuple[Member, ...]
    layout: ParallelLayout
    held: tuple[Spans, ...]
    roll_forward: tuple[int, ...] = ()
    norm: float | None = None
    restore: str | None = None
    fired_faults: tuple[int, ...] = ()
    collect: bool = False
    judged: Judgement = NOT_YET
    """What evaluations up to this state have come to."""

    def rank_of(self, worker: WorkerId) -> int | None:
        for rank, member in enumerate(self.members):
            if member.worker == worker:
                return rank
        return None


@dataclass(frozen=True)
class StepReport:
    """One committed step, as every rank knows it. `loss` in the objective's unit; `committed_at` as the worker's
    monotonic clock says until it is `dated`; `tokens` are targets that count, `padding` positions computed without one.

    `ranks` is what each rank of the generation spent on it, told by the first only; `deal` the number of the deal by
    which they held virtual workers, `wire_bytes` what all of them have sent in it, by kind, `round_steps` how
    many steps were committed together with it as the last (0: others followed).

    More than 15 attributes: it is the record of a step.
    """

    step: int
    generation: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    samples: str
    skipped: bool
    committed_at: float
    seconds: float
    phase_seconds: dict[str, float] = field(default_factory=dict)
    padding: int = 0
    ranks: tuple[RankTimes, ...] = ()
    deal: int = 0
    wire_bytes: dict[str, int] = field(default_factory=dict)
    round_steps: int = 1


@dataclass(frozen=True)
class EvaluationReport:
    """What the weights after `step` steps were found to be worth, as every rank knows it: `metrics` by name, of
    `samples` samples. It took `seconds`."""

    step: int
    generation: int
    metrics: dict[str, Any]
    samples: int
    seconds: float


# ---------------------------------------------------------------------------------------- from a worker


@dataclass(frozen=True)
class Ready:
    """A worker is warm: imports done, model built, data open.

    `initial` digests its step-0 state, of which every warm worker can make any part: `elements` for each
    tensor-parallel coordinate. `memory_bytes` is what the worker may use, 0 when that is not known; `costs` describes
    the model, when the job has a pipeline to cut it for. `unit_seconds` is what its device was measured to need for a
    fixed piece of work, the same for all workers of a run; 0 when it was not measured. `flops_per_token` is what the
    model takes for a token, forward and backward, `peak_flops` what its device does in a second; 0 when not known.
    `lateness_s` is how late its threads were while it got warm. `probe` is the digest of what its `device` computed in
    passes that are the same for all workers of a run ("": it was not tried), and that in words.

    More than 15 attributes: it is all that a controller ever knows of a worker before it trains.
    """

    worker: WorkerId
    node: str
    pid: int
    host: str
    store_port: int
    initial: str
    elements: int
    zone: str = ""
    memory_bytes: int = 0
    costs: ModelCosts | None = None
    unit_seconds: float = 0.0
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    loaded: dict[str, Any] | None = None
    """What became of a directory's weights (`orchestrator.models.loading.Loaded`); None for other models."""
    lateness_s: float = 0.0
    probe: str = ""
    device: str = ""
    virtual: int = 0
    """Virtual things that have state of their own (`strategies.layout.virtual`)."""

    def whole_state(self, tensor: int) -> Spans:
        """All there is of a state whose model is split over `tensor` coordinates."""
        return whole(self.elements, tensor * (1 + self.virtual))


@dataclass(frozen=True)
class GpuReading:
    """How a GPU does, by its driver; None is what it does not say. `utilization` is the share of the time in which
    something ran on it, `sm_hertz` the clock of its processors, `free_bytes` what nobody has of its memory; `corrected`
    and `uncorrected` count memory errors since the driver was loaded; `slowed_by` is what keeps its clock down, beside
    the limit of its power, at which one at work may well be."""

    utilization: float | None = None
    sm_hertz: float | None = None
    celsius: float | None = None
    watts: float | None = None
    free_bytes: int | None = None
    corrected: int | None = None
    uncorrected: int | None = None
    slowed_by: tuple[str, ...] = ()
    at_power_limit: bool = False


GpuAction = Literal["replace", "retire", "none"]


@dataclass(frozen=True)
class GpuTrouble:
    """Something is wrong with a worker's GPU, by its driver. The worker is to be replaced at once, or when another can
    take its place; or it is only to be known."""

    worker: WorkerId
    action: GpuAction
    detail: str


@dataclass(frozen=True)
class Heartbeat:
    """`phase` and `step` say where the training thread is; `reports` are steps the controller has not confirmed.

    `moves` counts what it gets done inside a phase: micro-batches, collectives, chunks received, tensors read.
    `host_bytes` is its process's resident memory, `device_bytes` what it has allocated on its device. `lateness_s` is
    how late it has been lately itself: its threads, and the answers to what it reported. `gpu` is None where none is
    watched, and `trouble` what has been said to be wrong with it and asks for something to be done.
    """

    worker: WorkerId
    generation: int
    phase: str
    step: int
    committed: int
    reports: tuple[StepReport, ...] = ()
    host_bytes: int = 0
    moves: int = 0
    device_bytes: int = 0
    lateness_s: float = 0.0
    gpu: GpuReading | None = None
    trouble: GpuTrouble | None = None
    evaluations: tuple[EvaluationReport, ...] = ()


@dataclass(frozen=True)
class Joined:
    """The worker's groups are formed and its state is in place; it starts to train. To bring it there it received
    `bytes_moved`, and needed `buffer_bytes` at once beside the state itself."""

    worker: WorkerId
    generation: int
    bytes_moved: int
    buffer_bytes: int = 0


LeftCause = Literal[
    "pause", "complete", "peer", "exception", "restore", "storage", "unusable", "job", "device", "memory"
]


@dataclass(frozen=True)
class Left:
    """The worker is out of its generation and waits.

    `held` is what it has of the state after `committed` steps; it also holds the reduced gradient, for all of that, of
    a round of `prepared` steps after those (0: of none). Causes: a pause all agreed to; all steps done; a peer lost;
    its own exception; a checkpoint that is not what was saved; a storage that cannot be read; a checkpoint that cannot
    be used with this job or key; a mistake in the job, which no repetition mends; a device that fails, and all that is
    on it with it; too little memory.
    """

    worker: WorkerId
    generation: int
    cause: LeftCause
    committed: int
    held: Spans
    prepared: int = 0
    detail: str = ""
    reports: tuple[StepReport, ...] = ()
    at: float = 0.0
    evaluations: tuple[EvaluationReport, ...] = ()


@dataclass(frozen=True)
class Finalized:
    """The worker's digest of its final state."""

    worker: WorkerId
    digest: str
    error: str = ""


@dataclass(frozen=True)
class SavePlan:
    """What the ranks of one attempt at a checkpoint agreed on: who writes a part of it, and what layout it is from."""

    save: Save
    writers: tuple[WorkerId, ...]
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveBegun:
    """The ranks are saving; training was held up for `blocked_seconds` by the copy that the first of them took."""

    worker: WorkerId
    plan: SavePlan
    blocked_seconds: float = 0.0


@dataclass(frozen=True)
class SaveDelayed:
    """A checkpoint was due after `committed` steps, but the one before is still being written; it is made as soon as
    that is done."""

    worker: WorkerId
    committed: int


@dataclass(frozen=True)
class PartSaved:
    """The part of `rank` is complete and durable; `digest` is that of its list of chunks. Or it failed with `error`.

    `reports` are the steps up to this checkpoint that were not on record when it was begun: should all workers be lost
    before anybody tells of them, they are not lost with those."""

    worker: WorkerId
    plan: SavePlan
    rank: int
    digest: str
    seconds: float = 0.0
    num_bytes: int = 0
    error: str = ""
    reports: tuple[StepReport, ...] = ()


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete and durable at `path`, or could not be completed for `error`."""

    worker: WorkerId
    save: Save
    path: str
    seconds: float = 0.0
    num_bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class Status:
    """A worker's whole situation, for a controller that takes over."""

    ready: Ready
    generation: Generation | None
    left: Left | None
    committed: int
    held: Spans
    prepared: int
    joined: bool
    term: int
    reports: tuple[StepReport, ...] = ()
    part: PartSaved | None = None
    """The last part of a checkpoint that it wrote."""
    evaluations: tuple[EvaluationReport, ...] = ()
    assignment: tuple[tuple[int, ...], ...] = ()
    """The virtual workers of each replica of its generation by the newest deal it knows; empty: its layout's."""


@dataclass(frozen=True)
class Reply:
    """The controller's answer to any report. Steps below `recorded` are on record; those below `known` need not be told
    to this controller again, but may have to be to its successor. `shutdown` ends the worker."""

    recorded: int
    term: int
    known: int = 0
    shutdown: bool = False
    evaluated: int = -1
    """Evaluations of no more than this many steps are on record."""


# ---------------------------------------------------------------------------------------- their times

T = TypeVar("T")


def dated(message: T, shift: float) -> T:
    """A worker's message with its times on the run's line, of which its monotonic clock is `shift` behind."""
    match message:
        case Heartbeat() | Status() | Left() | PartSaved():
            times: dict[str, Any] = {"reports": tuple(_dated_step(report, shift) for report in message.reports)}
            if isinstance(message, Left) and message.at:
                times["at"] = message.at + shift
            if isinstance(message, Status) and message.left is not None:
                times["left"] = dated(message.left, shift)
            if isinstance(message, Status) and message.part is not None:
                times["part"] = dated(message.part, shift)
            return replace(message, **times)
        case FaultFired():
            return replace(message, at=message.at + shift)
    return message


def _dated_step(report: StepReport, shift: float) -> StepReport:
    return replace(report, committed_at=report.committed_at + shift)
