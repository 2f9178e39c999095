"""The smallest model with everything a model may have, and its state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from strategies.flat import FlatState
from strategies.optimizers import OptimizerSpec

CPU = torch.device("cpu")
VOCABULARY = 11


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(values: torch.Tensor) -> bytes:
    return values.detach().contiguous().numpy().tobytes()


class TinyModel(nn.Module):
    """Embedding, a hidden layer with dropout, a head; odd sizes, one frozen parameter, one persistent buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 7)
        self.norm = nn.LayerNorm(7)
        self.hidden = nn.Linear(7, 13)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(13, VOCABULARY)
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.hidden(self.norm(self.embedding(input_ids))))
        output: torch.Tensor = self.head(self.dropout(hidden)) * self.get_buffer("scale")
        return output


def make(dropout: float = 0.0, spec: OptimizerSpec | None = None) -> tuple[TinyModel, FlatState]:
    torch.manual_seed(3)
    model = TinyModel(dropout)
    return model, FlatState(model, spec or OptimizerSpec(), CPU)
