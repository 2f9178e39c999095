"""Records of every shape and format: what of them counts, what is refused and where, and what becomes of them."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from orchestrator.data import DataError, TokenStore, prepare
from orchestrator.data.dataset import DataPlan, Dataset
from orchestrator.data.encoding import Side
from orchestrator.data.labels import BadLabel, LabelSpec
from orchestrator.data.records import MARK, BadRecord, Encoder, RecordSpec
from orchestrator.data.tokenizers import ByteTokenizer
from tests.records_in_tests import CHATML, chats, labelled, write

END = 256


def spec(*shapes: str, **more: Any) -> RecordSpec:
    return RecordSpec(shapes or ("messages", "prompt-completion", "text"), **{"length": 200, **more})


def told(sequence: np.ndarray) -> tuple[str, str]:
    """What a sequence says, and those characters of it that count; the end of a document is a $."""
    ids, counts = sequence & ~MARK, (sequence & MARK) != 0
    letters = ["$" if i == END else chr(i) for i in ids.tolist()]
    return "".join(letters), "".join(x for x, c in zip(letters, counts, strict=True) if c)


def encoded(record: dict[str, Any], **more: Any) -> list[tuple[str, str]]:
    return [told(each) for each in Encoder(spec(**more), ByteTokenizer()).encode(record)]


# ---------------------------------------------------------------------------------------- what counts


def test_of_a_prompt_and_its_completion_the_completion_counts_and_its_end() -> None:
    assert encoded({"prompt": "ab", "completion": "cd"}) == [("abcd$", "cd$")]
    assert encoded({"prompt": "ab", "completion": "cd"}, counts="all") == [("abcd$", "abcd$")]
    assert encoded({"text": "ab"}) == [("ab$", "ab$")]


IM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen's: what ends an answer is the end of a document, and a line ends behind it."""


def chatml_tokenizer(directory: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from orchestrator.data.tokenizers import _byte_letters, load_tokenizer

    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(_byte_letters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(each, special=True) for each in ("<|im_start|>", "<|im_end|>", "<s>")])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<s>")
    made.chat_template = IM
    made.save_pretrained(directory)
    return load_tokenizer(str(directory))


def test_an_answer_that_its_template_ends_is_ended_once(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer(tmp_path)
    conversation = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"},
    ]  # fmt: skip

    def counting(record: dict[str, Any], **more: Any) -> tuple[list[str], list[str]]:
        (sequence,) = Encoder(spec(**more), tokenizer).encode(record)
        pieces = [tokenizer._backend.id_to_token(int(each)) for each in sequence & ~MARK]
        return pieces, [piece for piece, each in zip(pieces, sequence, strict=True) if each & MARK]

    pieces, counted = counting({"messages": conversation})
    assert counted == ["a", "<|im_end|>", "b", "<|im_end|>"]
    assert pieces[-2:] == ["<|im_end|>", "\u010a"], "nothing is added behind it"
    _, counted = counting({"prompt": conversation[:1], "completion": conversation[1:2]})
    assert counted == ["a", "<|im_end|>"]
    # What the template itself marks is as it says.
    marked = IM.replace("{{ m.content }}<|im_end|>\n", (
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    ))  # fmt: skip
    _, counted = counting({"messages": conversation}, chat_template=marked)
    assert counted[:3] == ["a", "<|im_end|>", "\u010a"]
    # A template may begin with the token that texts begin with.
    pieces, _ = counting({"messages": conversation}, add_bos=True)
    assert pieces[:2] == ["<s>", "<|im_start|>"]
    pieces, _ = counting({"messages": conversation}, add_bos=True, chat_template="<s>" + IM)
    assert pieces[:2] == ["<s>", "<|im_start|>"]
    # Of text nothing is taken for a template's.
    pieces, counted = counting({"text": "a<|im_end|>\n"})
    assert pieces == counted == ["a", "<|im_end|>", "\u010a", "<|im_end|>"]


