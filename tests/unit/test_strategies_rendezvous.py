"""The rendezvous store: what ranks write is what ranks read, and no wait outlives its reason."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from strategies.comm import rendezvous_server
from strategies.comm.rendezvous import PeerLost, StoreClient
from strategies.comm.rendezvous_proof import HELLO_BYTES, MAGIC, ClientSide, StoreAddress, fresh_secret
from strategies.comm.rendezvous_server import ADD, ANSWER, GET, NUMBER, REQUEST, SET, StoreServer

HOST = "127.0.0.1"
SECRET = fresh_secret()
SOON_S = 20.0
"""What a loaded machine may take for what takes milliseconds."""


@pytest.fixture
def server() -> Iterator[StoreServer]:
    served = StoreServer(HOST, SECRET)
    yield served
    served.close()


Connect = Callable[..., StoreClient]


@pytest.fixture
def connect(server: StoreServer) -> Iterator[Connect]:
    clients: list[StoreClient] = []

    def make(prefix: str = "run/0/1", timeout_s: float = 5.0) -> StoreClient:
        client = StoreClient(StoreAddress(HOST, server.port, SECRET), prefix, timeout_s)
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
    client = StoreClient(StoreAddress(HOST, server.port, SECRET), "p", 5.0)
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
        StoreClient(StoreAddress(HOST, port, SECRET), "p", 30.0).connect()
    assert time.monotonic() - started < 1.0


def test_a_server_that_says_nothing_can_be_left() -> None:
    """As a stopped process does: the kernel takes the connection, nobody answers."""
    with socket.create_server((HOST, 0)) as silent:
        client = StoreClient(StoreAddress(HOST, silent.getsockname()[1], SECRET), "p", 60.0)
        thread, raised = failure_of(client.connect)
        silent.accept()[0].settimeout(SOON_S)
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


# ---------------------------------------------------------------------------------------- who is let in


def as_member(server: StoreServer, scope: str = "run/0/1", secret: bytes = SECRET) -> socket.socket:
    """A connection that has proved that it is of the run, and says whatever a test wants from there on."""
    connection = socket.create_connection((HOST, server.port), timeout=SOON_S)
    side = ClientSide(secret, scope.encode())
    connection.sendall(side.answer(receive(connection, HELLO_BYTES)))
    side.check(receive(connection, 32))
    return connection


def receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length and (part := connection.recv(length - len(received))):
        received += part
    return received


def is_ended(connection: socket.socket) -> bool:
    """Whether the server has ended the connection, whatever it had said before."""
    connection.settimeout(SOON_S)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def request(operation: bytes, key: bytes, value: bytes = b"") -> bytes:
    return REQUEST.pack(operation, len(key), len(value)) + key + value


def test_without_the_secret_nothing_is_kept_and_nothing_told(server: StoreServer, connect: Connect) -> None:
    connect().set("listen/0", b"10.0.0.1 7")
    kept = server.num_bytes
    for said in (
        request(SET, b"listen/0", b"192.0.2.1 9") * 40,
        request(GET, b"listen/0"),
        request(ADD, b"n", b"x"),
        ClientSide(fresh_secret(), b"run/0/1").answer(MAGIC + bytes(32)) + request(SET, b"listen/0", b"192.0.2.1 9"),
        b"\xff" * 100_000,
    ):
        with socket.create_connection((HOST, server.port), timeout=SOON_S) as stranger:
            assert receive(stranger, HELLO_BYTES).startswith(MAGIC)
            with contextlib.suppress(OSError):
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                assert receive(stranger, 1) == b"", "no answer"
    assert server.num_bytes == kept
    assert connect().get("listen/0") == b"10.0.0.1 7"


def test_a_proof_is_good_for_one_connection(server: StoreServer) -> None:
    """What was overheard of one connection is of no use in another."""
    overheard = ClientSide(SECRET, b"run/0/1")
    with socket.create_connection((HOST, server.port), timeout=SOON_S) as first:
        answer = overheard.answer(receive(first, HELLO_BYTES))
        first.sendall(answer)
        overheard.check(receive(first, 32))
    with socket.create_connection((HOST, server.port), timeout=SOON_S) as second:
        receive(second, HELLO_BYTES)
        second.sendall(answer)
        assert is_ended(second)


@pytest.mark.parametrize("is_known", [False, True], ids=["another service", "another run"])
def test_a_rank_is_not_lured(is_known: bool) -> None:
    """A server that cannot prove that it is of the run is told nothing but a proof of no use to it."""
    with socket.create_server((HOST, 0)) as listener:
        client = StoreClient(StoreAddress(HOST, listener.getsockname()[1], SECRET), "p", 60.0)
        thread, raised = failure_of(client.connect)
        with listener.accept()[0] as connection:
            connection.sendall(MAGIC + bytes(32) if is_known else b"HTTP/1.1 400 Bad Request\r\n" + bytes(99))
            with contextlib.suppress(OSError):
                connection.sendall(bytes(32))
            thread.join(SOON_S)
        [error] = raised
        assert isinstance(error, PeerLost)
        assert ("does not have this run's secret" if is_known else "not a rendezvous store") in str(error)


def test_a_rank_of_another_run_is_told_so(server: StoreServer) -> None:
    client = StoreClient(StoreAddress(HOST, server.port, fresh_secret()), "p", 60.0)
    with pytest.raises(PeerLost, match="of another run"):
        client.connect()


def test_the_secret_is_shown_nowhere() -> None:
    address = StoreAddress(HOST, 7, SECRET)
    for shown in (repr(address), str(address), f"{address}"):
        assert shown == f"{HOST}:7"


def test_strangers_that_say_nothing_are_few_and_short_lived(
    connect: Connect, server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous_server, "MOST_STRANGERS", 5)
    member = connect()
    strangers = [socket.create_connection((HOST, server.port), timeout=SOON_S) for _ in range(12)]
    try:
        # The oldest make room: a rank of the run always gets in.
        assert all(is_ended(stranger) for stranger in strangers[:6])
        connect().set("a", b"in")
        assert member.get("a") == b"in"
        assert len(server._strangers) <= 5
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_stranger_has_seconds(server: StoreServer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendezvous_server.PROOF_S == 5.0
    monkeypatch.setattr(rendezvous_server, "PROOF_S", 0.05)
    member = connect()
    with socket.create_connection((HOST, server.port), timeout=SOON_S) as stranger:
        stranger.sendall(b"half a proof")
        assert is_ended(stranger)
    member.set("a", b"members have all the time they want")


# ---------------------------------------------------------------------------------------- what members may do


@pytest.mark.parametrize(
    "said",
    [
        request(ADD, b"text", NUMBER.pack(1)),
        request(ADD, b"n", b"no number"),
        request(ADD, b"n", b""),
        request(ADD, b"large", NUMBER.pack((1 << 63) - 1)),
        request(b"?", b"n"),
        REQUEST.pack(SET, 1 << 31, 0),
        REQUEST.pack(SET, 1, (16 << 20) + 1),
        request(GET, b"never") + request(GET, b"never"),
        request(GET, b"never") + request(SET, b"text", b"before its answer"),
    ],
    ids=["add to text", "add text", "add nothing", "overflow", "operation", "key", "value", "two waits", "impatient"],
)
def test_what_is_malformed_ends_its_connection_and_nothing_else(
    server: StoreServer, connect: Connect, said: bytes
) -> None:
    member = connect()
    member.set("text", b"not a number")
    member.add("large", 1)
    with as_member(server) as odd:
        odd.sendall(said)
        assert is_ended(odd)
    assert member.get("text") == b"not a number"
    assert member.add("n", 1) == 1
    assert server._thread.is_alive()


def test_no_error_in_a_request_ends_the_thread(
    server: StoreServer, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    member = connect()

    def fail(*arguments: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(server, "_handle", fail)
    with pytest.raises(PeerLost):
        member.set("a", b"")
    monkeypatch.undo()
    connect().set("a", b"")
    assert "a fault of ours" in caplog.text


def test_the_end_of_the_thread_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the next generation, which could not be formed."""
    told: queue.Queue[str] = queue.Queue()
    server = StoreServer(HOST, SECRET, told.put)

    def fail(now: float) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(server, "_look_at_the_clock", fail)
    socket.create_connection((HOST, server.port), timeout=SOON_S).close()
    assert told.get(timeout=SOON_S) == "MemoryError: none left"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, server.port), timeout=SOON_S)


