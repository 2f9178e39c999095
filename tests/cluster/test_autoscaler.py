"""Runs on a cluster that an autoscaler really grows and shrinks: what they ask for, get, give back and live through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from monitoring.records import read_records
from tests.cluster.conftest import JOB, PATIENCE_S, wait_for
from tests.cluster.fake_cloud import FakeCloud, node_type

LEISURELY = (
    "model={factory: 'tests.small_models:leisurely', args: {seconds: 0.02}}", "train.schedule={name: constant}",
    "train.steps=100000", "data.sequence_length=16",
)  # fmt: skip
"""A run that lasts until it is stopped; the state after n steps does not depend on how many there were to be."""
AT_ONCE = ("model.args.seconds=0.0",)


class Run:
    """One run on the cloud, by its directory."""

    def __init__(self, cloud: FakeCloud, home: Path, cache: Path, name: str) -> None:
        self.cloud, self.path = cloud, home / name
        self.job = home / f"{name}.yaml"
        self.job.write_text(JOB)
        self._sets = [f"data.cache={cache}"]

    def command(self, *overrides: str, options: tuple[str, ...] = ()) -> list[str]:
        sets = [part for value in (*self._sets, *overrides) for part in ("--set", value)]
        return ["run", str(self.job), "--run-dir", str(self.path), *sets, *options]

    @contextmanager
    def going(self, *overrides: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
        driver = self.cloud.start_driver(*self.command(*overrides, options=options))
        try:
            yield driver
        finally:
            if driver.poll() is None:
                driver.terminate()
                driver.communicate(timeout=PATIENCE_S)

    def finish(self, driver: subprocess.Popen[str], code: int = 0, timeout_s: float = 240) -> dict[str, Any]:
        output, _ = driver.communicate(timeout=timeout_s)
        assert driver.returncode == code, output
        return self.result()

    def stop(self) -> None:
        done = self.cloud.orchestrator("stop", str(self.path))
        assert done.returncode == 0, done.stderr

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in read_records(self.path / "events.jsonl") if event["kind"] in kinds]

    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "result.json").read_text()))

    def steps(self) -> int:
        return sum(1 for _ in read_records(self.path / "metrics.jsonl"))

    def sizes(self) -> list[int]:
        return [len(event["workers"]) for event in self.events("generation")]

    def until(self, condition: Callable[[], Any], what: str, driver: Any = None, timeout_s: float = PATIENCE_S) -> None:
        def met() -> bool:
            assert driver is None or driver.poll() is None, driver.communicate()[0]
            return bool(condition())

        wait_for(met, timeout_s, lambda: f"{what}; the last events: {self._tail()}")

    def until_step(self, step: int, driver: Any = None) -> None:
        self.until(lambda: self.steps() >= step, f"step {step}", driver)

    def until_size(self, size: int, driver: Any = None, timeout_s: float = PATIENCE_S) -> None:
        self.until(lambda: self.sizes()[-1:] == [size], f"{size} workers", driver, timeout_s)

    def _tail(self) -> list[dict[str, Any]]:
        return list(read_records(self.path / "events.jsonl"))[-12:]

    def nodes_of(self, worker: int) -> str:
        members = self.events("generation")[-1]["workers"]
        return next(str(member["node"]) for member in members if member["worker"] == worker)


@pytest.fixture(scope="module")
def cloud() -> Iterator[FakeCloud]:
    cloud = FakeCloud({"spot": node_type(3), "on-demand": node_type(2, "on-demand")}, dashboard=True)
    try:
        cloud.start()
        yield cloud
    finally:
        cloud.remove()


@pytest.fixture
def start(cloud: FakeCloud, tmp_path: Path, cache: Path) -> Callable[[str], Run]:
    return lambda name: Run(cloud, tmp_path, cache, name)


def undisturbed(run: Run, tmp_path: Path, cache: Path, steps: int, *overrides: str) -> dict[str, Any]:
    """The result of `steps` steps where nothing happens: one worker of a Ray of its own, which need not wait."""
    target = tmp_path / f"{run.path.name}-undisturbed"
    sets = [f"data.cache={cache}", *overrides, *AT_ONCE, f"train.steps={steps}", "elastic.workers={min: 1, max: 1}"]
    command = [sys.executable, "-m", "orchestrator", "run", str(run.job), "--run-dir", str(target),
               *(part for value in sets for part in ("--set", value))]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((target / "result.json").read_text()))


def assert_same(run: Run, tmp_path: Path, cache: Path, *overrides: str) -> dict[str, Any]:
    """What became of the run is what one worker makes of the same job, and every sample was used once."""
    result = run.result()
    reference = undisturbed(run, tmp_path, cache, result["steps"], *overrides)
    assert result["state_digest"] == reference["state_digest"]
    assert result["data_digest"] == reference["data_digest"]
    assert all(recovery["steps_lost"] == 0 for recovery in result["recoveries"])
    audit = run.cloud.orchestrator("audit", str(run.path))
    assert audit.returncode == 0, audit.stdout
    return result


@pytest.mark.nightly
def test_a_run_grows_from_one_worker_to_all_and_gives_nodes_back(
    cloud: FakeCloud, start: Callable[[str], Run], tmp_path: Path, cache: Path
) -> None:
    """Pending places bring nodes; nodes in use outlive the idle time; places that are withdrawn let them go."""
    run = start("growth")
    overrides = (*LEISURELY, "elastic.workers={min: 1, max: 4}", "elastic.scaling.shortage_after_s=6",
                 "elastic.standby=2")  # fmt: skip
    with run.going(*overrides) as driver:
        run.until_size(4, driver)
        # Two standbys are asked for and there are five nodes in all: one finds no room, which is said once, with why.
        run.until(lambda: any({4, 5} & {*e["workers"]} for e in run.events("shortage")), "word of the shortage", driver)
        run.until(lambda: len(cloud.raylets()) == 5, "five nodes", driver)
        told = run.events("shortage")
        time.sleep(20)  # Longer than an idle node is kept.
        assert len(cloud.raylets()) == 5, "a node in use is not taken"
        assert run.sizes()[-1] == 4
        assert run.events("shortage") == told
        assert "autoscaler" in told[-1]["reason"]
        assert cloud.orchestrator("resize", str(run.path), "1").returncode == 0
        run.until_size(1, driver)
        cloud.wait_for_nodes(3)  # One worker and two standbys.
        assert run.events("shortage_over"), "what is not wanted any more is not missing"
        run.stop()
        run.finish(driver, code=3)
    cloud.wait_for_nodes(0)
    assert cloud.placement_groups() == []
    assert_same(run, tmp_path, cache, *LEISURELY)


@pytest.mark.nightly
def test_markets_in_order_of_preference(cloud: FakeCloud, start: Callable[[str], Run]) -> None:
    """Three spot nodes are all there are: the fourth worker comes on demand, after a while."""
    run = start("markets")
    overrides = (*LEISURELY, "elastic.workers={min: 1, max: 4}", "resources.market=[spot, on-demand]",
                 "elastic.scaling.fallback_after_s=25")  # fmt: skip
    with run.going(*overrides) as driver:
        run.until_size(4, driver)
        changed = run.events("market_changed")[0]
        assert (changed["from"], changed["to"]) == ("spot", "on-demand")
        asked = [event["market"] for event in run.events("worker_requested")]
        assert asked[:4] == ["spot"] * 4
        assert asked[4] == "on-demand"
        run.stop()
        run.finish(driver, code=3)


@pytest.mark.nightly
def test_a_node_lost_and_a_node_drained(
    cloud: FakeCloud, start: Callable[[str], Run], tmp_path: Path, cache: Path
) -> None:
    run = start("losses")
    with run.going(*LEISURELY, "elastic.workers={min: 1, max: 2}") as driver:
        run.until_size(2, driver)
        run.until_step(run.steps() + 10, driver)
        lost_at = cloud.lose(run.nodes_of(1))
        run.until(lambda: run.events("recovery") and run.sizes()[-1] == 2 and len(run.sizes()) >= 3,
                  "another node in place of the lost", driver)  # fmt: skip
        (incident,) = [event for event in run.events("incident") if event["incident"] == "node"]
        assert incident["time"] - lost_at < 10.0, "before Ray itself notices, which takes it 12 s and more"
        node = run.nodes_of(0)
        asked_at = time.time()
        drained = cloud.orchestrator("drain", node, "--deadline", "2m", "--reason", "maintenance")
        assert drained.returncode == 0, drained.stderr
        run.until(lambda: any(event["incident"] == "drain" for event in run.events("recovery")), "the drain", driver)
        left = next(event for event in run.events("recovery") if event["incident"] == "drain")
        assert left["time"] - asked_at < 60.0, "it does not wait for the deadline of two minutes"
        run.until_size(2, driver)
        assert node not in {member["node"] for member in run.events("generation")[-1]["workers"]}
        cloud_has = cloud.raylets()
        run.until(lambda: node not in cloud.raylets(), f"the end of the drained node: {cloud_has}", driver)
        run.stop()
        run.finish(driver, code=3)
    result = assert_same(run, tmp_path, cache, *LEISURELY)
    assert {recovery["source"] for recovery in result["recoveries"]} == {"peers"}


@pytest.mark.nightly
def test_the_driver_is_killed_and_the_run_goes_on(
    cloud: FakeCloud, start: Callable[[str], Run], tmp_path: Path, cache: Path
) -> None:
    """Followed again by `attach`, and by the same command once more; a second driver on another cluster is refused."""
    run = start("orphan")
    with run.going(*LEISURELY, "elastic.workers={min: 1, max: 2}") as driver:
        run.until_size(2, driver)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    generations = len(run.sizes())
    run.until_step(run.steps() + 20)
    attached = cloud.start_driver("attach", str(run.path))
    # A driver that cannot start does no harm to the run.
    unlucky = subprocess.run(
        [sys.executable, "-m", "orchestrator", *run.command(*LEISURELY, "elastic.workers={min: 1, max: 2}")],
        env=cloud.environment() | {"RAY_ADDRESS": "127.0.0.1:1"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert unlucky.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in unlucky.stderr
    assert not (run.path / "result.json").exists()
    again = cloud.start_driver(*run.command(*LEISURELY, "elastic.workers={min: 1, max: 2}"))
    elsewhere = subprocess.run(
        [sys.executable, "-m", "orchestrator", *run.command(*LEISURELY, "elastic.workers={min: 1, max: 2}")],
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert elsewhere.returncode == 2
    assert "is being run right now" in elsewhere.stderr
    # Looking away leaves the run alone.
    looked = cloud.start_driver("attach", str(run.path))
    assert looked.stdout is not None
    assert any("following it" in line for line in looked.stdout)
    looked.send_signal(signal.SIGINT)
    output, _ = looked.communicate(timeout=PATIENCE_S)
    assert looked.returncode == 0, output
    run.until_step(run.steps() + 20)
    assert len(run.sizes()) == generations, "nothing happened to the workers"
    assert len(run.events("controller")) == 1, "there never was a second controller"
    run.stop()
    for follower in (attached, again):
        output, _ = follower.communicate(timeout=PATIENCE_S)
        assert follower.returncode == 3, output
    assert "stopped" in output
    assert_same(run, tmp_path, cache, *LEISURELY)


@pytest.mark.nightly
def test_an_ephemeral_run_ends_with_its_driver(cloud: FakeCloud, start: Callable[[str], Run]) -> None:
    run = start("ephemeral")
    with run.going(*LEISURELY, "elastic.workers={min: 1, max: 1}", options=("--ephemeral",)) as driver:
        run.until_step(5, driver)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    run.until(lambda: (run.path / "result.json").exists(), "the end of the run")
    assert run.result()["status"] == "stopped"
    assert "silent" in run.result()["reason"]
    assert run.events("checkpoint_saved"), "what it has is kept"


@pytest.mark.nightly
def test_the_controller_is_killed(cloud: FakeCloud, start: Callable[[str], Run], tmp_path: Path, cache: Path) -> None:
    """Training goes on in the same generation, with the same processes, and each successor finds all workers."""
    run = start("headless")
    with run.going(*LEISURELY, "elastic.workers={min: 2, max: 2}") as driver:
        run.until_size(2, driver)
        run.until_step(run.steps() + 10, driver)
        os.kill(run.events("controller")[0]["pid"], signal.SIGKILL)
        killed_at = time.time()
        run.until(lambda: run.events("controller_restarted"), "another controller", driver)
        in_charge_at = run.events("controller_restarted")[0]["time"]
        run.until_step(run.steps() + 20, driver)
        run.stop()
        run.finish(driver, code=3)
    assert run.sizes() == [2], "the generation went on"
    assert [event["workers_found"] for event in run.events("controller_restarted")] == [2]
    committed = [step["committed_at"] for step in read_records(run.path / "metrics.jsonl")]
    assert sum(killed_at < at < in_charge_at for at in committed) > 3, "the workers trained on without any"
    assert_same(run, tmp_path, cache, *LEISURELY)


@pytest.mark.nightly
def test_runs_that_cannot_train_for_want_of_room_take_turns(start: Callable[[str], Run]) -> None:
    """The first has all three nodes and needs a fourth, which there is not: it lets the second train meanwhile."""
    short = ("resources.market=[spot]", "elastic.scaling.shortage_after_s=2", "elastic.scaling.turn_s=10")
    run, later = start("greedy"), start("later")
    with run.going(*LEISURELY, *short, "elastic.workers={min: 4, max: 4}") as driver:
        run.until(lambda: len(run.events("worker_ready")) == 3 and run.events("shortage"), "a shortage", driver)
        with later.going(*LEISURELY, *short, "train.steps=20", "elastic.workers={min: 3, max: 3}") as other:
            assert later.finish(other)["status"] == "finished"
        gave_way = run.events("gave_way")[-1]
        assert (gave_way["to"], gave_way["workers"]) == (later.result()["run"], [0, 1, 2, 3])
        ended = later.events("run_finished")[0]["time"]
        run.until(lambda: sum(event["time"] > ended for event in run.events("worker_ready")) == 3, "its places", driver)
        run.stop()
        run.finish(driver, code=3)


BESIDE = """
import sys
from orchestrator.runtime.ray import following
node = sys.argv.pop(1)
following._head_node = lambda: node
from orchestrator.cli import main
main()
"""
"""The command line, but that controllers go to a node of choice, and not to the head."""


@pytest.mark.nightly
def test_the_node_of_the_controller_drains(
    cloud: FakeCloud, start: Callable[[str], Run], tmp_path: Path, cache: Path
) -> None:
    """Its successor is started elsewhere, before the deadline; training goes on in the same generation."""
    host, run = start("host"), start("guest")
    one = (*LEISURELY, "elastic.workers={min: 1, max: 1}")
    with host.going(*one) as other:
        host.until_step(5, other)
        node = host.nodes_of(0)
        driver = cloud.start_driver(*run.command(*one), program=("-c", BESIDE, node))
        run.until_step(5, driver)
        assert run.events("controller")[0]["node"] == node
        assert run.nodes_of(0) != node
        drained = cloud.orchestrator("drain", node, "--deadline", "5m")
        assert drained.returncode == 0, drained.stderr
        run.until(lambda: run.events("controller_restarted"), "another controller", driver)
        assert run.events("controller")[1]["node"] != node
        run.until_step(run.steps() + 20, driver)
        for each, follower in ((host, other), (run, driver)):
            each.stop()
            each.finish(follower, code=3)
    assert run.sizes() == [1], "the generation went on"
    assert_same(run, tmp_path, cache, *LEISURELY)


def test_ray_job_submit_end_to_end(cloud: FakeCloud, start: Callable[[str], Run], cache: Path) -> None:
    """With the command line of Ray, over the dashboard, with its token; a worker is killed on the way."""
    run = start("submitted")
    sets = [part for value in (f"data.cache={cache}", "train.steps=30", "elastic.workers={min: 2, max: 2}")
            for part in ("--set", value)]  # fmt: skip
    folder = run.path.parent / "folder"
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB.replace("examples.tiny_gpt:build", "mymodel:build"))
    (folder / "mymodel.py").write_text((Path(__file__).parents[2] / "examples" / "tiny_gpt.py").read_text())
    done = cloud.run(
        "ray", "job", "submit", "--address", cloud.dashboard, "--working-dir", str(folder), "--",
        "orchestrator", "run", "job.yaml", "--run-dir", str(run.path), *sets, "--fault", "step=10,worker=1,kind=kill",
        timeout_s=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    result = run.result()
    assert result["status"] == "finished"
    assert [(r["kind"], r["step"], r["steps_lost"]) for r in result["recoveries"]][:1] == [("kill", 10, 0)]


@pytest.mark.nightly
def test_orchestrator_submit_brings_its_own_code_and_ray_job_stop_ends_it(
    cloud: FakeCloud, start: Callable[[str], Run], cache: Path
) -> None:
    run = start("brought")
    folder = run.path.parent / "project"
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    (folder / "mymodel.py").write_text("from tests.small_models import leisurely as build\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "small_models.py").write_text((Path(__file__).parents[1] / "small_models.py").read_text())
    common = ["--address", cloud.dashboard, "--working-dir", str(folder), "--set", f"data.cache={cache}",
              "--set", "model={factory: 'mymodel:build', args: {seconds: 0.02}}", "--set", "data.sequence_length=16",
              "--set", "elastic.workers={min: 1, max: 1}", "--run-dir", str(run.path)]  # fmt: skip
    followed = cloud.orchestrator("submit", str(folder / "job.yaml"), *common, "--follow",
                                  "--set", "train.steps=20")  # fmt: skip
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "finished" in followed.stdout
    assert run.result()["steps"] == 20

    run.path = run.path.with_name("stopped")
    common[-1] = str(run.path)
    sent = cloud.orchestrator("submit", str(folder / "job.yaml"), *common, "--json", "--set", "train.steps=100000")
    assert sent.returncode == 0, sent.stderr
    identity = json.loads(sent.stdout)["submission_id"]
    run.until_step(10)
    stopped = cloud.run("ray", "job", "stop", "--address", cloud.dashboard, identity)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    run.until(lambda: (run.path / "result.json").exists(), "the end of the run")
    result = run.result()
    assert (result["status"], result["reason"]) == ("stopped", "SIGTERM")
    assert run.events("checkpoint_saved")[-1]["committed"] == result["steps"], "nothing is lost by it"


def test_a_job_outside_its_working_directory_is_refused(cloud: FakeCloud, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "job.yaml").write_text(JOB)
    refused = cloud.orchestrator(
        "submit", str(tmp_path / "job.yaml"), "--address", cloud.dashboard, "--working-dir", str(tmp_path / "elsewhere")
    )
    assert refused.returncode == 2
    assert "--working-dir" in refused.stderr


@pytest.mark.nightly
def test_the_head_is_lost_with_everything_and_the_same_command_goes_on(
    tmp_path: Path, cache: Path, cloud: FakeCloud
) -> None:
    """The last test of the cloud: it does not survive. Another has come up at the same address."""
    run = Run(cloud, tmp_path, cache, "lost")
    overrides = (*LEISURELY, "elastic.workers={min: 1, max: 2}", "checkpoint.every_steps=10")
    with run.going(*overrides) as driver:
        run.until_size(2, driver)
        run.until(lambda: run.events("checkpoint_saved"), "a checkpoint", driver)
        run.until_step(run.steps() + 5, driver)
        cloud.stop()
        driver.kill()
        driver.communicate()
    before = run.steps()
    cloud.start()
    with run.going(*overrides) as driver:
        run.until_step(before + 20, driver)
        run.stop()
        result = run.finish(driver, code=3)
    saved = max(event["committed"] for event in run.events("checkpoint_saved") if event["committed"] <= before)
    (restart,) = [recovery for recovery in result["recoveries"] if recovery["source"] == "checkpoint"]
    assert restart["steps_lost"] == before - saved
    reference = undisturbed(run, tmp_path, cache, result["steps"], *LEISURELY)
    assert (result["state_digest"], result["data_digest"]) == (reference["state_digest"], reference["data_digest"])
