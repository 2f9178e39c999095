"""The cluster files are ones that Ray takes: its launcher, its autoscaler's scheduler, its command line.

Everything here is asked of Ray's own code, but for starting nodes. test_kubernetes_files.py does the same for KubeRay.
"""

from __future__ import annotations

import copy
import os
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.core.generated.autoscaler_pb2 import GangResourceRequest, ResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator

from tests.unit.command_lines import calls_in_shell, commands_in_comments, commands_in_markdown, parse

ROOT = Path(__file__).parents[2]
CLOUD = {"aws": ROOT / "cluster.yaml", "gcp": ROOT / "examples/clusters/gcp.yaml"}
LAUNCHER = {**CLOUD, "local": ROOT / "examples/clusters/local-fake.yaml"}
COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
MARKET = "ray.io/market-type"


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def shell_commands(path: Path) -> list[str]:
    cluster = load(path)
    return [command for part in COMMANDS for command in cluster.get(part, [])]


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]}


def node_types(path: Path) -> dict[str, NodeTypeConfig]:
    """As the autoscaler reads them; on AWS with what Ray would learn from EC2: a g5.2xlarge has 8 CPUs and a GPU."""
    cluster = load(path)
    if path == CLOUD["aws"]:
        for kind in workers(cluster).values():
            assert kind["resources"] == {}
            assert kind["node_config"]["InstanceType"] == "g5.2xlarge"
            kind["resources"] = {"CPU": 8, "GPU": 1}
    types = AutoscalingConfig(cluster, skip_content_hash=True).get_node_type_configs()
    assert types is not None
    return types


def launched(
    types: dict[str, NodeTypeConfig], count: int, resources: dict[str, float], **labels: str
) -> dict[str, int]:
    """What Ray's autoscaler starts on an empty cluster for `count` pending placement groups of one bundle each."""
    bundle = ResourceRequest(resources_bundle=resources)
    if labels:
        selector = bundle.label_selectors.add()
        for key, value in labels.items():
            selector.label_constraints.add(
                label_key=key, operator=LabelSelectorOperator.LABEL_OPERATOR_IN, label_values=[value]
            )
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=sum(kind.max_worker_nodes for kind in types.values()),
            gang_resource_requests=[GangResourceRequest(requests=[bundle]) for _ in range(count)],
        )
    )
    started = {request.instance_type: request.count for request in reply.to_launch}
    refused = len(reply.infeasible_gang_resource_requests)
    return {**started, "infeasible": refused} if refused else started


@pytest.mark.parametrize("path", LAUNCHER.values(), ids=LAUNCHER)
def test_rays_launcher_takes_the_file(path: Path) -> None:
    cluster = load(path)
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    setup = cluster["setup_commands"]
    assert prepared["head_setup_commands"] == setup + cluster["head_setup_commands"]
    assert prepared["worker_setup_commands"] == setup + cluster.get("worker_setup_commands", [])
    for part in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[part] == cluster[part], "nothing of Ray's defaults is left in it"
    assert cluster["max_workers"] <= sum(kind["max_workers"] for kind in workers(cluster).values())


