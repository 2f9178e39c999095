"""A storage tried out: files written, seen, read and removed by every machine, with the code that checkpoints use.

Its functions are sent to the nodes of a cluster as they are, by value, like `doctor.facts`; so is the storage's module.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from pathlib import Path
from typing import Any

from orchestrator.storage import LocalStorage, open_storage

PIECE_BYTES = 8 << 20


def write_file(url: str, directory: str, name: str, num_bytes: int) -> dict[str, Any]:
    """Writes a file of random bytes: {seconds, digest, made} with the directories that had to be made for it, or
    {error}."""
    data = random.Random(name).randbytes(num_bytes)
    try:
        storage = open_storage(url)
        made = _missing_parents(storage)
        begin = time.perf_counter()
        pieces = [memoryview(data)[start : start + PIECE_BYTES] for start in range(0, num_bytes, PIECE_BYTES)]
        storage.put(f"{directory}/{name}", lambda: pieces)
        return {"seconds": time.perf_counter() - begin, "digest": hashlib.sha256(data).hexdigest(), "made": made}
    except Exception as error:  # client libraries raise what they like
        return {"error": _reason(error)}


def read_file(url: str, directory: str, name: str, num_bytes: int) -> dict[str, Any]:
    """Reads a file, from the storage and not from this machine's memory where that can be had: {seconds, digest,
    visible} with the names of all files seen beside it, or {error, visible}."""
    visible: list[str] = []
    buffer = bytearray(num_bytes)
    try:
        storage = open_storage(url)
        visible = storage.names(directory)
        _forget(storage, f"{directory}/{name}")
        begin = time.perf_counter()
        storage.read_into(f"{directory}/{name}", 0, memoryview(buffer))
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "digest": hashlib.sha256(buffer).hexdigest(), "visible": visible}
    except Exception as error:
        return {"error": _reason(error), "visible": visible}


def remove_files(url: str, directory: str, names: list[str] | None) -> dict[str, Any]:
    """Removes files (None: all there are); {} or {error}."""
    try:
        storage = open_storage(url)
        for name in storage.names(directory) if names is None else names:
            storage.remove(f"{directory}/{name}")
        return {}
    except Exception as error:
        return {"error": _reason(error)}


def remove_directory(url: str, directory: str, made: list[str]) -> dict[str, Any]:
    """Removes the empty directory, and those that were made for it; {} or {error}."""
    try:
        open_storage(url).remove_directory(directory)
    except Exception as error:
        return {"error": _reason(error)}
    for path in made:
        with contextlib.suppress(OSError):
            os.rmdir(path)
    return {}


def _local_root(storage: Any) -> Path | None:
    inner = getattr(storage, "inner", storage)
    return inner.root if isinstance(inner, LocalStorage) else None


def _missing_parents(storage: Any) -> list[str]:
    """The directories up to the storage's own that are not there yet, the deepest first."""
    path, missing = _local_root(storage), []
    while path is not None and not path.exists() and path != path.parent:
        missing.append(str(path))
        path = path.parent
    return missing


def _forget(storage: Any, path: str) -> None:
    """Has the operating system drop what it keeps of a file in memory."""
    root = _local_root(storage)
    if root is None:
        return
    with contextlib.suppress(OSError):
        file = os.open(root / path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    if isinstance(error, ValueError) and lines:
        return lines[0]  # from `open_storage`, for the user
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
