"""A checkpoint is one directory `step-00000120/`: `state.safetensors`, and `MANIFEST.json` with every tensor's digest.

It is written beside its place and renamed into it after everything is on disk, so that a directory with its final
name is complete; and what is loaded is verified against the manifest first, so that a name alone is never trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from orchestrator.checkpoint.names import directory_name, find

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; says which and why."""


def save(
    directory: Path, committed: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], keep: int
) -> tuple[Path, int]:
    """Writes the state after `committed` steps; returns its path and size in bytes.

    A valid checkpoint of the same step is left as it is (states of one step are the same bits), a damaged one is
    replaced. All but this one and the `keep` newest are removed. Raises OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / directory_name(committed)
    if final.exists() and not _is_valid(final):
        _remove(final)
    if not final.exists():
        draft = directory / f".draft-{final.name}-{uuid.uuid4().hex[:8]}"
        draft.mkdir()
        try:
            _write(draft, committed, tensors, meta)
            try:
                os.rename(draft, final)
            except OSError:
                if not final.exists():
                    raise
            _sync(directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    size = sum(path.stat().st_size for path in final.iterdir())
    for _, path in find(directory)[keep:]:
        if path != final:
            _remove(path)
    return final, size


def _write(draft: Path, committed: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, draft / "state.safetensors")
    except SafetensorError as error:
        raise OSError(f"{draft / 'state.safetensors'}: {error}") from error
    manifest = {
        "format": FORMAT,
        "committed": committed,
        **meta,
        "tensors": {name: _entry(tensor) for name, tensor in whole.items()},
    }
    manifest["digest"] = _digest_of(manifest)
    (draft / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    for path in (draft / "state.safetensors", draft / "MANIFEST.json", draft):
        _sync(path)


def _remove(path: Path) -> None:
    """Takes the name away first, so that a removal cut short leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(f".removed-{path.name}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError):
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_valid(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def load(path: Path, on_tensor: Callable[[], None] = lambda: None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, each verified against its digest; `on_tensor` is called after each.

    Raises CheckpointError when anything is missing, unreadable or different from what was saved.
    """
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']} is not one this version reads ({FORMAT})")
        if manifest.pop("digest") != _digest_of(manifest):
            raise CheckpointError(f"{path}: MANIFEST.json is not what was saved (digest differs)")
        if path.name != directory_name(manifest["committed"]):
            raise CheckpointError(f"{path}: holds the state of step {manifest['committed']}, not what its name says")
        tensors = {}
        with safe_open(path / "state.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[name] = file.get_tensor(name)
                on_tensor()
        expected: dict[str, Any] = manifest["tensors"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable: {type(error).__name__}: {error}") from error
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise CheckpointError(f"{path}: the manifest and the data name different tensors: {', '.join(odd[:5])}")
    for name, tensor in tensors.items():
        if _entry(tensor) != expected[name]:
            raise CheckpointError(f"{path}: {name} is not what was saved (digest, shape or dtype differs)")
        on_tensor()
    return tensors


def _digest_of(manifest: Mapping[str, Any]) -> str:
    """xxh3-128 of the manifest without its own digest, as canonical JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())


def _entry(tensor: torch.Tensor) -> dict[str, Any]:
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "xxh3_128": xxhash.xxh3_128_hexdigest(raw.data),
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
