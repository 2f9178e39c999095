"""A checkpoint is what was saved, whole, or it is refused; whenever the machine stops, and whatever happens to it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from monitoring.records import read_records
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.encryption import KeyProblem, Secret, find_key, read_key
from orchestrator.checkpoint.manifest import CheckpointError, Manifest, UnusableCheckpoint
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.of_run import catalog_of, catch_up, fork
from orchestrator.checkpoint.parts import write_part
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.storage import LocalStorage, Patient
from tests.selection import nightly
from tests.unit.checkpoints_in_tests import (
    RUN,
    SECRET,
    Failing,
    Fragile,
    PowerCut,
    catalog_in,
    chunks_of,
    describe,
    load,
    same,
    tensors,
    write,
)

STEP = "step-00000120"


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, secret: Secret | None, ranks: int) -> None:
    catalog = catalog_in(tmp_path / "deep" / "er", secret)
    num_bytes = write(catalog, 120, tensors(), ranks)
    checkpoint = catalog.open(120)
    assert same(load(checkpoint), tensors())
    checkpoint.verify()
    files = sorted(path.name for path in (tmp_path / "deep" / "er" / STEP).iterdir())
    assert files == ["COMMIT", "MANIFEST.json", *(f"part-e1-g0-a0-r{rank:05d}.safetensors" for rank in range(ranks))]
    assert num_bytes == sum((tmp_path / "deep" / "er" / STEP / name).stat().st_size for name in files[2:])
    assert (checkpoint.manifest.run, checkpoint.manifest.job, checkpoint.manifest.updates) == (RUN, "sha256:0", 120)
    assert catalog.steps() == [120]


def test_its_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    write(catalog_in(tmp_path), 120, tensors(), 2)
    found: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / STEP).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert torch.equal(
        torch.cat([found["model.weight[0:4,0:5]"], found["model.weight[4:7,0:5]"]]), tensors()["model.weight"]
    )
    assert found["model.count[]"].item() == 12


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    write(catalog_in(tmp_path), 120, tensors())
    for path in (tmp_path / STEP).iterdir():
        if path.suffix != ".safetensors":
            json.loads(path.read_bytes())


# ---------------------------------------------------------------------------------------- power cuts


def test_wherever_the_machine_stops_there_is_a_valid_checkpoint_and_the_next_one_succeeds(tmp_path: Path) -> None:
    """Step 10 is saved, then step 20 is, with a stop before every single operation; then step 20 is saved again."""
    stopped = 0
    for stop_at in range(10_000):
        directory = tmp_path / str(stop_at)
        write(catalog_in(directory), 10, tensors(1))
        storage = Fragile(directory, stop_at)
        catalog = catalog_in(directory, storage=storage)
        try:
            write(catalog, 20, tensors(2))
            catalog.prune(20, keep=1, keep_every=None)
        except PowerCut:
            stopped += 1
        else:
            break
        after = catalog_in(directory)
        steps = after.steps()
        assert steps, f"stopped before operation {stop_at}: no checkpoint is left"
        for step in steps:
            assert same(load(after.open(step)), tensors(step // 10)), f"stopped before operation {stop_at}"
        write(after, 20, tensors(2), save=Save(20, 2, 5))
        assert same(load(after.open(20)), tensors(2))
        after.prune(20, keep=1, keep_every=None)
        assert sorted(path.name for path in directory.iterdir()) == ["step-00000020"]
        assert not [
            path
            for path in (directory / "step-00000020").iterdir()
            if path.suffix == ".json" and path.name != "MANIFEST.json"
        ]
        shutil.rmtree(directory)
    assert stopped > 40, "every write, sync and removal counts"


def test_a_stop_while_a_damaged_one_is_replaced_never_makes_it_look_valid(tmp_path: Path) -> None:
    stopped = 0
    for stop_at in range(10_000):
        directory = tmp_path / str(stop_at)
        write(catalog_in(directory), 20, tensors(7), save=Save(20, 1, 1))
        catalog_in(directory).set_aside(20, "spoiled by a test")
        catalog = catalog_in(directory, storage=Fragile(directory, stop_at))
        try:
            write(catalog, 20, tensors(2), save=Save(20, 1, 2))
        except PowerCut:
            stopped += 1
        else:
            assert same(load(catalog_in(directory).open(20)), tensors(2))
            break
        after = catalog_in(directory)
        for step in after.steps():
            assert same(load(after.open(step)), tensors(2)), f"stopped before operation {stop_at}"
    assert stopped > 20


# ---------------------------------------------------------------------------------------- damage


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at // 8] ^= 1 << at % 8
    path.write_bytes(raw)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.stat().st_size)


def _flip_a_bit(directory: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(directory))
    _flip(path, chance.randrange(8 * path.stat().st_size))


def _zero_a_page(directory: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(directory))
    raw = bytearray(path.read_bytes())
    start = chance.randrange(len(raw))
    stop = min(len(raw), start + chance.choice([16, 64, 512, 4096]))
    raw[start:stop] = bytes(stop - start)
    path.write_bytes(raw)


def _cut(directory: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(directory))
    os.truncate(path, chance.randrange(path.stat().st_size))


def _lengthen(directory: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(directory))
    path.write_bytes(path.read_bytes() + bytes(chance.randrange(1, 100)))


def _lose_a_file(directory: Path, other: Path, chance: random.Random) -> None:
    chance.choice(_files(directory)).unlink()


def _swap_files(directory: Path, other: Path, chance: random.Random) -> None:
    first, second = chance.sample(sorted(directory.glob("*.safetensors")), 2)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def _take_a_file_of_another_step(directory: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(directory))
    path.write_bytes((other / path.name).read_bytes())


def _take_a_chunk_of_another_step(directory: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(sorted(directory.glob("*.safetensors")))
    there, here = (other / path.name).read_bytes(), bytearray(path.read_bytes())
    manifest = json.loads((directory / "MANIFEST.json").read_bytes())
    chunk = chance.choice([chunk for chunk in manifest["chunks"] if chunk["file"] == path.name])
    here[chunk["start"] : chunk["stop"]] = there[chunk["start"] : chunk["stop"]]
    path.write_bytes(here)


def _edit_the_manifest(directory: Path, other: Path, chance: random.Random) -> None:
    path = directory / "MANIFEST.json"
    manifest = json.loads(path.read_bytes())
    chunk = chance.choice(manifest["chunks"])
    match chance.randrange(6):
        case 0:
            manifest["chunks"].remove(chunk)
        case 1:
            chunk["xxh3_128"] = f"{chance.getrandbits(128):032x}"
        case 2:
            chunk["start"], chunk["stop"] = chunk["start"] + 4, chunk["stop"] + 4
        case 3:
            chunk["tensor"] = chance.choice(sorted(manifest["tensors"]))
        case 4:
            manifest["committed"] += 1
        case 5:
            manifest["updates"] += 1
    path.write_text(json.dumps(manifest, sort_keys=True, separators=(",", ":")))


DAMAGE: list[Callable[[Path, Path, random.Random], None]] = [
    _flip_a_bit, _flip_a_bit, _flip_a_bit, _zero_a_page, _cut, _lengthen, _lose_a_file, _swap_files,
    _take_a_file_of_another_step, _take_a_chunk_of_another_step, _edit_the_manifest,
]  # fmt: skip


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
@pytest.mark.parametrize("corruptions", [200, *nightly([1000])])
def test_no_damage_is_ever_loaded(tmp_path: Path, secret: Secret | None, corruptions: int) -> None:
    """Seeded corruptions of each kind of checkpoint: found, or without any effect on what is loaded."""
    write(catalog_in(tmp_path / "kept", secret), 120, tensors(1), 3)
    write(catalog_in(tmp_path / "kept", secret), 130, tensors(2), 3)
    found = harmless = 0
    for seed in range(corruptions):
        chance = random.Random(seed)
        shutil.rmtree(tmp_path / "now", ignore_errors=True)
        shutil.copytree(tmp_path / "kept", tmp_path / "now")
        directory = tmp_path / "now" / STEP
        chance.choice(DAMAGE)(directory, tmp_path / "now" / "step-00000130", chance)
        catalog = catalog_in(tmp_path / "now", secret)
        try:
            assert same(load(catalog.open(120)), tensors(1)), f"seed {seed}: other values were loaded"
        except CheckpointError:
            found += 1
        else:
            # A file's own header is for other tools: we go by the manifest. A whole verification finds that too.
            harmless += 1
            if sorted(p.read_bytes() for p in directory.iterdir()) != sorted(
                p.read_bytes() for p in (tmp_path / "kept" / STEP).iterdir()
            ):
                with pytest.raises(CheckpointError):
                    catalog.open(120).verify()
    print(f"{found} of {corruptions} found, {harmless} without effect on what is loaded, 0 loaded")
    assert found + harmless == corruptions
    assert found > 0.7 * corruptions


def test_an_edit_that_fits_its_digest_is_not_a_manifest_of_this_format(tmp_path: Path) -> None:
    """Somebody who mends the digests too cannot leave elements out or have them twice."""
    write(catalog_in(tmp_path), 120, tensors())
    manifest = json.loads((tmp_path / STEP / "MANIFEST.json").read_bytes())
    for change, message in [
        (
            lambda m: m["chunks"].pop(),
            "of 12 elements|of 9 elements|of 4 elements|of 1 elements|of 3 elements|of 35 elements",
        ),
        (lambda m: m["chunks"].append(m["chunks"][0]), "elements"),
        (lambda m: m["chunks"][0].pop("xxh3_128"), "Field required"),
        (lambda m: m["chunks"][0].update(xxh3_128="0"), "pattern"),
        (lambda m: m.update(format=3), "format 3"),
        (lambda m: m.update(surprise=1), "Extra inputs"),
        (lambda m: m["chunks"][0].update(file="../../etc/passwd"), "not inside a file"),
    ]:
        edited = json.loads(json.dumps(manifest))
        change(edited)
        with pytest.raises(CheckpointError, match=message):
            Manifest.from_bytes(json.dumps(edited).encode(), "MANIFEST.json")


def test_chunks_that_overlap_are_no_whole_tensor() -> None:
    chunk = {"tensor": "w", "dtype": "F32", "file": "part-e1-g0-a0-r00000.safetensors", "xxh3_128": "0" * 32}
    manifest = {
        "format": 2, "run": "r", "job": "j", "committed": 1, "updates": 1, "epoch": 1, "generation": 0, "attempt": 0,
        "layout": {}, "data": {}, "randomness": {}, "schedule": {}, "tensors": {"w": {"dtype": "F32", "shape": [4, 2]}},
        "files": [{"name": "part-e1-g0-a0-r00000.safetensors",
                   "size": 100, "header_bytes": 8, "header_xxh3_128": "0" * 32}],
        "chunks": [
            chunk | {"offsets": [0, 0], "sizes": [2, 2], "start": 8, "stop": 24},
            chunk | {"offsets": [1, 0], "sizes": [2, 2], "start": 24, "stop": 40},
        ],
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"w\[0:2,0:2\] and w\[1:3,0:2\] overlap"):
        Manifest.from_bytes(json.dumps(manifest).encode(), "MANIFEST.json")


# ---------------------------------------------------------------------------------------- attempts


def test_parts_that_are_not_all_there_make_no_checkpoint(tmp_path: Path) -> None:
    catalog, save = catalog_in(tmp_path), Save(120, 1, 0)
    _, digest = write_part(catalog.storage, save, 0, 7, chunks_of(tensors(), 0, 2), None)
    with pytest.raises(CheckpointError, match="rank 1 said that it wrote"):
        catalog.commit(save, {0: digest, 1: digest}, describe(tensors()))
    with pytest.raises(CheckpointError, match="not the whole state"):
        catalog.commit(save, {0: digest}, describe(tensors()))
    with pytest.raises(CheckpointError, match="not what rank 0 wrote"):
        catalog.commit(save, {0: "0" * 32}, describe(tensors()))
    _, other = write_part(catalog.storage, save, 1, 8, chunks_of(tensors(), 1, 2), None)
    with pytest.raises(CheckpointError, match=r"different numbers of updates: \[7, 8\]"):
        catalog.commit(save, {0: digest, 1: other}, describe(tensors()))
    assert catalog.steps() == []
    catalog.discard(save)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path)
    write(catalog, 120, tensors(1))
    before = {path.name: path.read_bytes() for path in (tmp_path / STEP).iterdir()}
    write(catalog, 120, tensors(2), save=Save(120, 1, 9))
    assert {path.name: path.read_bytes() for path in (tmp_path / STEP).iterdir()} == before
    with pytest.raises(FileExistsError):
        write_part(catalog.storage, Save(120, 1, 0), 0, 120, chunks_of(tensors(2), 0, 2), None)


def test_to_complete_it_twice_changes_nothing(tmp_path: Path) -> None:
    catalog, save = catalog_in(tmp_path), Save(120, 1, 0)
    parts = {
        rank: write_part(catalog.storage, save, rank, 1, chunks_of(tensors(), rank, 2), None)[1] for rank in (0, 1)
    }
    first = catalog.commit(save, parts, describe(tensors()))
    before = (tmp_path / STEP / "COMMIT").read_bytes()
    assert catalog.commit(save, parts, describe(tensors())) == first
    assert (tmp_path / STEP / "COMMIT").read_bytes() == before


def test_what_an_earlier_attempt_left_goes(tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path)
    write_part(catalog.storage, Save(120, 1, 0), 0, 1, chunks_of(tensors(3), 0, 2), None)
    write(catalog, 120, tensors(1), save=Save(120, 1, 1))
    assert not list((tmp_path / STEP).glob("part-e1-g0-*"))
    assert same(load(catalog.open(120)), tensors(1))


def test_one_that_was_set_aside_is_not_used_again_until_it_is_replaced(tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path)
    write(catalog, 110, tensors(1))
    write(catalog, 120, tensors(2))
    catalog.set_aside(120, "digest differs")
    catalog.set_aside(120, "said twice")
    assert catalog.steps() == [110]
    with pytest.raises(CheckpointError, match="set aside: digest differs"):
        catalog.open(120)
    write(catalog, 120, tensors(3), save=Save(120, 1, 4))
    assert catalog.steps() == [120, 110]
    assert same(load(catalog.open(120)), tensors(3))


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path)
    for committed in range(10, 100, 10):
        write(catalog, committed, tensors())
        catalog.prune(committed, keep=2, keep_every=40)
    assert catalog.steps() == [90, 80, 40]
    write_part(catalog.storage, Save(85, 1, 0), 0, 1, chunks_of(tensors(), 0, 2), None)
    write_part(catalog.storage, Save(200, 1, 0), 0, 1, chunks_of(tensors(), 0, 2), None)
    assert catalog.prune(90, keep=2, keep_every=40) == [85], "what is ahead may be under way"


def test_what_was_just_saved_stays_even_among_newer_ones(tmp_path: Path) -> None:
    """A run that was rolled back saves older steps than the storage holds."""
    catalog = catalog_in(tmp_path)
    for committed in (10, 20, 5):
        write(catalog, committed, tensors())
    catalog.prune(5, keep=1, keep_every=None)
    assert catalog.steps() == [20, 10, 5]


def test_only_checkpoints_are_found(tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path)
    write(catalog, 7, tensors())
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert catalog.steps() == [7]
    assert catalog_in(tmp_path / "nowhere").steps() == []
    with pytest.raises(CheckpointError, match="not there"):
        catalog.open(8)


def test_another_runs_checkpoint_is_refused_and_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    write(catalog_in(tmp_path), 120, tensors())
    with pytest.raises(UnusableCheckpoint, match="of the run a-run, not of another"):
        Catalog(LocalStorage(tmp_path), "another").open(120)


# ---------------------------------------------------------------------------------------- storages that fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_nothing_and_says_why(tmp_path: Path, code: int) -> None:
    storage = Failing(tmp_path, code)
    with pytest.raises(OSError, match=os.strerror(code)):
        storage.put("a/b", lambda: [b"12345678"])
    assert storage.names("a") == []
    storage.put("a/b", lambda: [b"12345678"])
    assert storage.read("a/b") == b"12345678"


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(tmp_path: Path) -> None:
    inner = Failing(tmp_path, errno.EIO, failures=2)
    Patient(inner, tries=3, pause_s=0.001).put("x", lambda: [b"abc"])
    assert inner.read("x") == b"abc"
    inner.failures = 3
    with pytest.raises(OSError, match="Input/output error"):
        Patient(inner, tries=3, pause_s=0.001).put("y", lambda: [b"abc"])
    inner.code, inner.failures = errno.ENOSPC, 2
    with pytest.raises(OSError, match="No space"):
        Patient(inner, tries=3, pause_s=0.001).put("y", lambda: [b"abc"])
    assert inner.failures == 1, "a full disk is full the next moment too"


# ---------------------------------------------------------------------------------------- encryption


def test_encrypted_files_show_nothing(tmp_path: Path) -> None:
    values = {"model.text": torch.frombuffer(bytearray(b"attack at dawn! " * 64), dtype=torch.uint8)}
    write(catalog_in(tmp_path / "plain"), 1, values)
    write(catalog_in(tmp_path / "secret", SECRET), 1, values)

    def everything(name: str) -> bytes:
        return b"".join(path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file())

    assert b"attack at dawn" in everything("plain")
    assert b"attack at dawn" not in everything("secret")
    assert SECRET.key not in everything("secret")
    assert SECRET.key.hex().encode() not in everything("secret")


def test_every_chunk_has_its_own_nonce(tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path, SECRET)
    write(catalog, 1, tensors(), 9)
    checkpoint = catalog.open(1, keyless=True)
    nonces = []
    for chunk in checkpoint.manifest.chunks:
        raw = (tmp_path / "step-00000001" / chunk.file).read_bytes()
        nonces.append(raw[chunk.start : chunk.start + 12])
    assert len(set(nonces)) == len(nonces) > 10


def test_without_the_key_or_with_another_one_it_is_refused_and_not_taken_for_damaged(tmp_path: Path) -> None:
    write(catalog_in(tmp_path, SECRET), 120, tensors())
    with pytest.raises(UnusableCheckpoint, match="no key"):
        catalog_in(tmp_path).open(120)
    with pytest.raises(UnusableCheckpoint, match="another key"):
        catalog_in(tmp_path, Secret(bytes(32))).open(120)
    catalog_in(tmp_path).open(120, keyless=True).verify()
    write(catalog_in(tmp_path / "plain"), 120, tensors())
    with pytest.raises(UnusableCheckpoint, match="not encrypted, but the job says"):
        catalog_in(tmp_path / "plain", SECRET).open(120)


def test_who_mends_all_digests_but_has_no_key_is_found_out(tmp_path: Path) -> None:
    """Ciphertext moved from step to step, with manifest and marker made to fit it."""
    catalog = catalog_in(tmp_path, SECRET)
    write(catalog, 120, tensors(1), 1)
    write(catalog, 130, tensors(2), 1)
    ours, theirs = tmp_path / STEP, tmp_path / "step-00000130"
    part = "part-e1-g0-a0-r00000.safetensors"
    shutil.copyfile(theirs / part, ours / part)
    other = Manifest.from_bytes((theirs / "MANIFEST.json").read_bytes(), "")
    edited = other.model_copy(update={"committed": 120}).to_bytes()
    (ours / "MANIFEST.json").write_bytes(edited)
    from orchestrator.checkpoint.manifest import Commit, digest_of

    for seal_from in (ours, theirs):
        seal = json.loads((seal_from / "COMMIT").read_bytes())["seal"]
        marker = Commit(
            committed=120, at=0.0, manifest_bytes=len(edited), manifest_xxh3_128=digest_of(edited), seal=seal
        )
        (tmp_path / "COMMIT").write_bytes(marker.to_bytes())
        shutil.copyfile(tmp_path / "COMMIT", ours / "COMMIT")
        with pytest.raises(CheckpointError, match=r"another key|altered since"):
            catalog.open(120)


def test_a_key_is_read_from_where_the_job_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", SECRET.key.hex())
    assert find_key("${env:A_KEY}", None) == SECRET
    (tmp_path / "key").write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
    assert find_key(None, str(tmp_path / "key")) == SECRET
    with pytest.raises(KeyProblem, match="NOT_THERE is not set"):
        find_key("${env:NOT_THERE}", None)
    with pytest.raises(KeyProblem, match="cannot be read"):
        find_key(None, str(tmp_path / "nothing"))


def test_a_bad_key_is_not_repeated() -> None:
    for text in ("secret-passphrase", "00" * 31, "zz" * 32):
        with pytest.raises(KeyProblem) as caught:
            read_key(text, "the file")
        assert text not in str(caught.value)
    assert "00" not in repr(Secret(bytes(32)))
    assert "00" not in f"{Secret(bytes(32))}"


# ---------------------------------------------------------------------------------------- forks


def test_a_fork_begins_with_anothers_checkpoint_and_never_touches_it(tmp_path: Path) -> None:
    parent = catalog_in(tmp_path / "parent")
    write(parent, 120, tensors(1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "parent" / STEP).iterdir()}
    fork = Catalog(LocalStorage(tmp_path / "fork"), "the fork", origin=(120, parent))
    assert fork.steps() == [120]
    assert fork.holder_of(120) is parent
    assert fork.locate(120) == parent.locate(120)
    assert same(load(fork.open(120)), tensors(1))
    fork.set_aside(120, "found damaged by the fork")
    write(fork, 130, tensors(2))
    fork.prune(130, keep=1, keep_every=None)
    assert fork.steps() == [130, 120]
    assert {path.name: path.read_bytes() for path in (tmp_path / "parent" / STEP).iterdir()} == before
    write(fork, 120, tensors(3))
    assert fork.holder_of(120) is fork, "rolled back, it makes one of its own"
    assert same(load(fork.open(120)), tensors(3))


def step_record(step: int) -> dict[str, Any]:
    return {"step": step, "generation": 0, "loss": None if step == 46 else 2.0, "grad_norm": 1.0, "lr": 0.1,
            "tokens": 100, "samples": f"hash of {step}", "skipped": False, "committed_at": 5.0, "seconds": 0.5,
            "phase_seconds": {}, "ranks": []}  # fmt: skip


@pytest.mark.parametrize(("recorded", "known", "caught_up"), [
    (47, range(40, 48), 1), (44, range(40, 48), 4), (48, range(40, 48), 0), (39, range(40, 48), 0), (47, [], 0),
])  # fmt: skip
def test_the_record_catches_up_with_a_checkpoint_that_is_newer(
    tmp_path: Path, recorded: int, known: Iterable[int], caught_up: int
) -> None:
    """What a controller had no time, or no room, to write down, the checkpoint knows; without all of it, it is left."""
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {"name": "x"})
    directory.metrics.write_text("".join(json.dumps(step_record(step)) + "\n" for step in range(recorded)))
    catalog = Catalog(LocalStorage(tmp_path / "checkpoints"), RUN)
    write(catalog, 36, tensors())
    save, parts = Save(48, 1, 0), {}
    for rank in range(2):
        _, parts[rank] = write_part(catalog.storage, save, rank, 48, chunks_of(tensors(), rank, 2), None)
    catalog.commit(save, parts, replace(describe(tensors()), steps=[step_record(step) for step in known]))
    assert catch_up(directory, catalog) == caught_up
    records = list(read_records(directory.metrics))
    assert records == [step_record(step) for step in range(recorded + caught_up)]
    assert catch_up(directory, catalog) == 0


def test_the_record_does_not_catch_up_with_a_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {"name": "x"})
    directory.metrics.write_text(json.dumps(step_record(0)) + "\n")
    catalog = Catalog(LocalStorage(tmp_path / "checkpoints"), RUN)
    save = Save(2, 1, 0)
    _, part = write_part(catalog.storage, save, 0, 2, chunks_of(tensors(), 0, 1), None)
    catalog.commit(save, {0: part}, replace(describe(tensors()), steps=[step_record(1)]))
    manifest = tmp_path / "checkpoints" / "step-00000002" / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"hash of 1", b"hash of 7"))
    assert catch_up(directory, catalog) == 0


@pytest.mark.parametrize(("recorded", "known"), [(6, []), (3, range(2, 6)), (3, range(4, 6))])
def test_a_fork_of_a_checkpoint_that_is_newer_than_the_record_has_all_its_steps(
    tmp_path: Path, recorded: int, known: Iterable[int]
) -> None:
    job = Job.load(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
    parent, target = RunDirectory(tmp_path / "parent"), RunDirectory(tmp_path / "fork")
    parent.create("", job.resolved())
    parent.metrics.write_text("".join(json.dumps(step_record(step)) + "\n" for step in range(recorded)))
    catalog = catalog_of(parent, job)
    save = Save(6, 1, 0)
    _, part = write_part(catalog.storage, save, 0, 6, chunks_of(tensors(), 0, 1), None)
    catalog.commit(save, {0: part}, replace(describe(tensors()), steps=[step_record(step) for step in known]))
    if recorded + len(list(known)) < 6:
        with pytest.raises(RunDirectoryError, match="of the 6 steps of its checkpoint, 3 are on record"):
            fork(parent, target, job, None)
        assert not target.path.exists()
        return
    assert fork(parent, target, job, None) == 6
    assert list(read_records(target.metrics)) == [step_record(step) for step in range(6)]
    assert len(list(read_records(parent.metrics))) == recorded, "which is not touched"


def test_a_fork_may_begin_with_an_older_checkpoint(tmp_path: Path) -> None:
    job = Job.load(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
    parent, target = RunDirectory(tmp_path / "parent"), RunDirectory(tmp_path / "fork")
    parent.create("", job.resolved())
    parent.metrics.write_text("".join(json.dumps(step_record(step)) + "\n" for step in range(6)))
    catalog = catalog_of(parent, job)
    for step in (2, 4, 6):
        write(catalog, step, tensors(step))
    with pytest.raises(RunDirectoryError, match=r"has no checkpoint of 3 steps to fork from \(there: 6, 4, 2\)"):
        fork(parent, target, job, None, 3)
    assert not target.path.exists()
    assert fork(parent, target, job, None, 4) == 4
    assert list(read_records(target.metrics)) == [step_record(step) for step in range(4)]
    assert target.forked_at == 4
    assert same(load(catalog_of(target, job).open(4)), tensors(4))


@pytest.mark.parametrize(("known", "committed"), [(range(3, 10), 10), ((), 3)])
def test_steps_behind_a_damaged_line_come_from_a_checkpoint_or_are_made_again(
    tmp_path: Path, known: Iterable[int], committed: int
) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {"name": "x"})
    lines = [json.dumps(step_record(step)) + "\n" for step in range(10)]
    lines[3] = lines[3].replace("seconds", "sec\x00onds")
    directory.metrics.write_text("".join(lines))
    catalog = Catalog(LocalStorage(tmp_path / "checkpoints"), RUN)
    save = Save(10, 1, 0)
    _, part = write_part(catalog.storage, save, 0, 10, chunks_of(tensors(), 0, 1), None)
    catalog.commit(save, {0: part}, replace(describe(tensors()), steps=[step_record(step) for step in known]))
    assert catch_up(directory, catalog) == committed - 3
    assert list(read_records(directory.metrics)) == [step_record(step) for step in range(committed)]
    assert catch_up(directory, catalog) == 0


def test_a_step_of_a_checkpoint_was_not_committed_before_the_one_it_follows(tmp_path: Path) -> None:
    """Its time is a wall clock's; earlier versions had a machine's monotonic one there."""
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {"name": "x"})
    directory.metrics.write_text(json.dumps({**step_record(0), "committed_at": 1000.0}) + "\n")
    catalog = Catalog(LocalStorage(tmp_path / "checkpoints"), RUN)
    save = Save(3, 1, 0)
    _, part = write_part(catalog.storage, save, 0, 3, chunks_of(tensors(), 0, 1), None)
    steps = [{**step_record(1), "committed_at": 7.0}, {**step_record(2), "committed_at": 1001.5}]
    catalog.commit(save, {0: part}, replace(describe(tensors()), steps=steps))
    assert catch_up(directory, catalog) == 2
    assert [record["committed_at"] for record in read_records(directory.metrics)] == [1000.0, 1000.0, 1001.5]