@pytest.mark.parametrize("path", LAUNCHER.values(), ids=LAUNCHER)
def test_the_head_has_no_cpus_and_the_workers_come_and_go(path: Path) -> None:
    cluster = load(path)
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head.get("min_workers", 0) == head.get("max_workers", 0) == 0
    assert all(kind["min_workers"] == 0 for kind in workers(cluster).values())
    assert 0 < cluster["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("path", LAUNCHER.values(), ids=LAUNCHER)
def test_every_node_type_says_which_market_it_is_of(path: Path) -> None:
    cluster = load(path)
    assert {kind["labels"][MARKET] for kind in workers(cluster).values()} == {"spot", "on-demand"}
    for name, kind in cluster["available_node_types"].items():
        config, labels = kind["node_config"], kind.get("labels", {})
        if path == CLOUD["aws"]:
            spot = config.get("InstanceMarketOptions") == {"MarketType": "spot"}
        elif path == CLOUD["gcp"]:
            spot = config.get("scheduling", {}).get("provisioningModel") == "SPOT"
        else:
            continue
        assert labels[MARKET] == ("spot" if spot else "on-demand"), name
        assert labels["ray.io/availability-zone"] == cluster["provider"]["availability_zone"], name
    if path in CLOUD.values():
        assert len({kind["labels"]["ray.io/accelerator-type"] for kind in workers(cluster).values()}) == 1


@pytest.mark.parametrize("path", LAUNCHER.values(), ids=LAUNCHER)
def test_the_autoscaler_starts_spot_first_or_what_a_job_asks_for(path: Path) -> None:
    types = node_types(path)
    of = {types[name].labels[MARKET]: name for name in workers(load(path))}
    spot, on_demand = of["spot"], of["on-demand"]
    one = {"CPU": 1.0} if path == LAUNCHER["local"] else {"CPU": 1.0, "GPU": 1.0}
    most = types[spot].max_worker_nodes
    assert launched(types, 2, one) == {spot: 2}
    assert launched(types, 2, one, **{MARKET: "on-demand"}) == {on_demand: 2}
    assert launched(types, most + 1, one) == {spot: most, on_demand: 1}
    assert launched(types, most + 1, one, **{MARKET: "spot"}) == {spot: most, "infeasible": 1}
    assert launched(types, 1, one, **{MARKET: "reserved"}) == {"infeasible": 1}


@pytest.mark.parametrize("path", CLOUD.values(), ids=CLOUD)
def test_every_ray_is_started_in_token_mode_with_the_token_of_the_launching_machine(path: Path) -> None:
    cluster = load(path)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]
    starts = [line for line in shell_commands(path) if ["ray", "start"] in [call[:2] for call in calls_in_shell(line)]]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start " in line for line in starts)
    assert any("RAY_AUTH_MODE=token' >> ~/.bashrc" in line for line in cluster["setup_commands"]), "drivers as well"


