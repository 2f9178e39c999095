"""Where the weights of a model come from: a checkpoint, a directory, a rank that trains. One question for all who ask:
an export now, a service or an evaluation later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from orchestrator.models.problems import reason_of, refused


class TensorInfo(NamedTuple):
    """A tensor that has not been read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """Tensors by the names that the model has for them (its `state_dict`), each read when it is asked for, and whole:
    whatever layout they were trained or saved in."""

    @property
    def name(self) -> str:
        """What people call it, for errors."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Of parameters and buffers. A tensor that another is tied to may be missing."""

    def read(self, name: str) -> torch.Tensor:
        """One of them, on the CPU, verified as far as the source can. Raises KeyError when there is none of that name,
        and what the source raises for one that is damaged or out of reach."""


class DirectoryWeights:
    """A directory in Hugging Face's format, with safetensors.

    Raises ModelError when there are none, or they cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._directory = directory
        for file in sorted(directory.glob("*.safetensors")):
            self._look_into(file)
        if not self._files:
            raise refused(f"{directory} has no *.safetensors")

    def _look_into(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118
                    view = content.get_slice(name)
                    dtype = torch.empty(0, dtype=_DTYPES[view.get_dtype()]).dtype
                    self._files[name], self._tensors[name] = file, TensorInfo(dtype, tuple(view.get_shape()))
        except (OSError, SafetensorError, KeyError) as error:
            raise refused(f"{file} cannot be read: {reason_of(error)}") from error

    @property
    def name(self) -> str:
        return str(self._directory)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._files[name], framework="pt") as content:
                tensor: torch.Tensor = content.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise refused(f"{self._files[name]} cannot be read: {reason_of(error)}") from error
        return tensor


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""What safetensors calls them."""
