"""The layouts as one would write them with PyTorch's own parts: what benchmarks/layouts.py is measured beside.

DistributedDataParallel, ZeroRedundancyOptimizer, FSDP2, tensor parallelism (parallelize_module with the model's own
tp_plan), torch.distributed.pipelining, and gloo. Gradients of micro-batches are added up on each rank and communicated
once a step, unless a counterpart's name says otherwise; the optimizer is fused.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from paired import HOST, Done, Start
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from orchestrator.data.of_job import dataset_of, prepare_stores
from orchestrator.job import Job
from orchestrator.models.loading import build_model
from orchestrator.training import build
from strategies.layout.parallel import ParallelLayout
from strategies.layout.schedule import parts_of

Step = Callable[[int], Done]


def counterparts(layout: ParallelLayout) -> list[str]:
    """The names of what a layout is measured beside, the main one first."""
    if layout.pipeline > 1:
        return ["pipelining"]
    if layout.tensor > 1:
        return ["DDP", "FSDP2"] if layout.data > 1 else ["TP"]
    match layout.shard if layout.data > 1 else "none":
        case "optimizer":
            return ["DDP+ZeRO", "DDP"]
        case "gradients" | "parameters":
            return ["FSDP2", "FSDP2 sync"]
        case _:
            return ["DDP"]


def serve() -> tuple[int, Any]:
    store = dist.TCPStore(HOST, 0, None, True, wait_for_workers=False)
    return store.port, store


def make(start: Start, job: Job, layout: ParallelLayout, counterpart: str) -> Step:
    """This rank's part of `counterpart` in `layout`; call it with the number of a step."""
    store = start.store or dist.TCPStore(HOST, start.port, None, False)
    dist.init_process_group("gloo", store=store, rank=start.rank, world_size=start.world_size)
    mesh = init_device_mesh(
        "cpu", (layout.data, layout.pipeline, layout.tensor), mesh_dim_names=("data", "pipeline", "tensor")
    )
    batches = _Batches.of(job, layout.data, mesh.get_local_rank("data"))
    if layout.pipeline > 1:
        return _pipelining(job, batches, layout, mesh)
    if counterpart.startswith("FSDP2"):
        return _fsdp(job, batches, layout, mesh, syncs_always=counterpart == "FSDP2 sync")
    return _ddp(job, batches, layout, mesh, is_zero=counterpart == "DDP+ZeRO")


# -------------------------------------------------------------------------------------------- what all of them need


@dataclass
class _Batches:
    """A replica's share of every step's samples, in the job's order."""

    vocab_size: int
    micro_batch: int
    tokens_per_step: int
    samples: Callable[[int], torch.Tensor]

    @classmethod
    def of(cls, job: Job, replicas: int, replica: int) -> _Batches:
        dataset = dataset_of(job, prepare_stores(job, verify=False))

        def samples(step: int) -> torch.Tensor:
            ids = dataset.step_ids(step).reshape(replicas, -1)[replica]
            return torch.from_numpy(dataset.stores[0].samples(ids, job.data.sequence_length))

        tokens = job.train.global_batch * job.data.sequence_length
        return cls(dataset.vocab_size, job.train.micro_batch, tokens, samples)

    def loss(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The share that `rows` int64 [batch, length + 1] have in the step's mean loss."""
        summed = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        return summed / self.tokens_per_step


def _adamw(job: Job, parameters: Iterable[nn.Parameter], kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    """Distributed tensors of different meshes, and plain ones, are groups of their own, as the fused kernel wants."""
    spec = build.optimizer_spec(job)
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.ndim >= 2, getattr(parameter, "device_mesh", None)), []).append(parameter)
    grouped = [
        {"params": members, "weight_decay": spec.weight_decay if decays else 0.0}
        for (decays, _), members in groups.items()
    ]
    if kind is not torch.optim.AdamW:
        options["optimizer_class"] = torch.optim.AdamW
    return kind(grouped, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True, **options)


