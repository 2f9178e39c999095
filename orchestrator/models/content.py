"""The content of a model's directory as a digest, so that a job names weights and not the path where they lie.

A file is hashed once: what was found is kept in the user's cache by path, size, times and inode. The inode's change
time is among them, which no program sets, and a few blocks of the file are compared on every use: a file system that
keeps coarse times is found out as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from monitoring.outside import json_text
from orchestrator.job import Job
from orchestrator.models.directory import find_directory
from orchestrator.models.problems import reason_of, refused

_BLOCK = 1 << 22
_PROBE = 1 << 14
_PROBES = 16
_SETTLED_NS = 2_000_000_000
"""A file changed within this time may change again under the same time stamps: it is not kept."""
_NAMES = {
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt",
}  # fmt: skip
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_PICKLED = (".bin", ".bin.index.json")
_TOKENS = (".model", ".tiktoken")


def with_content(job: Job) -> Job:
    """The job with `model.content` filled in, if its model is a directory; what `digest()` and `numerics()` then cover
    is the content and not the path.

    Raises ModelError when there is no such directory, or when the job says another content than it has.
    """
    if not isinstance(job.model.hf, str):
        return job
    found = content_of(find_directory(job.model.hf))
    if job.model.content is None:
        return job.model_copy(update={"model": job.model.model_copy(update={"content": found})})
    if job.model.content != found:
        raise refused(
            f"{job.model.hf} holds {found}, the job says {job.model.content}: its weights, configuration or tokenizer "
            "are not those that the job was made for; restore them, or name the directory that has them",
            "model.hf", "model.content",
        )  # fmt: skip
    return job


def content_of(directory: Path, *, only_weights: bool = False) -> str:
    """`sha256:<hex>` over the names and contents of the files that decide what a model directory gives: configuration,
    weights, tokenizer; or of its weights alone. Raises ModelError when one cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in _files(directory):
            if only_weights and not path.name.endswith(_WEIGHTS + _PICKLED):
                continue
            digest.update(f"{path.name}\0{_digest_of(path)}\n".encode())
    except OSError as error:
        raise refused(f"{directory} cannot be read: {reason_of(error)}") from None
    return "sha256:" + digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    there = sorted(path for path in directory.iterdir() if path.is_file())
    weights = _WEIGHTS if any(path.name.endswith(_WEIGHTS) for path in there) else _PICKLED
    return [path for path in there if path.name in _NAMES or path.name.endswith(weights + _TOKENS)]


def _digest_of(path: Path) -> str:
    """The digest of a file's bytes, from the cache if the file is certainly the one that was hashed."""
    real = os.path.realpath(path)
    entry = _cache() / f"{hashlib.sha256(real.encode()).hexdigest()[:32]}.json"
    before = _identity(real)
    known = _read(entry)
    if known is not None and known.get("identity") == before and known.get("probe") == _probe(real, before[0]):
        return str(known["digest"])
    whole = xxhash.xxh3_128()
    with open(real, "rb") as file:
        while block := file.read(_BLOCK):
            whole.update(block)
    probe = _probe(real, before[0])
    if _identity(real) != before:
        raise OSError(f"{path.name} changes while it is read")
    if time.time_ns() - max(before[1], before[2]) > _SETTLED_NS:
        _write(entry, {"identity": before, "probe": probe, "digest": whole.hexdigest()})
    return whole.hexdigest()


def _identity(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _probe(path: str, size: int) -> str:
    """A digest of a few blocks all over the file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        for offset in _offsets(size):
            file.seek(offset)
            digest.update(file.read(_PROBE))
    return digest.hexdigest()


def _offsets(size: int) -> Iterator[int]:
    last = max(0, size - _PROBE)
    return iter(sorted({last * number // (_PROBES - 1) for number in range(_PROBES)}))


def _cache() -> Path:
    from orchestrator.data.store import default_cache

    return default_cache() / "model-files"


def _read(entry: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(entry.read_text("utf-8"))
        return content if isinstance(content, dict) and isinstance(content.get("digest"), str) else None
    return None


def _write(entry: Path, content: dict[str, Any]) -> None:
    # Without a cache the file is only hashed again.
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.with_name(f"{entry.name}.{os.getpid()}.partial")
        partial.write_text(json_text(content), encoding="utf-8")
        partial.replace(entry)