def test_messages_may_have_other_names() -> None:
    share = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    names = (("content", "value"), ("messages", "conversations"), ("role", "from"))
    usual = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert encoded(share, fields=names, chat_template=PLAIN) == encoded(usual, chat_template=PLAIN)
    with pytest.raises(BadRecord, match=r"no role, only \['from', 'value'\]; data.fields maps other names of role and"):
        encoded(share, fields=(("messages", "conversations"),), chat_template=PLAIN)
    with pytest.raises(BadRecord, match=r"nothing to train on \(roles: user, bot\)"):
        encoded({"messages": [usual["messages"][0], {"role": "bot", "content": "a"}]}, chat_template=PLAIN)


def test_names_of_fields_are_those_that_records_have() -> None:
    from orchestrator.data.records import FIELDS
    from orchestrator.job.sections.data import FIELD_NAMES

    of_shapes = {name for names in FIELDS.values() for name in names}
    assert set(FIELD_NAMES) == of_shapes | {"tools", "text_pair", "labels", "role", "content"}


CHAT = [
    {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"},
]  # fmt: skip
PLAIN = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}.{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
"""A template that does not mark what the assistant says."""


@pytest.mark.parametrize(
    ("counts", "expected"), [("auto", "a.b.$"), ("assistant", "a.b.$"), ("completion", "b.$"), ("all", None)]
)
def test_of_messages_counts_what_the_assistant_said(counts: Any, expected: str | None) -> None:
    ((text, counting),) = encoded({"messages": CHAT}, counts=counts, chat_template=PLAIN)
    assert text == "[s]s.[u]q.[a]a.[u]r.[a]b.$"
    assert counting == (text if expected is None else expected)


def test_a_template_may_mark_what_the_assistant_said() -> None:
    ((text, counting),) = encoded({"messages": CHAT}, chat_template=CHATML)
    assert text == "<|system|>s<end><|user|>q<end><|assistant|>a<end><|user|>r<end><|assistant|>b<end>$"
    assert counting == "a<end>b<end>$"


def test_a_template_that_says_earlier_messages_otherwise_later_is_refused() -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(BadRecord, match=r"mark it in the template with \{% generation %\}"):
        encoded({"messages": CHAT}, chat_template=template)


def test_messages_without_a_template_and_without_an_answer_are_refused() -> None:
    with pytest.raises(BadRecord, match=r"the tokenizer has none, name one with data.chat_template"):
        encoded({"messages": CHAT})
    with pytest.raises(BadRecord, match=r"no message is the assistant's"):
        encoded({"messages": CHAT[:2]}, chat_template=PLAIN)


def test_characters_of_several_bytes_count_whole() -> None:
    found = Encoder(spec(), ByteTokenizer()).encode({"prompt": "ä€", "completion": "ö𝄞"})[0]
    ids, counts = found & ~MARK, (found & MARK) != 0
    assert bytes(ids[counts][:-1].astype(np.uint8).tolist()).decode() == "ö𝄞"
    assert bytes(ids[~counts].astype(np.uint8).tolist()).decode() == "ä€"


def test_preferences_share_a_prompt_as_text_or_as_messages() -> None:
    texts = {"prompt": "p", "chosen": "c", "rejected": "r"}
    found = [told(each) for each in Encoder(spec("preference"), ByteTokenizer()).encode(texts)]
    assert found == [("pc$", "c$"), ("pr$", "r$")]
    messages = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "c"}],
        "rejected": [{"role": "assistant", "content": "r"}],
    }
    made = Encoder(spec("preference", chat_template=PLAIN), ByteTokenizer())
    expected = [("[u]q.[a]c.$", "c.$"), ("[u]q.[a]r.$", "r.$")]
    assert [told(each) for each in made.encode(messages)] == expected
    whole = {key: messages["prompt"] + messages[key] for key in ("chosen", "rejected")}
    assert [told(each) for each in made.encode(whole)] == expected


