"""The Prometheus series of a run: what they come to, how many there are, and that counters never go back."""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.event_book import EventBook
from monitoring.goodput import REASONS
from monitoring.metrics import FINDINGS, RunMetrics
from monitoring.records import RecordFile, read_records
from monitoring.series import RANK_SERIES, RUN_SERIES, SERIES
from monitoring.skew import Window
from tests.unit.events_in_tests import event_of

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": number, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "generation": 2, "tokens": 512, "seconds": 0.4,
        "skipped": False, "committed_at": 1000.0 + number, "phase_seconds": {"compute": 0.3, "vote": 0.01},
        "ranks": [[[0.2, 0.1], 0.01, 0.05, 0.0, 1.0, 256, 0]] * 2,
    } | changes  # fmt: skip


def incident(at: float, kind: str = "kill", worker: int | None = 1, **changes: Any) -> dict[str, Any]:
    return {"time": at + 0.5, "kind": "incident", "incident": kind, "worker": worker, "incarnation": 0, "step": 3,
            "at": at, "detect_seconds": 0.5, "cause": "a test"} | changes  # fmt: skip


def recovery(at: float, kind: str = "kill", worker: int | None = 1, **changes: Any) -> dict[str, Any]:
    return {"time": at + 3.0, "kind": "recovery", "incident": kind, "worker": worker, "step": 3, "at": at,
            "detect_seconds": 0.5, "stall_seconds": 2.5, "pause_seconds": 2.0, "steps_lost": 0} | changes  # fmt: skip


def worker(rank: int | None, state: str = "member", **changes: Any) -> dict[str, Any]:
    return {
        "worker": 10 + (rank or 0), "node": f"node-{(rank or 0) // 8}", "state": state, "rank": rank,
        "heartbeat": 1000.0, "speed": 0.9, "own_speed": 1.0, "wait_share": 0.1, "step_seconds": 0.31,
        "data_seconds": 0.01,
        "virtual_workers": 2, "tokens": 256, "host_bytes": 10**9, "device_bytes": 0,
        "gpu": {
            "utilization": 0.9, "sm_hertz": 1.41e9, "celsius": 60, "watts": 300.0, "free_bytes": 10**9, "corrected": 1,
            "uncorrected": 0, "slowed_by": ["heat (hardware)"], "at_power_limit": False,
        },
    } | changes  # fmt: skip


def status(workers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "state": "running", "steps": 100, "median_step_seconds": 0.4, "target": 4, "min": 1,
        "checkpoint_interval_seconds": 20.0, "workers": workers,
    } | changes  # fmt: skip


def samples(metrics: RunMetrics) -> Samples:
    return {
        (
            s.name.removeprefix("orchestrator_"),
            tuple(sorted((k, v) for k, v in s.labels.items() if k != "run")),
        ): s.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for s in family.samples
    }


