"""`resources`: what each worker is given."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.job.fields import (
    CIRCUMSTANCES,
    NUMBERS,
    NUMBERS_LATER,
    CountFloat,
    EnvironmentName,
    EnvironmentValue,
    LabelCondition,
    LabelKey,
    PositiveFloat,
    Section,
    Text,
    listed,
)

Market = Literal["spot", "on-demand"]


class Resources(Section):
    """What Ray reserves for each worker, and on which nodes."""

    cpu: Annotated[PositiveFloat, NUMBERS] = 1.0
    gpu: Annotated[CountFloat, NUMBERS] = 0.0
    accelerators: Annotated[list[Text], NUMBERS_LATER] = Field(default_factory=list)
    """The kinds of GPU that workers may be given, by Ray's names (A100, T4, ...); any kind when empty."""
    accelerator: Annotated[Text | None, NUMBERS_LATER] = None
    """The same for one kind."""
    market: Annotated[list[Market], BeforeValidator(listed), CIRCUMSTANCES] = Field(default_factory=list)
    """Nodes that can be taken away at any time or others, by their label `ray.io/market-type`, the preferred first; any
    when empty."""
    labels: Annotated[dict[LabelKey, LabelCondition], CIRCUMSTANCES] = Field(default_factory=dict)
    """What the labels of a worker's node must be, in Ray's notation."""

    env: Annotated[dict[EnvironmentName, EnvironmentValue], CIRCUMSTANCES] = Field(default_factory=dict)
    """Variables of the environment of workers, for NCCL and the like: set before they import anything that reads them.
    """

    @property
    def kinds(self) -> list[str]:
        """The kinds of GPU that workers may be given; any when empty."""
        return self.accelerators if self.accelerator is None else [self.accelerator]

    def numerics(self) -> dict[str, Any]:
        """See `Section`. Two kinds of device need not round alike; one kind may be said in two ways."""
        found = super().numerics()
        found.pop("accelerator", None)
        return found | ({"accelerators": self.kinds} if self.kinds else {})
