"""Several sources by weight: every window holds the weights, and each source's epochs are used exactly once."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import DataError, Sampler, audit, step_hash, virtual_worker_hash
from orchestrator.data.mix import MAX_PERIOD, MixedSampler, shares


def line_of(sampler: Sampler | MixedSampler, steps: int) -> np.ndarray:
    return np.concatenate([sampler.step_ids(step) for step in range(steps)])


def owners(sampler: MixedSampler, ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(sampler.offsets, ids, side="right") - 1


def test_weights_are_kept_as_they_are_written() -> None:
    assert shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert shares([3.0, 1.0]) == [3, 1]
    assert shares([5, 5]) == [1, 1]
    assert shares([1 / 3, 2 / 3]) == [1, 2]
    rounded = shares([math.pi, 1.0])
    assert sum(rounded) == MAX_PERIOD
    assert rounded[0] / rounded[1] == pytest.approx(math.pi, rel=1e-5)
    with pytest.raises(DataError, match="less than one sample in"):
        shares([1.0, 1e-9])
    with pytest.raises(DataError, match="positive"):
        shares([1.0, 0.0])


@pytest.fixture(params=range(3))
def seed() -> int:
    """Another each time: a failure shows it."""
    drawn = random.randrange(2**32)
    print(f"seed {drawn}")
    return drawn


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 2**40), st.integers(1, 400))
def test_every_window_holds_the_weights(weights: list[int], first: int, window: int) -> None:
    sampler = MixedSampler([11] * len(weights), weights, window, 1, seed=3)
    step, inside = divmod(first, window)
    line = np.concatenate([sampler.step_ids(step), sampler.step_ids(step + 1)])[inside:][:window]
    found = np.bincount(owners(sampler, line), minlength=len(weights))
    wanted = window * np.array(weights) / sum(weights)
    assert np.abs(found - wanted).max() <= 1 + len(weights) / 2


def test_each_source_has_each_of_its_epochs_exactly_once(seed: int) -> None:
    print(f"seed {seed}")
    sizes, weights = [60, 7, 25], [0.5, 0.3, 0.2]
    sampler = MixedSampler(sizes, weights, 8, 4, seed)
    line = line_of(sampler, 120)
    for source, size in enumerate(sizes):
        used = line[owners(sampler, line) == source] - sampler.offsets[source]
        epochs = [used[start : start + size].tolist() for start in range(0, len(used), size)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]


def test_one_source_is_used_as_without_a_mix() -> None:
    alone, mixed = Sampler(50, 8, 4, seed=9), MixedSampler([50], [2.0], 8, 4, seed=9)
    assert (line_of(alone, 20) == line_of(mixed, 20)).all()
    for step in (0, 7):
        parts = [mixed.sample_ids(step, worker) for worker in range(4)]
        assert (np.concatenate(parts) == alone.step_ids(step)).all()


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    sampler = MixedSampler([100, 100], [1.0, 1.0], 200, 1, seed=1)
    line = sampler.step_ids(0)
    assert line[owners(sampler, line) == 0].tolist() != (line[owners(sampler, line) == 1] - 100).tolist()


def test_where_each_source_is_after_so_many_samples() -> None:
    sampler = MixedSampler([10, 4], [3, 1], 8, 1, seed=1)
    line = line_of(sampler, 10)
    for samples in (0, 1, 37, 80):
        used = np.bincount(owners(sampler, line[:samples]), minlength=2)
        assert sampler.position(samples) == {
            "sources": [
                {"epoch": int(n) // size, "position": int(n) % size, "samples_per_epoch": size}
                for n, size in zip(used, [10, 4], strict=True)
            ]
        }


def test_a_dataset_sorted_by_length_is_even_in_every_window(seed: int) -> None:
    """The mean of 256 samples of 20,000 in order of length lies within six standard errors of the mean of all."""
    print(f"seed {seed}")
    lengths = np.sort(np.random.default_rng(seed).gamma(2.0, 100.0, 20_000))
    sampler = Sampler(len(lengths), 256, 1, seed)
    error = lengths.std() / 16
    means = np.array([lengths[sampler.step_ids(step)].mean() for step in range(70)])
    assert np.abs(means - lengths.mean()).max() <= 6 * error
    assert np.abs(np.diff(means)).mean() > 0.2 * error, "windows differ as random ones do"


def test_a_dataset_sorted_by_source_is_even_in_every_window(seed: int) -> None:
    """Half of the places of one source are long samples, which all stand at its end."""
    print(f"seed {seed}")
    is_long = np.arange(20_000) >= 10_000
    sampler = Sampler(20_000, 400, 1, seed)
    counts = [int(is_long[sampler.step_ids(step)].sum()) for step in range(50)]
    assert max(abs(count - 200) for count in counts) <= 5 * 10
    mixed = MixedSampler([10_000, 10_000], [1, 1], 400, 1, seed)
    assert {int((mixed.step_ids(step) >= 10_000).sum()) for step in range(50)} == {200}


MIX: dict[str, Any] = {
    "num_samples": 60, "global_batch": 8, "virtual_workers": 4, "seed": 3,
    "sources": [{"num_samples": 45, "weight": 0.75}, {"num_samples": 15, "weight": 0.25}],
}  # fmt: skip


def records(sampler: MixedSampler, steps: int) -> list[dict[str, Any]]:
    parts = [sampler.step_ids(step).reshape(4, -1) for step in range(steps)]
    return [
        {"step": step, "samples": step_hash([virtual_worker_hash(ids) for ids in part])}
        for step, part in enumerate(parts)
    ]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_audit_counts_the_epochs_of_each_source(tmp_path: Path) -> None:
    good = records(MixedSampler([45, 15], [0.75, 0.25], 8, 4, 3), 20)
    report = audit(written(tmp_path / "metrics.jsonl", good), **MIX)
    assert (report.ok, report.samples) == (True, 160)
    assert (report.epochs_complete, report.partial_epoch_samples) == (2 + 2, 30 + 10)
    assert report.data_digest
    for change in ({"weight": 0.5}, {"num_samples": 44}):
        other = {**MIX, "sources": [{**MIX["sources"][0], **change}, MIX["sources"][1]]}
        assert not audit(tmp_path / "metrics.jsonl", **other).ok


def test_an_audit_counts_ids_rather_than_trusting_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Sampler._epoch_ids

    def lossy(self: Sampler, epoch: int, first: int, length: int) -> Any:
        ids = honest(self, epoch, first, length)
        return np.where(ids == 7, 8, ids)

    monkeypatch.setattr(Sampler, "_epoch_ids", lossy)
    bad = records(MixedSampler([45, 15], [0.75, 0.25], 8, 4, 3), 20)
    report = audit(written(tmp_path / "metrics.jsonl", bad), **MIX)
    assert any("source 1: epoch 0 uses 1 samples again, among them [8]" in each for each in report.problems)
    assert any("source 0: epoch 0 is over, yet 1 of its 45 samples" in each for each in report.problems)
