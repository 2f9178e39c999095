"""What happens in a run, as events.jsonl tells it: one class a kind, and from it what is written, what is checked when
it is read, and the table in docs/run-directory.md.

A field is `Needed` when readers rely on it: a record without it is passed over. Others may be missing, in records of
earlier versions, or where there is nothing to say (`ABSENT`). Kinds and fields are only added; a reader takes records
with kinds and fields that it does not know. `VERSION` counts changes of what a kind or field means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Final, TypeVar, get_args, get_origin, get_type_hints

from monitoring.outside import Check
from monitoring.values import by_name, count, fields, flag, many, maybe, number, seconds, text, thing, whole

VERSION = 1

T = TypeVar("T")


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final[Any] = _Absent()
"""Of a field that a record does not have."""
_NEEDED: Final = "needed"
Needed = Annotated[T, _NEEDED]

Count = Annotated[int, count]
Whole = Annotated[int, whole]
Number = Annotated[float, number]
Seconds = Annotated[float, seconds]
Text = Annotated[str, text]
Flag = Annotated[bool, flag]
Counts = Annotated[list[int], many(count)]
MaybeText = Annotated[str | None, maybe(text)]
MaybeCount = Annotated[int | None, maybe(count)]
Thing = Annotated[dict[str, Any], thing]
Names = Annotated[list[str], many(text)]
SecondsByName = Annotated[dict[str, float], by_name(seconds)]

NAMED: Mapping[str, Check] = {"worker": count, "incarnation": count}
LAYOUT = fields({}, data=count, tensor=count, pipeline=count, shard=maybe(text))
_MEMBER = fields({"worker": count, "incarnation": count}, node=maybe(text), pid=maybe(count))
_LOST = fields({"step": count}, seconds=seconds, phase_seconds=by_name(seconds), tokens=count, skipped=flag)
RECOVERY = fields(
    {"worker": maybe(count), "step": count, "detect_seconds": seconds, "stall_seconds": seconds,
     "steps_lost": count, "bytes_moved": count, "source": text},
    incident=text, kind=text, cause=text, at=seconds, pause_seconds=seconds, generation=maybe(whole),
)  # fmt: skip
"""A recovery as result.json has it."""

KINDS: dict[str, type[RunEvent]] = {}
"""All kinds of events, by the name that records have for them."""


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """One thing that happened in a run."""

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        KINDS[cls.kind] = cls

    def fields(self) -> dict[str, Any]:
        """What a record of it has beside its time and kind."""
        values = ((each.name.rstrip("_"), getattr(self, each.name)) for each in dataclasses.fields(self))
        return {name: value for name, value in values if value is not ABSENT}

    def record(self, stamp: Mapping[str, float]) -> dict[str, Any]:
        """The record of it; `stamp` are the fields that say when that was made."""
        return {**stamp, "kind": self.kind, **self.fields()}


@dataclass(frozen=True)
class OfWorker(RunEvent):
    """Something about one worker: a slot, and which incarnation of it."""

    kind: ClassVar[str] = ""
    worker: Needed[Count]
    incarnation: Needed[Count]


# ---------------------------------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class RunStarted(RunEvent):
    """The run began. `job` is the digest of its job file, `loss_unit` what a loss is in, `events` the version of these
    records."""

    kind = "run_started"
    run: Text
    job: Text
    steps: Count
    min_workers: Count
    loss_unit: Text
    events: Count = VERSION


@dataclass(frozen=True, kw_only=True)
class RunFinished(RunEvent):
    """The run ended: `status` is finished, stopped or failed."""

    kind = "run_finished"
    status: Needed[Text]
    reason: MaybeText


@dataclass(frozen=True, kw_only=True)
class ControllerBegan(RunEvent):
    """A controller is in charge: the one of term `epoch`, for the driver's `session`. `boot` and `clock_shift` say how
    its monotonic clock stands to the run's line of time."""

    kind = "controller"
    epoch: Count
    pid: Count
    session: Needed[MaybeText]
    node: MaybeText
    own_cluster: Flag
    boot: Text = ABSENT
    clock_shift: Number = ABSENT


