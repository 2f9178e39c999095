"""MANIFEST.json and COMMIT: what a checkpoint holds, and the word that it is complete. docs/checkpoints.md has the
format for those who want to read it with other tools."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from monitoring.errors import UserError
from monitoring.outside import Unreadable, parse
from orchestrator.checkpoint.names import DATA_FILE

FORMAT: Literal[2] = 2
MANIFEST, COMMIT, INVALID = "MANIFEST.json", "COMMIT", "INVALID"

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""The names of dtypes are those of safetensors."""


MAX_COMMIT_BYTES = 64 << 10
MAX_MANIFEST_BYTES = 512 << 20
"""A manifest has about 300 bytes for each chunk of each rank."""
MAX_CHUNKS_OF_TENSOR = 1 << 14
"""As many ranks at most have something of one tensor."""
SEALED_BYTES = 28
"""What encryption adds to a chunk: nonce and tag."""

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Sizes = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(max_length=16)]


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used; says which and why."""

    exit_code = 1


class UnusableCheckpoint(CheckpointError):
    """A checkpoint that may be what was saved, but not by this run, for this model or with this key. That is for a
    person to sort out: an older one would be no better."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorEntry(_Entry):
    """A whole tensor."""

    dtype: str = Field(pattern=f"^({'|'.join(ITEM_BYTES)})$")
    shape: Sizes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class FrozenEntry(_Entry):
    """Parameters that the state was trained beside and that are not in the checkpoint, as their source has them:
    `xxh3_128` is `strategies.model.frozen.FrozenWeights.digest`."""

    xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")
    tensors: dict[str, TensorEntry]


class ChunkEntry(_Entry):
    """A rectangle of a tensor, row-major and little-endian, at bytes start <= byte < stop of a file; the digest is that
    of those bytes (with encryption: of the encrypted ones)."""

    tensor: str
    dtype: str = Field(pattern=f"^({'|'.join(ITEM_BYTES)})$")
    offsets: Sizes
    sizes: Sizes
    file: str
    start: Count
    stop: Count
    xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")

    @property
    def num_bytes(self) -> int:
        """Of its contents."""
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return chunk_name(self.tensor, self.offsets, self.sizes)


class FileEntry(_Entry):
    """A file of chunks. `header` is the digest of what safetensors puts before them, whose length is `header_bytes`."""

    name: str = Field(pattern=DATA_FILE)
    size: Count
    header_bytes: Count
    header_xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")


class Part(_Entry):
    """What one rank wrote, of a state that has seen this many updates: a file, and what is where in it."""

    updates: Count
    file: FileEntry
    chunks: list[ChunkEntry]

    def to_bytes(self) -> bytes:
        return canonical(self.model_dump())

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Self:
        """Raises CheckpointError."""
        found: Self = _read(cls, raw, where)
        return found


