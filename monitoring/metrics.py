"""The Prometheus metrics of one run, in a registry of their own, served by one small HTTP endpoint.

`prometheus_client` rather than `ray.util.metrics`: the latter's histogram sums are wrong and gauges that are not set
again disappear.
"""

from __future__ import annotations

import math
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from monitoring.skew import Window

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class RunMetrics:
    """Counters and gauges of one run; every series carries the label `run`."""

    def __init__(self, run: str) -> None:
        self.registry = CollectorRegistry()
        self._run = run
        self._server: Any = None
        self.step = self._gauge("step", "Steps committed so far.")
        self.loss = self._gauge("loss", "Loss of the last committed step in nats per token.")
        self.grad_norm = self._gauge("grad_norm", "Gradient norm of the last committed step, before clipping.")
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the last committed step.")
        self.generation = self._gauge("generation", "Number of the current generation.")
        self.goodput = self._gauge("goodput_ratio", "Share of the wall time spent in steps that stayed committed.")
        self.tokens = self._counter("tokens", "Tokens in committed steps.")
        self.steps_lost = self._counter("steps_lost", "Committed steps that had to be replayed.")
        self.nonfinite = self._counter("nonfinite", "Steps whose update was skipped for a non-finite gradient.")
        self.data_skew = self._gauge("data_skew_ratio", "Largest by mean predicted cost that workers were dealt.")
        self.token_skew = self._gauge("token_skew_ratio", "Largest by mean tokens that workers were dealt.")
        self.padding = self._gauge("padding_ratio", "Share of computed positions without a target that counts.")
        labels = ["run", "rank"]
        self._speed = Gauge(
            "orchestrator_rank_relative_speed_ratio", "A worker's speed, as a share of the fastest's.", labels,
            registry=self.registry,
        )  # fmt: skip
        self._wait = Gauge(
            "orchestrator_rank_wait_ratio", "Share of a step that a worker waited for others.", labels,
            registry=self.registry,
        )  # fmt: skip
        self.rebalances = self._counter("rebalances", "Changes of who does how much work.")
        self.evictions = self._counter("evictions", "Workers found too slow to stay.")
        self.checkpoint_step = self._gauge("checkpoint_step", "Steps in the newest complete checkpoint.")
        self.checkpoint_time = self._gauge(
            "checkpoint_timestamp_seconds", "When the newest checkpoint was complete, in seconds since the epoch."
        )
        self.checkpoints_failed = self._counter("checkpoints_failed", "Checkpoints that could not be made.")
        self.checkpoints_delayed = self._counter(
            "checkpoints_delayed", "Checkpoints that had to wait for the one before."
        )
        self.checkpoints_invalid = self._counter("checkpoints_invalid", "Checkpoints set aside as not what was saved.")
        self._world = Gauge("orchestrator_world_size", "Workers by state.", ["run", "state"], registry=self.registry)
        self._failures = Counter("orchestrator_failures", "Incidents by kind.", ["run", "kind"], registry=self.registry)
        self._recovery = Histogram(
            "orchestrator_recovery_seconds",
            "From the event to the next committed step, less one median step.",
            ["run"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._save = Histogram(
            "orchestrator_checkpoint_seconds", "From a checkpoint's first to its last byte.", ["run"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._save_blocked = Histogram(
            "orchestrator_checkpoint_blocked_seconds", "How long a checkpoint held training up.", ["run"],
            buckets=(0.001, 0.0025, *_SECONDS), registry=self.registry,
        )  # fmt: skip
        self._step_seconds = Histogram(
            "orchestrator_step_duration_seconds", "Duration of committed steps.", ["run"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"orchestrator_{name}", text, ["run"], registry=self.registry).labels(self._run)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"orchestrator_{name}", text, ["run"], registry=self.registry).labels(self._run)

    def serve(self, host: str, port: int) -> int:
        """Starts the endpoint on `host`; port 0 picks a free one. Returns the port. Raises OSError when it is taken."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        self._server = server
        return int(server.server_port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def on_step(self, record: dict[str, Any]) -> None:
        """A step was committed; `record` is its line of metrics.jsonl."""
        self.step.set(record["step"] + 1)
        self.loss.set(_number(record["loss"]))
        self.grad_norm.set(_number(record["grad_norm"]))
        self.learning_rate.set(record["lr"])
        self.generation.set(record["generation"])
        self.tokens.inc(record["tokens"])
        self._step_seconds.labels(self._run).observe(record["seconds"])
        if record["skipped"]:
            self.nonfinite.inc()

    def on_world(self, counts: dict[str, int]) -> None:
        for state, count in counts.items():
            self._world.labels(self._run, state).set(count)

    def on_window(self, window: Window) -> None:
        """What a window of steps says of data and of ranks."""
        self.data_skew.set(window.data_skew)
        self.token_skew.set(window.token_skew)
        self.padding.set(window.padding_share)
        self._speed.clear()
        self._wait.clear()
        for worker, rating in window.workers.items():
            slot = str(getattr(worker, "slot", worker))
            self._speed.labels(self._run, slot).set(rating.speed)
            self._wait.labels(self._run, slot).set(rating.wait_share)

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """Something was recorded in the event log."""
        if kind == "incident":
            self._failures.labels(self._run, fields["incident"]).inc()
        elif kind == "recovery":
            self._recovery.labels(self._run).observe(fields["stall_seconds"])
            self.steps_lost.inc(fields["steps_lost"])
        elif kind == "rebalance":
            self.rebalances.inc()
        elif kind == "eviction":
            self.evictions.inc()
        elif kind == "checkpoint_saved":
            self.checkpoint_step.set(fields["committed"])
            self.checkpoint_time.set(fields.get("time", time.time()))
            self._save.labels(self._run).observe(fields["seconds"])
            if "blocked_seconds" in fields:
                self._save_blocked.labels(self._run).observe(fields["blocked_seconds"])
        elif kind == "checkpoint_failed":
            self.checkpoints_failed.inc()
        elif kind == "checkpoint_delayed":
            self.checkpoints_delayed.inc()
        elif kind == "checkpoint_invalid":
            self.checkpoints_invalid.inc()


def _number(value: float | None) -> float:
    """What is not finite is null on record, and NaN here."""
    return math.nan if value is None else value
