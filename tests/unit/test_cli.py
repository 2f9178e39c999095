"""The command line without a cluster: help, bad input, reading a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.rundir import RunDirectory, RunDirectoryError, find_run

ROOT = Path(__file__).parents[2]


def orchestrator(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_help_needs_neither_ray_nor_torch() -> None:
    code = "import sys; sys.argv = ['orchestrator', '--help']\n" + (
        "from orchestrator.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'ray', 'torch', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("run", "validate", "status", "events", "resize", "stop", "audit"):
        assert f"  {command} " in done.stdout


def test_a_bad_job_reports_every_mistake_with_its_place_and_starts_nothing(tmp_path: Path) -> None:
    text = (ROOT / "examples/quickstart.yaml").read_text()
    bad = text.replace("steps:", "stepz:", 1).replace("tokenizer: bytes", "tokenizer: 5", 1)
    (tmp_path / "bad.yaml").write_text(bad)
    done = orchestrator("run", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("bad.yaml:") for line in lines)
    assert any("stepz" in line and "steps" in line.partition("did you mean")[2] for line in lines)
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.yaml"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "no-such-job.yaml"), "no-such-job.yaml"),
        (("run", "examples/quickstart.yaml", "--set", "train.stepz=3"), "train.stepz"),
        (("run", "examples/quickstart.yaml", "--fault", "step=1,worker=0,kind=kil"), "kill"),
        (("status", "no-such-run"), "no run 'no-such-run'"),
        (("audit", "no-such-run"), "no run 'no-such-run'"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(arguments: tuple[str, ...], expected: str) -> None:
    done = orchestrator(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_prints_the_job_with_all_defaults() -> None:
    done = orchestrator("validate", "examples/quickstart.yaml", "--json", "--set", "train.steps=99")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["job"]["train"]["steps"] == 99
    assert content["job"]["strategy"]["reduction"] == "canonical"
    assert content["digest"].startswith("sha256:")


def test_a_run_that_is_not_live_cannot_be_resized_or_stopped(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {"name": "a", "elastic": {"workers": {"min": 1, "max": 4}}, "train": {"steps": 10}})
    for command in (("resize", str(directory.path), "2"), ("stop", str(directory.path))):
        done = orchestrator(*command)
        assert done.returncode == 2
        assert "is not running now" in done.stderr
    outside = orchestrator("resize", str(directory.path), "9")
    assert outside.returncode == 2
    assert "1 to 4" in outside.stderr


def test_epochs_are_never_given_twice_and_the_lock_is_exclusive(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {})
    assert [directory.next_term() for _ in range(3)] == [1, 2, 3]
    descriptor = directory.lock()
    with pytest.raises(RunDirectoryError, match="another controller"):
        RunDirectory(tmp_path / "run").lock()
    with directory.probe_lock() as free:
        assert not free
    import os

    os.close(descriptor)
    with directory.probe_lock() as free:
        assert free


def test_requests_are_taken_once_and_in_order(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {})
    first = directory.request("resize", workers=2)
    second = directory.request("stop")
    assert [r["id"] for r in directory.take_requests()] == [first, second]
    assert directory.take_requests() == []
    assert directory.answer(first, timeout_s=0.05) is None


def test_a_directory_with_other_things_in_it_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory(tmp_path).create("", {})


def test_find_run_takes_the_newest_of_a_name(tmp_path: Path) -> None:
    for age, name, job in ((30, "a-1", "a"), (10, "a-2", "a"), (20, "ab-3", "ab"), (5, "a-b-4", "a-b")):
        RunDirectory(tmp_path / name).create("", {"name": job})
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert find_run("a", tmp_path).path.name == "a-2", "not a-b-4, which is another job's"
    lock = RunDirectory(tmp_path / "a-1").lock()
    assert find_run("a", tmp_path).path.name == "a-1", "a live run comes before a newer dead one"
    os.close(lock)
    assert find_run(str(tmp_path / "a-1")).path.name == "a-1"
    with pytest.raises(RunDirectoryError, match=r"there: .*a-2"):
        find_run("zebra", tmp_path)


def test_what_is_no_run_directory_is_refused_without_a_traceback(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a directory")
    for path in (occupied, occupied / "below"):
        with pytest.raises(RunDirectoryError, match="cannot be made a run directory"):
            RunDirectory(path).create("", {"name": "a"})
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "job.resolved.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"is not a job; the directory is not of a run"):
        find_run(str(tmp_path / "odd"))


def test_a_job_that_never_began_may_be_mended(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("first", {"name": "a"})
    directory.create("second", {"name": "b"})
    assert (directory.path / "job.yaml").read_text() == "second"
    directory.metrics.write_text("{}\n")
    directory.create("third", {"name": "c"})
    assert (directory.path / "job.yaml").read_text() == "second", "the job of a run is the one it began with"


def test_those_who_look_whether_a_run_is_live_are_not_taken_for_its_controller(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {"name": "a"})
    looking = os.open(directory.path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    with directory.probe_lock() as free:
        assert free
    with pytest.raises(RunDirectoryError, match="is steered by another controller"):
        directory.lock()
    threading.Timer(0.1, os.close, (looking,)).start()
    steering = directory.lock(patience_s=10.0)
    with directory.probe_lock() as free:
        assert not free
    os.close(steering)


def test_looking_whether_a_run_is_live_leaves_nothing_behind(tmp_path: Path) -> None:
    plain = tmp_path / "out"
    plain.mkdir()
    for _ in range(2):
        assert not RunDirectory(plain).is_steered
        assert list(plain.iterdir()) == []
    RunDirectory(plain).create("name: x", {"name": "x"})
    assert RunDirectory(plain).read_json("job.resolved.json") == {"name": "x"}


def test_a_directory_with_nothing_but_our_own_dot_files_is_empty(tmp_path: Path) -> None:
    ours = RunDirectory(tmp_path / "out")
    ours.path.mkdir()
    os.close(ours.lock())
    assert ours.uid
    ours.next_term()
    ours.create("name: x", {"name": "x"})
    others = tmp_path / "others"
    others.mkdir()
    (others / ".hidden").touch()
    with pytest.raises(RunDirectoryError, match="not empty and not a run directory"):
        RunDirectory(others).create("name: x", {"name": "x"})
    assert [entry.name for entry in others.iterdir()] == [".hidden"]
