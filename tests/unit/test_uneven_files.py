"""Data that is unevenly spread over files: it is dealt out by bytes, and however it is cut the tokens are the same."""

from __future__ import annotations

import io
import json
import os
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import DataError, TokenStore, build, documents, prepare, reading, resolve_files
from orchestrator.data import task_split as cutting
from orchestrator.data.opening import WHOLE, ByteSpan
from orchestrator.data.reading import Library
from orchestrator.data.task_split import cut

# ---------------------------------------------------------------------------------------- cutting


@settings(print_blob=True, deadline=None)
@given(
    files=st.lists(st.tuples(st.integers(-1, 10**9), st.booleans()), min_size=1, max_size=30),
    max_groups=st.integers(1, 16),
)
def test_pieces_cover_every_file_in_order_and_are_even(files: list[tuple[int, bool]], max_groups: int) -> None:
    sizes = [size for size, _ in files]
    groups = cut(sizes, [(lambda: ()) if is_cut else None for _, is_cut in files], max_groups)
    assert 1 <= len(groups) <= max_groups
    assert all(groups)
    pieces = [piece for members in groups for piece in members]
    at = 0
    for index, (size, is_cut) in enumerate(files):
        spans = []
        while at < len(pieces) and pieces[at].file == index:
            spans.append(pieces[at].span)
            at += 1
        assert spans[0].start == 0
        assert spans[-1].stop is None
        assert all(one.stop == after.start for one, after in pairwise(spans))
        assert is_cut or spans == [WHOLE]
        assert len(spans) == 1 or all((s.stop or size) - s.start >= cutting.MIN_PART_BYTES for s in spans)
    assert at == len(pieces)
    fair = sum(max(size, 1) for size in sizes) / max_groups
    whole = max([max(size, 1) for size, is_cut in files if not is_cut], default=0)
    for members in groups:
        assert sum(piece.weight for piece in members) <= fair + max(whole, 2 * cutting.MIN_PART_BYTES) + max_groups


def test_one_file_with_nearly_all_is_shared_by_all_tasks() -> None:
    sizes = [5 << 20] * 10 + [450 << 20] + [5 << 20] * 10
    groups = cut(sizes, [lambda: ()] * len(sizes), 16)
    weights = [sum(piece.weight for piece in members) for members in groups]
    assert len(weights) == 16
    assert max(weights) < 1.1 * sum(weights) / 16


def test_row_groups_are_dealt_by_their_weights() -> None:
    heavy = [10, 10, 10, 10, 400, 10, 10, 10, 10, 400]
    groups = cut([100 << 20], [lambda: heavy], 4)
    assert [piece.span for members in groups for piece in members] == [
        ByteSpan(0, 4),
        ByteSpan(4, 5),
        ByteSpan(5, 9),
        ByteSpan(9, None),
    ]
    assert cut([100 << 20], [lambda: [7]], 4) == [[cutting.FilePart(0, WHOLE, 100 << 20)]]
    asked: list[int] = []
    cut([1 << 20, 1 << 20], [lambda: asked.append(0) or [1, 1]] * 2, 2)  # type: ignore[func-returns-value]
    assert not asked, "row groups are looked at only where a file is to be cut"


# ---------------------------------------------------------------------------------------- documents


def _random_text(rng: random.Random, newlines: bool) -> str:
    letters = "aé漢🙂 \r" + ("\n" if newlines else "")
    return "".join(rng.choice(letters) for _ in range(rng.choice([0, 1, 5, 40, 300])))


def _random_file(rng: random.Random, directory: Path, number: int, kind: str) -> list[str]:
    """A file of random lines or records; its documents."""
    if kind == "line":
        lines = [_random_text(rng, newlines=False) for _ in range(rng.randint(1, 60))] + ["last"]
        text = "\n".join(lines) + rng.choice(["", "\n", "\n\n"])
        (directory / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
        return [line.removesuffix("\r") for line in lines if line.strip()]
    texts = [_random_text(rng, newlines=True) for _ in range(rng.randint(1, 60))]
    if kind == "parquet":
        import pyarrow.parquet

        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, directory / f"{number}.parquet", row_group_size=rng.randint(1, 9))
        return texts
    lines = [json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5) for text in texts]
    blank = [rng.choice(["", "", "\n", " \n"]) for _ in lines]
    content = "".join(f"{before}{line}\n" for before, line in zip(blank, lines, strict=True))
    (directory / f"{number}.jsonl").write_text(content, encoding="utf-8", newline="")
    return texts


