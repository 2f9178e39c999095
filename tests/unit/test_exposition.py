"""The server that gives out the series: what it says when it cannot, and whom it does not wait for."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

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
