"""How Prometheus finds runs: one `file_sd` file for each live run, in a directory that Prometheus watches.

The directory lies beside Ray's own discovery file, and like Ray's temporary directory it may be shared by users: who
wrote a file may replace and remove it, everyone may read it. Knows nothing of what is served at the endpoints.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic

from monitoring.outside import json_text

RAY_ROOT = "/tmp/ray"
"""Where Ray keeps its sessions unless told otherwise (`--temp-dir`)."""
JOB_NAME = "orchestrator"
"""The Prometheus job of all runs."""
MAX_BYTES = 4096
"""What `announce` writes is much shorter; a longer file is none of ours."""
_SHARED = stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO | stat.S_ISVTX


def targets_directory(temp_dir: str | None = None) -> Path:
    """Where the files of runs lie, for the temporary root of a Ray (`temp_dir`; Ray's default when it is None)."""
    return Path(temp_dir or RAY_ROOT) / "orchestrator_targets"


def file_of(directory: Path, run: str) -> Path:
    """Where the endpoint of `run` is told of. Raises ValueError for an empty `run`."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", run).lstrip(".")
    if not name:
        raise ValueError(f"run {run!r} gives no name for a file")
    return directory / f"{name}.json"


def announce(directory: Path, run: str, host: str, port: int) -> Path:
    """Lets Prometheus find the endpoint of `run`; an earlier file of the same run is replaced at once and whole.

    A missing directory is made so that other users can announce their runs there too. Returns the file, for
    `withdraw`. Raises ValueError for an empty `run`, OSError when the directory cannot be written.
    """
    path = file_of(directory, run)
    _share(directory)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    content = [{"targets": [address], "labels": {"job": JOB_NAME, "run": run}}]
    # The name of the unfinished file does not end in .json: Prometheus must not read it.
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".new", dir=directory)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json_text(content) + "\n")
            os.fchmod(file.fileno(), 0o644)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise
    return path


def withdraw(path: Path) -> None:
    """The run has ended: Prometheus forgets its endpoint. A file that is gone already is no error."""
    path.unlink(missing_ok=True)


def is_listening(host: str, port: int, timeout_s: float = 0.3) -> bool:
    """Whether something may listen there. Only a refused connection says no: a silent host may be back.

    Only an address is tried. A name is taken to listen: asking for it may take as long as the resolver likes.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True


def sweep(
    directory: Path, is_listening: Callable[[str, int], bool] = is_listening, budget_s: float = 5.0
) -> list[Path]:  # fmt: skip
    """Removes the files of runs that ended without saying so: those whose endpoint refuses connections.

    Files of others that we may not remove, and files that are not ours to read, stay. Looks at no further file after
    `budget_s` seconds; the next sweep may get further. Never raises. Returns what was removed.
    """
    deadline = monotonic() + budget_s
    removed: list[Path] = []
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if monotonic() >= deadline:
                break
            if not entry.name.endswith(".json"):
                continue
            path = Path(entry.path)
            try:
                if _remove_if_dead(path, is_listening):
                    removed.append(path)
            except Exception:
                # Any user may put anything here (JSON too deep to parse, a host that no codec takes, a file that
                # goes away while it is looked at), and no such file may cost a run its start, or others their sweep.
                continue
    return removed


def _remove_if_dead(path: Path, is_listening: Callable[[str, int], bool]) -> bool:
    content, seen = _read(path)
    endpoint = _endpoint(content)
    if endpoint is None or is_listening(*endpoint):
        return False
    now = path.lstat()
    if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):  # Announced anew meanwhile.
        return False
    path.unlink()
    return True


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    """A small regular file, and what it was then; never waits, as opening a pipe would.

    Raises OSError when it cannot be read, ValueError when it is anything else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is not a regular file")
        content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES} bytes")
    return content, found


def _endpoint(content: bytes) -> tuple[str, int] | None:
    """The host and port in what `announce` wrote; None for any other content."""
    match json.loads(content):
        case [{"targets": [str(address)], "labels": {"job": "orchestrator"}}]:
            host, _, port = address.rpartition(":")
            # The system would take a port beyond all ports for another one.
            return (host.strip("[]"), int(port)) if 0 < int(port) < 65536 else None
    return None


def _share(directory: Path) -> None:
    """Makes `directory` if it is missing, writable by everyone but sticky, as the system's temporary directory is.

    So is Ray's root above it if that is missing too: another user's Ray must be able to start there later.
    """
    if directory.parent.parent == Path(tempfile.gettempdir()):
        _make_shared(directory.parent)
    directory.parent.mkdir(parents=True, exist_ok=True)
    _make_shared(directory)


def _make_shared(directory: Path) -> None:
    try:
        directory.mkdir()
    except FileExistsError:
        return
    directory.chmod(_SHARED)
