"""A driver whose terminal, or whose reader, goes away; a run directory that is deleted or full under a run."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runtime.interruption import NOBODY_READS
from tests.cluster.command_line import FEW, CommandLine
from tests.cluster.conftest import PATIENCE_S, wait_for
from tests.in_process import orchestrator
from tests.selection import nightly

LONG = ("--set", "train.steps=20000", "--set", "elastic.workers.max=1", *FEW)


@pytest.fixture
def command(tmp_path: Path, cache: Path) -> CommandLine:
    return CommandLine(tmp_path, cache)


def result_of(command: CommandLine) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((command.run_dir / "result.json").read_text())
    return content


@pytest.mark.nightly
def test_a_run_whose_output_nobody_reads_any_more_stops_with_a_checkpoint(command: CommandLine) -> None:
    """`mkdir run && orchestrator run JOB --run-dir run | head`"""
    command.run_dir.mkdir()
    process = command.start(*LONG)
    assert process.stdout is not None
    while "step" not in process.stdout.readline():
        assert process.poll() is None
    command.remember(process.pid)
    process.stdout.close()
    assert process.wait(timeout=PATIENCE_S) == 3
    result = result_of(command)
    assert (result["status"], result["reason"]) == ("stopped", "nobody reads what the driver prints")
    assert (command.run_dir / "checkpoints" / f"step-{result['steps']:08d}" / "COMMIT").exists()
    assert "the terminal of this driver is gone" in (command.run_dir / "logs" / "driver.log").read_text()
    command.nothing_left()
    for arguments in (["events"], ["status"], ["watch"], ["logs"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments, str(command.run_dir)],
            stdout=writing, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, ""), arguments


@pytest.mark.nightly
def test_a_run_whose_terminal_hangs_up_stops_with_a_checkpoint(command: CommandLine) -> None:
    """Closing a terminal sends SIGHUP to all processes in it, Ray's too."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "import os, fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
         "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])", "-m", "orchestrator", "run", str(command.job),
         "--run-dir", str(command.run_dir), "--set", f"data.cache={command.cache}", *LONG],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    os.close(theirs)

    def trains() -> bool:
        assert process.poll() is None
        while select.select([ours], [], [], 0)[0]:
            os.read(ours, 1 << 16)
        return command.steps() >= 5

    wait_for(trains, what="step 5")
    command.remember(process.pid)
    os.close(ours)
    assert process.wait(timeout=PATIENCE_S) == 3
    result = result_of(command)
    # Whichever it notices first.
    assert (result["status"], result["reason"]) in (("stopped", "SIGHUP"), ("stopped", NOBODY_READS))
    assert (command.run_dir / "checkpoints" / f"step-{result['steps']:08d}" / "COMMIT").exists()
    command.nothing_left()


@pytest.mark.parametrize("storage", nightly([False, True]), ids=["checkpoints in it", "checkpoints elsewhere"])
def test_a_run_whose_directory_is_deleted_has_failed_and_says_so(
    command: CommandLine, tmp_path: Path, storage: bool
) -> None:
    elsewhere = tmp_path / "storage"
    process = command.start(*LONG, *(["--set", f"checkpoint.storage={elsewhere}"] if storage else []))
    command.until_step(process, 5)
    while command.run_dir.exists():  # Files may come while it is at it.
        shutil.rmtree(command.run_dir, ignore_errors=True)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, output
    assert "was deleted or moved away in mid-run" in output
    assert "Traceback" not in output
    assert "failed     0 steps" not in output
    assert list(elsewhere.glob("*/step-*/COMMIT")) if storage else not command.run_dir.exists()
    command.nothing_left()


@pytest.mark.nightly
def test_a_run_goes_on_while_its_directory_is_full_and_writes_its_record_when_there_is_room(
    command: CommandLine, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        command.run_dir = disk / "run"
        elsewhere = ("--set", f"checkpoint.storage={tmp_path / 'storage'}", "--set", "train.steps=400")
        process = command.start(*LONG, *elsewhere)
        assert process.stdout is not None
        told: list[str] = []
        reader = threading.Thread(target=lambda: told.extend(process.stdout or ()))
        reader.start()
        command.until_step(process, 5)
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize) > 0:
                file.write(bytes(free))
        wait_for(lambda: any("cannot be written" in line for line in told), what="a note of the driver")
        ballast.unlink()
        assert process.wait(timeout=PATIENCE_S) == 0, told
        reader.join()
        assert command.steps() == 400
        assert any("records waited" in line for line in told), "".join(told)
        audited = orchestrator("audit", str(command.run_dir))
        assert audited.returncode == 0, audited.stdout + audited.stderr
        command.nothing_left()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
