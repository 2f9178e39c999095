"""What a run leaves behind is its owner's alone, unless it is shared with a group."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from monitoring.sinks.feeder import _alone
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.ray.preparation import warn_of_open_token
from orchestrator.runtime.ray.session import STARTS, NotStarted, _keep_logs, ray_session


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(directory: Path) -> tuple[set[int], set[int]]:
    """Those of all directories, and of all files."""
    found = [directory, *directory.rglob("*")]
    return {mode(path) for path in found if path.is_dir()}, {mode(path) for path in found if path.is_file()}


def filled(directory: RunDirectory) -> RunDirectory:
    """With a file of every kind that is written by this class."""
    directory.create("name: x\n", {"name": "x"})
    assert directory.uid
    directory.write_json("environment.json", {})
    directory.next_term()
    directory.request("stop")
    with directory.driving():
        os.close(directory.lock())
    return directory


def test_a_new_run_is_its_owners_alone(tmp_path: Path) -> None:
    directory = filled(RunDirectory(tmp_path / "runs" / "one"))
    assert modes(directory.path) == ({0o700}, {0o600})
    assert directory.umask == 0o077
    assert mode(tmp_path / "runs") == 0o755, "what is above it is not ours to close"


def test_what_others_leave_in_a_run_is_no_more_open_than_it(tmp_path: Path) -> None:
    """Ray's logs, which anybody may read where Ray has them, and the lock of those who feed the sinks."""
    ray_logs = tmp_path / "ray" / "session_1" / "logs"
    ray_logs.mkdir(parents=True)
    (ray_logs / "worker-1.out").write_text("said")
    directory = filled(RunDirectory(tmp_path / "one"))
    _keep_logs(tmp_path / "ray", directory.path / "logs")
    with _alone(directory.path) as is_alone:
        assert is_alone
    assert (directory.path / "logs" / "worker-1.out").read_text() == "said"
    assert modes(directory.path) == ({0o700}, {0o600})


def test_a_shared_run_is_its_groups_too(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "one")
    directory.make(shared=True)
    filled(directory)
    directories, files = modes(directory.path)
    assert directories == {0o2770}
    assert files == {0o660}
    assert directory.umask == 0o007


def test_a_private_run_can_be_shared_later(tmp_path: Path) -> None:
    directory = filled(RunDirectory(tmp_path / "one"))
    outside = tmp_path / "outside"
    outside.write_text("not of the run")
    (directory.path / "link").symlink_to(outside)
    directory.make(shared=True)
    directories, files = modes(directory.path)
    assert directories == {0o2770}
    assert files == {0o660, 0o644}
    assert mode(outside) == 0o644, "a link leads out of the run"


def test_a_directory_that_was_there_stays_as_open_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir(mode=0o750)
    directory = RunDirectory(tmp_path / "one")
    directory.make()
    with directory.own_umask():
        (directory.path / "file").touch()
    assert (mode(directory.path), mode(directory.path / "file")) == (0o750, 0o640)


def test_the_umask_is_the_processs_own_again_when_several_write_at_once(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "one")
    directory.make()

    def write(name: str) -> None:
        for _ in range(50):
            directory.write_json(name, {})

    threads = [threading.Thread(target=write, args=(f"{number}.json",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.umask(0o022) == 0o022
    assert modes(directory.path) == ({0o700}, {0o600})


@pytest.mark.parametrize(("file_mode", "who"), [(0o600, ""), (0o400, ""), (0o644, "its group and everybody")])
def test_run_warns_of_a_token_that_others_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_mode: int, who: str
) -> None:
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(file_mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    notes: list[str] = []
    warn_of_open_token(notes.append)
    assert [f"open to {who}; chmod 600 {token}" in note for note in notes] == ([True] if who else [])


@pytest.mark.parametrize("local_nodes", [0, 1])
@pytest.mark.parametrize("failures", [STARTS, STARTS - 1])
def test_a_ray_that_does_not_start_is_started_again_and_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_nodes: int, failures: int
) -> None:
    import ray
    import ray.cluster_utils

    homes: list[Path] = []

    def start(*arguments: object, **options: object) -> MagicMock:
        home = os.environ["RAY_TMPDIR"] if local_nodes else Path(str(options["_temp_dir"])).parent
        homes.append(Path(home))
        if len(homes) <= failures:
            raise Exception("The current node timed out during startup.")
        return MagicMock()

    monkeypatch.setenv("RAY_TMPDIR", "/somewhere")
    monkeypatch.setattr(ray, "init", MagicMock() if local_nodes else start)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray.cluster_utils, "Cluster", start)
    job = Job.load(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
    notes: list[str] = []
    message = r"Ray did not start on this machine: .*timed out during startup; if .* again when it is less so"
    with (
        pytest.raises(NotStarted, match=message) if failures == STARTS else nullcontext(),
        ray_session(job, local_nodes, tmp_path / "logs", notes.append) as own,
    ):
        assert own
        assert failures < STARTS
        assert homes[-1].exists()
    assert len(homes) == len(set(homes)) == STARTS
    assert [note.rpartition("; ")[2] for note in notes] == ["trying once more"] * (STARTS - 1)
    assert not any(home.exists() for home in homes)
    assert os.environ["RAY_TMPDIR"] == "/somewhere"
