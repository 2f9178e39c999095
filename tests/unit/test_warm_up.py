"""A worker that says that it is warm has imported what its steps take: no generation waits for that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from strategies.gradient.spec import StepSpec
from strategies.model.blueprint import Blueprint
from strategies.objective.batch import Batch
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.spec import OptimizerSpec
from strategies.state.training_state import TrainingState
from strategies.update.engine import StepEngine
from strategies.update.warm_up import warm_up
from tests.batches import plain_batch

ROOT = Path(__file__).parents[2]
FEW = 5
"""Modules that may be imported with the first step: small ones."""
CODE = """
import sys
import numpy as np
from examples.tiny_gpt import build
from strategies.gradient.spec import StepSpec
from strategies.gradient.work import import_for
from strategies.model.blueprint import Blueprint
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.spec import OptimizerSpec
from strategies.state.training_state import TrainingState
from strategies.update.engine import StepEngine
from strategies.update.warm_up import warm_up
from tests.batches import plain_batch
from tests.unit.tiny_model import settle

def fetch(step, virtual_worker):
    tokens = np.random.default_rng(step).integers(0, 32, size=(1, 9), dtype=np.int64)
    return plain_batch(tokens, np.arange(1), step, 1)

blueprint = Blueprint(build(vocab_size=32, hidden_size=16, layers=1, heads=2, dropout=0.1))
spec = StepSpec(seed=1, micro_batch=1, micro_batches=1, base_lr=1e-2, schedule=ScheduleSpec("constant"))
engine = StepEngine(TrainingState(blueprint, OptimizerSpec()), spec, fetch)
import_for(tensor=1, pipeline=1, shard="none")
warm_up(engine, keep=True)
warm = set(sys.modules)
fabric = settle(engine.state, 1)
engine.bind(fabric, fabric.layout, 0)
assert engine.run(0)[0][0].grad_norm > 0
print(*sorted(set(sys.modules) - warm))
print("compiler" if "torch._dynamo" in sys.modules else "no compiler")
"""


def test_the_first_step_imports_nothing_large() -> None:
    """Torch would import seconds of modules with the first optimizer, and more with the first of other things."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    imported, compiler = done.stdout.splitlines()
    assert len(imported.split()) <= FEW, done.stdout
    assert compiler == "no compiler", "it takes a second or two to import, and nothing here is compiled"


class TwiceFed(nn.Module):
    """Its layers are given more than what the one before gave, of something trained: it cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(32, 8), nn.Embedding(32, 8)
        self.layers = nn.ModuleList(nn.Bilinear(8, 8, 8) for _ in range(2))
        self.head = nn.Linear(8, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden, beside = self.first(input_ids), self.second(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden, beside)
        logits: torch.Tensor = self.head(hidden)
        return logits


def test_a_model_that_cannot_be_cut_is_warmed_up_where_nothing_cuts_it() -> None:
    """`shard: parameters` computes layers in place; one of them by itself is tried only where that can be."""

    def fetch(step: int, virtual_worker: int) -> Batch:
        tokens = np.random.default_rng(step).integers(0, 32, size=(1, 9), dtype=np.int64)
        return plain_batch(tokens, np.arange(1), step, 1)

    spec = StepSpec(seed=1, micro_batch=1, micro_batches=1, base_lr=1e-2, schedule=ScheduleSpec("constant"))
    engine = StepEngine(TrainingState(Blueprint(TwiceFed()), OptimizerSpec()), spec, fetch)
    assert warm_up(engine, keep=False) == ""
