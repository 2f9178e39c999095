"""How the two ends of a connection to a rendezvous store show each other that they are of one run.

Both have the run's secret, and neither says it: each sends a number that it has never sent before, and answers the
other's with an HMAC-SHA256 over both (a challenge and response in both directions, as in RFC 2195). So a stranger can
neither write to a store, nor lure a rank into one of its own. What is said afterwards is not encrypted; it is where
ranks listen.

    server  MAGIC, its number
    client  its number, length of the scope, its proof; then the scope
    server  its proof
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import NamedTuple

MAGIC = b"elastic-orchestrator store 1\n\x00\x00\x00"
NUMBER_BYTES = 32
HELLO_BYTES = len(MAGIC) + NUMBER_BYTES
PROOF_BYTES = 32
LARGEST_SCOPE_BYTES = 1024
_HEAD = struct.Struct(f"<{NUMBER_BYTES}sH{PROOF_BYTES}s")


class StoreAddress(NamedTuple):
    """Where a rendezvous store is served, and the secret that those who use it share. Shown without the secret."""

    host: str
    port: int
    secret: bytes

    def __repr__(self) -> str:
        return f"{self.host}:{self.port}"


def fresh_secret() -> bytes:
    """A secret for one run."""
    return secrets.token_bytes(32)


class ServerSide:
    """One connection, as the server sees it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._number = secrets.token_bytes(NUMBER_BYTES)

    @property
    def hello(self) -> bytes:
        return MAGIC + self._number

    def accept(self, received: bytes) -> tuple[bytes, bytes, int] | None:
        """The client's scope, the server's proof, and how many bytes were used up; None as long as there are too few.

        Raises ValueError when the client does not have the secret.
        """
        if len(received) < _HEAD.size:
            return None
        number, length, proof = _HEAD.unpack_from(received)
        if length > LARGEST_SCOPE_BYTES:
            raise ValueError("not a client of this store")
        end = _HEAD.size + length
        if len(received) < end:
            return None
        scope = bytes(received[_HEAD.size : end])
        if not hmac.compare_digest(proof, _prove(self._secret, b"client", self._number, number, scope)):
            raise ValueError("a client without this run's secret")
        return scope, _prove(self._secret, b"server", self._number, number, scope), end


class ClientSide:
    """One connection, as the client sees it."""

    def __init__(self, secret: bytes, scope: bytes) -> None:
        if len(scope) > LARGEST_SCOPE_BYTES:
            raise ValueError(f"the prefix of a rendezvous may have {LARGEST_SCOPE_BYTES} bytes, this has {len(scope)}")
        self._secret, self._scope = secret, scope
        self._number = secrets.token_bytes(NUMBER_BYTES)
        self._expected = b""

    def answer(self, hello: bytes) -> bytes:
        """What to send when the server's hello is there. Raises ValueError when it is none."""
        if not hello.startswith(MAGIC):
            raise ValueError("what listens there is not a rendezvous store of this version")
        server = hello[len(MAGIC) :]
        self._expected = _prove(self._secret, b"server", server, self._number, self._scope)
        proof = _prove(self._secret, b"client", server, self._number, self._scope)
        return _HEAD.pack(self._number, len(self._scope), proof) + self._scope

    def check(self, proof: bytes) -> None:
        """Raises ValueError when the server does not have the secret."""
        if not hmac.compare_digest(proof, self._expected):
            raise ValueError("what listens there does not have this run's secret")


def _prove(secret: bytes, side: bytes, server: bytes, client: bytes, scope: bytes) -> bytes:
    return hmac.digest(secret, side + server + client + scope, hashlib.sha256)
