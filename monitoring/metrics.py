"""The Prometheus metrics of one run: what its steps, events and workers come to, in a registry of their own.

`prometheus_client` rather than `ray.util.metrics`: the latter's histogram sums are wrong and gauges that are not set
again disappear. All families are those of `monitoring.series`. Counters go on where a restarted controller's
predecessor left them, because they are made of what is on record.
"""

from __future__ import annotations

import math
from collections import Counter as Count
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics
from prometheus_client.exposition import generate_latest

from monitoring.clock import when
from monitoring.evaluations import SHOWN
from monitoring.events import (
    CheckpointComplete,
    CheckpointDelayed,
    CheckpointFailed,
    CheckpointInvalid,
    ControllerBegan,
    ControllerRestarted,
    Evaluated,
    Evicted,
    GenerationFormed,
    GenerationRunning,
    IncidentOpened,
    Rebalanced,
    Recovered,
    RolledBack,
    RunFinished,
    RunStarted,
    SkewFound,
    SkewOver,
    WorkerPlaced,
    WorkerReady,
)
from monitoring.exposition import MetricsServer, rank_lines
from monitoring.goodput import REASONS, VOLUNTARY, Ledger
from monitoring.series import RUN_SERIES
from monitoring.skew import Window
from monitoring.stretches import as_done

_BUCKETS = {
    "orchestrator_step_duration_seconds": (
        0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    ),
    "orchestrator_detection_seconds": (0.1, 1.0, 5.0, 15.0, 60.0),
    "orchestrator_recovery_seconds": (0.25, 1.0, 3.0, 10.0, 60.0, 300.0),
    "orchestrator_resize_duration_seconds": (0.1, 0.5, 1.0, 5.0, 30.0),
    "orchestrator_checkpoint_duration_seconds": (0.01, 0.1, 1.0, 10.0, 60.0),
}  # fmt: skip
"""Few, as a run is to have at most 200 series beside those of its ranks."""

STATES = ("waiting", "settling", "forming", "running", "finalizing", "over")
WORKER_STATES = ("member", "idle", "starting", "requested")
FINDINGS = ("slow device", "slow node", "slow input", "input starvation", "uneven data", "pipeline imbalance")
_DIRECTION = {"grow": "up", "shrink": "down", "drain": "down", "evict": "down"}
_FROM_ZERO = frozenset(
    f"orchestrator_{name}"
    for name in ("step", "incidents_open", "worst_node_failures", "checkpoint_step",
                 "checkpoint_last_success_timestamp_seconds")
)  # fmt: skip
"""Gauges of which 0 is true before anything was heard."""
_RECENT_STEPS = 20
"""Over how many steps the model's share of the peak is taken."""


