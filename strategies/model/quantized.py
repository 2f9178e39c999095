"""Linear modules whose frozen matrices are kept in fewer bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

A matrix is put together again when it is computed with, and once more in the backward pass, so that at any time there
is one of them. What it is computed with is a function of the codes: the same wherever it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KINDS = ("int8", "nf4")
BLOCK = 64
"""Elements of a row that have a scale in common, with nf4; with int8 it is the whole row."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, 0 among them (the same paper, appendix E)."""


def shapes_of(kind: str, rows: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of codes and of scales, for a matrix [rows, width]. Raises ValueError for a width that has no whole blocks."""
    if kind == "int8":
        return (rows, width), (rows, 1)
    if width % BLOCK:
        raise ValueError(f"nf4 needs rows of multiples of {BLOCK} elements, got {width}; use int8")
    return (rows, width // 2), (rows, width // BLOCK)


def quantize(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (bf16) of a matrix [rows, width]: int8 [rows, width], or nf4, two in a byte, uint8
    [rows, width / 2]."""
    values = weight.float()
    if kind == "nf4":
        values = values.unflatten(1, (-1, BLOCK))
    largest = values.abs().amax(dim=-1, keepdim=True)
    # Rounded up, so that nothing is larger than its scale.
    scales = largest.to(torch.bfloat16)
    scales = torch.where(scales.float() < largest, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)
    shares = values / torch.where(scales == 0, torch.ones_like(scales), scales).float()
    if kind == "int8":
        return (shares * 127).round().to(torch.int8), scales
    table = torch.tensor(NF4)
    # The nearest; of two that are as near, the lower one.
    codes = torch.bucketize(shares.flatten(1), (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2], scales[..., 0]


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [rows, width] that codes and scales stand for."""
    if codes.dtype == torch.int8:
        return (codes.float() * (scales.float() / 127)).to(dtype)
    table = torch.tensor(NF4, device=codes.device)
    pairs = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1)
    values: torch.Tensor = table[pairs.int()].unflatten(1, (-1, BLOCK)) * scales.float()[..., None]
    return values.flatten(1).to(dtype)


class _Product(torch.autograd.Function):
    """A product with a matrix that is not kept between the forward and the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        return value @ dequantize(codes, scales, value.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return gradients[0] @ dequantize(codes, scales, gradients[0].dtype), None, None


class QuantizedLinear(nn.Module):
    """Stands for a frozen `nn.Linear`: `codes` and `scales` in place of its weight (see `quantize`), and its bias."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        """Without values, on the meta device. Raises ValueError like `shapes_of`."""
        super().__init__()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        codes, scales = shapes_of(kind, *linear.weight.shape)
        code_type = torch.int8 if kind == "int8" else torch.uint8
        self.codes = nn.Parameter(torch.empty(codes, dtype=code_type, device="meta"), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scales, dtype=torch.bfloat16, device="meta"), requires_grad=False)
        self.bias = linear.bias

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """See `nn.Linear`."""
        if torch.is_autocast_enabled(value.device.type):
            value = value.to(torch.get_autocast_dtype(value.device.type))
        product: torch.Tensor = _Product.apply(value, self.codes, self.scales)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"
