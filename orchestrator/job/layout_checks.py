"""The rules of a job file about its layout: what tensor, pipeline and shard ask of workers, batch and model.

They hold for the job's own degrees with `elastic.workers.max` workers. With fewer the layout is chosen at run time
(`orchestrator.planning.choose`), and a pipeline that is short of micro-batches goes through empty ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from orchestrator.job.rules import Finding, Get, Rule, Unknown
from strategies.layout.schedule import PipelineSchedule, chunks_of

_MOST_LISTED = 64
"""Tensor degrees above are not suggested: a tensor-parallel group shares a node."""


def _group_of_workers(get: Get) -> Iterator[Finding]:
    tensor = get("strategy.tensor")
    for bound in ("min", "max"):
        count = get(f"elastic.workers.{bound}")
        below = count // tensor * tensor
        if count == below:
            continue
        fits = f"the nearest that fit are {below} and {below + tensor}" if below else f"the nearest is {tensor}"
        yield Finding(
            (f"elastic.workers.{bound}", "strategy.tensor"),
            f"workers.{bound} = {count} must be a multiple of tensor = {tensor}, as a tensor-parallel group works or "
            f"waits as one; {fits}",
        )


def _whole_pipeline(get: Get) -> Iterator[Finding]:
    tensor, pipeline, high = get("strategy.tensor"), get("strategy.pipeline"), get("elastic.workers.max")
    group = tensor * pipeline
    if high < group:
        shorter = f", or lower pipeline to {high // tensor}" if high >= tensor else ""
        yield Finding(
            ("elastic.workers.max", "strategy.pipeline", "strategy.tensor"),
            f"workers.max = {high} is less than a replica of tensor {tensor} x pipeline {pipeline} = {group} workers; "
            f"raise workers.max to {group}{shorter}",
        )


def _enough_shares(get: Get) -> Iterator[Finding]:
    shares, high = get("elastic.virtual_workers"), get("elastic.workers.max")
    group = get("strategy.tensor") * get("strategy.pipeline")
    if shares * group < high:
        replicas = f"= {high} workers" if group == 1 else f"/ (tensor x pipeline) = {high} / {group} replicas"
        yield Finding(
            ("elastic.virtual_workers", "elastic.workers.max"),
            f"virtual_workers = {shares} cannot give each of workers.max {replicas} a share; "
            f"raise virtual_workers to at least {-(-high // group)} or lower workers.max to {shares * group}",
        )


def _micro_batches(get: Get) -> Iterator[Finding]:
    tensor, pipeline, kind = get("strategy.tensor"), get("strategy.pipeline"), get("strategy.schedule")
    shares, high = get("elastic.virtual_workers"), get("elastic.workers.max")
    batch, unit = get("train.global_batch"), shares * get("train.micro_batch")
    group = tensor * pipeline
    data = min(high // group, shares)
    if pipeline == 1 or not data or batch % unit:
        return
    schedule, per_share = PipelineSchedule(kind, pipeline, chunks_of(kind)), batch // unit
    reason = _refuses(schedule, shares, data, per_share)
    if not reason:
        return
    needed = 2 * pipeline - 1 if kind == "zero-bubble" else pipeline
    held = shares // data
    more = -(-per_share // pipeline) * pipeline if kind == "interleaved-1f1b" else -(-needed // held)
    fits = [f"global_batch: {more * unit}"]
    fewer = shares // -(-needed // per_share)
    if fewer and not _refuses(schedule, shares, fewer, per_share):
        fits.append(f"workers.max: {fewer * group}")
    yield Finding(
        ("strategy.pipeline", "strategy.schedule", "train.global_batch", "elastic.workers.max"),
        f"{reason} (schedule {kind}; global_batch / micro_batch = {per_share * shares} micro-batches over "
        f"workers.max / (tensor x pipeline) = {high} / {group}, {data} replicas); {' or '.join(fits)} would fit",
    )


def _refuses(schedule: PipelineSchedule, shares: int, data: int, per_share: int) -> str | None:
    """Why the replica with the fewest or the one with the most virtual workers cannot follow the schedule."""
    fewest, most = shares // data * per_share, -(-shares // data) * per_share
    return schedule.refuses(fewest) or schedule.refuses(most)


def _layers(get: Get) -> Iterator[Finding]:
    pipeline, kind = get("strategy.pipeline"), get("strategy.schedule")
    found = _said(get, "num_hidden_layers", "n_layer")
    chunks = chunks_of(kind)
    if pipeline == 1 or not found or found[0][1] >= pipeline * chunks:
        return
    name, layers = found[0]
    parts = f"pipeline = {pipeline}" + (f" x {chunks} parts on each stage (schedule {kind})" if chunks > 1 else "")
    yield Finding(
        ("strategy.pipeline", f"model.hf.{name}"),
        f"{parts} needs at least {pipeline * chunks} layers, {name} = {layers}; "
        f"pipeline can be at most {max(1, layers // chunks)}",
    )


def _divisible(get: Get) -> Iterator[Finding]:
    tensor = get("strategy.tensor")
    sizes = [
        *_said(get, "num_attention_heads", "n_head"),
        *_said(get, "num_key_value_heads"),
        *_said(get, "hidden_size", "n_embd"),
        *_said(get, "intermediate_size"),
        *_said(get, "vocab_size"),
    ]
    uneven = [(name, size) for name, size in sizes if size % tensor]
    if not uneven:
        return
    common = math.gcd(*(size for _, size in sizes))
    degrees = [degree for degree in range(1, min(common, _MOST_LISTED) + 1) if common % degree == 0]
    what = ", ".join(f"{name} = {size}" for name, size in uneven)
    fits = f"tensor {' or '.join(map(str, degrees))} would fit"
    if [name for name, _ in uneven] == ["vocab_size"]:
        # Ids that no token has do no harm, so that a vocabulary can be rounded up.
        fits += f", and so would vocab_size: {-(-uneven[0][1] // tensor) * tensor}"
    yield Finding(
        ("strategy.tensor", *(f"model.hf.{name}" for name, _ in uneven)),
        f"tensor = {tensor} does not divide {what}; {fits}",
    )


def _said(get: Get, *names: str) -> list[tuple[str, int]]:
    """The first of a model configuration's fields that is there, with its value; sometimes two names mean the same."""
    hf = get("model.hf")
    if not isinstance(hf, dict):
        raise Unknown("model.hf")
    return [(name, hf[name]) for name in names if type(hf.get(name)) is int and hf[name] > 0][:1]


