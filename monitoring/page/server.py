"""The web server of the live page: static files, the state of a run as JSON, and a stream of what changes in it.

Only reads: every method but GET and HEAD is refused, and nothing that a request says names a file.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from aiohttp import web

from monitoring.outside import json_text
from monitoring.page.access import Access, PageError
from monitoring.page.door import Door
from monitoring.page.feed import Feed
from monitoring.report.page import render

TICK_S = 0.5
"""How often the files are looked at while somebody looks at the page, and so how often it changes."""
PING_S = 5.0
MAX_QUEUED = 64
"""Changes that a slow reader may be behind; then it gets everything anew instead."""
MAX_LISTENERS = 100
STUCK_S = 60.0
"""A reader that takes nothing for this long is not reading."""

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Server": "elastic-orchestrator",
}
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Application:
    """The page of one run, as an aiohttp application; everything in it runs on one event loop."""

    def __init__(self, run_dir: Path, access: Access, *, tick_s: float = TICK_S) -> None:
        self.door: Door | None = None
        self._num_listeners = 0
        self._run_dir = run_dir
        self._access = access
        self._tick_s = tick_s
        self._feed = Feed(run_dir)
        self._static = dict(_static_files())
        self._listeners: set[asyncio.Queue[bytes | None]] = set()
        self._lock = asyncio.Lock()
        self._looked = self._seen_at = 0.0
        self._watcher: asyncio.Task[None] | None = None
        self.cookie_name = "orchestrator_page"
        self.web = web.Application(middlewares=[self._guard])
        self.web.router.add_get("/", self._file)
        self.web.router.add_get("/static/{name:.+}", self._file)
        self.web.router.add_get("/api/state", self._state)
        self.web.router.add_get("/api/stream", self._stream, allow_head=False)
        self.web.router.add_get("/report", self._report)
        self.web.on_shutdown.append(self._shut_down)

    # ------------------------------------------------------------------------------------------------- every request

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses what is not allowed; gives every answer the headers that a browser is to hold to."""
        if self.door is None:
            return await self._answer(request, handler)
        with self.door.answering(request.transport):
            return await self._answer(request, handler)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = self._refusal(request) or await handler(request)
        except web.HTTPException as error:
            response = _text(error.status, error.reason)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception:
            # Else aiohttp would answer, without these headers. Not the whole address: there may be a token in it.
            log.exception("the page could not answer a request for %r", request.path)
            response = _text(500, "This could not be shown; the log of the page's server says why.")
        if not response.prepared:
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    def _refusal(self, request: web.Request) -> web.Response | None:
        if request.method not in ("GET", "HEAD"):
            response = _text(405, "This page only shows; it takes no orders.")
            response.headers["Allow"] = "GET, HEAD"
            return response
        if not self._access.is_host_allowed(request.headers.get("Host")):
            return _text(421, "This page is for this machine; open it as http://127.0.0.1 or http://localhost.")
        if not self._access.is_site_allowed(request.headers, request.path):
            return _text(403, "Another web site asked for this; open the page itself, at /.")
        if self._access.is_allowed(request.headers, request.cookies.get(self.cookie_name)):
            if "token" in request.query and self._access.needs_token:
                return _redirect(request)
            return None
        if self._access.is_token(request.query.get("token", "")):
            response = _redirect(request)
            response.set_cookie(
                self.cookie_name, self._access.cookie, httponly=True, samesite="Strict", path="/",
                secure=request.secure,
            )  # fmt: skip
            return response
        response = _text(401, "This page needs its token: open /?token=TOKEN, or send Authorization: Bearer TOKEN.")
        response.headers["WWW-Authenticate"] = 'Bearer realm="elastic-orchestrator"'
        return response

    # -------------------------------------------------------------------------------------------------------- routes

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name", "index.html")
        if name not in self._static:
            raise web.HTTPNotFound
        kind = _TYPES.get(name.rpartition(".")[2], "text/plain")
        response = web.Response(body=self._static[name], content_type=kind, charset="utf-8")
        response.headers["Cache-Control"] = "no-cache"
        return response

    async def _state(self, request: web.Request) -> web.Response:
        await self._look()
        async with self._lock:
            state = self._feed.view.whole(self._seen_at)
        return web.Response(body=_json(state), content_type="application/json")

    async def _report(self, request: web.Request) -> web.Response:
        page = await asyncio.to_thread(render, self._run_dir)
        return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": _REPORT_POLICY})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        # Counted before anything is waited for: a burst finds no more room than those who come one by one.
        if self._num_listeners >= MAX_LISTENERS:
            return _text(503, f"{MAX_LISTENERS} browsers look at this page already.")
        self._num_listeners += 1
        try:
            return await self._listen(request)
        finally:
            self._num_listeners -= 1

    async def _listen(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        response.headers.update(_HEADERS)
        await self._look()
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        async with self._lock:
            # Between two looks, so that this and the changes that follow meet without a gap.
            queue.put_nowait(_message("state", self._feed.view.whole(self._seen_at)))
            self._listeners.add(queue)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        try:
            await response.prepare(request)
            await response.write(b"retry: 1000\n\n")
            while True:
                try:
                    message = await asyncio.wait_for(queue.get(), PING_S)
                except TimeoutError:
                    message = _message("ping", {"now": round(self._feed.view.line.now(), 2)})
                if message is None:
                    break
                await asyncio.wait_for(response.write(message), STUCK_S)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._listeners.discard(queue)
        return response

    # ----------------------------------------------------------------------------------------------------- following

    async def _watch(self) -> None:
        """Looks at the files again and again, as long as anybody listens."""
        while self._listeners:
            await asyncio.sleep(self._tick_s)
            try:
                await self._look()
            except Exception:  # A client is to hear of what can be shown again.
                log.exception("the page could not show what is new")

    async def _look(self) -> None:
        """Takes in what is new, and tells all listeners; never more often than once a tick."""
        async with self._lock:
            if time.monotonic() - self._looked < 0.8 * self._tick_s:
                return
            now = self._feed.view.line.now()
            await asyncio.to_thread(self._feed.poll, now)
            self._looked, self._seen_at = time.monotonic(), now
            view = self._feed.view
            changes = view.changes(now)
            if changes is None or not self._listeners:
                return
            message = _message("changes", changes)
            for queue in self._listeners:
                if queue.qsize() >= MAX_QUEUED:
                    while not queue.empty():
                        queue.get_nowait()
                    queue.put_nowait(_message("state", view.whole(now)))
                else:
                    queue.put_nowait(message)

    async def _shut_down(self, application: web.Application) -> None:
        for queue in self._listeners:
            queue.put_nowait(None)
        if self._watcher is not None:
            self._watcher.cancel()


class PageServer:
    """Serves the page of a run from a thread, until closed. Use as a context manager.

    `port` 0 takes any free one. Raises PageError when the address cannot be had, or must not without a token.
    """

    def __init__(self, run_dir: Path, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        self._access = Access(host, token)
        self._run_dir, self._host, self._port = run_dir, host, port
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="live-page", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            why = getattr(self._error, "strerror", None) or self._error
            raise PageError(
                f"the page cannot be served on {host}:{port}: {why}; choose another --port, or 0 for any free one"
            )

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/"

    def close(self) -> None:
        """Ends all connections and the thread."""
        with suppress(RuntimeError):  # Closed already.
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=10.0)

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        application = Application(self._run_dir, self._access)
        # Requests are not logged: their addresses may have a token in them.
        runner = web.AppRunner(application.web, access_log=None, handle_signals=False, shutdown_timeout=2.0)
        server: asyncio.Server | None = None
        watching: asyncio.Task[None] | None = None
        try:
            await runner.setup()
            assert runner.server is not None
            door = application.door = Door(runner.server)
            server = await self._loop.create_server(door, self._host, self._port, backlog=128, start_serving=False)
            self._port = int(server.sockets[0].getsockname()[1])
            # Cookies do not tell ports apart, and there may be more than one page on a machine.
            application.cookie_name = f"orchestrator_page_{self._port}"
            await server.start_serving()
            watching = asyncio.create_task(door.watch())
        except (OSError, ValueError) as error:  # ValueError: what cannot be the name of a host.
            self._error = error
        finally:
            self._ready.set()
        if self._error is None:
            await self._stop.wait()
        if watching is not None:
            watching.cancel()
        if server is not None:
            server.close()
        await runner.cleanup()


def _static_files(below: Traversable | None = None, prefix: str = "") -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in (below or files("monitoring.page") / "static").iterdir():
        if entry.is_dir():
            found += _static_files(entry, f"{prefix}{entry.name}/")
        else:
            found.append((f"{prefix}{entry.name}", entry.read_bytes()))
    return found


def _json(value: Any) -> bytes:
    return json_text(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")


def _message(kind: str, value: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), _json(value))


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n")


def _redirect(request: web.Request) -> web.Response:
    """To the page without the token, which is not to stay in the address."""
    return web.Response(status=303, headers={"Location": "/report" if request.path == "/report" else "/"})
