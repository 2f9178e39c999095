"""Writing the parts of a checkpoint: each rank's chunks in a safetensors file of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.encryption import OVERHEAD, Cipher
from orchestrator.checkpoint.manifest import ChunkEntry, FileEntry, Part, chunk_name, digest_of
from orchestrator.checkpoint.names import Save
from orchestrator.storage import Storage


@dataclass(frozen=True)
class ChunkData:
    """A rectangle of a tensor and its contents: `data` are contiguous little-endian bytes."""

    tensor: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    data: memoryview

    @property
    def name(self) -> str:
        return chunk_name(self.tensor, self.offsets, self.sizes)


def write_part(
    storage: Storage, save: Save, rank: int, updates: int, chunks: Sequence[ChunkData], cipher: Cipher | None
) -> tuple[Part, str]:
    """Writes the file of one rank, whose state has seen this many updates, and beside it what is where in it; returns
    that, and its digest.

    Raises OSError.
    """
    file = f"{save.part(rank)}.safetensors"
    header, places = layout_of(chunks, 0 if cipher is None else OVERHEAD, encrypted=cipher is not None)
    entries: list[ChunkEntry] = []

    def contents() -> Iterator[memoryview | bytes]:
        entries.clear()
        yield header
        for chunk, (start, stop) in zip(chunks, places, strict=True):
            raw: memoryview | bytes = chunk.data
            if cipher is not None:
                raw = cipher.encrypt(raw, file=file, chunk=chunk.name, start=start)
            entries.append(
                ChunkEntry(
                    tensor=chunk.tensor, dtype=chunk.dtype, offsets=list(chunk.offsets), sizes=list(chunk.sizes),
                    file=file, start=start, stop=stop, xxh3_128=digest_of(raw),
                )
            )  # fmt: skip
            yield raw

    storage.put(f"{save.directory}/{file}", contents)
    size = places[-1][1] if places else len(header)
    found = FileEntry(name=file, size=size, header_bytes=len(header), header_xxh3_128=digest_of(header))
    part = Part(updates=updates, file=found, chunks=list(entries))
    raw = part.to_bytes()
    storage.put(f"{save.directory}/{save.part(rank)}.json", lambda: [raw])
    return part, digest_of(raw)


def layout_of(chunks: Sequence[ChunkData], overhead: int, *, encrypted: bool) -> tuple[bytes, list[tuple[int, int]]]:
    """The beginning of a safetensors file with these chunks, and the bytes that each takes in the file. An encrypted
    chunk is bytes of no type."""
    places: list[tuple[int, int]] = []
    described: dict[str, object] = {}
    offset = 0
    for chunk in chunks:
        length = chunk.data.nbytes + overhead
        places.append((offset, offset + length))
        dtype, shape = ("U8", [length]) if encrypted else (chunk.dtype, list(chunk.sizes))
        described[chunk.name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    header = safetensors_header(described)
    return header, [(len(header) + start, len(header) + stop) for start, stop in places]


def safetensors_header(described: Mapping[str, Any]) -> bytes:
    """What comes before the data of a safetensors file: `dtype`, `shape` and `data_offsets` of each entry by name."""
    text = json.dumps(described, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)  # The data begin at a multiple of eight bytes.
    return len(text).to_bytes(8, "little") + text
