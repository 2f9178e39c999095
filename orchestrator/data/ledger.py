"""The proof that a run used its data as the job file says: hashes on the way, an audit afterwards.

Each virtual worker hashes the ids it consumed, the step's record keeps a hash of those hashes, and `audit`
derives them again from the job alone. Knows the format of two keys of metrics.jsonl (`step`, `samples`) and
nothing else of a run.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from monitoring.outside import Unreadable, parse
from orchestrator.data.compose import Composer
from orchestrator.data.mix import MixedSampler
from orchestrator.data.sampler import Sampler
from orchestrator.data.sources import DataError

_MAX_PROBLEMS = 20
_MAX_GAP = 1_000_000
"""A step that is so far ahead is no step of this run, and what it would use is not counted."""


def virtual_worker_hash(ids: NDArray[np.integer]) -> int:
    """XXH3-64 over the sample ids [n] in order, as little-endian int64; a signed 64-bit integer."""
    unsigned = xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


def step_hash(hashes: Sequence[int]) -> str:
    """XXH3-128 (32 hex digits) over a step's virtual worker hashes in order, as little-endian int64."""
    return xxhash.xxh3_128_hexdigest(struct.pack(f"<{len(hashes)}q", *hashes))


class Steps(Protocol):
    """What says which samples a step uses: a sampler, or a dataset."""

    @property
    def virtual_workers(self) -> int:
        """Into how many equal runs a step's samples are cut."""

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """The ids of a whole step in the order of its virtual workers, int64 [global_batch]."""


def write_lengths(path: str | os.PathLike[str], lengths: NDArray[np.integer]) -> str:
    """Keep the lengths of all samples [samples], in tokens, in a file as little-endian uint32; returns its digest.

    The file appears whole or not at all. Raises OSError, and ValueError for a length of 2**32 or more.
    """
    if len(lengths) and int(lengths.max()) >= 1 << 32:
        raise ValueError(f"a sample of {lengths.max()} tokens is longer than its length can be kept")
    data = np.asarray(lengths).astype("<u4").tobytes()
    draft = f"{os.fspath(path)}.{secrets.token_hex(4)}"
    with open(draft, "wb") as stream:
        stream.write(data)
    os.replace(draft, path)
    return f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"


def read_lengths(path: str | os.PathLike[str], digest: str) -> NDArray[np.int64]:
    """What `write_lengths` has kept, int64 [samples]. Raises DataError when it is not there or not what was written."""
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: cannot be read: {error}; it belongs to the run directory") from error
    if f"xxh3:{xxhash.xxh3_128_hexdigest(data)}" != digest:
        raise DataError(f"{os.fspath(path)}: not the lengths of samples that environment.json names; it was altered")
    return np.frombuffer(data, dtype="<u4").astype(np.int64)


def data_digest(records: Iterable[Mapping[str, Any]], sampler: Steps) -> str:
    """The `data_digest` of result.json: which virtual worker used which sample at which committed step.

    records: the committed steps in order, each with `step` and, where it was recorded, `samples`. Returns
    "sha256:" and 64 hex digits, over the (step, virtual worker, sample id) triples as little-endian int64.

    Raises DataError when a record's `samples` is not the hash of the sampler's ids: the digest would be a
    lie.
    """
    digest = hashlib.sha256()
    for record in records:
        step = int(record["step"])
        ids = sampler.step_ids(step)
        if "samples" in record and record["samples"] != (expected := _expected_hash(ids, sampler)):
            raise DataError(
                f"step {step}: its samples hash to {record['samples']!r}, the job's give {expected!r}; "
                "the run did not use this job's data settings"
            )
        digest.update(_triples(step, ids, sampler))
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    ok: the ledger is exactly what the job says; steps, samples: how many were committed; epochs_complete:
    epochs whose every sample was used exactly once; partial_epoch_samples: distinct samples used of the epoch
    still under way (both are sums over the sources of a mix); data_digest: as in result.json, empty unless ok;
    problems: what is wrong, one sentence each.
    """

    ok: bool
    steps: int
    samples: int
    epochs_complete: int
    partial_epoch_samples: int
    data_digest: str
    problems: list[str] = field(default_factory=list)


def _order(
    num_samples: int, global_batch: int, virtual_workers: int, seed: int, shuffle: bool,
    sources: Sequence[Mapping[str, Any]] | None,
) -> Sampler | MixedSampler:  # fmt: skip
    """Which ids each step has, by the job."""
    if sources is None:
        return Sampler(num_samples, global_batch, virtual_workers, seed, shuffle)
    sizes, weights = ([source[key] for source in sources] for key in ("num_samples", "weight"))
    return MixedSampler(sizes, weights, global_batch, virtual_workers, seed, shuffle)


def _composer(
    metrics_path: str | os.PathLike[str], virtual_workers: int, composition: Mapping[str, Any]
) -> Composer:  # fmt: skip
    """How the ids of a step become virtual workers' samples, of lengths in a file beside metrics.jsonl."""
    lengths = read_lengths(Path(metrics_path).parent / composition["lengths"], composition["digest"])
    return Composer(lengths, composition["micro_batch"], virtual_workers, composition["token_cost"])