def test_the_endpoint_serves_what_happened() -> None:
    metrics = RunMetrics("test-run", "test", "1.0")
    port = metrics.serve("127.0.0.1", 0)
    try:
        metrics.on_event({"time": 1.0, "kind": "generation", "generation": 2, "workers": []})
        metrics.on_step(step(4, skipped=True))
        metrics.on_event(incident(10.0))
        metrics.on_event({"time": 11.0, "kind": "generation", "generation": 3, "workers": []})
        metrics.on_event({"time": 11.7, "kind": "generation_running", "generation": 3})
        metrics.on_event(recovery(10.0, steps_lost=3))
        metrics.on_event(incident(20.0, "grow", None))
        metrics.on_event(recovery(20.0, "grow", None))
        metrics.on_window(Window(4, 0.4, 0.01, {}, 1.2, 1.1, 0.05))
        metrics.on_status(status([worker(0), worker(1, speed=None), worker(None, "idle")]))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert answer.read() == metrics.render()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/secret", timeout=5)
    finally:
        metrics.close()
    seen = samples(metrics)
    assert seen["run_info", (("name", "test"), ("version", "1.0"))] == 1
    assert seen["step", ()] == 5
    assert seen["loss", ()] == 2.5
    assert seen["tokens_total", ()] == 512
    assert seen["nonfinite_total", ()] == 1
    assert seen["phase_duration_seconds_sum", (("phase", "compute"),)] == 0.3
    assert (seen["world_size", (("state", "member"),)], seen["world_size", (("state", "idle"),)]) == (2, 1)
    assert (seen["run_state", (("state", "running"),)], seen["run_state", (("state", "forming"),)]) == (1, 0)
    assert seen["failures_total", (("kind", "kill"),)] == 1
    assert seen["steps_lost_total", ()] == 3
    assert seen["incidents_open", ()] == 0
    stages = {stage: seen["recovery_seconds_sum", (("stage", stage),)] for stage in ("settle", "form", "redo", "total")}
    assert stages == pytest.approx({"settle": 0.5, "form": 1.4, "redo": 0.8 + 10.8, "total": 5.0})
    assert seen["resize_duration_seconds_sum", (("direction", "up"),)] == 2.0
    assert seen["data_skew_ratio", ()] == 1.2
    assert seen["rank_relative_speed_ratio", (("rank", "0"),)] == 0.9
    assert ("rank_relative_speed_ratio", (("rank", "1"),)) not in seen, "it was not rated yet"
    assert seen["rank_info", (("node", "node-0"), ("rank", "1"), ("worker", "11"))] == 1
    assert seen["shard_tokens", (("rank", "1"),)] == 256


def test_what_is_not_finite_is_null_on_record_and_nan_here(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "metrics.jsonl")
    file.append(step(4, loss=math.nan, grad_norm=math.inf, skipped=True))
    metrics = RunMetrics("test-run")
    metrics.replay([], read_records(tmp_path / "metrics.jsonl"))
    assert math.isnan(samples(metrics)["loss", ()])


def test_the_model_uses_a_share_of_what_its_devices_could_do() -> None:
    metrics = RunMetrics("test-run")
    metrics.on_step(step(0))
    assert metrics.mfu is None
    assert ("mfu_ratio", ()) not in samples(metrics), "absent, and not 0"
    members = [{"worker": slot, "incarnation": 0} for slot in (0, 1)]
    generation = {"time": 2.0, "kind": "generation", "generation": 0, "workers": members}
    for member, peak in zip(members, (4e9, 6e9), strict=True):
        ready = {"time": 1.0, "kind": "worker_ready", "node": "n", "flops_per_token": 1e6, "peak_flops": peak}
        metrics.on_event(ready | member)
    # A standby may be of another kind.
    metrics.on_event(ready | {"worker": 2, "incarnation": 0, "peak_flops": 1e9})
    metrics.on_event(generation)
    metrics.on_step(step(1))
    # 512 tokens of a million operations in 0.4 s, by two ranks that could do 4e9 and 6e9 a second.
    assert metrics.mfu == pytest.approx(512 * 1e6 / (0.4 * 10e9))
    assert samples(metrics)["mfu_ratio", ()] == pytest.approx(metrics.mfu)
    assert samples(metrics)["model_flops_total", ()] == 512 * 1e6


def test_the_node_that_had_most_failures_is_counted() -> None:
    metrics = RunMetrics("test-run")
    for slot, node in ((0, "a"), (1, "b"), (2, "b")):
        metrics.on_event({"time": 1.0, "kind": "worker_placed", "worker": slot, "incarnation": 0, "node": node})
    for at, slot, kind in ((1.0, 0, "kill"), (2.0, 1, "hang"), (3.0, 2, "crash"), (4.0, 0, "drain"), (5.0, 0, "grow")):
        metrics.on_event(incident(at, kind, slot))
    assert samples(metrics)["worst_node_failures", ()] == 2


