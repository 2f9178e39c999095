"""The server that gives out the series: what it says when it cannot, and whom it does not wait for."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from monitoring import exposition
from monitoring.exposition import MetricsServer


@contextmanager
def serving(render: object = lambda: b"up 1\n") -> Iterator[MetricsServer]:
    server = MetricsServer("127.0.0.1", 0, render)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exposition.IDLE_S == 10.0
    monkeypatch.setattr(exposition, "IDLE_S", 0.05)
    with serving() as server:
        for said in (b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=60.0) as idle:
                idle.sendall(said)
                assert idle.recv(1) == b"", "the server hangs up, without an answer"


def test_an_error_is_answered_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([b"up 1\n"])
    with serving(lambda: next(answers)) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        assert urllib.request.urlopen(url, timeout=60.0).read() == b"up 1\n"
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as failed:
                urllib.request.urlopen(url, timeout=60.0)
            assert failed.value.code == 500
            assert b"StopIteration" not in failed.value.read(), "what failed is for the log"
    assert caplog.text.count("the metrics cannot be given out") == 2
    assert "StopIteration" in caplog.text


@pytest.mark.parametrize(
    ("error", "logged"),
    [(BrokenPipeError(), False), (ConnectionResetError(), False), (TimeoutError(), False), (KeyError("x"), True),
     (OSError("no space"), True)],
)  # fmt: skip
def test_only_those_who_hang_up_are_passed_over_in_silence(
    error: Exception, logged: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        try:
            raise error
        except Exception:
            server._server.handle_error(None, ("192.0.2.1", 5))
    assert ("192.0.2.1" in caplog.text) == logged
    assert (type(error).__name__ in caplog.text) == logged
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("served_on", "said", "status"),
    [
        ("127.0.0.1", "127.0.0.1:9", 200), ("127.0.0.1", "localhost", 200), ("127.0.0.1", None, 200),
        ("127.0.0.1", "evil.example", 421), ("127.0.0.1", "127.0.0.1.evil.example:80", 421),
        ("127.0.0.1", "192.0.2.7", 421), ("127.0.0.1", "[", 421), ("127.0.0.1", "", 421),
        ("0.0.0.0", "192.0.2.7:9", 200), ("0.0.0.0", socket.gethostname(), 200), ("0.0.0.0", "[2001:db8::1]:9", 200),
        ("0.0.0.0", "localhost:9", 200), ("0.0.0.0", "evil.example:9", 421),
    ],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_told_apart(served_on: str, said: str | None, status: int) -> None:
    """A web page of another site, which has its own name resolved to this address, sends its name."""
    server = MetricsServer(served_on, 0, lambda: b"up 1\n")
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60.0) as client:
            host = "" if said is None else f"Host: {said}\r\n"
            client.sendall(f"GET /metrics HTTP/1.1\r\n{host}\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    finally:
        server.close()
    assert answer.split()[1] == str(status).encode()
    assert (b"up 1" in answer) == (status == 200)


def test_what_comes_little_by_little_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the request never."""
    assert exposition.REQUEST_S == 20.0
    monkeypatch.setattr(exposition, "REQUEST_S", 0.2)
    with serving() as server, socket.create_connection(("127.0.0.1", server.port), timeout=60.0) as slow:
        sent = 0
        with suppress(ConnectionError):
            while sent < 3000:
                sent += slow.send(b"G")
                time.sleep(0.02)
        assert sent < 3000, "it was not waited for a minute"
        assert urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60.0).read() == b"up 1\n"


def test_there_are_few_threads_however_many_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MAX_CONNECTIONS", 4)
    with serving() as server:
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=60.0) for _ in range(20)]
        try:
            assert urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60.0).read() == b"up 1\n"
            for connection in idle[:16]:
                assert connection.recv(1) == b"", "the oldest made room"
        finally:
            for connection in idle:
                connection.close()
