"""What a reference gives outlives every worker, and is that of this job or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.api import _as_on_record
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.manifest import UnusableCheckpoint
from orchestrator.data.of_job import dataset_of, prepare_stores
from orchestrator.job import Job, JobError
from orchestrator.models.loading import build_model
from orchestrator.models.problems import ModelError
from orchestrator.storage import LocalStorage
from orchestrator.training.compared import with_compared
from orchestrator.training.references import NAME, References
from tests.ranks.tuned import engine_of, job_of
from tests.unit.tiny_model import settle


class Worker:
    """A new process that is alone in its generation."""

    def __init__(self, job: Job, storage: Path, origin: tuple[int, Catalog] | None = None) -> None:
        self.engine, _ = engine_of(job, storage / "unused")
        self.fabric = settle(self.engine.state, 4)
        self.engine.bind(self.fabric, self.fabric.layout, 0)
        self.catalog = Catalog(LocalStorage(storage), "run", None, origin)
        dataset = dataset_of(job, prepare_stores(job, verify=False))
        found = References.of(job, dataset, None, self.engine.spec, self.catalog)
        assert found is not None
        self.references = found

    def bring(self, committed: int) -> bytes:
        self.references.bring(self.engine, self.fabric, committed)
        table = self.references._table
        assert table is not None
        assert table.any()
        return table.tobytes()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return job_of("dpo", tmp_path)


def test_it_is_computed_once_and_found_again(job: Job, tmp_path: Path) -> None:
    """Also by a run that begins again at step 0, as all died before its first checkpoint."""
    first = Worker(job, tmp_path / "storage")
    table = first.bring(0)
    assert first.references.moves > 0
    for committed in (0, 4):
        later = Worker(job, tmp_path / "storage")
        assert later.bring(committed) == table
        assert later.references.moves == 0


def test_another_model_need_not_be_there_once_it_has_been_asked(tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_model(job_of("dpo", tmp_path), 257).save_pretrained(other)
    job = job_of("dpo", tmp_path, objective={"reference": str(other)})
    known = with_compared(job)
    table = Worker(known, tmp_path / "storage").bring(0)
    other.rename(tmp_path / "gone")
    assert Worker(known, tmp_path / "storage").bring(4) == table
    assert with_compared(known, has_begun=True) == known
    assert _as_on_record(known, job) == known, "the same job file goes on with that run"
    for asked in (known, job):
        with pytest.raises(ModelError, match="other"):
            with_compared(asked)
    with pytest.raises(ModelError, match="other"):
        Worker(known, tmp_path / "empty").bring(0)


def test_a_fork_has_that_of_its_parent_and_keeps_it(job: Job, tmp_path: Path) -> None:
    parent = Worker(job, tmp_path / "parent")
    table = parent.bring(0)
    changed = job.model_copy(update={"train": job.train.model_copy(update={"clip_norm": 0.5})})
    assert Worker(changed, tmp_path / "fork", (4, parent.catalog)).bring(4) == table
    (tmp_path / "parent" / NAME).unlink()
    assert Worker(changed, tmp_path / "fork").bring(4) == table


@pytest.mark.parametrize("what", ["missing", "damaged", "of another job"])
def test_without_it_a_run_says_so_and_does_not_go_on(job: Job, tmp_path: Path, what: str) -> None:
    Worker(job, tmp_path / "storage").bring(0)
    path = tmp_path / "storage" / NAME
    if what == "missing":
        path.unlink()
    elif what == "damaged":
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        job = job_of("dpo", tmp_path, objective={"name": "dpo", "beta": 0.5, "loss": "ipo"})
    with pytest.raises(UnusableCheckpoint, match=r"reference\.bin does not have it for this model, data and objective"):
        Worker(job, tmp_path / "storage").bring(4)
    # At step 0 it is made anew.
    again = Worker(job, tmp_path / "storage")
    again.bring(0)
    assert again.references.moves > 0
    assert Worker(job, tmp_path / "storage").bring(4)


def test_a_storage_that_refuses_is_tried_again(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(job, tmp_path / "storage")

    def refuse(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put", refuse)
        worker.bring(0)
    assert not (tmp_path / "storage" / NAME).exists()
    worker.bring(2)
    assert (tmp_path / "storage" / NAME).exists()


def test_another_reference_than_a_frozen_base_is_refused(tmp_path: Path) -> None:
    frozen: list[dict[str, Any]] = [{"adapter": {"name": "lora"}}, {"train": {"freeze": ["*embed*"]}}]
    for changes in frozen:
        with pytest.raises(JobError, match="what is frozen is that of the model, also while the reference is computed"):
            job_of("dpo", tmp_path, objective={"reference": "elsewhere"}, **changes)
