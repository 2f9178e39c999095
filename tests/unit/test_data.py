"""The data room: each sample of each epoch exactly once, whatever the files and the machines are."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import (
    DataError,
    Sampler,
    TokenStore,
    audit,
    build,
    data_digest,
    documents,
    load_tokenizer,
    permute,
    prepare,
    resolve_files,
    step_hash,
    virtual_worker_hash,
)
from orchestrator.data import task_split as cutting
from orchestrator.data.manifest import BrokenStoreError

# --- sampler --------------------------------------------------------------------------------------


@settings(print_blob=True, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(-(2**70), 2**70))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    ids = permute(np.arange(size), size, key)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(size))


def test_every_small_size_is_a_bijection() -> None:
    for size in range(1, 200):
        for key in range(5):
            assert set(permute(np.arange(size), size, key).tolist()) == set(range(size))


@settings(print_blob=True, deadline=None)
@given(size=st.integers(2**40, 2**62 - 1), key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40 - 2000))
def test_permutation_of_a_large_range_stays_in_range_and_collides_never(size: int, key: int, start: int) -> None:
    ids = permute(np.arange(start, start + 1000), size, key)
    assert ids.min() >= 0
    assert ids.max() < size
    assert len(np.unique(ids)) == 1000


def test_permutation_does_not_depend_on_what_else_is_asked() -> None:
    size = 1_000_003
    whole = permute(np.arange(size), size, 7)
    assert len(np.unique(whole)) == size
    places = np.array([0, 1, 999, size - 1])
    assert np.array_equal(permute(places, size, 7), whole[places])
    assert permute(np.array([[5], [6]]), size, 7).tolist() == [[whole[5]], [whole[6]]]


def test_permutation_differs_across_keys_and_looks_random() -> None:
    size = 10_000
    orders = [permute(np.arange(size), size, key) for key in range(20)]
    for one in range(20):
        for other in range(one):
            # Two random orders agree in one place on average.
            assert np.count_nonzero(orders[one] == orders[other]) < 15
    displacement = np.mean([np.abs(order - np.arange(size)).mean() for order in orders])
    assert displacement == pytest.approx(size / 3, rel=0.05)
    neighbours = np.mean([np.corrcoef(order[:-1], order[1:])[0, 1] for order in orders])
    assert abs(neighbours) < 0.02


def test_permutation_refuses_what_is_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"range\(5\)"):
        permute(np.array([5]), 5, 0)
    with pytest.raises(ValueError, match=r"range\(5\)"):
        permute(np.array([-1]), 5, 0)
    for size in (0, 2**62):
        with pytest.raises(ValueError, match=str(size)):
            permute(np.array([0]), size, 0)


def test_permutation_is_pinned() -> None:
    """Other numbers are another data order: a run resumed across the change would repeat samples."""
    assert permute(np.arange(8), 8, 0).tolist() == [3, 4, 6, 5, 2, 0, 1, 7]
    large = [409241905882667067, 202478877040618371, 2080685766168850147, 1219975665182568644]
    assert permute(np.arange(4), 2**61 + 12345, 99).tolist() == large
    assert Sampler(1000, 8, 4, 0).sample_ids(124, 3).tolist() == [473, 833]
    assert Sampler(1000, 8, 4, 0).sample_ids(125, 0).tolist() == [994, 853]


@settings(print_blob=True, deadline=None)
@given(
    num_samples=st.integers(1, 60),
    share=st.integers(1, 5),
    virtual_workers=st.integers(1, 9),
    seed=st.integers(-(2**65), 2**65),
    shuffle=st.booleans(),
)
def test_sampler_uses_each_sample_of_each_epoch_once(
    num_samples: int, share: int, virtual_workers: int, seed: int, shuffle: bool
) -> None:
    batch = share * virtual_workers
    sampler = Sampler(num_samples, batch, virtual_workers, seed, shuffle)
    steps = math.ceil(3 * num_samples / batch)
    ids = np.concatenate([sampler.step_ids(step) for step in range(steps)])
    for epoch in range(3):
        used = ids[epoch * num_samples : (epoch + 1) * num_samples]
        assert np.array_equal(np.sort(used), np.arange(num_samples))
        assert shuffle or np.array_equal(used, np.arange(num_samples))
    for step in range(steps):
        split = [sampler.sample_ids(step, worker) for worker in range(virtual_workers)]
        assert all(len(part) == share and part.dtype == np.int64 for part in split)
        assert np.array_equal(np.concatenate(split), sampler.step_ids(step))


def test_epochs_and_seeds_have_different_orders() -> None:
    def epoch_order(seed: int, epoch: int) -> list[int]:
        return Sampler(1000, 1000, 1, seed).step_ids(epoch).tolist()  # type: ignore[no-any-return]

    orders = [epoch_order(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_sampler_refuses_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="global_batch 10 is not a multiple of virtual_workers 4"):
        Sampler(100, 10, 4, 0)
    with pytest.raises(ValueError, match="num_samples is 0"):
        Sampler(0, 8, 4, 0)
    with pytest.raises(ValueError, match="virtual worker 4"):
        Sampler(100, 8, 4, 0).sample_ids(0, 4)
    with pytest.raises(ValueError, match="step -1"):
        Sampler(100, 8, 4, 0).step_ids(-1)


def test_sampler_is_fast_and_silent(recwarn: pytest.WarningsRecorder) -> None:
    sampler = Sampler(50_000_000, 64, 8, 1)
    best = min(_seconds(lambda: [sampler.sample_ids(step, 3) for step in range(100)]) for _ in range(5))
    assert best / 100 < 300e-6, "three times the aim, for busy machines"
    assert not recwarn.list


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# --- sources and formats --------------------------------------------------------------------------


def _parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def _jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A directory of all formats; its documents in order are `CORPUS`."""
    root = tmp_path / "corpus"
    (root / "b").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.txt").write_text("not me")
    (root / "a.txt").write_bytes("naïve\r\ntext".encode())
    _jsonl(root / "b" / "one.jsonl", [{"text": "first"}, {"text": "", "id": 2}, {"text": "thïrd\n"}])
    _parquet(root / "b" / "two.parquet", {"id": [1, 2, 3], "text": ["x", "yy", "zzz"]})
    (root / "c.md").write_text("# end", encoding="utf-8")
    return root