def test_random_files_in_random_numbers_of_tasks_give_the_tokens_of_one_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for number in range(12):
        document = rng.choice(["line", "record"])
        kinds = ["line"] if document == "line" else ["jsonl", "parquet"]
        root = tmp_path / f"source{number}"
        root.mkdir()
        texts = [text for i in range(rng.randint(1, 4)) for text in _random_file(rng, root, i, rng.choice(kinds))]
        expected = [token for text in texts for token in [*text.encode(), 256]]
        stores = []
        for attempt in range(3):
            tasks = [1, rng.randint(2, 16), rng.randint(2, 60)][attempt]
            with monkeypatch.context() as patch:
                patch.setattr(build, "MAX_TASKS", tasks)
                patch.setattr(cutting, "MIN_PART_BYTES", 1)
                patch.setattr(reading, "RANGE_BYTES", rng.choice([256, 4000, 4 << 20]))
                cache = str(tmp_path / f"cache{number}-{attempt}")
                stores.append(prepare(source=str(root), document=document, tokenizer="bytes", cache=cache))
        for store in stores:
            store.verify()
            assert store.samples(np.array([0]), store.num_tokens - 1)[0].tolist() == expected
            assert store.digest == stores[0].digest
            assert store.manifest.key == stores[0].manifest.key
            assert store.manifest.files == stores[0].manifest.files
            on_disk = {path.name for path in store.directory.glob("shard-*.bin")}
            assert on_disk == {shard.name for shard in store.manifest.shards}


def test_one_large_file_is_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "MIN_PART_BYTES", 1 << 10)
    for name, count in (("a", 50), ("big", 9000), ("c", 50)):
        (tmp_path / f"{name}.txt").write_text("".join(f"line {i} of this file\n" for i in range(count)))
    lines = prepare(source=f"{tmp_path}/*.txt", document="line", tokenizer="bytes", cache=str(tmp_path / "cache"))
    tokens = [shard.tokens for shard in lines.manifest.shards]
    assert len(tokens) == 16
    assert max(tokens) < 1.1 * sum(tokens) / 16
    # A file that is a document stays whole: a tokenizer needs whole documents.
    whole = prepare(source=f"{tmp_path}/*.txt", tokenizer="bytes", cache=str(tmp_path / "cache"))
    assert max(shard.tokens for shard in whole.manifest.shards) > 0.9 * whole.num_tokens
    assert whole.manifest.key != lines.manifest.key


def test_one_huge_line_leaves_tasks_without_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "MIN_PART_BYTES", 1)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "y"}) + "\n")
    store = prepare(source=str(tmp_path / "a.jsonl"), tokenizer="bytes", cache=str(tmp_path / "cache"))
    assert store.num_tokens == 5003
    assert store.manifest.files[0].documents == 2
    assert 1 <= len(store.manifest.shards) <= 2
    TokenStore(store.directory, verify=True)


def _span_of(path: Path, part: int, parts: int) -> ByteSpan:
    size = path.stat().st_size
    return ByteSpan(size * part // parts, None if part == parts - 1 else size * (part + 1) // parts)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ('{"text": 7}', r"a\.jsonl:{line}: field 'text' is int"),
        ("{", r"a\.jsonl:{line}: not valid JSON"),
        ('{"txt": ""}', r"a\.jsonl:{line}: no field 'text'"),
        ("[]", r"a\.jsonl:{line}: a list"),
        ("\udcff", r"a\.jsonl: not UTF-8 at byte offset {offset} \(0xff\)"),
    ],
)
def test_a_mistake_in_a_part_is_told_by_its_place_in_the_file(tmp_path: Path, bad: str, expected: str) -> None:
    good = ['{"text": "fine"}', ""] * 50
    for at in (0, 1, 37, 99):
        lines = [*good[:at], bad, *good[at:]]
        content = ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
        (tmp_path / "a.jsonl").write_bytes(content)
        (file,) = resolve_files(str(tmp_path / "a.jsonl"))
        offset = sum(len(line) + 1 for line in lines[:at])
        message = expected.format(line=at + 1, offset=offset)
        told = []
        for part in range(4):
            try:
                list(documents(file, span=_span_of(tmp_path / "a.jsonl", part, 4)))
            except DataError as error:
                told.append(str(error))
        assert len(told) == 1
        assert re.search(message, told[0]), told


