"""What goes wrong while a checkpoint is made or read: training goes on, and what is used is what was saved."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.storage import LocalStorage, Pieces
from tests.ranks.local_cluster import ONE_BY_ONE, Hook, LocalCluster, Outcome, on_record, tiny_job

Run = Callable[..., Outcome]
EVERY_2 = "checkpoint.every_steps=2"


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def run(job_text: str, tmp_path: Path) -> Run:
    def start(timeout_s: float = 240.0, **arguments: Any) -> Outcome:
        return LocalCluster(job_text, tmp_path / "run", **arguments).run(timeout_s)

    return start


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    return LocalCluster(job_text, directory, overrides=["elastic.workers.max=1"]).run()


def catalog_of(tmp_path: Path) -> Catalog:
    return Catalog(LocalStorage(tmp_path / "run" / "checkpoints"), "test")


def assert_good(outcome: Outcome, expected: Outcome, tmp_path: Path) -> None:
    """The run came to the same bits, lost nothing, and left valid checkpoints and nothing else, the last of its end."""
    assert outcome.status == "finished", outcome.reason
    assert (outcome.digest, outcome.losses) == (expected.digest, expected.losses)
    assert outcome.rollbacks == []
    catalog = catalog_of(tmp_path)
    steps = catalog.steps()
    assert steps[0] == 8
    for step in steps:
        catalog.open(step).verify()
    complete = {"COMMIT", "MANIFEST.json"}
    for step in steps:
        names = set(catalog.storage.names(f"step-{step:08d}"))
        assert complete <= names
        parts = {file.name for file in catalog.open(step).manifest.files}
        left = {name for name in names - complete - parts if not name.endswith(".json")}
        assert not left, "parts of attempts that came to nothing are removed"


# ---------------------------------------------------------------------------------------- who dies while it is made


class Deadly(LocalStorage):
    """A storage in the worker's process: ends it before or after a file that is named so is put or removed, or in the
    middle of writing it."""

    def __init__(self, inner: LocalStorage, operation: str, ends_with: str, when: str) -> None:
        super().__init__(inner.root)
        self.operation, self.ends_with, self.when = operation, ends_with, when

    def _die(self, operation: str, path: str, when: str) -> None:
        if (operation, when) == (self.operation, self.when) and "00000004" in path and path.endswith(self.ends_with):
            # One of them, or nobody would be left to have the state.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.root.parent / "victim", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)

    def put(self, path: str, pieces: Pieces) -> None:
        def watched() -> Any:
            for piece in pieces():
                half = len(piece) // 2
                yield piece[:half]
                self._die("put", path, "during")
                yield piece[half:]

        self._die("put", path, "before")
        super().put(path, watched)
        self._die("put", path, "after")

    def remove(self, path: str) -> None:
        self._die("remove", path, "before")
        super().remove(path)
        self._die("remove", path, "after")


def make_deadly(slot: int | None, operation: str, ends_with: str, when: str, worker: Any) -> None:
    """The first incarnation of a worker (None: any worker that comes to it) does not survive this."""
    if slot in (None, worker.worker.slot) and worker.worker.incarnation == 0:
        catalog = worker._saver.catalog
        catalog.storage = Deadly(catalog.storage.inner, operation, ends_with, when)


PHASES = [
    ("put", ".safetensors", "before"),
    ("put", ".safetensors", "during"),
    ("put", ".safetensors", "after"),
    ("put", ".json", "after"),
    ("put", "MANIFEST.json", "before"),
    ("put", "MANIFEST.json", "during"),
    ("put", "MANIFEST.json", "after"),
    ("put", "COMMIT", "before"),
    ("put", "COMMIT", "after"),
    ("remove", ".json", "after"),
]


@pytest.mark.parametrize(("operation", "ends_with", "when"), PHASES, ids=[" ".join(phase) for phase in PHASES])
def test_a_worker_killed_in_any_phase_of_a_save(
    run: Run, undisturbed: Outcome, tmp_path: Path, operation: str, ends_with: str, when: str
) -> None:
    """For a part it is worker 1 that dies, for what one worker does for all the first that comes to it."""
    slot = 1 if ends_with == ".safetensors" else None
    hook: Hook = partial(make_deadly, slot, operation, ends_with, when)
    overrides = ["elastic.workers.max=3", EVERY_2, "checkpoint.keep=9"]
    outcome = run(overrides=overrides, hooks=[hook], holds=ONE_BY_ONE)
    assert_good(outcome, undisturbed, tmp_path)
    assert len(outcome.of("incident")) >= 1
    died = outcome.of("checkpoint_failed")
    if ends_with == ".safetensors":
        assert "was lost before it had written its part" in died[0]["error"]
    elif ends_with in ("MANIFEST.json", "COMMIT"):
        assert 4 in catalog_of(tmp_path).steps(), "another worker completes it"


@pytest.mark.parametrize("phase", ["compute", "vote", "commit"])
def test_a_worker_killed_in_the_step_after_its_snapshot(
    run: Run, undisturbed: Outcome, tmp_path: Path, phase: str
) -> None:
    outcome = run(
        overrides=["elastic.workers.max=3", EVERY_2],
        faults=[f"step=4,worker=1,kind=kill,phase={phase}"],
        hooks=[partial(make_slow, 0.3)],
    )
    assert_good(outcome, undisturbed, tmp_path)


def make_slow(seconds: float, worker: Any) -> None:
    """Every file takes a while to be written."""
    storage = worker._saver.catalog.storage
    put = storage.put

    def slowly(path: str, pieces: Pieces) -> None:
        time.sleep(seconds)
        put(path, pieces)

    storage.put = slowly


# ---------------------------------------------------------------------------------------- storages


class Full(LocalStorage):
    """Takes nothing for the checkpoint of step 4."""

    def __init__(self, inner: LocalStorage, code: int) -> None:
        super().__init__(inner.root)
        self.code = code

    def _write(self, file: int, data: memoryview) -> None:
        if "00000004" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(self.code, os.strerror(self.code))
        super()._write(file, data)


def make_full(code: int, slots: tuple[int, ...], worker: Any) -> None:
    if worker.worker.slot in slots:
        catalog = worker._saver.catalog
        catalog.storage.inner = Full(catalog.storage.inner, code)
        catalog.storage._pause_s = 0.01


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("slots", [(0, 1, 2), (1,)])
def test_a_storage_that_takes_nothing_does_not_stop_training(
    run: Run, undisturbed: Outcome, tmp_path: Path, code: int, slots: tuple[int, ...]
) -> None:
    hooks = [partial(make_full, code, slots)]
    outcome = run(overrides=["elastic.workers.max=3", EVERY_2], hooks=hooks, holds=ONE_BY_ONE)
    assert_good(outcome, undisturbed, tmp_path)
    assert outcome.recoveries == []
    (failed,) = outcome.of("checkpoint_failed")
    assert failed["committed"] == 4
    assert os.strerror(code) in failed["error"]
    assert catalog_of(tmp_path).steps() == [8, 6, 2], "the next interval tries again"


def test_a_slow_storage_delays_checkpoints_and_not_training(run: Run, undisturbed: Outcome, tmp_path: Path) -> None:
    outcome = run(
        overrides=["elastic.workers.max=2", "checkpoint.every_steps=1", "checkpoint.keep=9"],
        hooks=[partial(make_slow, 0.4)],
    )
    assert_good(outcome, undisturbed, tmp_path)
    assert outcome.recoveries == []
    delayed = outcome.of("checkpoint_delayed")
    saved = outcome.of("checkpoint_saved")
    assert delayed, "it says so"
    assert len(saved) < 8, "and does not queue"
    assert saved[-1]["committed"] == 8


def test_checkpoints_by_time(run: Run, undisturbed: Outcome, tmp_path: Path) -> None:
    """The second step waits until it is time, the last one until that checkpoint is made."""
    outcome = run(
        overrides=["elastic.workers.max=2", "checkpoint.every_seconds=0.2"],
        holds={
            1: lambda cluster: cluster.controller._run.saving.is_due,
            7: lambda cluster: bool(cluster.controller.checkpoints),
        },
    )
    assert_good(outcome, undisturbed, tmp_path)
    steps = [saved["committed"] for saved in outcome.of("checkpoint_saved")]
    assert len(steps) >= 2
    assert steps[-1] == 8


# ---------------------------------------------------------------------------------------- reading


def unreadable(worker: Any) -> None:
    """The storage of this worker fails the first time a part is read."""
    inner = worker._catalog.storage.inner
    worker._catalog.storage._pause_s = 0.01
    read_into = inner.read_into
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))] * 7

    def fail(path: str, start: int, buffer: memoryview) -> None:
        if path.endswith(".safetensors") and failures:
            raise failures.pop()
        read_into(path, start, buffer)

    inner.read_into = fail


def test_a_storage_that_cannot_be_read_for_a_while_costs_no_checkpoint(
    run: Run, undisturbed: Outcome, tmp_path: Path
) -> None:
    """All die; those who come in their place cannot read at first."""
    outcome = run(
        overrides=["elastic.workers.max=2", "elastic.workers.min=2", EVERY_2],
        faults=["step=5,worker=0,kind=kill", "step=5,worker=1,kind=kill"],
        holds={**ONE_BY_ONE, 5: partial(on_record, 5, 4)},
        hooks=[unreadable],
    )
    assert outcome.status == "finished", outcome.reason
    assert (outcome.digest, outcome.losses) == (undisturbed.digest, undisturbed.losses)
    assert outcome.of("checkpoint_invalid") == []
    assert outcome.rollbacks == [4]


def test_a_checkpoint_that_was_cut_off_is_set_aside(run: Run, undisturbed: Outcome, tmp_path: Path) -> None:
    def cut(cluster: LocalCluster) -> None:
        directory = Path(cluster.controller.checkpoints[4])
        part = sorted(directory.glob("*.safetensors"))[0]
        os.truncate(part, part.stat().st_size // 2)
        done.append(True)

    done: list[bool] = []
    outcome = run(
        overrides=["elastic.workers.max=2", "elastic.workers.min=2", EVERY_2],
        faults=["step=5,worker=0,kind=kill", "step=5,worker=1,kind=kill"],
        holds={**ONE_BY_ONE, 5: lambda cluster: bool(done)},
        script=[(partial(on_record, 5, 4), cut)],
    )
    assert outcome.status == "finished", outcome.reason
    assert outcome.digest == undisturbed.digest
    assert outcome.rollbacks == [4, 2] or outcome.rollbacks == [2]
    assert all("bytes" in each["reason"] for each in outcome.of("checkpoint_invalid"))
    assert catalog_of(tmp_path).steps()[0] == 8, "the run replaced what it had set aside, when it came there again"
