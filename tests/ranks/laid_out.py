"""Training steps of a tiny model in any layout, over forked gloo ranks: for tests of layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from orchestrator.models.transformers_internals import router_places
from strategies.comm.fabric import Fabric
from strategies.gradient.router_loss import RouterLossSpec
from strategies.gradient.spec import StepSpec
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain, place_state, trained_spans
from strategies.layout.replicas import share_out
from strategies.layout.schedule import parts_of
from strategies.layout.space import ALIGNMENT
from strategies.layout.statemap import NOTHING, Spans
from strategies.layout.virtual import held_spans
from strategies.model.anatomy import find_layers
from strategies.model.blueprint import Blueprint
from strategies.model.head import find_body
from strategies.model.recompute import NOTHING_AGAIN, Recompute
from strategies.model.routers import Routers
from strategies.objective.batch import Batch
from strategies.objective.causal_lm import CAUSAL_LM
from strategies.objective.objective import Objective
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.spec import OPTIMIZERS, OptimizerSpec
from strategies.reduction.residuals import virtual_states
from strategies.state.training_state import TrainingState, state_digest
from strategies.trial.derive import tensor_plan_of
from strategies.trial.trial import Trial, try_model
from strategies.update.engine import StepEngine
from strategies.update.rule import SYNCHRONOUS, UpdateRule
from strategies.update.vote import exchange
from strategies.wire.codecs import codec_of
from strategies.wire.format import FP32, WireFormat
from tests.batches import plain_batch
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint
from tests.small_models import LAYERS, VOCABULARY, Noisy, Remembering, family, own

CPU = torch.device("cpu")
LENGTH = 8
VIRTUAL_WORKERS = 8
MICRO_BATCHES = 2
UNUSUAL = {"noisy": Noisy, "remembering": Remembering}
"""Of these, and of one with spare parameters, a trial has to tell what a job would be told."""


def model_of(name: str, dropout: float = 0.0) -> torch.nn.Module:
    """A model of tests.small_models; dropout in its attention, or where it has any."""
    if name == "own":
        return own(dropout)
    if name in UNUSUAL:
        torch.manual_seed(5)
        return UNUSUAL[name]().train()
    if name == "llama of two layers":
        return family("llama", attention_dropout=dropout, num_hidden_layers=2)
    if name == "wide":
        return family("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    if name == "tied":
        return family("llama", attention_dropout=dropout, tie_word_embeddings=True)
    if name == "spare":
        return with_spares(dropout)
    if name == "frozen":
        return with_frozen(dropout)
    if name == "shared":
        return with_shared(dropout)
    if name == "drifting":
        return drifting()
    return family(name, attention_dropout=dropout)


def with_spares(dropout: float) -> torch.nn.Module:
    """A llama with parameters that its loss does not depend on: in a layer, beside the layers, and at the top. One
    parameter is frozen."""
    model: Any = family("llama", attention_dropout=dropout)
    generator = torch.Generator().manual_seed(5)
    for place in (model.model.layers[1].mlp, model.model, model):
        place.spare = torch.nn.Linear(3, 5)
        for parameter in place.spare.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.model.layers[2].input_layernorm.weight.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def with_frozen(dropout: float) -> torch.nn.Module:
    """A llama with a frozen embedding, a layer of which nothing is trained, and a frozen matrix beside trained ones;
    also a frozen number and frozen integers, which have no rows to share or another type."""
    model: Any = family("llama", attention_dropout=dropout)
    for part in (model.model.embed_tokens, model.model.layers[0], model.model.layers[1].mlp.down_proj):
        part.requires_grad_(False)
    for name, value in (("number", torch.tensor(0.5)), ("integers", torch.arange(6))):
        model.model.layers[1].register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return model  # type: ignore[no-any-return]


def with_shared(dropout: float) -> torch.nn.Module:
    """A llama of which embedding, head and first layer are frozen; the head is the embedding, and the second layer has
    a matrix of the first."""
    model: Any = family("llama", attention_dropout=dropout)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    for part in (model.model.embed_tokens, model.model.layers[0]):
        part.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def drifting() -> torch.nn.Module:
    """A llama whose second layer changes what it keeps, from its 100th call on."""
    model: Any = family("llama")
    calls = []

    def drift(layer: torch.nn.Module, *unused: Any) -> None:
        calls.append(1)
        if len(calls) >= 100:
            layer.self_attn.rate = len(calls)

    model.model.layers[1].self_attn.rate = 0
    model.model.layers[1].register_forward_pre_hook(drift)
    return model  # type: ignore[no-any-return]


def even_parts(number: int) -> tuple[tuple[int, int], ...]:
    """Embedding, four layers, norm and head in `number` parts."""
    bounds = [0, *(1 + LAYERS * part // number for part in range(1, number)), LAYERS + 2]
    return tuple(pairwise(bounds))


def layout_of(
    data: int = 1, pipeline: int = 1, tensor: int = 1, shard: str = "none", schedule: str = "1f1b", spares: int = 0,
    parts: tuple[tuple[int, int], ...] | None = None, virtual_workers: int = VIRTUAL_WORKERS, replicas: int = 0,
) -> ParallelLayout:  # fmt: skip
    """Parts are even unless given; two for each stage of a schedule that wants two."""
    chunks = 2 if schedule in ("interleaved-1f1b", "zero-bubble") else 1
    if pipeline == 1:
        parts = ()
    elif parts is None:
        parts = even_parts(pipeline * chunks)
    dealt = share_out(virtual_workers, data, replicas)
    return ParallelLayout(
        data, dealt, tensor, pipeline, shard, schedule, parts, spares, virtual_replicas=replicas
    )  # fmt: skip


def fetch(step: int, virtual_worker: int) -> Batch:
    rng = np.random.default_rng((step, virtual_worker))
    tokens = rng.integers(0, VOCABULARY, size=(MICRO_BATCHES, LENGTH + 1), dtype=np.int64)
    return plain_batch(tokens, np.arange(MICRO_BATCHES), 1000 * step + virtual_worker, VIRTUAL_WORKERS)


SPEC = StepSpec(
    seed=1, micro_batch=1, micro_batches=MICRO_BATCHES, base_lr=1e-2, schedule=ScheduleSpec("constant"), clip_norm=1.0,
    loss_chunk=3,
)  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """Some steps in one layout. `ranks` says which process is which rank (None: in order)."""

    layout: ParallelLayout
    steps: int = 2
    ranks: tuple[int, ...] | None = None


@dataclass
class Trained:
    """What a process saw: losses and norms of all steps, the digest at the end (of the process that has it), bytes
    received for each layout and the most its buffers took."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    digest: str = ""
    received: list[int] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)


