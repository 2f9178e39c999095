"""A job's data, whole: what each virtual worker gets, in every packing."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data import DataError, DataPlan, Dataset, Sampler, TokenStore, audit, data_digest, prepare, step_hash
from orchestrator.data.dataset import LENGTHS_NAME
from orchestrator.data.of_job import open_stores, prepare_stores
from orchestrator.data.samples import cut_of
from orchestrator.job import Job
from strategies.objective.batch import Batch, counting, positions

PLAN = DataPlan(sequence_length=16, global_batch=24, micro_batch=2, virtual_workers=4, seed=5, token_cost=40)
END = 256


def make_store(directory: Path, seed: int, documents: int = 300, first: int = 97) -> TokenStore:
    """Documents of one letter each, of many lengths, so that a token says which document it may be of."""
    rng = random.Random(seed)
    lines = [chr(first + n % 20) * max(0, int(rng.lognormvariate(2.0, 1.0))) for n in range(documents)]
    path = directory / f"data-{seed}.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return prepare(source=str(path), tokenizer="bytes", cache=str(directory / "cache"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data"), seed=1)


@pytest.fixture(scope="module")
def stores(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    return [store, make_store(tmp_path_factory.mktemp("other"), seed=2, documents=90, first=65)]


def documents_of(store: TokenStore) -> list[list[int]]:
    line = np.empty(store.num_tokens, dtype=np.int64)
    store.read(0, line)
    return [part.tolist() for part in np.split(line, np.cumsum(store.document_lengths())[:-1])]


def targets_of(batch: Batch) -> int:
    return batch.tokens[:, 1:].size if batch.documents is None else int(counting(batch.documents).sum())


def test_the_lengths_of_documents_are_kept(store: TokenStore) -> None:
    documents = documents_of(store)
    assert len(documents) == 300
    assert all(document[-1] == END and END not in document[:-1] for document in documents)
    assert {len(document) for document in documents} > {1, 2}
    with pytest.raises(IndexError):
        store.read(store.num_tokens - 1, np.empty(2, dtype=np.int64))


def test_the_lengths_of_documents_come_from_a_mirror_where_they_are_lost(store: TokenStore, tmp_path: Path) -> None:
    torn, mirror = tmp_path / "torn", tmp_path / "mirror"
    shutil.copytree(store.directory, torn)
    shutil.copytree(store.directory, mirror)
    (torn / "shard-00000.documents").write_bytes(b"torn")
    found = TokenStore(torn, mirrors=[str(mirror)])
    assert (found.document_lengths() == store.document_lengths()).all()
    with pytest.raises(DataError, match=r"lengths of documents cannot be read .*shard-00000\.documents"):
        TokenStore(torn).document_lengths()


@pytest.mark.parametrize("document", ["file", "line"])
def test_lengths_do_not_depend_on_how_files_are_cut_among_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str
) -> None:
    rng = random.Random(4)
    lines = ["x" * rng.randint(1, 300) for _ in range(500)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")

    def lengths(cache: str) -> list[int]:
        arguments: dict[str, Any] = {"source": str(tmp_path / "a.txt"), "document": document, "tokenizer": "bytes"}
        made = prepare(**arguments, cache=str(tmp_path / cache))
        return made.document_lengths().tolist()

    cut = lengths("cut")
    monkeypatch.setattr("orchestrator.data.build.MAX_TASKS", 1)
    assert lengths("whole") == cut
    # The tokens of a line and of its end; how a line's own end is kept is for `documents` to say.
    assert len(cut) == (500 if document == "line" else 1)


def test_a_stream_is_what_it_was(store: TokenStore) -> None:
    dataset = Dataset([store], PLAN)
    sampler = Sampler(store.num_samples(16), 24, 4, 5)
    assert dataset.digest == store.digest
    for step in (0, 3, 90):
        for worker in range(4):
            batch = dataset.batch(step, worker)
            ids = sampler.sample_ids(step, worker)
            assert (batch.ids == ids).all()
            assert (batch.tokens == store.samples(ids, 16)).all()
            assert (batch.documents, batch.widths, batch.cost) == (None, None, 1.0)
            assert (batch.targets, batch.num_targets, batch.num_padding, batch.step_padding) == (384, 96, 0, 0)


KINDS: dict[str, dict[str, Any]] = {
    "stream, masked": {"document_mask": True},
    "pack": {"packing": "pack"},
    "pack, masked": {"packing": "pack", "document_mask": True},
    "pad": {"packing": "pad"},
}


def dataset_of_kind(stores: list[TokenStore], kind: str, mixed: bool) -> Dataset:
    plan = dataclasses.replace(PLAN, **KINDS.get(kind, {}), weights=(0.75, 0.25) if mixed else None)
    return Dataset(stores if mixed else stores[:1], plan)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", ["stream", *KINDS])
def test_what_is_said_of_a_step_is_so(stores: list[TokenStore], kind: str, mixed: bool) -> None:
    dataset = dataset_of_kind(stores, kind, mixed)
    for step in (0, 1, 40):
        batches = [dataset.batch(step, worker) for worker in range(4)]
        assert all(len(batch.ids) == 6 for batch in batches)
        assert (np.concatenate([batch.ids for batch in batches]) == dataset.step_ids(step)).all()
        assert sorted(dataset.step_ids(step)) == sorted(dataset.sampler.step_ids(step))
        for batch in batches:
            assert batch.num_targets == targets_of(batch)
            computed = sum(tokens[:, 1:].size for tokens, *_ in batch.micro_batches(2))
            assert batch.num_padding == computed - batch.num_targets
            assert batch.targets == sum(map(targets_of, batches))
            assert batch.step_padding == sum(each.num_padding for each in batches)
        if kind == "pad":
            assert 0.5 < np.mean([batch.cost for batch in batches]) < 2.0
        else:
            assert [batch.cost for batch in batches] == [1.0] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_samples_have_every_target_of_every_document_once(store: TokenStore, kind: str) -> None:
    """With documents apart: every token but a document's first, predicted from the one before it. (A stream leaves a
    rest at the end, and without a mask the first token of a document is predicted from the document before.)"""
    samples = cut_of(store, KINDS[kind].get("packing", "stream"), 16, mask=KINDS[kind].get("document_mask", False))
    ids = np.arange(samples.num_samples)
    tokens, documents, *_ = samples.rows(ids, 16)
    assert documents is not None
    counts = counting(documents)
    assert (samples.targets(ids) == counts.sum(axis=1)).all()
    found = Counter(zip(tokens[:, :-1][counts].tolist(), tokens[:, 1:][counts].tolist(), strict=True))
    kept = samples.num_samples * 16 + 1 if kind.startswith("stream") else store.num_tokens
    begins = np.cumsum([0, *store.document_lengths()]).tolist()
    wanted: Counter[tuple[int, int]] = Counter()
    for begin, document in zip(begins, documents_of(store), strict=False):
        wanted.update(pairwise(document[: max(0, kept - begin)]))
    if kind == "pack":
        across = found - wanted
        assert wanted <= found
        assert {before for before, _ in across} == {END}
    else:
        assert found == wanted


def test_packed_rows_hold_whole_documents(store: TokenStore) -> None:
    dataset = dataset_of_kind([store], "pack, masked", False)
    short = {tuple(document) for document in documents_of(store) if 2 <= len(document) <= 17}
    seen = set()
    for step in range(12):
        for worker in range(4):
            batch = dataset.batch(step, worker)
            assert batch.documents is not None
            for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
                assert (np.diff(documents[documents >= 0]) >= 0).all()
                for number in range(documents.max() + 1):
                    seen.add(tuple(tokens[documents == number].tolist()))
    assert short <= seen
    assert 0.0 <= dataset.padding < 0.02


def test_positions_begin_anew_with_every_document() -> None:
    documents = np.array([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1]], dtype=np.int32)
    assert positions(documents).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert counting(documents).tolist() == [
        [True, True, False, False, True, False, False],
        [True, False, True, True, True, True, True],
    ]


def test_threads_may_ask_at_once_and_in_any_order(stores: list[TokenStore]) -> None:
    """More steps than are kept, forth and back."""
    dataset, alone = dataset_of_kind(stores, "pad", True), dataset_of_kind(stores, "pad", True)
    asked = [(step, worker) for step in [*range(12), *reversed(range(12))] for worker in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda key: dataset.batch(*key), asked))
    for key, batch in zip(asked, found, strict=True):
        expected = alone.batch(*key)
        assert (batch.tokens == expected.tokens).all()
        assert (batch.digest, batch.targets, batch.widths) == (expected.digest, expected.targets, expected.widths)


def test_a_mix_takes_its_samples_from_the_sources_they_are_of(stores: list[TokenStore]) -> None:
    dataset = dataset_of_kind(stores, "pad", True)
    upper = 0
    for step in range(10):
        for worker in range(4):
            batch = dataset.batch(step, worker)
            is_second = batch.ids >= dataset.sizes[0]
            assert ((batch.tokens[:, 0] < 97) == is_second).all()
            upper += int(is_second.sum())
    assert upper == 240 // 4
    assert dataset.digest not in {store.digest for store in stores}


def test_what_has_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 5)
    bare = prepare(source=str(path), tokenizer="bytes", cache=str(tmp_path / "cache"))
    for packing in ("pack", "pad"):
        with pytest.raises(DataError, match=r"empty\.jsonl has no document of at least two tokens"):
            Dataset([bare], dataclasses.replace(PLAN, packing=packing))  # type: ignore[arg-type]


def test_a_step_without_a_target_is_still_a_step(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 60)
    bare = prepare(source=str(path), tokenizer="bytes", cache=str(tmp_path / "cache"))
    batch = Dataset([bare], dataclasses.replace(PLAN, document_mask=True)).batch(0, 1)
    assert (batch.targets, batch.num_targets, batch.num_padding, batch.step_padding) == (0, 0, 96, 384)


# --- the run directory proves it -----------------------------------------------------------------------------------


def record(dataset: Dataset, directory: Path, steps: int) -> Path:
    lines = []
    for step in range(steps):
        lines.append({"step": step, "samples": step_hash([dataset.batch(step, worker).digest for worker in range(4)])})
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_audit_needs_the_run_directory_only(
    stores: list[TokenStore], tmp_path: Path, kind: str, mixed: bool
) -> None:
    dataset = dataset_of_kind(stores, kind, mixed)
    described = json.loads(json.dumps(dataset.describe(tmp_path)))
    path = record(dataset, tmp_path, 30)
    report = audit(path, **described)
    assert report.ok, report.problems
    assert report.samples == 30 * 24
    assert report.data_digest == data_digest([{"step": step} for step in range(30)], dataset)
    assert (tmp_path / LENGTHS_NAME).exists() == (kind == "pad")


def test_an_audit_refuses_other_lengths(store: TokenStore, tmp_path: Path) -> None:
    dataset = dataset_of_kind([store], "pad", False)
    described = dataset.describe(tmp_path)
    path = record(dataset, tmp_path, 5)
    assert audit(path, **described).ok
    other = {**described, "composition": {**described["composition"], "micro_batch": 3}}
    assert not audit(path, **other).ok
    plain = {key: value for key, value in described.items() if key != "composition"}
    assert not audit(path, **plain).ok
    lengths = tmp_path / LENGTHS_NAME
    data = bytearray(lengths.read_bytes())
    data[0] ^= 1
    lengths.write_bytes(data)
    with pytest.raises(DataError, match="was altered"):
        audit(path, **described)
    lengths.unlink()
    with pytest.raises(DataError, match="belongs to the run directory"):
        audit(path, **described)


def test_the_files_of_a_mix_have_a_place_of_their_own_in_a_mirror(tmp_path: Path) -> None:
    """Both are called train.txt; and one that is there already need not be made again to have the other."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text(f"text of {name} " * 50)
    for number, name in enumerate(("a", "b")):
        below = tmp_path / "mirror" / f"{number:04d}"
        below.mkdir(parents=True)
        (below / "train.txt").write_text(f"text of {name} " * 50)
    text = JOB_OF_TWO.format(home=tmp_path)
    job = Job.loads(text)
    whole = prepare_stores(job)
    (tmp_path / "b" / "train.txt").unlink()
    elsewhere = Job.loads(text, overrides=[f"data.cache={tmp_path}/other"])
    assert [store.digest for store in prepare_stores(elsewhere)] == [store.digest for store in whole]
    (tmp_path / "a" / "train.txt").unlink()
    (tmp_path / "mirror" / "0000" / "train.txt").unlink()
    third = Job.loads(text, overrides=[f"data.cache={tmp_path}/third"])
    places = [whole[0].directory, tmp_path / "nowhere" / whole[1].directory.name]
    opened = open_stores(third, [(place, store.digest, ()) for place, store in zip(places, whole, strict=True)])
    assert [store.digest for store in opened] == [store.digest for store in whole]


JOB_OF_TWO = """
name: two
model: {{hf: {{model_type: llama}}}}
data:
  mix: [{{source: {home}/a/train.txt, weight: 1}}, {{source: {home}/b/train.txt, weight: 1}}]
  mirrors: [{home}/mirror]
  cache: {home}/cache
  sequence_length: 16
train: {{steps: 5, global_batch: 8}}
"""