@dataclass(frozen=True, kw_only=True)
class ControllerRestarted(RunEvent):
    """Ray started another controller, which found these workers of the one before."""

    kind = "controller_restarted"
    epoch: Count
    workers_found: Count
    workers_starting: Count


@dataclass(frozen=True, kw_only=True)
class MetricsEndpoint(RunEvent):
    """Where Prometheus finds the run."""

    kind = "metrics_endpoint"
    url: Needed[Text]


@dataclass(frozen=True, kw_only=True)
class ModelLoaded(RunEvent):
    """What became of the weights of a directory: tensors that are `new`, `left_out`, `untied`; and trained parameters
    that no loss depends on (`unused`)."""

    kind = "model_loaded"
    directory: Text = ABSENT
    new: Names = ABSENT
    left_out: Names = ABSENT
    untied: Names = ABSENT
    unused: Names = ABSENT


@dataclass(frozen=True, kw_only=True)
class RequestAnswered(RunEvent):
    """A request of the command line was taken up, or refused."""

    kind = "request_answered"
    id: Needed[Text]
    request: Text
    error: Text = ABSENT


@dataclass(frozen=True, kw_only=True)
class ResizeRequested(RunEvent):
    """A user asked for another number of workers."""

    kind = "resize_requested"
    from_: Count
    to: Count


@dataclass(frozen=True, kw_only=True)
class StopRequested(RunEvent):
    """A user, or a lost run directory, asks the run to end."""

    kind = "stop_requested"
    reason: Needed[Text]


@dataclass(frozen=True, kw_only=True)
class RecordsDelayed(RunEvent):
    """`records` had to wait, the first for `seconds`, for a run directory that could not be written."""

    kind = "records_delayed"
    records: Count
    seconds: Seconds


@dataclass(frozen=True, kw_only=True)
class RecordsDropped(RunEvent):
    """More had to wait than memory allows: `count` were dropped since `since`, by kind in `kinds`."""

    kind = "records_dropped"
    count: Count
    kinds: Thing
    since: Seconds


# ---------------------------------------------------------------------------------------- workers


@dataclass(frozen=True, kw_only=True)
class WorkerRequested(OfWorker):
    """The cluster was asked for one more worker, in a `market` if the job has any."""

    kind = "worker_requested"
    market: Text = ABSENT


@dataclass(frozen=True, kw_only=True)
class WorkerPlaced(OfWorker):
    """The cluster has found room for the worker, on `node`."""

    kind = "worker_placed"
    node: MaybeText


@dataclass(frozen=True, kw_only=True)
class WorkerReady(OfWorker):
    """The worker can join, `start_seconds` after it was requested; floating-point operations per token of its model and
    per second of its device, where they are known; what it computes on, and the digest of what that computed in passes
    that are the same for all workers."""

    kind = "worker_ready"
    node: MaybeText
    pid: Needed[Count]
    start_seconds: Seconds = ABSENT
    flops_per_token: Number = ABSENT
    peak_flops: Number = ABSENT
    device: Text = ABSENT
    probe: Text = ABSENT


@dataclass(frozen=True, kw_only=True)
class WorkerDied(OfWorker):
    """The worker's process ended by itself, or with its node (`node_lost`)."""

    kind = "worker_died"
    node: MaybeText
    node_lost: Flag
    detail: Text


@dataclass(frozen=True, kw_only=True)
class WorkerKilled(OfWorker):
    """The worker was ended without its cooperation."""

    kind = "worker_killed"
    reason: Text


@dataclass(frozen=True, kw_only=True)
class WorkerReleased(OfWorker):
    """The worker was told to leave."""

    kind = "worker_released"
    reason: Text


