"""Whether the head of the cluster answers: a driver says so when it does not, and ends before Ray ends its process.

Ray tries to reach a GCS that is gone for `RAY_gcs_rpc_server_reconnect_timeout_s` (60 s), says nothing meanwhile, and
then ends every process of the cluster, this one too. A GCS that keeps its tables on disk or in Redis may come back
before that, and nothing is lost.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from orchestrator.checkpoint.of_run import catalog_of
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.ray.session import ClusterError

log = logging.getLogger(__name__)

TELL_AFTER_S = 10.0
_PROBE_S = 1.0
_PROBE_TIMEOUT_S = 2.0
_HEADROOM_S = 20.0
"""How long before Ray would end this process it ends by itself."""
RECONNECT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RAYS_PATIENCE_S = 60.0


def patience_s() -> float:
    """How long a head is waited for, by the setting of Ray that this process was started with."""
    limit_s = _RAYS_PATIENCE_S
    with suppress(ValueError):
        limit_s = float(os.environ.get(RECONNECT_VARIABLE, ""))
    return max(limit_s - _HEADROOM_S, limit_s / 2)


class HeadWatch:
    """Looks once a second whether something listens at `address` (host:port); `on_note` is told when nothing has for a
    while, and when something does again."""

    def __init__(self, address: str, directory: RunDirectory, on_note: Callable[[str], None]) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._where = address, (host.strip("[]"), int(port))
        self._directory = directory
        self._on_note = on_note
        self._answered = time.monotonic()
        self._why = ""
        self._trouble: Exception | None = None
        self._over = threading.Event()

    def check(self) -> None:
        """Raises ClusterError when the head has not answered for `patience_s`, and what `on_note` raised."""
        if (trouble := self._trouble) is not None:
            self._trouble = None
            raise trouble
        if (silent_s := time.monotonic() - self._answered) > patience_s():
            raise ClusterError(
                f"{self._said(silent_s)}; the run's workers end with it. Start the cluster again, and the same command "
                f"goes on {_from_where(self._directory)}"
            )

    def _said(self, silent_s: float) -> str:
        return f"the head of the cluster at {self._address} has not answered for {silent_s:.0f} s ({self._why})"

    def watch(self) -> None:
        """Until `close`; on a thread of its own."""
        told = False
        while not self._over.wait(_PROBE_S):
            try:
                socket.create_connection(self._where, timeout=_PROBE_TIMEOUT_S).close()
            except OSError as error:
                self._why = error.strerror or str(error)
                silent_s = time.monotonic() - self._answered
                if silent_s > TELL_AFTER_S and not told:
                    told = True
                    self._tell(
                        f"{self._said(silent_s)}; waiting for it until {patience_s():.0f} s. If it comes back with the "
                        'tables it had, nothing is lost (docs/clusters.md, "A head that may be lost")'
                    )
                continue
            silent_s, self._answered = time.monotonic() - self._answered, time.monotonic()
            if told:
                told = False
                self._tell(f"the head answers again, after {silent_s:.0f} s")

    def _tell(self, text: str) -> None:
        """Whatever comes of that, the head goes on being watched; `check` raises it."""
        try:
            self._on_note(text)
        except Exception as error:
            log.warning("%s (which could not be shown: %s)", text, error)
            self._trouble = error

    def close(self) -> None:
        self._over.set()


@contextmanager
def watching_head(directory: RunDirectory, on_note: Callable[[str], None]) -> Iterator[HeadWatch]:
    """Watches the head of the cluster that this process is connected to, for the length of the block."""
    import ray

    watch = HeadWatch(str(ray.get_runtime_context().gcs_address), directory, on_note)
    threading.Thread(target=watch.watch, name="head-watch", daemon=True).start()
    try:
        yield watch
    finally:
        watch.close()


def _from_where(directory: RunDirectory) -> str:
    """Where a run will go on, as far as can be told."""
    try:
        steps = catalog_of(directory, Job.model_validate(_job(directory))).steps()
    except Exception as error:
        return f"from its newest valid checkpoint (its storage cannot be read from here: {error})"
    return f"from the checkpoint of {max(steps)} steps" if steps else "from the beginning: there is no checkpoint yet"


def _job(directory: RunDirectory) -> Any:
    return directory.read_json("job.resolved.json")
