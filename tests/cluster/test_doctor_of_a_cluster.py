"""`orchestrator doctor` on a real cluster of three raylets with token authentication, well and broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.conftest import PATIENCE_S, wait_for

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
from orchestrator.runtime.ray.session import _FRUGAL, _OBJECT_STORE_BYTES, _without_idle_services
with _without_idle_services():
    head = dict(num_cpus=0, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, _system_config=_FRUGAL)
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=head)
    for _ in range(2):
        cluster.add_node(wait=False, num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES)
    cluster.wait_for_nodes(timeout=60)
print("at", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
TOKEN = "5" * 64


@dataclass
class Live:
    """A cluster in processes of its own, so that its token is nobody else's."""

    address: str
    home: Path
    process: psutil.Process
    token_file: Path

    def environment(self, token_file: Path | None = None, mode: str = "token") -> dict[str, str]:
        rest = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
        return {**rest, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(token_file or self.token_file)}

    def examiners(self) -> list[psutil.Process]:
        """What runs on its nodes for an examination."""
        found = []
        for process in self.process.children(recursive=True):
            with suppress(psutil.Error):
                if "NodeExaminer" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Live]:
    home = Path(tempfile.mkdtemp(prefix="orch-doctor-", dir="/tmp"))
    (home / "ray").mkdir()
    token = home / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    live = Live("", home, psutil.Process(), token)
    environment = {**live.environment(), "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    with open(home / "errors", "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], cwd=Path(__file__).parents[2], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    family: list[psutil.Process] = []
    try:
        line = next((line for line in process.stdout if line.startswith("at ")), "")
        assert line, (home / "errors").read_text()[-2000:]
        live.address, live.process = line.split()[1], psutil.Process(process.pid)
        family = live.process.children(recursive=True)
        yield live
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE_S)
        for left in [process, *family]:
            with suppress(psutil.Error, ProcessLookupError):
                left.kill()
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "doctor", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def doctor(environment: dict[str, str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and the checks."""
    process = start(environment, "--quick", "--json", *arguments)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in errors, errors
    content = json.loads(output)
    assert content["ok"] == (process.returncode == 0)
    return process.returncode, content["checks"]


def stage(name: str, live: Live, environment: dict[str, str], storage: str | None = None) -> list[dict[str, Any]]:
    """The checks of one stage, in a process that has this environment."""
    program = (
        "import json, sys\n"
        "from orchestrator.doctor.check import as_json\n"
        "from orchestrator.doctor.stages import STAGES, Settings\n"
        "from orchestrator.doctor.supervise import examine\n"
        "name, address, storage = sys.argv[1:]\n"
        "stages = [stage for stage in STAGES if stage.name == name]\n"
        "settings = Settings(address, storage, True, 'doctor-test')\n"
        "print(json.dumps(as_json(examine(settings, stages, lambda checks: None))['checks']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name, live.address, storage or ""], env=environment, capture_output=True,
        text=True, check=True, timeout=PATIENCE_S, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return list(json.loads(done.stdout))


def of(checks: list[dict[str, Any]], name: str, *levels: str) -> list[dict[str, Any]]:
    return [check for check in checks if check["name"] == name and (not levels or check["level"] in levels)]


def problems(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [check for check in checks if check["level"] == "problem"]


def test_a_good_cluster_has_no_problem_and_is_left_as_it_was(cluster: Live, tmp_path: Path) -> None:
    storage = tmp_path / "checkpoints"
    code, checks = doctor(cluster.environment(), "--address", cluster.address, "--storage", str(storage))
    assert problems(checks) == []
    assert code == 0
    assert {"address", "nodes", "clock", "ports", "bandwidth", "autoscaler", "dashboard"} <= {c["name"] for c in checks}
    nodes = {check["node"] for check in of(checks, "clock", "ok")}
    assert len(nodes) == 3
    assert {check["node"] for check in of(checks, "versions", "ok")} == nodes | {"this machine"}
    assert {check["node"] for check in of(checks, "storage", "ok")} == nodes | {"this machine"}
    # All share this machine, which may be busy with one of them at the moment: that is a warning at most.
    assert {check["node"] for check in of(checks, "bandwidth", "ok", "warning")} == nodes
    assert [check["found"][:6] for check in of(checks, "ports", "ok")] == ["6 of 6"]
    assert [check["found"] for check in of(checks, "authentication", "ok")][-1] == "every node asks for the token"
    assert [check["level"] for check in of(checks, "token file")] == ["ok"]
    assert [check["found"] for check in of(checks, "head")] == ["offers no CPUs"]
    assert all(check["seconds"] > 0 for check in checks)
    wait_for(lambda: not cluster.examiners(), what="the end of all actors")
    assert not storage.exists()


def test_an_address_at_which_nobody_listens(cluster: Live) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    begin = time.monotonic()
    code, checks = doctor(cluster.environment(), "--address", f"127.0.0.1:{port}")
    assert code == 1
    assert time.monotonic() - begin < 30
    (problem,) = problems(checks)
    assert problem["name"] == "address"
    assert "nobody listens" in problem["found"]
    # This machine is examined all the same.
    assert of(checks, "versions", "ok")


@pytest.mark.nightly
def test_something_else_listens_at_the_address(cluster: Live) -> None:
    with socket.create_server(("", 0)) as server:
        code, checks = doctor(cluster.environment(), "--address", f"127.0.0.1:{server.getsockname()[1]}")
    assert code == 1
    (problem,) = problems(checks)
    assert problem["name"] == "address"
    assert problem["seconds"] < 15
    assert "GCS" in problem["advice"]


@pytest.mark.parametrize(
    ("token", "mode", "said"),
    [("6" * 64, "token", "refuses the token from"), (TOKEN, "disabled", "none is sent"), ("", "token", "is empty")],
)
def test_a_token_that_is_wrong_or_not_there(cluster: Live, tmp_path: Path, token: str, mode: str, said: str) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    file.chmod(0o600)
    (problem,) = problems(stage("address", cluster, cluster.environment(file, mode)))
    assert problem["name"] == "authentication"
    assert said in problem["found"]


def test_a_storage_that_no_node_can_write_to_and_one_that_is_not_shared(cluster: Live, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checks = stage("storage", cluster, cluster.environment(), str(tmp_path / "file" / "checkpoints"))
    assert [check["level"] for check in checks] == ["problem"] * 4
    assert all("Not a directory" in check["found"] for check in checks)

    # fsspec's memory:// is a storage that every process has for itself.
    (problem,) = stage("storage", cluster, cluster.environment(), "memory://doctor/checkpoints")
    assert problem["level"] == "problem"
    assert "is not shared" in problem["found"]


@pytest.mark.nightly
def test_a_command_that_is_ended_in_the_middle_leaves_nothing(cluster: Live, tmp_path: Path) -> None:
    process = start(cluster.environment(), "--address", cluster.address, "--storage", str(tmp_path))
    wait_for(lambda: any(tmp_path.glob("doctor-*/*")), what="a file in the storage")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    wait_for(lambda: not any(tmp_path.iterdir()), what=lambda: str(list(tmp_path.rglob("*"))))
    wait_for(lambda: not cluster.examiners(), what="the end of all actors")


def test_what_goes_to_the_nodes_needs_no_package_of_ours() -> None:
    """Such a node is one of the findings, and the others are made there all the same."""
    pickling = (
        "import sys, ray\n"
        "from monitoring.redaction import learn\n"
        "from orchestrator.runtime.ray.examination import node, nodes\n"
        "learn('a long secret')\n"
        "for name in nodes._SENT: ray.cloudpickle.register_pickle_by_value(sys.modules[name])\n"
        "sys.stdout.buffer.write(ray.cloudpickle.dumps(node.NodeExaminer))\n"
    )
    unpickling = (
        "import json, pickle, sys, tempfile, ray\n"
        "for ours in ('orchestrator', 'monitoring', 'strategies'): sys.modules[ours] = None\n"
        "examiner = pickle.load(sys.stdin.buffer)()\n"
        "home = tempfile.mkdtemp()\n"
        "print(json.dumps([examiner.facts({}), examiner.write_file(home, 'd', 'f', 10),\n"
        "                  examiner.read_file(home, 'd', 'f', 10), examiner.open_store('127.0.0.1')]))\n"
    )
    sent = subprocess.run(
        [sys.executable, "-c", pickling], capture_output=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert b"a long secret" not in sent.stdout, "Ray keeps what is sent so"
    done = subprocess.run(
        [sys.executable, "-c", unpickling], input=sent.stdout, capture_output=True, check=False, cwd="/"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    facts, written, read, port = json.loads(done.stdout)
    assert facts["packages"]["ray"]
    assert facts["code"] is None
    assert written["digest"] == read["digest"]
    assert port > 0
