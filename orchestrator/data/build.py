"""Building a token store: cutting the source into tasks, running them, and putting the result in place.

Builders may run at once, in any number, and die at any moment: a store appears under its name whole or not at
all.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from orchestrator.data.encoding import Encoded, Side, encoder_of, sequences_of
from orchestrator.data.formats import DEFAULT_FIELD, can_be_cut, no_document, row_groups
from orchestrator.data.locations import Patience
from orchestrator.data.manifest import (
    COUNTED_SHIFT,
    DTYPES,
    MANIFEST_NAME,
    RANGE_BYTES,
    FileEntry,
    RecordsEntry,
    ShardEntry,
    StoreManifest,
)
from orchestrator.data.opening import ByteSpan
from orchestrator.data.reading import Content, Library
from orchestrator.data.records import MARK, RecordSpec
from orchestrator.data.sources import DataError, SourceFile
from orchestrator.data.task_split import cut
from orchestrator.data.tokenizers import Tokenizer, load_tokenizer

MAX_TASKS = 16
SKIPPED_TOLD = 10
"""Bad records that are named one by one."""

# What renaming a directory onto something that is there already can answer.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_PUBLISH_ATTEMPTS = 10
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class ShardTask:
    """What one task must do: what all tasks share, and its own files, or parts of them. Plain data, so that it can
    travel."""

    directory: str
    shard: str
    dtype: str
    field: str | None
    document: str | None
    tokenizer: str
    tokenizer_identity: str
    files: tuple[SourceFile, ...]
    contents: tuple[Content, ...]
    spans: tuple[ByteSpan, ...]
    mirrors: tuple[str, ...]
    patience: Patience
    records: RecordSpec | None = None
    side: Side | None = None


@dataclass(frozen=True)
class ShardWritten:
    """A shard, its part of each file, and the bad records that were left out, of which the first are told."""

    shard: ShardEntry
    files: list[FileEntry]
    skipped: int = 0
    first_skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What a store is made from. `tokenizer` is the name by which a task loads it, `loaded` the same one, loaded."""

    files: Sequence[SourceFile]
    contents: Sequence[Content]
    field: str | None
    document: str | None
    library: Library
    tokenizer: str
    loaded: Tokenizer
    records: RecordSpec | None = None
    side: Side | None = None

    @property
    def dtype(self) -> str:
        """The type of a token in the store."""
        if self.records is not None:
            return "uint32"  # With marks.
        return "uint16" if self.loaded.vocab_size <= 1 << 16 else "uint32"

    def by_ranges(self) -> Recipe:
        """The same, with what is needed to read parts of its files."""
        contents = [self.library.by_ranges(*each) for each in zip(self.files, self.contents, strict=True)]
        return replace(self, contents=contents)

    def tasks(self, directory: Path) -> list[ShardTask]:
        """What writes its shards below `directory`, in their order."""
        groups = cut(
            [file.size_bytes for file in self.files],
            [
                _grain(file, content, self.field, self.document, self.library)
                if can_be_cut(file, self.document)
                else None
                for file, content in zip(self.files, self.contents, strict=True)
            ],
            MAX_TASKS,
        )
        return [
            ShardTask(
                directory=str(directory),
                shard=f"shard-{number:05d}.bin",
                dtype=self.dtype,
                field=self.field,
                document=self.document,
                tokenizer=self.tokenizer,
                tokenizer_identity=self.loaded.identity,
                files=tuple(self.files[piece.file] for piece in pieces),
                contents=tuple(self.contents[piece.file] for piece in pieces),
                spans=tuple(piece.span for piece in pieces),
                mirrors=self.library.mirrors,
                patience=self.library.patience,
                records=self.records,
                side=self.side,
            )
            for number, pieces in enumerate(groups)
        ]


