"""A cloud's notice, a shutdown signal and `orchestrator drain`, on a real Ray with tokens and two worker nodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.conftest import PATIENCE_S, wait_for
from tests.fake_metadata import AWS, SPOT, MetadataServer

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


class RealRay:
    """See node_watcher_cluster.py. `environment` is what reaches it, and nothing else of this machine's Rays."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "ray").mkdir()
        (home / "token").write_text("of-this-test-alone-0123456789abcdef")
        (home / "token").chmod(0o600)
        known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = known | {
            "RAY_TMPDIR": str(home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "node_watcher_cluster.py"), str(home)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=(home / "stderr").open("w"), text=True, env=self.environment,
        )  # fmt: skip

    def connect(self) -> None:
        self.about = self.answer()
        self.environment["RAY_ADDRESS"] = self.about["address"]

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith(("{", '"')):  # Ray says this and that.
            line = self.process.stdout.readline()
        assert line, (self.home / "stderr").read_text()
        return json.loads(line)

    def ask(self, *words: str) -> Any:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def seconds_to_drain(self, node: str) -> float | None:
        deadline_ms = self.ask("draining").get(node)
        return None if deadline_ms is None else deadline_ms / 1000 - time.time()

    def orchestrator(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments], env=self.environment | changed, capture_output=True,
            text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def watcher(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "node-watcher", *arguments], env=self.environment,
            stdout=log.open("ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip


def family(started: subprocess.Popen[Any]) -> list[psutil.Process]:
    """A process of ours and all below it, while it lives."""
    if started.poll() is not None:
        return []
    process = psutil.Process(started.pid)
    return [process, *process.children(recursive=True)]


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@pytest.fixture(scope="module")
def ray_with_two_nodes() -> Iterator[tuple[RealRay, subprocess.Popen[bytes], Path]]:
    """The second node is started by `ray start --block` below a watcher."""
    home = Path(tempfile.mkdtemp(prefix="orch-nw-", dir="/tmp"))
    real = RealRay(home)
    wrapper: subprocess.Popen[bytes] | None = None
    try:
        real.connect()
        log = home / "wrapper.log"
        wrapper = real.watcher(
            log, "--source", "none", "--grace", "20", "--", str(Path(sys.executable).with_name("ray")), "start",
            f"--address={real.about['address']}", "--block", "--num-cpus=1", "--object-store-memory=80000000",
            "--disable-usage-stats",
        )  # fmt: skip
        yield real, wrapper, log
    finally:
        mine = family(real.process) + ([] if wrapper is None else family(wrapper))
        assert real.process.stdin is not None
        real.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            real.process.wait(timeout=PATIENCE_S)
        end(mine)
        shutil.rmtree(home, ignore_errors=True)


def test_drains(ray_with_two_nodes: tuple[RealRay, subprocess.Popen[bytes], Path], tmp_path: Path) -> None:
    """One story, as a Ray takes seconds to start: bad input, a planned drain, an earlier notice, a shutdown."""
    real, wrapper, wrapper_log = ray_with_two_nodes
    head, node, address = real.about["head"], real.about["node"], real.about["address"]
    real.ask("place", "demo/worker-0.0", node)

    unknown = real.orchestrator("drain", "10.9.8.7")
    assert unknown.returncode == 2
    assert f"no node '10.9.8.7' in the cluster at {address}; there are:" in unknown.stderr
    assert node[:8] in unknown.stderr
    of_the_head = real.orchestrator("drain", head[:8])
    assert of_the_head.returncode == 2
    assert "is the head, which cannot be drained" in of_the_head.stderr
    several = real.orchestrator("drain", address.partition(":")[0])
    assert several.returncode == 2
    assert "names" in several.stderr
    assert "say which by its id" in several.stderr
    stranger = real.orchestrator("drain", node, RAY_AUTH_MODE="disabled")
    assert stranger.returncode == 1
    assert "it wants another token" in stranger.stderr
    assert real.ask("draining") == {}, "none of this has drained anything"

    planned = real.orchestrator("drain", node[:6], "--deadline", "10m", "--reason", "new disks", "--json")
    assert planned.returncode == 0, planned.stderr
    content = json.loads(planned.stdout)
    assert (content["node_id"], content["reason"], content["was_draining"]) == (node, "new disks", False)
    assert real.seconds_to_drain(node) == pytest.approx(600, abs=15)

    log = tmp_path / "watcher.log"
    with MetadataServer(AWS) as cloud:
        # Found by itself, it would be every raylet of this machine.
        watcher = real.watcher(log, "--source-url", cloud.url, "--node-id", node[:12], "--poll", "0.2")
        wait_for(lambda: "found the metadata service of aws" in log.read_text(), what=log.read_text)
        at = time.time() + 120
        cloud.paths[SPOT] = json.dumps(
            {"action": "terminate", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))}
        )
        wait_for(lambda: "drains for" in log.read_text(), what=log.read_text)
        assert real.seconds_to_drain(node) == pytest.approx(at - time.time(), abs=2)
        watcher.send_signal(signal.SIGTERM)
        assert watcher.wait(timeout=PATIENCE_S) == 0, log.read_text()

    shut_down(real, wrapper, wrapper_log, {head, node})


def shut_down(real: RealRay, wrapper: subprocess.Popen[bytes], log: Path, others: set[str]) -> None:
    """SIGTERM to `orchestrator node-watcher -- ray start --block` while one of our actors is on its node."""
    from orchestrator.runtime.ray.node_watcher.local import raylets_below

    wait_for(lambda: real.ask("alive").keys() >= raylets_below(wrapper.pid).keys() > set(), what=log.read_text)
    (second, address), = raylets_below(wrapper.pid).items()  # fmt: skip
    assert address == real.about["address"]
    assert second not in others
    real.ask("place", "demo/worker-1.0", second)
    wrapper.send_signal(signal.SIGTERM)
    wait_for(lambda: "waiting for 1 of our actors to leave: demo/worker-1.0" in log.read_text(), what=log.read_text)
    assert real.seconds_to_drain(second) == pytest.approx(20, abs=5)
    time.sleep(1.0)
    assert wrapper.poll() is None
    assert raylets_below(wrapper.pid), "the node lives until our actor has left"
    assert "passing" not in log.read_text()
    left_at = time.monotonic()
    real.ask("kill", "demo/worker-1.0")
    assert wrapper.wait(timeout=PATIENCE_S) == 1, "what `ray start --block` itself ends with after SIGTERM"
    assert time.monotonic() - left_at < 10, log.read_text()
    said = log.read_text()
    assert said.index("none of our actors is on this node any more") < said.index("passing SIGTERM on")
    gone = real.orchestrator("drain", second)
    assert gone.returncode == 2
    assert "is dead already" in gone.stderr
