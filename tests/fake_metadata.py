"""A metadata service on loopback that insists on what AWS (IMDSv2), GCP and Azure insist on."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

AWS, GCP, AZURE = "aws", "gcp", "azure"
SPOT = "/latest/meta-data/spot/instance-action"
LIFECYCLE = "/latest/meta-data/autoscaling/target-lifecycle-state"
SCHEDULED = "/latest/meta-data/events/maintenance/scheduled"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
EVENTS = "/metadata/scheduledevents"
VM_NAME = "/metadata/instance/compute/name"

_USUAL = {
    AWS: {"/latest/meta-data/instance-id": "i-0abc"},
    GCP: {"/computeMetadata/v1/instance/id": "4711", PREEMPTED: "FALSE", MAINTENANCE: "NONE"},
    AZURE: {VM_NAME: "gpu-worker_3", EVENTS: '{"DocumentIncarnation": 1, "Events": []}'},
}


class MetadataServer:
    """Answers `paths` (any other is a 404), or `fails_with` for everything. Use it as a context manager."""

    def __init__(self, cloud: str) -> None:
        self.cloud = cloud
        self.paths: dict[str, str] = dict(_USUAL[cloud])
        self.fails_with: int | None = None
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.num_tokens = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            do_PUT = do_GET

            def log_message(self, *_: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def expire_tokens(self) -> None:
        self.tokens.clear()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.asked.append((request.command, request.path))
        status, text = self._answer(request, path)
        request.send_response(status)
        if self.cloud == GCP:
            request.send_header("Metadata-Flavor", "Google")
        request.send_header("Content-Length", str(len(text.encode())))
        request.end_headers()
        request.wfile.write(text.encode())

    def _answer(self, request: BaseHTTPRequestHandler, path: str) -> tuple[int, str]:
        headers = request.headers
        if self.fails_with is not None:
            return self.fails_with, "out of order"
        if self.cloud == AWS and request.command == "PUT":
            if path != "/latest/api/token" or not headers["X-aws-ec2-metadata-token-ttl-seconds"].isdigit():
                return 400, "bad request"
            self.num_tokens += 1
            self.tokens.add(f"token-{self.num_tokens}")
            return 200, f"token-{self.num_tokens}"
        refused = {
            AWS: (401, headers["X-aws-ec2-metadata-token"] not in self.tokens),
            GCP: (403, headers["Metadata-Flavor"] != "Google"),
            AZURE: (400, headers["Metadata"] != "true" or "api-version=" not in request.path),
        }[self.cloud]
        if refused[1] or request.command != "GET":
            return refused[0], "refused"
        return (200, self.paths[path]) if path in self.paths else (404, "not found")

    def __enter__(self) -> MetadataServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
