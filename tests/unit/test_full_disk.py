"""Records on a disk that is full: nothing raises, nothing is torn, and what waits is written when there is room."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from monitoring.records import RecordFile, read_records

LIMIT = 64 << 10


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """No file grows beyond `num_bytes`: writes are short, then fail, as on a disk that fills up."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@contextmanager
def small_disk(at: Path) -> Iterator[Callable[[], None]]:
    """A file system of 1 MiB, filled but for 10 KB; what is yielded makes room. Skips where none can be mounted."""
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(at)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        ballast = at / "ballast"
        with ballast.open("wb", buffering=0) as file:
            left = os.statvfs(at).f_bavail * os.statvfs(at).f_frsize
            file.write(bytes(left - (12 << 10)))
        yield ballast.unlink
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def all_lines_are_whole(path: Path) -> bool:
    return all(isinstance(json.loads(line), dict) for line in path.read_bytes().splitlines())


def test_what_a_full_disk_does_not_take_waits_and_is_written_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    file = RecordFile(path)
    with limited(5000):
        for step in range(200):
            file.append({"step": step, "text": "x" * (step % 71)})
        assert file.num_waiting > 0
        assert isinstance(file.error, OSError)
        assert path.stat().st_size == 5000, "a write was cut short"
        assert steps_of(path) == list(range(200 - file.num_waiting)), "a reader passes over what is not whole yet"
        assert [record["step"] for record in file.records()] == list(range(200))
    assert file.flush()
    assert (file.error, file.num_waiting, steps_of(path)) == (None, 0, list(range(200)))
    assert all_lines_are_whole(path)


def test_the_same_on_a_real_disk_that_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as make_room:
        path = tmp_path / "disk" / "lines.jsonl"
        file = RecordFile(path)
        for step in range(1000):
            file.append({"step": step, "text": "x" * (step % 71)})
        assert file.num_waiting > 0
        make_room()
        file.append({"step": 1000})
        assert (file.num_waiting, steps_of(path)) == (0, list(range(1001)))
        assert all_lines_are_whole(path)


def test_steps_are_taken_off_the_record_also_where_there_is_no_room_to_write_it_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    file = RecordFile(path)
    with limited(5000):
        for step in range(200):
            file.append({"step": step, "text": "x" * 40})
        file.keep(lambda record: record["step"] < 150)
        assert [record["step"] for record in file.records()] == list(range(150))
        assert file.num_waiting, "they do not fit"
        with limited(1000):  # Not even half of what stays.
            file.keep(lambda record: record["step"] < 20)
        assert [record["step"] for record in file.records()] == list(range(20))
        for step in range(20, 30):
            file.append({"step": step})
    assert file.flush()
    assert steps_of(path) == list(range(30))
    assert [entry.name for entry in tmp_path.iterdir()] == ["lines.jsonl"]


def test_what_waits_is_bounded_and_what_is_given_up_is_counted(tmp_path: Path) -> None:
    def shed(record: dict[str, object]) -> dict[str, object] | None:
        return None if record["kind"] == "note" else {key: value for key, value in record.items() if key != "detail"}

    path = tmp_path / "lines.jsonl"
    file = RecordFile(path, most_bytes=20_000, shed=shed)
    with limited(0):
        for step in range(1000):
            file.append({"kind": "note" if step % 2 else "step", "step": step, "detail": "x" * 100})
    assert file.flush()
    assert path.stat().st_size < 40_000
    kept = list(read_records(path))
    assert [record["step"] for record in kept if record["kind"] == "step"] == list(range(0, 1000, 2))
    assert file.dropped["note"] == 500 - sum(record["kind"] == "note" for record in kept) > 300


def test_a_writer_that_dies_on_a_full_disk_leaves_a_record_that_another_goes_on_with(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code = (
        "import os, resource, signal, sys\nfrom pathlib import Path\nfrom monitoring.records import RecordFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "file = RecordFile(Path(sys.argv[1]))\n"
        "for step in range(100):\n    file.append({'step': step})\nos._exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 7
    written = len(steps_of(path))
    assert 0 < written < 100
    file = RecordFile(path)
    for step in range(written, 100):
        file.append({"step": step})
    assert steps_of(path) == list(range(100))
    assert all_lines_are_whole(path)


def test_a_file_that_was_removed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    file = RecordFile(path)
    file.append({"step": 0})
    assert not file.is_gone
    path.unlink()
    assert file.is_gone
    path.write_text("{}")
    assert file.is_gone
