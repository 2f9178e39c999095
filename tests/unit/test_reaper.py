"""Who belongs to a session, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.runtime import reaper

SLEEP = "import sys, time; file = open(sys.argv[1], sys.argv[2]); print(flush=True); time.sleep(600)"


@contextmanager
def process(path: Path, mode: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-S", "-c", SLEEP, str(path), mode]
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child
        finally:
            child.kill()


def test_a_session_ends_all_processes_with_its_mark_and_no_others(tmp_path: Path) -> None:
    session, other = tmp_path / "session", tmp_path / "session-2"
    for directory in (session, other):
        directory.mkdir()
        (directory / "log").touch()
    with (
        process(Path(os.devnull), "w", **{reaper.MARK: str(session)}) as by_environment,
        process(session / "log", "a") as by_file,
        process(session / "log", "r") as reader,
        process(other / "log", "a", **{reaper.MARK: str(other)}) as stranger,
    ):
        assert sorted(reaper.marked(str(session))) == sorted([by_environment.pid, by_file.pid])
        reaper.end_session(str(session), 0.0, spare=frozenset({by_file.pid}))
        assert by_environment.wait(10) == -9
        assert by_file.poll() is None
        reaper.end_session(str(session), 0.0)
        assert by_file.wait(10) == -9
        assert reader.poll() is None
        assert stranger.poll() is None


def test_the_reaper_acts_when_the_process_that_started_it_ends(tmp_path: Path) -> None:
    with process(tmp_path / "log", "w") as child:
        guard = reaper.start(str(tmp_path))
        assert guard.stdin is not None
        assert child.poll() is None
        guard.stdin.close()
        assert child.wait(10) == -9
        assert guard.wait(10) == 0