class _Account:
    """What the records say that was used, one after another, against what the job says."""

    def __init__(
        self,
        order: Sampler | MixedSampler,
        composer: Composer | None,
        usages: Sequence[_Usage],
        problems: list[str],
        first_step: int,
    ) -> None:
        self.steps = 0
        self.digest = hashlib.sha256()
        self._order = order
        self._composer = composer
        self._usages = usages
        self._problems = problems
        self._first_step = first_step
        self._expected_step = 0

    def take(self, record: Mapping[str, Any], where: str) -> None:
        """One record of a step, that stands at this place."""
        problems, step = self._problems, record.get("step")
        if type(step) is not int or step < 0:  # bool is an int to isinstance, but True is no step
            problems.append(f"{where}: step is {step!r}, not a step number")
            return
        if step > self._expected_step + _MAX_GAP:
            problems.append(f"{where}: step {step} where step {self._expected_step} was expected; it is left out")
            return
        if step != self._expected_step:
            problems.append(f"{where}: step {step} where step {self._expected_step} was expected")
        self.steps, self._expected_step = self.steps + 1, step + 1
        line = self._order.step_ids(step)
        ids = line if self._composer is None else self._composer.compose(line).ids
        if self._composer is not None and not np.array_equal(np.sort(ids), np.sort(line)):
            problems.append(f"{where}: step {step} is composed of other samples than it has")
        expected = _expected_hash(ids, self._order)
        if step >= self._first_step and record.get("samples") != expected:
            problems.append(f"{where}: step {step} used samples {record.get('samples')!r}, the job says {expected!r}")
            return
        for number, first_place, used in self._order.uses(step, line):
            self._usages[number].add(first_place, used, where)
        self.digest.update(_triples(step, ids, self._order))


def audit(
    metrics_path: str | os.PathLike[str],
    *,
    num_samples: int,
    global_batch: int,
    virtual_workers: int,
    seed: int,
    shuffle: bool = True,
    first_step: int = 0,
    sources: Sequence[Mapping[str, Any]] | None = None,
    composition: Mapping[str, Any] | None = None,
) -> AuditReport:
    """Check the ledger of a run against its job.

    first_step: where a run that was forked from another began; the steps before are that one's, and count as what this
    job would have used.

    metrics_path: metrics.jsonl, one JSON object per committed step with `step` (from 0) and `samples`
    (`step_hash`); a last line torn by a crash is left out. The rest is as for `Sampler`. Uses num_samples
    bytes per epoch under way.

    sources: of a mix, `num_samples` and `weight` of each; every source has epochs of its own. composition: of samples
    that differ in length, `lengths` (a file beside metrics.jsonl), its `digest`, `micro_batch` and `token_cost`.

    Three checks: the steps are 0, 1, 2 ... in order; each record's hash is that of the ids the job gives the
    step; and, counted id by id, no epoch uses a sample twice and no finished epoch leaves one out.

    Raises DataError when the file cannot be read, ValueError for impossible arguments.
    """
    order = _order(num_samples, global_batch, virtual_workers, seed, shuffle, sources)
    composer = None if composition is None else _composer(metrics_path, virtual_workers, composition)
    sizes = [num_samples] if sources is None else [source["num_samples"] for source in sources]
    problems: list[str] = []
    usages = [
        _Usage(size, "" if sources is None else f"source {number}: ", problems) for number, size in enumerate(sizes)
    ]
    account = _Account(order, composer, usages, problems, first_step)
    for number, record in _records(metrics_path, problems):
        account.take(record, f"{os.fspath(metrics_path)}:{number}")
    finished = [usage.finish() for usage in usages]
    if len(problems) > _MAX_PROBLEMS:
        problems[_MAX_PROBLEMS:] = [f"and {len(problems) - _MAX_PROBLEMS} more"]
    return AuditReport(
        ok=not problems,
        steps=account.steps,
        samples=account.steps * global_batch,
        epochs_complete=sum(complete for complete, _ in finished),
        partial_epoch_samples=sum(partial for _, partial in finished),
        data_digest="" if problems else f"sha256:{account.digest.hexdigest()}",
        problems=problems,
    )


