"""The page's server: what it says to whom, what it refuses, and how little it sends."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer

from monitoring.page import door
from monitoring.page.access import Access, PageError, check_exposure, is_loopback, token_of
from monitoring.page.feed import Feed
from monitoring.page.server import Application, PageServer
from tests.simulated_run import SimulatedRun

TOKEN = "0123456789abcdef0123456789abcdef"
Client = TestClient[Any, Any]


@pytest.fixture
def run(tmp_path: Path) -> SimulatedRun:
    simulated = SimulatedRun(tmp_path / "run", now=time.time())
    simulated.start()
    simulated.train(20)
    simulated.status()
    return simulated


def with_client(application: Application, use: Callable[[Client], Awaitable[Any]]) -> Any:
    """Runs `use` with a client of `application`."""

    async def main() -> Any:
        async with TestClient(TestServer(application.web)) as client:
            return await use(client)

    return asyncio.run(main())


def application(
    run: SimulatedRun, token: str | None = None, host: str = "127.0.0.1", tick_s: float = 0.01
) -> Application:
    return Application(run.path, Access(host, token), tick_s=tick_s)


@pytest.mark.parametrize(
    "path", ["/", "/static/app.js", "/static/vendor/uplot/uPlot.min.css", "/api/state", "/nowhere"]
)
def test_every_answer_has_a_strict_policy(run: SimulatedRun, path: str) -> None:
    async def use(client: Client) -> dict[str, str]:
        async with client.get(path) as response:
            return dict(response.headers)

    headers = with_client(application(run), use)
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for source in ("script-src", "style-src", "connect-src"):
        assert policy[source] == "'self'", "nothing inline, nothing from elsewhere"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    if path.startswith("/api"):
        assert headers["Cache-Control"] == "no-store"


def test_the_page_brings_everything_itself(run: SimulatedRun) -> None:
    async def use(client: Client) -> None:
        page = await (await client.get("/")).text()
        assert "<script>" not in page
        assert "style=" not in page
        assert "//" not in page.replace("http://www.w3.org", ""), "no address of another machine"
        for quoted in page.split('"'):
            if quoted.startswith("/static/"):
                async with client.get(quoted) as response:
                    assert response.status == 200, quoted

    with_client(application(run), use)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_shows(run: SimulatedRun, method: str) -> None:
    async def use(client: Client) -> tuple[int, str]:
        async with client.request(method, "/api/state") as response:
            return response.status, response.headers["Allow"]

    assert with_client(application(run), use) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static//etc/passwd", "/static/"]
)
def test_a_request_names_no_file(run: SimulatedRun, path: str) -> None:
    async def use(client: Client) -> int:
        from yarl import URL

        async with client.get(URL(path, encoded=True)) as response:
            return response.status

    assert with_client(application(run), use) == 404


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:1234", True), ("localhost", True), ("[::1]:80", True), ("LOCALHOST:9", True),
        ("evil.example", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example:80", False), ("[", False),
    ],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_told_apart(run: SimulatedRun, host: str, allowed: bool) -> None:
    async def use(client: Client) -> int:
        async with client.get("/api/state", headers={"Host": host}) as response:
            return response.status

    status = with_client(application(run), use)
    assert (status == 200) == allowed
    assert status in (200, 400, 421)


def _fetched(site: str, mode: str = "no-cors", destination: str = "empty") -> dict[str, str]:
    return {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": destination}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", _fetched("cross-site", "navigate", "document"), 200),
        ("/", _fetched("cross-site", "navigate", "iframe"), 403),
        ("/", _fetched("cross-site", "cors", "document"), 403),
        ("/", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("/report", _fetched("cross-site", "navigate", "document"), 403),
        ("/report", _fetched("cross-site", "no-cors", "image"), 403),
        ("/report", _fetched("none", "navigate", "document"), 200),
        ("/report", _fetched("same-origin", "navigate", "document"), 200),
        ("/api/stream", _fetched("cross-site", "cors"), 403),
        ("/api/state", _fetched("cross-site"), 403),
        ("/api/state", _fetched("same-origin", "cors"), 200),
        ("/static/app.js", _fetched("cross-site", "no-cors", "script"), 403),
    ],
)
def test_a_page_of_another_site_may_only_link_here(
    run: SimulatedRun, path: str, headers: dict[str, str], status: int
) -> None:
    async def use(client: Client) -> tuple[int, str | None]:
        async with client.get(path, headers=headers) as response:
            return response.status, response.headers.get("Content-Security-Policy")

    found, policy = with_client(application(run), use)
    assert found == status
    assert policy is not None
    assert "default-src 'none'" in policy


def test_fetch_metadata_is_for_loopback_and_elsewhere_there_is_the_token(run: SimulatedRun) -> None:
    """A browser keeps the cookie, which is strict, from other sites' requests."""

    async def use(client: Client) -> list[int]:
        headers = _fetched("cross-site")
        async with client.get("/api/state", headers=headers) as response:
            without = response.status
        async with client.get("/api/state", headers=headers | {"Authorization": f"Bearer {TOKEN}"}) as response:
            return [without, response.status]

    assert with_client(application(run, TOKEN, host="0.0.0.0"), use) == [401, 200]


