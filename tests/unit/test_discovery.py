"""How Prometheus finds runs: files that appear whole, go away, and do not pile up."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from monitoring import discovery
from monitoring.discovery import MAX_BYTES, announce, is_listening, sweep, targets_directory, withdraw


def test_the_directory_lies_beside_rays_own_file() -> None:
    assert targets_directory() == Path("/tmp/ray/orchestrator_targets")
    assert targets_directory("/scratch/ray") == Path("/scratch/ray/orchestrator_targets")


def test_a_run_is_announced_replaced_and_withdrawn(tmp_path: Path) -> None:
    directory = tmp_path / "ray" / "orchestrator_targets"
    umask = os.umask(0o077)
    try:
        path = announce(directory, "quickstart-1", "10.0.0.1", 4000)
    finally:
        os.umask(umask)
    assert path == directory / "quickstart-1.json"
    assert json.loads(path.read_text()) == [
        {"targets": ["10.0.0.1:4000"], "labels": {"job": "orchestrator", "run": "quickstart-1"}}
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(directory.stat().st_mode) == 0o1777

    assert announce(directory, "quickstart-1", "::1", 4001) == path
    assert json.loads(path.read_text())[0]["targets"] == ["[::1]:4001"]
    assert list(directory.iterdir()) == [path], "nothing unfinished is left"
    withdraw(path)
    withdraw(path)
    assert list(directory.iterdir()) == []


def test_a_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    directory = tmp_path / "targets"
    directory.mkdir(mode=0o700)
    announce(directory, "r", "localhost", 1)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_any_run_has_a_file_in_the_directory(tmp_path: Path) -> None:
    path = announce(tmp_path, "../my run", "localhost", 1)
    assert path == tmp_path / "-my-run.json"
    assert json.loads(path.read_text())[0]["labels"]["run"] == "../my run"
    with pytest.raises(ValueError, match="no name"):
        announce(tmp_path, "", "localhost", 1)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        announce(tmp_path, "r", "localhost", 1)
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_what_refuses_connections_and_nothing_else(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # Its port is taken, and nobody listens there.
        live = announce(tmp_path, "live", "127.0.0.1", server.getsockname()[1])
        dead = announce(tmp_path, "dead", "127.0.0.1", bound.getsockname()[1])
        other = tmp_path / "other.json"
        other.write_text('[{"targets": ["127.0.0.1:1"], "labels": {"job": "node"}}]')
        broken = tmp_path / "broken.json"
        broken.write_text("{")
        assert sweep(tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == [broken, live, other]
    assert sweep(tmp_path / "missing") == []


def test_sweep_keeps_a_file_that_was_announced_anew_meanwhile(tmp_path: Path) -> None:
    path = announce(tmp_path, "r", "127.0.0.1", 1)

    def announced_meanwhile(host: str, port: int) -> bool:
        announce(tmp_path, "r", "127.0.0.1", 2)
        return False

    assert sweep(tmp_path, announced_meanwhile) == []
    assert json.loads(path.read_text())[0]["targets"] == ["127.0.0.1:2"]


def test_a_silent_host_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    assert is_listening("192.0.2.1", 80)


def test_a_name_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refused(address: object, **_: object) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refused)
    for name in ("localhost", "head.example", "a..b", "", "127.1"):
        assert is_listening(name, 80), name
    assert asked == []
    assert not is_listening("127.0.0.1", 80)
    assert not is_listening("::1", 80)
    assert asked == [("127.0.0.1", 80), ("::1", 80)]


def _announced(target: str) -> str:
    return json.dumps([{"targets": [target], "labels": {"job": "orchestrator"}}])


@pytest.mark.parametrize(
    "content",
    [
        "[" * MAX_BYTES, "[" * 200_000, "\x00", "\ud800", _announced("a..b:80"), _announced(f"{'a' * 70}.b:80"),
        _announced("127.0.0.1:99999"), _announced("127.0.0.1:-1"), _announced("127.0.0.1:"), _announced("127.0.0.1"),
        _announced("127.0.0.1:" + "9" * 4000), _announced("127.0.0.1\x00:80"), _announced("[::1%nowhere]:80"),
    ],
    ids=range(13),
)  # fmt: skip
def test_whatever_lies_there_a_sweep_goes_on(tmp_path: Path, content: str) -> None:
    # On both sides of the strange file, in whichever order the system lists them.
    for name in ("a", "z"):
        announce(tmp_path, name, "127.0.0.1", 1)
    (tmp_path / "m.json").write_bytes(content.encode(errors="surrogatepass"))
    assert sorted(sweep(tmp_path)) == [tmp_path / "a.json", tmp_path / "z.json"]
    assert list(tmp_path.iterdir()) == [tmp_path / "m.json"]


def test_a_probe_that_fails_in_any_way_does_not_end_the_sweep(tmp_path: Path) -> None:
    for name in ("a", "b"):
        announce(tmp_path, name, "127.0.0.1", 1)
    asked = []

    def broken(host: str, port: int) -> bool:
        asked.append(port)
        raise UnicodeError

    assert sweep(tmp_path, broken) == []
    assert asked == [1, 1]


def test_a_pipe_does_not_block_a_sweep_and_only_small_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    dead = announce(tmp_path / "elsewhere", "r", "127.0.0.1", 1)
    (tmp_path / "link.json").symlink_to(dead)
    (tmp_path / "long.json").write_text(dead.read_text() + " " * MAX_BYTES)
    before = sorted(tmp_path.iterdir())
    removed: list[Path] = []
    sweeping = threading.Thread(target=lambda: removed.extend(sweep(tmp_path)), daemon=True)
    sweeping.start()
    sweeping.join(timeout=60.0)
    assert not sweeping.is_alive(), "it waits for somebody to write to the pipe"
    assert removed == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_sweep_has_only_so_much_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        announce(tmp_path, f"r{number}", "127.0.0.1", 1)
    now = 0.0

    def slow(host: str, port: int) -> bool:
        nonlocal now
        now += 0.25
        return True

    monkeypatch.setattr(discovery, "monotonic", lambda: now)
    assert sweep(tmp_path, slow, budget_s=5.0) == []
    assert now == 5.0