def test_fields_may_have_other_names_and_be_inside_others() -> None:
    fields = (("completion", "meta.answer"), ("prompt", "q"))
    assert encoded({"q": "ab", "meta": {"answer": "cd"}}, fields=fields) == [("abcd$", "cd$")]
    with pytest.raises(BadRecord, match=r"has the fields \['a', 'b'\], and messages or q \+ meta.answer or text"):
        encoded({"a": 1, "b": 2}, fields=fields)


def test_what_is_too_long_loses_its_end_or_its_start() -> None:
    record = {"prompt": "abcd", "completion": "efgh"}
    assert encoded(record, length=6) == [("abcdef", "ef")]
    assert encoded(record, length=4, truncate="start") == [("fgh$", "fgh$")]
    with pytest.raises(BadRecord, match=r"has 9 tokens, and data.sequence_length 5 leaves room for 6"):
        encoded(record, length=6, truncate="error")
    with pytest.raises(BadRecord, match=r"has 9 tokens, of which the 4 that data.sequence_length leaves have none"):
        encoded(record, length=4)


def test_what_is_classified_keeps_the_place_where_it_is_read_off() -> None:
    made = Encoder(spec("labelled", counts="last", length=4, labels=LabelSpec("single", 3)), ByteTokenizer())
    (found,) = made.encode({"text": "abcdef", "label": 2})
    assert told(found[:-1]) == ("abc$", "$")
    assert found[-1] == 2


# ---------------------------------------------------------------------------------------- labels


def test_labels_are_classes_sets_numbers_or_yes_and_no() -> None:
    named = LabelSpec("single", 2, ("no", "yes"))
    assert [named.encode(each).tolist() for each in ("yes", 0)] == [[1], [0]]
    assert LabelSpec("single", 3).encode("2").tolist() == [2]
    many = LabelSpec("multi", 40)
    words = many.encode([0, 33])
    assert many.decode(words[None]).tolist() == [1 | 1 << 33]
    number = LabelSpec("number")
    bits = number.decode(number.encode(-1.5)[None])
    assert bits.astype(np.int32).view(np.float32).tolist() == [-1.5]
    assert LabelSpec("boolean").encode("false").tolist() == [0]


@pytest.mark.parametrize(
    ("made", "value", "said"),
    [
        (LabelSpec("single", 2, ("a", "b")), "c", "is 'c', not one of 'a', 'b'"),
        (LabelSpec("single", 2), 2, "there are 2 classes, 0 to 1"),
        (LabelSpec("single", 2), True, "not a number from 0 to 1"),
        (LabelSpec("multi", 3), 1.5, "not a list of classes"),
        (LabelSpec("number"), "x", "not a finite number"),
        (LabelSpec("number", 2), [1.0], "has 1 numbers, not 2"),
        (LabelSpec("boolean"), 2, "not true or false"),
    ],
)
def test_other_labels_are_refused(made: LabelSpec, value: Any, said: str) -> None:
    with pytest.raises(BadLabel, match=said):
        made.encode(value)


# ---------------------------------------------------------------------------------------- files

RECORDS = labelled(20)


def as_jsonl(path: Path) -> Path:
    return write(path.with_suffix(".jsonl"), RECORDS)


def as_json(path: Path) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(RECORDS), "utf-8")
    return path


def as_csv(path: Path) -> Path:
    return _csv(path.with_suffix(".csv"), ",")


def as_tsv(path: Path) -> Path:
    return _csv(path.with_suffix(".tsv"), "\t")


def _csv(path: Path, delimiter: str) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)
    return path


def as_parquet(path: Path) -> Path:
    import pyarrow.parquet

    path = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