def make_engine(
    dropout: float = 0.0, tensor: int = 1, spec: StepSpec = SPEC, optimizer: str = "adamw", model: str = "llama",
    rule: UpdateRule = SYNCHRONOUS, device: torch.device = CPU, cuts: bool = False,
) -> StepEngine:  # fmt: skip
    wire = rule.wire if spec.wire.is_exact else spec.wire

    def blueprint() -> Blueprint:
        made = model_of(model, dropout)
        is_tried = model == "spare" or model in UNUSUAL
        trial = try_model(made, spec, vocabulary=VOCABULARY, length=LENGTH, device=CPU) if is_tried else Trial()
        body = find_body(made.eval(), find_layers(made)[0], torch.zeros((1, 2), dtype=torch.int64))
        dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        return Blueprint(
            made.train(), tensor=tensor, device=device, unused=trial.unused, body=body, cuts=cuts, dtype=dtype,
            splits_logits=spec.objective.takes_split_logits, routers=routers_in(made) if spec.router_loss else None,
            plan=tensor_plan_of(made) if tensor > 1 else None, order=trial.order, draws=trial.draws,
            wire_block=ALIGNMENT if wire.name in ("fp32", "power_sgd") else codec_of(wire).block,
        )  # fmt: skip

    kind = OptimizerSpec(kind=OPTIMIZERS[optimizer])
    virtual = [*virtual_states((0, VIRTUAL_WORKERS), spec.wire), *rule.virtual_states()]
    state = TrainingState(blueprint(), kind, rule.kinds(), virtual, computes_apart=rule.computes_apart)
    return StepEngine(state, spec, fetch, rule=rule)


def routers_in(model: Any) -> Routers:
    """Those of a mixture of transformers, whose choices are weighed a lot."""
    return Routers(router_places(model), model.num_experts, model.num_experts_per_tok, balance=0.3)