@pytest.mark.parametrize("path", CLOUD.values(), ids=CLOUD)
def test_what_the_nodes_install_from_is_copied_to_them(path: Path) -> None:
    cluster = load(path)
    mounts = {remote: local for remote, local in cluster["file_mounts"].items() if "auth_token" not in remote}
    assert all(remote == f"~/elastic-orchestrator/{local}" for remote, local in mounts.items())
    assert all((ROOT / local).exists() for local in mounts.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = packages | {"Makefile", "pyproject.toml", "requirements.lock", project["project"]["readme"]}
    assert set(mounts.values()) == needed
    assert "/shared" in " ".join(cluster["initialization_commands"])


@pytest.mark.parametrize("cloud", CLOUD)
def test_the_start_commands_of_a_worker_return_and_leave_one_watcher_running(cloud: str, tmp_path: Path) -> None:
    """Run as the launcher runs them, with programs that note how they were called in place of Ray and ours."""
    commands = load(CLOUD[cloud])["worker_start_ray_commands"]
    with _started_twice(commands, "node-watcher", tmp_path) as calls:
        assert calls == [
            f"orchestrator node-watcher --source {cloud} --address 10.0.0.1:6379 mode=token",
            "ray start --address=10.0.0.1:6379 --metrics-export-port=8080 mode=token wait=600",
            "ray stop mode= wait=",
        ]


@pytest.mark.parametrize("cloud", CLOUD)
def test_the_start_commands_of_a_head_return_and_leave_one_that_starts_it_again(cloud: str, tmp_path: Path) -> None:
    lines = load(CLOUD[cloud])["head_start_ray_commands"]
    commands = [
        line for line in lines if "ray-head.pid" in line or ["ray"] in [call[:1] for call in calls_in_shell(line)]
    ]
    with _started_twice(commands, "--block", tmp_path) as calls:
        assert calls == [
            "ray health-check --address=127.0.0.1:6379 mode=token wait=",
            "ray start --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1 "
            f"--metrics-export-port=8080 --block mode=token wait=600 tables={tmp_path}/ray-tables",
            "ray stop mode= wait=",
        ]
        (tmp_path / "calls").write_text("")
        os.kill(int((tmp_path / "blocks").read_text().splitlines()[-1]), 9)
        _wait_until(lambda: "--block" in (tmp_path / "calls").read_text())


@contextmanager
def _started_twice(commands: list[str], what_stays: str, home: Path) -> Iterator[list[str]]:
    """The second time as `ray up` does on a node that is up already: what `what_stays` is in starts once each time, and
    that of the first time is gone. Gives the calls, each once."""
    programs = home / "bin"
    programs.mkdir()
    ray = " wait=$RAY_gcs_rpc_server_reconnect_timeout_s${RAY_gcs_storage:+ tables=$RAY_gcs_storage_path}"
    for name, more in (("ray", ray), ("orchestrator", "")):
        (programs / name).write_text(
            f'#!/bin/sh\necho "{name} $* mode=$RAY_AUTH_MODE{more}" >> ~/calls\n'
            'case "$*" in *--block*|*node-watcher*) echo $$ >> ~/blocks; exec sleep 200;; esac\n'
        )
        (programs / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin"}
    calls = home / "calls"
    started: list[int] = []
    try:
        for number in (1, 2):
            for line in commands:
                shell = f"(export RAY_HEAD_IP=10.0.0.1; {line})"
                subprocess.run(["bash", "-c", shell], env=environment, check=True, timeout=50)
            (pid_file,) = home.glob("*.pid")
            started.append(int(pid_file.read_text()))
            _wait_until(lambda number=number: calls.read_text().count(what_stays) == number)
        _wait_until(lambda: not _runs(started[0]))
        assert _runs(started[1])
        yield sorted(set(calls.read_text().splitlines()))
    finally:
        for pid in [*started, *map(int, (home / "blocks").read_text().split())]:
            if _runs(pid):
                os.kill(pid, 9)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "30 s are over"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie (nobody may be left to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_local_cluster_is_reached_where_its_file_says() -> None:
    text = LAUNCHER["local"].read_text()
    provider = load(LAUNCHER["local"])["provider"]
    port = provider["gcs_address"].rpartition(":")[2]
    assert f"--port={port}" in text
    assert f"RAY_ADDRESS={provider['gcs_address']}" in text
    assert f"RAY_CLOUD_INSTANCE_ID={provider['head_node_id']}" in text
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

    assert provider["head_node_id"] == FAKE_HEAD_NODE_ID
    assert load(LAUNCHER["local"])["head_node_type"] == FAKE_HEAD_NODE_TYPE


def _documented() -> dict[str, list[str]]:
    files = [*LAUNCHER.values(), *sorted((ROOT / "examples/clusters").iterdir())]
    told = {str(path.relative_to(ROOT)): commands_in_comments(path.read_text()) for path in files}
    for path in LAUNCHER.values():
        told[str(path.relative_to(ROOT))] += shell_commands(path)
    told["docs/clusters.md"] = commands_in_markdown((ROOT / "docs/clusters.md").read_text())
    return told


@pytest.mark.parametrize("file", _documented())
def test_every_command_is_one_that_bash_ray_and_orchestrator_understand(file: str) -> None:
    commands = _documented()[file]
    assert commands, "what to type is in the file"
    for command in commands:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}\n{checked.stderr}"
        for call in calls_in_shell(command):
            try:
                parse(call)
            except Exception as error:
                pytest.fail(f"{' '.join(call)}: {error}")


@pytest.mark.parametrize(
    "command",
    ["orchestrator frobnicate", "orchestrator run --nope job.yaml", "orchestrator monitoring nope", "ray start --heads",
     "cd x && RAY_ADDRESS=auto orchestrator statos RUN > file", "ray job submit -- orchestrator run --nope job.yaml"],
)  # fmt: skip
def test_a_command_that_is_none_is_found(command: str) -> None:
    with pytest.raises(Exception, match=r"No such (command|option)"):
        list(map(parse, calls_in_shell(command)))


def test_the_documentation_tells_of_every_file() -> None:
    text = (ROOT / "docs/clusters.md").read_text()
    assert all(path.name in text for path in [ROOT / "cluster.yaml", *(ROOT / "examples/clusters").iterdir()])
