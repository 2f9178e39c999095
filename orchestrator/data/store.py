"""The tokenised store: a source as one line of tokens, read where it lies, and `prepare`, which finds or builds it.

A store is a directory `tokens-<key>` in a cache. Its key is a digest of everything that decides its content,
so a store never changes once it has its name: it is built beside, synced, and renamed into place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.build import Recipe, build_store, building_lock, publish
from orchestrator.data.encoding import Side, encoder_of
from orchestrator.data.formats import DEFAULT_FIELD, DOCUMENTS, check_field, document_of
from orchestrator.data.locations import Patience
from orchestrator.data.manifest import (
    COUNTED_SHIFT,
    FORMAT_VERSION,
    BrokenStoreError,
    RecordsEntry,
    store_digest,
)
from orchestrator.data.reading import Library, join
from orchestrator.data.records import RecordSpec
from orchestrator.data.shards import TRAINING_PATIENCE, Shards, Signature, read_manifest
from orchestrator.data.sources import DataError, SourceFile
from orchestrator.data.tokenizers import BYTES, load_tokenizer

T = TypeVar("T")
RunTasks = Callable[[Callable[..., T], list[tuple[Any, ...]]], list[T]]

_CHUNK_TOKENS = 1 << 22


class TokenStore:
    """A prepared store: nothing but its manifest is read until a sample is.

    With sequence length L, sample i is the L + 1 tokens from i * L on: inputs are its first L, targets its
    last L. So neighbouring samples share one token, every token but the first is a target exactly once, and
    at most L - 1 tokens at the end are left over.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        verify: bool = False,
        source: str = "",
        mirrors: Sequence[str] = (),
        patience: Patience = TRAINING_PATIENCE,
        signatures: Sequence[Signature | None] = (),
    ) -> None:
        """Open the store in a directory, or at an fsspec URL.

        verify: also check every shard's digest; source: its name in errors; mirrors: directories or URLs, each of a
        copy of the store that is read where this one fails; signatures: see there, of a store that was verified.

        Raises BrokenStoreError when the manifest is torn or missing, or a shard's size (or digest) is not
        right.
        """
        self.location = str(directory)
        self.source = source or self.location
        """What it was made from, for errors."""
        self.manifest = read_manifest(self.location, patience)
        self._shards = Shards(self.location, self.manifest, mirrors, patience, signatures)
        self._num_tokens = self.manifest.total_tokens
        if verify:
            self.verify()

    @property
    def directory(self) -> Path:
        """Where a store is that is not at a URL."""
        return Path(self.location)

    @property
    def digest(self) -> str:
        """The tokens' digest ("sha256:..."): equal wherever, and in whatever shards, they were prepared."""
        return self.manifest.digest

    @property
    def signatures(self) -> list[Signature | None]:
        """By which another process that opens the store can tell that it is still what was verified here."""
        return self._shards.signatures

    @property
    def records(self) -> RecordsEntry | None:
        """What it says of records, where it was made of such."""
        return self.manifest.records

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id the tokenizer can give."""
        return self.manifest.vocab_size

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, ends of documents included."""
        return self._num_tokens

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

        Neighbouring ids are read in one go. Safe to call from several threads at once.

        Raises IndexError for an id outside range(num_samples(sequence_length)), DataError when a shard cannot be read
        anywhere.
        """
        places = np.asarray(ids, dtype=np.int64)
        num_samples = self.num_samples(sequence_length)
        if places.size and not (places.min() >= 0 and places.max() < num_samples):
            raise IndexError(f"sample ids {places.min()} to {places.max()} are outside range({num_samples})")
        width = sequence_length + 1
        rows = np.empty((len(places), width), dtype=self._shards.dtype)
        flat = rows.reshape(-1)
        numbers = places.tolist()
        runs = []
        first = 0
        while first < len(numbers):
            stop = first + 1
            while stop < len(numbers) and numbers[stop] == numbers[stop - 1] + 1:
                stop += 1
            at = first * width
            self._shards.fill(flat[at : at + (stop - first) * sequence_length + 1], numbers[first] * sequence_length)
            if stop > first + 1:
                runs.append((first, stop))
            first = stop
        out = rows.astype(np.int64)
        for first, stop in runs:
            # Neighbours share a token, which was read once.
            run = flat[first * width :][: (stop - first) * sequence_length + 1]
            out[first:stop] = np.lib.stride_tricks.sliding_window_view(run, width)[::sequence_length]
        return out

    def document_lengths(self) -> NDArray[np.int64]:
        """The tokens of every document, its end included, in their order: int64 [documents], whose sum is `num_tokens`.

        Raises DataError when they cannot be read anywhere, or are not what was written.
        """
        lengths = self._length_entries & ((1 << COUNTED_SHIFT) - 1)
        if (len(lengths) and lengths.min() < 1) or int(lengths.sum()) != self.num_tokens:
            raise BrokenStoreError(f"{self.location}: its documents' lengths do not add up to its tokens; remove it")
        return lengths

    def counted(self) -> NDArray[np.int64]:
        """Of a store of records, how many tokens of every sequence count as targets: int64 [sequences]. Raises
        DataError."""
        return self._length_entries >> COUNTED_SHIFT

    @cached_property
    def _length_entries(self) -> NDArray[np.int64]:
        return self._shards.document_lengths()

    def read(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill out [n] with the tokens of the line from `start` on. Safe to call from several threads at once.

        Raises IndexError when they are not all there, DataError when a shard cannot be read anywhere.
        """
        if not 0 <= start <= self.num_tokens - len(out):
            raise IndexError(f"tokens {start} to {start + len(out)} are outside range({self.num_tokens})")
        tokens = np.empty(len(out), dtype=self._shards.dtype)
        self._shards.fill(tokens, start)
        out[:] = tokens

    def verify(self) -> None:
        """Read every file and compare its digest. Raises BrokenStoreError naming the first that differs."""
        for number, shard in enumerate(self.manifest.shards):
            path = self.directory / shard.documents_name
            try:
                self._shards.verify(number)
                lengths = path.read_bytes()
            except OSError as error:
                raise BrokenStoreError(f"{self.directory}: {error}") from error
            if xxhash.xxh3_128_hexdigest(lengths) != shard.documents_digest:
                raise BrokenStoreError(f"{path}: its content is not what was written")

    def rehash(self) -> str:
        """The tokens' digest, made again from every token that is there now: what `digest` was if none has changed.

        Raises DataError when they cannot all be read.
        """
        files, at = [], 0
        buffer = np.empty(_CHUNK_TOKENS, dtype=self._shards.dtype)
        for file in self.manifest.files:
            digest, left = xxhash.xxh3_128(), file.tokens
            while left:
                part = buffer[: min(left, len(buffer))]
                self._shards.fill(part, at)
                digest.update(part.tobytes())
                left, at = left - len(part), at + len(part)
            files.append(replace(file, digest=digest.hexdigest()))
        return store_digest(self.manifest.dtype, self.manifest.vocab_size, files)


