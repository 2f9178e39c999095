"""Where the weights of a model come from: a checkpoint, a directory, a rank that trains. One question for all who ask:
an export now, a service or an evaluation later."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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


class SavedWeights(WeightSource, Protocol):
    """Those of a directory, under the names that the files have for them."""

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows first..last of a tensor that has some, without reading the others."""


def saved_in(directory: Path) -> SavedWeights:
    """The weights in a directory in Hugging Face's format: safetensors, or else what torch has pickled.

    Raises ModelError when there are none, or they cannot be read.
    """
    if any(directory.glob("*.safetensors")):
        return DirectoryWeights(directory)
    return PickledWeights(directory)


class DirectoryWeights:
    """Of safetensors. Raises ModelError when there are none, or they cannot be read."""

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
        return self._read(name, lambda content: content.get_tensor(name))

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._read(name, lambda content: content.get_slice(name)[first:last])

    def _read(self, name: str, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._files[name], framework="pt") as content:
                return what(content)
        except (OSError, SafetensorError) as error:
            raise refused(f"{self._files[name]} cannot be read: {reason_of(error)}") from error


class PickledWeights:
    """Of torch's own format, read without running what could be code in it; mapped into memory, so that a tensor is
    read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        files = sorted(directory.glob("pytorch_model*.bin"))
        if not files:
            raise refused(f"{directory} has no weights: no *.safetensors, and no pytorch_model*.bin")
        self._found: dict[str, torch.Tensor] = {}
        for file in files:
            self._found |= self._load(file)

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise refused(
                f"{file} is damaged, or pickled with more than tensors in it, which could be code and is not loaded. "
                "Save the weights as safetensors (save_pretrained writes these)"
            ) from error
        except Exception as error:
            # A file that is cut short, or saved by an early torch, fails in many ways.
            raise refused(f"{file} cannot be read: {reason_of(error)}") from error
        return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}

    @property
    def name(self) -> str:
        return str(self._directory)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._found.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._found[name]

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._found[name][first:last]


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""What safetensors calls them."""
