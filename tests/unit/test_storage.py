"""Storages: what is asked of them, whatever they are."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.names import Save
from orchestrator.storage import (
    LocalStorage,
    ObjectStorage,
    Patient,
    Storage,
    StorageError,
    is_transient,
    open_storage,
    why_not,
)
from tests.unit.checkpoints_in_tests import RUN, SECRET, load, same, tensors, write


@pytest.fixture(params=["directory", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "directory":
        return open_storage(str(tmp_path / "there"))
    return open_storage(f"memory://{uuid.uuid4().hex}/there")


def test_files_are_written_once_and_read_in_ranges(storage: Storage) -> None:
    storage.put("a/b", lambda: [b"0123", memoryview(b"456"), b"", b"789"])
    assert storage.read("a/b") == b"0123456789"
    assert storage.size("a/b") == 10
    buffer = bytearray(4)
    storage.read_into("a/b", 3, memoryview(buffer))
    assert bytes(buffer) == b"3456"
    with pytest.raises(EOFError):
        storage.read_into("a/b", 8, memoryview(buffer))
    with pytest.raises(FileExistsError):
        storage.put("a/b", lambda: [b"other"])
    assert storage.read("a/b") == b"0123456789"


def test_names_are_those_directly_below(storage: Storage) -> None:
    assert storage.names("") == []
    for path in ("x/one", "x/two", "y/deep/three"):
        storage.put(path, lambda: [b"1"])
    assert storage.names("") == ["x", "y"]
    assert storage.names("x") == ["one", "two"]
    assert storage.names("y") == ["deep"]
    assert storage.names("nowhere") == []


def test_what_is_removed_is_gone_and_may_be_removed_again(storage: Storage) -> None:
    storage.put("x/one", lambda: [b"1"])
    storage.put("x/two", lambda: [b"2"])
    storage.remove("x/one")
    storage.remove("x/one")
    storage.remove_directory("x")
    assert storage.names("x") == ["two"], "what is not empty stays"
    with pytest.raises(FileNotFoundError):
        storage.read("x/one")
    with pytest.raises(FileNotFoundError):
        storage.size("x/one")


def test_what_fails_while_it_is_written_leaves_nothing(storage: Storage) -> None:
    def torn() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("the other half")

    with pytest.raises((KeyError, StorageError)):
        storage.put("x/one", torn)
    assert storage.names("x") == []
    storage.put("x/one", lambda: [b"whole"])
    assert storage.read("x/one") == b"whole"


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_checkpoints_are_the_same_anywhere(storage: Storage, secret: Any) -> None:
    catalog = Catalog(storage, RUN, secret)
    for step in (10, 20, 30):
        write(catalog, step, tensors(step))
    catalog.set_aside(30, "spoiled")
    catalog.prune(30, keep=1, keep_every=None)
    assert catalog.steps() == [20]
    assert same(load(catalog.open(20)), tensors(20))
    write(catalog, 30, tensors(3), save=Save(30, 2, 0))
    assert same(load(catalog.open(30)), tensors(3))


# ---------------------------------------------------------------------------------------- object stores that fail


class SlowDown(Exception):
    """What a client library raises when it is told to come again later."""

    response = {"ResponseMetadata": {"HTTPStatusCode": 503}}  # noqa: RUF012


class Forbidden(Exception):
    response = {"ResponseMetadata": {"HTTPStatusCode": 403}}  # noqa: RUF012


class Busy(MemoryFileSystem):
    """Every operation fails a number of times first."""

    protocol = "busy"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    failures: list[Exception] = []  # noqa: RUF012

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop()

    def _open(self, *args: Any, **kwargs: Any) -> Any:
        self._fail()
        return super()._open(*args, **kwargs)

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        self._fail()
        return super().cat_file(*args, **kwargs)

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        self._fail()
        return super().ls(*args, **kwargs)


@pytest.fixture
def busy() -> Iterator[Patient]:
    fsspec.register_implementation("busy", Busy, clobber=True)
    filesystem = fsspec.filesystem("busy")
    Busy.failures.clear()
    yield Patient(ObjectStorage(filesystem, f"/{uuid.uuid4().hex}", "busy://place"), tries=3, pause_s=0.001)
    Busy.failures.clear()


def test_a_store_that_is_busy_is_asked_again(busy: Patient) -> None:
    Busy.failures += [SlowDown(), TimeoutError("no answer")]
    busy.put("x", lambda: [b"1"])
    Busy.failures += [SlowDown(), ConnectionResetError("reset")]
    assert busy.read("x") == b"1"
    Busy.failures += [SlowDown(), SlowDown()]
    assert busy.names("") == ["x"]


def test_a_store_that_stays_busy_fails_with_its_own_words(busy: Patient) -> None:
    Busy.failures += [SlowDown("come again later")] * 3
    with pytest.raises(StorageError, match=r"busy://.*/x: SlowDown: come again later"):
        busy.put("x", lambda: [b"1"])
    assert not Busy.failures
    assert busy.names("") == []


def test_a_store_that_refuses_is_not_asked_again(busy: Patient) -> None:
    Busy.failures += [Forbidden("no"), Forbidden("no")]
    with pytest.raises(StorageError, match="Forbidden"):
        busy.put("x", lambda: [b"1"])
    assert len(Busy.failures) == 1
    assert not is_transient(StorageError("x"))


# ---------------------------------------------------------------------------------------- names


def test_paths_and_urls() -> None:
    inner = open_storage("file:///tmp/x")
    assert isinstance(inner, Patient)
    assert isinstance(inner.inner, LocalStorage)
    assert inner.locate("a") == "/tmp/x/a"
    assert open_storage("memory://bucket/x").locate("a/b") == "memory://bucket/x/a/b"


def test_what_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("/some/where") is None
    assert why_not("memory://bucket") is None
    assert "names no bucket" in str(why_not("s3://"))
    assert "no storage that fsspec knows" in str(why_not("s4://bucket"))
    with pytest.raises(ValueError, match="no storage that fsspec knows"):
        open_storage("s4://bucket")

    def missing(protocol: str) -> Any:
        raise ImportError(f"Install {protocol}fs to access {protocol.upper()}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    assert "Install s3fs" in str(why_not("s3://bucket"))


@pytest.mark.parametrize("made_by", ["somebody before", "this rank", "another rank"])
def test_a_directory_that_was_there_and_is_gone_is_not_made_again(tmp_path: Path, made_by: str) -> None:
    """It was deleted, or unmounted: what is written in its place is lost, or fills another disk."""
    root = tmp_path / "not yet" / "there"
    if made_by == "somebody before":
        root.mkdir(parents=True)
    storage = LocalStorage(root)
    if made_by == "another rank":
        LocalStorage(root).put("x/other", lambda: [b"1"])
    storage.put("x/one", lambda: [b"1"])
    shutil.rmtree(tmp_path / "not yet")
    with pytest.raises(StorageError, match="was there and is gone: deleted, moved or no longer mounted") as failure:
        storage.put("x/two", lambda: [b"2"])
    assert is_transient(failure.value), "it may be mounted again"
    assert list(tmp_path.iterdir()) == []
    root.mkdir(parents=True)
    storage.put("x/two", lambda: [b"2"])
    assert storage.names("x") == ["two"]
