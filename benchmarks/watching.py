"""What watching costs: metrics, status.json and the goodput ledger, while a run trains, and when it is scraped.

overhead  one run whose controller keeps all of it in some turns of steps, and only the run's record (events and steps,
          which recovery needs) in the others; pairs of turns side by side, in alternating order (goal 0.5 % of a step)
alone     the same work by itself: processor time for a step, and for bringing status.json and metrics up to date
scrape    the endpoint's answer with 64 and with 4,096 ranks (goals 10 ms and 100 ms)

    python benchmarks/watching.py [--pairs 8] [--turn 12] [--workers 4] [--only overhead,alone,scrape]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from monitoring.metrics import RunMetrics
from monitoring.records import read_records

WARM_UP_STEPS = 12


def is_watched(step: int, turn: int) -> bool:
    """On and off, then off and on, so that a machine that speeds up or slows down favours nobody."""
    pair, place = divmod((step - WARM_UP_STEPS) // turn, 2)
    return step < WARM_UP_STEPS or (pair % 2 == place)


def overhead(pairs: int, turn: int, workers: int, home: Path) -> list[float]:
    """Seconds of a step that is watched by those of one that is not, pair by pair."""
    from orchestrator import Job, run
    from orchestrator.runtime.ray import following
    from orchestrator.runtime.training_executor import TrainingExecutor

    class Toggled(TrainingExecutor):
        def log_action(self, action: Any) -> None:
            metrics = self._run_log.metrics
            if is_watched(self._run_log.recorded, turn):
                vars(metrics).pop("on_step", None)
                vars(metrics).pop("on_event", None)
            else:
                metrics.on_step = metrics.on_event = lambda *arguments: None  # type: ignore[method-assign,assignment]
            super().log_action(action)

        def publish(self) -> None:
            if is_watched(self._run_log.recorded, turn):
                super().publish()

    steps = WARM_UP_STEPS + 2 * pairs * turn
    overrides = [f"elastic.workers.max={workers}", f"elastic.workers.min={workers}", "elastic.standby=0",
                 f"train.steps={steps}", "checkpoint.every_steps=null", "elastic.rebalance.enabled=false"]  # fmt: skip
    following.TrainingExecutor = Toggled  # type: ignore[misc]
    try:
        result = run(Job.load("examples/quickstart.yaml", overrides=overrides), home / "run")
    finally:
        following.TrainingExecutor = TrainingExecutor  # type: ignore[misc]
    if result.status != "finished":
        raise SystemExit(f"the run {result.status}: {result.reason}")
    records = list(read_records(home / "run" / "metrics.jsonl"))
    ratios = []
    for pair in range(pairs):
        means: dict[bool, float] = {}
        for place in range(2):
            first = WARM_UP_STEPS + (2 * pair + place) * turn
            # What is watched changes with a step; the first of a turn belongs to neither.
            took = records[first + turn - 1]["committed_at"] - records[first]["committed_at"]
            means[is_watched(first, turn)] = took / (turn - 1)
        ratios.append(means[True] / means[False])
    return ratios


def sample_status(ranks: int) -> dict[str, Any]:
    """A status.json of a run with `ranks` ranks."""
    workers = [
        {
            "worker": rank, "incarnation": 0, "node": f"{rank // 8:056x}", "pid": 4000 + rank, "state": "member",
            "rank": rank, "heartbeat": 1.7e9 + rank, "speed": 0.98, "own_speed": 0.99, "wait_share": 0.07,
            "step_seconds": 0.41234, "data_seconds": 0.00123, "virtual_workers": 2, "tokens": 2048,
            "host_bytes": 3 * 10**9, "device_bytes": 70 * 10**9,
        }
        for rank in range(ranks)
    ]  # fmt: skip
    return {"state": "running", "steps": 1000, "median_step_seconds": 0.5, "target": ranks, "min": 1,
            "checkpoint_interval_seconds": 60.0, "workers": workers}  # fmt: skip


def sample_step(number: int, ranks: int) -> dict[str, Any]:
    return {
        "step": number, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "generation": 0, "tokens": 2048 * ranks,
        "seconds": 0.5, "skipped": False, "committed_at": 1.7e9 + 0.5 * number, "ranks": [],
        "phase_seconds": {"data": 0.01, "compute": 0.4, "reduce": 0.05, "vote": 0.01, "commit": 0.02, "save": 0.0},
    }  # fmt: skip


def scrape(ranks: int, times: int = 20) -> list[float]:
    """Seconds until an endpoint has answered in full."""
    metrics = RunMetrics("benchmark", "benchmark", "1.0")
    for number in range(50):
        metrics.on_step(sample_step(number, ranks))
    metrics.on_status(sample_status(ranks))
    port = metrics.serve("127.0.0.1", 0)
    took = []
    try:
        for _ in range(times):
            started = time.perf_counter()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                size = len(answer.read())
            took.append(time.perf_counter() - started)
    finally:
        metrics.close()
    print(f"  {ranks:,} ranks: {size / 1e6:.2f} MB")
    return took


def alone(ranks: int) -> tuple[float, float]:
    """Processor seconds of the metrics for one step, and of bringing them up to date once."""
    metrics = RunMetrics("benchmark", "benchmark", "1.0")
    started = time.process_time()
    for number in range(2000):
        metrics.on_step(sample_step(number, ranks))
    per_step = (time.process_time() - started) / 2000
    status = sample_status(ranks)
    started = time.process_time()
    for _ in range(20):
        metrics.on_status(status)
    return per_step, (time.process_time() - started) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--turn", type=int, default=12)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", default="overhead,alone,scrape")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if "alone" in wanted:
        for ranks in (4, 64, 4096):
            per_step, per_look = alone(ranks)
            print(f"{ranks:,} ranks: {1e6 * per_step:.0f} us a step, {1e3 * per_look:.2f} ms a look")
    if "scrape" in wanted:
        for ranks, goal in ((64, 10), (4096, 100)):
            took = scrape(ranks)
            figures = " ".join(f"{1e3 * each:.1f}" for each in (min(took), statistics.median(took), max(took)))
            print(f"scrape of {ranks:,} ranks, ms (min, median, max): {figures}; goal {goal}")
    if "overhead" in wanted:
        with tempfile.TemporaryDirectory() as home:
            ratios = overhead(options.pairs, options.turn, options.workers, Path(home))
        print("watched / not, a step, pair by pair: " + " ".join(f"{ratio:.3f}" for ratio in ratios))
        print(f"  min {min(ratios):.3f}, median {statistics.median(ratios):.3f}, mean {statistics.mean(ratios):.4f}, "
              f"max {max(ratios):.3f}; goal 1.005")  # fmt: skip


if __name__ == "__main__":
    main()
