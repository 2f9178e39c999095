"""What `orchestrator doctor` thinks of what was measured, and how it goes on when measuring itself fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import doctor as command
from orchestrator.doctor import authentication, network, storage_probe, supervise, versions
from orchestrator.doctor import this_machine as machine
from orchestrator.doctor.check import HERE, Check, as_json, is_ok, lines_of, summary
from orchestrator.doctor.facts import interface_facts, machine_facts, token_facts
from orchestrator.doctor.stages import STAGES, SWEEP, ExaminedStage, Settings, chosen
from orchestrator.doctor.storage import Probe, judge_storage, readers
from orchestrator.doctor.supervise import examine
from strategies.comm.interfaces import interface_of

GB = 10**9


def levels(checks: list[Check]) -> dict[str, str]:
    return {check.node: check.level for check in checks}


# ---------------------------------------------------------------------------------------- the report


def test_text_says_what_to_do_and_joins_nodes_of_which_the_same_is_to_be_said() -> None:
    checks = [
        Check("clock", "a", "ok", "right"),
        Check("clock", "b", "ok", "right"),
        Check("disk", "a", "warning", "nearly full", "make room"),
        Check("disk", "b", "warning", "nearly full", "make room"),
    ]
    assert lines_of(checks) == [
        "ok       clock           2 nodes: right",
        "warning  disk            a, b: nearly full",
        "                         do: make room",
    ]
    assert is_ok(checks)
    assert summary(checks) == "4 checks: 0 problems, 2 warnings, 0 notes"


def test_json_has_every_check_of_every_node() -> None:
    checks = [Check("clock", "a", "ok", "right").took(0.12345), Check("ports", "b", "problem", "shut", "open them")]
    content = json.loads(json.dumps(as_json(checks)))
    assert content == {
        "ok": False,
        "checks": [
            {"name": "clock", "node": "a", "level": "ok", "found": "right", "advice": "", "seconds": 0.123},
            {"name": "ports", "node": "b", "level": "problem", "found": "shut", "advice": "open them", "seconds": 0.0},
        ],
    }


@pytest.mark.parametrize("level", ["warning", "problem"])
def test_no_bad_news_without_advice(level: str) -> None:
    with pytest.raises(AssertionError):
        Check("disk", "a", level, "full")


# ---------------------------------------------------------------------------------------- versions


def facts_of(**packages: str | None) -> dict[str, Any]:
    usual = {"ray": "2.60.0", "torch": "2.13.0+cpu", "elastic-orchestrator": "0.1.0"}
    own = {name.replace("_", "-"): version for name, version in packages.items() if name not in ("python", "code")}
    return {
        "python": packages.get("python", "3.11.7"),
        "code": packages.get("code", "abc"),
        "packages": usual | own,
    }


ASKED = {"python": ">=3.11", "ray": "<2.61,>=2.60", "torch": "<2.14,>=2.13"}


@pytest.mark.parametrize(
    ("there", "level", "said"),
    [
        ({}, "ok", "ray 2.60.0"),
        ({"torch": "2.13.0+cu130"}, "warning", "torch 2.13.0+cu130, but 2.13.0+cpu where you are"),
        ({"torch": "2.13.1"}, "problem", "torch 2.13.1, but 2.13.0+cpu"),
        ({"torch": "2.12.0"}, "problem", "torch 2.12.0, which has to be <2.14,>=2.13"),
        ({"ray": None}, "problem", "no ray, which has to be <2.61,>=2.60"),
        ({"elastic_orchestrator": None}, "problem", "no elastic-orchestrator"),
        ({"elastic_orchestrator": "not installed, but importable"}, "warning", "importable"),
        ({"python": "3.11.9"}, "warning", "python 3.11.9, but 3.11.7"),
        ({"python": "3.12.1"}, "problem", "python 3.12.1, but 3.11.7"),
        ({"python": "3.10.1"}, "problem", "python 3.10.1, which has to be >=3.11"),
        ({"code": "def"}, "problem", "other sources of elastic-orchestrator (def) than where you are (abc)"),
    ],
)
def test_versions(there: dict[str, str | None], level: str, said: str) -> None:
    checks = versions.judge_versions({HERE: facts_of(), "b": facts_of(**there)}, ASKED, HERE)
    assert levels(checks) == {HERE: "ok", "b": level}
    assert said in checks[1].found


def test_what_is_asked_for_is_what_pyproject_says() -> None:
    asked = versions.requirements()
    assert set(asked) == {"python", "ray", "torch"}
    assert "2.60" in asked["ray"]
    # The environment that runs the tests was installed by it.
    assert levels(versions.judge_versions({HERE: machine_facts({})}, asked)) == {HERE: "ok"}


# ---------------------------------------------------------------------------------------- authentication


def token_file(tmp_path: Path, mode: int, text: str = "a" * 64) -> dict[str, str]:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(mode)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o400, "ok"), (0o640, "warning"), (0o644, "warning")])
def test_a_token_that_others_can_read_is_a_finding(tmp_path: Path, mode: int, level: str) -> None:
    checks = authentication.judge_token(token_facts(token_file(tmp_path, mode), tmp_path), to_cluster=True)
    assert [check.level for check in checks] == ["ok", level]
    assert f"mode {mode:o}" in checks[1].found
    if level == "warning":
        assert ("everybody" in checks[1].found) == (mode & 0o007 != 0)
        assert "chmod 600" in checks[1].advice


def test_the_token_itself_is_never_told(tmp_path: Path) -> None:
    environment = token_file(tmp_path, 0o600, "sesame-sesame")
    facts = token_facts(environment, tmp_path), token_facts({"RAY_AUTH_TOKEN": "sesame-sesame"}, tmp_path)
    assert "sesame" not in repr(facts)


def test_tokens_are_found_in_the_order_of_ray(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("b" * 64)
    named = token_file(tmp_path, 0o600)
    assert token_facts({**named, "RAY_AUTH_TOKEN": "c"}, tmp_path)["source"] == "RAY_AUTH_TOKEN"
    assert token_facts(named, tmp_path)["path"] == named["RAY_AUTH_TOKEN_PATH"]
    assert token_facts({}, tmp_path)["path"] == str(tmp_path / ".ray" / "auth_token")


@pytest.mark.parametrize(
    ("environment", "to_cluster", "level"),
    [
        ({"RAY_AUTH_MODE": "tokn"}, False, "problem"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "note"),
        ({"RAY_AUTH_MODE": "token"}, True, "problem"),
        ({"RAY_AUTH_MODE": "token"}, False, "note"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, False, "problem"),
        ({}, True, "note"),
    ],
)
def test_tokens_that_are_not_there(tmp_path: Path, environment: dict[str, str], to_cluster: bool, level: str) -> None:
    checks = authentication.judge_token(token_facts(environment, tmp_path), to_cluster=to_cluster)
    assert [check.level for check in checks] == [level]


def test_an_empty_token_file_is_no_token(tmp_path: Path) -> None:
    (check,) = authentication.judge_token(token_facts(token_file(tmp_path, 0o600, "\n"), tmp_path), to_cluster=False)
    assert (check.level, "empty" in check.found) == ("problem", True)


def test_modes_of_the_cluster() -> None:
    assert levels(authentication.judge_modes("token", {"a": "token", "b": "token"})) == {"cluster": "ok"}
    (check,) = authentication.judge_modes("token", {"a": "disabled"})
    assert check.level == "warning"
    assert "here it is on" in check.found
    assert levels(authentication.judge_modes("token", {"a": "token", "b": "disabled"})) == {"b": "problem"}


# ---------------------------------------------------------------------------------------- one machine


@pytest.mark.parametrize(
    ("limits", "num_nodes", "level"),
    [
        ([1024, 1048576], 1, "ok"),  # Ray raises the soft limit
        ([1024, 4096], 1, "warning"),
        ([20000, 20000], 3, "note"),
        ([20000, 20000], 100, "warning"),
        ([65536, 65536], 1000, "ok"),
        ([1024, -1], 1000, "ok"),
    ],
)
def test_open_files(limits: list[int], num_nodes: int, level: str) -> None:
    assert machine.judge_open_files("a", {"open_files": limits}, num_nodes).level == level


@pytest.mark.parametrize(
    ("free", "total", "level"),
    [(80, 200, "ok"), (9, 100, "warning"), (40, 1000, "warning"), (0.5, 4, "problem")],
)
def test_disks(free: float, total: float, level: str) -> None:
    disk = {"path": "/data", "free_bytes": free * GB, "total_bytes": total * GB}
    (check,) = machine.judge_disks("a", {"disks": {"runs": disk}})
    assert check.level == level
    assert "/data" in check.found


def test_the_space_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    disk = machine_facts({"runs": str(tmp_path / "a" / "b")})["disks"]["runs"]
    assert disk["total_bytes"] > disk["free_bytes"] > 0
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("total", "store", "level"),
    [(25 * GB, None, "ok"), (64 << 20, None, "warning"), (25 * GB, 30 * GB, "warning"), (25 * GB, 7 * GB, "ok")],
)
def test_shared_memory(total: int, store: int | None, level: str) -> None:
    memory = {"path": "/dev/shm", "total_bytes": total, "free_bytes": total}
    assert machine.judge_shared_memory("a", {"shared_memory": memory}, store).level == level
    assert machine.judge_shared_memory("a", {"shared_memory": None}).level == "warning"


def gpus(count: int, driver: str | None = "580.1", nccl: str | None = "2.29.1", cuda: str | None = "13.0") -> Any:
    return {"devices": ["H100"] * count, "driver": driver, "nccl": nccl, "torch_cuda": cuda}


@pytest.mark.parametrize(
    ("facts", "ray_gpus", "level", "said"),
    [
        (gpus(0, None, None, None), None, "note", "no GPU: gloo will be used"),
        (gpus(0, None, None, None), 0, "note", "no GPU: gloo will be used"),
        (gpus(4), 4, "ok", "4 x H100"),
        (gpus(4), None, "ok", "NCCL 2.29.1"),
        (gpus(3), 4, "problem", "Ray counts 4, torch sees 3"),
        (gpus(4), 2, "warning", "Ray counts 2"),
        (gpus(0, "580.1", None, None), 0, "warning", "torch is built without CUDA"),
        (gpus(0) | {"error": "driver/library mismatch"}, 0, "problem", "mismatch"),
    ],
)
def test_gpus(facts: dict[str, Any], ray_gpus: float | None, level: str, said: str) -> None:
    check = machine.judge_gpus("a", facts, ray_gpus)
    assert check.level == level
    assert said in check.found


@pytest.mark.parametrize(
    ("facts", "level", "said"),
    [
        ({}, "ok", "eth1 has its address, 25 Gbit/s"),
        ({"bits_per_second": 0}, "ok", "eth1 has its address"),
        ({"name": None}, "warning", "none has the address 10.0.0.3"),
        ({"chosen": "ib0"}, "note", "NCCL_SOCKET_IFNAME is ib0 there"),
    ],
)
def test_the_interface_is_that_of_the_nodes_address(facts: dict[str, Any], level: str, said: str) -> None:
    found = {"host": "10.0.0.3", "name": "eth1", "bits_per_second": 25_000_000_000, "chosen": ""} | facts
    check = network.judge_interface("a", found)
    assert (check.level, said in check.found) == (level, True)


def test_which_interface_has_an_address() -> None:
    found = interface_facts("127.0.0.1")
    assert found["name"] == interface_of("localhost") is not None
    assert interface_of("192.0.2.77") is None
    assert interface_of("no-such-host.invalid") is None


def test_software_of_gpus_is_compared_between_nodes_that_have_some() -> None:
    same = {"a": gpus(1), "b": gpus(1), "head": gpus(0, None, None, None)}
    assert [check.level for check in machine.judge_gpu_software(same)] == ["ok"]
    assert machine.judge_gpu_software({"a": gpus(1), "head": gpus(0)}) == []
    other = same | {"c": gpus(1, nccl="2.27.0"), "d": gpus(1, driver="570.2")}
    assert levels(machine.judge_gpu_software(other)) == {"c": "problem", "d": "warning"}


# ---------------------------------------------------------------------------------------- between nodes


def test_the_offset_of_a_clock_is_corrected_for_the_round_trip() -> None:
    # The second question was answered quickest, and so tells best.
    readings = [
        network.ClockReading(100.0, 103.5, 102.0),
        network.ClockReading(200.0, 202.1, 200.2),
        network.ClockReading(300.0, 301.1, 304.0),
    ]
    offset_s, error_s = network.clock_offset_s(readings)
    assert (offset_s, error_s) == (pytest.approx(2.0), pytest.approx(0.1))
    check = network.judge_clock("a", readings)
    assert check.level == "warning"
    assert "2.000 s ahead of" in check.found


@pytest.mark.parametrize(
    ("offset_s", "trip_s", "level"), [(0.9, 0.0, "ok"), (-1.5, 0.2, "warning"), (1.5, 1.2, "ok"), (0.0, 0.0, "ok")]
)
def test_clocks(offset_s: float, trip_s: float, level: str) -> None:
    reading = network.ClockReading(10.0, 10.0 + trip_s / 2 + offset_s, 10.0 + trip_s)
    assert network.judge_clock("a", [reading]).level == level


def test_connections_are_tried_both_ways_between_all_or_along_a_ring() -> None:
    assert len(network.connections(["a", "b", "c"])) == 6
    many = [str(index) for index in range(20)]
    ring = network.connections(many)
    assert len(ring) == 40
    assert {pair[0] for pair in ring} == {pair[1] for pair in ring} == set(many)


def test_a_connection_that_fails_is_a_problem_of_who_tried() -> None:
    checks = network.judge_connections({("a", "b"): 0.001, ("b", "a"): "10.0.0.1:4242: timed out"})
    assert levels(checks) == {"b": "problem", "cluster": "note"}
    assert "cannot connect to a: 10.0.0.1:4242: timed out" in checks[0].found


@pytest.mark.parametrize("count", range(2, 12))
def test_in_every_round_nobody_is_measured_twice_and_everybody_gets_two_partners(count: int) -> None:
    nodes = [f"n{index}" for index in range(count)]
    rounds = network.rounds(nodes)
    assert len(rounds) == {True: 1 if count == 2 else 2, False: 3}[count % 2 == 0]
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))
    partners = {
        node: {n for pairs in rounds for pair in pairs if node in pair for n in pair} - {node} for node in nodes
    }
    assert all(len(others) == (1 if count == 2 else 2) for others in partners.values()), partners


def measured(count: int, slow: set[int], reach: Callable[[int], float] = lambda node: 0.2) -> network.Speeds:
    """A pair is as fast as its slower node."""
    nodes = [f"n{index}" for index in range(count)]
    speed = {node: 1e9 * (reach(index) if index in slow else 1.0) for index, node in enumerate(nodes)}
    pairs = {pair: [min(speed[node] for node in pair)] * 3 for pairs in network.rounds(nodes) for pair in pairs}
    return network.Speeds(32 * 10**6, "gloo", dict(pairs))


@pytest.mark.parametrize("count", range(3, 10))
def test_the_slow_node_is_named_and_not_its_partners(count: int) -> None:
    for slow in range(count):
        found = levels(network.judge_bandwidth(measured(count, {slow})))
        assert found == {f"n{index}": "warning" if index == slow else "ok" for index in range(count)}


def test_two_slow_nodes_beside_each_other_are_both_named() -> None:
    found = levels(network.judge_bandwidth(measured(8, {3, 4})))
    assert [node for node, level in found.items() if level == "warning"] == ["n3", "n4"]


def test_no_node_is_slow_among_equals_or_above_half_of_the_median() -> None:
    assert set(levels(network.judge_bandwidth(measured(6, set()))).values()) == {"ok"}
    assert set(levels(network.judge_bandwidth(measured(6, {2}, lambda _: 0.6))).values()) == {"ok"}


def test_one_disturbed_repetition_makes_nobody_slow() -> None:
    speeds = measured(4, set())
    speeds.pairs["n0", "n1"] = [1e7, 1e9, 1e9]
    assert set(levels(network.judge_bandwidth(speeds)).values()) == {"ok"}


def test_nodes_that_move_nothing() -> None:
    speeds = measured(4, set())
    for pair in speeds.pairs:
        if "n2" in pair:
            speeds.pairs[pair] = "no answer within 50 s"
    assert levels(network.judge_bandwidth(speeds)) == {"n0": "ok", "n1": "ok", "n2": "problem", "n3": "ok"}
    speeds = measured(4, set())
    speeds.pairs["n0", "n1"] = "connection reset"
    (problem,) = [check for check in network.judge_bandwidth(speeds) if check.level == "problem"]
    assert problem.node == "n0"
    assert "n1: connection reset" in problem.found


# ---------------------------------------------------------------------------------------- storage


def try_storage(url: str, nodes: list[str], roots: dict[str, str] | None = None) -> list[Check]:
    """What `doctor` does on every node, with each node's own idea of where the storage is."""
    where = {node: (roots or {}).get(node, url) for node in nodes}
    names = {node: f"file-{index}" for index, node in enumerate(nodes)}
    whose = readers(nodes)
    written = {node: storage_probe.write_file(where[node], "doctor-1", names[node], 1000) for node in nodes}
    read = {node: storage_probe.read_file(where[node], "doctor-1", names[whose[node]], 1000) for node in nodes}
    for node in nodes:
        assert storage_probe.remove_files(where[node], "doctor-1", [names[node]]) == {} or "error" in written[node]
    for node in nodes:
        storage_probe.remove_directory(where[node], "doctor-1", written[node].get("made", []))
    return judge_storage(url, 1000, [Probe(n, names[n], whose[n], written[n], read[n]) for n in nodes], {})


