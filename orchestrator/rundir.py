"""The run directory: everything a run leaves behind, and the only state a restarted controller needs.

job.yaml             the job file as given          events.jsonl    one record per thing that happened
job.resolved.json    with all defaults              metrics.jsonl   one record per committed step
environment.json     versions, machine, data        result.json     written when the run ends
checkpoints/         step-00000120/ ...             control/        requests of `orchestrator resize` and `stop`
logs/                .run            its identity   .epoch-*        one per controller there ever was (fencing)
.lock                its controller's   .driver     that of a driver whose cluster ends with it
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from monitoring.errors import UserError
from monitoring.events import RequestAnswered
from monitoring.outside import Away, Unreadable, json_text, read_json, read_small
from monitoring.records import read_records
from monitoring.redaction import redact
from monitoring.shapes import SMALL_FILES
from monitoring.values import count as a_count
from monitoring.values import fields, text

_UMASK = threading.RLock()
"""Held while the umask, of which a process has one, is not its own."""


class RunDirectoryError(UserError, RuntimeError):
    """A run directory cannot be used as asked; says which, why and what to do."""


_REQUEST_BYTES = 64 << 10


def _request_problem(value: Any) -> str | None:
    """What is wrong with a request."""
    if (wrong := fields({"id": text, "kind": text}, reason=text)(value)) is not None:
        return wrong
    return fields({"workers": a_count})(value) if value["kind"] == "resize" else None


class RunDirectory:
    """Paths and small files of one run.

    More than 300 lines: one short method for each file of a run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).resolve()

    @property
    def run_id(self) -> str:
        """A name for actors: the directory's own, made unique by its full path."""
        # By the bytes of its name, which no locale changes.
        name = os.fsencode(self.path.name).decode("utf-8", "backslashreplace")
        return f"{name}-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]}"

    @property
    def uid(self) -> str:
        """What makes this run another than all others, wherever its directory is moved. Made when it is first asked
        for."""
        path = self.path / ".run"
        with suppress(FileExistsError):
            with self.own_umask():
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(uuid.uuid4().hex)
        try:
            found = read_small(path, 256).decode("ascii", "replace").strip()
        except (FileNotFoundError, Unreadable) as error:
            raise RunDirectoryError(f"the identity of the run cannot be read: {error}") from error
        # It becomes part of the names of directories.
        if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", found) is None:
            raise RunDirectoryError(f"{path} is damaged: it has no identity of a run (32 hexadecimal digits)")
        return found

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
        strange = self.path.is_dir() and any(not _is_ours(entry.name) for entry in self.path.iterdir())
        if known is None and not is_fork and strange:
            raise RunDirectoryError(f"{self.path} is not empty and not a run directory; choose another --run-dir")
        for part in ("checkpoints", "logs", "control"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        if known is None or not self.has_begun:
            (self.path / "job.yaml").write_text(redact(job_text), encoding="utf-8")
        # What a run goes on with counts: other workers, other faults, ...
        self.write_json("job.resolved.json", resolved)

    def read_json(self, name: str) -> Any:
        """A JSON file's content, an object that has what it must have (monitoring.shapes); None when it is not there.

        Raises RunDirectoryError for anything else, and OSError when it cannot be read just now.
        """
        try:
            return read_json(self.path / name, SMALL_FILES.get(name))
        except FileNotFoundError:
            return None
        except Away:
            raise
        except Unreadable as error:
            raise RunDirectoryError(str(error)) from error

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file whole: readers see the old or the new content."""
        draft = self.path / f".{name}.{uuid.uuid4().hex[:8]}"
        try:
            with self.own_umask():
                draft.write_text(json_text(value, indent=2, default=str) + "\n", encoding="utf-8")
            os.replace(draft, self.path / name)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise

    def next_term(self) -> int:
        """Claims the next controller term of this run; no two controllers ever get the same."""
        term = 1 + self.newest_term()
        while True:
            try:
                with self.own_umask():
                    os.close(os.open(self.path / f".epoch-{term}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                term += 1
            else:
                return term

    def newest_term(self) -> int:
        """The highest term that a controller has claimed; 0 when there was none."""
        names = (re.fullmatch(r"\.epoch-(\d{1,18})", path.name, re.ASCII) for path in self.path.glob(".epoch-*"))
        return max((int(found[1]) for found in names if found is not None), default=0)

    def lock(self, patience_s: float = 0.0) -> int:
        """Takes the run for this process until it ends; waits up to `patience_s`, as others may have it for a moment
        to see whether it is free.

        Raises RunDirectoryError when another process has it.
        """
        descriptor = self._open_lock(".lock")
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

    def _open_lock(self, name: str) -> int:
        with self.own_umask():
            return os.open(self.path / name, os.O_CREAT | os.O_RDWR, 0o666)

    @contextmanager
    def probe_lock(self) -> Iterator[bool]:
        """Whether nobody steers this run right now. Those who ask at the same time do not take each other for one."""
        try:
            # To look leaves nothing behind: it may be no run directory (yet), or one that others own.
            descriptor = os.open(self.path / ".lock", os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            yield True
            return
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

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Says, for the length of the block, that a driver runs this run on a cluster that ends with it.

        Raises RunDirectoryError when another does.
        """
        descriptor = self._open_lock(".driver")
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunDirectoryError(
                    f"{self.path} is being run right now; see `orchestrator status {self.path}`"
                ) from error
            yield
        finally:
            os.close(descriptor)

    @property
    def is_driven(self) -> bool:
        """Whether a driver with a cluster of its own runs this run, whether or not a controller steers it just now."""
        try:
            descriptor = os.open(self.path / ".driver", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    @property
    def final_result(self) -> dict[str, Any] | None:
        """The content of result.json of a run that has finished: nothing is left to be trained; else None."""
        result = self.read_json("result.json")
        return dict(result) if isinstance(result, dict) and result.get("status") == "finished" else None

    # -------------------------------------------------------------------------------- requests from the command line

    def request(self, kind: str, **fields: Any) -> str:
        """Leaves a request for the controller; returns its id. Raises RunDirectoryError when it cannot be left."""
        name = f"{time.time():.6f}-{uuid.uuid4().hex[:8]}"
        draft = self.path / "control" / f".{name}"
        try:
            with self.own_umask():
                draft.touch()
            draft.write_text(json_text({"id": name, "kind": kind, **fields}), encoding="utf-8")
            os.replace(draft, self.path / "control" / f"{name}.json")
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise RunDirectoryError(f"the request cannot be left in {draft.parent}: {error}") from error
        return name

    def withdraw(self, request: str) -> None:
        """Takes back a request that no controller has taken."""
        with suppress(OSError):
            (self.path / "control" / f"{request}.json").unlink()

    def take_requests(self) -> list[dict[str, Any]]:
        """The requests left since last time, oldest first; each is given once, as `id`, `kind` and what belongs to it.

        What is no request is moved to `control/refused/` and given with the `error` that is its answer.
        """
        taken: list[dict[str, Any]] = []
        for path in sorted((self.path / "control").glob("*.json")):
            try:
                taken.append(read_json(path, _request_problem, _REQUEST_BYTES))
            except FileNotFoundError:
                continue
            except Unreadable as error:
                self._refuse(path)
                taken.append({"id": path.stem, "kind": "", "error": f"no request: {error}"})
                continue
            with suppress(OSError):
                path.unlink()
        return taken

    def _refuse(self, path: Path) -> None:
        """Keeps what is no request where it is not looked at again."""
        refused = path.parent / "refused"
        with suppress(OSError):
            refused.mkdir(exist_ok=True)
            os.replace(path, refused / f"{uuid.uuid4().hex[:8]}-{path.name}")

    def answer(self, request: str, timeout_s: float) -> dict[str, Any] | None:
        """Waits for the controller's answer to a request; None when there is none in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for record in read_records(self.events):
                if record.get("kind") == RequestAnswered.kind and record.get("id") == request:
                    return record
            time.sleep(0.1)
        return None


def _is_ours(name: str) -> bool:
    """Whether a file in a directory is one that we may have left there without anything of a run."""
    return name in (".lock", ".run", ".driver", ".sinks.lock") or name.startswith(".epoch-")


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
        return str(read_json(path / "job.resolved.json", SMALL_FILES["job.resolved.json"])["name"])
    return None