def _native(get: Get) -> Iterator[Finding]:
    if get("strategy.reduction") != "native":
        return
    pipeline, shard = get("strategy.pipeline"), get("strategy.shard")
    if pipeline > 1 or shard in ("gradients", "parameters"):
        yield Finding(
            ("strategy.reduction", "strategy.pipeline", "strategy.shard"),
            f"reduction: native works with pipeline: 1 and shard: none or optimizer, got pipeline = {pipeline} and "
            f"shard = {shard}; set reduction: canonical",
        )


def _compile(get: Get) -> Iterator[Finding]:
    if not get("train.compile"):
        return
    tensor, pipeline, shard = get("strategy.tensor"), get("strategy.pipeline"), get("strategy.shard")
    if tensor > 1 or pipeline > 1 or shard == "parameters":
        yield Finding(
            ("train.compile", "strategy.tensor", "strategy.pipeline", "strategy.shard"),
            "compile: true needs a model that is whole on every worker, so tensor: 1, pipeline: 1 and a shard other "
            f"than parameters; got tensor = {tensor}, pipeline = {pipeline}, shard = {shard}; set compile: false",
        )


def _padded(get: Get) -> Iterator[Finding]:
    if get("data.packing") != "pad" or get("data.pad_to") == "sequence_length":
        return
    pipeline = get("strategy.pipeline")
    if pipeline > 1:
        yield Finding(
            ("data.packing", "strategy.pipeline"),
            f"packing: pad makes micro-batches of many lengths, and the stages of pipeline = {pipeline} hand on "
            "activations of one size; use packing: pack, pad_to: sequence_length, or pipeline: 1",
        )
    if get("train.compile"):
        yield Finding(
            ("data.packing", "train.compile"),
            "packing: pad makes micro-batches of many lengths, and compile: true would compile the model for each; "
            "use packing: pack, pad_to: sequence_length, or compile: false",
        )


def _adapter(get: Get) -> Iterator[Finding]:
    if get("adapter") is not None and get("strategy.tensor") > 1:
        reason = (
            f"an adapter is not split over tensor-parallel ranks yet; got tensor = {get('strategy.tensor')}: set it to "
            "1, and shard the frozen weights instead (strategy.shard: parameters)"
        )
        yield Finding(("adapter", "strategy.tensor"), reason)


def _wire(get: Get) -> Iterator[Finding]:
    wire, across, shard = get("strategy.wire"), get("strategy.wire_across"), get("strategy.shard")
    if wire == "fp32":
        for field in ("wire_across", "wire_feedback"):
            if get(f"strategy.{field}") not in (1, None):
                yield Finding((f"strategy.{field}",), "says nothing about wire: fp32, of which nothing is rounded off")
        return
    if isinstance(wire, dict) and len([1 for value in wire.values() if value is not None]) != 1:
        yield Finding(("strategy.wire",), "must have exactly one of top_k and power_sgd")
        return
    if get("strategy.reduction") == "native":
        reason = "the backend's own collectives send fp32; use reduction: canonical, or wire: fp32"
        yield Finding(("strategy.wire", "strategy.reduction"), reason)
    if shard == "parameters":
        reason = "FSDP2 exchanges gradients in fp32; use shard: gradients, optimizer or none, or wire: fp32"
        yield Finding(("strategy.wire", "strategy.shard"), reason)
    is_power = isinstance(wire, dict) and wire.get("power_sgd") is not None
    if is_power and shard == "gradients":
        reason = "power_sgd needs the whole gradients of virtual workers at once; use shard: optimizer or none"
        yield Finding(("strategy.wire", "strategy.shard"), reason)
    if is_power and across > 1:
        yield Finding(("strategy.wire_across",), "says nothing about power_sgd, which sends the same of every sum")
    shares = get("elastic.virtual_workers")
    if across > shares:
        reason = f"is more than all {shares} virtual workers, so that nothing would be rounded"
        yield Finding(("strategy.wire_across", "elastic.virtual_workers"), reason)
    elif across > 1 and shard == "gradients":
        reason = (
            f"= {across} has single virtual workers' gradients sent as they are, and shard: gradients sends nothing "
            "else; use wire_across: 1, or shard: optimizer or none"
        )
        yield Finding(("strategy.wire_across", "strategy.shard"), reason)


def _by_themselves(get: Get) -> Iterator[Finding]:
    if isinstance(get("strategy.update"), dict) and get("strategy.shard") != "none":
        reason = (
            f"replicas have weights of their own, which shard: {get('strategy.shard')} would divide: use shard: none"
        )
        yield Finding(("strategy.shard", "strategy.update"), reason)


RULES_OF_DEGREES: tuple[Rule, ...] = (_adapter, _layers, _divisible, _native, _compile, _padded, _wire, _by_themselves)
"""Those about degrees, shard and schedule alone, whatever the number of workers."""
LAYOUT_RULES: tuple[Rule, ...] = (
    _group_of_workers,
    _whole_pipeline,
    _enough_shares,
    _micro_batches,
    *RULES_OF_DEGREES,
)
