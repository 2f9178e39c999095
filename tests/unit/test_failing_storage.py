"""Storage that fails, truncates, hangs or holds something else: asked again, then read elsewhere, then named."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem

from orchestrator.data import DataError, TokenStore, build, documents, open_store, prepare, reading
from orchestrator.data import task_split as cutting
from orchestrator.data.locations import Patience
from orchestrator.data.manifest import BrokenStoreError
from orchestrator.data.opening import ByteSpan
from orchestrator.data.reading import Library
from orchestrator.data.sources import SourceFile, resolve_files

T = TypeVar("T")


class Flaky(AbstractFileSystem):  # type: ignore[misc]
    """Files in memory; `fault` may fail, shorten or hold up a read."""

    protocol = "flaky"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    tags: ClassVar[dict[str, dict[str, str]]] = {}
    sizeless: ClassVar[bool] = False
    reads: ClassVar[list[tuple[str, int]]] = []
    fault: ClassVar[Callable[[str, int, bytes], bytes]] = staticmethod(lambda path, start, data: data)
    stuck: ClassVar[threading.Event] = threading.Event()
    released: ClassVar[threading.Event] = threading.Event()

    def _content(self, path: str) -> bytes:
        path = self._strip_protocol(path)
        if path not in Flaky.files:
            raise FileNotFoundError(path)
        return Flaky.files[path]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if any(name.startswith(path + "/") for name in Flaky.files):
            return {"name": path, "size": 0, "type": "directory"}
        size = None if Flaky.sizeless else len(self._content(path))
        return {"name": path, "size": size, "type": "file", **Flaky.tags.get(path, {})}

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        names = [name for name in Flaky.files if name.startswith(self._strip_protocol(path) + "/")]
        return {name: self.info(name) for name in names} if detail else names

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        data = self._content(path)[start:end]
        Flaky.reads.append((self._strip_protocol(path), start or 0))
        return Flaky.fault(self._strip_protocol(path), start or 0, data)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        import io

        return io.BytesIO(self.cat_file(path))

    @classmethod
    def hang(cls) -> None:
        """Holds this read up until the test ends."""
        cls.stuck.set()
        assert cls.released.wait(60)
        raise OSError("released")


fsspec.register_implementation("flaky", Flaky, clobber=True)


@dataclass(frozen=True)
class Quick(Patience):
    """Notes what it would have slept, and gives a read up as soon as it is known to hang."""

    attempts: int = 3
    slept: ClassVar[list[float]] = []

    def sleep(self, seconds: float) -> None:
        Quick.slept.append(seconds)

    def wait(self, answer: Future[T]) -> T:
        while True:
            try:
                return answer.result(0.001)
            except TimeoutError:
                if answer.done():
                    raise
                if Flaky.stuck.is_set():
                    Flaky.stuck.clear()
                    raise


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reading, "RANGE_BYTES", 100)
    Flaky.files, Flaky.tags, Flaky.reads, Flaky.sizeless = {}, {}, [], False
    Flaky.fault = staticmethod(lambda path, start, data: data)
    Flaky.stuck.clear()
    Flaky.released.clear()
    Quick.slept.clear()
    yield
    Flaky.released.set()


LINES = [f"line {number} " + "abcé" * (number % 7) for number in range(60)]
CONTENT = "\n".join(LINES).encode()


def _read(*mirrors: str, name: str = "flaky://a/big.txt", **options: Any) -> list[str]:
    (file,) = resolve_files(name)
    return list(documents(file, document="line", library=Library(mirrors, Quick()), **options))


def _fail(times: int, *, where: str = "a/", at: int = 200, with_: Exception | None = None) -> None:
    """The range at `at` below `where` fails a number of times first."""
    left = [times]

    def fault(path: str, start: int, data: bytes) -> bytes:
        if path.startswith(where) and start == at and left[0]:
            left[0] -= 1
            raise with_ or RuntimeError("the storage is on fire")
        return data

    Flaky.fault = staticmethod(fault)


def test_a_range_that_fails_is_asked_for_again_after_growing_pauses() -> None:
    Flaky.files["a/big.txt"] = CONTENT
    _fail(2)
    assert _read() == LINES
    assert Flaky.reads.count(("a/big.txt", 200)) == 3
    first, second = Quick.slept
    assert 0.125 <= first <= 0.375
    assert 0.25 <= second <= 0.75
    assert Flaky.reads.count(("a/big.txt", 0)) == 1, "the ranges before it are not read again"


def test_short_and_overlong_reads_are_noticed() -> None:
    Flaky.files["a/big.txt"] = CONTENT
    seen: list[int] = []

    def short_once(path: str, start: int, data: bytes) -> bytes:
        seen.append(start)
        return data[:-1] if seen.count(start) == 1 else data

    Flaky.fault = staticmethod(short_once)
    assert _read() == LINES
    Flaky.fault = staticmethod(lambda path, start, data: CONTENT)  # a web server that knows no ranges
    assert _read() == LINES


def test_a_place_that_is_given_up_is_replaced_by_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(CONTENT)
    Flaky.files |= {"a/big.txt": CONTENT, "b/big.txt": CONTENT}
    for mirror in (str(tmp_path), "flaky://b"):
        Flaky.reads.clear()
        _fail(1000)
        assert _read(mirror) == LINES
        assert Flaky.reads.count(("a/big.txt", 200)) == 3
        assert max(start for path, start in Flaky.reads if path == "a/big.txt") <= 400, "it stays with the mirror"


def test_a_read_that_hangs_is_given_up() -> None:
    Flaky.files |= {"a/big.txt": CONTENT, "b/big.txt": CONTENT}

    def fault(path: str, start: int, data: bytes) -> bytes:
        if path.startswith("a/") and start == 200:
            Flaky.hang()
        return data

    Flaky.fault = staticmethod(fault)
    with pytest.raises(DataError, match=r"a/big\.txt: cannot be read .*: no answer within 30 s \(tried 3 times\)"):
        _read()
    assert _read("flaky://b") == LINES


def test_the_next_file_is_looked_for_where_the_last_was_found() -> None:
    for number in range(5):
        Flaky.files |= {f"a/{number}.txt": CONTENT, f"b/{number}.txt": CONTENT}
    Flaky.fault = staticmethod(_broken("a/"))
    library = Library(["flaky://b"], Quick())
    for file in resolve_files("flaky://a"):
        assert list(documents(file, document="line", library=library)) == LINES
    assert len([path for path, _ in Flaky.reads if path.startswith("a/")]) <= 3 + 2
    # A file that is not there says nothing about the place.
    Flaky.fault = staticmethod(lambda path, start, data: data)
    library = Library(["flaky://b"], Quick())
    files = resolve_files("flaky://a")
    del Flaky.files["a/0.txt"]
    Flaky.reads.clear()
    for file in files:
        assert list(documents(file, document="line", library=library)) == LINES
    assert {path for path, _ in Flaky.reads} == {"b/0.txt", *(f"a/{number}.txt" for number in range(1, 5))}


def _broken(where: str) -> Callable[[str, int, bytes], bytes]:
    def fault(path: str, start: int, data: bytes) -> bytes:
        if path.startswith(where):
            raise OSError(5, "Input/output error")
        return data

    return fault


def test_the_error_names_every_place_and_what_went_wrong_there(tmp_path: Path) -> None:
    Flaky.files |= {"a/big.txt": CONTENT, "b/big.txt": CONTENT[:-1]}
    Flaky.fault = staticmethod(_broken("a/"))
    with pytest.raises(DataError) as caught:
        _read("flaky://b", str(tmp_path))
    text = str(caught.value)
    assert text.startswith("flaky://a/big.txt: cannot be read on ")
    assert "[Errno 5] Input/output error (tried 3 times)" in text
    assert f"nor at flaky://b/big.txt: it has {len(CONTENT) - 1:,} bytes, not {len(CONTENT):,}" in text
    assert f"nor at {tmp_path}/big.txt: [Errno 2] No such file" in text
    assert text.endswith("make it readable, or name a place that holds the same files in data.mirrors")


def test_a_file_that_only_a_mirror_has_is_found_when_it_is_named_outright(tmp_path: Path) -> None:
    options: dict[str, Any] = {"document": "line", "tokenizer": "bytes", "patience": Quick()}
    for place in ("here", "mirror", "mirror/0001", "empty"):
        (tmp_path / place).mkdir()
    for name in ("here/big.txt", "here/other.txt", "mirror/big.txt", "mirror/0001/big.txt"):
        (tmp_path / name).write_bytes(CONTENT)
    here = str(tmp_path / "here" / "big.txt")
    mirrors = [str(tmp_path / "empty"), str(tmp_path / "mirror")]
    both = [str(tmp_path / "here" / "other.txt"), here]
    sources: list[str | list[str]] = [here, both]
    before = [prepare(source=source, cache=str(tmp_path / "cache"), **options) for source in sources]
    os.unlink(here)
    for source, expected in zip(sources, before, strict=True):
        for cache in ("cache", "cache2"):
            found = prepare(source=source, cache=str(tmp_path / cache), mirrors=mirrors, **options)
            assert (found.digest, found.manifest.key) == (expected.digest, expected.manifest.key)
    with pytest.raises(DataError, match="nothing found at"):
        prepare(source=here, mirrors=mirrors[:1], **options)
    with pytest.raises(DataError, match="nothing found at"):
        prepare(source=str(tmp_path / "here" / "b*.txt"), mirrors=mirrors, **options)
    with pytest.raises(DataError, match="nothing found at"):
        prepare(source=str(tmp_path / "gone"), mirrors=mirrors, **options)


def test_a_mirror_with_other_content_of_the_same_size_does_not_count(tmp_path: Path) -> None:
    other = CONTENT.replace(b"line 40", b"lime 40")
    Flaky.files |= {"a/big.txt": CONTENT, "b/big.txt": other, "c/big.txt": CONTENT}
    (file,) = resolve_files("flaky://a/big.txt")
    content = Library().examine(file)
    Flaky.fault = staticmethod(_broken("a/"))
    assert _read("flaky://b", "flaky://c", content=content) == LINES
    with pytest.raises(DataError, match=r"nor at flaky://b/big\.txt: from byte \d+ on it holds something else"):
        _read("flaky://b", content=content)
    (tmp_path / "big.txt").write_bytes(other)
    with pytest.raises(DataError, match="holds something else;"):  # on a disk it would be the same again
        _read(str(tmp_path), content=content)


def test_a_mixture_of_two_files_of_one_size_is_no_file() -> None:
    Flaky.files |= {"a/big.txt": CONTENT, "b/big.txt": CONTENT.replace(b"line 1", b"lime 1")}
    (file,) = resolve_files("flaky://a/big.txt")
    expected = Library().examine(file)
    _fail(1000)
    with pytest.raises(DataError, match=r"a/big\.txt: only a part of it could be read, and flaky://b/big\.txt, where"):
        Library(["flaky://b"], Quick()).examine(file)
    Flaky.files["b/big.txt"] = CONTENT
    assert Library(["flaky://b"], Quick()).examine(file) == expected


def test_validators_of_the_storage_are_compared() -> None:
    Flaky.files |= {"a/big.txt": CONTENT, "b/big.txt": CONTENT}
    Flaky.tags = {"a/big.txt": {"ETag": "1", "md5Hash": "x"}, "b/big.txt": {"ETag": "2", "md5Hash": "x"}}
    (file,) = resolve_files("flaky://a/big.txt")
    content = Library().examine(file)
    assert content.fingerprint == "ETag=1;md5Hash=x"
    assert not Flaky.reads, "it need not be read to be known again"
    library = Library((), Quick())
    library.confirm(file, content)
    Flaky.fault = staticmethod(_broken("a/"))
    assert _read("flaky://b", content=content) == LINES, "another storage has other ETags"
    Flaky.tags["b/big.txt"]["md5Hash"] = "y"
    with pytest.raises(DataError, match=r"nor at flaky://b/big\.txt: its md5Hash is y, not x"):
        _read("flaky://b", content=content)
    Flaky.tags["a/big.txt"]["ETag"] = "3"
    with pytest.raises(DataError, match=r"it is not what it was when the build began \(its ETag is 3, not 1\)"):
        library.confirm(file, content)


def test_a_mirror_that_nothing_vouches_for_is_known_by_its_ranges_or_not_used(tmp_path: Path) -> None:
    """The source's storage reports an ETag, which no other storage has."""
    Flaky.files["a/big.txt"] = CONTENT
    Flaky.tags = {"a/big.txt": {"ETag": "1"}}
    (file,) = resolve_files("flaky://a/big.txt")
    (tmp_path / "big.txt").write_bytes(CONTENT)
    library = Library([str(tmp_path)], Quick())
    content = library.examine(file)
    known = library.by_ranges(file, content)
    assert known.fingerprint == content.fingerprint == "ETag=1"
    Flaky.fault = staticmethod(_broken("a/"))
    assert library.by_ranges(file, content) == content, "who does not give the file tells nothing of its ranges"
    assert _read(str(tmp_path), content=known) == LINES
    with pytest.raises(DataError, match=r"nor at .*big\.txt: nothing tells that it holds the same"):
        _read(str(tmp_path), content=content)
    (tmp_path / "big.txt").write_bytes(CONTENT[::-1])
    with pytest.raises(DataError, match=r"from byte 0 on it holds something else"):
        _read(str(tmp_path), content=known)


