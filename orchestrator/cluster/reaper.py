"""Ends every process of a cluster of our own, also those whose parents died first.

A Ray session started for a run is marked by an environment variable that all of its processes inherit. The driver
starts this file as a small process of its own, which waits for the driver's end (its standard input closes, however
the driver went) and then ends whatever still carries the mark. Standard library only, so that it costs next to nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

MARK = "ORCHESTRATOR_SESSION"


def marked(session: str) -> list[int]:
    """The processes that carry the mark of `session`, except this one."""
    wanted = f"{MARK}={session}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def end_session(session: str, patience_s: float, spare: frozenset[int] = frozenset()) -> None:
    """Gives the processes of `session` some time to end by themselves, then ends them for good."""
    deadline = time.monotonic() + patience_s
    left = [pid for pid in marked(session) if pid not in spare]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [pid for pid in marked(session) if pid not in spare]
    for _ in range(3):
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        left = [pid for pid in marked(session) if pid not in spare]
        if not left:
            return


def start(session: str) -> subprocess.Popen[bytes]:
    """Starts the reaper for this process's session; closing its `stdin` sets it off."""
    # In a session of its own, so that a Ctrl-C meant for the driver does not end it.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, session], stdin=subprocess.PIPE, start_new_session=True
    )


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_session(sys.argv[1], 0.0)
