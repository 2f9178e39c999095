"""Run directories as they look while a run goes and when it has ended, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

T0 = 1_800_000_000.0

GENERATION = {
    "time": T0 + 10, "kind": "generation", "generation": 3, "start_step": 0, "cause": "start",
    "workers": [{"worker": 0, "incarnation": 0, "node": "ab12cd34ef", "pid": 11},
                {"worker": 1, "incarnation": 2, "node": "ab12cd34ef", "pid": 12}],
    "layout": {"data": 2, "tensor": 1, "pipeline": 1, "shard": "none"},
}  # fmt: skip
INCIDENT = {"time": T0 + 20, "kind": "incident", "incident": "kill", "worker": 1, "incarnation": 1, "step": 4,
            "cause": "worker 1 died: its process ended", "at": T0 + 20, "detect_seconds": 0.05}  # fmt: skip
RECOVERY = {
    "time": T0 + 21, "kind": "recovery", "generation": 3, "cause": "worker 1 died", "incident": "kill", "worker": 1,
    "step": 4, "at": T0 + 20, "detect_seconds": 0.05, "stall_seconds": 0.4, "pause_seconds": 0.4, "steps_lost": 0,
    "source": "peers", "bytes_moved": 10_600_000,
}  # fmt: skip
CHECKPOINT = {"time": T0 + 22, "kind": "checkpoint_saved", "committed": 5, "bytes": 10_600_000, "seconds": 0.2}
STARTED = {"time": T0, "kind": "run_started", "run": "tiny-1234", "job": "sha256:0"}
STEPS = {
    "time": T0 + 20, "kind": "steps", "first": 0, "last": 4, "generation": 3, "began": T0 + 12.5, "ended": T0 + 15,
    "seconds": {"productive": 2.0, "data_loading": 0.3, "straggler_wait": 0.2, "checkpoint_save": 0.0, "other": 0.0},
    "tokens": 5000,
}  # fmt: skip
CONTROLLER = {"time": T0, "kind": "controller", "epoch": 1, "pid": 9, "session": "s", "node": "ab12cd34ef"}
JOB = {"name": "tiny", "train": {"steps": 20, "log_every": 1}, "elastic": {"workers": {"min": 1, "max": 2}}}


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "step": number, "generation": 3, "loss": 4.0 - number / 10, "grad_norm": 1.5, "lr": 1e-3, "tokens": 1000,
        "padding": 0, "skipped": False, "committed_at": T0 + 11 + number, "seconds": 0.5, "phase_seconds": {},
        "samples": "0", "deal": 0, "ranks": [],
    } | changes  # fmt: skip


def worker(slot: int, **changes: Any) -> dict[str, Any]:
    """A worker in status.json."""
    return {
        "worker": slot, "incarnation": 0, "node": "ab12cd34ef", "pid": 11 + slot, "state": "member", "rank": slot,
        "coordinates": {"data": slot, "pipeline": 0, "tensor": 0}, "phase": "compute", "heartbeat": T0 + 30,
        "speed": 1.0, "own_speed": 1.0, "wait_share": 0.0, "step_seconds": 0.4, "virtual_workers": 4,
        "host_bytes": 1_200_000_000, "device_bytes": 0, "leaving": False, "finding": None,
    } | changes  # fmt: skip


def status(**changes: Any) -> dict[str, Any]:
    """status.json of a run that trains."""
    return {
        "time": T0 + 30, "run": "tiny-1234", "name": "tiny", "over": False, "state": "running", "detail": "training",
        "status": None, "epoch": 1, "controller": {"pid": 9, "node": "ab12cd34ef"}, "step": 5, "steps": 20,
        "median_step_seconds": 0.5, "tokens": 5000, "tokens_per_second": 2000.0, "loss": 3.6, "grad_norm": 1.5,
        "lr": 1e-3, "mfu": 0.31, "generation": 3, "layout": GENERATION["layout"], "target": 2, "min": 1, "max": 2,
        "workers": [worker(0), worker(1, incarnation=2, speed=0.61, finding="slow device"),
                    worker(2, state="starting", rank=None, coordinates=None, speed=None, step_seconds=None,
                           node="99fe", host_bytes=0)],
        "incidents": {"total": 2, "open": [{"incident": "hang", "worker": 1, "cause": "worker 1 is silent",
                                            "at": T0 + 28}]},
        "last_recovery": RECOVERY, "checkpoint": {"committed": 5, "time": T0 + 18, "saving": True},
        "goodput": {"wall_seconds": 30.0, "productive_seconds": 24.0,
                    "badput_seconds": {"initialisation": 3.0, "recovery": 2.0, "detection": 0.6, "other": 0.4}},
        "findings": [{"finding": "slow device", "workers": [1], "detail": "computes at 0.61"}],
        "metrics_url": "http://127.0.0.1:1/metrics",
    } | changes  # fmt: skip


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def make_run(
    path: Path,
    *,
    events: list[dict[str, Any]] | None = None,
    steps: int = 5,
    live: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
) -> Path:
    """A run directory of a job of 20 steps after `steps` of them."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "job.resolved.json").write_text(json.dumps(JOB))
    write_lines(
        path / "events.jsonl",
        events if events is not None else [STARTED, CONTROLLER, GENERATION, INCIDENT, RECOVERY, CHECKPOINT],
    )
    write_lines(path / "metrics.jsonl", [step(number) for number in range(steps)])
    if live is not None:
        (path / "status.json").write_text(json.dumps(live))
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    return path


RESULT = {
    "run": "tiny-1234", "status": "finished", "reason": "", "steps": 20, "tokens": 20_000, "final_loss": 2.1,
    "wall_seconds": 31.0, "goodput_ratio": 0.8, "state_digest": "sha256:aa", "data_digest": "sha256:bb",
    "bit_exact": True, "generations": [],
    "recoveries": [RECOVERY | {"kind": "kill"}],
}  # fmt: skip