@dataclass(frozen=True, kw_only=True)
class StartFailed(RunEvent):
    """A worker could not be built; `detail` is the error."""

    kind = "start_failed"
    worker: Count
    detail: Text


@dataclass(frozen=True, kw_only=True)
class DrainNoticed(OfWorker):
    """The worker's node or place is announced to go away at `deadline`."""

    kind = "drain_notice"
    node: MaybeText
    reason: Text
    deadline: Seconds


@dataclass(frozen=True, kw_only=True)
class GpuFaulty(OfWorker):
    """The driver of a worker's GPU says that something is wrong with it: `action` is replace (the worker, at once),
    retire (it, when another can take its place) or none."""

    kind = "gpu_faulty"
    node: MaybeText
    action: Needed[Text]
    detail: Needed[Text]


@dataclass(frozen=True, kw_only=True)
class NodeSuspected(RunEvent):
    """Other nodes are preferred from here on."""

    kind = "node_suspected"
    node: Needed[Text]
    reason: Needed[Text]


@dataclass(frozen=True, kw_only=True)
class StateRefused(OfWorker):
    """The worker holds the state of more `committed` steps than are `recorded`; that state is not used."""

    kind = "state_refused"
    committed: Count
    recorded: Count


@dataclass(frozen=True, kw_only=True)
class FaultInjected(RunEvent):
    """A fault of the job file, by its number there, happened at `at` (`what` it is)."""

    kind = "fault_injected"
    fault: Needed[Count]
    worker: MaybeCount
    at: Seconds
    what: Thing = ABSENT


# ---------------------------------------------------------------------------------------- room


@dataclass(frozen=True, kw_only=True)
class Waiting(RunEvent):
    """Training waits: there are `workers`, and at least `needed` are required."""

    kind = "waiting"
    workers: Count
    needed: Needed[Count]


@dataclass(frozen=True, kw_only=True)
class Shortage(RunEvent):
    """These workers have found no room for `waited_seconds`; `reason` is what the cluster says of it."""

    kind = "shortage"
    workers: Counts
    waited_seconds: Seconds
    reason: Text


@dataclass(frozen=True, kw_only=True)
class RequestsHeld(RunEvent):
    """Ray does not answer requests for these workers: they wait until it does, and that is no shortage."""

    kind = "requests_held"
    workers: Needed[Counts]


@dataclass(frozen=True, kw_only=True)
class ShortageOver(RunEvent):
    """No worker waits for room any more; some did for `seconds`."""

    kind = "shortage_over"
    seconds: Seconds


@dataclass(frozen=True, kw_only=True)
class TeachersMissing(RunEvent):
    """These processes of `elastic.teachers` have not been heard of for `waited_seconds`; `reason` is what the cluster
    says of room for them."""

    kind = "teachers_missing"
    teachers: Counts
    waited_seconds: Seconds
    reason: Text


@dataclass(frozen=True, kw_only=True)
class MarketChanged(RunEvent):
    """A market met no request for `waited_seconds`: these workers are requested in the next market."""

    kind = "market_changed"
    from_: Text
    to: Text
    workers: Count
    waited_seconds: Seconds


@dataclass(frozen=True, kw_only=True)
class GaveWay(RunEvent):
    """The places of these workers were given back for run `to`, which waits for room too."""

    kind = "gave_way"
    to: Text
    workers: Counts


@dataclass(frozen=True, kw_only=True)
class GivesWayNoMore(RunEvent):
    """The other run has its room: this one requests workers again."""

    kind = "gives_way_no_more"
    to: Text


# ---------------------------------------------------------------------------------------- generations and incidents


