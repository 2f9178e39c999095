"""A worker that says that it is warm has imported what its steps take: no generation waits for that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
assert engine.run(0)[0].grad_norm > 0
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
