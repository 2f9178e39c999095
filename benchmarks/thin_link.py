"""A thin link between two groups of ranks on one machine: a proxy that lets so many bytes a second through, each way.

Every connection between a rank of one group and a rank of the other goes through it: whoever looks up where a peer
listens is told a port of the proxy's, if the peer is of the other group. Tokens of a bucket are bytes; they come in at
the rate of the link, and a tenth of a second's worth can be saved up (a shallow buffer of a router).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import struct
import threading
import time
from typing import Any

HOST = "127.0.0.1"
SAVED_S = 0.1
CHUNK = 1 << 16


class Bucket:
    """Bytes that may pass in one direction."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._most = bytes_per_s, bytes_per_s * SAVED_S
        self._tokens, self._at = self._most, time.monotonic()
        self._lock = threading.Lock()
        self.passed = 0

    def take(self, count: int) -> None:
        """Waits until so many may pass, in the order of arrival."""
        with self._lock:
            while True:
                now = time.monotonic()
                self._tokens = min(self._most, self._tokens + (now - self._at) * self._rate)
                self._at = now
                if self._tokens >= min(count, self._most):
                    self._tokens -= count
                    self.passed += count
                    return
                time.sleep((min(count, self._most) - self._tokens) / self._rate)


def _pump(source: socket.socket, target: socket.socket, bucket: Bucket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            bucket.take(len(data))
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _relay(listener: socket.socket, port: int, group: int, buckets: list[Bucket]) -> None:
    """Connects whoever comes to `port`, where a rank of `group` listens."""
    while True:
        ours, _ = listener.accept()
        theirs = socket.create_connection((HOST, port))
        for each in (ours, theirs):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target, bucket in ((ours, theirs, buckets[group]), (theirs, ours, buckets[1 - group])):
            threading.Thread(target=_pump, args=(source, target, bucket), daemon=True).start()


def _main(pipe: Any, bytes_per_s: float) -> None:
    buckets = [Bucket(bytes_per_s), Bucket(bytes_per_s)]
    door = socket.create_server((HOST, 0))
    pipe.send(door.getsockname()[1])
    opened: dict[int, int] = {}
    while True:
        connection, _ = door.accept()
        with connection, connection.makefile("rw") as file:
            asked = json.loads(file.readline())
            if asked is None:
                file.write(json.dumps([bucket.passed for bucket in buckets]) + "\n")
                continue
            port, group = asked
            if port not in opened:
                listener = socket.create_server((HOST, 0), backlog=256)
                opened[port] = listener.getsockname()[1]
                threading.Thread(target=_relay, args=(listener, port, group, buckets), daemon=True).start()
            file.write(json.dumps(opened[port]) + "\n")


class ThinLink:
    """A proxy in a process of its own."""

    def __init__(self, bits_per_s: float) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, bits_per_s / 8), daemon=True)
        self._process.start()
        self.door = ours.recv()

    def passed(self) -> list[int]:
        """Bytes that have passed, by the group they went to."""
        return list(ask(self.door, None))

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def ask(door: int, what: Any) -> Any:
    """Of the proxy: the port by which one of a group is reached; or what has passed."""
    with socket.create_connection((HOST, door)) as connection, connection.makefile("rw") as file:
        file.write(json.dumps(what) + "\n")
        file.flush()
        return json.loads(file.readline())


def go_through(door: int, group: int) -> None:
    """From here on, what this process looks up in rendezvous stores leads through the proxy where it is of the other
    group."""
    from strategies.comm.rendezvous import StoreClient

    usual_set, usual_get = StoreClient.set, StoreClient.get

    def set_(self: Any, key: str, value: Any) -> None:
        raw = value.encode() if isinstance(value, str) else bytes(value)
        ports = _ports_in(raw)
        if ports:
            usual_set(self, f"{key}/group", str(group))
            by_proxy = raw
            for port in ports:
                by_proxy = by_proxy.replace(_address(port), _address(ask(door, [port, group])))
            usual_set(self, f"{key}/proxied", by_proxy)
        usual_set(self, key, raw)

    def get(self: Any, key: str) -> bytes:
        raw = usual_get(self, key)
        if not _ports_in(raw) or int(usual_get(self, f"{key}/group")) == group:
            return raw
        return usual_get(self, f"{key}/proxied")

    StoreClient.set, StoreClient.get = set_, get  # type: ignore[method-assign]


def _address(port: int) -> bytes:
    """The beginning of a sockaddr_in of this host."""
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(HOST)


def _ports_in(raw: bytes) -> set[int]:
    """The ports of this host's addresses in what gloo tells its peers."""
    start, end = struct.pack("=H", socket.AF_INET), socket.inet_aton(HOST)
    return {
        struct.unpack("!H", raw[at + 2 : at + 4])[0]
        for at in range(len(raw) - 7)
        if raw[at : at + 2] == start and raw[at + 4 : at + 8] == end
    }