def test_a_mistake_in_a_row_group_is_told_by_its_row(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a"] * 25 + [None] + ["b"] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    (file,) = resolve_files(str(tmp_path / "a.parquet"))
    assert list(documents(file, span=ByteSpan(0, 2))) == ["a"] * 20
    with pytest.raises(DataError, match=r"a\.parquet: row 25: field 'text' is NoneType"):
        list(documents(file, span=ByteSpan(2, None)))


def test_a_file_without_documents_is_named_also_when_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "MIN_PART_BYTES", 1)
    (tmp_path / "a.txt").write_text("\n \n" * 100)
    with pytest.raises(DataError, match=r"a\.txt: holds no document"):
        prepare(source=str(tmp_path / "a.txt"), document="line", tokenizer="bytes", cache=str(tmp_path / "cache"))


def test_lines_lose_their_ends_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n  two \n\t\n\u2028 \nthree\r\rx".encode())
    (file,) = resolve_files(str(tmp_path / "a.txt"))
    assert list(documents(file, document="line")) == ["one", "  two ", "three\r\rx"]
    assert list(documents(file)) == list(documents(file, document="file"))


@pytest.mark.parametrize(
    ("name", "document", "fits"),
    [("a.txt", "record", "file or line"), ("a.jsonl", "line", "record"), ("a.parquet", "file", "record")],
)
def test_a_document_that_the_format_has_not_is_refused(tmp_path: Path, name: str, document: str, fits: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=rf"data\.document: {document} does not go with .*{name}, .* takes {fits};"):
        prepare(source=str(tmp_path), document=document, tokenizer="bytes", cache=str(tmp_path / ".cache"))


def test_keys_and_digests_of_stores_are_pinned(tmp_path: Path) -> None:
    """Other keys would build every store again, other digests would refuse to go on with a run."""
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"body": "4", "text": "five"}\n')

    def made(**options: Any) -> tuple[str, str]:
        options = {"source": str(tmp_path / "[ab].*"), **options}
        store = prepare(tokenizer="bytes", cache=str(tmp_path / "cache"), **options)
        return store.manifest.key, store.digest

    assert made() == (
        "fc6608ebbefd7961e04ccf741b2a1592",
        "sha256:23252a3e9095639947d73fdc456ebabf3577698d43736e20f9550465ed3418ec",
    )
    text = made(source=str(tmp_path / "a.txt"))
    assert made(source=str(tmp_path / "a.txt"), document="file") == text
    line = made(source=str(tmp_path / "a.txt"), document="line")
    assert line[0] != text[0]
    assert line[1] != text[1]
    record = made(source=str(tmp_path / "b.jsonl"))
    assert made(source=str(tmp_path / "b.jsonl"), document="record") == record


# ---------------------------------------------------------------------------------------- the reader as a file


def test_the_reader_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "RANGE_BYTES", 7)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    content = rng.randbytes(100)
    (tmp_path / "a.txt").write_bytes(content)
    (file,) = resolve_files(str(tmp_path / "a.txt"))
    moves: list[Callable[[Any], Any]] = []
    for _ in range(300):
        size, to = rng.choice([-1, 0, 1, 5, 7, 8, 30, 200]), rng.randint(0, 120)
        moves += [lambda f, n=size: f.read(n), lambda f, p=to: f.seek(p), lambda f: f.tell(), lambda f: f.readline()]
    rng.shuffle(moves)
    plain = io.BytesIO(content)
    with Library().open(file) as reader:
        for move in moves:
            assert move(reader) == move(plain)
        assert reader.seek(-3, os.SEEK_END) == 97
        assert reader.read() == content[-3:]
