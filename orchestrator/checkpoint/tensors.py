"""Chunks as torch tensors. The one module that knows both; what lists or steers checkpoints needs no torch."""

from __future__ import annotations

import torch

from orchestrator.checkpoint.manifest import ChunkEntry
from strategies.state.chunks import Box

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls the types of torch."""
TYPES = {name: dtype for dtype, name in DTYPES.items()}


def as_tensor(chunk: ChunkEntry, data: memoryview) -> torch.Tensor:
    """The contents of a chunk [chunk.sizes]; valid as long as `data` is."""
    return torch.frombuffer(data, dtype=TYPES[chunk.dtype]).view(chunk.sizes)


def bytes_of(values: torch.Tensor) -> memoryview:
    """The contents of a contiguous tensor in host memory, which is not copied."""
    return values.reshape(-1).view(torch.uint8).numpy().data


def box_of(chunk: ChunkEntry) -> Box:
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))