def test_a_file_whose_size_nobody_tells_is_read_from_front_to_back() -> None:
    Flaky.files["a/big.txt"] = CONTENT
    Flaky.sizeless = True
    (file,) = resolve_files("flaky://a/big.txt")
    assert file.size_bytes == -1
    assert _read() == LINES
    content = Library().examine(file)
    assert content.size_bytes == len(CONTENT)
    assert _read(content=content, span=ByteSpan(300, None)) == _read(content=content)[-len(_tail(300)) :]


def _tail(start: int) -> list[str]:
    """The lines that begin at a byte or after it."""
    rest = CONTENT[start - 1 :]
    return rest[rest.index(b"\n") + 1 :].decode().split("\n")


def test_read_ahead_is_bounded() -> None:
    Flaky.files["a/big.txt"] = CONTENT
    (file,) = resolve_files("flaky://a/big.txt")
    with Library((), Quick()).open(file) as stream:
        stream.read(10)
        stream.read(100)  # now in the second range: the third and fourth are begun
        stream._ranges._lane.submit(lambda: None).result(30)  # type: ignore[union-attr]
        assert [start for _, start in Flaky.reads] == [0, 100, 200, 300]
    Flaky.reads.clear()
    with Library((), Quick()).open(file, stop=150) as stream:
        stream.read(10)
        stream._ranges._lane.submit(lambda: None).result(30)  # type: ignore[union-attr]
        assert [start for _, start in Flaky.reads] == [0, 100], "not beyond what will be read"


