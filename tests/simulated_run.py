"""A run that is only written: its records as docs/run-directory.md has them, with a clock of its own.

For tests of what reads a run directory. Nothing is trained; the numbers are made from a seed.
"""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

from monitoring.records import RecordFile


class SimulatedRun:
    """Writes events.jsonl, metrics.jsonl and status.json of `workers` workers on nodes of `per_node`.

    `now` is the run's clock in seconds since the epoch; every step and every recovery moves it.
    """

    def __init__(
        self, path: Path, *, workers: int = 4, per_node: int = 2, steps: int = 400, now: float = 1.7e9,
        step_seconds: float = 0.5, layout: dict[str, Any] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.now, self.steps, self.step_seconds = path, now, steps, step_seconds
        self.events = RecordFile(path / "events.jsonl")
        self.metrics = RecordFile(path / "metrics.jsonl")
        self.random = random.Random(seed)
        self.layout = layout or {"data": workers, "tensor": 1, "pipeline": 1, "shard": "none"}
        self.per_node = per_node
        self.members = [(worker, 0) for worker in range(workers)]
        self.speeds = {worker: 1.0 - 0.04 * self.random.random() for worker in range(workers)}
        self.findings: list[dict[str, Any]] = []
        self.step = 0
        self.generation = -1
        self.began = now
        self.stretch: dict[str, Any] | None = None
        self.productive = 0.0
        self.bad: dict[str, float] = {}
        self.incidents = 0
        self.open: list[dict[str, Any]] = []
        self.recovery: dict[str, Any] | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.state = "forming"
        self.write_json("job.resolved.json", {"name": path.name, "train": {"steps": steps}})

    # ------------------------------------------------------------------------------------------------------ records

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"time": self.now, "kind": kind, **fields})

    def write_json(self, name: str, content: Any) -> None:
        draft = self.path / f".{name}"
        draft.write_text(json.dumps(content))
        os.replace(draft, self.path / name)

    def node(self, worker: int) -> str:
        return f"{worker // self.per_node:02d}ab34cd56ef"

    def named(self, worker: tuple[int, int]) -> dict[str, Any]:
        slot, incarnation = worker
        return {
            "worker": slot,
            "incarnation": incarnation,
            "node": self.node(slot),
            "pid": 1000 + 100 * incarnation + slot,
        }

    # -------------------------------------------------------------------------------------------------------- story

    def start(self) -> None:
        """Starts all workers and the first generation."""
        self.event("controller", epoch=1, pid=1, session="a", node=self.node(0))
        self.event("run_started", run=self.path.name, job="sha256:1234", min_workers=1, steps=self.steps)
        for slot, incarnation in self.members:
            self.event("worker_requested", worker=slot, incarnation=incarnation)
        for member in self.members:
            self.event("worker_placed", **{k: self.named(member)[k] for k in ("worker", "incarnation", "node")})
        self.now += 6.0
        self._spend("initialisation", 6.0)
        for member in self.members:
            self.event("worker_ready", **self.named(member), start_seconds=6.0)
        self.form("start")

    def form(self, cause: str, seconds: float = 0.4) -> None:
        """A new generation of the present members."""
        self.generation += 1
        self.event(
            "generation", generation=self.generation, start_step=self.step, cause=cause,
            workers=[self.named(member) for member in self.members], layout=self.layout, dealt=[], restore=None,
            source="peers", steps_lost=0,
        )  # fmt: skip
        self.now += seconds
        self.event("generation_running", generation=self.generation)
        self.state = "running"

    def train(self, steps: int) -> None:
        """Commits steps, and sums them up."""
        for _ in range(steps):
            seconds = (
                self.step_seconds * (0.9 + 0.25 * self.random.random()) * max(0.3, 4 / (3 + len(self.members) / 4))
            )
            began, self.now = self.now, self.now + seconds
            ranks = []
            for slot, _incarnation in self.members:
                busy = 0.8 * seconds / max(self.speeds[slot], 0.05) * min(self.speeds.values())
                busy *= 0.98 + 0.04 * self.random.random()
                ranks.append([[round(busy, 6)], 0.01, round(max(0.0, 0.9 * seconds - busy), 6), 0.002, 1.0, 2048, 0])
            loss = 2.1 + 3.8 * math.exp(-self.step / 60) + 0.08 * self.random.random()
            self.metrics.append(
                {
                    "step": self.step, "generation": self.generation, "loss": loss, "grad_norm": 0.8, "lr": 1e-3,
                    "tokens": 8192, "padding": 0, "skipped": False, "committed_at": self.now, "seconds": seconds,
                    "phase_seconds": {"compute": 0.8 * seconds}, "samples": "00", "deal": 0, "ranks": ranks,
                }
            )  # fmt: skip
            parts = {"productive": 0.94 * seconds, "data_loading": 0.01 * seconds, "straggler_wait": 0.05 * seconds,
                     "checkpoint_save": 0.0, "other": 0.0}  # fmt: skip
            if self.stretch is None:
                self.stretch = {
                    "first": self.step,
                    "generation": self.generation,
                    "began": began,
                    "seconds": {},
                    "tokens": 0,
                }
            stretch = self.stretch
            stretch |= {"last": self.step, "ended": self.now, "tokens": stretch["tokens"] + 8192}
            stretch["seconds"] = {key: stretch["seconds"].get(key, 0.0) + value for key, value in parts.items()}
            self.productive += parts["productive"]
            for reason in ("data_loading", "straggler_wait"):
                self._spend(reason, parts[reason])
            self.step += 1
            if self.now - stretch["began"] > 10.0:
                self.sum_up()
        self.last_ranks = ranks
        self.last_seconds, self.last_loss = seconds, loss

    def sum_up(self) -> None:
        if self.stretch is not None:
            self.event("steps", **self.stretch)
            self.stretch = None

    def save(self, *, error: str | None = None) -> None:
        """A checkpoint, or a failed one."""
        if error is not None:
            self.event("checkpoint_failed", committed=self.step, error=error)
            return
        self.checkpoint = {"committed": self.step, "time": self.now, "saving": False}
        self.event("checkpoint_saved", committed=self.step, bytes=10_600_000, seconds=0.21, blocked_seconds=0.008)

    def lose(self, slot: int, kind: str = "kill", cause: str = "", detect: float = 0.15) -> dict[str, Any]:
        """A worker is lost; the others settle. Returns what `recover` needs."""
        self.sum_up()
        member = next(member for member in self.members if member[0] == slot)
        at = self.now
        self.now += detect
        self._spend("detection", detect)
        self.members.remove(member)
        self.incidents += 1
        incident = {"incident": kind, "worker": slot, "incarnation": member[1], "cause": cause or f"worker {slot} died",
                    "step": self.step, "at": at, "detect_seconds": detect}  # fmt: skip
        self.event("worker_died", worker=slot, incarnation=member[1], node=self.node(slot), reason=kind)
        self.event("incident", **incident)
        self.open = [{key: incident[key] for key in ("incident", "worker", "cause", "at")}]
        self.state = "settling"
        return incident

    def recover(self, incident: dict[str, Any], seconds: float = 0.9, *, replace: bool = True) -> None:
        """The generation after an incident, with a new incarnation in the place of the one that was lost."""
        if replace:
            self.members = sorted([*self.members, (incident["worker"], incident["incarnation"] + 1)])
            self.event(
                "worker_ready", **self.named((incident["worker"], incident["incarnation"] + 1)), start_seconds=5.0
            )
        self.form(incident["cause"], seconds)
        self._spend("recovery", seconds)
        self.open = []
        self.recovery = {
            **incident, "generation": self.generation, "stall_seconds": seconds + incident["detect_seconds"],
            "pause_seconds": seconds, "steps_lost": 0, "source": "peers", "bytes_moved": 10_600_000,
        }  # fmt: skip
        del self.recovery["incarnation"]
        self.event("recovery", **self.recovery)

    def roll_back(self, to: int) -> None:
        """The steps from `to` on are to be done again."""
        self.sum_up()
        lost = self.step - to
        self.metrics.keep(lambda record: int(record["step"]) < to)
        spent = {"productive": lost * self.step_seconds}
        again = [self.step_seconds] * lost
        spent = {"productive": lost * self.step_seconds}
        again = [self.step_seconds] * lost
        self.event("rollback", committed=to, steps=lost, tokens=8192 * lost, seconds=spent, step_seconds=again)
        self.step = to

    def finish(self, status: str = "finished", reason: str = "all steps committed") -> None:
        self.sum_up()
        self.now += 0.3
        self.state = "over"
        self.event("run_finished", status=status, reason=reason)
        self.status(over=True, status=status)

    def status(self, **fields: Any) -> None:
        """Writes status.json as of now."""
        wall = self.now - self.began
        members = []
        for rank, (slot, incarnation) in enumerate(self.members):
            inside = rank % (self.layout["pipeline"] * self.layout["tensor"])
            members.append(
                {
                    **self.named((slot, incarnation)), "state": "member", "rank": rank,
                    "coordinates": {"data": rank // (self.layout["pipeline"] * self.layout["tensor"]),
                                    "pipeline": inside // self.layout["tensor"],
                                    "tensor": inside % self.layout["tensor"]},
                    "phase": "compute", "heartbeat": self.now - 0.1,
                    "speed": self.speeds[slot] * (0.99 + 0.01 * self.random.random()), "own_speed": 0.99,
                    "wait_share": 0.05 + 0.03 * self.random.random(),
                    "step_seconds": sum(self.last_ranks[0][0]) if self.step else None, "virtual_workers": 2,
                    "host_bytes": 812_000_000 + self.random.randrange(9_000_000), "device_bytes": 0, "leaving": False,
                    "gpu": {
                        "utilization": 0.9 + 0.1 * self.random.random(), "sm_hertz": 1.41e9 - 1e6 * slot,
                        "celsius": 61 + slot, "watts": 312.5, "free_bytes": 3 << 30, "corrected": slot // 4,
                        "uncorrected": 0, "slowed_by": ["heat (hardware)"] if self.speeds[slot] < 0.8 else [],
                        "at_power_limit": True,
                    },
                    "finding": next((f["finding"] for f in self.findings if slot in f["workers"]), None),
                }
            )  # fmt: skip
        seconds = self.last_seconds if self.step else None
        other = max(0.0, wall - self.productive - sum(self.bad.values()))
        self.write_json(
            "status.json",
            {
                "time": self.now, "run": self.path.name, "name": "quickstart", "over": False, "state": self.state,
                "detail": "training", "status": None, "epoch": 1, "controller": {"pid": 1, "node": self.node(0)},
                "step": self.step, "steps": self.steps, "median_step_seconds": self.step_seconds,
                "tokens": 8192 * self.step, "tokens_per_second": 8192 / seconds if seconds else 0.0,
                "loss": self.last_loss if self.step else None, "grad_norm": 0.8, "lr": 1e-3, "mfu": 0.412,
                "generation": self.generation, "layout": self.layout, "target": len(self.speeds), "min": 1,
                "max": len(self.speeds), "workers": members,
                "incidents": {"total": self.incidents, "open": self.open}, "last_recovery": self.recovery,
                "checkpoint": self.checkpoint,
                "goodput": {"wall_seconds": wall, "productive_seconds": self.productive,
                            "badput_seconds": {**self.bad, "other": other}},
                "findings": self.findings, "metrics_url": "http://127.0.0.1:1/metrics", **fields,
            },
        )  # fmt: skip

    def _spend(self, reason: str, seconds: float) -> None:
        self.bad[reason] = self.bad.get(reason, 0.0) + seconds