@pytest.mark.parametrize("path", ["/report", "/api/state", "/api/stream"])
def test_an_error_is_answered_with_one_line_and_the_same_headers(
    run: SimulatedRun, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> str:
        raise KeyError("generation")

    monkeypatch.setattr("monitoring.page.server.render", broken)
    monkeypatch.setattr("monitoring.page.view.View.whole", broken)

    async def use(client: Client) -> tuple[int, str, dict[str, str]]:
        async with client.get(f"{path}?token={TOKEN}") as response:
            return response.status, await response.text(), dict(response.headers)

    status, text, headers = with_client(application(run), use)
    assert status == 500
    assert text.splitlines() == ["This could not be shown; the log of the page's server says why."]
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "KeyError: 'generation'" in caplog.text
    assert path in caplog.text
    assert TOKEN not in caplog.text


def test_records_that_lack_what_they_should_have_do_not_hide_the_others(
    run: SimulatedRun, caplog: pytest.LogCaptureFixture
) -> None:
    steps, events = run.path / "metrics.jsonl", run.path / "events.jsonl"
    whole = steps.read_text().splitlines(keepends=True)
    damaged = json.loads(whole[-1])
    damaged["tokens"] = "many"
    steps.write_text("".join(whole[:-1]) + json.dumps(damaged) + "\n")
    with events.open("a") as file:
        file.write('5\n{"kind": "generation", "time": 1.0}\n{"kind": "incident", "time": "noon"}\n')
    (run.path / "status.json").write_text(json.dumps({"time": time.time(), "workers": [5], "findings": 7}))

    async def use(client: Client) -> list[dict[str, Any]]:
        states = []
        for _ in range(2):
            async with client.get("/api/state") as response:
                assert response.status == 200
                states.append(await response.json())
            await asyncio.sleep(0.02)
        return states

    for state in with_client(application(run), use):
        assert len(state["points"]["rows"]) == 19
    for text in ("1 line of metrics.jsonl could not be read", "3 lines of events.jsonl could not be read",
                 "status.json is damaged"):  # fmt: skip
        assert caplog.text.count(text) == 1, "said once"


def test_with_a_token_nobody_sees_anything_without_it(run: SimulatedRun) -> None:
    async def use(client: Client) -> None:
        for path in ("/", "/static/app.js", "/api/state", "/api/stream", "/report", "/?token=wrong", "/?token=%FF"):
            async with client.get(path, allow_redirects=False) as response:
                assert response.status == 401, path
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
                assert "quickstart" not in await response.text()
        for header in (f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ä"):
            async with client.get("/api/state", headers={"Authorization": header}) as response:
                assert response.status == 401, header
        async with client.get("/api/state", headers={"Authorization": f"Bearer {TOKEN}"}) as response:
            assert response.status == 200
            assert (await response.json())["status"]["step"] == 20

    with_client(application(run, TOKEN), use)


def test_a_token_in_the_address_becomes_a_cookie_and_leaves_the_address(run: SimulatedRun) -> None:
    async def use(client: Client) -> None:
        address = f"{client.make_url('/')}/elsewhere.example/?token={TOKEN}"
        async with ClientSession() as fresh, fresh.get(address, allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (303, "/"), "never to another machine"
            cookie = response.headers["Set-Cookie"]
            assert TOKEN not in cookie
            assert "HttpOnly" in cookie
            assert "SameSite=Strict" in cookie
        name, _, value = cookie.partition(";")[0].partition("=")
        async with ClientSession() as fresh:
            url = client.make_url("/api/state")
            async with fresh.get(url, headers={"Cookie": f"{name}={value}"}) as response:
                assert response.status == 200
            async with fresh.get(url, headers={"Cookie": f"{name}=ä"}) as response:
                assert response.status in (400, 401)

    with_client(application(run, TOKEN), use)


def test_beyond_this_machine_a_token_is_asked_for_with_what_to_do(tmp_path: Path) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "node7", "")] == [False] * 5
    for host in ("0.0.0.0", "node7"):
        with pytest.raises(PageError, match=r"ORCHESTRATOR_PAGE_TOKEN.*--token-file.*openssl rand"):
            check_exposure(host, None)
        check_exposure(host, TOKEN)
    with pytest.raises(PageError, match="at least 16"):
        check_exposure("127.0.0.1", "short")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(PageError, match="is empty"):
        token_of(tmp_path / "empty")
    with pytest.raises(PageError, match="cannot be read"):
        token_of(tmp_path / "none")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    for mode, who in ((0o644, "its group and everybody"), (0o640, "its group"), (0o602, "everybody")):
        (tmp_path / "token").chmod(mode)
        with pytest.raises(PageError, match=f"has mode {mode:o}: open to {who}; chmod 600"):
            token_of(tmp_path / "token")
    (tmp_path / "token").chmod(0o600)
    assert token_of(tmp_path / "token") == TOKEN


# ------------------------------------------------------------------------------------------------------------- stream


class Stream:
    """The server's events, one by one, and how many bytes they were."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.size = 0

    async def next(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        found, data = "", ""
        while True:
            line = (await asyncio.wait_for(self._response.content.readline(), 60.0)).decode()
            self.size += len(line.encode())
            if line.startswith("event: "):
                found = line[7:].strip()
            elif line.startswith("data: "):
                data = line[6:]
            elif line == "\n" and found == kind:
                return dict(json.loads(data))


def test_the_stream_says_everything_and_then_what_changes(run: SimulatedRun) -> None:
    async def use(client: Client) -> None:
        async with client.get("/api/stream") as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            assert response.headers["Cache-Control"] == "no-store"
            stream = Stream(response)
            state = await stream.next("state")
            assert len(state["points"]["rows"]) == 20
            run.train(1)
            changes = await stream.next("changes")
            assert [row[0] for row in changes["points"]["rows"]] == [20]
            assert "timeline" not in changes
            run.lose(1)
            changes = await stream.next("changes")
            while "timeline" not in changes:
                changes = await stream.next("changes")
            assert [entry["kind"] for entry in changes["timeline"]] == ["incident"]
            assert changes["workers"]["1.0"]["state"] == "lost"

    with_client(application(run), use)


def test_an_error_while_looking_does_not_end_the_stream(
    run: SimulatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    page = application(run)
    poll, failed = Feed.poll, 0

    def fails_twice(feed: Feed, now: float) -> None:
        nonlocal failed
        if failed < 2:
            failed += 1
            raise OSError("stale file handle")
        poll(feed, now)

    async def use(client: Client) -> None:
        async with client.get("/api/stream") as response:
            stream = Stream(response)
            await stream.next("state")
            monkeypatch.setattr(Feed, "poll", fails_twice)
            run.train(1)
            changes = await asyncio.wait_for(stream.next("changes"), 60.0)
            assert [row[0] for row in changes["points"]["rows"]] == [20]

    with_client(page, use)
    assert failed == 2


def test_the_stream_of_64_ranks_is_less_than_50_kilobytes_a_second(tmp_path: Path) -> None:
    """Two looks a second, ten steps a second, all that status.json says anew each second; a kill every ten seconds."""
    layout = {"data": 8, "tensor": 2, "pipeline": 4, "shard": "optimizer"}
    run = SimulatedRun(tmp_path / "run", workers=64, per_node=8, steps=10_000, layout=layout, step_seconds=0.2)
    run.start()
    run.train(1400)  # Soon there are too many points, and all are sent anew.
    run.status()
    seconds = 40

    async def use(client: Client) -> int:
        async with client.get("/api/stream") as response:
            stream = Stream(response)
            await stream.next("state")
            stream.size = 0
            for half in range(2 * seconds):
                run.train(5)
                if half % 20 == 9:
                    run.recover(run.lose(half % 64))
                if half % 2:
                    run.status()
                changes = await stream.next("changes")
                while changes.get("status", {}).get("step") != run.step:
                    changes = await stream.next("changes")
            return stream.size

    size = with_client(application(run), use)
    assert size > 10_000, "it did say something"
    assert size / seconds < 50_000


def test_many_may_look_and_one_that_goes_is_forgotten(run: SimulatedRun) -> None:
    async def use(client: Client) -> None:
        async with client.get("/api/stream") as first:
            one = Stream(first)
            await one.next("state")
            async with client.get("/api/stream") as second:
                assert (await Stream(second).next("state"))["status"]["step"] == 20
            run.train(3)
            assert (await one.next("changes"))["status"]["step"] == 23

    with_client(application(run), use)


# ------------------------------------------------------------------------------------------------------------- thread


def test_a_page_in_a_thread_is_there_until_closed(run: SimulatedRun) -> None:
    with PageServer(run.path) as server:
        assert server.url.startswith("http://127.0.0.1:")
        state = json.loads(urllib.request.urlopen(f"{server.url}api/state", timeout=30).read())
        assert state["status"]["step"] == 20
        report = urllib.request.urlopen(f"{server.url}report", timeout=30)
        assert "script-src" not in report.headers["Content-Security-Policy"]
        assert b"Where the time went" in report.read()
        port = int(server.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(PageError, match=f"127.0.0.1:{port}.*another --port"):
            PageServer(run.path, port=port)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
    server.close()


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    with PageServer(tmp_path / "not-yet") as server:
        state = json.loads(urllib.request.urlopen(f"{server.url}api/state", timeout=30).read())
        assert state["status"]["state"] == "starting"
        assert urllib.request.urlopen(f"{server.url}report", timeout=30).status == 200


# -------------------------------------------------------------------------------------------------------- connections


def connect(server: PageServer, said: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=60.0)
    connection.sendall(said)
    return connection


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /api",
     b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nhalf"],
    ids=["nothing", "half a request", "a request and a half", "half a body"],
)  # fmt: skip
def test_what_is_half_said_is_not_waited_for(run: SimulatedRun, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert door.IDLE_S == 15.0
    monkeypatch.setattr(door, "IDLE_S", 0.2)
    with PageServer(run.path) as server, connect(server, said) as half:
        with suppress(ConnectionError):
            while half.recv(1 << 16):
                pass
        assert urllib.request.urlopen(server.url, timeout=60.0).status == 200


def test_who_listens_is_not_idle(run: SimulatedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "IDLE_S", 0.1)
    monkeypatch.setattr("monitoring.page.server.PING_S", 0.5)
    with (
        PageServer(run.path) as server,
        connect(server, b"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as listener,
    ):
        heard = b""
        while heard.count(b"event: ping") < 3:
            part = listener.recv(1 << 16)
            assert part, "the stream goes on, however long nothing changes"
            heard += part


def test_idle_connections_make_room_for_those_who_ask(run: SimulatedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_CONNECTIONS", 8)
    with PageServer(run.path) as server:
        idle = [connect(server, b"GET / HTTP/1.1\r\n") for _ in range(40)]
        try:
            assert urllib.request.urlopen(server.url, timeout=60.0).status == 200
            ended = 0
            for connection in idle[:32]:
                with suppress(ConnectionError):
                    assert connection.recv(1) == b""
                ended += 1
            assert ended == 32
        finally:
            for connection in idle:
                connection.close()


def test_a_burst_of_listeners_finds_no_more_room_than_a_queue(
    run: SimulatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitoring.page.server.MAX_LISTENERS", 5)

    async def use(client: Client) -> list[int]:
        responses = await asyncio.gather(*(client.get("/api/stream") for _ in range(30)))
        statuses = [response.status for response in responses]
        for response in responses:
            response.close()
        return statuses

    statuses = with_client(application(run), use)
    assert (statuses.count(200), statuses.count(503)) == (5, 25)
