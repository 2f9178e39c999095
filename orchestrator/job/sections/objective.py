"""`objective`: what the model is trained for."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.errors import PluginError
from orchestrator.job.fields import NUMBERS, NUMBERS_LATER, FactoryPath, Section, named
from orchestrator.job.kinds import objective_from, objective_named
from orchestrator.job.rules import OWN_WORDS
from strategies.objective.known import OBJECTIVES
from strategies.objective.objective import Objective as Kind


class Objective(Section):
    """Which, or a user's own (`factory`), and what that lets a job say: each objective has fields of its own, which
    docs/fine-tuning.md lists."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    name: Annotated[str, named("objectives", OBJECTIVES), NUMBERS] = "causal-lm"
    factory: Annotated[FactoryPath | None, NUMBERS_LATER] = None
    """`package.module:Class`, a subclass of `strategies.objective.objective.Objective`, in place of a name."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the job says beside the name."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _its_own_fields(self) -> Objective:
        given = self.settings
        try:
            kind = objective_named(self.name) if self.factory is None else objective_from(self.factory)
        except PluginError:
            return self  # Reported for the name.
        allowed = [field.name for field in dataclasses.fields(kind.Settings)]
        for key in given:
            if key not in allowed:
                known = f"; it takes {', '.join(allowed)}" if allowed else ", and takes no other fields"
                raise PydanticCustomError(
                    OWN_WORDS, "{reason}", {"reason": f"has the field {key}, which {kind.name} does not know{known}"}
                )
        # What it raises names the field.
        checked = _fields_of(kind.Settings).model_validate(given)
        try:
            kind.with_settings({key: getattr(checked, key) for key in given})
        except (ValueError, TypeError) as error:
            raise PydanticCustomError(OWN_WORDS, "{reason}", {"reason": str(error)}) from error
        return self

    def numerics(self) -> dict[str, Any]:
        """See `Section`: with what the objective is told. What another model is counts, not where it is."""
        told = self.settings
        if told.get("content") is not None:
            told.pop(self.made().another, None)
        return super().numerics() | told

    def made(self) -> Kind:
        """The objective. Raises PluginError."""
        kind = objective_named(self.name) if self.factory is None else objective_from(self.factory)
        return kind.with_settings(self.settings) if self.settings or _requires(kind) else kind


def _requires(kind: Kind) -> bool:
    """Whether there is something that a job has to say."""
    return any(map(_is_required, dataclasses.fields(kind.Settings)))


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def _fields_of(settings: type) -> type[BaseModel]:
    """The fields of a dataclass, with their types, as a schema. (Of a dataclass itself pydantic would want one.)"""
    types = get_type_hints(settings)
    fields: dict[str, Any] = {
        field.name: (types[field.name], ... if _is_required(field) else None) for field in dataclasses.fields(settings)
    }
    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return create_model(settings.__name__, __config__=strict, **fields)