def test_findings_are_open_until_they_are_over_or_somebody_else_looks() -> None:
    metrics = RunMetrics("test-run")
    slow = {"time": 1.0, "finding": "slow device", "workers": [1]}
    key = ("skew_findings", (("finding", "slow device"),))
    metrics.on_event(slow | {"kind": "skew_found"})
    assert samples(metrics)[key] == 1
    metrics.on_event(slow | {"kind": "skew_over"})
    assert samples(metrics)[key] == 0
    metrics.on_event(slow | {"kind": "skew_found"})
    metrics.on_event({"time": 2.0, "kind": "controller", "session": "s"})
    assert samples(metrics)[key] == 0


# ---------------------------------------------------------------------------------------- counters never go back


STORY = [
    {"time": 1000.0, "kind": "controller", "session": "a"},
    {"time": 1000.0, "kind": "run_started", "run": "r", "steps": 50, "min_workers": 1},
    {"time": 1000.1, "kind": "worker_placed", "worker": 1, "incarnation": 0, "node": "n"},
    {"time": 1000.2, "kind": "generation", "generation": 2, "workers": []},
]


def counters(seen: Samples) -> Samples:
    names = [s for s in SERIES if s.kind != "gauge"]
    exposed = {name.removeprefix("orchestrator_") for s in names for name in s.exposed}
    return {key: value for key, value in seen.items() if key[0] in exposed}


def test_a_controller_that_takes_over_goes_on_with_the_counters() -> None:
    """Also with those of steps that a rollback took off the record, and of what the wall time went into."""
    metrics, book = RunMetrics("r"), EventBook()
    written: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []

    def write(events: list[dict[str, Any]]) -> None:
        for event in json.loads(json.dumps(events)):
            written.append(event)
            metrics.on_event(event)

    def train(first: int, last: int, at: float) -> None:
        for number in range(first, last):
            record = step(number, committed_at=at + 0.5 * (number - first + 1), skipped=number == 9,
                          seconds=0.1 + number / 7)  # fmt: skip
            steps.append(record)
            write(book.step(record, record["committed_at"]))
            metrics.on_step(record)

    for event in STORY:
        write(book.record(event_of(event), event["time"]))
    train(0, 12, 1001.0)
    metrics.on_goodput(book.settled(1007.2))
    write(book.record(event_of(incident(1007.3)), 1007.8))
    metrics.on_goodput(book.settled(1008.0))
    before = counters(samples(metrics))
    write(book.roll_back(8, steps, 1008.1))
    del steps[8:]
    metrics.on_goodput(book.settled(1009.0))
    after = counters(samples(metrics))
    assert all(after[key] >= value for key, value in before.items()), "a counter went back"
    assert after["badput_seconds_total", (("reason", "wasted_steps"),)] > 1.0
    assert after["goodput_seconds_total", ()] == before["goodput_seconds_total", ()], "until that is made up for"
    assert after["tokens_total", ()] == 12 * 512

    train(8, 14, 1010.0)
    write(book.roll_back(6, steps, 1014.0))
    del steps[6:]
    train(6, 9, 1015.0)
    metrics.on_goodput(book.settled(1018.0))
    after = counters(samples(metrics))
    assert after["nonfinite_total", ()] == 2

    successor, its_book = RunMetrics("r"), EventBook(written, steps)
    catching_up = json.loads(json.dumps(its_book.catch_up(1018.0)))
    successor.replay(written, steps)
    for event in catching_up:
        successor.on_event(event)
    successor.go_on_from(metrics.book(book.settled(1018.0)))
    successor.on_goodput(its_book.settled(1018.0))
    again = counters(samples(successor))
    assert again.keys() == after.keys()
    assert [key for key, value in after.items() if again[key] < value] == [], "to the last bit: any less is a reset"
    assert again == pytest.approx(after, abs=1e-5)


