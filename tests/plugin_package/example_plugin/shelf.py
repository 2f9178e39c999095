"""A storage: `shelf://NAME/...` is a directory below the one that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.storage import LocalStorage


def shelf(url: str) -> LocalStorage:
    return LocalStorage(Path(os.environ["SHELVES"]) / url.removeprefix("shelf://"))


def cupboard(url: str) -> str:
    return url
