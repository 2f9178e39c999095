"""The smallest model with everything a model may have, and its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn

from strategies.comm.fabric import Fabric
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain
from strategies.layout.statemap import Spans
from strategies.model.blueprint import Blueprint
from strategies.optim.spec import OptimizerSpec
from strategies.state.chunk_loader import ChunkLoader
from strategies.state.chunks import Box
from strategies.state.training_state import TrainingState

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


def tiny(dropout: float = 0.0, seed: int = 3) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel(dropout)


def state_of(model: nn.Module, spec: OptimizerSpec | None = None, *, cuts: bool = False) -> TrainingState:
    """The state of step 0 of a model, to which it can go back as often as wanted."""
    spec = spec or OptimizerSpec()
    return TrainingState(Blueprint(model, device=CPU, cuts=cuts, keeps_whole=spec.kind.scope != "element"), spec)


def make(dropout: float = 0.0, spec: OptimizerSpec | None = None, seed: int = 3) -> TrainingState:
    return state_of(tiny(dropout, seed), spec)


def settle(state: TrainingState, virtual_workers: int = 1, held: Spans | None = None) -> Fabric:
    """Brings the state to its place in a layout of one rank."""
    layout = ParallelLayout(data=1, assignment=(tuple(range(virtual_workers)),))
    fabric = Fabric(rank=0, layout=layout, device=CPU)
    here = state.held if held is None else held
    state.adopt_layout(layout, fabric, [here], [Domain("", "node")], 1, state.updates, lambda: None)
    return fabric


def load(state: TrainingState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Brings a saved state to its place in a layout of one rank, as a checkpoint is restored."""
    layout = ParallelLayout(data=1, assignment=((0,),))
    fabric = Fabric(rank=0, layout=layout, device=CPU)

    def read(loader: ChunkLoader) -> None:
        for name, tensor in tensors.items():
            box = Box((0,) * tensor.dim(), tuple(tensor.shape))
            if loader.wants(name, box):
                loader.put(name, box, tensor)
        assert loader.missing == 0

    state.invalidate()
    updates = int(tensors["optimizer.updates"])
    state.adopt_layout(layout, fabric, [()], [Domain("", "node")], 1, updates, lambda: None, read)


def random_gradient(state: TrainingState, seed: int) -> torch.Tensor:
    """Random where parameters are, zero in the gaps between them, as backward passes leave it."""
    gradient = torch.zeros(state.space.size)
    generator = torch.Generator().manual_seed(seed)
    for slot in state.space.slots:
        gradient[slot.offset : slot.offset + slot.numel] = torch.randn(slot.numel, generator=generator)
    return gradient


def update(state: TrainingState, gradient: torch.Tensor, lr: float = 1e-2) -> None:
    """One update of a state that is all on one rank, as a step commits it."""
    own = state.arrangement.own
    assert own is not None
    own.gradient.copy_(gradient)
    own.apply(lr)
    state.updates += 1
    state.step_committed()
