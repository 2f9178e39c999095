"""Digests of state that is sent between ranks, by which damage on the way is noticed. They never leave a run."""

from __future__ import annotations

import torch
import xxhash

DIGEST_ELEMENTS = 4
"""Elements of fp32 that hold a digest of 128 bits."""
_CHUNK = 1 << 22
_KEYS = (-7046029254386353131, 1609587929392839161)
"""Odd numbers of 64 bits (the golden ratio's, and a prime of xxHash's)."""


def digest_of(values: torch.Tensor) -> torch.Tensor:
    """The digest [DIGEST_ELEMENTS] of fp32 [n], as fp32 whose bits are meant, where `values` are: those of a CPU by
    xxh3, those of a GPU by sums made there, so that the state need not come to the host. Ranks that check each other's
    must have the same kind of device."""
    if values.device.type == "cpu":
        data = values.detach().contiguous().view(torch.uint8).numpy().data
        return torch.frombuffer(bytearray(xxhash.xxh3_128_digest(data)), dtype=torch.float32)
    return sums_of(values)


def sums_of(values: torch.Tensor) -> torch.Tensor:
    """Like `digest_of`, on any device: twice the sum, modulo 2**64, of all words, each times an odd number of its own
    (multilinear hashing). Of words of which one is another it is always another, as an odd number times a difference of
    less than 2**64 is not 0; no order of adding up matters."""
    words = values.detach().view(torch.int32)
    totals = torch.zeros(len(_KEYS), dtype=torch.int64, device=values.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), dtype=torch.int64, device=values.device)
        for number, key in enumerate(_KEYS):
            totals[number] += (part * _odd(places * key)).sum()
    # The length is a word, too: else what is cut off would not be missed where it is zeros.
    totals += values.numel() * totals.new_tensor(_KEYS)
    return totals.view(torch.float32)


def _odd(numbers: torch.Tensor) -> torch.Tensor:
    """An odd number for each, in no relation to it (the finalizer of splitmix64; shifts keep the sign here)."""
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return (numbers ^ (numbers >> 31)) | 1