class Manifest(_Entry):
    """See docs/checkpoints.md for the meaning of each field.

    More than 15 attributes: they are those of the file.
    """

    format: Literal[2] = FORMAT
    run: str
    job: str
    committed: Count
    updates: Count
    epoch: Count
    generation: Count
    attempt: Count
    layout: dict[str, Any]
    data: dict[str, Any]
    randomness: dict[str, Any]
    schedule: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: list[FileEntry]
    chunks: list[ChunkEntry]
    frozen: FrozenEntry | None = None
    encryption: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = Field(default_factory=list)

    def to_bytes(self) -> bytes:
        fields = self.model_dump()
        if self.frozen is None:
            del fields["frozen"]  # as of models that have none it was always written
        return canonical(fields)

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Raises CheckpointError when it is not a manifest of this format, or does not describe whole tensors."""
        manifest: Manifest = _read(cls, raw, where)
        problem = next(manifest.problems(), None)
        if problem is not None:
            raise CheckpointError(f"{where}: {problem}")
        return manifest

    def problems(self) -> Iterator[str]:
        """What does not fit together: every element of every tensor must be in one chunk, inside one file."""
        sizes = {file.name: file for file in self.files}
        if len(sizes) != len(self.files):
            yield "two files of one name"
        added = 0 if self.encryption is None else SEALED_BYTES
        filled = {file.name: file.header_bytes for file in self.files}
        covered = dict.fromkeys(self.tensors, 0)
        boxes: dict[str, list[ChunkEntry]] = {}
        for chunk in self.chunks:
            tensor, file = self.tensors.get(chunk.tensor), sizes.get(chunk.file)
            if tensor is None:
                yield f"chunk {chunk} is of no tensor"
            elif chunk.dtype != tensor.dtype or not (len(chunk.offsets) == len(tensor.shape) == len(chunk.sizes)):
                yield f"chunk {chunk} is not of a {tensor.dtype} tensor of shape {tensor.shape}"
            elif any(o + n > size for o, n, size in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)):
                yield f"chunk {chunk} is outside of shape {tensor.shape}"
            elif file is None or not file.header_bytes <= chunk.start <= chunk.stop <= file.size:
                yield f"chunk {chunk} is not inside a file"
            elif chunk.stop - chunk.start != chunk.num_bytes + added:
                yield f"chunk {chunk} has {chunk.stop - chunk.start} bytes instead of {chunk.num_bytes + added}"
            else:
                filled[chunk.file] += chunk.stop - chunk.start
                covered[chunk.tensor] += math.prod(chunk.sizes)
                boxes.setdefault(chunk.tensor, []).append(chunk)
        for name, tensor in self.tensors.items():
            if covered[name] != tensor.numel:
                yield f"{name} has {covered[name]} of {tensor.numel} elements"
            elif len(boxes.get(name, ())) > MAX_CHUNKS_OF_TENSOR:
                yield f"{name} has more than {MAX_CHUNKS_OF_TENSOR} chunks"
            elif (pair := _overlap(boxes.get(name, ()))) is not None:
                yield f"chunks {pair[0]} and {pair[1]} overlap"
        for file in self.files:
            if filled[file.name] != file.size:
                yield f"{file.name} has {file.size} bytes, its chunks and their header are {filled[file.name]}"


def _overlap(chunks: Iterable[ChunkEntry]) -> tuple[ChunkEntry, ChunkEntry] | None:
    """Two chunks of one tensor that have an element in common, if there are such."""
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            if first.offsets and second.offsets[0] >= first.offsets[0] + first.sizes[0]:
                break
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(first.offsets, first.sizes, second.offsets, second.sizes, strict=True)
            ):
                return first, second
    return None


class Commit(_Entry):
    """The marker: with it the checkpoint is complete, and its manifest is the one with this digest. `at` is when that
    was, in seconds since the epoch. `seal` proves,
    to those who have the key of an encrypted checkpoint, that somebody who had it wrote this."""

    format: Literal[2] = FORMAT
    committed: Count
    at: float = Field(ge=0, lt=1e11)
    manifest_bytes: Count
    manifest_xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")
    seal: str | None = None

    def to_bytes(self) -> bytes:
        fields = self.model_dump()
        return canonical(fields | {"xxh3_128": digest_of(canonical(fields))})

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Self:
        """Raises CheckpointError."""
        found: Self = _read(cls, raw, where, digested=True)
        return found


def chunk_name(tensor: str, offsets: Iterable[int], sizes: Iterable[int]) -> str:
    """The name of a chunk in its file: `model.lm_head.weight[0:32,0:128]`."""
    ranges = ",".join(f"{offset}:{offset + size}" for offset, size in zip(offsets, sizes, strict=False))
    return f"{tensor}[{ranges}]"


def digest_of(data: Any) -> str:
    """XXH3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def canonical(value: Mapping[str, Any]) -> bytes:
    """JSON in the one form that digests are taken of: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _read(kind: Any, raw: bytes, where: str, *, digested: bool = False) -> Any:
    try:
        found = parse(raw)
        if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
            raise CheckpointError(f"{where}: format {found['format']!r} is not the one this version reads ({FORMAT})")
        if digested and (not isinstance(found, dict) or found.pop("xxh3_128", "") != digest_of(canonical(found))):
            raise CheckpointError(f"{where} is not what was saved (digest differs)")
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{where}: {place}: {first['msg']} ({error.error_count()} problems)") from error
    except Unreadable as error:
        raise CheckpointError(f"{where}: {error}") from error
