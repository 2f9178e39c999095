"""Verdicts on a storage that every machine wrote to, looked into and read from (`doctor.storage_probe`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.doctor.check import CLUSTER, OK, PROBLEM, WARNING, Check, size, speed

NAME = "storage"


@dataclass(frozen=True)
class Probe:
    """What came of it on one machine. Each wrote `name`; `reader_of` is the machine whose file it read back."""

    node: str
    name: str
    reader_of: str
    written: Mapping[str, Any]
    read: Mapping[str, Any]


def readers(nodes: Sequence[str]) -> dict[str, str]:
    """Whose file each machine reads: the next one's, so that nobody reads what it still has in memory."""
    return dict(zip(nodes, [*nodes[1:], *nodes[:1]], strict=True))


def judge_storage(where: str, num_bytes: int, probes: Sequence[Probe], removal: Mapping[str, str]) -> list[Check]:
    """A check for each machine, one on whether all see the same, and one for each that could not clean up (`removal`:
    why)."""
    by_node = {probe.node: probe for probe in probes}
    # Who wrote nothing cannot be missed by others.
    names = {probe.node: probe.name for probe in probes if "error" not in probe.written}
    blind: dict[str, list[str]] = {}
    checks = []
    for probe in probes:
        missing = [node for node, name in names.items() if name not in probe.read.get("visible", [])]
        if "error" in probe.written:
            checks.append(Check(NAME, probe.node, PROBLEM, f"{where} cannot be written to: {probe.written['error']}",
                                "see that it exists there, is mounted, and that this user or the node's credentials "
                                "may write to it"))  # fmt: skip
        elif missing:
            blind[probe.node] = missing
        else:
            checks.append(_judge_reading(where, num_bytes, probe, by_node[probe.reader_of]))
    if blind:
        checks += _judge_sharing(where, names, blind)
    checks += [
        Check(NAME, node, WARNING, f"{where}: the files of this check were not removed: {reason}",
              "remove its directory doctor-* by hand; expiry of old checkpoints would fail like this")
        for node, reason in removal.items()
    ]  # fmt: skip
    return checks


def _judge_reading(where: str, num_bytes: int, probe: Probe, written_by: Probe) -> Check:
    wrote = f"writes {speed(num_bytes / probe.written['seconds'])}"
    if "error" in written_by.written:
        return Check(NAME, probe.node, OK, f"{where}: {wrote}; nothing to read, as {written_by.node} wrote nothing")
    if "error" in probe.read:
        return Check(NAME, probe.node, PROBLEM, f"{where}: {wrote}, but cannot be read: {probe.read['error']}",
                     "see that this user or the node's credentials may read it")  # fmt: skip
    if probe.read["digest"] != written_by.written["digest"]:
        return Check(NAME, probe.node, PROBLEM, f"{where}: what {written_by.node} wrote reads differently here",
                     "do not keep checkpoints there: a file that was written and closed has to read the same "
                     "everywhere")  # fmt: skip
    return Check(NAME, probe.node, OK, f"{where}: {wrote}, reads {speed(num_bytes / probe.read['seconds'])} "
                 f"({size(num_bytes)}, all at once, equal bytes)")  # fmt: skip


def _judge_sharing(where: str, names: Mapping[str, str], blind: Mapping[str, list[str]]) -> list[Check]:
    advice = (
        "name a directory on a file system that all nodes mount (NFS, EFS, FSx, Lustre), or a URL (s3://, gs://, "
        "abfs://): another node could not resume from what was saved"
    )
    if all(len(missing) == len(names) - 1 for missing in blind.values()) and len(blind) == len(names):
        return [Check(NAME, CLUSTER, PROBLEM, f"{where} is not shared: every node sees only what it wrote itself",
                      advice)]  # fmt: skip
    return [
        Check(NAME, node, PROBLEM, f"{where} is not shared: does not see what {_some(missing)} wrote", advice)
        for node, missing in blind.items()
    ]


def _some(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")