class RunMetrics:
    """All series of one run; every one carries the label `run`. Fed with records as they are made, or, by a controller
    that takes over, with all there are. Scrapes read what is there and wait for nobody.

    More than 15 attributes: what series are counted from.
    """

    def __init__(self, run: str, name: str = "", version: str = "") -> None:
        # Nothing here uses when a counter was made, and it would double the number of series.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._run = run
        self._server: MetricsServer | None = None
        self._families = {series.name.removeprefix("orchestrator_"): self._make(series) for series in RUN_SERIES}
        self._booked: dict[str, float] = {}
        self._shown: dict[str, float] = {}
        self._ranks: list[tuple[int, Mapping[str, Any]]] = []
        self._speed: deque[tuple[float, float]] = deque(maxlen=_RECENT_STEPS)
        self._flops_per_token = self._peak_flops = 0.0
        self._peaks: dict[tuple[int, int], float] = {}
        self._nodes: dict[tuple[int, int], str] = {}
        self._failures_by_node: Count[str] = Count()
        self._detected: dict[tuple[Any, ...], float] = {}
        self._formed = self._running = 0.0
        self._one("run_info", name=name, version=version).set(1)
        for series in RUN_SERIES:
            # What has not happened yet is 0: a counter that appears only with its first incident has no increase.
            if not series.labels and (series.kind != "gauge" or series.name in _FROM_ZERO):
                self._one(series.name.removeprefix("orchestrator_"))
        for reason in REASONS:
            self._one("badput_seconds_total", reason=reason)
        for finding in FINDINGS:
            self._one("skew_findings", finding=finding)

    def _make(self, series: Any) -> Any:
        labels = ("run", *series.labels)
        match series.kind:
            case "counter":
                return Counter(series.name.removesuffix("_total"), series.help, labels, registry=self.registry)
            case "gauge":
                return Gauge(series.name, series.help, labels, registry=self.registry)
            case "summary":
                return Summary(series.name, series.help, labels, registry=self.registry)
        return Histogram(series.name, series.help, labels, registry=self.registry, buckets=_BUCKETS[series.name])

    def _one(self, family: str, /, **labels: str) -> Any:
        return self._families[family].labels(run=self._run, **labels)

    # ------------------------------------------------------------------------------------ the endpoint

    def serve(self, host: str, port: int) -> int:
        """Starts the endpoint on `host`; port 0 picks a free one. Returns the port. Raises OSError when it is taken."""
        self._server = MetricsServer(host, port, self.render)
        return self._server.port

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def render(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry) + ("\n".join(rank_lines(self._run, self._ranks)) + "\n").encode()

    # ------------------------------------------------------------------------------------ what happens

    def on_step(self, record: Mapping[str, Any]) -> None:
        """A step was committed; `record` is its line of metrics.jsonl."""
        self._one("step").set(record["step"] + 1)
        self._one("last_step_timestamp_seconds").set(record.get("time", record["committed_at"]))
        self._one("loss").set(_number(record["loss"]))
        self._one("grad_norm").set(_number(record["grad_norm"]))
        self._one("learning_rate").set(record["lr"])
        self._one("generation").set(record["generation"])
        self._count_work(record)
        self._speed.append((record["tokens"], record["seconds"] * self._peak_flops))
        if (mfu := self.mfu) is not None:
            self._one("mfu_ratio").set(mfu)

    def _count_work(self, record: Mapping[str, Any]) -> None:
        self._one("tokens_total").inc(record["tokens"])
        self._one("model_flops_total").inc(record["tokens"] * self._flops_per_token)
        self._one("step_duration_seconds").observe(record["seconds"])
        for phase, seconds in record.get("phase_seconds", {}).items():
            self._one("phase_duration_seconds", phase=phase).observe(seconds)
        if record.get("round_steps", 1):
            self._one("rounds_total").inc()
        for kind, num_bytes in record.get("wire_bytes", {}).items():
            self._one("wire_bytes_total", kind=kind).inc(num_bytes)
        if record["skipped"]:
            self._one("nonfinite_total").inc()

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s in recent steps as a share of what the ranks' devices could do (PaLM, arXiv:2204.02311,
        appendix B); None when either is not known."""
        known = [(tokens, could) for tokens, could in self._speed if could]
        if not (self._flops_per_token and known):
            return None
        return self._flops_per_token * sum(tokens for tokens, _ in known) / sum(could for _, could in known)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Something was recorded in the event log."""
        match event["kind"]:
            case RunStarted.kind:
                self._one("run_start_timestamp_seconds").set(event["time"])
            case WorkerPlaced.kind | WorkerReady.kind:
                self._nodes[event["worker"], event["incarnation"]] = event["node"]
                if event.get("flops_per_token"):
                    self._flops_per_token = float(event["flops_per_token"])
                    self._peaks[event["worker"], event["incarnation"]] = float(event["peak_flops"])
            case IncidentOpened.kind:
                self._on_incident(event)
            case GenerationFormed.kind:
                self._formed = self._running = when(event)
                self._one("generation").set(event["generation"])
                members = [(member["worker"], member["incarnation"]) for member in event["workers"]]
                peaks = [self._peaks.get(member, 0.0) for member in members]
                self._peak_flops = sum(peaks) if all(peaks) else 0.0
            case GenerationRunning.kind:
                self._running = when(event)
            case Recovered.kind:
                self._on_recovery(event)
            case ControllerBegan.kind | RunFinished.kind:
                # The next controller finds for itself what is skewed.
                for finding in FINDINGS:
                    self._one("skew_findings", finding=finding).set(0)
                if event["kind"] == RunFinished.kind:
                    self._one("incidents_open").set(0)
            case Rebalanced.kind:
                self._one("rebalances_total").inc()
            case Evicted.kind:
                self._one("evictions_total").inc()
            case SkewFound.kind:
                self._one("skew_findings", finding=event["finding"]).inc()
            case SkewOver.kind:
                self._one("skew_findings", finding=event["finding"]).dec()
            case ControllerRestarted.kind:
                self._one("controller_restarts_total").inc()
            case Evaluated.kind:
                self._on_evaluation(event)
            case CheckpointComplete.kind | CheckpointFailed.kind | CheckpointDelayed.kind | CheckpointInvalid.kind:
                self._on_checkpoint(event)

    def replay(self, events: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]]) -> None:
        """Takes what is on record of a run so far. Steps that were taken off it again count as well: they were done."""
        ledger = Ledger()
        rollbacks = []
        for event in events:
            if event["kind"] == RolledBack.kind:
                # What goodput was told to be before stays told.
                self.book(ledger.settled(when(event)))
                rollbacks.append(event)
            ledger.add(event)
            self.on_event(event)
        # In the order in which they were done, as sums depend on it in their last bits, and any less is a reset.
        for record in as_done(rollbacks, list(steps)):
            if "committed_at" in record:
                self.on_step(record)
            else:
                self._count_work(record)

    def _on_incident(self, event: Mapping[str, Any]) -> None:
        self._one("failures_total", kind=event["incident"]).inc()
        self._one("detection_seconds").observe(event["detect_seconds"])
        self._one("incidents_open").inc()
        self._detected[event["incident"], event["worker"], event["at"]] = when(event)
        if event["incident"] in VOLUNTARY or event["worker"] is None:
            return
        node = self._nodes.get((event["worker"], event["incarnation"]))
        if node:
            self._failures_by_node[node] += 1
            self._one("worst_node_failures").set(max(self._failures_by_node.values()))

    def _on_recovery(self, event: Mapping[str, Any]) -> None:
        self._one("incidents_open").dec()
        self._one("steps_lost_total").inc(event["steps_lost"])
        detected = self._detected.pop((event["incident"], event["worker"], event["at"]), None)
        if direction := _DIRECTION.get(event["incident"]):
            self._one("resize_duration_seconds", direction=direction).observe(event["pause_seconds"])
        stages = {"total": event["stall_seconds"], "form": self._running - self._formed}
        if detected is not None and event["incident"] not in VOLUNTARY:
            stages["settle"] = max(0.0, self._formed - detected)
        stages["redo"] = max(0.0, event["at"] + event["stall_seconds"] - self._running)
        for stage, seconds in stages.items():
            self._one("recovery_seconds", stage=stage).observe(seconds)

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case CheckpointComplete.kind:
                self._one("checkpoints_total").inc()
                self._one("checkpoint_step").set(event["committed"])
                self._one("checkpoint_last_success_timestamp_seconds").set(event["time"])
                self._one("checkpoint_bytes").set(event["bytes"])
                self._one("checkpoint_duration_seconds", phase="write").observe(event["seconds"])
                if "blocked_seconds" in event:
                    self._one("checkpoint_duration_seconds", phase="blocked").observe(event["blocked_seconds"])
            case CheckpointFailed.kind:
                self._one("checkpoint_failures_total").inc()
            case CheckpointDelayed.kind:
                self._one("checkpoints_delayed_total").inc()
            case CheckpointInvalid.kind:
                self._one("checkpoint_verify_failures_total").inc()

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        single = [(name, value) for name, value in event["metrics"].items() if not isinstance(value, dict | list)]
        for name, value in single[:SHOWN]:
            self._one("evaluation_metric", metric=name).set(_number(value))
        self._one("evaluation_step").set(event["step"])
        if event.get("best"):
            self._one("evaluation_best_step").set(event["step"])

    # ------------------------------------------------------------------------------------ how things are

    def on_status(self, status: Mapping[str, Any]) -> None:
        """status.json: its state, its workers, what is dealt to whom."""
        for state in STATES:
            self._one("run_state", state=state).set(float(state == status["state"]))
        self._one("step_target").set(status["steps"])
        self._one("step_expected_seconds").set(status["median_step_seconds"])
        self._one("world_target").set(status["target"])
        self._one("world_min").set(status["min"])
        self._one("checkpoint_expected_interval_seconds").set(status["checkpoint_interval_seconds"])
        # Prometheus compares what it is told with the wall clock.
        ahead_s = float(status["time"]) - when(status) if "clock" in status else 0.0
        counts = Count(worker["state"] for worker in status["workers"])
        for state in WORKER_STATES:
            self._one("world_size", state=state).set(counts[state])
        self._ranks = [
            (worker["rank"], _series_of(worker, ahead_s)) for worker in status["workers"] if worker["rank"] is not None
        ]

    def on_window(self, window: Window) -> None:
        """What a window of steps says of what ranks were dealt."""
        self._one("data_skew_ratio").set(window.data_skew)
        self._one("token_skew_ratio").set(window.token_skew)
        self._one("padding_ratio").set(window.padding_share)

    def book(self, settled: Mapping[str, float]) -> dict[str, float]:
        """What the counters of goodput come to when the wall time so far went into `settled`: seconds by "productive"
        and reason, as `Ledger.settled` gives them. `on_goodput` shows them; kept before that where a successor finds
        them, they never go back.

        When steps turn out to have been for nothing, goodput stands still until as much training has made up for them,
        while their time is already counted as wasted."""
        known = {key: seconds for key, seconds in settled.items() if key != "pending"}
        for key, seconds in (known | {"wall": sum(known.values())}).items():
            self._booked[key] = max(seconds, self._booked.get(key, 0.0))
        return dict(self._booked)

    def go_on_from(self, booked: Mapping[str, float]) -> None:
        """What a predecessor had booked at the least, and may have shown."""
        for key, seconds in booked.items():
            if key in ("productive", "wall", *REASONS):
                self._booked[key] = max(float(seconds), self._booked.get(key, 0.0))

    def on_goodput(self, settled: Mapping[str, float]) -> None:
        """Shows what the wall time went into so far."""
        booked = self.book(settled)
        self._raise("run_wall_seconds_total", booked["wall"])
        self._raise("goodput_seconds_total", booked["productive"])
        for reason in REASONS:
            self._raise("badput_seconds_total", booked.get(reason, 0.0), reason=reason)
        wall = sum(seconds for key, seconds in settled.items() if key != "pending")
        self._one("goodput_ratio").set(settled["productive"] / wall if wall > 0 else 0.0)

    def _raise(self, name: str, seconds: float, **labels: str) -> None:
        key = name + labels.get("reason", "")
        if (more := seconds - self._shown.get(key, 0.0)) > 0:
            self._shown[key] = seconds
            self._one(name, **labels).inc(more)


