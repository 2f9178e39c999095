"""The tokenised store: a source as one memory-mapped line of tokens, and `prepare`, which finds or builds it.

A store is a directory `tokens-<key>` in a cache. Its key is a digest of everything that decides its content,
so a store never changes once it has its name: it is built beside, synced, and renamed into place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.build import build_store, building_lock, publish
from orchestrator.data.formats import DEFAULT_FIELD
from orchestrator.data.manifest import FORMAT_VERSION, MANIFEST_NAME, BrokenStoreError, Manifest
from orchestrator.data.sources import DataError, SourceFile, fingerprint, resolve_files
from orchestrator.data.tokenizers import BYTES, load_tokenizer

T = TypeVar("T")
RunTasks = Callable[[Callable[..., T], list[tuple[Any, ...]]], list[T]]

_CHUNK_BYTES = 1 << 24


class TokenStore:
    """A prepared store, memory mapped: nothing is read until a sample is.

    With sequence length L, sample i is the L + 1 tokens from i * L on: inputs are its first L, targets its
    last L. So neighbouring samples share one token, every token but the first is a target exactly once, and
    at most L - 1 tokens at the end are left over.
    """

    def __init__(self, directory: str | os.PathLike[str], *, verify: bool = False, source: str = "") -> None:
        """Open the store in a directory. verify: also check every shard's digest; source: its name in errors.

        Raises BrokenStoreError when the manifest is torn or missing, or a shard's size (or digest) is not
        right.
        """
        self.directory = Path(directory)
        self.source = source or str(directory)
        """What it was made from, for errors."""
        try:
            self.manifest = Manifest.from_json((self.directory / MANIFEST_NAME).read_text("utf-8"))
            for name, expected, _ in self._files():
                size_bytes = (self.directory / name).stat().st_size
                if size_bytes != expected:
                    raise BrokenStoreError(f"{name}: {size_bytes} bytes, should be {expected}")
        except OSError as error:
            raise BrokenStoreError(f"{directory}: {error}") from error
        if verify:
            self.verify()
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._shards = [np.memmap(self.directory / s.name, dtype=dtype, mode="r") for s in self.manifest.shards]
        # Where each shard begins in the line of tokens, and where the last one ends.
        self._bounds = np.cumsum([0, *(shard.tokens for shard in self.manifest.shards)])

    @property
    def digest(self) -> str:
        """The tokens' digest ("sha256:..."): equal wherever, and in whatever shards, they were prepared."""
        return self.manifest.digest

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id the tokenizer can give."""
        return self.manifest.vocab_size

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, ends of documents included."""
        return self.manifest.total_tokens

    def num_samples(self, sequence_length: int) -> int:
        """Samples of an epoch. Raises DataError when there is none, or the length is not positive."""
        if sequence_length < 1:
            raise DataError(f"data.sequence_length is {sequence_length}; it must be at least 1")
        num_samples = (self.num_tokens - 1) // sequence_length
        if num_samples < 1:
            raise DataError(
                f"data.source: {self.source} has {self.num_tokens} tokens, too few for one sample of "
                f"sequence length {sequence_length}, which needs {sequence_length + 1}; add text or lower it"
            )
        return num_samples

    def samples(self, ids: NDArray[np.integer], sequence_length: int) -> NDArray[np.int64]:
        """The tokens of some samples: ids [n] -> int64 [n, sequence_length + 1].

        Raises IndexError for an id outside range(num_samples(sequence_length)).
        """
        places = np.asarray(ids, dtype=np.int64)
        num_samples = self.num_samples(sequence_length)
        if places.size and not (places.min() >= 0 and places.max() < num_samples):
            raise IndexError(f"sample ids {places.min()} to {places.max()} are outside range({num_samples})")
        out = np.empty((len(places), sequence_length + 1), dtype=np.int64)
        starts = places * sequence_length
        first_shards = np.searchsorted(self._bounds, starts, side="right") - 1
        for row, start, shard in zip(out, starts.tolist(), first_shards.tolist(), strict=True):
            self._read(row, start, shard)
        return out

    def document_lengths(self) -> NDArray[np.int64]:
        """The tokens of every document, its end included, in their order: int64 [documents], whose sum is `num_tokens`.

        Raises BrokenStoreError when they do not add up.
        """
        shards = self.manifest.shards
        lengths = np.concatenate([np.fromfile(self.directory / shard.documents_name, dtype="<i8") for shard in shards])
        if (len(lengths) and lengths.min() < 1) or int(lengths.sum()) != self.num_tokens:
            raise BrokenStoreError(f"{self.directory}: its documents' lengths do not add up to its tokens; remove it")
        return lengths.astype(np.int64, copy=False)

    def read(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill out [n] with the tokens of the line from `start` on. Raises IndexError when they are not all there."""
        if not 0 <= start <= self.num_tokens - len(out):
            raise IndexError(f"tokens {start} to {start + len(out)} are outside range({self.num_tokens})")
        self._read(out, start, int(np.searchsorted(self._bounds, start, side="right")) - 1)

    def _read(self, row: NDArray[np.int64], start: int, shard: int) -> None:
        """Fill row [length] with the tokens from start on, which is in the given shard, across borders."""
        filled = 0
        while filled < len(row):
            offset = start + filled - int(self._bounds[shard])
            part = self._shards[shard][offset : offset + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1

    def verify(self) -> None:
        """Read every file and compare its digest. Raises BrokenStoreError naming the first that differs."""
        for name, _, expected in self._files():
            digest = xxhash.xxh3_128()
            with open(self.directory / name, "rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() != expected:
                raise BrokenStoreError(f"{self.directory / name}: its content is not what was written")

    def _files(self) -> Iterator[tuple[str, int, str]]:
        """(name, bytes, digest) of every file but the manifest."""
        for shard in self.manifest.shards:
            yield shard.name, shard.size_bytes, shard.digest
            yield shard.documents_name, shard.documents_bytes, shard.documents_digest


def open_store(directory: Path, digest: str) -> TokenStore | None:
    """The store of that digest in that directory; None when it is not there (or torn, or another)."""
    try:
        store = TokenStore(directory)
    except DataError:
        return None
    return store if store.digest == digest else None


def prepare(
    *,
    source: str | list[str],
    format: str | None = None,
    field: str | None = None,
    tokenizer: str,
    cache: str | None = None,
    run_tasks: RunTasks[Any] | None = None,
    expect: str | None = None,
    verify: bool = True,
) -> TokenStore:
    """Find the token store of a source in the cache, or build it.

    source, format: as for `resolve_files`; field: as for `documents`; tokenizer: as for `load_tokenizer`;
    cache: a directory, by default `$XDG_CACHE_HOME/elastic-orchestrator` or `~/.cache/elastic-orchestrator`.
    run_tasks(function, argument tuples) returns the results in order; it may use other processes, and other
    machines where the source and the cache have the same paths. expect: the digest another node's store has.
    verify: check the digests of a store found in the cache, at the speed of reading it (the source is read as
    fast anyway, to see if it changed).

    Any number of processes may prepare the same store at once. A store found torn or altered is built again.

    Raises DataError when the source or tokenizer cannot be used, the cache cannot be written, the source
    changes meanwhile, or the digest is not the expected one.
    """
    files = resolve_files(source, format)
    fingerprints = [fingerprint(file) for file in files]
    loaded = load_tokenizer(tokenizer)
    # Tasks may run in another working directory, so what they are given must not depend on it.
    directory = default_cache() if cache is None else Path(cache).expanduser().absolute()
    if tokenizer != BYTES:
        tokenizer = os.path.abspath(os.path.expanduser(tokenizer))
    key = _key(files, fingerprints, field, loaded.identity)
    target = directory / f"tokens-{key}"
    described = source if isinstance(source, str) else ", ".join(source)

    def open_store() -> TokenStore | None:
        try:
            store = TokenStore(target, verify=verify, source=described)
        except BrokenStoreError:
            return None
        return store if store.manifest.key == key else None

    store = open_store()
    if store is None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with building_lock(target) as is_locked:
                store = open_store()  # whoever held the lock before may have built it
                if store is None:
                    build = build_store(
                        target,
                        key,
                        files,
                        fingerprints,
                        field,
                        tokenizer,
                        loaded,
                        run_tasks or _run_here,
                        is_locked,
                    )
                    publish(build, target, lambda: open_store() is not None)
                    store = TokenStore(target, source=described)
        except OSError as error:
            raise DataError(
                f"the token store {target} cannot be written: {error}; free space or name another cache"
            ) from error
    if expect is not None and store.digest != expect:
        raise DataError(
            f"data.source: {described} gives the token store {store.digest} here ({target}), but "
            f"another node has {expect}: the nodes' sources differ; give every node the same files and "
            "library versions"
        )
    return store


def default_cache() -> Path:
    """Where stores go when no cache is named. The only function here that reads the environment."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "elastic-orchestrator"


def _run_here(function: Callable[..., T], arguments: list[tuple[Any, ...]]) -> list[T]:
    return [function(*one) for one in arguments]


def _key(files: Sequence[SourceFile], fingerprints: Sequence[str], field: str | None, tokenizer_identity: str) -> str:
    """32 hex digits over everything that decides a store's content, and no path of this machine."""
    digest = xxhash.xxh3_128()
    parts: list[object] = [FORMAT_VERSION, tokenizer_identity]
    for file, content in zip(files, fingerprints, strict=True):
        parts += [file.name, file.size_bytes, file.format, content]
        parts.append("" if file.format == "text" else field or DEFAULT_FIELD)
    for part in parts:
        encoded = str(part).encode("utf-8", "surrogateescape")  # file names may be any bytes
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