def test_a_closed_server_tells_of_no_end() -> None:
    told: list[str] = []
    server = StoreServer(HOST, SECRET, told.append)
    server.close()
    server._thread.join(SOON_S)
    assert not server._thread.is_alive()
    assert told == []


def test_a_generation_leaves_nothing_behind(server: StoreServer, connect: Connect) -> None:
    """Values live as long as one of the ranks that share them is connected."""
    for generation in range(20):
        first, second = connect(f"run/0/{generation}"), connect(f"run/0/{generation}")
        first.set("large", bytes(1 << 20))
        first.close()
        assert len(second.get("large")) == 1 << 20
        second.close()
    last = connect("run/0/20")
    wait_until(lambda: server.num_bytes == 0)
    assert not last.check(["large"])
    assert list(server._scopes) == [b"run/0/20"]


def test_the_store_has_a_bound(server: StoreServer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous_server, "LARGEST_STORE_BYTES", 10_000)
    greedy, modest = connect(), connect()
    greedy.set("a", bytes(6_000))
    greedy.set("a", bytes(7_000))
    assert server.num_bytes == 7_001
    with pytest.raises(PeerLost):
        greedy.set("b", bytes(6_000))
    modest.set("c", bytes(1_000))
    assert len(modest.get("a")) == 7_000


def test_an_answer_larger_than_what_a_socket_takes_comes_whole(server: StoreServer, connect: Connect) -> None:
    large = bytes(range(256)) * (16 << 12)
    connect_and_stay = connect()
    connect_and_stay.set("large", large)
    with as_member(server) as slow:
        slow.sendall(request(GET, b"large"))
        connect_and_stay.set("meanwhile", b"others are served")
        assert receive(slow, ANSWER.size) == ANSWER.pack(len(large))
        assert receive(slow, len(large)) == large


def test_without_file_descriptors_it_waits_for_some(
    server: StoreServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither ends nor turns in circles, and takes in who waited when there are some again."""
    member = connect()
    tried: list[float] = []
    usual = server._take

    def exhausted() -> socket.socket:
        tried.append(time.monotonic())
        if len(tried) < 4:
            raise OSError(errno.EMFILE, "Too many open files")
        return usual()

    monkeypatch.setattr(rendezvous_server, "_PAUSE_S", 0.02)
    monkeypatch.setattr(server, "_take", exhausted)
    connect().set("a", b"in")
    assert member.get("a") == b"in"
    assert len(tried) == 4
    assert all(later - earlier >= 0.02 for earlier, later in itertools.pairwise(tried))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
