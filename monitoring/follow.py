"""Following a run as it is recorded: new records as they come, and the plain sentence that each stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from monitoring.evaluations import as_text, describe_evaluation
from monitoring.events import (
    CheckpointComplete,
    CheckpointDelayed,
    CheckpointFailed,
    CheckpointInvalid,
    ControllerRestarted,
    DrainNoticed,
    Evaluated,
    Evicted,
    EvictionWithdrawn,
    GaveWay,
    GenerationFormed,
    GivesWayNoMore,
    IncidentOpened,
    MarketChanged,
    MetricsEndpoint,
    Rebalanced,
    RebalanceMeasured,
    RecordsDelayed,
    RecordsDropped,
    Recovered,
    ResizeRequested,
    RolledBack,
    Shortage,
    ShortageOver,
    SkewFound,
    SkewOver,
    StartFailed,
    StopRequested,
    TeachersMissing,
    Waiting,
    WorkerReady,
)
from monitoring.records import MAX_LINE_BYTES, records_from


class Tail:
    """Gives the records that were appended to a file since last asked; the file may not exist yet.

    Of a file that is there already: none of its records with `from_end`, with `last_bytes` those in its last that many
    bytes. `passed_over` counts the lines that are no records, by the name of the file.
    """

    def __init__(self, path: Path, from_end: bool = False, last_bytes: int | None = None) -> None:
        self._path = path
        self.passed_over: Counter[str] = Counter()
        last_bytes = 0 if from_end else last_bytes
        self._inode: int | None = None
        size = path.stat().st_size if last_bytes is not None and path.exists() else 0
        self._offset = max(0, size - (last_bytes or 0))
        if self._offset and last_bytes:
            with path.open("rb") as file:
                file.seek(self._offset - 1)
                self._offset += len(file.readline(MAX_LINE_BYTES)) - 1  # to the start of a line

    def new(self) -> Iterator[dict[str, Any]]:
        """New whole records, oldest first. A file that was cut (a rollback) is read on from its new end."""
        if not self._path.exists():
            return
        found = self._path.stat()
        if found.st_size < self._offset or (self._inode is not None and found.st_ino != self._inode):
            self._offset, self._inode = found.st_size, found.st_ino
            return
        self._inode = found.st_ino
        for end, record in records_from(self._path, self._offset):
            self._offset = end
            if record is not None:
                yield record
            else:
                self.passed_over[self._path.name] += 1


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def describe_recovery(event: dict[str, Any]) -> str:
    """One line about one recovery, e.g. "recovered in 0.21 s, 0 steps lost"."""
    moved = f", {megabytes(event['bytes_moved'])} from {event['source']}" if event["bytes_moved"] else ""
    stall_s, detect_s = event["stall_seconds"], event["detect_seconds"]
    # A stall is less one step, which may be more than what came after the detection took.
    took = f"recovered in {stall_s:.2f} s" if stall_s >= detect_s else f"cost {stall_s:.2f} s more than a step takes"
    return f"{took} (detected after {detect_s:.2f} s), {event['steps_lost']} steps lost{moved}"


def describe_rebalance(event: dict[str, Any]) -> str:
    """One line about work that is moved."""
    speeds = ", ".join(f"{worker}: {speed:.2f}" for worker, speed in list(event["speeds"].items())[:8])
    more = ", ..." if len(event["speeds"]) > 8 else ""
    if event["change"] == "stages":
        what = "stages cut anew, blocks " + " ".join(str(stop - start) for start, stop in event["stages"][:16])
    else:
        what = f"virtual workers dealt {_counts(event['from'])} -> {_counts(event['to'])}"
    return f"{what} for speeds {speeds}{more}; saves {event['predicted_gain']:.0%} of a step by prediction"


def _counts(counts: list[int]) -> str:
    return " ".join(map(str, counts[:8])) + (" ..." if len(counts) > 8 else "")


def describe_event(event: dict[str, Any]) -> str | None:
    """What an event record means, in one line; None for what only tools care about, and for one that lacks what its
    line would tell (of another version, or damaged)."""
    try:
        return _describe_event(event)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError):
        return None


def _generation(event: dict[str, Any]) -> str:
    workers = ", ".join(str(worker["worker"]) for worker in event["workers"])
    return f"generation {event['generation']} from step {event['start_step']}: workers {workers}"


def _recovery(event: dict[str, Any]) -> str:
    who = "" if event["worker"] is None else f" of worker {event['worker']}"
    return f"{event['incident']}{who} at step {event['step']}: {describe_recovery(event)}"


def _checkpoint_saved(event: dict[str, Any]) -> str:
    held = f", training held up {event['blocked_seconds']:.3f} s" if "blocked_seconds" in event else ""
    size = megabytes(event["bytes"])
    return f"checkpoint of {event['committed']} steps ({size}, {event['seconds']:.2f} s{held})"


def _checkpoint_delayed(event: dict[str, Any]) -> str:
    return f"checkpoint due after {event['committed']} steps waits: the one before is still being written"


def _skew_found(event: dict[str, Any]) -> str:
    who = f" of worker {event['workers'][0]}" if event["workers"] else ""
    return f"{event['finding']}{who}: {event['detail']}"


def _skew_over(event: dict[str, Any]) -> str:
    who = f" of worker {event['workers'][0]}" if event["workers"] else ""
    return f"{event['finding']}{who} is over"


def _rebalance_measured(event: dict[str, Any]) -> str:
    return (
        f"the change of {event['change']} saved {event['measured_gain']:.0%} of a step, "
        f"{event['predicted_gain']:.0%} were predicted"
    )


def _eviction(event: dict[str, Any]) -> str:
    return (
        f"worker {event['worker']} is to be replaced: at {event['speed']:.2f} of the fastest's speed "
        f"for {event['seconds']:.0f} s"
    )


def _controller_restarted(event: dict[str, Any]) -> str:
    return f"the controller was restarted (epoch {event['epoch']}) and found {event['workers_found']} workers"


def _shortage(event: dict[str, Any]) -> str:
    workers = ", ".join(map(str, event["workers"]))
    return f"no room for worker {workers} for {event['waited_seconds']:.0f} s: {event['reason']}"


def _teachers_missing(event: dict[str, Any]) -> str:
    teachers = ", ".join(map(str, event["teachers"]))
    return f"nothing heard of teacher {teachers} for {event['waited_seconds']:.0f} s: {event['reason']}"


def _gave_way(event: dict[str, Any]) -> str:
    return f"the {len(event['workers'])} places this run has are given to {event['to']}, which waits too"


def _market_changed(event: dict[str, Any]) -> str:
    waited = f"no {event['from']} node has come in {event['waited_seconds']:.0f} s"
    return f"{waited}: asking for {event['to']} ones"


def _records_delayed(event: dict[str, Any]) -> str:
    return f"{event['records']} records waited {event['seconds']:.0f} s for the run directory, and are written"


def _records_dropped(event: dict[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(event["kinds"].items()))
    return f"{event['count']} records could not be kept while the run directory could not be written: {kinds}"


def _worker_ready(event: dict[str, Any]) -> str:
    took = f"{event['start_seconds']:.1f} s, " if "start_seconds" in event else ""
    return f"worker {event['worker']} is ready ({took}pid {event['pid']})"


def _eviction_withdrawn(event: dict[str, Any]) -> str:
    return f"worker {event['worker']} may stay: at {event['speed']:.2f} of the fastest's speed"


_TOLD: dict[str, Callable[[dict[str, Any]], str]] = {
    GenerationFormed.kind: _generation,
    IncidentOpened.kind: lambda event: f"{event['incident']}: {event['cause']}",
    Recovered.kind: _recovery,
    RolledBack.kind: lambda event: (
        f"back to the state of {event['committed']} steps: {event['steps']} steps are done again"
    ),
    WorkerReady.kind: _worker_ready,
    Waiting.kind: lambda event: f"waiting: {event['workers']} workers, {event['needed']} needed (elastic.workers.min)",
    CheckpointComplete.kind: _checkpoint_saved,
    CheckpointDelayed.kind: _checkpoint_delayed,
    CheckpointFailed.kind: lambda event: f"checkpoint of {event['committed']} steps failed: {event['error']}",
    CheckpointInvalid.kind: lambda event: f"checkpoint {event['path']} cannot be used: {event['reason']}",
    SkewFound.kind: _skew_found,
    SkewOver.kind: _skew_over,
    Rebalanced.kind: lambda event: describe_rebalance(event),
    RebalanceMeasured.kind: _rebalance_measured,
    Evicted.kind: _eviction,
    EvictionWithdrawn.kind: _eviction_withdrawn,
    ControllerRestarted.kind: _controller_restarted,
    Evaluated.kind: describe_evaluation,
    DrainNoticed.kind: lambda event: f"worker {event['worker']} must leave: {event['reason']}",
    Shortage.kind: _shortage,
    TeachersMissing.kind: _teachers_missing,
    ShortageOver.kind: lambda event: "no worker waits for room any more",
    GaveWay.kind: _gave_way,
    GivesWayNoMore.kind: lambda event: "asking for room again",
    MarketChanged.kind: _market_changed,
    ResizeRequested.kind: lambda event: f"resize from {event['from']} to {event['to']} workers requested",
    StartFailed.kind: lambda event: f"worker {event['worker']} could not start: {event['detail']}",
    MetricsEndpoint.kind: lambda event: f"metrics at {event['url']}",
    RecordsDelayed.kind: _records_delayed,
    RecordsDropped.kind: _records_dropped,
    StopRequested.kind: lambda event: f"stop requested: {event['reason']}",
}
"""What is said of an event, by its kind; of other kinds nothing is."""


def _describe_event(event: dict[str, Any]) -> str | None:
    told = _TOLD.get(event["kind"])
    return None if told is None else told(event)


def describe_step(record: dict[str, Any], total_steps: int, workers: int) -> str:
    """One line about one committed step."""
    speed = record["tokens"] / record["seconds"] if record["seconds"] else 0.0
    loss = "  (skipped: gradient not finite)" if record["skipped"] else ""
    return (
        f"step {record['step'] + 1:>6}/{total_steps}  loss {_number(record['loss'])}  "
        f"norm {_number(record['grad_norm'], 3)}  {speed:>8,.0f} tokens/s  {workers} workers{loss}"
    )


def _number(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def summary(result: dict[str, Any], run_dir: str) -> list[str]:
    """The closing lines of a run, from the content of result.json."""
    loss = result.get("final_loss")
    lines = [
        f"{result['status']:<11}{result.get('steps', 0)} steps, {result.get('tokens', 0):,} tokens"
        + (f", loss {loss:.4f}" if loss is not None else "")
        + f", {result.get('wall_seconds', 0.0):.1f} s, goodput {100 * result.get('goodput_ratio', 0.0):.0f} %"
    ]
    reason = str(result.get("reason") or "")
    if result["status"] != "finished" or reason.startswith("early"):
        lines.append(f"{'because':<11}{reason}")
    for event in result.get("recoveries", []):
        who = "" if event["worker"] is None else f" of worker {event['worker']}"
        where = f"{who.strip() or 'by plan'} at step {event['step']}"
        lines.append(f"{event['kind']:<11}{where}: {describe_recovery(event)}")
    for index in result.get("faults_not_fired", []):
        lines.append(f"{'note':<11}fault {index} of the job never happened: its worker was not there at that step")
    for which, found in (result.get("evaluation") or {}).items():
        step = found["step"]
        if which == "last" or step != result["evaluation"]["last"]["step"]:
            rest = {name: value for name, value in found.items() if name != "step"}
            best = "the best, " if which == "best" else ""
            lines.append(f"{'evaluation':<11}{best}after {step} steps: {as_text(rest)}")
    if result.get("state_digest"):
        lines.append(f"{'weights':<11}{result['state_digest']}")
    if result.get("data_digest"):
        lines.append(f"{'samples':<11}{result['data_digest']}")
    if not result.get("bit_exact", True):
        lines.append(f"{'note':<11}strategy.reduction is native: equal within rounding only, not bit for bit")
    lines.append(f"{'files':<11}{run_dir}")
    return lines