def train(
    rank: int, address: Endpoint, stretches: Sequence[Stretch], dropout: float = 0.0, copies: int = 2,
    precision: str = "fp32", domains: Sequence[str] | None = None, model: str = "llama", prefix: str = "",
    objective: Objective = CAUSAL_LM, rule: UpdateRule = SYNCHRONOUS, device: torch.device = CPU,
    transport: str = "auto", recompute: Recompute = NOTHING_AGAIN, router_loss: RouterLossSpec | None = None,
    loss_chunk: int = SPEC.loss_chunk, wire: WireFormat = FP32, optimizer: str = "adamw", total_steps: int = 0,
    clip_norm: float | None = SPEC.clip_norm,
) -> Trained:  # fmt: skip
    """Goes through all stretches, and collects the state on the first process of the last."""
    engine = make_engine(
        dropout, stretches[0].layout.tensor,
        replace(
            SPEC, precision=precision, objective=objective, recompute=recompute, router_loss=router_loss,
            loss_chunk=loss_chunk, wire=wire, total_steps=total_steps, clip_norm=clip_norm,
        ),
        model=model, rule=rule, device=device, optimizer=optimizer,
        cuts=any(stretch.layout.pipeline > 1 for stretch in stretches),
    )  # fmt: skip
    seen = Trained()
    step = 0
    space = engine.state.space
    everything = engine.state.everything
    held_by: dict[int, Spans] = {}
    for number, stretch in enumerate(stretches):
        members = stretch.ranks or tuple(range(stretch.layout.world_size))
        nodes = [Domain("", domains[m] if domains else str(m)) for m in members]
        held = [everything if number == 0 else held_by.get(member, NOTHING) for member in members]
        if rank in members:
            names = [node.node for node in nodes]
            fabric = Fabric(
                rank=members.index(rank), layout=stretch.layout, device=device, transport=transport, nodes=names
            )  # fmt: skip
            try:
                fabric.form(store_address=address, prefix=f"{prefix}/{number}", host=HOST, timeout_s=PATIENCE_S)
                if number and not held[fabric.rank]:
                    engine.state.invalidate()
                run_stretch(engine, fabric, stretch, held, nodes, copies, step, seen)
            finally:
                fabric.drop()
        shards = place_state(stretch.layout, space, nodes, copies)
        virtual = engine.state.virtual.place(stretch.layout, space, nodes, copies)
        held = held_spans(stretch.layout, trained_spans(stretch.layout, shards), virtual)
        held_by = dict(zip(members, held, strict=True))
        step += stretch.steps
    return seen


def train_each(rank: int, address: Endpoint, layouts: Sequence[ParallelLayout], settings: dict[str, Any]) -> list[Any]:
    """Two steps from the start in each layout: what was seen (`as_numbers`), None where not a rank."""
    found: list[Any] = []
    for number, layout in enumerate(layouts):
        if rank < layout.world_size:
            found.append(as_numbers(train(rank, address, [Stretch(layout)], prefix=f"layout{number}", **settings)))
        else:
            found.append(None)
    return found


def run_stretch(
    engine: StepEngine, fabric: Fabric, stretch: Stretch, held: list[Spans], nodes: list[Domain], copies: int,
    step: int, seen: Trained,
) -> None:  # fmt: skip
    layout = stretch.layout
    moved = engine.state.adopt_layout(layout, fabric, held, nodes, copies, step, lambda: barrier(fabric))
    seen.received.append(moved.received_bytes)
    seen.buffers.append(moved.buffer_bytes)
    engine.bind(fabric, layout, 0)
    number = step
    while number < step + stretch.steps:
        records, _ = engine.run(number)
        for record in records:
            assert record.step == number
            assert record.hashes == tuple(1000 * number + index for index in range(VIRTUAL_WORKERS))
            assert (record.tokens, record.padding) == (VIRTUAL_WORKERS * MICRO_BATCHES * LENGTH, 0)
            seen.losses.append(record.loss)
            seen.norms.append(record.grad_norm)
            seen.phases.append(record.phase_seconds)
            number += 1
    engine.state.collect(engine.state.arrangement.held(layout), fabric)
    if fabric.rank == 0:
        seen.digest = state_digest(engine.state)
    barrier(fabric)


def barrier(fabric: Fabric) -> None:
    exchange(fabric.control, np.array([0]), [1] * fabric.control.world_size)


def last_stage(layout: ParallelLayout) -> int:
    """The stage that has the head."""
    last = len(layout.parts) - 1
    return next(
        stage for stage in range(layout.pipeline)
        if last in parts_of(layout.schedule, layout.pipeline, last + 1, stage)
    )  # fmt: skip


def as_numbers(seen: Trained) -> tuple[Any, ...]:
    return seen.losses, seen.norms, seen.digest