def test_goodput_and_badput_add_up_to_the_wall_time() -> None:
    metrics, book = RunMetrics("r"), EventBook()
    for event in STORY:
        book.record(event_of(event), event["time"])
    now = 1001.0
    for number in range(30):
        now += 0.5
        book.step(step(number, committed_at=now), now)
        metrics.on_goodput(book.settled(now))
        seen = samples(metrics)
        bad = sum(seen["badput_seconds_total", (("reason", reason),)] for reason in REASONS)
        assert seen["run_wall_seconds_total", ()] == pytest.approx(seen["goodput_seconds_total", ()] + bad, abs=1e-6)
    assert seen["run_wall_seconds_total", ()] == pytest.approx(now - 1000.0)
    assert seen["goodput_ratio", ()] == pytest.approx(seen["goodput_seconds_total", ()] / (now - 1000.0))


# ---------------------------------------------------------------------------------------- how many there are


def everything(ranks: int) -> RunMetrics:
    """A run that everything has happened to."""
    metrics = RunMetrics("a-run-with-a-long-name-20260101-000000-01234567", "test", "1.0")
    phases = ("refresh", "data", "compute", "reduce", "gather", "vote", "commit", "save")
    metrics.on_event({"time": 1.0, "kind": "worker_ready", "worker": 1, "incarnation": 0, "node": "n",
                      "flops_per_token": 1e6, "peak_flops": 4e9})  # fmt: skip
    metrics.on_event({"time": 1.0, "kind": "run_started"})
    metrics.on_event({"time": 11.0, "kind": "generation", "generation": 3,
                      "workers": [{"worker": 1, "incarnation": 0}]})  # fmt: skip
    metrics.on_window(Window(4, 0.4, 0.01, {}, 1.2, 1.1, 0.05))
    wire = ("gradients", "plain", "outer", "weights", "copies")
    metrics.on_step(step(0, phase_seconds=dict.fromkeys(phases, 0.1), wire_bytes=dict.fromkeys(wire, 1)))
    kinds = ("kill", "hang", "stall", "crash", "node", "network", "restart", "controller", "storage")
    for kind in (*kinds, "grow", "shrink", "drain", "evict", "rebalance"):
        metrics.on_event(incident(10.0, kind))
        metrics.on_event(recovery(10.0, kind))
    for finding in FINDINGS:
        metrics.on_event({"time": 1.0, "kind": "skew_found", "finding": finding, "workers": []})
    metrics.on_event({"time": 1.0, "kind": "checkpoint_saved", "committed": 5, "bytes": 10, "seconds": 0.1,
                      "blocked_seconds": 0.01})  # fmt: skip
    metrics.on_event({"time": 1.0, "kind": "evaluation", "step": 5, "samples": 8, "seconds": 0.1, "best": True,
                      "metrics": {"loss": 1.0, "perplexity": 2.7, "accuracy": 0.5, "per_class": {}}})  # fmt: skip
    metrics.on_goodput(dict.fromkeys(("productive", *REASONS), 1.0))
    metrics.on_status(status([worker(rank) for rank in range(ranks)]))
    return metrics


def test_there_are_at_most_forty_series_a_rank_and_two_hundred_besides() -> None:
    seen = samples(everything(64))
    per_rank = [key for key in seen if "rank" in dict(key[1])]
    assert len(per_rank) == 64 * len(RANK_SERIES) <= 64 * 40
    others = len(seen) - len(per_rank)
    print(f"{others} series of the run, {len(per_rank) // 64} of each rank")
    assert others <= 200


def test_every_series_of_the_table_is_there_and_no_other() -> None:
    metrics = everything(2)
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    for series in SERIES:
        family = families[series.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (series.kind, series.help)
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels == {"run", *series.labels}, series.name
    assert len(families) == len(SERIES) == len(RUN_SERIES) + len(RANK_SERIES)


def test_labels_may_hold_anything() -> None:
    metrics = RunMetrics('a "run"\n', "back\\slash")
    metrics.on_status(status([worker(0, node='no"de\n\\')]))
    seen = {f.name: f.samples for f in text_string_to_metric_families(metrics.render().decode())}
    (sample,) = seen["orchestrator_rank_info"]
    assert sample.labels == {"run": 'a "run"\n', "rank": "0", "worker": "10", "node": 'no"de\n\\'}
