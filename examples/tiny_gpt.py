"""A small GPT with dropout, for examples/factory.yaml: what a model of your own looks like to this platform.

The platform calls `build` with `model.args`, then the module with a LongTensor `input_ids` [batch, length];
it expects logits [batch, length, vocab]. Nothing here knows that the training is distributed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention, hidden [batch, length, hidden] to the same shape."""

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.queries_keys_values = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, size = hidden.shape
        # [batch, length, 3 * hidden] -> three of [batch, heads, length, hidden / heads]
        split = self.queries_keys_values(hidden).view(batch, length, 3, self.heads, size // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, size))
        return output


class Block(nn.Module):
    """One layer: attention, then a perceptron on each token, each added to what came in."""

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, heads, dropout)
        self.perceptron_norm = nn.LayerNorm(hidden_size)
        self.perceptron = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden)))
        return hidden + self.dropout(self.perceptron(self.perceptron_norm(hidden)))


class TinyGPT(nn.Module):
    """Token ids to the logits of the next token, at every position."""

    def __init__(self, vocab_size: int, hidden_size: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden_size, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.apply(self._initialise)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`input_ids` [batch, length] to logits [batch, length, vocab]."""
        embedded = self.tokens(input_ids)
        hidden = self.dropout(embedded + self._positions(input_ids.shape[1], embedded))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def _positions(self, length: int, like: Tensor) -> Tensor:
        """Sine and cosine positions [length, hidden] (Vaswani et al. 2017), so that no length is built in."""
        half = self.hidden_size // 2
        rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000.0) / half))
        angles = torch.arange(length, device=like.device)[:, None] * rates
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(like.dtype)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        # As in GPT-2. It draws from the global generator, which the platform has seeded with train.seed.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def build(vocab_size: int, hidden_size: int, layers: int, heads: int, dropout: float) -> nn.Module:
    """The model of examples/factory.yaml. Raises ValueError when the sizes do not divide."""
    if hidden_size % heads or hidden_size % 2:
        raise ValueError(f"hidden_size {hidden_size} must be even and a multiple of heads {heads}")
    return TinyGPT(vocab_size, hidden_size, layers, heads, dropout)