def open_store(
    directory: Path, digest: str, mirrors: Sequence[str] = (), signatures: Sequence[Signature | None] = ()
) -> TokenStore | None:
    """The store of that digest in that directory, or else in one of the mirrors (directories or URLs with stores under
    the same names); None when it is in none of them (or torn, or another). signatures: as for `TokenStore`."""
    copies = [str(directory), *(join(mirror, directory.name) for mirror in Library(mirrors).mirrors)]
    for location in copies:
        # The store itself was verified when it was made; of a copy at a URL every range is, when it is read.
        is_unknown = location != copies[0] and "://" not in location
        others = [other for other in copies if other != location]
        known = () if is_unknown else signatures
        try:
            store = TokenStore(location, verify=is_unknown, mirrors=others, signatures=known)
        except DataError:
            continue
        if store.digest == digest:
            return store
    return None


def _build(
    target: Path, key: str, recipe: Recipe, open_store: Callable[[], TokenStore | None], run_tasks: RunTasks[Any]
) -> TokenStore:
    """Builds a store that there is not, or waits for another process that does. Raises DataError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with building_lock(target) as is_locked:
            # Another process that held the lock before may have built it.
            if (store := open_store()) is not None:
                return store
            build = build_store(target, key, recipe.by_ranges(), run_tasks, is_locked)
            publish(build, target, lambda: open_store() is not None)
            if (store := open_store()) is not None:
                return store
    except OSError as error:
        raise DataError(
            f"the token store {target} cannot be written: {error}; free space or name another cache"
        ) from error
    raise DataError(f"the token store {target} was built, and cannot be read: is its disk sound?")


def _compare(store: TokenStore, expect: str | None, described: str, target: Path) -> None:
    """Raises DataError when it is not the store that another node has."""
    if expect is not None and store.digest != expect:
        raise DataError(
            f"data.source: {described} gives the token store {store.digest} here ({target}), but "
            f"another node has {expect}: the nodes' sources differ; give every node the same files and "
            "library versions"
        )


def _refuse_an_empty_side(store: TokenStore, side: Side | None, described: str) -> None:
    if side is not None and not store.num_tokens:
        what = "held out" if side.is_held_out else "left to train on"
        raise DataError(
            f"evaluation.share: {side.share:g} of {described} leaves nothing {what}: it has too few documents; give "
            "more, or name what to evaluate on (evaluation.data)"
        )


def _recipe(
    library: Library, files: Sequence[SourceFile], field: str | None, document: str | None, tokenizer: str,
    records: RecordSpec | None, side: Side | None,
) -> Recipe:  # fmt: skip
    contents = [library.examine(file) for file in files]
    loaded = load_tokenizer(tokenizer)
    encoder_of(records, loaded)
    if tokenizer != BYTES:
        tokenizer = os.path.abspath(os.path.expanduser(tokenizer))
    return Recipe(files, contents, field, document, library, tokenizer, loaded, records, side)


def prepare(
    *,
    source: str | list[str],
    format: str | None = None,
    field: str | None = None,
    document: str | None = None,
    tokenizer: str,
    mirrors: Sequence[str] = (),
    cache: str | None = None,
    run_tasks: RunTasks[Any] | None = None,
    expect: str | None = None,
    verify: bool = True,
    patience: Patience | None = None,
    include: Sequence[str] = (),
    records: RecordSpec | None = None,
    side: Side | None = None,
) -> TokenStore:
    """Find the token store of a source in the cache, or build it.

    source, format, include: as for `resolve_files`; field, document: as for `documents`; tokenizer: as for
    `load_tokenizer`; records: what is made of records, where it is not a text that is wanted of them; side: which side
    of a split is kept.
    mirrors: directories or URLs that hold the same files under the same relative names, and the same stores under
    theirs; they are read where the source, or the store, fails.
    cache: a directory, by default `$XDG_CACHE_HOME/elastic-orchestrator` or `~/.cache/elastic-orchestrator`.
    run_tasks(function, argument tuples) returns the results in order; it may use other processes, and other
    machines where the source and the cache have the same paths. expect: the digest another node's store has.
    verify: check the digests of a store found in the cache, at the speed of reading it (the source is read as
    fast anyway, to see if it changed). patience: how long to wait for a range of a source.

    Any number of processes may prepare the same store at once. A store found torn or altered is built again.

    Raises DataError when the source or tokenizer cannot be used, the cache cannot be written, the source
    changes meanwhile, or the digest is not the expected one.
    """
    library = Library(mirrors, patience)
    files = library.files(source, format, include)
    for file in files:
        document_of(file, document)
    check_field(files, field, source)
    recipe = _recipe(library, files, field, document, tokenizer, records, side)
    key = _key(recipe)
    # Tasks may run in another working directory, so what they are given must not depend on it.
    directory = default_cache() if cache is None else Path(cache).expanduser().absolute()
    target = directory / f"tokens-{key}"
    copies = [join(mirror, target.name) for mirror in library.mirrors]
    described = described_source(source)

    def open_store() -> TokenStore | None:
        try:
            store = TokenStore(target, verify=verify, source=described, mirrors=copies)
        except BrokenStoreError:
            return None
        return store if store.manifest.key == key else None

    store = open_store() or _build(target, key, recipe, open_store, run_tasks or _run_here)
    _refuse_an_empty_side(store, side, described)
    _compare(store, expect, described, target)
    return store


def described_source(source: str | list[str]) -> str:
    """A source as it stands in the job file, for errors."""
    return source if isinstance(source, str) else ", ".join(source)


def default_cache() -> Path:
    """Where stores go when no cache is named. The only function here that reads the environment."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "elastic-orchestrator"


def _run_here(function: Callable[..., T], arguments: list[tuple[Any, ...]]) -> list[T]:
    return [function(*one) for one in arguments]


def _key(recipe: Recipe) -> str:
    """32 hex digits over everything that decides a store's content, and no path of this machine."""
    digest = xxhash.xxh3_128()
    tokenizer, records, side = recipe.loaded, recipe.records, recipe.side
    parts: list[object] = [FORMAT_VERSION, tokenizer.identity]
    if records is not None:
        # A template is no part of what identifies a tokenizer, as texts do without it.
        parts += [f"records 2: {records!r}", records.chat_template or getattr(tokenizer, "chat_template", "")]
    if side is not None:
        parts.append(f"side: {side!r}")
    for file, content in zip(recipe.files, recipe.contents, strict=True):
        parts += [file.name, file.size_bytes, file.format, content.fingerprint]
        parts.append("" if file.format == "text" else recipe.field or DEFAULT_FIELD)
        if (kind := document_of(file, recipe.document)) != DOCUMENTS[file.format][0]:
            parts.append(f"document: {kind}")
    for part in parts:
        encoded = str(part).encode("utf-8", "surrogateescape")  # file names may be any bytes
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
