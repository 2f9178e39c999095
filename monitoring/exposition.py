"""The text that Prometheus scrapes, and the small HTTP server that gives it out.

`prometheus_client` writes the run's own series. Those of ranks, of which there may be tens of thousands, are written
here: a client object for each would cost a large run a quarter of a second per scrape.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from monitoring.page.access import is_own_name
from monitoring.series import RANK_SERIES

IDLE_S = 10.0
"""A connection on which nothing is said for this long is closed: it keeps a thread."""
REQUEST_S = 20.0
"""How long a connection may last in all, however little by little its request comes or its answer is taken."""
MAX_CONNECTIONS = 32
"""At once; when there are more, the oldest is ended."""
log = logging.getLogger(__name__)
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def escaped(value: object) -> str:
    """A label's value as the text format wants it."""
    return str(value).translate(_ESCAPES)


def rank_lines(run: str, ranks: Iterable[tuple[int, Mapping[str, Any]]]) -> list[str]:
    """The lines of all series of ranks. For each rank, values by the name of the series without its prefix; of
    `rank_info` they are its labels, and what is missing or None has no line."""
    rows = list(ranks)
    label = f'run="{escaped(run)}",rank="'
    names = {series.name: series.name.removeprefix("orchestrator_") for series in RANK_SERIES}
    lines: list[str] = []
    for series in RANK_SERIES:
        lines.append(f"# HELP {series.name} {series.help}")
        lines.append(f"# TYPE {series.name} {series.kind}")
        key = names[series.name]
        start = f"{series.name}{{{label}"
        if key == "rank_info":
            for rank, values in rows:
                if (info := values.get(key)) is not None:
                    more = "".join(f',{name}="{escaped(value)}"' for name, value in info.items())
                    lines.append(f'{start}{rank}"{more}}} 1.0')
            continue
        for rank, values in rows:
            if (value := values.get(key)) is not None:
                lines.append(f'{start}{rank}"}} {value:.16g}')
    return lines


class _Server(ThreadingHTTPServer):
    """A thread for each connection, of which there are few and none lasts."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self._began: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._began) >= MAX_CONNECTIONS:
                self._hang_up(next(iter(self._began)))
            self._began[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._began.pop(request, None)
            super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called twice a second."""
        with self._lock:
            now = time.monotonic()
            for request in [each for each, began in self._began.items() if now - began > REQUEST_S]:
                self._hang_up(request)

    def _hang_up(self, request: socket.socket) -> None:
        """Its thread finds the connection ended, and closes it."""
        del self._began[request]
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper may hang up or fall silent; anything else is a fault of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            log.exception("a request for metrics from %s failed", client_address)


class MetricsServer:
    """Serves what `render` returns at /metrics, each request in a thread of its own."""

    def __init__(self, host: str, port: int, render: Callable[[], bytes]) -> None:
        """Raises OSError when `port` is taken; 0 picks a free one."""

        class Handler(BaseHTTPRequestHandler):
            timeout = IDLE_S

            def do_GET(self) -> None:
                said = self.headers.get("Host")
                # Who says none is no browser.
                if said is not None and not is_own_name(said, host):
                    self.send_error(421, explain="Ask for this by the address that it is served on.")
                    return
                if self.path.partition("?")[0] not in ("/", "/metrics"):
                    self.send_error(404)
                    return
                try:
                    body = render()
                except Exception:
                    log.exception("the metrics cannot be given out")
                    self.send_error(500, explain="The log of the process that serves this says why.")
                    return
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE_LATEST)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """A scrape is nothing to write home about."""

        self._server = _Server((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