def test_parquet_comes_through_the_same_reader(tmp_path: Path) -> None:
    import pyarrow.parquet

    texts = [f"row {number}" * 9 for number in range(200)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=20, compression="none")
    Flaky.files |= {"a/t.parquet": (tmp_path / "t.parquet").read_bytes()}
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    def fault(path: str, start: int, data: bytes) -> bytes:
        if path.startswith("a/") and rng.random() < 0.2:
            raise OSError("now and then")
        return data

    Flaky.fault = staticmethod(fault)
    (file,) = resolve_files("flaky://a/t.parquet")
    assert list(documents(file, library=Library([str(tmp_path)], Quick()))) == texts
    Flaky.fault = staticmethod(_broken("a/"))
    with pytest.raises(DataError, match=r"a/t\.parquet: cannot be read on .*Input/output error"):
        list(documents(file, library=Library((), Quick())))


def test_a_build_on_failing_storage_gives_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    monkeypatch.setattr(cutting, "MIN_PART_BYTES", 1)
    records = "".join(json.dumps({"text": line}) + "\n" for line in LINES).encode()
    source = {"0.jsonl": records[: records.index(b"\n") + 1], "big.jsonl": records, "z.jsonl": b'{"text": "z"}\n'}
    Flaky.files = {f"{place}/{name}": data for place in "abc" for name, data in source.items()}
    calm = prepare(source="flaky://a", tokenizer="bytes", cache=str(tmp_path / "calm"))
    for number in range(10):
        monkeypatch.setattr(build, "MAX_TASKS", rng.randint(1, 12))
        bad = rng.sample("abc", 2)

        def fault(path: str, start: int, data: bytes, bad: Sequence[str] = bad) -> bytes:
            if path[0] in bad and rng.random() < 0.4:
                if rng.random() < 0.5:
                    raise ConnectionError("reset")
                return data[: rng.randrange(len(data))] if rng.random() < 0.5 else bytes(len(data))
            return data

        Flaky.fault = staticmethod(lambda path, start, data: data)
        Flaky.files = {f"{place}/{name}": data for place in "abc" for name, data in source.items()}
        if rng.random() < 0.5:
            Flaky.files.pop(f"b/{rng.choice(list(source))}", None)
        mirrors = ["flaky://b", "flaky://c"] if "a" in bad else ["flaky://b"]
        with monkeypatch.context() as patch:
            # What the files hold is known from before the storage failed: only what all places say can be trusted.
            patch.setattr(Library, "examine", _known_before())
            Flaky.fault = staticmethod(fault)
            store = prepare(
                source="flaky://a",
                tokenizer="bytes",
                cache=str(tmp_path / str(number)),
                mirrors=mirrors,
                patience=Quick(attempts=8),
            )
        assert store.digest == calm.digest
        assert store.manifest.key == calm.manifest.key
        store.verify()


