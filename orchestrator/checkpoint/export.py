"""Weights as a Hugging Face directory: config.json, safetensors with an index, tokenizer.

Tensor by tensor: each is read, cast, and written before the next is read, so that never more
than the largest one is in memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monitoring.errors import UserError
from monitoring.outside import json_text
from orchestrator.checkpoint.manifest import ITEM_BYTES
from orchestrator.checkpoint.parts import safetensors_header
from orchestrator.checkpoint.tensors import DTYPES, bytes_of
from orchestrator.data import load_tokenizer
from orchestrator.job import Job
from orchestrator.models.weights import WeightSource
from orchestrator.storage import LocalStorage

SHARD_BYTES = 4 << 30
"""Of one file at most, where a tensor allows."""
EXPORT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ExportError(UserError, ValueError):
    """What was asked for cannot be exported; says why."""


class IncompleteWeights(ExportError):
    """The weights are not all that the job's model has."""

    exit_code = 1


def export(
    weights: WeightSource, job: Job, target: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes the model of a job with these weights to the new directory `target`, its floating-point tensors as `dtype`
    (fp32, bf16 or fp16; None: as they are). Returns the files.

    `transformers.AutoModelForCausalLM.from_pretrained` loads it. Raises ExportError, OSError, and what the weights
    raise: CheckpointError.
    """
    skeleton = _skeleton(job)
    names = _exported_names(skeleton, weights)
    with new_directory(target):
        write_tensors(weights, target, names, dtype, shard_bytes)
        _write_config(skeleton, job, target, dtype)
        write_tokenizer(job.data.tokenizer, target)
    return sorted(target.iterdir())


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[None]:
    """Makes it, for what is written there meanwhile; whatever goes wrong, nothing is left of it. Raises ExportError."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"--to {target}: there is something already; name a new directory")
    target.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _skeleton(job: Job) -> nn.Module:
    """The job's model without weights."""
    from orchestrator.models.loading import empty_model

    if job.model.factory is not None:
        raise ExportError(
            f"model.factory {job.model.factory!r} makes a model of your own, which has no Hugging Face format; "
            "docs/checkpoints.md tells how to read its tensors"
        )
    with torch.device("meta"):
        skeleton: nn.Module = empty_model(job)
    return skeleton


def _exported_names(skeleton: nn.Module, weights: WeightSource) -> list[str]:
    """The tensors of the model that there are, in its order. Raises ExportError when one is missing."""
    wanted, there = list(skeleton.state_dict()), weights.tensors()
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ())
    missing = sorted(name for name in wanted if name not in there and name not in tied)
    if missing:
        raise IncompleteWeights(f"{weights.name} has no {', '.join(missing[:5])} of this model")
    return [name for name in wanted if name in there]


def write_tensors(
    weights: WeightSource, target: Path, names: Sequence[str], dtype: str | None, shard_bytes: int = SHARD_BYTES,
    *, file: str = "model.safetensors",
) -> None:  # fmt: skip
    """Writes these to `file`, or several and an index where it would be too large. Raises ExportError."""
    if dtype is not None and dtype not in EXPORT_TYPES:
        raise ExportError(f"--dtype {dtype!r}: one of {', '.join(EXPORT_TYPES)}")
    types, sizes = {}, {}
    for name in names:
        stored, shape = weights.tensors()[name]
        types[name] = EXPORT_TYPES[dtype] if dtype is not None and stored.is_floating_point else stored
        sizes[name] = math.prod(shape) * ITEM_BYTES[DTYPES[types[name]]]
    shards = _deal(sizes, shard_bytes)
    storage = LocalStorage(target)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = file
        if len(shards) > 1:
            part = f"{file.removesuffix('.safetensors')}-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(shard, part)
        storage.put(part, functools.partial(_contents, weights, shard, types, sizes))
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (target / f"{file}.index.json").write_text(
            json_text(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


def _deal(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most this many bytes where one alone does not have more."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def _contents(
    weights: WeightSource,
    shard: Sequence[str],
    types: Mapping[str, torch.dtype],
    sizes: Mapping[str, int],
) -> Iterator[bytes | memoryview]:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in shard:
        shape = list(weights.tensors()[name].shape)
        described[name] = {
            "dtype": DTYPES[types[name]], "shape": shape, "data_offsets": [offset, offset + sizes[name]],
        }  # fmt: skip
        offset += sizes[name]
    yield safetensors_header(described)
    for name in shard:
        values = weights.read(name).to(types[name]).contiguous()
        yield bytes_of(values)


def _write_config(skeleton: Any, job: Job, target: Path, dtype: str | None) -> None:
    config, generation = skeleton.config, getattr(skeleton, "generation_config", None)
    if not isinstance(job.model.hf, str):
        # What a model type has by default are the tokens of somebody else's tokenizer.
        end = load_tokenizer(job.data.tokenizer).end_of_document
        for each in (config, *([] if generation is None else [generation])):
            each.bos_token_id, each.eos_token_id = None, end
    # Of some types it is no field unless it is set.
    if getattr(config, "pad_token_id", None) is None and (pad := _pad_of(job)) is not None:
        config.pad_token_id = pad  # Classifiers of transformers look for the last token before it.
    config.dtype = EXPORT_TYPES[dtype or "fp32"]
    config.architectures = [type(skeleton).__name__]
    config.use_cache = True
    config.save_pretrained(target)
    if generation is not None and skeleton.can_generate():
        generation.save_pretrained(target)


def _pad_of(job: Job) -> int | None:
    """The tokenizer's token for padding, if it has one that is nothing else."""
    path = Path(job.data.tokenizer).expanduser()
    if not path.is_dir():
        return None
    from transformers import AutoTokenizer

    found: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    return None if found.pad_token_id == found.eos_token_id else found.pad_token_id


def write_tokenizer(name: str, target: Path) -> None:
    """As Hugging Face's libraries load it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from orchestrator.data.tokenizers import BYTES, byte_backend

    if name == BYTES:
        backend, end = byte_backend()
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end).save_pretrained(target)
        return
    path = Path(name).expanduser()
    if path.is_dir():
        AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False).save_pretrained(target)
        return
    shutil.copyfile(path, target / "tokenizer.json")
    if (config := path.with_name("tokenizer_config.json")).is_file():
        shutil.copyfile(config, target / "tokenizer_config.json")
