"""Random number streams that belong to the work, never to the rank that happens to do it."""

from __future__ import annotations

import hashlib

import torch


def stream_key(*parts: int | str) -> int:
    """A 63-bit key for the random stream named by `parts`, e.g. (seed, step, virtual worker, micro-batch)."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_stream(*parts: int | str) -> None:
    """Points every torch generator (CPU, and CUDA where there is one) at the start of the stream `parts`."""
    key = stream_key(*parts)
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(key)
