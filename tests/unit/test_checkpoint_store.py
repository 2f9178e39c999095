"""A checkpoint is what was saved, whole, or it is refused."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.names import find
from orchestrator.checkpoint.store import CheckpointError, load, save

store: Any = importlib.import_module("orchestrator.checkpoint.store")
META = {"run": "r", "job": "sha256:0"}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(7, 5, generator=generator),
        "model.transposed": torch.randn(4, 6, generator=generator).t(),
        "model.half": torch.randn(9, generator=generator).to(torch.bfloat16),
        "model.special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "model.empty": torch.zeros(0, 3),
        "optimizer.updates": torch.tensor(12, dtype=torch.int64),
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(t: torch.Tensor) -> bytes:
        return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and raw(a[n]) == raw(b[n]) for n in a
    )


def steps(directory: Path) -> list[int]:
    return [committed for committed, _ in find(directory)]


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    path, num_bytes = save(tmp_path / "deep" / "er", 120, tensors(), META, keep=3)
    assert path.name == "step-00000120"
    assert num_bytes == sum(file.stat().st_size for file in path.iterdir())
    assert same(load(path), tensors())
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert (manifest["committed"], manifest["run"], manifest["job"]) == (120, "r", "sha256:0")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing else is left behind"


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for committed in (5, 10, 15, 100_000_000, 20):
        save(tmp_path, committed, tensors(), META, keep=3)
    assert steps(tmp_path) == [100_000_000, 20, 15]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020", "step-100000000"]


def test_what_was_just_saved_stays_even_among_newer_ones(tmp_path: Path) -> None:
    """A run that was rolled back saves older steps than the storage holds."""
    for committed in (10, 20):
        save(tmp_path, committed, tensors(), META, keep=2)
    path, num_bytes = save(tmp_path, 5, tensors(), META, keep=1)
    assert num_bytes > 0
    assert same(load(path), tensors())
    assert steps(tmp_path) == [20, 5]


def test_only_checkpoints_are_found(tmp_path: Path) -> None:
    save(tmp_path, 7, tensors(), META, keep=3)
    (tmp_path / ".draft-step-00000009-aa").mkdir()
    (tmp_path / "step-12").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert steps(tmp_path) == [7]
    assert find(tmp_path / "nowhere") == []


@pytest.mark.parametrize("file", ["state.safetensors", "MANIFEST.json"])
def test_any_flipped_bit_is_found_out(tmp_path: Path, file: str) -> None:
    path, _ = save(tmp_path, 3, tensors(), META, keep=3)
    good = (path / file).read_bytes()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    places = {rng.randrange(8 * len(good)) for _ in range(400)} | {0, 8 * len(good) - 1}
    for place in sorted(places):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << (place % 8)
        (path / file).write_bytes(bad)
        print(f"bit {place % 8} of byte {place // 8}")
        with pytest.raises(CheckpointError, match="step-00000003"):
            load(path)
    (path / file).write_bytes(good)
    assert same(load(path), tensors())


@pytest.mark.parametrize("file", ["state.safetensors", "MANIFEST.json"])
def test_a_file_cut_short_emptied_lengthened_or_missing_is_found_out(tmp_path: Path, file: str) -> None:
    path, _ = save(tmp_path, 3, tensors(), META, keep=3)
    good = (path / file).read_bytes()
    for length in {0, 1, 7, 8, 9, len(good) // 2, len(good) - 1}:
        (path / file).write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            load(path)
    (path / file).write_bytes(good + b"x")
    with pytest.raises(CheckpointError):
        load(path)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match="unreadable"):
        load(path)


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    first, _ = save(tmp_path, 3, tensors(0), META, keep=3)
    second, _ = save(tmp_path, 4, tensors(1), META, keep=3)
    shutil.copy(first / "state.safetensors", second / "state.safetensors")
    with pytest.raises(CheckpointError, match="not what was saved"):
        load(second)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    path, _ = save(tmp_path, 3, tensors(), META, keep=3)
    with pytest.raises(CheckpointError, match="holds the state of step 3"):
        load(path.rename(tmp_path / "step-00000009"))


def test_other_formats_and_manifests_that_are_none_are_refused(tmp_path: Path) -> None:
    path, _ = save(tmp_path, 3, tensors(), META, keep=3)
    for text in ("[]", "3", "null", '{"format": 99}', "{}", "\xff"):
        (path / "MANIFEST.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError):
            load(path)


def test_a_valid_checkpoint_of_the_same_step_is_left_alone_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    path, _ = save(tmp_path, 3, tensors(), META, keep=3)
    before = os.stat(path / "state.safetensors").st_ino
    assert save(tmp_path, 3, tensors(), META, keep=3)[0] == path
    assert os.stat(path / "state.safetensors").st_ino == before
    (path / "state.safetensors").write_bytes(b"damaged")
    save(tmp_path, 3, tensors(), META, keep=3)
    assert same(load(path), tensors())


def test_writers_of_one_step_at_once_leave_one_valid_checkpoint(tmp_path: Path) -> None:
    """An old generation's first rank may still be writing when the new one's does."""
    barrier = threading.Barrier(4)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for committed in range(1, 9):
                barrier.wait()
                path, num_bytes = save(tmp_path, committed, tensors(committed), META, keep=20)
                assert num_bytes > 0
                assert same(load(path), tensors(committed))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(tmp_path.iterdir())) == 8


def test_a_failed_write_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise store.SafetensorError("No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 3, tensors(), META, keep=3)
    assert list(tmp_path.iterdir()) == []


def test_death_at_any_moment_of_a_write_leaves_no_checkpoint_or_a_valid_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that touches the disk is, in turn, the last thing the writer does."""

    class Death(BaseException):
        pass

    points = ["save_file", "_sync", "_sync", "_sync", "rename", "_sync"]
    for index in range(len(points)):
        directory = tmp_path / str(index)
        calls = 0

        def deadly(original: Any, index: int = index) -> Any:
            def call(*arguments: object) -> Any:
                nonlocal calls
                calls += 1
                if calls == index + 1:
                    raise Death
                return original(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(store, "save_file", deadly(store.save_file))
            patch.setattr(store, "_sync", deadly(store._sync))
            patch.setattr(store.os, "rename", deadly(os.rename))
            patch.setattr(store.shutil, "rmtree", lambda *a, **k: None)
            with pytest.raises(Death):
                save(directory, 3, tensors(), META, keep=3)
        for _, path in find(directory):
            assert same(load(path), tensors())
        assert steps(directory) == ([3] if index > 4 else [])
        path, _ = save(directory, 3, tensors(), META, keep=3)
        assert same(load(path), tensors())
