"""Stochastic rounding to bf16, keyed: which of the two neighbours a value becomes is drawn from a hash of its place in
the state and of the update, so that it is the same wherever the value is updated.

A value that changes by less than half of what bf16 can tell apart would never change if it were rounded to the nearest;
the mean of these draws is the value itself (Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv:2010.06192).
"""

from __future__ import annotations

import torch

_LOW = 0xFFFF
"""The bits of fp32 that bf16 lacks."""


def round_to_bf16(values: torch.Tensor, first: int, key: int) -> torch.Tensor:
    """`values` fp32 [n], elements first..first + n of the state, as bf16 [n]; `key` names the draws, below 2^63."""
    noise = _hash(torch.arange(first, first + len(values), dtype=torch.int64, device=values.device), key)
    bits = values.contiguous().view(torch.int32) + noise.bitwise_and_(_LOW)
    return bits.bitwise_and_(~_LOW).view(torch.float32).to(torch.bfloat16)


def _hash(index: torch.Tensor, key: int) -> torch.Tensor:
    """The last mixing of MurmurHash3 (Appleby 2011) over 32 bits of `index` int64 [n] and the key; int32 [n]."""
    mixed = (index ^ (index >> 32) * 0x9E3779B1 ^ (key & 0x7FFFFFFF)).to(torch.int32)
    mixed.bitwise_xor_(torch.bitwise_and(mixed >> 16, 0xFFFF)).mul_(0x85EBCA6B - (1 << 32))
    mixed.bitwise_xor_(torch.bitwise_and(mixed >> 13, 0x7FFFF)).mul_(0xC2B2AE35 - (1 << 32))
    mixed.bitwise_xor_((key >> 31) & 0x7FFFFFFF)
    return mixed.bitwise_xor_(torch.bitwise_and(mixed >> 16, 0xFFFF)).mul_(0x85EBCA6B - (1 << 32)) >> 8
