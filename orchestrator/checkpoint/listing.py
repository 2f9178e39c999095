"""What checkpoints a run has, and whether they are what was saved: for `orchestrator checkpoints`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.manifest import CheckpointError


@dataclass(frozen=True)
class Row:
    """One checkpoint. `age_seconds`, `num_bytes` and `layout` are None where they cannot be known."""

    step: int
    location: str
    valid: bool
    why: str = ""
    age_seconds: float | None = None
    num_bytes: int | None = None
    writers: int | None = None
    layout: dict[str, Any] | None = None
    encrypted: bool = False


def rows(catalog: Catalog, *, verify: bool) -> list[Row]:
    """All checkpoints, newest first; with `verify` every byte of them is read. Raises OSError when they cannot be
    listed; one that cannot be read is a row that says so."""
    found = []
    for step in catalog.all_steps():
        location = catalog.locate(step)
        try:
            checkpoint = catalog.open(step, keyless=True)
        except (CheckpointError, OSError) as error:
            found.append(Row(step, location, valid=False, why=str(error)))
            continue
        why = ""
        if verify:
            try:
                checkpoint.verify()
            except (CheckpointError, OSError) as error:
                why = str(error)
        manifest = checkpoint.manifest
        found.append(
            Row(
                step, location, valid=not why, why=why, age_seconds=max(0.0, time.time() - checkpoint.saved_at),
                num_bytes=checkpoint.num_bytes, writers=len(manifest.files), layout=manifest.layout,
                encrypted=manifest.encryption is not None,
            )
        )  # fmt: skip
    return found


def describe(row: Row, *, verified: bool) -> str:
    """One line about a checkpoint."""
    if row.num_bytes is None or row.age_seconds is None:
        return f"{row.step:>10}  {'':>10}  {'':>10}  {'':<28}  invalid: {row.why}"
    state = f"invalid: {row.why}" if not row.valid else "valid, every byte verified" if verified else "valid"
    if row.encrypted:
        state += ", encrypted"
    return f"{row.step:>10}  {_age(row.age_seconds):>10}  {_size(row.num_bytes):>10}  {_layout(row):<28}  {state}"


HEADER = f"{'step':>10}  {'age':>10}  {'size':>10}  {'saved by':<28}  state"


def _layout(row: Row) -> str:
    layout = row.layout or {}
    degrees = "·".join(
        f"{letter}{layout[key]}"
        for letter, key in (("d", "data"), ("t", "tensor"), ("p", "pipeline"))
        if layout.get(key, 1) != 1
    )
    shard = layout.get("shard", "none")
    parts = [degrees, "" if shard == "none" else shard]
    described = " ".join(part for part in parts if part)
    return f"{row.writers} {'rank' if row.writers == 1 else 'ranks'}" + (f" ({described})" if described else "")


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
