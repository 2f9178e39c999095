"""Numbers that stand for blocks of fp32 values: what each format sends of one, and what it is taken for.

A block is always the same elements of a parameter, however the model is laid out, and is coded by itself. So what is
sent depends on the values only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from strategies.wire.format import WireFormat

WORD = 4
"""Bytes of the int32 words that codes are made of."""


class Codec(ABC):
    """`block` values fp32 are sent as `words` int32. A block with a value that is not finite comes out so."""

    block: int
    words: int

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The codes int32 [n, words] of `values` fp32 [n, block]."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The values fp32 [n, block] that `codes` [n, words] stand for."""

    @property
    def ratio(self) -> float:
        """What is sent, as a share of fp32."""
        return self.words / self.block


class Bf16(Codec):
    """Rounded to nearest, ties to even."""

    block, words = 256, 128

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.bfloat16).view(torch.int32)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.bfloat16).float()


class _Scaled(Codec):
    """Whole multiples, up to `most`, of a scale fp32 that the values of a block have in common: that of the largest of
    them. Rounded to nearest, ties to even."""

    most: int

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        scale = values.abs().amax(dim=1, keepdim=True).div_(self.most)
        divisor = torch.where(scale == 0, 1.0, scale)
        # What is not finite has a scale that is not, and no multiple of that is finite.
        whole = torch.nan_to_num_((values / divisor).round_(), nan=1.0).clamp_(-self.most, self.most)
        codes = torch.empty((len(values), self.words), dtype=torch.int32, device=values.device)
        codes[:, :1] = scale.view(torch.int32)
        self._pack(whole.to(torch.int8), codes[:, 1:])
        return codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        scale = codes[:, :1].contiguous().view(torch.float32)
        found = self._unpack(codes[:, 1:].contiguous()).float().mul_(scale)
        # Zero times infinity is not a number, whichever element it was that was not finite.
        return found if bool(scale.isfinite().all()) else torch.where(scale.isfinite(), found, torch.nan)

    @abstractmethod
    def _pack(self, whole: torch.Tensor, into: torch.Tensor) -> None:
        """Puts multiples int8 [n, block] into words int32 [n, words - 1]."""

    @abstractmethod
    def _unpack(self, words: torch.Tensor) -> torch.Tensor:
        """The reverse."""


class Int8(_Scaled):
    """A byte for each value, as in 8-bit optimizers (Dettmers et al. 2022)."""

    block, words, most = 256, 65, 127

    def _pack(self, whole: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(whole.view(torch.int32))

    def _unpack(self, words: torch.Tensor) -> torch.Tensor:
        return words.view(torch.int8)


class Int4(_Scaled):
    """Half a byte for each value."""

    block, words, most = 128, 17, 7

    def _pack(self, whole: torch.Tensor, into: torch.Tensor) -> None:
        shifted = (whole + 8).view(torch.uint8)
        low, high = shifted[:, : self.block // 2], shifted[:, self.block // 2 :]
        into.copy_((low | (high << 4)).view(torch.int32))

    def _unpack(self, words: torch.Tensor) -> torch.Tensor:
        pairs = words.view(torch.uint8)
        return torch.cat((pairs & 15, pairs >> 4), dim=1).view(torch.int8) - 8


class TopK(Codec):
    """The largest share `fraction` of a block in magnitude, as they are, with their places (Aji and Heafield 2017); of
    equal ones those that come first. The others count as zero."""

    block = 4096

    def __init__(self, fraction: float) -> None:
        self.kept = max(1, round(fraction * self.block))
        # A place takes two bytes.
        self.words = self.kept + math.ceil(self.kept / 2)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        magnitudes = torch.nan_to_num(values.abs(), nan=torch.inf)
        least = magnitudes.topk(self.kept, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        above, level = magnitudes > least, magnitudes == least
        room = self.kept - above.sum(dim=1, keepdim=True)
        taken = above | (level & (level.cumsum(dim=1) <= room))
        places = taken.nonzero()[:, 1].view(-1, self.kept)
        codes = torch.zeros((len(values), self.words), dtype=torch.int32, device=values.device)
        codes[:, : self.kept] = values.gather(1, places).view(torch.int32)
        short = torch.zeros((len(values), 2 * (self.words - self.kept)), dtype=torch.int16, device=values.device)
        short[:, : self.kept] = places.to(torch.int16)
        codes[:, self.kept :] = short.view(torch.int32)
        return codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        places = codes[:, self.kept :].contiguous().view(torch.int16)[:, : self.kept].to(torch.int64)
        found = torch.zeros((len(codes), self.block), device=codes.device)
        return found.scatter_(1, places, codes[:, : self.kept].contiguous().view(torch.float32))


def codec_of(wire: WireFormat) -> Codec:
    """Raises ValueError for a format that codes no blocks."""
    match wire.name:
        case "bf16":
            return Bf16()
        case "int8":
            return Int8()
        case "int4":
            return Int4()
        case "top_k":
            return TopK(wire.fraction)
    raise ValueError(f"{wire.name} codes no blocks")
