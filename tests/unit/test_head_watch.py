"""A driver that watches the head: what it says when nothing listens there any more, and when something does again."""

from __future__ import annotations

import queue
import socket
import threading
from pathlib import Path

import pytest

from orchestrator.rundir import RunDirectory
from orchestrator.runtime.ray import head_watch
from orchestrator.runtime.ray.head_watch import RECONNECT_VARIABLE, HeadWatch, patience_s
from orchestrator.runtime.ray.session import ClusterError
from tests.unit.run_directories import make_run


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[str]:
    monkeypatch.setattr(head_watch, "TELL_AFTER_S", 0.0)
    monkeypatch.setattr(head_watch, "_PROBE_S", 0.02)
    return queue.Queue()


def test_it_gives_up_before_ray_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RECONNECT_VARIABLE, raising=False)
    assert patience_s() == 40.0
    for setting, expected in (("600", 580.0), ("20", 10.0), ("soon", 40.0)):
        monkeypatch.setenv(RECONNECT_VARIABLE, setting)
        assert patience_s() == expected


def test_it_says_that_the_head_is_gone_and_that_it_is_back(
    tmp_path: Path, notes: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gcs = socket.create_server(("127.0.0.1", 0))
    port = gcs.getsockname()[1]
    watch = HeadWatch(f"127.0.0.1:{port}", RunDirectory(make_run(tmp_path / "run")), notes.put)
    thread = threading.Thread(target=watch.watch, daemon=True)
    thread.start()
    try:
        watch.check()
        gcs.close()
        gone = notes.get(timeout=30)
        assert gone.startswith(f"the head of the cluster at 127.0.0.1:{port} has not answered for")
        assert "refused" in gone
        assert "A head that may be lost" in gone
        monkeypatch.setattr(head_watch, "patience_s", lambda: 0.0)
        with pytest.raises(ClusterError, match=r"workers end with it.*the same command goes on from"):
            watch.check()
        gcs = socket.create_server(("127.0.0.1", port))
        assert "answers again" in notes.get(timeout=30)
        monkeypatch.setattr(head_watch, "patience_s", lambda: 30.0)
        watch.check()
        assert notes.empty(), "each is said once"
    finally:
        watch.close()
        thread.join(10)
        gcs.close()
    assert "A head that may be lost" in (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
