"""A thin link between two groups of ranks on one machine: a proxy that lets so many bytes a second through, each way.

Every connection between a rank of one group and a rank of the other goes through it: whoever looks up where a peer
listens is told another address of this host, where the proxy listens, if the peer is of the other group. (Gloo's two
ends compare addresses to agree on which of them connects: those of the groups, and of the proxy for them, are such that
both come to the same.) Tokens of a bucket are bytes; they come in
at the rate of the link, and a tenth of a second's worth can be saved up (a shallow buffer of a router).
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

HOSTS, BEYOND = ("127.0.0.1", "127.0.0.3"), ("127.0.0.2", "127.0.0.4")
"""Where ranks of each group listen, and where the proxy does for them."""
DOOR = "127.0.0.1"
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
        theirs = socket.create_connection((HOSTS[group], port))
        for each in (ours, theirs):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target, bucket in ((ours, theirs, buckets[group]), (theirs, ours, buckets[1 - group])):
            threading.Thread(target=_pump, args=(source, target, bucket), daemon=True).start()


def _main(pipe: Any, bytes_per_s: float) -> None:
    buckets = [Bucket(bytes_per_s), Bucket(bytes_per_s)]
    door = socket.create_server((DOOR, 0))
    pipe.send(door.getsockname()[1])
    opened: set[int] = set()
    while True:
        connection, _ = door.accept()
        with connection, connection.makefile("rw") as file:
            asked = json.loads(file.readline())
            if asked is None:
                file.write(json.dumps([bucket.passed for bucket in buckets]) + "\n")
                continue
            port, group = asked
            if port not in opened:
                opened.add(port)
                listener = socket.create_server((BEYOND[group], port), backlog=256)
                threading.Thread(target=_relay, args=(listener, port, group, buckets), daemon=True).start()
            file.write(json.dumps(port) + "\n")


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
    """Of the proxy: that a port of one of a group can be reached through it; or what has passed."""
    with socket.create_connection((DOOR, door)) as connection, connection.makefile("rw") as file:
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
            by_proxy = raw
            for port in ports:
                ask(door, [port, group])
                by_proxy = by_proxy.replace(_address(HOSTS[group], port), _address(BEYOND[group], port))
            usual_set(self, f"{key}/proxied", by_proxy)
            usual_set(self, f"{key}/group", str(group))
        usual_set(self, key, raw)

    def get(self: Any, key: str) -> bytes:
        raw = usual_get(self, key)
        if not _ports_in(raw) or int(usual_get(self, f"{key}/group")) == group:
            return raw
        return usual_get(self, f"{key}/proxied")

    StoreClient.set, StoreClient.get = set_, get  # type: ignore[method-assign]


def _address(host: str, port: int) -> bytes:
    """The beginning of a sockaddr_in."""
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(host)


def _ports_in(raw: bytes) -> set[int]:
    """The ports of this host's addresses in what gloo tells its peers."""
    start, ends = struct.pack("=H", socket.AF_INET), [socket.inet_aton(host) for host in HOSTS]
    return {
        struct.unpack("!H", raw[at + 2 : at + 4])[0]
        for at in range(len(raw) - 7)
        if raw[at : at + 2] == start and raw[at + 4 : at + 8] in ends
    }