def _series_of(worker: Mapping[str, Any], ahead_s: float) -> dict[str, Any]:
    """The values of a rank's series, of its worker's entry in status.json. The wall clock is `ahead_s` of the run's."""
    return {
        "rank_info": {"worker": worker["worker"], "node": worker["node"]},
        "rank_heartbeat_timestamp_seconds": worker["heartbeat"] and worker["heartbeat"] + ahead_s,
        "rank_relative_speed_ratio": worker["speed"],
        "rank_own_speed_ratio": worker["own_speed"],
        "rank_wait_ratio": worker["wait_share"],
        "rank_step_seconds": worker["step_seconds"],
        "rank_data_seconds": worker["data_seconds"],
        "rank_virtual_workers": worker["virtual_workers"],
        "shard_tokens": worker["tokens"],
        "rank_host_memory_bytes": worker["host_bytes"] or None,  # A controller that took over has to hear of it first.
        "rank_device_memory_bytes": worker["device_bytes"],
    } | _series_of_gpu(worker.get("gpu"))


def _series_of_gpu(gpu: Mapping[str, Any] | None) -> dict[str, Any]:
    if gpu is None:
        return {}
    return {
        "rank_gpu_utilization_ratio": gpu["utilization"],
        "rank_gpu_clock_hertz": gpu["sm_hertz"],
        "rank_gpu_temperature_celsius": gpu["celsius"],
        "rank_gpu_power_watts": gpu["watts"],
        "rank_gpu_free_memory_bytes": gpu["free_bytes"],
        "rank_gpu_corrected_errors": gpu["corrected"],
        "rank_gpu_uncorrected_errors": gpu["uncorrected"],
        "rank_gpu_slowed_down": float(bool(gpu["slowed_by"])),
    }


def _number(value: float | None) -> float:
    """What is not finite is null on record, and NaN here."""
    return math.nan if value is None else value
