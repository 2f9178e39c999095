"""`adapter`: a few parameters that are trained in place of the model's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from orchestrator.job.fields import NUMBERS, NUMBERS_LATER, Decay, PositiveFloat, PositiveInt, Section, Text, one_of


class Adapter(Section):
    """Low-rank matrices beside those of the model, which are frozen; by peft, with its names."""

    name: Annotated[Literal["lora", "dora", "rslora"], NUMBERS] = "lora"
    r: Annotated[PositiveInt, NUMBERS] = 8
    """The rank of the matrices."""
    alpha: Annotated[PositiveFloat, NUMBERS] = 16.0
    """What they give is multiplied by alpha / r, with rslora by alpha / sqrt(r)."""
    dropout: Annotated[Decay, NUMBERS] = 0.0
    target_modules: Annotated[
        Annotated[
            Annotated[Text, Tag("str")] | Annotated[list[Text], Field(min_length=1), Tag("list")],
            one_of("str", "list", reason="must be a list of names of modules, or all-linear, or a regular expression"),
        ],
        NUMBERS,
    ] = "all-linear"
    """The modules that get one, by the last parts of their names."""
    quantize_base: Annotated[Literal["none", "int8", "nf4"], NUMBERS_LATER] = "none"
    """What frozen linear modules are kept in, but for the head: int8 by row, or nf4 (4 bits, as QLoRA has it) in blocks
    of 64."""
    modules_to_save: Annotated[list[Text], NUMBERS] = Field(default_factory=list)
    """Modules that are trained whole beside it."""