CORPUS = ["naïve\r\ntext", "first", "", "thïrd\n", "x", "yy", "zzz", "# end"]


def test_directory_gives_documents_in_name_order(corpus: Path) -> None:
    files = resolve_files(str(corpus))
    assert [file.name for file in files] == ["a.txt", "b/one.jsonl", "b/two.parquet", "c.md"]
    assert [file.format for file in files] == ["text", "jsonl", "parquet", "text"]
    assert [file.size_bytes for file in files] == [os.path.getsize(file.url) for file in files]
    assert [document for file in files for document in documents(file, None)] == CORPUS


def test_names_do_not_depend_on_where_the_source_is(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.name for f in resolve_files(f"{corpus}/b/*.jsonl")] == ["one.jsonl"]
    assert [f.name for f in resolve_files(f"{corpus}/**/*.*")] == [f.name for f in resolve_files(str(corpus))]
    assert [f.name for f in resolve_files(f"file://{corpus}/a.txt")] == ["a.txt"]
    monkeypatch.chdir(corpus)
    assert [f.name for f in resolve_files("*.md")] == ["c.md"]
    assert [f.name for f in resolve_files("a.txt")] == ["a.txt"]
    # A list keeps its order.
    assert [f.name for f in resolve_files(["c.md", "a.txt"])] == ["0000/c.md", "0001/a.txt"]


