"""From a job to what a rank trains with: model, optimizer state, step engine. The same on every rank, bit for bit."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable

import torch
from torch import nn

from orchestrator.data import Dataset, ReadAhead
from orchestrator.evaluation.measured import metrics_of
from orchestrator.job import Job
from orchestrator.job.lengths import too_long
from orchestrator.job.parts import objective_of, optimizer_of, update_rule_of, virtual_states_of, wire_of
from orchestrator.job.sections.train import EveryLayers
from orchestrator.models.costs import ModelCosts, describe_model, training_flops_per_token
from orchestrator.models.loading import prepare_model
from orchestrator.models.problems import reason_of
from orchestrator.models.routers import router_loss_spec
from orchestrator.models.validation import why_not_recomputed
from orchestrator.training.compared import with_teacher
from orchestrator.training.peak import lacks_bf16
from orchestrator.training.teaching import Teaching
from strategies.comm.group_errors import Misconfigured, OutOfMemory, kind_of
from strategies.comm.interfaces import interface_of
from strategies.comm.nccl import settle_environment
from strategies.gradient.spec import StepSpec
from strategies.layout.space import ALIGNMENT
from strategies.model.blueprint import Blueprint
from strategies.model.recompute import Recompute
from strategies.objective.batch import Batch
from strategies.optim.groups import ParameterGroup
from strategies.optim.rounding import FP8_BLOCK
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.spec import OptimizerSpec
from strategies.state.training_state import TrainingState
from strategies.trial.derive import tensor_plan_of
from strategies.trial.document_mask import refuse_without_positions
from strategies.trial.trial import try_model
from strategies.wire.codecs import codec_of

log = logging.getLogger(__name__)


def choose_device(job: Job) -> torch.device:
    """`cuda` when the job gives each worker a GPU, else `cpu`.

    Raises ValueError when a GPU is asked for and none can be seen, or it cannot compute in the job's precision.
    """
    if job.resources.gpu > 0:
        if not torch.cuda.is_available():
            raise ValueError(f"resources.gpu is {job.resources.gpu:g}, but torch sees no CUDA device in this process")
        name = torch.cuda.get_device_name(0)
        if job.train.precision == "bf16" and lacks_bf16(name):
            raise ValueError(
                f"train.precision is bf16, and a {name} has no arithmetic in bf16: set it to fp32, or ask for other "
                "GPUs (resources.accelerators)"
            )
        return torch.device("cuda", 0)
    return torch.device("cpu")


GIVEN_BACK_S = 20.0
"""How long a worker waits for the memory of a GPU that another process still has: the driver takes seconds to give back
that of one that died."""
ALWAYS_TAKEN = 1_500_000_000
"""Bytes of a GPU's memory that are nobody's to give back: what CUDA keeps for this process, displays, monitoring."""


def wait_for_memory(
    job: Job, device: torch.device, measure: Callable[[], tuple[int, int]] = torch.cuda.mem_get_info
) -> None:
    """Until a GPU that a worker has for itself is given back by the process that had it before; not for ever, as what
    others have there may be no business of ours. `measure` gives free and all bytes."""
    if device.type != "cuda" or job.resources.gpu != 1:
        return
    free, total = _measured(measure)
    deadline = time.monotonic() + GIVEN_BACK_S
    while total - free > ALWAYS_TAKEN:
        if time.monotonic() > deadline:
            log.warning("other processes have %.1f of the %.1f GB of this GPU", (total - free) / 1e9, total / 1e9)
            return
        time.sleep(0.25)
        free, total = _measured(measure)


def _measured(measure: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """Of a GPU with too little memory for this process to ask it anything, all is taken."""
    try:
        return measure()
    except RuntimeError as error:
        if kind_of(error) is not OutOfMemory:
            raise
        return 0, 2 * ALWAYS_TAKEN


def spare_imports(job: Job) -> None:
    """Has the garbage collector leave alone what is imported by now, with transformers where the model is one of
    theirs: hundreds of thousands of objects that it would look at with the interpreter's lock held, 0.2 s each time,
    also when a worker has to recover. Nothing that holds a tensor may be there yet."""
    if job.model.hf is not None:
        import transformers.modeling_utils  # noqa: F401
    gc.freeze()


def prepare_groups(job: Job, device: torch.device, host: str) -> None:
    """To be called before the process makes its first group. `host` is where peers reach it: NCCL is to take the
    network interface of that address, unless the environment says otherwise. Raises ValueError for an environment with
    which a worker would not outlive the loss of another."""
    if device.type == "cuda" and job.strategy.transport != "gloo":
        if (interface := interface_of(host)) is not None:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        try:
            settle_environment()
        except Misconfigured as error:
            raise ValueError(str(error)) from error


def build_blueprint(job: Job, vocab_size: int, device: torch.device) -> Blueprint:
    """The job's model, ready to be laid out. Raises ValueError like `prepare_model`, and when the model cannot be split
    or cut, or keep documents apart, as the job wants it to, or fails its trial (`strategies.trial.trial`)."""
    model, values, routers = prepare_model(job, vocab_size)
    if job.data.document_mask:
        refuse_without_positions(model)
    reason = too_long(job.data.sequence_length, getattr(model, "config", None))
    if reason is not None:
        raise ValueError(reason)
    started = time.perf_counter()
    trial = try_model(
        model, step_spec(job), vocabulary=vocab_size, length=job.data.sequence_length, device=device,
        is_ragged=job.data.packing == "pad",
    )  # fmt: skip
    log.info("the model passed its trial in %.2f s", time.perf_counter() - started)
    if trial.unused:
        log.warning(
            "the loss does not depend on %d parameters, which are left as they are: %s",
            len(trial.unused), ", ".join(sorted(trial.unused)),
        )  # fmt: skip
    blueprint = Blueprint(
        model, tensor=job.strategy.tensor, device=device, unused=trial.unused, caches=trial.caches, body=trial.body,
        cuts=job.strategy.pipeline > 1, dtype=torch.bfloat16 if job.train.precision == "bf16" else torch.float32,
        values=values, splits_logits=objective_of(job).takes_split_logits, routers=routers,
        plan=tensor_plan_of(model) if job.strategy.tensor > 1 else None, order=trial.order, draws=trial.draws,
        keeps_whole=optimizer_of(job).scope != "element", wire_block=wire_block_of(job),
    )  # fmt: skip
    if (unknown := why_not_recomputed(job, model)) is not None:
        raise ValueError(unknown)
    if job.strategy.pipeline > 1:
        blueprint.check_pipeline(job.strategy.pipeline, step_spec(job).autocast(device))
    if job.strategy.shard == "parameters":
        blueprint.check_sharded()
        if job.train.optimizer.state == "fp8":
            _refuse_divided_blocks(blueprint)
    return blueprint


def _refuse_divided_blocks(blueprint: Blueprint) -> None:
    """Raises ValueError where a rank that has some rows of a matrix would have a part of a block of fp8."""
    uneven = [
        f"{slot.name} {list(slot.shape)}"
        for slot in blueprint.space.slots
        if slot.decays and math.prod(slot.shape[1:]) % FP8_BLOCK
    ]
    if uneven:
        raise ValueError(
            f"optimizer.state = fp8 with shard = parameters needs rows of multiples of {FP8_BLOCK} elements, which "
            f"{', '.join(uneven[:5])} {'has' if len(uneven) == 1 else 'have'} not; use shard: gradients, or state: bf16"
        )


def build_state(job: Job, vocab_size: int, device: torch.device) -> TrainingState:
    """The training state of step 0; raises like `build_blueprint`."""

    blueprint, rule = build_blueprint(job, vocab_size, device), update_rule_of(job)
    return TrainingState(
        blueprint, optimizer_spec(job), rule.kinds(), virtual_states_of(job), computes_apart=rule.computes_apart
    )  # fmt: skip


def wire_block_of(job: Job) -> int:
    """Elements that are coded together, and so never divided among ranks."""
    wire = update_rule_of(job).wire if wire_of(job).is_exact else wire_of(job)
    return ALIGNMENT if wire.is_exact or wire.name == "power_sgd" else codec_of(wire).block


def memory_bytes(device: torch.device, job: Job) -> int:
    """What a worker on this device may use, which others have a part of where `resources.gpu` is less than 1; 0 where
    that is not known (on a CPU, whose memory others share)."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory * min(1.0, job.resources.gpu or 1.0))