@dataclass(frozen=True, kw_only=True)
class GenerationFormed(RunEvent):
    """A numbered membership, from step `start_step` on: its workers in rank order, its layout, how many virtual workers
    each replica has (`dealt`), and where its state comes from (`restore`: a checkpoint; `source`). `steps_lost` are run
    again. `spares` only hand over state, `idle` are left without work; one to `collect` trains nothing."""

    kind = "generation"
    generation: Needed[Whole]
    start_step: Needed[Count]
    cause: Needed[Text]
    workers: Needed[Annotated[list[dict[str, Any]], many(_MEMBER)]]
    layout: Needed[Annotated[dict[str, Any], LAYOUT]]
    dealt: Counts
    restore: MaybeText
    source: MaybeText
    steps_lost: Count
    idle: Count = ABSENT
    spares: Count = ABSENT
    collect: Flag = ABSENT


@dataclass(frozen=True, kw_only=True)
class GenerationRunning(RunEvent):
    """All its members have joined."""

    kind = "generation_running"
    generation: Whole


@dataclass(frozen=True, kw_only=True)
class IncidentOpened(RunEvent):
    """Something ends a generation, at `at`, in `step`: `incident` is its kind, `worker` whose it is (null: of no single
    worker). It was detected `detect_seconds` later."""

    kind = "incident"
    incident: Needed[Text]
    worker: Needed[MaybeCount]
    incarnation: MaybeCount
    cause: Needed[Text]
    step: Needed[Count]
    at: Needed[Seconds]
    detect_seconds: Needed[Seconds]


@dataclass(frozen=True, kw_only=True)
class Recovered(RunEvent):
    """The first step after an incident was committed. `stall_seconds` is the time from the incident to that step,
    `pause_seconds` the time between the steps before and after it, both less one median step. `bytes_moved` of state
    came from peers; no rank's buffers took more than `buffer_bytes` for that."""

    kind = "recovery"
    generation: Annotated[int | None, maybe(whole)]
    cause: Text
    incident: Needed[Text]
    worker: Needed[MaybeCount]
    step: Needed[Count]
    at: Needed[Seconds]
    detect_seconds: Needed[Seconds]
    stall_seconds: Needed[Seconds]
    pause_seconds: Seconds
    steps_lost: Needed[Count]
    source: Needed[Text]
    bytes_moved: Needed[Count]
    buffer_bytes: Count


# ---------------------------------------------------------------------------------------- steps


@dataclass(frozen=True, kw_only=True)
class StepsCommitted(RunEvent):
    """Some ten seconds of committed steps, `first` to `last`, and what their time went into (`seconds`)."""

    kind = "steps"
    first: Needed[Count]
    last: Needed[Count]
    generation: Needed[Whole]
    began: Needed[Seconds]
    ended: Needed[Seconds]
    seconds: Needed[SecondsByName]
    tokens: Count


@dataclass(frozen=True, kw_only=True)
class RolledBack(RunEvent):
    """The steps from `committed` on were lost, and are run again."""

    kind = "rollback"
    committed: Needed[Count]
    steps: Needed[Count]
    seconds: Needed[SecondsByName]
    tokens: Count
    lost: Annotated[list[dict[str, Any]], many(_LOST)]


@dataclass(frozen=True, kw_only=True)
class Evaluated(RunEvent):
    """The weights after `step` steps were evaluated on `samples` samples, which took `seconds`; `best` says whether
    they are the best so far."""

    kind = "evaluation"
    step: Needed[Count]
    generation: Needed[Whole]
    metrics: Needed[Thing]
    samples: Count
    seconds: Seconds
    best: Flag


# ---------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True, kw_only=True)
class CheckpointComplete(RunEvent):
    """A checkpoint is complete and durable; training was held up for `blocked_seconds`."""

    kind = "checkpoint_saved"
    committed: Needed[Count]
    path: Text
    bytes: Needed[Count]
    seconds: Needed[Seconds]
    blocked_seconds: Seconds = ABSENT
    writers: Count = ABSENT


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(RunEvent):
    """An attempt to save failed; training goes on."""

    kind = "checkpoint_failed"
    committed: Needed[Count]
    path: Text = ABSENT
    error: Needed[Text]


