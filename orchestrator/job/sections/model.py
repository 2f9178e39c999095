"""`model`: what is trained."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, Tag

from orchestrator.job.fields import (
    NUMBERS,
    NUMBERS_LATER,
    FactoryPath,
    Section,
    Text,
    matches,
    one_of,
)


class Model(Section):
    """What is trained: exactly one of `hf` and `factory`."""

    hf: Annotated[
        Annotated[
            Annotated[dict[str, Any], Tag("dict")] | Annotated[Text, Tag("str")],
            one_of("dict", "str", reason="must be a transformers config (a mapping), or a path or hub id"),
        ]
        | None,
        NUMBERS,
    ] = None
    """A transformers config with its `model_type`, or the path or hub id of one."""
    factory: Annotated[FactoryPath | None, NUMBERS] = None
    """`package.module:function`, called with `args`; returns the module to train."""
    args: Annotated[dict[str, Any], NUMBERS] = Field(default_factory=dict)
    allow_new: Annotated[list[Text], NUMBERS_LATER] = Field(default_factory=list)
    """Of a directory: patterns (`*`, `?`, `[...]`) of tensors that may be missing or of another shape there, and are
    initialised from the seed, or that the model has no place for."""
    untie: Annotated[bool, NUMBERS_LATER] = False
    """Of a directory whose head shares the embedding: the head begins as a copy of it, and they are trained apart."""
    content: Annotated[
        Annotated[str, matches(r"sha256:[0-9a-f]{64}", "must read sha256:<64 hexadecimal digits>")] | None,
        NUMBERS_LATER,
    ] = None
    """Of a directory: the digest of its files. Filled in when a run is prepared; given, it is what must be there."""

    def numerics(self) -> dict[str, Any]:
        """See `Section`. Two links to one directory are one model, by its content."""
        found = super().numerics()
        if self.content is not None:
            del found["hf"]
        return found
