"""A machine that stops after any single operation of a save: the run comes to the same bits all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.encryption import Secret
from orchestrator.checkpoint.names import Save
from orchestrator.training.restoring import open_checkpoint, read_checkpoint
from strategies.comm.fabric import Fabric
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain
from strategies.state.training_state import TrainingState, state_digest
from tests.unit.checkpoints_in_tests import RUN, SECRET, Fragile, PowerCut, catalog_in
from tests.unit.states_in_tests import save_state
from tests.unit.tiny_model import CPU, make, one_thread, random_gradient, settle, update  # noqa: F401 (autouse)

STEPS = 4


def trained(steps: int) -> TrainingState:
    state = make()
    settle(state)
    train(state, 0, steps)
    return state


def train(state: TrainingState, first: int, last: int) -> None:
    for step in range(first, last):
        update(state, random_gradient(state, step))


def restored(catalog: Catalog) -> tuple[TrainingState, int]:
    """A worker that starts anew with the newest checkpoint."""
    committed = catalog.steps()[0]
    state = make(seed=99)
    checkpoint = open_checkpoint(catalog, committed, state)
    layout = ParallelLayout(data=1, assignment=((0,),))
    state.invalidate()
    state.adopt_layout(
        layout, Fabric(rank=0, layout=layout, device=CPU), [()], [Domain("", "node")], 1, checkpoint.manifest.updates,
        lambda: None, lambda loader: read_checkpoint(checkpoint, loader, lambda: None),
    )  # fmt: skip
    return state, committed


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_wherever_a_save_is_cut_off_the_run_comes_to_the_same_bits(tmp_path: Path, secret: Secret | None) -> None:
    expected = state_digest(trained(STEPS))
    first, second = trained(1), trained(2)
    seen: set[int] = set()
    for stop_at in range(10_000):
        directory = tmp_path / str(stop_at)
        save_state(first, catalog_in(directory, secret), Save(1, 1, 0))
        try:
            save_state(second, Catalog(Fragile(directory, stop_at), RUN, secret), Save(2, 1, 0))
        except PowerCut:
            is_over = False
        else:
            is_over = True
        state, committed = restored(catalog_in(directory, secret))
        assert state_digest(state) == state_digest(first if committed == 1 else second)
        train(state, committed, STEPS)
        assert state_digest(state) == expected, f"stopped before operation {stop_at}"
        save_state(state, catalog_in(directory, secret), Save(STEPS, 2, 1))
        assert catalog_in(directory, secret).steps() == [STEPS]
        assert sorted(path.name for path in directory.iterdir()) == [f"step-{STEPS:08d}"]
        seen.add(committed)
        shutil.rmtree(directory)
        if is_over:
            break
    assert stop_at > 40
    assert seen == {1, 2}
