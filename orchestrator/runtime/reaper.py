"""Ends every process of a cluster of our own, also those whose parents died first.

A Ray session started for a run is marked by an environment variable that all of its processes inherit, and all of them
write to files below its directory. The driver starts this file as a small process of its own, which waits for the
driver's end (its standard input closes, however the driver went) and then ends whatever still carries either mark.
Standard library only, so that it costs next to nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

MARK = "ORCHESTRATOR_SESSION"
_INSIST_S = 10.0


def marked(session: str) -> list[int]:
    """The processes of `session` (the path of its directory), except this one.

    A process belongs to it when its environment says so or when it writes to a file of the directory: a process that
    gives itself a title may overwrite the environment that `/proc` shows. (Somebody's `tail -f` only reads.)
    """
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if _says_so(name, session) or _writes_to(name, session):
                    found.append(int(name))
    return found


def _says_so(pid: str, session: str) -> bool:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return f"{MARK}={session}".encode() in file.read().split(b"\0")


def _writes_to(pid: str, session: str) -> bool:
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            link = f"/proc/{pid}/fd/{descriptor}"
            if os.lstat(link).st_mode & stat.S_IWUSR and os.readlink(link).startswith(session + os.sep):
                return True
    return False


def end_session(session: str, patience_s: float, spare: frozenset[int] = frozenset()) -> None:
    """Gives the processes of `session` some time to end by themselves, then ends them for good.

    Processes in `spare` and this one are left alone.
    """
    started = time.monotonic()
    while left := [pid for pid in marked(session) if pid not in spare]:
        waited_s = time.monotonic() - started
        if waited_s > patience_s + _INSIST_S:
            return
        if waited_s >= patience_s:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def start(session: str) -> subprocess.Popen[bytes]:
    """Starts the reaper for this process's session; closing its `stdin` sets it off."""
    # In a session of its own, so that a Ctrl-C meant for the driver does not end it.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, session], stdin=subprocess.PIPE, start_new_session=True
    )


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_session(sys.argv[1], 0.0)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
