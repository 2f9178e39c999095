"""`monitoring`: how a run is watched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.job.fields import (
    CIRCUMSTANCES,
    PositiveFloat,
    Section,
    Text,
)


class MLflow(Section):
    """Where steps, goodput and incidents are logged with the package `mlflow`."""

    tracking_uri: Annotated[Text, CIRCUMSTANCES]
    experiment: Annotated[Text, CIRCUMSTANCES] = "orchestrator"


class WandB(Section):
    """The same for the package `wandb`, which finds its key where it always does."""

    project: Annotated[Text, CIRCUMSTANCES]
    mode: Annotated[Literal["online", "offline"], CIRCUMSTANCES] = "online"
    entity: Annotated[Text | None, CIRCUMSTANCES] = None


class Monitoring(Section):
    """How a run is watched; no part of the numbers."""

    port: Annotated[int, Field(ge=0, le=65535), CIRCUMSTANCES] = 0
    """0: any free port."""
    peak_tflops: Annotated[PositiveFloat | None, CIRCUMSTANCES] = None
    """What a worker's device can do at the most, for MFU; None: by the device's name, or measured."""
    targets: Annotated[Text | None, CIRCUMSTANCES] = None
    """Where Prometheus finds the endpoints of runs (`file_sd`); None: beside Ray's own."""
    logs: Annotated[Literal["text", "json"], CIRCUMSTANCES] = "text"
    """What the lines of the files in `logs/` are."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], CIRCUMSTANCES] = "info"
    tensorboard: Annotated[bool, CIRCUMSTANCES] = False
    """Event files in the run directory's `tensorboard/`."""
    mlflow: Annotated[MLflow | None, CIRCUMSTANCES] = None
    wandb: Annotated[WandB | None, CIRCUMSTANCES] = None
    sinks: Annotated[dict[str, dict[str, Any]], CIRCUMSTANCES] = Field(default_factory=dict)
    """Of other packages, by name, each with its settings."""