def model_costs(job: Job) -> ModelCosts | None:
    """What the model costs block by block, for a job that has a pipeline to cut it for. Raises PlanError."""
    return describe_model(job) if job.strategy.pipeline > 1 else None


def flops_per_token(job: Job, model: nn.Module) -> float:
    """What the job's model takes for a token, forward and backward; 0 where its shapes do not say."""
    try:
        # Of quantized weights it is codes that the model has: it is asked about without.
        is_quantized = job.adapter is not None and job.adapter.quantize_base != "none"
        return float(training_flops_per_token(job, None if is_quantized else model))
    except Exception as error:
        # Networks and their configurations are of all kinds, and nobody trains less well for a number that is missing.
        log.info("there will be no MFU: %s: %s", type(error).__name__, reason_of(error))
        return 0.0


def allocated_bytes(device: torch.device) -> int:
    """What this process has allocated on its device; 0 on a CPU, whose memory is the process's own."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def optimizer_spec(job: Job) -> OptimizerSpec:
    asked = job.train.optimizer
    groups = tuple(
        ParameterGroup(tuple(group.params), 1.0 if group.lr is None else group.lr / asked.lr, group.weight_decay)
        for group in asked.groups
    )
    return OptimizerSpec(
        **asked.model_dump(exclude={"name", "groups"}), kind=optimizer_of(job), groups=groups,
        offload=job.train.offload == "optimizer", seed=job.train.seed,
    )  # fmt: skip


def step_spec(job: Job) -> StepSpec:
    """The numbers a step is made of, from the job."""
    train = job.train
    return StepSpec(
        seed=train.seed,
        micro_batch=train.micro_batch,
        micro_batches=job.micro_batches_per_virtual_worker,
        base_lr=train.optimizer.lr,
        schedule=ScheduleSpec(
            name=train.schedule.name,
            warmup_steps=train.schedule.warmup_steps or math.ceil(train.schedule.warmup_ratio * train.steps),
            min_ratio=train.schedule.min_ratio,
            convention=train.schedule.convention,
            total_steps=train.steps,
            power=train.schedule.power,
            cycles=train.schedule.cycles,
            decay_ratio=train.schedule.decay_ratio,
        ),
        clip_norm=train.clip_norm,
        precision=train.precision,
        native_reduction=job.strategy.reduction == "native",
        compile=train.compile,
        loss_chunk=train.loss_chunk,
        recompute=_recompute(train.recompute),
        router_loss=router_loss_spec(job),
        document_mask=job.data.document_mask,
        wire=wire_of(job),
        total_steps=train.steps,
        objective=with_teacher(job, objective_of(job)),
        metrics=metrics_of(job),
    )


def _recompute(asked: str | EveryLayers) -> Recompute:
    if isinstance(asked, EveryLayers):
        return Recompute("full", asked.every)
    return Recompute(asked)  # type: ignore[arg-type]


def make_fetch(
    job: Job, dataset: Dataset, delay: Callable[[], None] | None = None, teaching: Teaching | None = None
) -> ReadAhead[Batch]:
    """How a step gets its samples: by (step, virtual worker) alone; before they are asked for, where reading is slow.
    `delay` is called before each reading (an injected slow input); with `teaching` what the teacher gives is there."""

    def read(step: int, virtual_worker: int) -> Batch:
        if delay is not None:
            delay()
        batch = dataset.batch(step, virtual_worker)
        return batch if teaching is None else teaching.joined(batch)

    return ReadAhead(read, num_steps=job.train.steps)
