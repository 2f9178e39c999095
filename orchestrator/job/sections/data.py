"""`data`: what is read, and how it becomes samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from orchestrator.job.fields import (
    CIRCUMSTANCES,
    NUMBERS,
    NUMBERS_LATER,
    PositiveFloat,
    Section,
    Text,
    one_of,
)

Source = Annotated[
    Annotated[Text, Tag("str")] | Annotated[list[Text], Field(min_length=1), Tag("list")],
    one_of("str", "list", reason="must be a path, glob, URL or python-stdlib, or a list of them"),
]
Format = Literal["text", "jsonl", "json", "parquet", "csv", "tsv", "arrow", "npy", "bin"]


FIELD_NAMES = (
    "text", "prompt", "completion", "messages", "tools", "chosen", "rejected", "label", "text_pair", "anchor",
    "positive", "input_ids", "labels", "role", "content",
)  # fmt: skip
"""Our names of what records have; the last two of what each message has."""


class MixEntry(Section):
    """One of several sources; `format`, `field` and `document` are those of `data` where they are not given."""

    source: Annotated[Source, NUMBERS]
    weight: Annotated[PositiveFloat, NUMBERS]
    """Relative to the weights of the others: how many of its samples are used for one of theirs."""
    format: Annotated[Format | None, NUMBERS] = None
    field: Annotated[Text | None, NUMBERS] = None
    document: Annotated[Literal["file", "line", "record"] | None, NUMBERS] = None


class Data(Section):
    """What is read, and how it becomes samples of `sequence_length` tokens: exactly one of `source` and `mix`.

    More than 15 attributes: each is a question that data of some kind raises, and people look for all of them here."""

    source: Annotated[Source | None, NUMBERS] = None
    """Relative paths start at the current working directory."""
    mix: Annotated[Annotated[list[MixEntry], Field(min_length=1)] | None, NUMBERS_LATER] = None
    """Several sources, each with epochs of its own."""
    format: Annotated[Format | None, NUMBERS] = None
    """None: told from each file's suffix."""
    field: Annotated[Text, NUMBERS] = "text"
    """The field of a record that holds the text, where texts are trained on."""
    include: Annotated[list[Text], NUMBERS_LATER] = Field(default_factory=list)
    """Patterns (`*`, `?`, `[...]`): of a directory only files whose names in it fit one are read."""
    fields: Annotated[dict[str, Text], NUMBERS_LATER] = Field(default_factory=dict)
    """Where records have the fields that an objective wants: our name to theirs, with dots for fields inside."""
    chat_template: Annotated[Text | None, NUMBERS_LATER] = None
    """How messages become text: the path of a Jinja template, or its text. None: the tokenizer's."""
    add_bos: Annotated[bool, NUMBERS_LATER] = False
    """Whether each record begins with the tokenizer's token for that."""
    truncate: Annotated[Literal["end", "start", "error"], NUMBERS_LATER] = "end"
    """What a record that is longer than a row loses; error: there must be none."""
    on_bad_record: Annotated[Literal["error", "skip"], NUMBERS_LATER] = "error"
    """What happens to a record that cannot be used. skip: it is left out, counted and told of."""
    document: Annotated[Literal["file", "line", "record"] | None, NUMBERS_LATER] = None
    """What one document is. None: text files are one each, of jsonl and parquet each record is one."""
    tokenizer: Annotated[Text, NUMBERS] = "bytes"
    """`bytes` (257 ids; 256 ends a document), or a path or hub id."""
    sequence_length: Annotated[int, Field(ge=2), NUMBERS]
    """Tokens per sample; the most, with packing pad."""
    packing: Annotated[Literal["stream", "pack", "pad"], NUMBERS_LATER] = "stream"
    """How documents become samples. stream: end to end, cut anywhere. pack: whole ones side by side. pad: one each."""
    pad_to: Annotated[Literal["longest", "sequence_length"], NUMBERS_LATER] = "longest"
    """With packing pad, how long the rows of a micro-batch are: as the longest of them, or all alike."""
    document_mask: Annotated[bool, NUMBERS_LATER] = False
    """Whether a document is kept from attending to those before it in its sample."""
    shuffle: Annotated[bool, NUMBERS] = True
    cache: Annotated[Text | None, CIRCUMSTANCES] = None
    """The directory for token stores. None: the platform's choice."""
    mirrors: Annotated[list[Text], CIRCUMSTANCES] = Field(default_factory=list)
    """Directories or URLs with copies of the source's files, and of token stores, to be read where those fail."""
