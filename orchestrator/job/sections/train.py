"""`train`: steps, batches, the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Tag

from orchestrator.job.fields import (
    CIRCUMSTANCES,
    NUMBERS,
    NUMBERS_LATER,
    CountFloat,
    CountInt,
    Decay,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    named,
    one_of,
    pair,
)
from strategies.objective.chunk import CHUNK_TOKENS
from strategies.optim.spec import OPTIMIZERS


class ParameterGroup(Section):
    """Parameters that are updated otherwise than the rest; of several groups the first that has one decides."""

    params: Annotated[list[Text], Field(min_length=1), NUMBERS]
    """Patterns (`*`, `?`, `[...]`) of their names."""
    lr: Annotated[PositiveFloat | None, NUMBERS] = None
    """Their peak learning rate. None: that of all."""
    weight_decay: Annotated[CountFloat | None, NUMBERS] = None
    """None: as for others (matrices have it, vectors have not)."""


class Optimizer(Section):
    """Which, and its settings; each optimizer looks at those that it has."""

    name: Annotated[str, named("optimizers", OPTIMIZERS), NUMBERS] = "adamw"
    lr: Annotated[PositiveFloat, NUMBERS] = 3e-4
    """The peak learning rate."""
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(pair), NUMBERS] = (0.9, 0.95)
    """adamw, lion, and muon for what is no matrix of a layer; adafactor has none."""
    eps: Annotated[PositiveFloat, NUMBERS] = 1e-8
    """adamw, and muon for what is no matrix of a layer."""
    weight_decay: Annotated[CountFloat, NUMBERS] = 0.1
    momentum: Annotated[Decay, NUMBERS] = 0.0
    """sgd and muon (0 is its own, 0.95)."""
    groups: Annotated[list[ParameterGroup], NUMBERS_LATER] = Field(default_factory=list)
    """Parameters with a rate or a weight decay of their own."""
    state: Annotated[Literal["fp32", "bf16", "fp8"], NUMBERS_LATER] = "fp32"
    """The type of what it keeps for each parameter. bf16, fp8: rounded at random, by seed and place. fp8: of matrices,
    in blocks of 16 with a power of two in common."""


class Schedule(Section):
    """The learning rate over the steps: a linear warm-up, then this shape down to `min_ratio` of the peak."""

    name: Annotated[
        Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "wsd"], NUMBERS
    ] = "cosine"
    warmup_steps: Annotated[CountInt, NUMBERS] = 0
    warmup_ratio: Annotated[float, Field(ge=0, lt=1), NUMBERS_LATER] = 0.0
    """The warm-up as a share of all steps, in place of their number."""
    power: Annotated[PositiveFloat, NUMBERS_LATER] = 1.0
    """polynomial only."""
    cycles: Annotated[PositiveInt, NUMBERS_LATER] = 1
    """cosine_with_restarts only: how often it begins again."""
    decay_ratio: Annotated[float, Field(gt=0, le=1), NUMBERS_LATER] = 0.2
    """wsd only: over which share of all steps, the last ones, it decays."""
    min_ratio: Annotated[float, Field(ge=0, le=1), NUMBERS] = 0.1
    convention: Annotated[Literal["own", "transformers"], NUMBERS_LATER] = "own"
    """own: the first step has 1 / warmup_steps of the peak, the last one min_ratio. transformers: the first step has 0,
    and min_ratio would come one step after the last."""


class EveryLayers(Section):
    """All of every so many layers is computed again: of the first, and of each after `every` others."""

    every: Annotated[PositiveInt, CIRCUMSTANCES]


class RouterLoss(Section):
    """The loss of a mixture of experts' routers, added to that of the objective."""

    over: Annotated[Literal["micro-batch", "virtual-worker", "step"], NUMBERS] = "micro-batch"
    """Of which tokens experts are to be chosen about equally often."""
    balance: Annotated[CountFloat | None, NUMBERS] = None
    """What the load balancing loss is multiplied by. None: router_aux_loss_coef of the model."""
    z: Annotated[CountFloat, NUMBERS] = 0.0
    """What the mean square of the logsumexp of router logits is multiplied by."""


class Ema(Section):
    """A mean of the weights of all steps, the newest most, beside the weights themselves."""

    decay: Annotated[float, Field(gt=0, lt=1), NUMBERS] = 0.999
    """What is left of it in a step."""


class Train(Section):
    """Exactly one of `steps` and `epochs`.

    More than 15 attributes: what decides a step is all looked for here."""

    steps: Annotated[CountInt, NUMBERS] = 0
    epochs: Annotated[PositiveFloat | None, NUMBERS_LATER] = None
    """How often every sample is used, in place of the number of steps, which is filled in when a run is prepared."""
    global_batch: Annotated[PositiveInt, NUMBERS]
    """Samples per optimizer step, whatever the number of workers."""
    micro_batch: Annotated[PositiveInt, NUMBERS] = 1
    """Samples per forward pass."""
    optimizer: Annotated[Optimizer, NUMBERS] = Field(default_factory=Optimizer)
    schedule: Annotated[Schedule, NUMBERS] = Field(default_factory=Schedule)
    clip_norm: Annotated[PositiveFloat | None, NUMBERS] = 1.0
    """The largest norm of the whole gradient. None: gradients are not clipped."""
    precision: Annotated[Literal["fp32", "bf16"], NUMBERS] = "fp32"
    recompute: Annotated[
        Annotated[Literal["none", "selective", "full"], Tag("str")] | Annotated[EveryLayers, Tag("dict")],
        one_of("str", "dict", reason="must be none, selective, full, or a mapping with every: a number of layers"),
        CIRCUMSTANCES,
    ] = "none"
    """What layers compute again in the backward pass, in place of keeping it."""
    loss_chunk: Annotated[CountInt, NUMBERS_LATER] = CHUNK_TOKENS
    """Positions that logits and their loss are computed for at a time. 0: all of a micro-batch."""
    router_loss: Annotated[RouterLoss | None, NUMBERS_LATER] = None
    """For mixtures of experts. None: as the model's output_router_logits says, over micro-batches."""
    freeze: Annotated[list[Text], NUMBERS_LATER] = Field(default_factory=list)
    """Patterns (`*`, `?`, `[...]`) of the names of parameters that are not trained."""
    ema: Annotated[Ema | None, NUMBERS_LATER] = None
    """None: no mean of the weights is kept."""
    offload: Annotated[Literal["none", "optimizer"], CIRCUMSTANCES] = "none"
    """What is kept in host memory between steps: what the optimizer keeps, and weights that are not computed with."""
    compile: Annotated[bool, NUMBERS] = False
    seed: Annotated[CountInt, NUMBERS] = 0
    log_every: Annotated[PositiveInt, CIRCUMSTANCES] = 1
    """Steps between two log lines."""