def _known_before() -> Callable[[Library, SourceFile], reading.Content]:
    contents = {file: Library().examine(file) for file in resolve_files("flaky://a")}
    return lambda library, file: contents[file]


# ---------------------------------------------------------------------------------------- the token store


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """A store of several shards in `<tmp_path>/cache`."""
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 200)
    return prepare(source=f"{tmp_path}/*.txt", tokenizer="bytes", cache=str(tmp_path / "cache"))


def _all(store: TokenStore) -> list[list[int]]:
    return store.samples(np.arange(store.num_samples(9)), 9).tolist()  # type: ignore[no-any-return]


def _copy_to(store: TokenStore, mirror: Path) -> Path:
    shutil.copytree(store.directory, mirror / store.directory.name)
    return mirror / store.directory.name


def test_a_shard_truncated_under_a_running_store_is_an_error_that_names_it(store: TokenStore) -> None:
    opened = TokenStore(store.directory, patience=Quick())
    path = store.directory / "shard-00001.bin"
    os.truncate(path, 100)
    with pytest.raises(DataError) as caught:
        _all(opened)
    text = str(caught.value)
    assert text.startswith(f"{path}: cannot be read on ")
    assert "it has 100 bytes, not" in text
    assert "(tried 3 times)" in text
    assert text.endswith("or name a place that holds a copy of it in data.mirrors")
    assert len(Quick.slept) == 2
    first = opened.manifest.shards[0].tokens // 9
    assert opened.samples(np.arange(first - 1), 9).shape == (first - 1, 10), "the other shards can be read"


