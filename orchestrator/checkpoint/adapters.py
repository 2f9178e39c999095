"""The weights of a run that trained an adapter: as one that peft loads, or merged into those it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monitoring.outside import json_text
from orchestrator.checkpoint.export import ExportError, new_directory, write_tensors, write_tokenizer
from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.job.sections.adapter import Adapter
from orchestrator.models.adapters import NAME, base_name, is_of_adapter, peft_config
from orchestrator.models.weights import TensorInfo, WeightSource

_MODEL = "base_model.model."
"""How names begin in peft's files."""


def export_adapter(weights: WeightSource, job: Job, target: Path, dtype: str | None = None) -> list[Path]:
    """Writes the adapter of a run, and modules that were trained whole beside it, to the new directory `target`, in
    peft's format. Returns the files. Raises ExportError, OSError, and what the weights raise."""
    assert job.adapter is not None
    with new_directory(target):
        trained = _Adapter(weights, job)
        write_tensors(trained, target, list(trained.tensors()), dtype, file="adapter_model.safetensors")
        config = _config(weights, job, job.adapter)
        (target / "adapter_config.json").write_text(json_text(config, indent=2, sort_keys=True) + "\n", "utf-8")
        write_tokenizer(job.data.tokenizer, target)
    return sorted(target.iterdir())


def _config(weights: WeightSource, job: Job, adapter: Adapter) -> dict[str, Any]:
    adapted = sorted({name.split(".lora_")[0] for name in weights.tensors() if is_of_adapter(name)})
    saved = [*adapter.modules_to_save, *(["score"] if objective_of(job).num_outputs else [])]
    made = peft_config(adapter, targets=adapted, saved=saved)
    if isinstance(job.model.hf, str):
        path = Path(job.model.hf).expanduser()
        made.base_model_name_or_path = str(path.resolve()) if path.is_dir() else job.model.hf
    made.task_type = "SEQ_CLS" if objective_of(job).num_outputs else "CAUSAL_LM"
    made.inference_mode = True
    found: dict[str, Any] = made.to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value) for key, value in found.items()
    }


class _Adapter:
    """What was trained, by peft's names. See `WeightSource`."""

    def __init__(self, weights: WeightSource, job: Job) -> None:
        assert job.adapter is not None
        also = [*job.adapter.modules_to_save, *(["score"] if objective_of(job).num_outputs else [])]
        self._weights = weights
        self._names: dict[str, str] = {}
        for name in weights.tensors():
            if is_of_adapter(name):
                self._names[_MODEL + name.replace(f".{NAME}", "")] = name
            elif any(f".{name}".rpartition(".")[0].endswith(f".{each}") for each in also):
                self._names[_MODEL + name] = name

    @property
    def name(self) -> str:
        return self._weights.name

    def tensors(self) -> Mapping[str, TensorInfo]:
        there = self._weights.tensors()
        return {name: there[own] for name, own in self._names.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._weights.read(self._names[name])


class MergedWeights:
    """Those of the model without adapter that computes what the adapted one does. See `WeightSource`."""

    def __init__(self, weights: WeightSource, adapter: Adapter) -> None:
        self._weights = weights
        self._scale = adapter.alpha / (math.sqrt(adapter.r) if adapter.name == "rslora" else adapter.r)
        self._own = {base_name(name): name for name in weights.tensors() if not is_of_adapter(name)}

    @property
    def name(self) -> str:
        return self._weights.name

    def tensors(self) -> Mapping[str, TensorInfo]:
        there = self._weights.tensors()
        return {name: there[own] for name, own in self._own.items()}

    def read(self, name: str) -> torch.Tensor:
        """Raises KeyError when there is no such tensor, and what the weights raise."""
        own = self._own[name]
        values = self._weights.read(own)
        owner, _, key = own.rpartition(".")
        module = owner.removesuffix(".base_layer")
        if key != "weight" or not any(each.startswith(f"{module}.lora_") for each in self._weights.tensors()):
            return values
        change = self._change(module)
        if change.shape != values.shape:
            raise ExportError(f"{name}: an adapter of shape {list(change.shape)} beside {list(values.shape)}")
        merged = values.float() + change
        magnitude = f"{module}.lora_magnitude_vector.{NAME}.weight"
        if magnitude in self._weights.tensors():
            norms = torch.linalg.norm(merged, dim=1, keepdim=True)
            merged = merged / norms * self._weights.read(magnitude).reshape(-1, 1)
        return merged.to(values.dtype)

    def _change(self, module: str) -> torch.Tensor:
        """What the adapter adds to the matrix of a module."""
        there = self._weights.tensors()
        if f"{module}.lora_A.{NAME}.weight" in there:
            low, high = (self._weights.read(f"{module}.lora_{each}.{NAME}.weight").float() for each in "AB")
            return (high @ low) * self._scale
        low, high = (self._weights.read(f"{module}.lora_embedding_{each}.{NAME}").float() for each in "AB")
        return (high @ low).T * self._scale
