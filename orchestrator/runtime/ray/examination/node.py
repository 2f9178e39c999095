"""Who asks around on a node: one actor without CPUs, pinned to it.

Sent to the node by value, with all that it calls, so that it also works where this package is not installed: that is
one of the things to find out. So it names nothing of ours except functions it was given at import.
"""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from datetime import timedelta
from typing import Any

import psutil

from orchestrator.doctor.exchange import TIMEOUT_S, exchange, open_store
from orchestrator.doctor.facts import gpu_facts, interface_facts, machine_facts
from orchestrator.doctor.storage_probe import read_file, remove_directory, remove_files, write_file

CONNECT_S = 5.0


class NodeExaminer:
    """Answers with plain dictionaries and numbers, which any version of this package understands."""

    def __init__(self) -> None:
        self._store: Any = None

    def facts(self, directories: dict[str, str]) -> dict[str, Any]:
        """Of the machine, and whether Ray asks for a token there."""
        from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]

        asks = get_authentication_mode() == AuthenticationMode.TOKEN
        return machine_facts(directories) | {"mode": "token" if asks else "disabled"}

    def gpus(self) -> dict[str, Any]:
        return gpu_facts()

    def interface(self, host: str) -> dict[str, Any]:
        """What this node has the address on that Ray knows it by, and what NCCL is told by the environment there."""
        return interface_facts(host)

    def now_s(self) -> float:
        return time.time()

    def listen(self) -> int:
        """Opens a port that sends back what one connection after the other says; returns it. It is closed after a
        minute or with this process."""
        server = socket.create_server(("", 0))
        server.settimeout(60.0)

        def serve() -> None:
            with server:
                while True:
                    try:
                        connection, _ = server.accept()
                        with connection:
                            connection.settimeout(CONNECT_S)
                            connection.sendall(connection.recv(16))
                    except TimeoutError:
                        return
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        return int(server.getsockname()[1])

    def connect(self, targets: dict[str, tuple[str, int]]) -> dict[str, float | str]:
        """Says something to each of these listeners and hears it back: in how many seconds, or why not."""
        return {name: self._connect(host, port) for name, (host, port) in targets.items()}

    @staticmethod
    def _connect(host: str, port: int) -> float | str:
        begin = time.perf_counter()
        try:
            with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
                connection.sendall(b"orchestrator")
                if connection.recv(16) != b"orchestrator":
                    return f"{host}:{port} answered something else"
        except OSError as error:
            return f"{host}:{port}: {error.strerror or error}"
        return time.perf_counter() - begin

    def open_store(self, host: str) -> int:
        """Where a partner meets this node for `exchange`; returns the port."""
        self._store = open_store(host)
        return int(self._store.port)

    def exchange(
        self, store: tuple[str, int] | None, host: str, num_bytes: int, repetitions: int, cuda: bool
    ) -> list[float]:
        """Measures with a partner, at its `store` or at our own (None); bytes per second of each repetition."""
        if store is None:
            return exchange(0, self._store, host, num_bytes, repetitions, cuda=cuda)
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        client = TCPStore(*store, 2, False, timedelta(seconds=TIMEOUT_S))
        return exchange(1, client, host, num_bytes, repetitions, cuda=cuda)

    def write_file(self, *arguments: Any) -> dict[str, Any]:
        return write_file(*arguments)

    def read_file(self, *arguments: Any) -> dict[str, Any]:
        return read_file(*arguments)

    def remove_files(self, *arguments: Any) -> dict[str, Any]:
        return remove_files(*arguments)

    def remove_directory(self, *arguments: Any) -> dict[str, Any]:
        return remove_directory(*arguments)

    def autoscaler(self, gcs_address: str) -> dict[str, bool]:
        """Whether Ray's monitor of this cluster runs here, and whether it was told what to scale."""
        found = {"monitor": False, "configured": False}
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if any(part.endswith("monitor.py") for part in command) and f"--gcs-address={gcs_address}" in command:
                found["monitor"] = found["monitor"] or not any("log_monitor" in part for part in command)
                found["configured"] = found["configured"] or any("--autoscaling-config=" in part for part in command)
        return found

    def get(self, url: str) -> int | str:
        """The HTTP status of a page of the cluster, or why there is none."""
        return http_status(url)


def http_status(url: str) -> int | str:
    """Asks with the cluster's token, if there is one."""
    from ray import _raylet as raylet

    asks = raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN  # type: ignore[attr-defined]
    headers = raylet.AuthenticationTokenLoader.instance().get_token_for_http_header() if asks else {}  # type: ignore[attr-defined]
    # Without the proxy that the environment may name for the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=CONNECT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return str(getattr(error, "reason", error))
