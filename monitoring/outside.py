"""What comes from outside this process (records, requests, manifests, small files of a run), read and written strictly.

Who can write to a run directory or a storage decides what is in it, and so do crashes and bad disks. Nothing here
raises anything but OSError and `Unreadable`, waits for a pipe, follows a link where none belongs, or takes more memory
than it is told to.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from monitoring.errors import UserError
from monitoring.redaction import redact, redact_urls

MAX_DEPTH = 64
"""How deep lists and objects may lie in each other: deeper ones would end whatever walks through them."""
SMALL_BYTES = 64 << 20
"""The most that status.json, result.json and the like may have; status.json of 10,000 workers has 5 MB."""

Check = Callable[[Any], str | None]
"""What is wrong with a value: None when nothing is. See `monitoring.shapes`."""


class Unreadable(UserError, ValueError):
    """What is there is not what belongs there; says what and why."""

    exit_code = 1


class Away(Unreadable, OSError):
    """What is there cannot be read just now: no access, a failing disk, a file system that is away."""


def parse(raw: bytes | str) -> Any:
    """The value of a JSON text: without NaN or infinity, no deeper than MAX_DEPTH, all text printable as UTF-8.

    Raises Unreadable.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(found):
        raise Unreadable(f"lists or objects more than {MAX_DEPTH} deep")
    if _SURROGATE.search(text) is not None:
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise Unreadable("half a character (a lone surrogate) in its text") from None
    return found


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def _refuse_constant(name: str) -> NoReturn:
    raise Unreadable(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isfinite(found := float(text)):
        return found
    raise Unreadable(f"{text[:20]} is no finite number")


def _is_deeper(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


def plain(value: Any) -> Any:
    """What is written down or sent: NaN and infinity, which JSON has not, become null, so that every reader can read
    every line, and the secrets in text are redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def without_secrets(value: Any) -> Any:
    """A value of JSON with the secrets of URLs redacted: the same from every process, whatever it has learnt."""
    if isinstance(value, str):
        return redact_urls(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, **options: Any) -> str:
    """JSON that every reader can read; `options` are those of json.dumps."""
    return json.dumps(plain(value), allow_nan=False, **options)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; never waits, as opening a pipe would.

    Raises FileNotFoundError, and Unreadable for anything else that is in the way.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        kind = Unreadable if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV) else Away
        raise kind(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, max_bytes: int = SMALL_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises FileNotFoundError, Unreadable."""
    with open_regular(path) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise Away(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise Unreadable(f"{path} has more than {max_bytes} bytes")
    return content


def read_json(path: Path, check: Check | None = None, max_bytes: int = SMALL_BYTES) -> Any:
    """The value in a small JSON file, as it should be by `check`. Raises FileNotFoundError, Unreadable."""
    content = read_small(path, max_bytes)
    try:
        found = parse(content)
    except Unreadable as error:
        raise Unreadable(f"{path} is damaged: {error}") from None
    if check is not None and (wrong := check(found)) is not None:
        raise Unreadable(f"{path} is damaged: {wrong}")
    return found
