"""The directory a job's model is loaded from: where it is, and what can be told of it without torch or transformers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from orchestrator.models.problems import reason_of, refused

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_directory(name: str) -> Path:
    """The directory that `model.hf: name` means: a path, or the copy of a hub's model in the local cache.

    Nothing is downloaded: a job must not depend on what a hub serves today. Raises ModelError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise refused(f"{name} is a file; name the directory that save_pretrained or `orchestrator export` has written")
    cached = _in_the_cache(name) if _HUB_ID.fullmatch(name) else None
    if cached is not None:
        return cached
    looked = f"no directory {name!r} (working directory {os.getcwd()})"
    if _HUB_ID.fullmatch(name):
        looked += f", and no model of this name in the Hugging Face cache {_cache()}"
    raise refused(
        f"there is {looked}; check the path, or fetch a hub's model beforehand with `hf download`: a run downloads none"
    )


def read_config(name: str, directory: Path) -> dict[str, Any]:
    """The content of the directory's config.json. Raises ModelError when it is missing, broken, or asks for code."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise refused(f"{name} has no config.json, so it is not a model that save_pretrained has written") from None
    except (OSError, ValueError, RecursionError) as error:
        raise refused(f"{path} cannot be read: {reason_of(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise refused(f"{path} must be a mapping with a model_type")
    return content


def _cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded, by the variables that it reads."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def _in_the_cache(name: str) -> Path | None:
    """The newest snapshot of a hub's model, by the layout of huggingface_hub's cache (refs/main names it)."""
    folder = _cache() / f"models--{name.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return snapshot if (snapshot / "config.json").is_file() else None
