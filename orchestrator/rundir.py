"""The run directory: everything a run leaves behind, and the only state a restarted controller needs.

job.yaml             the job file as given          events.jsonl    one record per thing that happened
job.resolved.json    with all defaults              metrics.jsonl   one record per committed step
environment.json     versions, machine, data        result.json     written when the run ends
checkpoints/         step-00000120/ ...             control/        requests of `orchestrator resize` and `stop`
logs/                .run            its identity   .epoch-*        one per controller there ever was (fencing)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from monitoring.records import read_records

_UMASK = threading.RLock()
"""Held while the umask, of which a process has one, is not its own."""


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used as asked; says which, why and what to do."""


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).resolve()

    @property
    def run_id(self) -> str:
        """A name for actors: the directory's own, made unique by its full path."""
        return f"{self.path.name}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:8]}"

    @property
    def uid(self) -> str:
        """What makes this run another than all others, wherever its directory is moved. Made when it is first asked
        for."""
        path = self.path / ".run"
        with suppress(FileExistsError):
            with self.own_umask():
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            with os.fdopen(descriptor, "w") as file:
                file.write(uuid.uuid4().hex)
        return path.read_text().strip()

    def checkpoint_storage(self, storage: str | None) -> str:
        """Where this run's checkpoints are: in it, or in a directory of its own below a path or URL."""
        if storage is None:
            return str(self.path / "checkpoints")
        base = storage if "://" in storage else str(Path(storage).resolve())
        return f"{base.rstrip('/')}/{self.path.name}-{self.uid[:8]}"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def forked_at(self) -> int:
        """The first step of a run that was forked from another; 0 for one that was not."""
        forked = self.read_json("fork.json")
        return 0 if forked is None else int(forked["step"])

    @property
    def has_begun(self) -> bool:
        """Whether anything was trained: a job that could not start may be mended and tried again in the same place."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    @property
    def umask(self) -> int:
        """What files made here lack, so that they are as open as the directory itself. Raises OSError."""
        return ~self.path.stat().st_mode & 0o077

    @contextmanager
    def own_umask(self) -> Iterator[None]:
        """What this process makes in the block is as open as the directory. For a moment only: all threads have it."""
        with _UMASK:
            before = os.umask(self.umask)
            try:
                yield
            finally:
                os.umask(before)

    def make(self, *, shared: bool = False) -> None:
        """Makes the directory: for its owner alone, or `shared` with its group. One that is there stays as it is;
        `shared` opens it to its group, with all that is in it.

        Raises RunDirectoryError.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            if shared:
                _share(self.path)
        except OSError as error:
            what = "be shared with its group" if shared else "be made a run directory"
            raise RunDirectoryError(f"{self.path} cannot {what}: {error}") from error

    def create(self, job_text: str, resolved: dict[str, Any]) -> None:
        """Lays the directory out, or checks that it is of the same job.

        Raises RunDirectoryError when the directory is of a job with other numbers, naming the fields that differ.
        """
        self.make()
        try:
            with self.own_umask():
                self._lay_out(job_text, resolved)
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be made a run directory: {error}; choose another") from error

    def _lay_out(self, job_text: str, resolved: dict[str, Any]) -> None:
        known = self.read_json("job.resolved.json")
        is_fork = (self.path / "fork.json").exists()
        if known is None and not is_fork and self.path.is_dir() and any(self.path.iterdir()):
            raise RunDirectoryError(f"{self.path} is not empty and not a run directory; choose another --run-dir")
        for part in ("checkpoints", "logs", "control"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        if known is None or not self.has_begun:
            (self.path / "job.yaml").write_text(job_text)
        # What a run goes on with counts: other workers, other faults, ...
        self.write_json("job.resolved.json", resolved)

    def read_json(self, name: str) -> Any:
        """A JSON file's content; None when it is not there."""
        try:
            return json.loads((self.path / name).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise RunDirectoryError(f"{self.path / name} is not valid JSON: {error}") from error

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file whole: readers see the old or the new content."""
        draft = self.path / f".{name}.{uuid.uuid4().hex[:8]}"
        try:
            with self.own_umask():
                draft.write_text(json.dumps(value, indent=2, default=str) + "\n")
            os.replace(draft, self.path / name)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise

    def next_epoch(self) -> int:
        """Claims the next controller epoch of this run; no two controllers ever get the same."""
        epoch = 1 + self.newest_epoch()
        while True:
            try:
                with self.own_umask():
                    os.close(os.open(self.path / f".epoch-{epoch}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                epoch += 1
            else:
                return epoch

    def newest_epoch(self) -> int:
        """The highest epoch that a controller has claimed; 0 when there was none."""
        return max((int(path.name.removeprefix(".epoch-")) for path in self.path.glob(".epoch-*")), default=0)

    def lock(self, patience_s: float = 0.0) -> int:
        """Takes the run for this process until it ends; waits up to `patience_s`, as others may have it for a moment
        to see whether it is free.

        Raises RunDirectoryError when another process has it.
        """
        descriptor = self._open_lock()
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                os.close(descriptor)
                raise RunDirectoryError(
                    f"{self.path} is steered by another controller; follow it with `orchestrator status {self.path}` "
                    "or end it with `orchestrator stop`"
                ) from error
            return descriptor

    def _open_lock(self) -> int:
        with self.own_umask():
            return os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o666)

    @contextmanager
    def probe_lock(self) -> Iterator[bool]:
        """Whether nobody steers this run right now. Those who ask at the same time do not take each other for one."""
        descriptor = self._open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            free = False
        else:
            free = True
        finally:
            os.close(descriptor)
        yield free

    @property
    def is_steered(self) -> bool:
        """Whether a controller has the run right now."""
        if not self.path.is_dir():
            return False
        with self.probe_lock() as free:
            return not free

    # -------------------------------------------------------------------------------- requests from the command line

    def request(self, kind: str, **fields: Any) -> str:
        """Leaves a request for the controller; returns its id."""
        name = f"{time.time():.6f}-{uuid.uuid4().hex[:8]}"
        draft = self.path / "control" / f".{name}"
        with self.own_umask():
            draft.touch()
        draft.write_text(json.dumps({"id": name, "kind": kind, **fields}))
        os.replace(draft, self.path / "control" / f"{name}.json")
        return name

    def take_requests(self) -> list[dict[str, Any]]:
        """The requests left since last time, oldest first; each is given once."""
        taken = []
        for path in sorted((self.path / "control").glob("*.json")):
            with suppress(ValueError, OSError):
                taken.append(json.loads(path.read_text()))
            with suppress(OSError):
                path.unlink()
        return taken

    def answer(self, request: str, timeout_s: float) -> dict[str, Any] | None:
        """Waits for the controller's answer to a request; None when there is none in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for record in read_records(self.events):
                if record.get("kind") == "request_answered" and record.get("id") == request:
                    return record
            time.sleep(0.1)
        return None


def _share(directory: Path) -> None:
    """Lets the group of a directory read and write what is in it, now and later."""
    for place, _, names in os.walk(directory):
        # What is made in it later is its group's too.
        os.chmod(place, os.stat(place).st_mode & 0o7777 | 0o2070)
        for path in (Path(place, name) for name in names):
            if not path.is_symlink():
                mode = path.stat().st_mode & 0o7777
                path.chmod(mode | 0o060)


def is_package(directory: Path) -> bool:
    """Whether Ray unpacked this directory for a submitted job (its `working_dir`), and removes it some time after."""
    return "working_dir_files" in directory.parts


def runs_root() -> Path:
    """Where runs are kept when nothing is said: `runs/` here, or in the home directory when here does not last."""
    return Path.home() / "runs" if is_package(Path.cwd()) else Path("runs")


def find_run(name: str, root: Path | None = None) -> RunDirectory:
    """A run directory by its path or name, or the run of the job of that name under `runs/`: a live one if there is,
    else the newest.

    Raises RunDirectoryError when there is none, listing those there are.
    """
    root = runs_root() if root is None else root
    path = Path(name)
    if (path / "job.resolved.json").exists():
        if _job_name(path) is None:
            raise RunDirectoryError(f"{path / 'job.resolved.json'} is not a job; the directory is not of a run")
        return RunDirectory(path)
    candidates = sorted(
        (entry for entry in root.glob("*") if (entry / "job.resolved.json").exists()),
        key=lambda entry: entry.stat().st_mtime,
    )
    exact = [RunDirectory(entry) for entry in candidates if entry.name == name]
    matching = exact or [RunDirectory(entry) for entry in candidates if _job_name(entry) == name]
    if matching:
        return next((found for found in reversed(matching) if found.is_steered), matching[-1])
    known = ", ".join(entry.name for entry in candidates[-10:]) or "none"
    raise RunDirectoryError(f"no run {name!r}: neither a run directory nor the name of one in {root}/ (there: {known})")


def _job_name(path: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((path / "job.resolved.json").read_text())["name"])
    return None
