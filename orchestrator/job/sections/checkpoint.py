"""`checkpoint`: what is saved, where and when."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.job.fields import (
    CIRCUMSTANCES,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)


class Encryption(Section):
    """Where the key of encrypted checkpoints is: 32 bytes in hexadecimal or base64. One of the two."""

    key: Annotated[Text | None, CIRCUMSTANCES] = None
    """`${env:NAME}`: in that environment variable of the command that starts the run."""
    file: Annotated[Text | None, CIRCUMSTANCES] = None
    """In that file, on the machine where the run is started."""


class Checkpoint(Section):
    """A checkpoint is made when either interval is over, when the run ends, and on request."""

    storage: Annotated[Text | None, CIRCUMSTANCES] = None
    """A directory or fsspec URL. None: the run directory."""
    every_steps: Annotated[PositiveInt | None, CIRCUMSTANCES] = None
    every_seconds: Annotated[PositiveFloat | None, CIRCUMSTANCES] = None
    keep: Annotated[PositiveInt, CIRCUMSTANCES] = 3
    """How many of the newest stay."""
    keep_every: Annotated[PositiveInt | None, CIRCUMSTANCES] = None
    """Those of a multiple of this many steps stay for ever."""
    final_patience_s: Annotated[float, Field(ge=0), CIRCUMSTANCES] = 300.0
    """How long a run that ends tries to save its last state, and to write its record, where a storage refuses."""
    encryption: Annotated[Encryption | None, CIRCUMSTANCES] = None
