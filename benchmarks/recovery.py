"""What a SIGKILL costs: ten of them, spread over a run of four workers, beside peers under the same schedule: torchft
0.2, and Ray Train 2.60 as it is by default and with its TorchftConfig.

A kill is sent from outside to the process of a rank that is training; its cost is the time from the signal to the
next *new* committed step, less one median step, the steps that had to be done again, and those that were done with
fewer samples than the job says. Ours has a warm standby, and once more none; the others start a replacement. One side
runs after the other.

    python benchmarks/recovery.py [--kills 10] [--every 20] [--sides ours torchft ...]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from monitoring.records import read_records


@contextlib.contextmanager
def killer(
    schedule: list[int], progress: Callable[[], int], victims: Callable[[], list[int]], kills: list[dict[str, Any]]
) -> Iterator[None]:
    """Kills one random victim when `progress()` (steps done) passes each step of `schedule`."""
    over = threading.Event()
    chance = random.Random(0)

    def watch() -> None:
        for step in schedule:
            while progress() < step or not victims():
                if over.wait(0.01):
                    return
            pid = chance.choice(victims())
            # Anywhere in a step, not just after a commit.
            if over.wait(chance.random() * 0.4):
                return
            with contextlib.suppress(ProcessLookupError):
                at = time.time()
                os.kill(pid, signal.SIGKILL)
                kills.append({"at": at, "pid": pid, "step": progress()})

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def costs(kills: list[dict[str, Any]], steps: list[tuple[int, float]]) -> tuple[list[float], list[int], float]:
    """Stall seconds and steps redone per kill, and the median step, from (step, time done) in order of time."""
    gaps = [b[1] - a[1] for a, b in itertools.pairwise(steps) if b[0] == a[0] + 1]
    median = statistics.median(gaps)
    stalls, redone = [], []
    for index, kill in enumerate(kills):
        end = kills[index + 1]["at"] if index + 1 < len(kills) else float("inf")
        highest = max((step for step, at in steps if at <= kill["at"]), default=-1)
        new = next((at for step, at in steps if at > kill["at"] and step > highest), None)
        if new is None:
            continue
        stalls.append(max(0.0, new - kill["at"] - median))
        redone.append(sum(1 for step, at in steps if kill["at"] < at < min(new, end) and step <= highest))
    return stalls, redone, median


def ours(job_path: str, schedule: list[int], standby: int = 1) -> dict[str, Any]:
    from orchestrator import Job, run

    job = Job.load(job_path, overrides=[f"train.steps={schedule[-1] + 20}", "checkpoint.every_steps=20",
                                        f"elastic.standby={standby}"])  # fmt: skip
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home) / "run"

        def generation() -> list[int]:
            last = [
                e for e in read_records(directory / "events.jsonl") if e["kind"] in ("generation", "generation_running")
            ]
            if not last or last[-1]["kind"] != "generation_running":
                return []
            members = [e for e in last if e["kind"] == "generation"][-1]["workers"]
            # The full group again, so that each kill is of the same kind.
            return [m["pid"] for m in members] if len(members) == job.elastic.workers.max else []

        def progress() -> int:
            return sum(1 for _ in read_records(directory / "metrics.jsonl"))

        with killer(schedule, progress, generation, kills):
            result = run(job, directory)
        if result.status != "finished":
            raise SystemExit(f"our run {result.status}: {result.reason}")
        events = list(read_records(directory / "events.jsonl"))
        steps = [(r["step"], r["committed_at"]) for r in read_records(directory / "metrics.jsonl")]
    stalls, redone, median = costs(kills, steps)
    generations = [e for e in events if e["kind"] == "generation"]
    killed = {k["pid"] for k in kills}
    kept = all(
        m["pid"] in {n["pid"] for n in after["workers"]}
        for before, after in itertools.pairwise(generations)
        for m in before["workers"]
        if m["pid"] not in killed
    )
    full = []
    for kill in kills:
        formed = next((e["time"] for e in events if e["kind"] == "generation" and e["time"] > kill["at"]
                       and len(e["workers"]) == job.elastic.workers.max), None)  # fmt: skip
        back = next((at for _, at in steps if formed is not None and at > formed), None)
        if back is not None:
            full.append(back - kill["at"])
    growth = [e["pause_seconds"] for e in events if e["kind"] == "recovery" and e["incident"] == "grow"]
    return {
        "stalls": stalls, "redone": redone, "median_step": median, "survivors_kept_their_pids": kept,
        "batch": "unchanged", "full_strength": full, "growth_pauses": growth, "kills": len(kills),
        "wall_seconds": result.wall_seconds, "goodput": result.goodput_ratio,
        "recorded_steps_lost": sum(r["steps_lost"] for r in result.recoveries),
    }  # fmt: skip


def ray_train(job_path: str, schedule: list[int]) -> dict[str, Any]:
    """See `benchmarks.ray_train`."""
    import ray
    from ray_train import fit

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "steps.jsonl"

        def entries() -> list[dict[str, Any]]:
            return list(read_records(log))

        def victims() -> list[int]:
            starts = [e for e in entries() if "pid" in e]
            newest = max((e["session"] for e in starts), default=None)
            group = [e for e in starts if e["session"] == newest]
            stepped = any("step" in e and e["session"] == newest for e in entries())
            return [e["pid"] for e in group] if stepped else []

        def progress() -> int:
            return max((e["step"] for e in entries() if "step" in e), default=-1) + 1

        ray.init(num_cpus=5, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            started = time.time()
            with killer(schedule, progress, victims, kills):
                fit(job_path, Path(home), log, (2, 4), steps=schedule[-1] + 20)
            wall = time.time() - started
        finally:
            ray.shutdown()
        steps = [(e["step"], e["at"]) for e in entries() if "step" in e]
        starts = [e for e in entries() if "pid" in e]
    worlds = sorted({e["world"] for e in starts})
    by_session = [{e["pid"] for e in starts if e["session"] == each} for each in sorted({e["session"] for e in starts})]
    killed = {kill["pid"] for kill in kills}
    stalls, redone, median = costs(kills, steps)
    return {
        "stalls": stalls, "redone": redone, "median_step": median,
        "survivors_kept_their_pids": all(before - killed <= after for before, after in itertools.pairwise(by_session)),
        "batch": f"world sizes {worlds}", "kills": len(kills), "wall_seconds": wall,
    }  # fmt: skip


REPLICAS = 4


def torchft(job_path: str, schedule: list[int]) -> dict[str, Any]:
    """See `benchmarks.torchft_train`. Replicas are processes, started anew as soon as they are gone."""
    from torchft_train import Replicas, lighthouse

    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "steps.jsonl"
        replicas = Replicas(job_path, log, schedule[-1] + 20, REPLICAS)
        started = time.time()
        with (
            lighthouse() as address,
            replicas.running(address) as thread,
            _killing_replicas(log, schedule, lambda: list(replicas.pids.values()), kills),
        ):
            thread.join()
        return _of_replicas(log, kills) | {"wall_seconds": time.time() - started}


def ray_train_torchft(job_path: str, schedule: list[int]) -> dict[str, Any]:
    """The same replicas as workers of Ray Train, which starts them anew."""
    import ray
    from torchft_train import fit_in_ray

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "steps.jsonl"

        def pids() -> list[int]:
            newest = {e["replica"]: e["pid"] for e in read_records(log) if "pid" in e}
            return list(newest.values())

        ray.init(num_cpus=5, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            started = time.time()
            with _killing_replicas(log, schedule, pids, kills):
                fit_in_ray(job_path, Path(home), log, schedule[-1] + 20, REPLICAS)
            wall = time.time() - started
        finally:
            ray.shutdown()
        return _of_replicas(log, kills) | {"wall_seconds": wall}


def _commits(log: Path) -> list[dict[str, Any]]:
    """The first record of each step."""
    found: dict[int, dict[str, Any]] = {}
    for record in sorted((e for e in read_records(log) if "step" in e), key=lambda e: e["at"]):
        found.setdefault(record["step"], record)
    return list(found.values())


@contextlib.contextmanager
def _killing_replicas(
    log: Path, schedule: list[int], pids: Callable[[], list[int]], kills: list[dict[str, Any]]
) -> Iterator[None]:
    """Each kill when all are there again, so that each is of the same kind."""

    def victims() -> list[int]:
        done = _commits(log)
        return pids() if done and done[-1]["participants"] == REPLICAS else []

    def progress() -> int:
        return max((e["step"] for e in _commits(log)), default=-1) + 1

    with killer(schedule, progress, victims, kills):
        yield


def _of_replicas(log: Path, kills: list[dict[str, Any]]) -> dict[str, Any]:
    done = _commits(log)
    stalls, _, median = costs(kills, [(e["step"], e["at"]) for e in done])
    records = list(read_records(log))
    ends = [*(kill["at"] for kill in kills[1:]), float("inf")]
    # Each replica notes what all of them have computed in vain.
    redone = [
        max(sum("discarded" in e and e["replica"] == replica and kill["at"] < e["at"] < end for e in records)
            for replica in range(REPLICAS))
        for kill, end in zip(kills, ends, strict=True)
    ]  # fmt: skip
    killed = {kill["pid"] for kill in kills}
    pids = [[e["pid"] for e in records if "pid" in e and e["replica"] == replica] for replica in range(REPLICAS)]
    first = next(e["step"] for e in done if e["participants"] == REPLICAS)
    smaller = sum(e["participants"] < REPLICAS for e in done if e["step"] > first)
    full = []
    for kill in kills:
        missed = next((e["at"] for e in done if e["at"] > kill["at"] and e["participants"] < REPLICAS), None)
        back = next((e["at"] for e in done if missed and e["at"] > missed and e["participants"] == REPLICAS), None)
        if back is not None:
            full.append(back - kill["at"])
    return {
        "stalls": stalls, "redone": redone, "median_step": median,
        "survivors_kept_their_pids": all(killed.issuperset(each[:-1]) for each in pids),
        "batch": f"smaller in {smaller} of {len(done)} steps", "kills": len(kills), "full_strength": full,
        "smaller_steps": smaller, "steps": len(done),
    }  # fmt: skip


SIDES: dict[str, Callable[[str, list[int]], dict[str, Any]]] = {
    "ours": ours, "torchft": torchft, "Ray Train + torchft": ray_train_torchft, "Ray Train": ray_train,
}  # fmt: skip
_NEEDS_TORCHFT = ("torchft", "Ray Train + torchft")


def measure(side: str, job_path: str, schedule: list[int]) -> dict[str, Any]:
    """One of `SIDES`, in an environment that has it."""
    if side not in _NEEDS_TORCHFT:
        return SIDES[side](job_path, schedule)
    from environments import python_with
    from torchft_train import REQUIREMENTS

    python = python_with(*REQUIREMENTS, sees_ours=True)
    found = subprocess.run(
        [python, __file__, "--job", job_path, "--only", side, "--schedule", json.dumps(schedule)], check=True,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    return dict(json.loads(found.stdout.splitlines()[-1]))


def show(name: str, figures: dict[str, Any]) -> None:
    stalls = sorted(figures["stalls"])
    if not stalls:
        print(f"{name:<20} no recovery was measured ({figures['kills']} kills)")
        return
    p95 = stalls[min(len(stalls) - 1, round(0.95 * (len(stalls) - 1)))]
    print(
        f"{name:<20}{len(stalls):>6}{statistics.median(stalls):>12.3f}{p95:>10.3f}{max(stalls):>10.3f}"
        f"{sum(figures['redone']):>12}{statistics.median(figures['redone']):>12.0f}"
        f"{figures['survivors_kept_their_pids']!s:>12}{figures['median_step']:>12.3f}  {figures['batch']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="examples/quickstart.yaml")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=int, default=20, help="steps between kills")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--only", choices=SIDES, help="this side in this process, as JSON; for the benchmark itself")
    parser.add_argument("--schedule", type=json.loads, help="the steps of the kills, as JSON")
    options = parser.parse_args()
    schedule = options.schedule or [options.every * (index + 1) for index in range(options.kills)]
    if options.only:
        print(json.dumps(SIDES[options.only](options.job, schedule)))
        return
    sides = {}
    for side in options.sides:
        sides[side] = measure(side, options.job, schedule)
        print(json.dumps({side: sides[side]}), flush=True)
    if "ours" in sides:
        # The run goes on with three, and the replacement joins when it has started.
        sides["ours, no standby"] = ours(options.job, [30 * (index + 1) for index in range(3)], standby=0)
    print(
        f"{'':<20}{'kills':>6}{'median s':>12}{'p95 s':>10}{'max s':>10}{'steps redone':>12}{'per kill':>12}"
        f"{'same pids':>12}{'step s':>12}  batch"
    )
    for name, figures in sides.items():
        show(name, figures)
    for name, figures in sides.items():
        if found := figures.get("full_strength"):
            print(f"kill to full strength, {name}: median {statistics.median(found):.3f} s, max {max(found):.3f} s")
    if "ours, no standby" in sides:
        pauses = sides["ours, no standby"]["growth_pauses"]
        print(f"pause when a worker joins a running job ({len(pauses)} times): median "
              f"{statistics.median(pauses):.3f} s, max {max(pauses):.3f} s beyond a step")  # fmt: skip
    print(json.dumps({"benchmark": "recovery", **sides}))


if __name__ == "__main__":
    main()
