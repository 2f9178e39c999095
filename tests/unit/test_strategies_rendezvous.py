"""The rendezvous store: what ranks write is what ranks read, and no wait outlives its reason."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from strategies.rendezvous import PeerLost, StoreClient, StoreServer

HOST = "127.0.0.1"


@pytest.fixture
def server() -> Iterator[StoreServer]:
    served = StoreServer(HOST)
    yield served
    served.close()


Connect = Callable[..., StoreClient]


@pytest.fixture
def connect(server: StoreServer) -> Iterator[Connect]:
    clients: list[StoreClient] = []

    def make(prefix: str = "run/0/1", timeout_s: float = 5.0) -> StoreClient:
        client = StoreClient((HOST, server.port), prefix, timeout_s)
        client.connect()
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


def failure_of(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Starts `call` in a thread; the list holds what it raised once the thread has ended."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def test_what_one_rank_writes_another_reads(connect: Connect) -> None:
    first, second = connect(), connect()
    first.set("address", b"\x00binary\xff")
    first.set("text", "10.0.0.1 7")
    assert second.get("address") == b"\x00binary\xff"
    assert second.get("text") == b"10.0.0.1 7"
    first.set("text", "")
    assert second.get("text") == b""
    large = bytes(range(256)) * 4000
    first.set("large", large)
    assert second.get("large") == large


def test_a_key_is_known_once_it_is_written(connect: Connect) -> None:
    first, second = connect(), connect()
    assert not first.check(["a"])
    second.set("a", b"")
    assert first.check(["a"])
    assert not first.check(["a", "b"])
    first.wait(["a"])


def test_counters_count_every_rank_once(connect: Connect) -> None:
    clients = [connect() for _ in range(8)]
    threads = [threading.Thread(target=lambda c=c: [c.add("n", 3) for _ in range(50)]) for c in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clients[0].add("n", 0) == 8 * 50 * 3
    assert clients[0].get("n") == b"1200"
    assert clients[0].add("n", -1201) == -1


def test_generations_do_not_see_each_other(connect: Connect) -> None:
    connect("run/0/1").set("listen/0", b"old")
    assert not connect("run/0/2").check(["listen/0"])


def test_a_reader_waits_for_its_writer(connect: Connect) -> None:
    reader, writer = connect(), connect()
    values: list[bytes] = []
    thread = threading.Thread(target=lambda: values.append(reader.get("late")))
    thread.start()
    time.sleep(0.05)
    assert values == []
    writer.set("late", b"now")
    thread.join(2.0)
    assert values == [b"now"]


def test_a_wait_ends_with_its_time(connect: Connect) -> None:
    client = connect(timeout_s=0.1)
    with pytest.raises(PeerLost, match="no peer wrote 'listen/3' within 0 s"):
        client.get("listen/3")
    patient = connect(timeout_s=30.0)
    with pytest.raises(PeerLost, match="no peer wrote"):
        patient.wait(["listen/3"], timedelta(seconds=0.1))


def test_after_a_wait_that_failed_nothing_is_mistaken_for_its_answer(connect: Connect) -> None:
    """The late answer to one question must not become the answer to the next."""
    client, other = connect(timeout_s=0.1), connect()
    with pytest.raises(PeerLost):
        client.get("first")
    other.set("first", b"1")
    other.set("second", b"2")
    with pytest.raises(PeerLost):
        client.get("second")


def test_an_abort_ends_a_wait_at_once_and_all_later_calls(connect: Connect) -> None:
    client = connect(timeout_s=60.0)
    thread, raised = failure_of(lambda: client.get("never"))
    time.sleep(0.05)
    started = time.monotonic()
    client.abort()
    thread.join(5.0)
    assert time.monotonic() - started < 1.0
    assert isinstance(raised[0], PeerLost)
    assert "aborted" in str(raised[0])
    with pytest.raises(PeerLost, match="aborted"):
        client.set("more", b"")


def test_an_abort_before_connecting_counts(server: StoreServer) -> None:
    client = StoreClient((HOST, server.port), "p", 5.0)
    client.abort()
    with pytest.raises(PeerLost, match="aborted"):
        client.connect()


def test_the_end_of_the_server_ends_every_wait(server: StoreServer, connect: Connect) -> None:
    clients = [connect(timeout_s=60.0) for _ in range(3)]
    waits = [failure_of(functools.partial(client.get, "never")) for client in clients]
    time.sleep(0.05)
    server.close()
    for thread, raised in waits:
        thread.join(5.0)
        assert isinstance(raised[0], PeerLost)


def test_a_server_that_is_gone_is_known_at_once() -> None:
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(PeerLost, match=f"nobody serves the rendezvous store {HOST}:{port}"):
        StoreClient((HOST, port), "p", 30.0).connect()
    assert time.monotonic() - started < 1.0


def test_a_server_that_says_nothing_can_be_left() -> None:
    """As a stopped process does: the kernel takes the connection, nobody answers."""
    with socket.create_server((HOST, 0)) as silent:
        client = StoreClient((HOST, silent.getsockname()[1]), "p", 60.0)
        client.connect()
        thread, raised = failure_of(lambda: client.set("a", b""))
        time.sleep(0.05)
        client.abort()
        thread.join(5.0)
        assert isinstance(raised[0], PeerLost)


def test_strangers_do_no_harm(server: StoreServer, connect: Connect) -> None:
    """A port scan, a half request, a client that vanishes while it waits."""
    with socket.create_connection((HOST, server.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 3)
    with socket.create_connection((HOST, server.port)) as half:
        half.sendall(b"S\x05\x00")
        vanishing = connect()
        thread, _ = failure_of(lambda: vanishing.get("slow"))
        time.sleep(0.05)
        vanishing.close()
        thread.join(5.0)
        first, second = connect(), connect()
        first.set("slow", b"fine")
        assert second.get("slow") == b"fine"
