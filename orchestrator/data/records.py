"""Records of the shapes that people train on, as sequences of tokens: which of them count, and the record's label.

The shapes and the names of their fields are TRL's. What a token is to training is told with the token itself: the
highest bit of those that a model is trained to predict is set (MARK), and a label follows the tokens. So whatever keeps
tokens (stores, their digests, copies of them) keeps that, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.chat import BadConversation, ChatTemplate, Spans, check_messages
from orchestrator.data.labels import BadLabel, LabelSpec
from orchestrator.data.tokenizers import Tokenizer

MARK = np.uint32(1 << 31)
"""Set in the id of a token that the model is trained to predict."""

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt-completion": ("prompt", "completion"),
    "labelled": ("text", "label"),
    "pair": ("anchor", "positive"),
    "tokens": ("input_ids",),
    "text": ("text",),
}
"""What a record of each shape must have; beside it `messages` may have tools, `preference` a prompt, `labelled` a
text_pair, `tokens` labels."""
Counts = Literal["auto", "all", "completion", "assistant", "last"]


class BadRecord(ValueError):
    """A record that cannot be used; the message says why, and the reader of the file where it is."""


@dataclass(frozen=True)
class RecordSpec:
    """What becomes of records: plain values, all of which decide what a store holds.

    `shapes` are those that are taken, the first that fits. `counts` says which tokens are trained on: those of the
    completion, of all the assistant said, all; `last` marks one after the text, where the model's answer is read off;
    `auto` is what fits the shape. `length` is how many tokens a sequence may have: what is longer loses its `truncate`d
    end or start, or is an error. `sequences` is how many a record gives. `fields` maps our names of fields to those of
    the records, which may have dots. `chat_template` is the text of one; "" takes the tokenizer's.
    """

    shapes: tuple[str, ...]
    length: int
    counts: Counts = "auto"
    sequences: int = 1
    labels: LabelSpec | None = None
    fields: tuple[tuple[str, str], ...] = ()
    chat_template: str = ""
    add_bos: bool = False
    truncate: Literal["end", "start", "error"] = "end"
    skips: bool = False
    """Whether bad records are left out, and counted, or end it."""

    @property
    def label_words(self) -> int:
        """Of each sequence."""
        return 0 if self.labels is None else self.labels.words


class Part(NamedTuple):
    """A text to be tokenised, the spans of it that count, and whether an end of document follows, and counts."""

    text: str
    counting: Spans
    ends: bool = True
    end_counts: bool = True
    is_rendered: bool = False
    """By a chat template that does not say itself what counts."""


@dataclass
class Encoder:
    """Makes sequences of records, with a tokenizer."""

    spec: RecordSpec
    tokenizer: Tokenizer
    skipped: int = 0
    first_skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = dict(self.spec.fields)
        text = self.spec.chat_template or getattr(self.tokenizer, "chat_template", "") or ""
        self._template = ChatTemplate(text, getattr(self.tokenizer, "special_tokens", {})) if text else None

    def encode(self, record: Mapping[str, Any]) -> list[NDArray[np.uint32]]:
        """The sequences of a record: marked ids, and behind them the words of its label. Raises BadRecord."""
        shape = self._shape_of(record)
        try:
            if shape == "tokens":
                sequences = [self._given(record)]
            else:
                sequences = [self._ids_of(part) for part in self._parts(shape, record)]
            found = [self._cut(sequence) for sequence in sequences]
            labels = self.spec.labels
            if labels is None:
                return found
            words = labels.encode(self._get(record, "label"))
        except BadLabel as error:
            raise BadRecord(f"{self._name('label')} {error}") from error
        except BadConversation as error:
            raise BadRecord(str(error)) from error
        return [np.concatenate([sequence, words]) for sequence in found]

    # ------------------------------------------------------------------------------------ what it is

    def _name(self, field: str) -> str:
        return self._names.get(field, field)

    def _get(self, record: Mapping[str, Any], field: str) -> Any:
        value: Any = record
        for part in self._name(field).split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def _shape_of(self, record: Mapping[str, Any]) -> str:
        for shape in self.spec.shapes:
            if all(self._get(record, each) is not None for each in FIELDS[shape]):
                return shape
        wanted = " or ".join(" + ".join(self._name(each) for each in FIELDS[shape]) for shape in self.spec.shapes)
        raise BadRecord(f"has the fields {sorted(record)[:10]}, and {wanted} is wanted; data.fields maps other names")

    def _text(self, record: Mapping[str, Any], field: str) -> str:
        value = self._get(record, field)
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadRecord(f"field {self._name(field)!r} holds a lone surrogate: {error}") from error
            return value
        raise BadRecord(f"field {self._name(field)!r} is {type(value).__name__}, not a string")

    # ------------------------------------------------------------------------------------ what it says

    def _parts(self, shape: str, record: Mapping[str, Any]) -> list[Part]:
        match shape:
            case "messages":
                return [self._conversation(record)]
            case "preference":
                return [self._answer(record, "chosen"), self._answer(record, "rejected")]
            case "prompt-completion" | "unpaired":
                return [self._answer(record, "completion")]
            case "pair":
                return [self._whole(self._text(record, each)) for each in ("anchor", "positive")]
            case "labelled" if self._get(record, "text_pair") is not None:
                first, second = self._text(record, "text"), self._text(record, "text_pair")
                return [self._whole(f"{first}\n{second}")]
        return [self._whole(self._text(record, "text"))]

    def _whole(self, text: str) -> Part:
        if self.spec.counts == "last":
            return Part(text, [])
        return Part(text, [(0, len(text))])

    def _conversation(self, record: Mapping[str, Any]) -> Part:
        messages = check_messages(self._name("messages"), self._get(record, "messages"), self._names)
        return self._rendered(messages, self._get(record, "tools"), prompt=None)

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, prompt: list[dict[str, Any]] | None) -> Part:
        """A conversation, of which `prompt` is the part that is no answer (None: what the assistant said is)."""
        template = self._template
        if template is None:
            raise BadRecord("messages need a chat template: the tokenizer has none, name one with data.chat_template")
        said = messages[-1]["role"] == "assistant"
        counts = self.spec.counts
        if counts == "all":
            text = template.render(messages, tools)
            return Part(text, [(0, len(text))], is_rendered=not template.is_marked)
        if counts == "last":
            return Part(template.render(messages, tools), [])
        if counts == "completion" or (prompt is not None and counts == "auto"):
            given = messages[:-1] if prompt is None else prompt
            text = template.render(messages, tools)
            before = template.render(given, tools, ask=True) if given else ""
            if not text.startswith(before):
                raise BadRecord("the chat template renders the prompt otherwise when an answer follows it")
            return Part(text, [(len(before), len(text))], end_counts=said, is_rendered=not template.is_marked)
        text, spans = template.render_parts(messages, tools)
        if not spans:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise BadRecord(f"no message is the assistant's, so that there is nothing to train on (roles: {roles})")
        if prompt is not None:
            first = len(template.render(prompt, tools))
            spans = [span for span in spans if span[0] >= first]
        return Part(text, spans, end_counts=said, is_rendered=not template.is_marked)

    def _answer(self, record: Mapping[str, Any], field: str) -> Part:
        """A prompt and what follows it: texts, or messages (where the prompt may be the ones that answers share)."""
        answer, prompt = self._get(record, field), self._get(record, "prompt")
        if isinstance(answer, list):
            messages = check_messages(self._name(field), answer, self._names)
            if prompt is None:
                given = messages[:-1]
            else:
                given = check_messages(self._name("prompt"), prompt, self._names) if isinstance(prompt, list) else [
                    {"role": "user", "content": self._text(record, "prompt")}
                ]  # fmt: skip
                messages = [*given, *messages]
            return self._rendered(messages, self._get(record, "tools"), prompt=given)
        before = "" if prompt is None else self._text(record, "prompt")
        text = before + self._text(record, field)
        if self.spec.counts == "last":
            return Part(text, [])
        return Part(text, [(0 if self.spec.counts == "all" else len(before), len(text))])

    # ------------------------------------------------------------------------------------ its tokens

    def _ids_of(self, part: Part) -> NDArray[np.uint32]:
        ids, starts = self.tokenizer.encode_with_starts(part.text)
        counts = np.zeros(len(ids), dtype=np.bool_)
        end = self.tokenizer.end_of_document
        for first, last in part.counting:
            inside = (starts >= first) & (starts < last)
            if part.is_rendered:
                inside &= ~self._is_behind_end(part.text, ids, starts, inside, last)
            counts |= inside
        if part.ends and not (self.spec.counts != "last" and self._ends(part, ids, starts)):
            ids, counts = np.append(ids, np.uint32(end)), np.append(counts, part.end_counts)
        if self.spec.add_bos:
            first_id = getattr(self.tokenizer, "begin_of_document", None)
            assert first_id is not None, "checked when the data was prepared"
            if not (len(ids) and ids[0] == first_id):  # A chat template may have it.
                ids, counts = np.append(np.uint32(first_id), ids), np.append(False, counts)
        return np.where(counts, ids | MARK, ids).astype(np.uint32)

    def _ends(self, part: Part, ids: NDArray[np.uint32], starts: NDArray[np.int64]) -> bool:
        """Whether the last that it has, but for white space of a chat template, is an end of document."""
        places = np.flatnonzero(ids == self.tokenizer.end_of_document)
        if not len(places):
            return False
        last = int(places[-1])
        return last == len(ids) - 1 or (part.is_rendered and part.text[int(starts[last + 1]) :].isspace())

    def _is_behind_end(
        self, text: str, ids: NDArray[np.uint32], starts: NDArray[np.int64], inside: NDArray[np.bool_], last: int
    ) -> NDArray[np.bool_]:
        """Which tokens are white space between what ends an answer, `inside` of the text up to `last`, and the next
        message: a chat template's, which nobody is to say."""
        places = np.flatnonzero(inside & (ids == self.tokenizer.end_of_document))
        behind = np.zeros(len(ids), dtype=np.bool_)
        if len(places) and (first := int(places[-1]) + 1) < len(ids) and text[int(starts[first]) : last].isspace():
            behind[first:] = True
        return behind

    def _given(self, record: Mapping[str, Any]) -> NDArray[np.uint32]:
        """The ids that a record has, marked by its `labels` (IGNORED ones do not count), or all."""
        given, labels = self._get(record, "input_ids"), self._get(record, "labels")
        ids = _integers(self._name("input_ids"), given)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size):
            size = self.tokenizer.vocab_size
            raise BadRecord(f"has ids from {ids.min()} to {ids.max()}, and data.tokenizer has {size}")
        counts = np.ones(len(ids), dtype=np.bool_)
        if labels is not None:
            targets = _integers(self._name("labels"), labels)
            if len(targets) != len(ids):
                raise BadRecord(f"has {len(ids)} input_ids and {len(targets)} labels")
            counts = targets >= 0
        found = ids.astype(np.uint32)
        return np.where(counts, found | MARK, found).astype(np.uint32)

    def _cut(self, sequence: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """No more than the longest. Raises BadRecord for a sequence of which nothing counts."""
        spec, size = self.spec, len(sequence)
        if size > spec.length:
            if spec.truncate == "error":
                raise BadRecord(
                    f"has {size} tokens, and data.sequence_length {spec.length - 1} leaves room for {spec.length}"
                )
            if spec.counts == "last":
                kept = sequence[: spec.length - 1] if spec.truncate == "end" else sequence[size - spec.length : -1]
                sequence = np.append(kept, sequence[-1])
            else:
                sequence = sequence[: spec.length] if spec.truncate == "end" else sequence[-spec.length :]
        # The first token is not predicted from anything.
        if not (sequence[1:] & MARK).any():
            if size > spec.length:
                raise BadRecord(
                    f"has {size} tokens, of which the {spec.length} that data.sequence_length leaves have none that "
                    "counts: raise it, or set data.truncate"
                )
            raise BadRecord("has no token that counts: nothing to train on")
        return sequence


def _integers(field: str, value: Any) -> NDArray[np.int64]:
    if not isinstance(value, Sequence) or any(isinstance(each, bool) or not isinstance(each, int) for each in value):
        raise BadRecord(f"field {field!r} is no list of integers")
    return np.array(value, dtype=np.int64)
