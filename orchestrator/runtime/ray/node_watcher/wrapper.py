"""`orchestrator node-watcher -- COMMAND`: the machine's own shutdown signal as the notice.

Kubernetes, systemd and `docker stop` send SIGTERM and give a process some time. Here the node is drained first, the
runs leave it at a step boundary, and only then the signal goes on to the command, `ray start --block` as a rule. (Ray
itself drains for 30 s on SIGTERM, not on SIGINT, and waits for whatever runs on the node, ours or not.)
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Protocol

from orchestrator.notices.notice import NoticeError
from orchestrator.runtime.ray.nodes import GcsError, HeadNodeError, NodeError

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_POLL_S = 0.2


class Drained(Protocol):
    """What of `ThisNode` is used here."""

    def drain(self, reason: str, deadline: float) -> str: ...

    def busy(self) -> list[str]: ...


class Wrapped:
    """The command as a child process, in a session of its own so that only what is passed on reaches it.

    Made in the main thread, as it takes over the signals. Raises NoticeError when the command cannot be started.
    """

    def __init__(self, command: Sequence[str], grace_s: float) -> None:
        self._grace_s = grace_s
        self._received: list[int] = []
        self._arrived = threading.Event()
        for number in SIGNALS:
            signal.signal(number, self._receive)
        try:
            self._child = subprocess.Popen(list(command), start_new_session=True)
        except OSError as error:
            raise NoticeError(f"cannot start {command[0]!r}: {error.strerror or error}") from error

    @property
    def pid(self) -> int:
        return self._child.pid

    def run(self, node: Drained) -> int:
        """Waits for the child's end and returns its exit code (128 + N when signal N ended it).

        The first signal drains `node`, waits until no actor of ours is left on it, at most the grace period, and is
        passed on then. A second signal is passed on at once, and so is every later one.
        """
        passed = 0
        leaving: threading.Thread | None = None
        while self._child.poll() is None:
            self._arrived.wait(_POLL_S)
            self._arrived.clear()
            if os.getpid() == 1:
                reap_orphans(self._child.pid)
            if self._received and leaving is None:
                # In a thread: a second signal must not wait for the cluster to answer.
                name = signal.Signals(self._received[0]).name
                leaving = threading.Thread(target=self._leave, args=(node, name), name="leave", daemon=True)
                leaving.start()
            if leaving is not None and (len(self._received) > 1 or not leaving.is_alive()):
                for number in self._received[passed:]:
                    log.info("passing %s on", signal.Signals(number).name)
                    with suppress(ProcessLookupError):
                        self._child.send_signal(number)
                passed = len(self._received)
        code = self._child.returncode
        log.info("the command has ended with code %d", code)
        return code if code >= 0 else 128 - code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        self._arrived.set()

    def _leave(self, node: Drained, name: str) -> None:
        """Drains the node and waits until it is free of our actors. What fails is tried again within the grace period,
        except that a head cannot be drained."""
        end = time.monotonic() + self._grace_s
        deadline = time.time() + self._grace_s
        is_drained = False
        last = ""
        log.info("%s: draining this node, for at most %.0f s", name, self._grace_s)
        while time.monotonic() < end and self._child.poll() is None:
            try:
                if not is_drained:
                    log.info("%s", node.drain(f"{name}: this node shuts down", deadline))
                    is_drained = True
                left = node.busy()
                if not left:
                    log.info("none of our actors is on this node any more")
                    break
                now = f"waiting for {len(left)} of our actors to leave: {', '.join(sorted(left)[:4])}"
            except HeadNodeError as error:
                log.warning("%s", error)
                break
            except (GcsError, NodeError) as error:
                now = f"{error}; trying again"
            if now != last:
                log.info("%s", now)
            last = now
            time.sleep(_POLL_S)
        else:
            log.warning("the grace period of %.0f s is over", self._grace_s)
        self._arrived.set()


def reap_orphans(child: int) -> None:
    """Takes the exit codes of ended processes that were left to this one, as the first process of a container must;
    those of `child` are not taken."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == child:
                return  # It ends this process, and with it the container.
            os.waitpid(ended.si_pid, 0)
