"""Stochastic rounding to bf16 and to blocks of 8 bits, keyed: which of the two neighbours a value becomes is drawn from
a hash of its place in the state and of the update, so that it is the same wherever the value is updated.

A value that changes by less than half of what such a type can tell apart would never change if it were rounded to the
nearest; the mean of these draws is the value itself (Zamirai et al. 2020, "Revisiting BFloat16 Training",
arXiv:2010.06192).
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


FP8_BLOCK = 16
"""Elements that have a power of two in common."""
_LARGEST = 256
"""What the largest of a block is scaled to, at most: e4m3 has 448, and no rounding may get beyond that."""
_DROPPED = (1 << 20) - 1
"""The bits of fp32 that e4m3 lacks."""
_NORMAL = 2.0**-6
"""The smallest number that e4m3 has with all its digits; below it numbers are 2^-9 apart."""
_LEAST_EXPONENT = {False: -110, True: -50}
"""Of a block, by whether roots are stored: below it squares would not be exact any more."""


def to_fp8(
    values: torch.Tensor, places: torch.Tensor | None, key: int, *, is_square: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` fp32 [n], n a multiple of FP8_BLOCK, as e4m3 [n] and int8 [n / FP8_BLOCK], the exponents of blocks.

    Where `places` int64 [n] are given, the elements of the state that these are, values are rounded by what is drawn
    for them and `key`; else to the nearest, which what has been stored before is itself. Of squares, roots are stored,
    and nothing but zero becomes zero: what is divided by them would have no bounds.
    """
    blocks = (values.sqrt() if is_square else values).view(-1, FP8_BLOCK)
    largest = blocks.abs().amax(1)
    mantissas, exponents = torch.frexp(largest)
    exponents = exponents - 8 - (mantissas == 0.5).to(torch.int32)
    exponents = torch.where(largest > 0, exponents.clamp_(_LEAST_EXPONENT[is_square], 118), 0)
    scaled = (blocks * _power_of_two(-exponents)[:, None]).reshape(-1)
    if places is None:
        noise = torch.full_like(scaled, (_DROPPED + 1) // 2, dtype=torch.int32)
    else:
        noise = _hash(places, key).bitwise_and_(_DROPPED)
    magnitudes = scaled.abs()
    small = magnitudes < _NORMAL
    # Added to the smallest normal number, small ones have as many digits behind the point as they may keep.
    bits = (magnitudes + small * _NORMAL).view(torch.int32) + noise
    rounded = bits.bitwise_and_(~_DROPPED).view(torch.float32) - small * _NORMAL
    if is_square:
        rounded = torch.where((rounded == 0) & (magnitudes > 0), 2.0**-9, rounded)
    return torch.copysign(rounded, scaled).to(torch.float8_e4m3fn), exponents.to(torch.int8)


def from_fp8(codes: torch.Tensor, exponents: torch.Tensor, *, is_square: bool) -> torch.Tensor:
    """The values fp32 [n] that `to_fp8` made codes and exponents of."""
    values = (codes.float().view(-1, FP8_BLOCK) * _power_of_two(exponents.to(torch.int32))[:, None]).reshape(-1)
    return values.square_() if is_square else values


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Of int32 [n] within -126..127; exact on every device."""
    return (exponents + 127).bitwise_left_shift_(23).view(torch.float32)