@dataclass(frozen=True, kw_only=True)
class CheckpointInvalid(RunEvent):
    """A checkpoint cannot be used, and is set aside."""

    kind = "checkpoint_invalid"
    path: Needed[MaybeText]
    reason: Needed[Text]


@dataclass(frozen=True, kw_only=True)
class CheckpointDelayed(RunEvent):
    """A checkpoint was due while the one before was still being written."""

    kind = "checkpoint_delayed"
    committed: Needed[Count]


# ---------------------------------------------------------------------------------------- skew


@dataclass(frozen=True, kw_only=True)
class SkewFound(RunEvent):
    """Work, data or speed is uneven: whose (`workers`, or a `node`), by how much, in words."""

    kind = "skew_found"
    finding: Needed[Text]
    workers: Needed[Counts]
    node: MaybeText
    value: Number
    detail: Needed[Text]


@dataclass(frozen=True, kw_only=True)
class SkewOver(RunEvent):
    """A finding no longer holds."""

    kind = "skew_over"
    finding: Needed[Text]
    workers: Needed[Counts]
    node: MaybeText
    value: Number
    detail: Text


@dataclass(frozen=True, kw_only=True)
class Rebalanced(RunEvent):
    """Virtual workers are assigned to replicas anew (how many each has: `from` before, `to` after), or the model is cut
    into other `stages`."""

    kind = "rebalance"
    change: Text
    deal: Count
    step: Count
    from_: Counts
    to: Counts
    speeds: Annotated[dict[str, float], by_name(number)]
    step_seconds: Seconds
    predicted_gain: Number
    stages: Annotated[list[list[int]], many(many(count))] = ABSENT


@dataclass(frozen=True, kw_only=True)
class RebalanceMeasured(RunEvent):
    """What the change of a `rebalance` brought, as shares of a step's time."""

    kind = "rebalance_measured"
    change: Text
    deal: Count
    step: Count
    predicted_gain: Number
    work_gain: Number
    measured_gain: Number


@dataclass(frozen=True, kw_only=True)
class Evicted(OfWorker):
    """The worker has been too slow for `seconds`, and is to be replaced."""

    kind = "eviction"
    node: MaybeText
    speed: Number
    own_speed: Number
    seconds: Seconds


@dataclass(frozen=True, kw_only=True)
class EvictionWithdrawn(OfWorker):
    """The worker is fast again, and stays."""

    kind = "eviction_withdrawn"
    node: MaybeText
    speed: Number


del KINDS[""]


# ---------------------------------------------------------------------------------------- reading


@cache
def check_of(kind: str) -> Check | None:
    """What a record of this kind must be; None for kinds of later versions."""
    if kind not in KINDS:
        return None
    needed: dict[str, Check] = {}
    optional: dict[str, Check] = {}
    for name, (check, is_needed) in _checks(KINDS[kind]).items():
        (needed if is_needed else optional)[name] = check
    return fields(needed, **optional)


def _checks(kind: type[RunEvent]) -> dict[str, tuple[Check, bool]]:
    """By the name of a field in records, what it must be, and whether readers rely on it."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for each in dataclasses.fields(kind):
        hint = hints[each.name]
        assert get_origin(hint) is Annotated, f"{kind.__name__}.{each.name} says not what it must be"
        notes = get_args(hint)[1:]
        check = next(note for note in notes if callable(note))
        found[each.name.rstrip("_")] = (check, _NEEDED in notes)
    return found


def as_markdown() -> str:
    """The table as docs/run-directory.md has it."""
    lines = ["| event | fields | |", "|---|---|---|"]
    for name, kind in sorted(KINDS.items()):
        names = ", ".join(f"`{field}`" for field in _checks(kind))
        told = " ".join((kind.__doc__ or "").split())
        lines.append(f"| `{name}` | {names} | {told} |")
    return "\n".join(lines) + "\n"
