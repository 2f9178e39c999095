"""The Prometheus series of a run, as data: the table on which registry, dashboards, rules and docs agree.

Every series carries the label `run`; those of ranks also `rank` (the rank in the present generation). Names follow the
Prometheus rules: base units, `_total` on counters and nowhere else, no label that grows without bound. Knows nothing of
how the numbers come about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PREFIX = "orchestrator_"

Kind = Literal["counter", "gauge", "histogram", "summary"]


@dataclass(frozen=True)
class Series:
    """One metric family. `labels` are those beside `run`; `unit` is empty for what only has a number or a share."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    unit: str
    help: str

    @property
    def per_rank(self) -> bool:
        """Whether there is one of it for every rank."""
        return "rank" in self.labels

    @property
    def exposed(self) -> tuple[str, ...]:
        """The names under which Prometheus stores it: a histogram is three, a summary without quantiles two."""
        if self.kind == "histogram":
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        if self.kind == "summary":
            return (f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)


def _counter(name: str, unit: str, text: str, *labels: str) -> Series:
    return Series(f"{PREFIX}{name}_total", "counter", labels, unit, text)


def _gauge(name: str, unit: str, text: str, *labels: str) -> Series:
    return Series(PREFIX + name, "gauge", labels, unit, text)


def _histogram(name: str, text: str, *labels: str) -> Series:
    return Series(PREFIX + name, "histogram", labels, "seconds", text)


def _summary(name: str, text: str, *labels: str) -> Series:
    return Series(PREFIX + name, "summary", labels, "seconds", text)


RUN_SERIES: tuple[Series, ...] = (
    # What run it is, and its time.
    _gauge("run_info", "", "Always 1; the run's name and the version that runs it.", "name", "version"),
    _gauge("run_start_timestamp_seconds", "seconds", "When the run began, in seconds since the epoch."),
    _counter("run_wall_seconds", "seconds", "Wall time since the run began; goodput and badput add up to it."),
    _counter("goodput_seconds", "seconds", "Wall time spent in steps that stayed committed."),
    _counter("badput_seconds", "seconds", "Wall time spent otherwise, by reason.", "reason"),
    _gauge("goodput_ratio", "", "Share of the wall time so far spent in steps that stayed committed."),
    _gauge(
        "run_state", "", "1 for the present state (waiting, settling, forming, running, finalizing, over), else 0.",
        "state",
    ),
    # Steps and their speed.
    _gauge("step", "steps", "Steps committed so far."),
    _gauge("step_target", "steps", "Steps of the job."),
    _gauge("last_step_timestamp_seconds", "seconds", "When the newest step was committed, in seconds since the epoch."),
    _gauge("step_expected_seconds", "seconds", "How long a step takes: the median of recent ones."),
    _histogram("step_duration_seconds", "Duration of committed steps."),
    _counter("tokens", "tokens", "Tokens in committed steps."),
    _counter("model_flops", "operations", "Floating-point operations of the model in committed steps, by formula."),
    _gauge("mfu_ratio", "", "Model FLOP/s as a share of the peak of the devices; absent when the peak is unknown."),
    _summary("phase_duration_seconds", "Time of the first rank in each phase of its steps.", "phase"),
    # Workers, and what happened to them.
    _gauge("world_size", "workers", "Workers by state: member, idle, starting or requested.", "state"),
    _gauge("world_target", "workers", "Workers that the run wants to train with now."),
    _gauge("world_min", "workers", "Workers without which the run waits."),
    _gauge("generation", "", "Number of the present generation."),
    _counter("failures", "incidents", "Incidents, by kind.", "kind"),
    _histogram("detection_seconds", "From an incident to when the controller knew of it."),
    _histogram("recovery_seconds", "Duration of recoveries by stage: settle, form, redo and total.", "stage"),
    _counter("steps_lost", "steps", "Committed steps that had to be redone."),
    _histogram("resize_duration_seconds", "How long changes of the number of workers held training up.", "direction"),
    _gauge("worst_node_failures", "incidents", "Failures of workers on the node that had most of them."),
    _gauge("incidents_open", "incidents", "Incidents from which the run has not yet recovered."),
    _counter("controller_restarts", "restarts", "Times that the controller was started again."),
    # What is learnt.
    _gauge("loss", "nats", "Loss per token of the newest committed step; NaN when it was not finite."),
    _gauge("grad_norm", "", "Gradient norm of the newest committed step before clipping; NaN when it was not finite."),
    _gauge("learning_rate", "", "Learning rate of the newest committed step."),
    _counter("rounds", "rounds", "Rounds of steps committed together; of synchronous training each step is one."),
    _counter("wire_bytes", "bytes", "Sent by ranks to each other in committed steps, by what it was.", "kind"),
    _counter("nonfinite", "steps", "Steps whose update was skipped because the gradient was not finite."),
    # What evaluations gave.
    _gauge("evaluation_metric", "", "What the newest evaluation gave, the first six metrics; NaN if not finite.",
           "metric"),
    _gauge("evaluation_step", "steps", "Steps that the weights of the newest evaluation had seen."),
    _gauge("evaluation_best_step", "steps", "Steps that the best weights so far had seen."),
    # Data, and who does how much work.
    _gauge("data_skew_ratio", "", "Largest by mean predicted cost of what ranks were dealt."),
    _gauge("token_skew_ratio", "", "Largest by mean tokens of what ranks were dealt."),
    _gauge("padding_ratio", "", "Share of computed positions without a target that counts."),
    _counter("rebalances", "changes", "Changes of who does how much work."),
    _counter("evictions", "workers", "Workers found too slow to stay."),
    _gauge("skew_findings", "findings", "Causes of skew that are present, by finding.", "finding"),
    # Checkpoints.
    _gauge("checkpoint_step", "steps", "Steps in the newest complete checkpoint."),
    _counter("checkpoints", "checkpoints", "Checkpoints completed."),
    _gauge(
        "checkpoint_last_success_timestamp_seconds", "seconds",
        "When the newest checkpoint was complete, in seconds since the epoch; 0 before the first.",
    ),
    _gauge(
        "checkpoint_expected_interval_seconds", "seconds",
        "Time between planned checkpoints at the present speed; 0 when none is planned but the last.",
    ),
    _histogram(
        "checkpoint_duration_seconds", "Duration of checkpoints: blocked (training held up) and write.", "phase"
    ),
    _gauge("checkpoint_bytes", "bytes", "Size of the newest checkpoint."),
    _counter("checkpoint_failures", "checkpoints", "Checkpoints that could not be made."),
    _counter("checkpoint_verify_failures", "checkpoints", "Checkpoints set aside because they are not what was saved."),
    _counter("checkpoints_delayed", "checkpoints", "Checkpoints that had to wait for the one before."),
)  # fmt: skip