def build_store(
    target: Path,
    key: str,
    recipe: Recipe,
    run_tasks: Callable[[Callable[..., Any], list[tuple[Any, ...]]], list[Any]],
    is_locked: bool,
) -> Path:
    """Build a store in a new directory beside its target, synced to disk, and return that directory.

    is_locked: no other builder of this store can be at work on this machine, so what dead ones left is removed.

    Raises DataError when a source file cannot be used or changed meanwhile, OSError when the cache cannot be
    written.
    """
    if is_locked:
        for leftover in target.parent.glob(f"{_beside(target)}*"):
            _discard(leftover)
    build = target.with_name(_beside(target) + secrets.token_hex(8))
    tasks = recipe.tasks(build)
    build.mkdir()
    try:
        written: list[ShardWritten] = run_tasks(write_shard, [(task,) for task in tasks])
        results = [(each.shard, each.files) for each in written]
        _refuse_if_all_bad(written)
        assert [shard.name for shard, _ in results] == [task.shard for task in tasks], "run_tasks changed the order"
        manifest = StoreManifest(
            key=key,
            dtype=recipe.dtype,
            vocab_size=recipe.loaded.vocab_size,
            files=_whole_files(build, recipe.dtype, recipe.files, results, may_be_empty=recipe.side is not None),
            shards=tuple(shard for shard, _ in results if shard.tokens),
            records=_records_entry(recipe.records, written),
        )
        for shard, _ in results:
            if not shard.tokens:  # no document begins in what was the task's share
                (build / shard.name).unlink()
                (build / shard.documents_name).unlink()
        with open(build / MANIFEST_NAME, "w", encoding="utf-8") as stream:
            stream.write(manifest.to_json())
            _finish(stream)
        _sync_directory(build)
    except BaseException:
        _discard(build)
        raise
    return build


def _refuse_if_all_bad(written: Sequence[ShardWritten]) -> None:
    """Raises DataError where bad records are left out, and nothing else is there."""
    skipped = sum(each.skipped for each in written)
    if skipped and not any(entry.documents for each in written for entry in each.files):
        told = next(text for each in written for text in each.first_skipped)
        raise DataError(f"all of {skipped:,} records are bad, and nothing is left to train on; the first: {told}")


def _records_entry(spec: RecordSpec | None, written: Sequence[ShardWritten]) -> RecordsEntry | None:
    if spec is None:
        return None
    told = [text for each in written for text in each.first_skipped]
    return RecordsEntry(
        spec.sequences, spec.label_words, sum(each.skipped for each in written), tuple(told[:SKIPPED_TOLD])
    )  # fmt: skip


def _grain(
    file: SourceFile, content: Content, field: str | None, document: str | None, library: Library
) -> Callable[[], Sequence[int]]:
    """Where a file can be cut, for `cut`."""
    if file.format == "parquet":
        return lambda: row_groups(file, DEFAULT_FIELD if field is None else field, library, content)
    return lambda: ()


def _whole_files(
    build: Path, dtype: str, files: Sequence[SourceFile], results: Sequence[tuple[ShardEntry, list[FileEntry]]],
    *, may_be_empty: bool,
) -> tuple[FileEntry, ...]:  # fmt: skip
    """The entries of whole files, from those of their parts: the same however they were cut.

    The digest of a file that was cut is made from the shards that hold it. Raises DataError for a file without any
    document.
    """
    parts: dict[str, list[tuple[str, int, FileEntry]]] = {}
    for shard, entries in results:
        offset = 0
        for entry in entries:
            parts.setdefault(entry.name, []).append((shard.name, offset, entry))
            offset += entry.tokens * DTYPES[dtype]
    whole = []
    for file in files:
        found = parts[file.name]
        first = found[0][2]
        if len(found) == 1:
            whole.append(first)
            continue
        digest = xxhash.xxh3_128()
        for name, offset, entry in found:
            with open(build / name, "rb") as stream:
                stream.seek(offset)
                left = entry.tokens * DTYPES[dtype]
                while left and (data := stream.read(min(left, _CHUNK_BYTES))):
                    digest.update(data)
                    left -= len(data)
            if left:
                raise OSError(errno.EIO, "it is shorter than what was written", str(build / name))
        num_documents = sum(entry.documents for *_, entry in found)
        num_tokens = sum(entry.tokens for *_, entry in found)
        if not (num_documents or may_be_empty):
            raise no_document(file)
        whole.append(FileEntry(file.name, first.fingerprint, num_documents, num_tokens, digest.hexdigest()))
    return tuple(whole)