class _Usage:
    """Which ids each epoch has used, marked id by id: no trust in the sampler's theory is needed."""

    def __init__(self, num_samples: int, source: str, problems: list[str]) -> None:
        self._num_samples = num_samples
        self._source = source
        self._problems = problems
        self._open: dict[int, NDArray[np.bool_]] = {}
        self._counts: dict[int, int] = {}  # distinct ids seen, by epoch
        self._complete: set[int] = set()

    def add(self, first_place: int, ids: NDArray[np.int64], where: str) -> None:
        """Mark the ids [n] that stand from first_place on in the endless line of epochs."""
        start = 0
        while start < len(ids):
            epoch, offset = divmod(first_place + start, self._num_samples)
            part = ids[start : start + self._num_samples - offset]
            self._mark(epoch, part, where)
            start += len(part)

    def _mark(self, epoch: int, ids: NDArray[np.int64], where: str) -> None:
        if epoch in self._complete:
            self._problems.append(
                f"{where}: {self._source}epoch {epoch} was complete, yet sample {ids[0]} is used again"
            )
            return
        if epoch not in self._open:
            self._open[epoch] = np.zeros(self._num_samples, dtype=np.bool_)
            self._counts[epoch] = 0
        seen = self._open[epoch]
        unique, times = np.unique(ids, return_counts=True)
        again = unique[seen[unique] | (times > 1)]
        if len(again):
            self._problems.append(
                f"{where}: {self._source}epoch {epoch} uses {len(again)} samples again, among them {again[:3].tolist()}"
            )
        self._counts[epoch] += int(np.count_nonzero(~seen[unique]))
        seen[unique] = True
        if self._counts[epoch] == self._num_samples:
            self._complete.add(epoch)
            del self._open[epoch]

    def finish(self) -> tuple[int, int]:
        """(complete epochs, samples used of the newest epoch if it is not complete)."""
        newest = max([*self._open, *self._complete], default=0)
        for epoch in range(newest):
            if epoch not in self._complete:
                seen = self._open.get(epoch, np.zeros(self._num_samples, dtype=np.bool_))
                missing = np.flatnonzero(~seen)
                self._problems.append(
                    f"{self._source}epoch {epoch} is over, yet {len(missing)} of its {self._num_samples} samples were "
                    f"never used, among them {missing[:3].tolist()}"
                )
        return len(self._complete), self._counts[newest] if newest in self._open else 0


def _records(path: str | os.PathLike[str], problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, record) of every line that holds one; all but a torn last line are problems."""
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    record = parse(line)
                except Unreadable:
                    if line.endswith(b"\n"):  # only the last line can lack it, and only a crash leaves it torn
                        problems.append(f"{os.fspath(path)}:{number}: not valid JSON")
                    continue
                if isinstance(record, dict):
                    yield number, record
                else:
                    problems.append(f"{os.fspath(path)}:{number}: not a JSON object")
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: cannot be read: {error}; is this a run directory?") from error


def _expected_hash(ids: NDArray[np.int64], sampler: Steps) -> str:
    return step_hash([virtual_worker_hash(part) for part in ids.reshape(sampler.virtual_workers, -1)])


def _triples(step: int, ids: NDArray[np.int64], sampler: Steps) -> bytes:
    """(step, virtual worker, sample id) of a step, little-endian int64 [global_batch, 3] in memory order."""
    triples = np.empty((len(ids), 3), dtype="<i8")
    triples[:, 0] = step
    triples[:, 1] = np.repeat(np.arange(sampler.virtual_workers), len(ids) // sampler.virtual_workers)
    triples[:, 2] = ids
    return triples.tobytes()