def test_a_mirror_takes_over_from_a_failing_shard(store: TokenStore, tmp_path: Path) -> None:
    expected = _all(store)
    copy = _copy_to(store, tmp_path / "mirror")
    Flaky.files = {f"m/{store.directory.name}/{path.name}": path.read_bytes() for path in copy.iterdir()}
    for mirror in (str(copy), f"flaky://m/{store.directory.name}"):
        victim = Path(shutil.copytree(store.directory, tmp_path / "victim"))
        opened = TokenStore(victim, mirrors=[mirror], patience=Quick())
        os.truncate(victim / "shard-00001.bin", 100)
        assert _all(opened) == expected
        Quick.slept.clear()
        assert _all(opened) == expected
        assert not Quick.slept, "what failed once is not asked again and again"
        shutil.rmtree(victim)
        assert _all(opened) == expected


def test_a_read_that_fails_for_a_moment_is_done_again(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _all(store)
    opened = TokenStore(store.directory, patience=Quick())
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    honest_preadv, honest_pread = os.preadv, os.pread
    failures = [0]

    def preadv(file: int, views: list[memoryview], start: int) -> int:
        if rng.random() < 0.5:
            failures[0] += 1
            if rng.random() < 0.5:
                raise OSError(116, "Stale file handle")
            views = [views[0][: len(views[0]) // 2]]
        return honest_preadv(file, views, start)

    def pread(file: int, length: int, start: int) -> bytes:
        if len(Quick.slept) % 3 == 0:
            Quick.slept.append(0.0)
            raise OSError(5, "Input/output error")
        return honest_pread(file, length, start)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pread", pread)
    ids = rng.sample(range(store.num_samples(9)), 60)
    assert opened.samples(np.array(ids), 9).tolist() == [expected[i] for i in ids]
    assert failures[0]
    assert Quick.slept


def test_a_mirror_with_another_store_does_not_count(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("something else " * 500)
    other = prepare(source=str(tmp_path / "other.txt"), tokenizer="bytes", cache=str(tmp_path / "cache2"))
    opened = TokenStore(store.directory, mirrors=[str(other.directory), str(tmp_path / "no")], patience=Quick())
    os.unlink(store.directory / "shard-00001.bin")
    assert len(_all(opened)) == store.num_samples(9), "what is open stays so"
    os.truncate(store.directory / "shard-00002.bin", 0)
    with pytest.raises(DataError, match=rf"nor at {other.directory}/shard-00002\.bin: it is another store .*nor at"):
        _all(opened)


def test_a_copy_with_a_wrong_byte_does_not_count(store: TokenStore, tmp_path: Path) -> None:
    """It has the right names and sizes, and a manifest that is right; only what it holds is not."""
    copy = _copy_to(store, tmp_path / "mirror")
    wrong = bytearray((copy / "shard-00001.bin").read_bytes())
    wrong[7] ^= 1
    (copy / "shard-00001.bin").write_bytes(wrong)
    opened = TokenStore(store.directory, mirrors=[str(copy)], patience=Quick())
    os.truncate(store.directory / "shard-00001.bin", 100)
    with pytest.raises(DataError, match=r"what it holds from byte 0 on is not what was written"):
        _all(opened)
    assert open_store(tmp_path / "nowhere" / store.directory.name, store.digest, [str(tmp_path / "mirror")]) is None


def test_a_shard_whose_file_system_hangs_is_read_elsewhere(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _all(store)
    copy = _copy_to(store, tmp_path / "mirror")
    opened = TokenStore(store.directory, mirrors=[str(copy)], patience=Quick())
    honest = os.pread
    own = {os.stat(path).st_ino for path in store.directory.iterdir()}

    def hang(number: int, *_: Any) -> int:
        Flaky.hang()
        raise AssertionError

    def pread(number: int, length: int, start: int) -> bytes:
        if os.fstat(number).st_ino in own:
            hang(number)
        return honest(number, length, start)

    monkeypatch.setattr(os, "preadv", hang)
    monkeypatch.setattr(os, "pread", pread)
    assert _all(opened) == expected


def test_a_worker_opens_a_mirrors_store_where_there_is_none(store: TokenStore, tmp_path: Path) -> None:
    expected = _all(store)
    copy = _copy_to(store, tmp_path / "mirror")
    Flaky.files = {f"m/{store.directory.name}/{path.name}": path.read_bytes() for path in copy.iterdir()}
    missing = tmp_path / "nowhere" / store.directory.name
    for mirror in (str(tmp_path / "mirror"), "flaky://m"):
        found = open_store(missing, store.digest, ["/no/such", mirror])
        assert found is not None
        assert _all(found) == expected
        assert found.location.startswith(mirror)
    assert open_store(missing, store.digest) is None
    assert open_store(missing, "sha256:feed", [str(tmp_path / "mirror")]) is None
    assert open_store(store.directory, store.digest, ["/no/such"]) is not None
    os.truncate(copy / "shard-00000.bin", 10)
    assert open_store(missing, store.digest, [str(tmp_path / "mirror")]) is None
    with pytest.raises(BrokenStoreError, match="should be"):
        TokenStore(copy, patience=Quick())


def test_many_threads_read_at_once_while_a_shard_fails(store: TokenStore, tmp_path: Path) -> None:
    expected = _all(store)
    copy = _copy_to(store, tmp_path / "mirror")
    opened = TokenStore(store.directory, mirrors=[str(copy)], patience=Quick())
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in range(60):
            if seed == 0 and number == 20:
                os.truncate(store.directory / "shard-00003.bin", 7)
            ids = rng.integers(0, len(expected), 8)
            try:
                if opened.samples(ids, 9).tolist() != [expected[i] for i in ids]:
                    wrong.append(ids)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_neighbours_are_read_in_one_go(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _all(store)
    calls: list[int] = []
    honest = os.preadv

    def counting(file: int, views: list[memoryview], start: int) -> int:
        calls.append(len(views[0]))
        return honest(file, views, start)

    monkeypatch.setattr(os, "preadv", counting)
    ids = np.array([7, 8, 9, 3, 3, 4, 20])
    assert store.samples(ids, 9).tolist() == [expected[i] for i in ids]
    assert calls == [2 * (3 * 9 + 1), 2 * 10, 2 * (2 * 9 + 1), 2 * 10]


def test_a_source_file_is_plain_data() -> None:
    """Tasks, which carry it, travel to other processes."""
    import pickle

    file = SourceFile("a", "/a", 1, "text")
    assert pickle.loads(pickle.dumps((file, ByteSpan(1, 2), Patience()))) == (file, ByteSpan(1, 2), Patience())