def as_dataset(path: Path) -> Path:
    """As `datasets.save_to_disk` leaves them."""
    path.mkdir()
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.ipc.new_stream(str(path / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table, 7)
    (path / "state.json").write_text("{}")
    (path / "dataset_info.json").write_text("{}")
    return path


def packed(suffix: str, pack: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def made(path: Path) -> Path:
        plain = as_jsonl(path)
        found = plain.with_name(plain.name + suffix)
        found.write_bytes(pack(plain.read_bytes()))
        plain.unlink()
        return found

    return made


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)  # type: ignore[no-any-return]


CLASSES = spec("labelled", counts="last", labels=LabelSpec("single", 2))


def stored(source: Path, cache: Path, **more: Any) -> TokenStore:
    return prepare(source=str(source), tokenizer="bytes", cache=str(cache), **{"records": CLASSES, **more})


@pytest.mark.parametrize(
    "make",
    [
        as_jsonl, as_json, as_csv, as_tsv, as_parquet, as_dataset, packed(".gz", gzip.compress),
        packed(".bz2", bz2.compress), packed(".xz", lzma.compress), packed(".zst", zstd),
    ],
    ids=["jsonl", "json", "csv", "tsv", "parquet", "dataset", "gz", "bz2", "xz", "zst"],
)  # fmt: skip
def test_every_format_gives_the_same_tokens(make: Callable[[Path], Path], tmp_path: Path) -> None:
    expected = stored(as_jsonl(tmp_path / "expected"), tmp_path / "cache")
    found = stored(make(tmp_path / "found"), tmp_path / "cache")
    assert found.digest == expected.digest
    assert found.records is not None
    assert (found.records.sequences, found.records.label_words, found.records.skipped) == (1, 1, 0)


def test_a_packed_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = packed(".gz", lambda data: gzip.compress(data)[:-20])(tmp_path / "cut")
    with pytest.raises(DataError, match=r"cut.jsonl.gz: cannot be unpacked"):
        stored(path, tmp_path / "cache")


def test_a_dataset_of_several_splits_wants_one_named(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    as_dataset(tmp_path / "whole" / "train")
    (tmp_path / "whole" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"several splits of a dataset \(train\); name one of them: .*whole/train"):
        stored(tmp_path / "whole", tmp_path / "cache")


def test_of_a_directory_some_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    as_jsonl(tmp_path / "all" / "these")
    (tmp_path / "all" / "others.log").write_text("not this")
    found = stored(tmp_path / "all", tmp_path / "cache", include=["*.jsonl"])
    assert found.digest == stored(as_jsonl(tmp_path / "alone"), tmp_path / "cache").digest
    with pytest.raises(DataError, match=r"no file of .* fits \*.csv; it holds others.log, these.jsonl"):
        stored(tmp_path / "all", tmp_path / "cache", include=["*.csv"])


BAD = [{"text": "fine", "label": 1}, {"text": "other", "label": 7}, {"label": 1}, {"text": "good", "label": 0}]


def test_a_bad_record_ends_it_with_its_line_or_is_left_out_and_told(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", BAD)
    with pytest.raises(DataError, match=r"bad.jsonl:2: label is 7, and there are 2 classes.*data.on_bad_record: skip"):
        stored(path, tmp_path / "cache")
    found = stored(path, tmp_path / "cache", records=replace(CLASSES, skips=True))
    assert found.records is not None
    assert found.records.skipped == 2
    assert [each.split(": ")[0].rpartition("/")[2] for each in found.records.first_skipped] == [
        "bad.jsonl:2",
        "bad.jsonl:3",
    ]
    assert len(found.document_lengths()) == 2


def test_a_side_of_a_split_has_what_the_other_has_not_and_keeps_it(tmp_path: Path) -> None:
    """Whatever stands beside a record, it is on the same side."""
    whole, half = write(tmp_path / "w.jsonl", RECORDS), write(tmp_path / "h.jsonl", RECORDS[::2])

    def texts(path: Path, is_held_out: bool) -> set[bytes]:
        store = stored(path, tmp_path / "cache", side=Side(0.4, is_held_out))
        lengths = store.document_lengths()
        found, at = set(), 0
        for length in lengths.tolist():
            out = np.empty(length, dtype=np.int64)
            store.read(at, out)
            found.add(out.tobytes())
            at += length
        return found

    trained, held_out = texts(whole, False), texts(whole, True)
    assert not trained & held_out
    assert len(trained | held_out) == len({json.dumps(each) for each in RECORDS})
    assert texts(half, True) <= held_out
    assert texts(half, False) <= trained
    with pytest.raises(DataError, match="leaves nothing held out"):
        stored(write(tmp_path / "one.jsonl", RECORDS[:1]), tmp_path / "cache", side=Side(1e-9, True))


# ---------------------------------------------------------------------------------------- samples


def test_packed_chats_count_what_they_count_alone(tmp_path: Path) -> None:
    made = spec("messages", length=257, chat_template=CHATML)
    store = stored(write(tmp_path / "c.jsonl", chats(30)), tmp_path / "cache", records=made)
    plans = [DataPlan(256, 4, 2, 2, 0, packing=packing) for packing in ("pack", "pad")]
    together, apart = (Dataset([store], plan) for plan in plans)
    ids = [np.arange(each.num_samples, dtype=np.int64) for each in (together, apart)]
    targets = [int(each._line.targets(i).sum()) for each, i in zip((together, apart), ids, strict=True)]
    assert targets[0] == targets[1] > 0
    assert together.num_samples < apart.num_samples
    for each in (together, apart):
        batch = each.batch(0, 1)
        assert batch.marks is not None
        assert batch.documents is not None
        assert batch.num_targets == int((batch.marks[:, 1:] & (batch.documents[:, 1:] >= 0)).sum())


def test_samples_have_their_labels(tmp_path: Path) -> None:
    store = stored(as_jsonl(tmp_path / "l"), tmp_path / "cache")
    data = Dataset([store], DataPlan(64, 4, 2, 2, 0, packing="pad", labels=LabelSpec("single", 2)))
    seen = {}
    for step in range(5):
        for virtual_worker in range(2):
            batch = data.batch(step, virtual_worker)
            assert batch.labels is not None
            assert batch.step_labels is not None
            assert batch.step_samples == len(batch.step_labels) == 4
            seen |= dict(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True))
    assert [seen[index] for index in range(20)] == [record["label"] for record in RECORDS]


# ---------------------------------------------------------------------------------------- tokens of others


def test_tokens_that_others_made_are_documents(tmp_path: Path) -> None:
    line = np.array([1, 2, 3, END, 4, 5, END, 6], dtype=np.uint16)
    line.tofile(tmp_path / "nano.bin")
    np.save(tmp_path / "line.npy", line.astype(np.int32))
    names, cache = ("nano.bin", "line.npy"), str(tmp_path / "c")
    found = [prepare(source=str(tmp_path / name), tokenizer="bytes", cache=cache) for name in names]
    assert found[0].digest == found[1].digest
    assert found[0].document_lengths().tolist() == [4, 3, 1]


def test_megatrons_index_tells_documents(tmp_path: Path) -> None:
    np.arange(10, dtype=np.int32).tofile(tmp_path / "m.bin")
    lengths = np.array([3, 7], dtype="<i4")
    version, count, documents = (number.to_bytes(8, "little") for number in (1, 2, 3))
    head = b"MMIDIDX\x00\x00" + version + b"\x04" + count + documents
    (tmp_path / "m.idx").write_bytes(head + lengths.tobytes() + np.zeros(2, "<i8").tobytes())
    store = prepare(source=str(tmp_path / "m.bin"), tokenizer="bytes", cache=str(tmp_path / "c"))
    assert store.document_lengths().tolist() == [3, 7]
    (tmp_path / "m.bin").write_bytes(b"\x00" * 8)
    with pytest.raises(DataError, match=r"it has 2 tokens, and the index beside it tells of 10"):
        prepare(source=str(tmp_path / "m.bin"), tokenizer="bytes", cache=str(tmp_path / "c"))


def test_ids_that_the_tokenizer_does_not_have_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "line.npy", np.array([1, 300]))
    with pytest.raises(DataError, match=r"ids from 1 to 300, and data.tokenizer has 257"):
        prepare(source=str(tmp_path / "line.npy"), tokenizer="bytes", cache=str(tmp_path / "c"))
