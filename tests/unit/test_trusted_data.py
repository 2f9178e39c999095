"""What is trained on is what the job names: tokens that change after the start are found; bytes that are no text, or
one file by two names, are refused."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from orchestrator.data import DataError, documents, prepare, resolve_files
from orchestrator.data.locations import Patience
from orchestrator.data.manifest import RANGE_BYTES
from orchestrator.data.of_job import prepare_stores
from orchestrator.data.proof import rehash_tokens
from orchestrator.data.shards import Shards
from orchestrator.data.store import TokenStore, open_store
from orchestrator.data.trying import try_data
from orchestrator.job import Job

QUICK = Patience(attempts=2, timeout_s=5.0, pause_s=0.01, longest_pause_s=0.01)
LENGTH = 64


def make(tmp_path: Path, num_bytes: int = 200_000, **options: Any) -> TokenStore:
    (tmp_path / "text").mkdir(exist_ok=True)
    # With the end of the document a multiple of four bytes, so that halves that are swapped twice are back in place.
    letters = np.random.default_rng(1).integers(97, 123, num_bytes - 1, dtype=np.uint8)
    (tmp_path / "text" / "a.txt").write_bytes(letters.tobytes())
    return prepare(source=str(tmp_path / "text"), tokenizer="bytes", cache=str(tmp_path / "cache"), **options)


def reopened(store: TokenStore, **options: Any) -> TokenStore:
    return TokenStore(store.location, patience=QUICK, **options)


def swap_halves(store: TokenStore) -> None:
    """Same size, same file, same time of its last change, other tokens."""
    for shard in store.manifest.shards:
        path = store.directory / shard.name
        before = path.stat()
        with path.open("r+b") as file:
            data = file.read()
            half = len(data) // 4 * 2
            file.seek(0)
            file.write(data[half:] + data[:half])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_file(store: TokenStore) -> None:
    for shard in store.manifest.shards:
        path = store.directory / shard.name
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[::-1])


def samples(store: TokenStore) -> np.ndarray:
    return store.samples(np.arange(store.num_samples(LENGTH)), LENGTH)


@pytest.mark.parametrize("how", ["as prepared", "as another process opens it", "by another process's word"])
def test_tokens_that_change_under_an_open_store_are_never_handed_out(tmp_path: Path, how: str) -> None:
    prepared = make(tmp_path)
    if how == "as prepared":
        store = prepared
    else:
        store = reopened(prepared, signatures=prepared.signatures if how.startswith("by") else ())
    right = samples(store)
    swap_halves(store)
    with pytest.raises(DataError, match=r"shard-00000\.bin: .*what it holds from byte 0 on is not what was written"):
        samples(store)
    swap_halves(store)
    assert np.array_equal(samples(store), right), "what is right again is read again"


def test_a_file_put_in_the_place_of_an_open_one_changes_nothing(tmp_path: Path) -> None:
    store = make(tmp_path)
    right = samples(store)
    replace_file(store)
    assert np.array_equal(samples(store), right), "the open file is the one that was verified"
    with pytest.raises(DataError, match="is not what was written"):
        samples(reopened(store))


def test_a_mirror_takes_over_from_a_store_that_has_changed(tmp_path: Path) -> None:
    prepared = make(tmp_path)
    mirror = tmp_path / "mirror"
    shutil.copytree(prepared.location, mirror / prepared.directory.name)
    store = open_store(prepared.directory, prepared.digest, [str(mirror)], prepared.signatures)
    assert store is not None
    right = samples(store)
    swap_halves(store)
    assert np.array_equal(samples(store), right)


def test_what_somebody_has_verified_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = make(tmp_path, num_bytes=3 * RANGE_BYTES)
    assert all(prepared.signatures)
    verified: list[int] = []
    usual: Callable[..., bool] = Shards._is_right

    def counted(self: Shards, shard: int, file: Any, number: int) -> bool:
        verified.append(number)
        return usual(self, shard, file, number)

    monkeypatch.setattr(Shards, "_is_right", counted)
    told = reopened(prepared, signatures=prepared.signatures)
    told.samples(np.array([0, 1, 2]), LENGTH)
    assert verified == []
    untold = reopened(prepared)
    untold.samples(np.array([0, 1, 2]), LENGTH)
    untold.samples(np.array([5, 6]), LENGTH)
    assert verified == [0], "a range that was verified is not read again"
    os.utime(prepared.directory / "shard-00000.bin")
    told.samples(np.array([5]), LENGTH)
    assert verified == [0, 0], "but it is when its file was touched"


def test_a_store_is_read_only_once_it_is_made(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert {path.stat().st_mode & 0o222 for path in store.directory.iterdir()} == {0}


def test_audit_hashes_the_tokens_again(tmp_path: Path) -> None:
    store = make(tmp_path)
    entry = {"parts": [{"location": store.location, "digest": store.digest}]}
    report = rehash_tokens(entry)
    assert (report.num_tokens, report.problems, report.unchecked) == (store.num_tokens, [], [])
    swap_halves(store)
    (problem,) = rehash_tokens(entry).problems
    assert "is not what was written" in problem
    # Digests of ranges made to fit do not help: those of the tokens are the run's.
    other = rehash_tokens({"parts": [{"location": store.location, "digest": "sha256:other"}]})
    assert other.problems
    shutil.rmtree(store.location)
    gone = rehash_tokens(entry)
    assert not gone.problems
    assert "cannot be opened" in gone.unchecked[0]
    assert "earlier version" in rehash_tokens({}).unchecked[0]


def test_a_manifest_altered_along_with_its_shard_is_found_by_audit(tmp_path: Path) -> None:
    import xxhash

    store = make(tmp_path)
    (shard,) = store.manifest.shards
    path = store.directory / shard.name
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[::-1])
    manifest = store.directory / "MANIFEST.json"
    content = json.loads(manifest.read_text())
    data = path.read_bytes()
    content["shards"][0] |= {"digest": xxhash.xxh3_128_hexdigest(data), "ranges": xxhash.xxh3_64_hexdigest(data)}
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(content))
    report = rehash_tokens({"parts": [{"location": store.location, "digest": store.digest}]})
    assert [problem for problem in report.problems if "the run was made with" in problem]


# ---------------------------------------------------------------------------------------- what is no text


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("rows.zip", "unpack them"),
        ("rows.jsonl.lz4", r"only \.gz, \.zst, \.bz2, \.xz are; unpack them"),
        ("what.ever", "set data.format"),
        ("what.ever.gz", "set data.format"),
    ],
)
def test_a_suffix_that_is_not_known_is_refused_with_advice_that_works(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=advice):
        resolve_files(str(tmp_path))


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.pdf").write_text("a,b\n")
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(DataError) as caught:
        resolve_files(str(tmp_path))
    told = str(caught.value)
    assert "4.pdf and 3 more" in told
    assert "LICENSE" in told
    assert "empty.txt: the file is empty" in told
    assert "good.txt" not in told


def test_markers_are_no_data_and_a_readme_beside_records_is_none_either(tmp_path: Path) -> None:
    (tmp_path / "part-0.jsonl").write_text('{"text": "a"}\n')
    for marker in ("_SUCCESS", ".part-0.jsonl.crc", "part-0.jsonl.crc", "_committed_123"):
        (tmp_path / marker).touch()
    assert [file.name for file in resolve_files(str(tmp_path))] == ["part-0.jsonl"]
    (tmp_path / "README.md").write_text("# About")
    with pytest.raises(DataError, match=r"README\.md beside files of records"):
        resolve_files(str(tmp_path))
    assert [file.name for file in resolve_files(f"{tmp_path}/**/*.jsonl")] == ["part-0.jsonl"]


@pytest.mark.parametrize("format", [None, "jsonl"])
def test_what_no_format_can_make_data_is_told_at_once(tmp_path: Path, format: str | None) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text("# About")
    for source in (str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(DataError, match=r"README\.md beside files of records"):
            resolve_files(source, format)
    for name in ("a.jsonl.lz4", "b.jsonl.zip"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"a\.jsonl\.lz4, .*b\.jsonl\.zip: not read.*unpack them"):
        resolve_files(str(tmp_path), format)


def test_utf_16_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one".encode("utf-16"))
    (file,) = resolve_files(str(tmp_path))
    with pytest.raises(DataError, match=r"byte order mark of UTF-16; convert it"):
        list(documents(file))


def test_bytes_that_are_no_text_are_refused_whatever_the_format_says(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_bytes(b"\x01\x00\x02\x00")
    (file,) = resolve_files(str(tmp_path), "text")
    for document in ("file", "line"):
        with pytest.raises(DataError, match=r"tokens\.bin: a NUL byte at byte offset 1"):
            list(documents(file, document=document))


@pytest.mark.parametrize("document", ["file", "line"])
def test_a_byte_order_mark_is_no_character(tmp_path: Path, document: str) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\ufeff\ntwo".encode())
    (file,) = resolve_files(str(tmp_path))
    assert "".join(documents(file, document=document)).startswith("one\ufeff"), "only the one at the very start"


def test_a_byte_order_mark_before_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "one"}\n{"text": "two"}\n'.encode())
    (file,) = resolve_files(str(tmp_path))
    assert list(documents(file)) == ["one", "two"]


def test_a_field_of_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"data\.field: 'body' names a field of records, but .* is text"):
        prepare(source=str(tmp_path), field="body", tokenizer="bytes", cache=str(tmp_path / ".cache"))


def test_the_field_of_a_mix_is_for_the_entries_that_have_records(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"body": "one two"}\n')
    (tmp_path / "plain.txt").write_text("three four")
    (tmp_path / "more.txt").write_text("five six")

    def mixed(*names: str) -> Job:
        mix = [{"source": str(tmp_path / name), "weight": 1} for name in names]
        data = {"mix": mix, "field": "body", "sequence_length": 4, "cache": str(tmp_path / ".cache")}
        return Job.model_validate(
            {
                "name": "mixed",
                "model": {"factory": "nowhere:model"},
                "data": data,
                "train": {"steps": 1, "global_batch": 8},
                "elastic": {"workers": {"min": 1, "max": 1}, "virtual_workers": 8},
            }
        )

    job = mixed("records.jsonl", "plain.txt")
    assert [store.num_tokens for store in prepare_stores(job)] == [8, 11]
    try_data(job)
    nobodys = mixed("plain.txt", "more.txt")
    for look in (prepare_stores, try_data):
        with pytest.raises(DataError, match=r"data\.field: 'body' names a field of records"):
            look(nobodys)


# ---------------------------------------------------------------------------------------- one file by two names


def link_directory(root: Path) -> str:
    (root / "again").symlink_to(root / "text", target_is_directory=True)
    return str(root)


def hard_link(root: Path) -> str:
    os.link(root / "text" / "a.txt", root / "text" / "b.txt")
    return str(root / "text")


def link_file(root: Path) -> str:
    (root / "text" / "b.txt").symlink_to(root / "text" / "a.txt")
    return str(root / "text" / "*.txt")


@pytest.mark.parametrize("make_names", [link_directory, hard_link, link_file])
def test_one_file_by_two_names_is_refused_with_both(tmp_path: Path, make_names: Callable[[Path], str]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("one")
    source = make_names(tmp_path)
    with pytest.raises(DataError, match=r"/(again|text)/[ab]\.txt and .*/(again|text)/[ab]\.txt are one file"):
        resolve_files(source)


def test_a_directory_linked_into_itself_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("one")
    (tmp_path / "text" / "loop").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(DataError, match="loop"):
        resolve_files(str(tmp_path))


def test_brackets_in_the_name_of_a_directory_are_no_pattern(tmp_path: Path) -> None:
    for name in ("data[1]", "data1"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / f"{name}.txt").write_text(name)
    assert [file.name for file in resolve_files(f"{tmp_path}/data[1]/*/*.txt")] == ["x/data[1].txt"]
    assert [file.name for file in resolve_files(f"{tmp_path}/data[12]/x/*.txt")] == ["data1/x/data1.txt"]


def test_a_directory_at_a_url_is_read_like_one_on_the_disk() -> None:
    files = fsspec.filesystem("memory")
    for name in ("a.jsonl", "_SUCCESS", "_committed_1", ".a.jsonl.crc", ".parts/b.jsonl"):
        files.pipe(f"/trusted-data/{name}", b'{"text": "a"}\n')
    for source in ("memory://trusted-data", "memory://trusted-data/*", "memory://trusted-data/**"):
        assert [file.name for file in resolve_files(source)] == ["a.jsonl"]


def test_brackets_in_a_name_at_a_url_are_no_pattern() -> None:
    """A pattern would find the neighbour, and train on it."""
    files = fsspec.filesystem("memory")
    for name in ("data[1]", "data1"):
        files.pipe(f"/trusted-brackets/{name}/{name}.txt", name.encode())
    for rest in ("", "/*.txt", "/data[1].txt"):
        found = resolve_files(f"memory://trusted-brackets/data[1]{rest}")
        assert [file.name for file in found] == ["data[1].txt"]
    found = resolve_files("memory://trusted-brackets/data[12]/*.txt")
    assert [file.name for file in found] == ["data1/data1.txt"], "elsewhere they are one"


# ---------------------------------------------------------------------------------------- the web


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403 if "secret" in self.path else 404)

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


def test_what_a_web_server_says_is_told(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(DataError, match="403"):
            resolve_files(f"{base}/secret.txt")
        with pytest.raises(DataError, match="404"):
            resolve_files(f"{base}/gone.txt")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    with pytest.raises(DataError, match=r"(?i)cannot connect|refused"):
        resolve_files(f"{base}/any.txt")