def test_fsspec_url_reads_as_a_local_path_does(corpus: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    remote = fsspec.filesystem("memory")
    remote.put(str(corpus / "b") + "/", "/corpus-of-test-data/b/", recursive=True)
    for source in ("memory://corpus-of-test-data/b", "memory://corpus-of-test-data/b/*"):
        files = resolve_files(source)
        assert [file.name for file in files] == ["one.jsonl", "two.parquet"]
        assert [document for file in files for document in documents(file, "text")] == CORPUS[1:7]
    local = prepare(source=str(corpus / "b"), tokenizer="bytes", cache=str(tmp_path / "one"))
    store = prepare(source="memory://corpus-of-test-data/b", tokenizer="bytes", cache=str(tmp_path / "two"))
    assert store.digest == local.digest
    with pytest.raises(DataError, match="memory://corpus-of-test-data/none"):
        resolve_files("memory://corpus-of-test-data/none")


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(DataError, match="nosuch://x"):
        resolve_files("nosuch://x/y.txt")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bad.txt", b"fine \xff not", r"bad\.txt: not UTF-8 at byte offset 5 \(0xff\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"bad\.jsonl: not UTF-8 at byte offset 24"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', r"bad\.jsonl:3: not valid JSON"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"bad\.jsonl:2: no field 'text', only \['txt'\]"),
        ("bad.jsonl", b'{"text": 7}\n', r"bad\.jsonl:1: field 'text' is int"),
        ("bad.jsonl", b'{"text": null}\n', r"bad\.jsonl:1: field 'text' is NoneType"),
        ("bad.jsonl", b"[1]\n", r"bad\.jsonl:1: a list"),
        ("bad.jsonl", b'{"text": "\\ud800"}\n', r"bad\.jsonl:1: .*surrogate"),
        ("bad.jsonl", b"[" * 100_000, r"bad\.jsonl:1: not valid JSON"),
        ("bad.jsonl", b"\n \n", r"bad\.jsonl: holds no document"),
        ("bad.txt", b"", r"bad\.txt: the file is empty"),
        ("bad.xyz", b"?", r"bad\.xyz: .*suffix '\.xyz'; set data\.format"),
        ("bad.parquet", b"PAR1 no, not really PAR1", r"bad\.parquet: .*not readable as parquet"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        prepare(source=str(tmp_path), tokenizer="bytes", cache=str(tmp_path / ".cache"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not [p for p in (tmp_path / ".cache").glob("tokens-*") if p.is_dir()], "nothing half-built is left"


def test_unusable_parquet_column_is_named(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "t.parquet", {"id": [1, 2], "body": ["a", None]})
    (file,) = resolve_files(str(path))
    with pytest.raises(DataError, match=r"t\.parquet: no column 'text', only \['id', 'body'\]"):
        list(documents(file))
    with pytest.raises(DataError, match=r"t\.parquet: row 1: field 'body' is NoneType"):
        list(documents(file, "body"))
    with pytest.raises(DataError, match=r"t\.parquet: row 0: field 'id' is int"):
        list(documents(file, "id"))


def test_unusable_source_is_named(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"nothing found at '/no/such/\*\.txt'"):
        resolve_files("/no/such/*.txt")
    with pytest.raises(DataError, match="the list is empty"):
        resolve_files([])
    with pytest.raises(DataError, match=r"a\.txt is listed twice"):
        resolve_files([str(corpus), str(corpus / "a.txt")])
    with pytest.raises(DataError, match="'xml' is unknown"):
        resolve_files(str(corpus), "xml")
    (file,) = resolve_files(str(corpus / "a.txt"))
    os.unlink(file.url)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        list(documents(file))


def test_format_overrides_the_suffix(tmp_path: Path) -> None:
    _jsonl(tmp_path / "data.dump", [{"body": "a"}, {"body": "b"}])
    (file,) = resolve_files(str(tmp_path), "jsonl")
    assert list(documents(file, "body")) == ["a", "b"]


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small byte-level BPE tokenizer.json, and its tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat " * 50], trainer)
    tokenizer.enable_truncation(3)  # as some saved tokenizers do; it must not cut documents
    directory: Path = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_byte_tokenizer() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)


def test_tokenizer_file_and_directory_agree(bpe: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    reference.no_truncation()
    text = "the cat sat on the mat, naïvely"
    for name in (bpe / "tokenizer.json", bpe):
        tokenizer = load_tokenizer(str(name))
        assert tokenizer.encode(text).tolist() == reference.encode(text).ids
        assert len(tokenizer.encode(text)) > 3
        assert tokenizer.end_of_document == reference.token_to_id("<|endoftext|>")
        assert tokenizer.vocab_size == reference.get_vocab_size()
        assert tokenizer.identity == load_tokenizer(str(name)).identity


def test_tokenizer_identity_follows_its_content(bpe: Path, tmp_path: Path) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    changed = load_tokenizer(str(tmp_path / "tokenizer.json")).identity
    assert changed != load_tokenizer(str(bpe / "tokenizer.json")).identity


def test_unusable_tokenizer_is_named(tmp_path: Path, bpe: Path) -> None:
    with pytest.raises(DataError, match=r"'gpt2' does not exist on disk"):
        load_tokenizer("gpt2")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json cannot be loaded"):
        load_tokenizer(str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match=f"{tmp_path} cannot be loaded"):
        load_tokenizer(str(tmp_path))
    nameless = (bpe / "tokenizer.json").read_text().replace("<|endoftext|>", "<|stop|>")
    (tmp_path / "tokenizer.json").write_text(nameless)
    with pytest.raises(DataError, match=r"tokenizer\.json must have one end-of-sequence token"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match=f"{tmp_path} has no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


# --- store ----------------------------------------------------------------------------------------


def _reference(texts: list[str], tokenizer: str) -> list[int]:
    loaded = load_tokenizer(tokenizer)
    return [int(t) for text in texts for t in [*loaded.encode(text), loaded.end_of_document]]


def _store_directory(cache: Path) -> Path:
    (directory,) = [path for path in cache.glob("tokens-*") if path.is_dir()]
    return directory


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_store_holds_what_a_plain_loop_gives(corpus: Path, tmp_path: Path, bpe: Path, kind: str) -> None:
    tokenizer = "bytes" if kind == "bytes" else str(bpe / "tokenizer.json")
    store = prepare(source=str(corpus), tokenizer=tokenizer, cache=str(tmp_path / "cache"))
    tokens = _reference(CORPUS, tokenizer)
    assert store.num_tokens == len(tokens)
    assert store.vocab_size == load_tokenizer(tokenizer).vocab_size
    assert len(store.manifest.shards) > 1
    for length in (1, 3, 7, len(tokens) - 1):  # the long ones reach across shards
        num_samples = store.num_samples(length)
        assert num_samples == (len(tokens) - 1) // length
        ids = np.random.default_rng(0).permutation(num_samples)
        samples = store.samples(ids, length)
        assert samples.dtype == np.int64
        assert samples.tolist() == [tokens[i * length : i * length + length + 1] for i in ids]
    assert store.samples(np.array([], dtype=np.int64), 4).shape == (0, 5)


def test_store_refuses_what_it_does_not_have(corpus: Path, tmp_path: Path) -> None:
    store = prepare(source=str(corpus), tokenizer="bytes", cache=str(tmp_path / "cache"))
    n = store.num_tokens
    with pytest.raises(DataError, match=f"corpus has {n} tokens, too few .* length {n}"):
        store.num_samples(n)
    with pytest.raises(DataError, match="sequence_length is 0"):
        store.num_samples(0)
    for bad in (-1, store.num_samples(5)):
        with pytest.raises(IndexError, match="outside range"):
            store.samples(np.array([0, bad]), 5)


def test_large_vocabulary_is_stored_whole(tmp_path: Path, bpe: Path) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text())
    token = {"content": "<far>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i in range(66_000):
        content["model"]["vocab"][f"<unused{i}>"] = len(content["model"]["vocab"])
    vocab_end = len(content["model"]["vocab"])
    content["added_tokens"].append({"id": vocab_end, "special": True, **token})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("the <far> cat")
    tokenizer = str(tmp_path / "tokenizer.json")
    store = prepare(source=str(tmp_path / "a.txt"), tokenizer=tokenizer, cache=str(tmp_path / "cache"))
    assert store.manifest.dtype == "uint32"
    assert store.vocab_size == vocab_end + 1
    tokens = store.samples(np.array([0]), store.num_tokens - 1)[0].tolist()
    assert tokens == _reference(["the <far> cat"], tokenizer)
    assert vocab_end in tokens


def _counting(calls: list[int]) -> Callable[[Callable[..., Any], list[tuple[Any, ...]]], list[Any]]:
    def run(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
        calls.append(len(arguments))
        # What a remote runner does to both.
        sent = pickle.loads(pickle.dumps((function, arguments)))
        return [pickle.loads(pickle.dumps(sent[0](*one))) for one in reversed(sent[1])][::-1]

    return run


def test_store_is_reused_until_a_file_changes(corpus: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    runner = _counting(calls)

    def again(**other: Any) -> TokenStore:
        arguments = {"source": str(corpus), "cache": str(tmp_path / "cache"), "run_tasks": runner, **other}
        return prepare(tokenizer="bytes", **arguments)

    first = again()
    assert again().digest == first.digest
    moved = corpus.rename(tmp_path / "elsewhere")
    assert again(source=str(moved)).digest == first.digest
    assert len(calls) == 1, "reused, also when the source lies elsewhere"
    text = (moved / "c.md").read_text()
    (moved / "c.md").write_text(text.swapcase() + "!")
    changed = again(source=str(moved))
    assert len(calls) == 2
    assert changed.digest != first.digest
    (moved / "c.md").write_text(text)
    assert again(source=str(moved)).digest == first.digest
    assert len(calls) == 2, "both are in the cache"


def test_digest_does_not_depend_on_tasks_or_paths(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = []
    for max_tasks in (1, 2, 3, 16):
        monkeypatch.setattr(build, "MAX_TASKS", max_tasks)
        calls: list[int] = []
        cache = str(tmp_path / f"cache{max_tasks}")
        stores.append(prepare(source=str(corpus), tokenizer="bytes", cache=cache, run_tasks=_counting(calls)))
        assert 1 <= calls[0] <= max_tasks
    assert len({store.digest for store in stores}) == 1
    assert len({len(store.manifest.shards) for store in stores}) > 1
    everything = [store.samples(np.arange(store.num_samples(5)), 5).tolist() for store in stores]
    assert all(one == everything[0] for one in everything)
    assert str(tmp_path) not in (stores[0].directory / "MANIFEST.json").read_text()


def test_tasks_may_run_in_another_working_directory(
    corpus: Path, tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            return [function(*one) for one in arguments]

    build._load.cache_clear()
    monkeypatch.chdir(tmp_path)
    tokenizer = os.path.relpath(bpe / "tokenizer.json")
    store = prepare(source="corpus", tokenizer=tokenizer, cache="cache", run_tasks=run)
    assert store.num_tokens == len(_reference(CORPUS, tokenizer))


@settings(print_blob=True)
@given(sizes=st.lists(st.integers(-1, 10**12), min_size=1, max_size=60), max_groups=st.integers(1, 16))
def test_groups_keep_the_order_and_are_balanced(sizes: list[int], max_groups: int) -> None:
    groups = cutting.group(sizes, max_groups)
    assert [i for members in groups for i in members] == list(range(len(sizes)))
    assert 1 <= len(groups) <= max_groups
    weights = [max(size, 1) for size in sizes]
    fair = sum(weights) / max_groups
    assert max(sum(weights[i] for i in members) for members in groups) <= fair + max(weights) + 1


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated shard": lambda store: os.truncate(store / "shard-00000.bin", 2),
    "shard gone": lambda store: os.unlink(store / "shard-00000.bin"),
    "length of a document": lambda store: _flip(store / "shard-00000.documents"),
    "documents gone": lambda store: os.unlink(store / "shard-00000.documents"),
    "flipped bit": lambda store: _flip(store / "shard-00000.bin"),
    "torn manifest": lambda store: os.truncate(store / "MANIFEST.json", 100),
    "manifest gone": lambda store: os.unlink(store / "MANIFEST.json"),
    "other version": lambda store: _replace(store, '"format_version": 3', '"format_version": 2'),
    "altered manifest": lambda store: _replace(store, '"vocab_size": 257', '"vocab_size": 300'),
    "not an object": lambda store: (store / "MANIFEST.json").write_text("[]"),
    "not a directory": lambda store: (store.rename(store.parent / "away"), store.write_text("")),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _replace(store: Path, old: str, new: str) -> None:
    text = (store / "MANIFEST.json").read_text()
    assert old in text
    (store / "MANIFEST.json").write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_store_is_found_and_rebuilt(corpus: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    good = prepare(source=str(corpus), tokenizer="bytes", cache=str(cache))
    DAMAGES[damage](good.directory)
    with pytest.raises(BrokenStoreError):
        TokenStore(good.directory, verify=True)
    calls: list[int] = []
    store = prepare(source=str(corpus), tokenizer="bytes", cache=str(cache), run_tasks=_counting(calls))
    assert len(calls) == 1
    store.verify()
    assert store.digest == good.digest
    assert [p.name for p in cache.glob("tokens-*.*") if p.suffix != ".lock"] == []


def test_verify_finds_a_flipped_bit_that_sizes_do_not_show(corpus: Path, tmp_path: Path) -> None:
    good = prepare(source=str(corpus), tokenizer="bytes", cache=str(tmp_path / "cache"))
    _flip(good.directory / "shard-00000.bin")
    with pytest.raises(DataError, match=r"shard-00000\.bin: its content is not what was written"):
        TokenStore(good.directory).verify()


def test_expected_digest(corpus: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "source": str(corpus),
        "tokenizer": "bytes",
        "cache": str(tmp_path / "cache"),
    }
    digest = prepare(**arguments).digest
    assert prepare(**arguments, expect=digest).digest == digest
    with pytest.raises(DataError, match=r"sha256:feed.*the nodes' sources differ"):
        prepare(**arguments, expect="sha256:feed")


def test_file_that_changes_during_the_build_is_named(corpus: Path, tmp_path: Path) -> None:
    def run(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
        with open(corpus / "a.txt", "a") as stream:
            stream.write("more")
        return [function(*one) for one in arguments]

    with pytest.raises(DataError, match=r"a\.txt: on .* it is not what it was"):
        prepare(source=str(corpus), tokenizer="bytes", cache=str(tmp_path / "cache"), run_tasks=run)


def test_cache_that_cannot_be_written_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=f"{tmp_path}/cache/tokens-.* cannot be written"):
        prepare(source=str(corpus), tokenizer="bytes", cache=str(tmp_path / "cache"))


def test_default_cache_follows_the_environment(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    store = prepare(source=str(corpus), tokenizer="bytes")
    assert store.directory.parent == tmp_path / "xdg" / "elastic-orchestrator"


def _prepare_at_once(
    source: str, cache: str, locks: bool, barrier: Any, results: Any
) -> None:  # in a process of its own
    if not locks:

        def refuse(*_: object) -> None:
            raise OSError("no locks here")

        build.fcntl.flock = refuse  # type: ignore[assignment]

    def run(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
        if not locks:
            barrier.wait(timeout=30)  # both are in the middle of a build
        return [function(*one) for one in arguments]

    if locks:
        barrier.wait(timeout=30)
    store = prepare(source=source, tokenizer="bytes", cache=cache, run_tasks=run)
    store.verify()
    results.put((store.digest, store.samples(np.array([0]), 5).tolist()))


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_two_builders_at_once_both_end_well(corpus: Path, tmp_path: Path, locks: bool) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    cache = tmp_path / "cache"
    arguments = (str(corpus), str(cache), locks, barrier, results)
    builders = [context.Process(target=_prepare_at_once, args=arguments) for _ in range(2)]
    for builder in builders:
        builder.start()
    first, second = results.get(timeout=30), results.get(timeout=30)
    for builder in builders:
        builder.join(timeout=30)
        assert builder.exitcode == 0
    assert first == second
    store = _store_directory(cache)
    assert {path.name for path in cache.iterdir()} == {store.name, store.name + ".lock"}


def test_what_a_dead_builder_left_is_removed(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    pid = os.fork()
    if pid == 0:
        # Dies in the middle of its build, holding the lock.
        prepare(source=str(corpus), tokenizer="bytes", cache=str(cache), run_tasks=lambda *_: os._exit(9))  # type: ignore[arg-type,return-value]
    os.waitpid(pid, 0)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    store = prepare(source=str(corpus), tokenizer="bytes", cache=str(cache))
    assert {path.name for path in cache.iterdir()} == {store.directory.name, store.directory.name + ".lock"}


def test_standard_library_is_text_enough_and_quick(tmp_path: Path) -> None:
    start = time.perf_counter()
    store = prepare(source="python-stdlib", tokenizer="bytes", cache=str(tmp_path))
    built = time.perf_counter() - start
    assert store.num_tokens > 8_000_000
    assert built < 20, "it takes about 0.1 s"
    names = [file.name for file in store.manifest.files]
    assert "json/__init__.py" in names
    assert not any({"site-packages", "test", "tests"} & set(name.split("/")) for name in names)
    # Compared the slow way for one file in the middle.
    middle = len(names) // 2
    start_token = sum(file.tokens for file in store.manifest.files[:middle])
    text = Path(json.__file__).parents[1].joinpath(names[middle]).read_bytes()
    length = 64
    ids = np.arange(start_token // length, (start_token + len(text)) // length + 1)
    tokens = np.append(store.samples(ids, length)[:, :-1].reshape(-1), 0)[start_token % length :]
    assert bytes(tokens[: len(text)].astype(np.uint8)) == text
    assert tokens[len(text)] == 256
    with pytest.raises(DataError, match="python-stdlib is text, not jsonl"):
        resolve_files("python-stdlib", "jsonl")


def test_import_is_cheap() -> None:
    heavy = "{'ray', 'torch', 'pydantic', 'transformers', 'tokenizers', 'pyarrow', 'fsspec'}"
    code = f"import sys, orchestrator.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- ledger ---------------------------------------------------------------------------------------

JOB: dict[str, Any] = {"num_samples": 50, "global_batch": 8, "virtual_workers": 4, "seed": 3, "shuffle": True}


def _records(steps: int, **job: Any) -> list[dict[str, Any]]:
    sampler = Sampler(**{**JOB, **job})
    workers = range(sampler.virtual_workers)
    hashes = [[virtual_worker_hash(sampler.sample_ids(step, w)) for w in workers] for step in range(steps)]
    return [{"step": step, "samples": step_hash(hashes[step]), "loss": 1.0} for step in range(steps)]


def test_hashes_are_pinned() -> None:
    ids = np.array([1, 2, 3])
    assert virtual_worker_hash(ids) == virtual_worker_hash(ids.astype(np.int32))
    assert virtual_worker_hash(ids) != virtual_worker_hash(ids[::-1])
    hashes = [virtual_worker_hash(np.array([i])) for i in range(64)]
    assert all(-(2**63) <= one < 2**63 for one in hashes)
    assert min(hashes) < 0 < max(hashes)
    assert step_hash([1, -2]) != step_hash([-2, 1])
    assert len(step_hash([0])) == 32


def test_data_digest_is_over_the_triples() -> None:
    import hashlib

    sampler = Sampler(**JOB)
    triples = [
        (step, worker, int(one))
        for step in range(10)
        for worker in range(4)
        for one in sampler.sample_ids(step, worker)
    ]
    expected = hashlib.sha256(np.array(triples, dtype="<i8").tobytes()).hexdigest()
    assert data_digest(_records(10), sampler) == f"sha256:{expected}"
    assert data_digest(({"step": step} for step in range(10)), sampler) == f"sha256:{expected}"
    with pytest.raises(DataError, match="step 0: its samples hash to"):
        data_digest(_records(10, seed=4), sampler)


def test_audit_accepts_what_the_job_says(tmp_path: Path) -> None:
    # 15 steps of 8 in epochs of 50: two epochs and 20 samples of the third; steps 6 and 12 straddle.
    path = _jsonl(tmp_path / "metrics.jsonl", _records(15))
    report = audit(path, **JOB)
    assert report.ok
    assert report.problems == []
    assert (report.steps, report.samples) == (15, 120)
    assert (report.epochs_complete, report.partial_epoch_samples) == (2, 20)
    assert report.data_digest == data_digest(_records(15), Sampler(**JOB))
    with path.open("a") as stream:
        stream.write('{"step": 15, "sam')
    assert audit(path, **JOB) == report, "a torn last line is no committed step"
    path.write_text("")
    assert audit(path, **JOB).steps == 0


def test_audit_of_whole_epochs_and_of_batches_larger_than_an_epoch(tmp_path: Path) -> None:
    report = audit(_jsonl(tmp_path / "m.jsonl", _records(25)), **JOB)
    assert (report.ok, report.epochs_complete, report.partial_epoch_samples) == (True, 4, 0)
    job = {**JOB, "num_samples": 3}
    report = audit(_jsonl(tmp_path / "m.jsonl", _records(4, num_samples=3)), **job)
    assert (report.ok, report.epochs_complete, report.partial_epoch_samples) == (True, 10, 2)


def _swap(records: list[dict[str, Any]], one: int, other: int) -> Iterator[dict[str, Any]]:
    order = list(range(len(records)))
    order[one], order[other] = order[other], order[one]
    return (records[i] for i in order)


TAMPERINGS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "duplicated": (lambda r: [*r[:6], r[5], *r[6:]], ":7: step 5 where step 6 was expected"),
    "missing": (lambda r: [*r[:5], *r[6:]], ":6: step 6 where step 5 was expected"),
    "first missing": (lambda r: r[1:], ":1: step 1 where step 0 was expected"),
    "altered": (lambda r: [*r[:4], {**r[4], "samples": r[3]["samples"]}, *r[5:]], ":5: step 4 used samples"),
    "renumbered": (
        lambda r: [{**one, "samples": r[-1 - i]["samples"]} for i, one in enumerate(r)],
        "job says",
    ),
    "reordered": (lambda r: _swap(r, 3, 4), ":4: step 4 where step 3 was expected"),
    "no hash": (lambda r: [{"step": 0}, *r[1:]], ":1: step 0 used samples None"),
    "no step": (lambda r: [{"samples": "x"}, *r[1:]], ":1: step is None"),
    "true is no step": (lambda r: [r[0], {**r[1], "step": True}, *r[2:]], ":2: step is True"),
    "no object": (lambda r: [[], *r], ":1: not a JSON object"),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_audit_rejects(tmp_path: Path, tampering: str) -> None:
    change, problem = TAMPERINGS[tampering]
    report = audit(_jsonl(tmp_path / "metrics.jsonl", list(change(_records(15)))), **JOB)
    assert not report.ok
    assert report.data_digest == ""
    assert any(problem in one for one in report.problems), report.problems


def test_audit_rejects_another_jobs_run_and_a_broken_line(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "metrics.jsonl", _records(40))
    for change in ({"seed": 4}, {"num_samples": 51}, {"shuffle": False}, {"virtual_workers": 2}):
        report = audit(path, **{**JOB, **change})
        assert not report.ok
        assert len(report.problems) <= 21
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:10]
    path.write_text("\n".join(lines) + "\n")
    assert f"{path}:3: not valid JSON" in audit(path, **JOB).problems
    with pytest.raises(DataError, match=r"none\.jsonl"):
        audit(tmp_path / "none.jsonl", **JOB)


@pytest.mark.parametrize("at", [1, -1], ids=["in one step", "in two steps"])
def test_audit_counts_ids_rather_than_trusting_the_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Were the permutation not one, ledger and sampler would still agree; the count of ids must not."""
    honest = Sampler._epoch_ids
    order = honest(Sampler(**JOB), 0, 0, JOB["num_samples"])
    used, lost = order[0], order[at]

    def lossy(self: Sampler, epoch: int, first: int, length: int) -> Any:
        ids = honest(self, epoch, first, length)
        return np.where(ids == lost, used, ids)

    monkeypatch.setattr(Sampler, "_epoch_ids", lossy)
    report = audit(_jsonl(tmp_path / "metrics.jsonl", _records(15)), **JOB)
    assert not report.ok
    assert any(f"epoch 0 uses 1 samples again, among them [{used}]" in one for one in report.problems)
    assert any("epoch 0 is over, yet 1 of its 50 samples were never used" in one for one in report.problems)
    assert report.epochs_complete == 0


def test_audit_of_random_tampering(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    good = _records(30)
    for _ in range(50):
        records = [dict(record) for record in good]
        for _ in range(rng.randint(1, 3)):
            records[rng.randrange(30)] = dict(rng.choice(good))
        path = _jsonl(tmp_path / "metrics.jsonl", records)
        assert audit(path, **JOB).ok == (records == good)
