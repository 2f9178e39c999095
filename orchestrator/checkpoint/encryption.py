"""Encrypted checkpoints: AES-256-GCM over every chunk, and a seal over the manifest.

What is encrypted is bound to its run, step, file, chunk and place in the file (as associated data), so that nothing can
be altered, cut off, moved or taken from another step without being noticed. Each checkpoint has a key of its own, made
from the job's key (HKDF, RFC 5869), so that random nonces never run out.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring.errors import UserError
from orchestrator.checkpoint.manifest import CheckpointError, canonical
from orchestrator.checkpoint.names import Save

NONCE_BYTES, TAG_BYTES, KEY_BYTES = 12, 16, 32
OVERHEAD = NONCE_BYTES + TAG_BYTES
"""Bytes that a chunk is longer by."""


class KeyProblem(UserError, ValueError):
    """No usable key; says where it was looked for, and never what was found there."""


@dataclass(frozen=True, repr=False)
class Secret:
    """The key of a job's checkpoints. It shows itself nowhere."""

    key: bytes

    def __repr__(self) -> str:
        return "Secret(...)"

    __str__ = __repr__

    def cipher(self, run: str, save: Save) -> Cipher:
        """That of one attempt at one checkpoint of one run."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        scope = {"run": run, **save._asdict()}

        def derive(purpose: str, length: int) -> bytes:
            info = canonical({"for": purpose, **scope})
            return HKDF(hashes.SHA256(), length, salt=None, info=info).derive(self.key)

        return Cipher(derive("checkpoint", KEY_BYTES), derive("key check", 8).hex(), scope)


class Cipher:
    """Encrypts and decrypts the chunks of one checkpoint."""

    def __init__(self, key: bytes, key_check: str, scope: dict[str, Any]) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aead = AESGCM(key)
        self.key_check = key_check
        """Tells one key from another, and nothing else about it."""
        self._scope = scope

    def describe(self) -> dict[str, str]:
        """For the manifest."""
        return {"algorithm": "AES-256-GCM", "key": "HKDF-SHA256", "key_check": self.key_check}

    def _context(self, **where: Any) -> bytes:
        return canonical({**self._scope, **where})

    def encrypt(self, data: Any, *, file: str, chunk: str, start: int) -> bytes:
        """Nonce, encrypted bytes, tag: to be put at byte `start` of `file`."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, data, self._context(file=file, chunk=chunk, start=start))

    def decrypt(self, stored: Any, *, file: str, chunk: str, start: int) -> bytes:
        """Raises CheckpointError when these are not the bytes that were put there with this key."""
        view = memoryview(stored)
        return self._open(
            view[:NONCE_BYTES], view[NONCE_BYTES:], f"{file}: {chunk}", file=file, chunk=chunk, start=start
        )

    def seal(self, manifest: bytes) -> str:
        """Proof that somebody with the key has seen this manifest."""
        nonce = os.urandom(NONCE_BYTES)
        tag = self._aead.encrypt(nonce, b"", self._context(manifest=manifest.decode("ascii")))
        return (nonce + tag).hex()

    def check(self, seal: str | None, manifest: bytes, where: str) -> None:
        """Raises CheckpointError when this is not the seal of that manifest."""
        try:
            raw = bytes.fromhex(seal or "")
        except ValueError:
            raw = b""
        self._open(raw[:NONCE_BYTES], raw[NONCE_BYTES:], where, manifest=manifest.decode("ascii"))

    def _open(self, nonce: Any, sealed: Any, what: str, **where: Any) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return self._aead.decrypt(bytes(nonce), sealed, self._context(**where))
        except (InvalidTag, ValueError) as error:
            raise CheckpointError(f"{what}: not written with this key, or altered since") from error


def read_key(text: str, where: str) -> Secret:
    """A key of 32 bytes in hexadecimal or base64. Raises KeyProblem."""
    text = text.strip()
    for decode in (bytes.fromhex, lambda value: base64.b64decode(value, altchars=b"-_", validate=True)):
        try:
            key = decode(text)
        except (ValueError, binascii.Error):
            continue
        if len(key) == KEY_BYTES:
            return Secret(key)
    raise KeyProblem(
        f"{where} is no key: a key is {KEY_BYTES} random bytes in hexadecimal or base64, "
        "for example from `openssl rand -hex 32`"
    )


def find_key(key: str | None, file: str | None) -> Secret:
    """The key that a job names: `${env:NAME}`, or a file. Raises KeyProblem."""
    if file is not None:
        try:
            return read_key(Path(file).read_text(encoding="utf-8"), f"checkpoint.encryption.file {file}")
        except (OSError, UnicodeDecodeError) as error:
            raise KeyProblem(f"checkpoint.encryption.file {file} cannot be read: {error}") from None
    name = (key or "").removeprefix("${env:").removesuffix("}")
    value = os.environ.get(name)
    if not value:
        raise KeyProblem(f"checkpoint.encryption.key: the environment variable {name} is not set")
    return read_key(value, f"checkpoint.encryption.key: the environment variable {name}")
