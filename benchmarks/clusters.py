"""What losing and getting nodes costs, beside Ray Train on the same machine.

Every node is a raylet of its own on this machine, with room for one worker; the head has no processors. A repetition,
in a run of four workers that trains all the time:

drain       a node is drained as `orchestrator drain` does it; what is still there at the deadline is ended, as a cloud
            would. Then a new node comes.
controller  our controller is killed (Ray Train: not done)
loss        a raylet and everything under it get SIGKILL. Then a new node comes.

A wait for a step is the time between two steps that had not been done before. Ray Train 2.60 trains the same model and
data with DDP, `num_workers=(2, 4)`, a checkpoint every 20 steps and another when it hears of a drain, as its
documentation says; it looks for new nodes every 10 s (60 by default). Sides take turns, each turn on a new cluster.

    python benchmarks/clusters.py [--repetitions 10] [--ray-train 10] [--turn 5] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from ray_train import CHECKPOINT_STEPS, fit

from monitoring.follow import Tail
from orchestrator.runtime import reaper
from orchestrator.runtime.ray.nodes import Gcs, GcsError, drain

WORKERS, LEAST = 4, 2
CALM_STEPS = 8
"""Steps of the full group before anything happens to it."""
DEADLINE_S = 30.0
"""From a notice to the node's end: Google Cloud's; others give two minutes."""
LOOK_S = 0.02
STORE_BYTES = 80_000_000


class Failed(Exception):
    """A repetition takes longer than it may, or its run ended."""


class Step(NamedTuple):
    """A step that was done, when, and by which group of workers (a generation, or a start of Ray Train's workers)."""

    number: int
    at: float
    group: float


class Nodes:
    """A Ray cluster on this machine with its own directory and ports. Its processes carry a mark, and end by that."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.home = tempfile.mkdtemp(prefix="orch-bench-", dir="/tmp")
        self._guard = reaper.start(self.home)
        os.environ |= {reaper.MARK: self.home, "RAY_TMPDIR": self.home}
        (Path(self.home) / "ray").mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._cluster: Any = Cluster(
            initialize_head=True, shutdown_at_exit=False,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES,
                            "dashboard_agent_listen_port": port},
        )  # fmt: skip
        self.gcs = Gcs(self._cluster.address)
        self._raylets: dict[str, Any] = {}

    def add(self) -> tuple[str, float]:
        """A new node: its id, and when the cluster knew it."""
        node = self._cluster.add_node(wait=False, num_cpus=1, object_store_memory=STORE_BYTES)
        self._raylets[node.node_id] = node.all_processes["raylet"][0].process
        deadline = time.monotonic() + 60
        while not self.knows(node.node_id):
            if time.monotonic() > deadline:
                raise Failed("a node did not come up within 60 s")
            time.sleep(LOOK_S)
        return node.node_id, time.time()

    def knows(self, node: str) -> bool:
        """Whether Ray takes the node to be alive."""
        with contextlib.suppress(GcsError):
            return any(each.is_alive for each in self.gcs.nodes() if each.node_id == node)
        return True

    def is_up(self, node: str) -> bool:
        return self._raylets[node].poll() is None

    def lose(self, node: str) -> float:
        """Ends a node at once, with all that runs there; when."""
        raylet = psutil.Process(self._raylets[node].pid)
        family = [raylet, *raylet.children(recursive=True)]
        at = time.time()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        return at

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A driver on this cluster."""
        output = (Path(self.home) / "driver.log").open("wb")
        environment = os.environ | {"RAY_ADDRESS": self.gcs.address}
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def end(self, driver: subprocess.Popen[bytes] | None) -> None:
        reaper.end_session(self.home, patience_s=0.0, spare=frozenset({self._guard.pid}))
        for process in (driver, *self._raylets.values()):
            if process is not None:
                process.wait()
        with contextlib.suppress(Exception):
            self._cluster.global_state.disconnect()
        self._guard.kill()
        self._guard.wait()
        del os.environ[reaper.MARK], os.environ["RAY_TMPDIR"]
        shutil.rmtree(self.home, ignore_errors=True)


class Side:
    """A run that trains on `nodes`, as its records tell of it."""

    name = ""

    def __init__(self, nodes: Nodes, job: str, limit_s: float) -> None:
        self.nodes = nodes
        self.steps: list[Step] = []
        self.limit_s = limit_s
        self.deadline = time.monotonic() + limit_s
        self.driver = self._start(job, Path(nodes.home))

    def _start(self, job: str, home: Path) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def look(self) -> None:
        """Reads what is new on record."""
        raise NotImplementedError

    def members(self, group: float) -> list[str]:
        """The nodes of a group, a worker each."""
        raise NotImplementedError

    def until(self, met: Callable[[], Any], what: str) -> None:
        while True:
            self.look()
            if met():
                return
            if self.driver.poll() is not None:
                output = (Path(self.nodes.home) / "driver.log").read_text()
                raise Failed(f"the run ended before {what}: {output[-2000:]}")
            if time.monotonic() > self.deadline:
                raise Failed(f"not within {self.limit_s:.0f} s: {what}")
            time.sleep(LOOK_S)

    def new_steps(self) -> list[Step]:
        """Those that had not been done before."""
        highest = itertools.accumulate((step.number for step in self.steps), max, initial=-1)
        return [step for step, before in zip(self.steps, highest, strict=False) if step.number > before]

    def median_step_s(self) -> float:
        pairs = itertools.pairwise(self.steps)
        return statistics.median(b.at - a.at for a, b in pairs if a.group == b.group and b.number == a.number + 1)

    def longest_wait_s(self, since: float, until: float = float("inf")) -> float:
        """For a new step, of the waits that ended in this time."""
        pairs = itertools.pairwise(self.new_steps())
        return max(b.at - a.at for a, b in pairs if since < b.at <= until)

    def redone(self, since: float) -> int:
        """Steps done after `since` that had been done before."""
        new = set(self.new_steps())
        return sum(1 for step in self.steps if step.at > since and step not in new)

    def calm(self, chance: random.Random) -> None:
        """Waits until the full group has trained for a while, and then to a random moment of a step."""

        def is_calm() -> bool:
            if len(self.steps) < CALM_STEPS or self.steps[-1].group != self.steps[-CALM_STEPS].group:
                return False
            return len(self.members(self.steps[-1].group)) == WORKERS

        self.until(is_calm, "a calm group of all workers")
        time.sleep(chance.random() * self.median_step_s())
        self.look()

    def step_without(self, node: str, since: float) -> Step | None:
        """The first new step after `since` by a group that does not need the node."""
        new = (step for step in self.new_steps() if step.at > since)
        return next((step for step in new if node not in self.members(step.group)), None)

    def step_with(self, node: str) -> Step | None:
        return next((step for step in self.new_steps() if node in self.members(step.group)), None)


class Ours(Side):
    name = "ours"

    def _start(self, job: str, home: Path) -> subprocess.Popen[bytes]:
        self.directory = home / "run"
        self.events: list[dict[str, Any]] = []
        self._new_events, self._new_steps = (
            Tail(self.directory / "events.jsonl"),
            Tail(self.directory / "metrics.jsonl"),
        )
        self._members: dict[float, list[str]] = {}
        overrides = (
            "train.steps=1000000", "train.schedule={name: constant}", f"checkpoint.every_steps={CHECKPOINT_STEPS}",
            f"elastic.workers={{min: {LEAST}, max: {WORKERS}}}", "elastic.standby=0",
            # Nodes that come and go every few seconds would be waited out.
            "elastic.scaling.settle_s=0",
        )  # fmt: skip
        sets = [part for override in overrides for part in ("--set", override)]
        return self.nodes.start(
            sys.executable, "-m", "orchestrator", "run", job, "--run-dir", str(self.directory), *sets
        )

    def look(self) -> None:
        for event in self._new_events.new():
            self.events.append(event)
            if event["kind"] == "generation":
                self._members[event["generation"]] = [worker["node"] for worker in event["workers"]]
        self.steps += [Step(each["step"], each["committed_at"], each["generation"]) for each in self._new_steps.new()]

    def members(self, group: float) -> list[str]:
        return self._members[group]

    def first(self, kind: str, since: float, **fields: Any) -> dict[str, Any] | None:
        """The first event of its kind after `since` with these fields."""
        for event in self.events:
            if event["kind"] == kind and event["time"] > since and fields.items() <= event.items():
                return event
        return None

    def until_event(self, kind: str, since: float, **fields: Any) -> dict[str, Any]:
        self.until(lambda: self.first(kind, since, **fields), f"an event {kind} {fields}")
        return self.first(kind, since, **fields) or {}

    def controller(self, at: float) -> dict[str, Any]:
        """The one of that time."""
        return next(e for e in reversed(self.events) if e["kind"] == "controller" and e["time"] < at)

    def redone(self, since: float) -> int:
        """By its own account: what is done again is taken off the record."""
        return sum(
            event["steps_lost"] for event in self.events if event["kind"] == "recovery" and event["time"] > since
        )


class RayTrain(Side):
    name = "Ray Train"

    def _start(self, job: str, home: Path) -> subprocess.Popen[bytes]:
        self._log = home / "steps.jsonl"
        self._new = Tail(self._log)
        self._members: dict[float, list[str]] = {}
        return self.nodes.start(
            sys.executable, __file__, "--job", job, "--ray-train-driver", str(home)
        )  # fmt: skip

    def look(self) -> None:
        for each in self._new.new():
            if "node" in each:
                self._members.setdefault(each["session"], []).append(each["node"])
            else:
                self.steps.append(Step(each["step"], each["at"], each["session"]))

    def members(self, group: float) -> list[str]:
        return self._members[group]


# ------------------------------------------------------------------------------------ what happens to a run

Figures = dict[str, float]
"""Seconds, or steps, by the names of MEASURES."""
Found = dict[str, list[float]]
"""The same of all repetitions."""


def drained(side: Side, chance: random.Random) -> Figures:
    side.calm(chance)
    node = chance.choice(side.members(side.steps[-1].group))
    at = time.time()
    deadline = at + DEADLINE_S
    drain(side.nodes.gcs, node, "benchmark", deadline)

    def is_left() -> bool:
        if time.time() > deadline and side.nodes.is_up(node):
            side.nodes.lose(node)
        return side.step_without(node, at) is not None

    side.until(is_left, "training without a drained node")
    step = side.step_without(node, at)
    assert step is not None
    found = {"drain.trains": step.at - at, "drain.redone": side.redone(at),
             "drain.wait": side.longest_wait_s(at, step.at) - side.median_step_s()}  # fmt: skip
    if isinstance(side, Ours):
        side.until_event("recovery", at, incident="drain")
        found["drain.redone"] = side.redone(at)
        found["drain.formed"] = side.until_event("generation_running", at, generation=step.group)["time"] - at
    side.until(lambda: not side.nodes.is_up(node) or time.time() > deadline, "the end of a drained node")
    if side.nodes.is_up(node):
        side.nodes.lose(node)
    return found


def lost(side: Side, chance: random.Random) -> Figures:
    side.calm(chance)
    node = chance.choice(side.members(side.steps[-1].group))
    at = side.nodes.lose(node)
    told: list[float] = []

    def is_over() -> bool:
        if not told and not side.nodes.knows(node):
            told.append(time.time() - at)
        return bool(told) and side.step_without(node, at) is not None

    side.until(is_over, "training without a lost node")
    step = side.step_without(node, at)
    assert step is not None
    found = {"loss.ray": told[0], "loss.trains": step.at - at, "loss.redone": side.redone(at),
             "loss.wait": side.longest_wait_s(at, step.at) - side.median_step_s()}  # fmt: skip
    if isinstance(side, Ours):
        found["loss.detected"] = side.until_event("incident", at)["time"] - at
        side.until_event("recovery", at)
        found["loss.redone"] = side.redone(at)
        found["loss.controller"] = side.controller(at)["node"] == node
    return found


def joined(side: Side, chance: random.Random) -> Figures:
    node, at = side.nodes.add()
    side.until(lambda: side.step_with(node) is not None, "training with a new node")
    step = side.step_with(node)
    assert step is not None
    found = {"join.trains": step.at - at, "join.redone": side.redone(at),
             "join.wait": side.longest_wait_s(at, step.at) - side.median_step_s()}  # fmt: skip
    if isinstance(side, Ours):
        ready = side.until_event("worker_ready", at, node=node)["time"]
        running = side.until_event("generation_running", ready, generation=step.group)["time"]
        found |= {"join.ready": ready - at, "join.joined": running - ready}
    return found


def headless(side: Side, chance: random.Random) -> Figures:
    assert isinstance(side, Ours)
    side.calm(chance)
    quiet = side.longest_wait_s(side.steps[-CALM_STEPS].at)
    at = time.time()
    os.kill(side.controller(at)["pid"], signal.SIGKILL)
    up = side.until_event("controller", at)["time"]
    charge = side.until_event("controller_restarted", at)["time"]
    side.until(lambda: sum(step.at > charge for step in side.steps) >= 3, "steps under a new controller")
    assert side.steps[-1].group == next(step.group for step in reversed(side.steps) if step.at < at), "same generation"
    return {"controller.up": up - at, "controller.charge": charge - at,
            "controller.wait": side.longest_wait_s(at), "controller.quiet": quiet}  # fmt: skip


def turn(
    kind: type[Side], job: str, repetitions: int, limit_s: float, no_more_at: float, chance: random.Random, found: Found
) -> None:
    """Some repetitions in one run on a new cluster, none begun after `no_more_at` (by the monotonic clock). One that
    takes too long, or whose run ends, is counted as `failed` and ends the turn."""
    nodes = Nodes()
    side = None
    try:
        for _ in range(WORKERS):
            nodes.add()
        side = kind(nodes, job, limit_s)
        for _ in range(repetitions):
            if time.monotonic() > no_more_at:
                break
            side.deadline = time.monotonic() + limit_s
            for happens in (drained, joined, headless, lost, joined):
                if happens is headless and not isinstance(side, Ours):
                    continue
                figures = happens(side, chance)
                for name, value in figures.items():
                    found.setdefault(name, []).append(value)
                print(
                    f"{kind.name}: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True
                )
            found.setdefault("step", []).append(side.median_step_s())
    except Failed as failure:
        print(f"{kind.name}: {failure}", flush=True)
        found["failed"] = [found.get("failed", [0])[0] + 1]
    finally:
        nodes.end(None if side is None else side.driver)


# ------------------------------------------------------------------------------------ Ray Train


def ray_train(job: str, home: Path) -> None:
    """The driver; it trains until it is ended. `home` is where its records and checkpoints go."""
    import ray

    ray.init(log_to_driver=False, logging_level=logging.WARNING)
    fit(
        job, home, home / "steps.jsonl", (LEAST, WORKERS), saves_when_leaving=True,
        elastic_resize_monitor_interval_s=10.0,
    )  # fmt: skip


# ------------------------------------------------------------------------------------ the table


class Measure(NamedTuple):
    """`goal` gives the largest value allowed, from the seconds of a step."""

    name: str
    text: str
    goal: Callable[[float], float] | None = None


MEASURES = (
    Measure("drain.formed", "notice to new generation", lambda step: 2.0 + step),
    Measure("drain.trains", "notice to first new step without the node"),
    Measure("drain.wait", "  longest wait for a step, less a step"),
    Measure("drain.redone", "  steps done again", lambda step: 0),
    Measure("loss.detected", "node lost to detected", lambda step: 3.0),
    Measure("loss.ray", "  to Ray's own word of it"),
    Measure("loss.controller", "  the controller was there (1: yes)", lambda step: 0),
    Measure("loss.trains", "  to first new step without it"),
    Measure("loss.wait", "  longest wait for a step, less a step", lambda step: 5.0),
    Measure("loss.redone", "  steps done again", lambda step: 0),
    Measure("controller.up", "controller killed to new one started"),
    Measure("controller.charge", "  to new one in charge", lambda step: 5.0),
    Measure("controller.wait", "  longest wait for a step"),
    Measure("controller.quiet", "  the same just before"),
    Measure("join.ready", "node up to worker ready"),
    Measure("join.joined", "  worker ready to generation with it", lambda step: step),
    Measure("join.trains", "  node up to first new step with it"),
    Measure("join.wait", "  longest wait for a step, less a step"),
    Measure("join.redone", "  steps done again", lambda step: 0),
    Measure("step", "median step"),
    Measure("failed", "repetitions that failed (how many)", lambda step: 0),
)  # fmt: skip


def show(found: dict[str, Found]) -> None:
    print(f"{'seconds':<44}{'side':<11}{'n':>3}{'min':>9}{'median':>9}{'max':>9}{'goal':>9}")
    for measure in MEASURES:
        for side, figures in found.items():
            if values := figures.get(measure.name):
                goal = ""
                if side == Ours.name and measure.goal is not None:
                    goal = f"{measure.goal(statistics.median(figures['step'])):.2f}"
                figured = "".join(f"{value:>9.2f}" for value in (min(values), statistics.median(values), max(values)))
                print(f"{measure.text:<44}{side:<11}{len(values):>3}{figured}{goal:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="examples/quickstart.yaml")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--ray-train", type=int, help="repetitions of Ray Train; as many as ours by default")
    parser.add_argument("--ray-train-minutes", type=float, default=90.0, help="no repetition of it begins after these")
    parser.add_argument("--turn", type=int, default=5, help="repetitions of a turn")
    parser.add_argument("--limit-s", type=float, default=600.0, help="the most that a repetition may take")
    parser.add_argument("--quick", action="store_true", help="two repetitions of ours, one of Ray Train")
    parser.add_argument("--ray-train-driver", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ray_train_driver is not None:
        ray_train(options.job, options.ray_train_driver)
        return
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}
    theirs = options.repetitions if options.ray_train is None else options.ray_train
    left: dict[type[Side], int] = {Ours: options.repetitions, RayTrain: theirs}
    if options.quick:
        left = {Ours: 2, RayTrain: 1}
    found: dict[str, Found] = {kind.name: {} for kind in left}
    budget_s = {Ours: float("inf"), RayTrain: 60 * options.ray_train_minutes}
    chance = random.Random(0)
    while any(left.values()):
        for kind in left:
            if count := min(options.turn, left[kind]):
                started = time.monotonic()
                turn(kind, options.job, count, options.limit_s, started + budget_s[kind], chance, found[kind.name])
                left[kind] -= count
                budget_s[kind] -= time.monotonic() - started
                if budget_s[kind] <= 0:
                    left[kind] = 0
    show(found)
    print(json.dumps({"benchmark": "clusters", **found}))
    sys.exit(any("failed" in figures for figures in found.values()))


if __name__ == "__main__":
    main()
