"""The checkpoints of a run: opening, completing, setting aside and removing them.

A checkpoint is a directory `step-00000120` of parts, MANIFEST.json and COMMIT, written in this order and removed in the
reverse one. So whatever happens in between, one that has its COMMIT is complete; whether it is still what was
written, digests tell.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import xxhash

from orchestrator.checkpoint.encryption import Cipher, Secret
from orchestrator.checkpoint.manifest import (
    COMMIT,
    INVALID,
    MANIFEST,
    MAX_COMMIT_BYTES,
    MAX_MANIFEST_BYTES,
    CheckpointError,
    ChunkEntry,
    Commit,
    FrozenEntry,
    Manifest,
    Part,
    TensorEntry,
    UnusableCheckpoint,
    digest_of,
)
from orchestrator.checkpoint.names import Save, directory_name, is_part, step_of
from orchestrator.storage import NotAFile, Storage

READ_AT_ONCE = 32 << 20
"""Bytes of neighbouring chunks that are read in one go."""
THREADS = 4


class StoredCheckpoint:
    """A complete checkpoint whose manifest is the one that was written. Its chunks are verified as they are read."""

    def __init__(self, storage: Storage, commit: Commit, manifest: Manifest, cipher: Cipher | None) -> None:
        self.storage = storage
        self.directory = directory_name(commit.committed)
        self.saved_at = commit.at
        self.manifest = manifest
        self._cipher = cipher
        self._by_tensor: dict[str, list[ChunkEntry]] | None = None

    @property
    def save(self) -> Save:
        """The attempt that it is from."""
        manifest = self.manifest
        return Save(manifest.committed, manifest.epoch, manifest.generation, manifest.attempt)

    @property
    def location(self) -> str:
        return self.storage.locate(self.directory)

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.manifest.files)

    def chunks_of(self, tensor: str) -> list[ChunkEntry]:
        """Those of one tensor. Raises KeyError when there is no such tensor."""
        if self._by_tensor is None:
            self._by_tensor = {name: [] for name in self.manifest.tensors}
            for chunk in self.manifest.chunks:
                self._by_tensor[chunk.tensor].append(chunk)
        return self._by_tensor[tensor]

    def read(
        self,
        chunks: Iterable[ChunkEntry],
        take: Callable[[ChunkEntry, memoryview], None],
        room: Callable[[ChunkEntry], memoryview | None] = lambda chunk: None,
    ) -> None:
        """Calls `take` with each of these chunks and its verified contents, which are gone when it returns. Where there
        is `room` for a chunk its contents are in that, which saves a copy. Several threads do this at once, in no
        particular order.

        Raises CheckpointError when what is there is not what was written, OSError when it cannot be read.
        """
        direct: list[tuple[ChunkEntry, memoryview]] = []
        others: list[ChunkEntry] = []
        for chunk in chunks:
            found = room(chunk) if self._cipher is None else None
            if found is None:
                others.append(chunk)
            else:
                direct.append((chunk, found))
        tasks = [functools.partial(self._read_direct, chunk, buffer, take) for chunk, buffer in direct]
        tasks += [functools.partial(self._read_run, run, take) for run in _runs(others)]
        with ThreadPoolExecutor(min(THREADS, len(tasks)) or 1, "checkpoint-read") as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def _read_direct(
        self, chunk: ChunkEntry, buffer: memoryview, take: Callable[[ChunkEntry, memoryview], None]
    ) -> None:
        self._fill(chunk.file, chunk.start, buffer)
        self._check(chunk, buffer)
        take(chunk, buffer)

    def _check(self, chunk: ChunkEntry, stored: memoryview) -> None:
        if digest_of(stored) != chunk.xxh3_128:
            raise CheckpointError(f"{self.location}/{chunk.file}: {chunk} is not what was saved (digest differs)")

    def _read_run(self, run: Sequence[ChunkEntry], take: Callable[[ChunkEntry, memoryview], None]) -> None:
        file, start = run[0].file, run[0].start
        buffer = memoryview(bytearray(run[-1].stop - start))
        self._fill(file, start, buffer)
        for chunk in run:
            stored = buffer[chunk.start - start : chunk.stop - start]
            self._check(chunk, stored)
            take(chunk, self._decrypted(chunk, stored))

    def _decrypted(self, chunk: ChunkEntry, stored: memoryview) -> memoryview:
        if self._cipher is None:
            return stored
        # In memory of its own that may be written to, as tensors want it.
        clear = memoryview(
            bytearray(self._cipher.decrypt(stored, file=chunk.file, chunk=str(chunk), start=chunk.start))
        )
        if clear.nbytes != chunk.num_bytes:
            raise CheckpointError(f"{self.location}/{chunk.file}: {chunk} has the wrong length")
        return clear

    def _fill(self, file: str, start: int, buffer: memoryview) -> None:
        try:
            self.storage.read_into(f"{self.directory}/{file}", start, buffer)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.location}/{file}: the file is gone") from error
        except EOFError as error:
            raise CheckpointError(f"{self.location}/{file}: cut off: {error}") from error
        except (NotAFile, IsADirectoryError) as error:
            raise CheckpointError(f"{self.location}/{file}: {error}") from error

    def verify(self) -> None:
        """Reads every byte. Raises CheckpointError when anything is not what was written, OSError."""
        ranges = [(file.name, 0, file.header_bytes, file.header_xxh3_128, "its header") for file in self.manifest.files]
        ranges += [(c.file, c.start, c.stop, c.xxh3_128, str(c)) for c in self.manifest.chunks]
        with ThreadPoolExecutor(THREADS, "checkpoint-verify") as pool:
            # Its own order is that of the files; the first that is wrong is told.
            for found in list(pool.map(lambda part: self._wrong(*part), sorted(ranges))):
                if found is not None:
                    raise found

    def _wrong(self, file: str, start: int, stop: int, digest: str, what: str) -> CheckpointError | None:
        """What is wrong with some bytes of a file, read in pieces of a size that does not depend on what is there."""
        hashed = xxhash.xxh3_128()
        buffer = memoryview(bytearray(min(READ_AT_ONCE, stop - start)))
        try:
            for at in range(start, stop, READ_AT_ONCE):
                piece = buffer[: min(READ_AT_ONCE, stop - at)]
                self._fill(file, at, piece)
                hashed.update(piece)
        except CheckpointError as error:
            return error
        if hashed.hexdigest() != digest:
            return CheckpointError(f"{self.location}/{file}: {what} is not what was saved (digest differs)")
        return None


def _runs(chunks: Iterable[ChunkEntry]) -> Iterator[list[ChunkEntry]]:
    """Chunks that lie next to each other, as many at once as READ_AT_ONCE allows."""
    run: list[ChunkEntry] = []
    for chunk in sorted(chunks, key=lambda chunk: (chunk.file, chunk.start)):
        if run and (
            (run[-1].file, run[-1].stop) != (chunk.file, chunk.start) or chunk.stop - run[0].start > READ_AT_ONCE
        ):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


@dataclass(frozen=True)
class Description:
    """What a manifest says beside where the chunks are; see there."""

    job: str
    layout: Mapping[str, Any]
    data: Mapping[str, Any]
    randomness: Mapping[str, Any]
    schedule: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    frozen: FrozenEntry | None = None


class Catalog:
    """All checkpoints of a `run`, in one storage; with a `secret` they are encrypted. A run that was forked from
    another has one more, `origin`: a step of the other's catalog, which is read and never changed."""

    def __init__(
        self, storage: Storage, run: str, secret: Secret | None = None, origin: tuple[int, Catalog] | None = None
    ) -> None:
        self.storage = storage
        self.run = run
        self.secret = secret
        self.origin = origin

    # ------------------------------------------------------------------------------------ finding and opening

    def steps(self) -> list[int]:
        """The committed steps of all that are complete and not set aside, newest first. Raises OSError."""
        own = [step for step, names in self._all() if COMMIT in names and INVALID not in names]
        if self.origin is not None and self.origin[0] not in own:
            own = sorted([*own, self.origin[0]], reverse=True)
        return own

    def all_steps(self) -> list[int]:
        """Those of all there are, also incomplete and damaged ones, newest first. Raises OSError."""
        return [step for step, _ in self._all()]

    def locate(self, committed: int) -> str:
        """What a user calls the checkpoint of this many steps."""
        return self.holder_of(committed)._locate(committed)

    def _locate(self, committed: int) -> str:
        return self.storage.locate(directory_name(committed))

    def holder_of(self, committed: int) -> Catalog:
        """Where the checkpoint of this many steps is: here, or where this run was forked from."""
        if self.origin is None or self.origin[0] != committed:
            return self
        return self if COMMIT in self.storage.names(directory_name(committed)) else self.origin[1]

    def _all(self) -> list[tuple[int, set[str]]]:
        """Every directory that is, was or was to become a checkpoint, newest first, and the names in it."""
        found = [step for name in self.storage.names("") if (step := step_of(name)) is not None]
        return [(step, set(self.storage.names(directory_name(step)))) for step in sorted(found, reverse=True)]

    def open(self, committed: int, *, keyless: bool = False) -> StoredCheckpoint:
        """The checkpoint after this many steps, as far as can be told without reading its parts. A `keyless` one may be
        encrypted, and can be verified, but not read.

        Raises CheckpointError when it is not complete, not what was written, or of another run or key; OSError when
        the storage cannot be read.
        """
        if (holder := self.holder_of(committed)) is not self:
            return holder.open(committed, keyless=keyless)
        directory = directory_name(committed)
        where = self.storage.locate(directory)
        names = set(self.storage.names(directory))
        if INVALID in names:
            reason = self._why_set_aside(directory)
            raise CheckpointError(f"{where} was set aside: {reason}")
        if COMMIT not in names:
            raise CheckpointError(f"{where}: {'never completed' if names else 'not there'} (it has no {COMMIT})")
        try:
            marker = self.storage.read(f"{directory}/{COMMIT}", MAX_COMMIT_BYTES)
            commit = Commit.from_bytes(marker, f"{where}/{COMMIT}")
            raw = self.storage.read(f"{directory}/{MANIFEST}", min(commit.manifest_bytes, MAX_MANIFEST_BYTES))
            if len(raw) != commit.manifest_bytes or digest_of(raw) != commit.manifest_xxh3_128:
                raise CheckpointError(f"{where}/{MANIFEST} is not what was saved (digest differs)")
            manifest = Manifest.from_bytes(raw, f"{where}/{MANIFEST}")
            self._check_identity(manifest, commit, committed, where)
            cipher = None if keyless else self._cipher(manifest, where)
            if cipher is not None:
                cipher.check(commit.seal, raw, f"{where}/{COMMIT}")
            for file in manifest.files:
                size = self.storage.size(f"{directory}/{file.name}")
                if size != file.size:
                    raise CheckpointError(f"{where}/{file.name} has {size} bytes, {file.size} were saved")
        except (FileNotFoundError, EOFError) as error:
            raise CheckpointError(f"{where}: incomplete: {error}") from error
        except (NotAFile, IsADirectoryError) as error:
            raise CheckpointError(f"{where}: damaged: {error}") from error
        return StoredCheckpoint(self.storage, commit, manifest, cipher)

    def _why_set_aside(self, directory: str) -> str:
        try:
            return self.storage.read(f"{directory}/{INVALID}", MAX_COMMIT_BYTES).decode("utf-8", "replace").strip()
        except (FileNotFoundError, EOFError, NotAFile, IsADirectoryError) as error:
            return f"why is not known: {error}"

    def _check_identity(self, manifest: Manifest, commit: Commit, committed: int, where: str) -> None:
        if not committed == manifest.committed == commit.committed:
            raise CheckpointError(f"{where} holds the state of step {manifest.committed}, not what its name says")
        if manifest.run != self.run:
            raise UnusableCheckpoint(f"{where} is of the run {manifest.run}, not of {self.run}")

    def _cipher(self, manifest: Manifest, where: str) -> Cipher | None:
        if self.secret is None and manifest.encryption is None:
            return None
        if self.secret is None:
            raise UnusableCheckpoint(f"{where} is encrypted, and there is no key (checkpoint.encryption)")
        if manifest.encryption is None:
            raise UnusableCheckpoint(f"{where} is not encrypted, but the job says that its checkpoints are")
        save = Save(manifest.committed, manifest.epoch, manifest.generation, manifest.attempt)
        cipher = self.secret.cipher(manifest.run, save)
        if manifest.encryption.get("key_check") != cipher.key_check:
            raise UnusableCheckpoint(f"{where} is encrypted with another key than that of checkpoint.encryption")
        return cipher

    # ------------------------------------------------------------------------------------ writing

    def cipher(self, save: Save) -> Cipher | None:
        """What the parts of this attempt are encrypted with."""
        return None if self.secret is None else self.secret.cipher(self.run, save)

    def commit(self, save: Save, parts: Mapping[int, str], description: Description) -> int:
        """Makes a checkpoint of what the ranks of a save wrote; `parts` has the digest of each rank's list of chunks.
        Returns its bytes. To be called again when it was interrupted; a complete one stays as it is.

        Raises CheckpointError when the parts are not all there, OSError.
        """
        directory = save.directory
        where = self.storage.locate(directory)
        names = set(self.storage.names(directory))
        if COMMIT in names and INVALID not in names:
            found = self.open(save.committed)
            # What is left of this attempt, whether it was the one that succeeded or came too late.
            for name in sorted(names - {COMMIT, MANIFEST} - {file.name for file in found.manifest.files}):
                self.storage.remove(f"{directory}/{name}")
            return found.num_bytes
        lists = [self._part(save, rank, digest, where) for rank, digest in sorted(parts.items())]
        updates = {part.updates for part in lists}
        if len(updates) != 1:
            raise CheckpointError(f"{where}: the ranks wrote states of different numbers of updates: {sorted(updates)}")
        cipher = self.cipher(save)
        manifest = Manifest(
            run=self.run, job=description.job, committed=save.committed, updates=updates.pop(), epoch=save.term,
            generation=save.generation, attempt=save.attempt, layout=dict(description.layout),
            data=dict(description.data), randomness=dict(description.randomness), schedule=dict(description.schedule),
            tensors=dict(description.tensors), frozen=description.frozen, files=[part.file for part in lists],
            chunks=[chunk for part in lists for chunk in part.chunks],
            encryption=None if cipher is None else cipher.describe(),
            steps=[dict(record) for record in description.steps],
        )  # fmt: skip
        if (problem := next(manifest.problems(), None)) is not None:
            raise CheckpointError(f"{where}: what was written is not the whole state: {problem}")
        raw = manifest.to_bytes()
        if len(raw) > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{where}: a manifest of {len(raw)} bytes; {MAX_MANIFEST_BYTES} at most can be read")
        ours = {file.name for file in manifest.files}
        # What an earlier attempt left, and one that was set aside, go first; its word that it is complete before all.
        for name in sorted(names - ours, key=lambda name: (name != COMMIT, name != MANIFEST, name)):
            if not name.startswith(save.prefix):
                self.storage.remove(f"{directory}/{name}")
        self.storage.put(f"{directory}/{MANIFEST}", lambda: [raw])
        commit = Commit(
            committed=save.committed, at=time.time(), manifest_bytes=len(raw), manifest_xxh3_128=digest_of(raw),
            seal=None if cipher is None else cipher.seal(raw),
        )  # fmt: skip
        self.storage.put(f"{directory}/{COMMIT}", lambda: [commit.to_bytes()])
        for rank in parts:
            self.storage.remove(f"{directory}/{save.part(rank)}.json")
        return sum(file.size for file in manifest.files)

    def _part(self, save: Save, rank: int, digest: str, where: str) -> Part:
        name = f"{save.part(rank)}.json"
        try:
            raw = self.storage.read(f"{save.directory}/{name}", MAX_MANIFEST_BYTES)
        except (FileNotFoundError, EOFError, NotAFile, IsADirectoryError) as error:
            raise CheckpointError(f"{where}: rank {rank} said that it wrote {name}, which is not there") from error
        if digest_of(raw) != digest:
            raise CheckpointError(f"{where}/{name} is not what rank {rank} wrote (digest differs)")
        return Part.from_bytes(raw, f"{where}/{name}")

    # ------------------------------------------------------------------------------------ taking away

    def discard(self, save: Save) -> None:
        """Removes what an attempt left that will not be completed. Raises OSError."""
        for name in self.storage.names(save.directory):
            if name.startswith(save.prefix):
                self.storage.remove(f"{save.directory}/{name}")
        self.storage.remove_directory(save.directory)

    def set_aside(self, committed: int, reason: str) -> None:
        """Keeps a checkpoint that is not what was saved from being used again, and says why. Raises OSError."""
        if self.holder_of(committed) is not self:
            return  # It is another run's, which will find out for itself.
        with contextlib.suppress(FileExistsError):
            self.storage.put(f"{directory_name(committed)}/{INVALID}", lambda: [reason.encode() + b"\n"])

    def prune(
        self, newest: int, keep: int, keep_every: int | None, spare: Collection[int] = ()
    ) -> list[int]:  # fmt: skip
        """Removes checkpoints up to that of `newest` which need not stay: all but the `keep` last of them, those of
        every `keep_every` steps and of the steps to `spare`; and what never became one. Returns the steps of those
        removed. Raises OSError."""
        known = [(step, names) for step, names in self._all() if step <= newest]
        valid = [step for step, names in known if COMMIT in names and INVALID not in names]
        kept = set(valid[:keep]) | {step for step in valid if keep_every and step % keep_every == 0}
        oldest = min(kept, default=newest)
        kept |= set(spare)
        removed = []
        for step, names in known:
            is_broken = INVALID in names and step >= oldest
            if step not in kept and step != newest and not is_broken:
                self._remove(step, names)
                removed.append(step)
        return removed

    def _remove(self, step: int, names: Iterable[str]) -> None:
        directory = directory_name(step)
        for name in sorted(names, key=lambda name: (name != COMMIT, name != MANIFEST, name)):
            if name in (COMMIT, MANIFEST, INVALID) or is_part(name):
                self.storage.remove(f"{directory}/{name}")
        self.storage.remove_directory(directory)