class _Update:
    """Clips, takes an optimizer step at the rate of the job's schedule, and forgets the gradients.

    `counted` are the parameters whose gradients this rank speaks for in the norm; `groups` those over which the squares
    are added up. Without groups the whole gradient is here.
    """

    def __init__(
        self, job: Job, optimizer: Any, parameters: Iterable[nn.Parameter], counted: Iterable[nn.Parameter],
        groups: Sequence[Any],
    ) -> None:  # fmt: skip
        self._spec = build.step_spec(job)
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._counted = list(counted)
        self._groups = groups

    def __call__(self, step: int) -> None:
        clip = self._spec.clip_norm
        if clip is not None and not self._groups:
            nn.utils.clip_grad_norm_(self._parameters, clip)
        elif clip is not None:
            square = nn.utils.get_total_norm([_local(p.grad) for p in self._counted]).square()
            for group in self._groups:
                dist.all_reduce(square, group=group)
            scale = (clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([_local(p.grad) for p in self._parameters], scale)
        for group in self._optimizer.param_groups:
            group["lr"] = self._spec.base_lr * self._spec.schedule.factor(step)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _local(tensor: Any) -> torch.Tensor:
    """This rank's part of a distributed tensor."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def _split(module: nn.Module, plan: dict[str, str], mesh: DeviceMesh) -> None:
    """Tensor parallelism by a model's own plan."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles: dict[str, Callable[[], Any]] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
        "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    }
    patterns = [(re.escape(pattern).replace(r"\*", "[^.]+"), style) for pattern, style in plan.items()]
    found = {
        name: styles[style]() for name, _ in module.named_modules() for pattern, style in patterns
        if re.fullmatch(pattern, name)
    }  # fmt: skip
    parallelize_module(module, mesh, found)


# -------------------------------------------------------------------------------------------- without a pipeline


def _ddp(job: Job, batches: _Batches, layout: ParallelLayout, mesh: DeviceMesh, *, is_zero: bool) -> Step:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
    from torch.nn.parallel import DistributedDataParallel

    model: Any = build_model(job, batches.vocab_size)
    split: set[str] = set()
    if layout.tensor > 1:
        _split(model, model.tp_plan, mesh["tensor"])
        split = {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    replica = model
    if layout.data > 1:
        if layout.tensor > 1:
            _pre_dp_module_transform(model)  # DDP knows plain tensors only.
        replica = DistributedDataParallel(
            model, gradient_as_bucket_view=True, process_group=mesh.get_group("data")
        )  # fmt: skip
    optimizer = _adamw(job, model.parameters(), ZeroRedundancyOptimizer if is_zero else torch.optim.AdamW)
    first = mesh.get_local_rank("tensor") == 0
    counted = [p for name, p in model.named_parameters() if name in split or first]
    groups = [mesh.get_group("tensor")] if layout.tensor > 1 else []
    update = _Update(job, optimizer, model.parameters(), counted, groups)

    def step(number: int) -> Done:
        total = torch.zeros(())
        pieces = batches.samples(number).split(batches.micro_batch)
        for index, rows in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last or layout.data == 1 else replica.no_sync():
                # DDP hands on a share of the gradient's mean over replicas, and is to hand on a sum.
                loss = batches.loss(replica(input_ids=rows[:, :-1]).logits, rows)
                (loss * layout.data).backward()
            total += loss.detach()
        update(number)
        return Done(float(total) if first else 0.0, {})

    return step


def _fsdp(job: Job, batches: _Batches, layout: ParallelLayout, mesh: DeviceMesh, *, syncs_always: bool) -> Step:
    """`shard: parameters` gathers weights for every block and pass; otherwise they are gathered once a step."""
    from torch.distributed.fsdp import fully_shard

    # Transformers returns a view of the logits, of which nothing here makes anything in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model: Any = build_model(job, batches.vocab_size)
    split: set[str] = set()
    if layout.tensor > 1:
        plain = {id(p) for p in model.parameters()}
        _split(model, model.tp_plan, mesh["tensor"])
        split = {name for name, parameter in model.named_parameters() if id(parameter) not in plain}
    reshard = layout.shard == "parameters"
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh["data"], reshard_after_forward=reshard)
    _fill(model)
    optimizer = _adamw(job, model.parameters())
    first = mesh.get_local_rank("tensor") == 0
    counted = [p for name, p in model.named_parameters() if name in split or first]
    groups = [mesh.get_group(axis) for axis in ("data", "tensor") if mesh[axis].size() > 1]
    update = _Update(job, optimizer, model.parameters(), counted, groups)

    def step(number: int) -> Done:
        total = torch.zeros(())
        pieces = batches.samples(number).split(batches.micro_batch)
        for index, rows in enumerate(pieces):
            last = index == len(pieces) - 1
            model.set_requires_gradient_sync(last or syncs_always)
            model.set_reshard_after_backward(last or reshard or syncs_always)
            loss = batches.loss(model(input_ids=rows[:, :-1]).logits, rows)
            (loss * layout.data).backward()  # As for DDP.
            total += loss.detach()
        update(number)
        return Done(float(total) if first else 0.0, {})

    return step


def _fill(model: nn.Module) -> None:
    """Gives parameters that have no memory some for their rows, with made-up values."""
    empty = [parameter for parameter in model.parameters() if parameter.is_meta]
    if not empty:
        return
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    with torch.no_grad():
        for parameter in model.parameters():
            rows = _local(parameter)
            _ = rows.normal_(std=0.02) if parameter.ndim > 1 else rows.fill_(1.0)


# -------------------------------------------------------------------------------------------- with a pipeline


class _Stage(nn.Module):
    """Some blocks of a Llama: token ids int64 [batch, length] or hidden states to hidden states or logits."""

    def __init__(self, model: Any, start: int, stop: int) -> None:
        super().__init__()
        layers = model.model.layers
        self.embed_tokens = model.model.embed_tokens if start == 0 else None
        self.layers = nn.ModuleList(layers[max(0, start - 1) : min(stop - 1, len(layers))])
        self.rotary_emb = model.model.rotary_emb
        is_last = stop == len(layers) + 2
        self.norm = model.model.norm if is_last else None
        self.lm_head = model.lm_head if is_last else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.embed_tokens is not None:
            hidden = self.embed_tokens(hidden)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        rotary = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return hidden if self.norm is None or self.lm_head is None else self.lm_head(self.norm(hidden))


def _pipelining(job: Job, batches: _Batches, layout: ParallelLayout, mesh: DeviceMesh) -> Step:
    from torch.distributed.pipelining import (
        PipelineStage,
        Schedule1F1B,
        ScheduleGPipe,
        ScheduleInterleaved1F1B,
        ScheduleZBVZeroBubble,
    )

    kinds: dict[str, Any] = {
        "1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved-1f1b": ScheduleInterleaved1F1B,
        "zero-bubble": ScheduleZBVZeroBubble,
    }  # fmt: skip
    model: Any = build_model(job, batches.vocab_size)
    at = mesh.get_local_rank("pipeline")
    numbers = parts_of(layout.schedule, layout.pipeline, len(layout.parts), at)
    modules = [_Stage(model, *layout.parts[number]) for number in numbers]
    split: set[nn.Parameter] = set()
    if layout.tensor > 1:
        plan = {pattern.removeprefix("model."): style for pattern, style in model.tp_plan.items()}
        for module in modules:
            plain = set(module.parameters())
            _split(module, plan, mesh["tensor"])
            split |= set(module.parameters()) - plain
    group = mesh.get_group("pipeline")
    stages = [
        PipelineStage(module, number, len(layout.parts), torch.device("cpu"), group=group)
        for number, module in zip(numbers, modules, strict=True)
    ]
    micro_batches = job.train.global_batch // layout.data // batches.micro_batch
    schedule = kinds[layout.schedule](
        stages if layout.schedule in ("interleaved-1f1b", "zero-bubble") else stages[0], micro_batches,
        loss_fn=batches.loss, scale_grads=False,
    )  # fmt: skip
    parameters = [p for module in modules for p in module.parameters()]
    first = mesh.get_local_rank("tensor") == 0
    groups = [mesh.get_group(axis) for axis in ("pipeline", "tensor") if mesh[axis].size() > 1]
    counted = [p for p in parameters if p in split or first]
    update = _Update(job, _adamw(job, parameters), parameters, counted, groups)
    is_first, is_last = 0 in numbers, len(layout.parts) - 1 in numbers
    replicas = mesh.get_group("data") if layout.data > 1 else None

    def step(number: int) -> Done:
        rows = batches.samples(number)
        losses: list[torch.Tensor] = []
        arguments = (rows[:, :-1],) if is_first else ()
        schedule.step(*arguments, target=rows if is_last else None, losses=losses, return_outputs=False)
        if replicas is not None:
            _add_up([_local(p.grad) for p in parameters], replicas)
        update(number)
        return Done(float(sum(loss.detach() for loss in losses)) if first else 0.0, {})

    return step


def _add_up(gradients: list[torch.Tensor], group: Any) -> None:
    """One all-reduce of all gradients."""
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(summed)
