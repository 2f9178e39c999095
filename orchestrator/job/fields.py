"""What the fields of a job file are made of: the section, its types of values, and what a field decides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from orchestrator import plugins
from orchestrator.job.rules import OWN_WORDS


@dataclass(frozen=True)
class Decides:
    """What a field decides. Every field of every section says so.

    The `numbers`: two jobs that agree in all of these give the same bits, and have the same digest. A field that came
    `later` than the first digests were written down is part of a digest only when it is not at its default: the digest
    of a job that does without it is what it was.
    """

    numbers: bool
    later: bool = False


NUMBERS = Decides(numbers=True)
"""The field is part of what decides the result."""
NUMBERS_LATER = Decides(numbers=True, later=True)
"""The same, for a field that is new: what every field that is added and decides numbers is marked with."""
CIRCUMSTANCES = Decides(numbers=False)
"""The field decides where, when and how fast, and never the result."""


class Section(BaseModel):
    """A mapping of fields in a job file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def numerics(self) -> dict[str, Any]:
        """The values, as JSON, of the fields that decide the numbers."""
        whole = self.model_dump(mode="json")
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            decides, value = decides_of(field), getattr(self, name)
            if not decides.numbers or (decides.later and value == field.get_default(call_default_factory=True)):
                continue
            found[name] = value.numerics() if isinstance(value, Section) else whole[name]
        return found


def decides_of(field: FieldInfo) -> Decides:
    """What a field says that it decides. Raises TypeError for one that does not."""
    for mark in field.metadata:
        if isinstance(mark, Decides):
            return mark
    raise TypeError(
        f"a field of a job must say what it decides (NUMBERS_LATER or CIRCUMSTANCES), this one does not: {field}"
    )


def matches(pattern: str, reason: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise PydanticCustomError(OWN_WORDS, "{reason}", {"reason": reason})
        return value

    return AfterValidator(check)


def named(kind: str, own: Iterable[str]) -> AfterValidator:
    """A name among those of a kind (see `orchestrator.plugins`): our own, and those of installed packages."""
    ours = tuple(own)

    def check(value: str) -> str:
        if value not in ours and value not in (known := plugins.names(kind, ours)):
            listed = f"must be one of {', '.join(known)}" if len(known) > 1 else f"can only be {known[0]}"
            raise PydanticCustomError(OWN_WORDS, "{reason}", {"reason": listed, "choices": known})
        return value

    return AfterValidator(check)


def pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError(OWN_WORDS, "must be a list of two numbers")
    return tuple(value)


def listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _kind(value: Any) -> str | None:
    """The branch of a union that a value means; without it pydantic reports the mistakes of every branch."""
    if isinstance(value, BaseModel):
        return "dict"  # What a mapping has become.
    return next((kind.__name__ for kind in (str, list, dict) if isinstance(value, kind)), None)


def one_of(*kinds: str, reason: str) -> Discriminator:
    def choose(value: Any) -> str | None:
        kind = _kind(value)
        return kind if kind in kinds else None

    return Discriminator(choose, custom_error_type=OWN_WORDS, custom_error_message=reason)


_IDENTIFIER = r"[A-Za-z_]\w*"
Name = Annotated[
    str,
    matches(
        r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        "must be 1 to 63 lower-case letters, digits and inner hyphens (it names actors and directories)",
    ),
]
FactoryPath = Annotated[
    str,
    matches(
        rf"{_IDENTIFIER}(\.{_IDENTIFIER})*:{_IDENTIFIER}",
        'must read "package.module:function"',
    ),
]
Text = Annotated[str, Field(min_length=1)]
EnvironmentName = Annotated[str, matches(_IDENTIFIER, "must be the name of a variable, like NCCL_IB_HCA")]


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


EnvironmentValue = Annotated[str, BeforeValidator(_as_text), matches(r"[^\x00]*", "must not have the character NUL")]
"""Of a variable: a number is its text; `true` and `no` have to be in quotes to be text."""
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[
    str,
    matches(
        rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL}",
        "must be a label's name, like orchestrator/disk or ray.io/region",
    ),
]
LabelCondition = Annotated[
    str,
    matches(
        rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))",
        "must be a value like us-west-2a, or one of !value, in(a,b) and !in(a,b)",
    ),
]
PositiveInt = Annotated[int, Field(ge=1)]
CountInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
CountFloat = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
