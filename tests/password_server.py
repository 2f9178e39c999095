"""A web server that gives its files only with the password."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER, PASSWORD = "reader", "tr0ub4dor.and.3"


@contextmanager
def password_server(files: Mapping[str, bytes]) -> Iterator[str]:
    """Serves `files` by their path without a leading slash; gives HOST:PORT."""
    wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.partition("?")[0].lstrip("/"))
            if self.headers.get("Authorization") != wanted:
                return self.send_error(401)
            if content is None:
                return self.send_error(404)
            given = self.headers.get("Range", "").removeprefix("bytes=")
            first, _, last = given.partition("-")
            part = content[int(first or 0) : int(last) + 1 if last else None]
            self.send_response(206 if given else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if given:
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)
            return None

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