def write_shard(task: ShardTask) -> ShardWritten:
    """Tokenise the files (or parts of files) of one task, in order, into one shard, synced to disk; and an entry for
    each of them.

    Runs wherever run_tasks takes it. Raises DataError when a file cannot be used, or the files or the
    tokenizer are not the ones the builder saw (it changed, or this is another machine), or the cache is not
    visible here.
    """
    if not os.path.isdir(task.directory):
        raise DataError(
            f"{task.directory} does not exist on {socket.gethostname()}, where a task was run to fill it; "
            "the cache must be on storage that every task shares"
        )
    tokenizer = _load(task.tokenizer, task.tokenizer_identity)
    encoder = encoder_of(task.records, tokenizer)
    shard_digest = xxhash.xxh3_128()
    entries = []
    lengths: list[int] = []
    library = Library(task.mirrors, task.patience)
    path = os.path.join(task.directory, task.shard)
    with open(path, "wb") as stream:
        for file, content, span in zip(task.files, task.contents, task.spans, strict=True):
            num_documents = num_tokens = 0
            file_digest = xxhash.xxh3_128()
            wanted = Encoded(file, library, content, span, task.field, task.document, task.side)
            for tokens in sequences_of(wanted, tokenizer, encoder):
                data = tokens.astype(np.dtype(task.dtype).newbyteorder("<")).tobytes()
                stream.write(data)
                file_digest.update(data)
                shard_digest.update(data)
                num_documents += 1
                num_tokens += len(tokens)
                lengths.append(_length_entry(tokens, encoder is not None))
            library.confirm(file, content)
            entries.append(
                FileEntry(file.name, content.fingerprint, num_documents, num_tokens, file_digest.hexdigest())
            )
        size_bytes = stream.tell()
        _finish(stream)
    with open(path, "rb") as written:
        ranges = "".join(xxhash.xxh3_64_hexdigest(data) for data in iter(lambda: written.read(RANGE_BYTES), b""))
    sizes = np.array(lengths, dtype="<i8").tobytes()
    shard = ShardEntry(
        task.shard, sum(file.tokens for file in entries), size_bytes, shard_digest.hexdigest(), len(lengths),
        xxhash.xxh3_128_hexdigest(sizes), ranges,
    )  # fmt: skip
    with open(os.path.join(task.directory, shard.documents_name), "wb") as stream:
        stream.write(sizes)
        _finish(stream)
    skipped = (0, ()) if encoder is None else (encoder.skipped, tuple(encoder.first_skipped))
    return ShardWritten(shard, entries, *skipped)


def _length_entry(tokens: np.ndarray, is_marked: bool) -> int:
    """A sequence's length, and above it how many of its tokens count as targets, where that is told."""
    counted = int(np.count_nonzero(tokens[1:] & MARK)) if is_marked else 0
    return len(tokens) | counted << COUNTED_SHIFT


def _finish(stream: IO[Any]) -> None:
    """Syncs a file of a store, and takes the right to write from everybody: it never changes again."""
    stream.flush()
    os.fsync(stream.fileno())
    mode = os.fstat(stream.fileno()).st_mode
    os.fchmod(stream.fileno(), mode & 0o444)


@functools.lru_cache(maxsize=1)
def _load(name: str, identity: str) -> Tokenizer:
    """The tokenizer of the given identity, kept between the tasks that run in one process."""
    tokenizer = load_tokenizer(name)
    if tokenizer.identity != identity:
        raise DataError(
            f"data.tokenizer: {name} on {socket.gethostname()} is {tokenizer.identity}, but the build began "
            f"with {identity}; give every node the same tokenizer files and library versions"
        )
    return tokenizer


def publish(build: Path, target: Path, is_right: Callable[[], bool]) -> None:
    """Rename a built store into place; where another builder was first and its store is right, keep that one.

    is_right: whether a whole store stands at the target. Raises OSError when the cache cannot be written.
    """
    for _ in range(_PUBLISH_ATTEMPTS):
        try:
            os.rename(build, target)
            _sync_directory(target.parent)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                _discard(build)
                raise
        if is_right():
            _discard(build)
            return
        # A broken store is moved away before it is removed: others may have it open, and none may see half of
        # it.
        broken = target.with_name(_beside(target) + secrets.token_hex(8))
        try:
            os.rename(target, broken)
        except FileNotFoundError:  # another builder has just done so
            continue
        _discard(broken)
    _discard(build)
    raise OSError(f"{target} is taken by a broken store again and again")


@contextmanager
def building_lock(target: Path) -> Iterator[bool]:
    """Hold the lock of a store's builders; gives False on file systems without locks.

    The lock saves work and tidies up, no more: `publish` is safe without it.
    """
    with open(target.with_name(target.name + ".lock"), "a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            # Closing would not do: a process forked meanwhile shares the lock.
            fcntl.flock(stream, fcntl.LOCK_UN)


def _beside(target: Path) -> str:
    """How the names of unfinished work begin. It has the machine, as locks may not reach across machines."""
    return f"{target.name}.{socket.gethostname()}-"


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