RANK_SERIES: tuple[Series, ...] = (
    _gauge("rank_info", "", "Always 1; which worker on which node has the rank.", "rank", "worker", "node"),
    _gauge("rank_heartbeat_timestamp_seconds", "seconds", "When the rank was last heard, in seconds since the epoch.",
           "rank"),
    _gauge("rank_relative_speed_ratio", "", "Speed of the rank as a share of the fastest's.", "rank"),
    _gauge("rank_own_speed_ratio", "", "Speed of the rank as a share of what it was itself at its best.", "rank"),
    _gauge("rank_wait_ratio", "", "Share of a step that the rank waits for others.", "rank"),
    _gauge("rank_step_seconds", "seconds", "The rank's own work in the newest step, without waiting.", "rank"),
    _gauge("rank_data_seconds", "seconds", "Time in which the rank read data in the newest step.", "rank"),
    _gauge("rank_virtual_workers", "virtual workers", "Virtual workers that the rank computes.", "rank"),
    _gauge("shard_tokens", "tokens", "Targets that the rank was dealt in the newest step.", "rank"),
    _gauge("rank_host_memory_bytes", "bytes", "Resident memory of the rank's process.", "rank"),
    _gauge("rank_device_memory_bytes", "bytes", "Memory that the rank has allocated on its device.", "rank"),
    # What the driver says of its GPU; absent where none is watched.
    _gauge("rank_gpu_utilization_ratio", "", "Share of the time in which something ran on the rank's GPU.", "rank"),
    _gauge("rank_gpu_clock_hertz", "hertz", "Clock of the processors of the rank's GPU.", "rank"),
    _gauge("rank_gpu_temperature_celsius", "celsius", "Temperature of the rank's GPU.", "rank"),
    _gauge("rank_gpu_power_watts", "watts", "What the rank's GPU takes.", "rank"),
    _gauge("rank_gpu_free_memory_bytes", "bytes", "Memory of the rank's GPU that nobody has.", "rank"),
    _gauge("rank_gpu_corrected_errors", "errors", "Memory errors of the rank's GPU that were corrected.", "rank"),
    _gauge("rank_gpu_uncorrected_errors", "errors", "Memory errors of the rank's GPU that were not corrected.", "rank"),
    _gauge("rank_gpu_slowed_down", "", "1 while heat, power supply or hardware keeps its clock down, else 0.", "rank"),
)  # fmt: skip

SERIES: tuple[Series, ...] = RUN_SERIES + RANK_SERIES


def exposed_names() -> Iterator[str]:
    """Every name that Prometheus stores for a run, histograms and summaries by their parts."""
    for series in SERIES:
        yield from series.exposed