def test_a_shared_directory_is_left_as_it_was(tmp_path: Path) -> None:
    checks = try_storage(str(tmp_path / "new" / "checkpoints"), ["a", "b", "c"])
    assert levels(checks) == {"a": "ok", "b": "ok", "c": "ok"}
    assert all("writes" in check.found and "reads" in check.found for check in checks)
    assert list(tmp_path.iterdir()) == []


def test_directories_of_the_same_name_on_each_node(tmp_path: Path) -> None:
    (check,) = try_storage("/ckpt", ["a", "b"], {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")})
    assert check.level == "problem"
    assert "every node sees only what it wrote itself" in check.found


def test_the_node_that_does_not_mount_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    shared = str(tmp_path / "shared")
    checks = try_storage("/ckpt", ["a", "b", "c"], {"a": shared, "b": shared, "c": str(tmp_path / "c")})
    said = {check.node: check.found for check in checks}
    assert "does not see what a, b wrote" in said["c"]
    # Who shares it does not see what the third one wrote beside it.
    assert "does not see what c wrote" in said["a"]


def test_a_storage_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (check,) = try_storage(str(tmp_path / "file" / "ckpt"), ["a"])
    assert (check.level, "Not a directory" in check.found) == ("problem", True)
    (check,) = try_storage("s3x://bucket/ckpt", ["a"])
    assert (check.level, "no storage that fsspec knows" in check.found) == ("problem", True)


def test_bytes_that_come_back_changed(tmp_path: Path) -> None:
    good = {"seconds": 1.0, "digest": "1", "made": []}
    read = {"seconds": 1.0, "digest": "2", "visible": ["x"]}
    (check,) = judge_storage("/ckpt", 1000, [Probe("a", "x", "a", good, read)], {})
    assert (check.level, "reads differently" in check.found) == ("problem", True)


def test_files_that_cannot_be_removed_are_told_of() -> None:
    good = {"seconds": 1.0, "digest": "1", "made": []}
    read = {"seconds": 1.0, "digest": "1", "visible": ["x"]}
    checks = judge_storage("/ckpt", 1000, [Probe("a", "x", "a", good, read)], {"a": "Permission denied"})
    assert [check.level for check in checks] == ["ok", "warning"]


# ---------------------------------------------------------------------------------------- when the examination fails


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """These children do not end when they are told to."""
    monkeypatch.setattr(supervise, "LEAVE_S", 0.1)


def in_a_child(code: str) -> Callable[[Settings, int, list[ExaminedStage]], list[str]]:
    """A process that, for each stage, says so, runs `code` (with `stage` and `end`), and says that it is done."""
    program = (
        "import json, os, sys, time\n"
        "out = os.fdopen(int(sys.argv[1]), 'w')\n"
        "say = lambda **message: print(json.dumps(message), file=out, flush=True)\n"
        "for stage in sys.argv[2:]:\n"
        "    say(begin=stage, limit_s=1.0)\n"
        f"    {code}\n"
        "    check = dict(name=stage, node='x', level='ok', found=str(os.getpid()), advice='', seconds=0.0)\n"
        "    say(end=stage, checks=[check], blocked=False)\n"
    )
    return lambda settings, descriptor, stages: [
        sys.executable,
        "-c",
        program,
        str(descriptor),
        *(s.name for s in stages),
    ]


def settings_of(**changes: Any) -> Settings:
    return Settings(**{"address": "a:1", "storage": "/s", "quick": True, "probe": "doctor-0"} | changes)


def run(code: str, stages: list[ExaminedStage]) -> list[Check]:
    told: list[Check] = []
    checks = examine(settings_of(), stages, told.extend, in_a_child(code))
    assert told == checks
    return checks


@pytest.mark.usefixtures("impatient")
def test_a_stage_that_hangs_is_a_problem_and_the_rest_goes_on_in_another_process() -> None:
    checks = run("time.sleep(60 if stage == 'clock' else 0)", chosen(settings_of()))
    assert [check.name for check in checks] == [stage.name for stage in STAGES]
    assert {check.name: check.found for check in checks if check.level == "problem"} == {"clock": "not done within 1 s"}
    pids = [check.found for check in checks if check.level == "ok"]
    assert len(set(pids)) == 2
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_process_that_dies_is_a_problem_with_its_last_words() -> None:
    checks = run("stage == 'ports' and sys.exit('no sockets left')", chosen(settings_of()))
    (problem,) = [check for check in checks if check.level == "problem"]
    assert problem.name == "ports"
    assert problem.found.endswith("exit code 1: no sockets left")
    assert checks[-1].name == "storage"


def test_without_a_way_to_the_cluster_only_this_machine_is_examined() -> None:
    checks = run("stage == 'address' and os.abort()", chosen(settings_of()))
    assert [check.name for check in checks] == ["address", "machine", "GPUs", "bandwidth", "storage"]
    assert "signal 6" in checks[0].found


@pytest.mark.usefixtures("impatient")
def test_what_a_hanging_storage_leaves_is_swept() -> None:
    checks = run("time.sleep(60 if stage.startswith('storage') else 0)", chosen(settings_of()))
    assert [check.level for check in checks[-2:]] == ["problem", "warning"]
    assert checks[-1].advice == SWEEP.advice


@pytest.mark.usefixtures("impatient")
def test_a_process_that_never_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "START_S", 0.5)
    (check,) = examine(
        settings_of(), [STAGES[1]], lambda _: None, lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert check.level == "problem"


# ---------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "address", ["head", "head:0", "head:99999", "::1:6379", "ray://head:10001", "http://head:8265"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="6379"):
        command.cluster_address(address)


def test_addresses_and_storages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert command.cluster_address("[::1]:6379") == "[::1]:6379"
    assert command.cluster_address("auto") == "auto"
    assert command.cluster_address("local") is None
    monkeypatch.chdir(tmp_path)
    assert command.storage_url("runs/x") == str(tmp_path / "runs" / "x")
    assert command.storage_url("s3://bucket/x") == "s3://bucket/x"
    for wrong in ("s3://", "nosuch://bucket"):
        with pytest.raises(ValueError):
            command.storage_url(wrong)


def test_stages_follow_what_is_asked_for() -> None:
    alone = [stage.name for stage in chosen(settings_of(address=None, storage=None))]
    assert alone == ["machine", "GPUs", "bandwidth"]
    assert [stage.name for stage in chosen(settings_of())] == [stage.name for stage in STAGES]
