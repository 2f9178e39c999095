"""Verdicts on one machine: files, disks, shared memory, GPUs. The thresholds and why they are what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.doctor.check import NOTE, OK, PROBLEM, WARNING, Check, size

FEW_OPEN_FILES = 8192
"""Ray asks for at least this many of a server; a small cluster gets by."""
MANY_OPEN_FILES = 65536
"""Ray raises its own limit to this if it may. A worker holds a connection to every other one for each process group
and the head several for every worker, so that hundreds of workers pass 8192."""
LARGE_CLUSTER_NODES = 32

FULL_SHARE = 0.05
"""Ray keeps no more objects on a file system that is 95 % full (its local_fs_capacity_threshold)."""
LITTLE_DISK_BYTES = 10e9
NO_DISK_BYTES = 1e9

LITTLE_SHARED_MEMORY_BYTES = 1e9
"""NCCL's documentation asks for 1 GB in containers (docker's own choice is 64 MB), where ranks of a node meet."""


def judge_open_files(node: str, facts: Mapping[str, Any], num_nodes: int = 1) -> Check:
    """The hard limit counts: Ray raises the soft one to it, up to 65536, in each of its processes."""
    soft, hard = facts["open_files"]
    limit = float("inf") if hard < 0 else hard
    found = f"ulimit -n is {_limit(soft)}, and can be raised to {_limit(hard)}" if soft != hard else (
        f"ulimit -n is {_limit(soft)}")  # fmt: skip
    advice = (
        f"raise it to {MANY_OPEN_FILES} before Ray starts: `ulimit -n {MANY_OPEN_FILES}`, nofile in "
        "/etc/security/limits.conf, LimitNOFILE= of a service, or --ulimit nofile of docker"
    )
    if limit < FEW_OPEN_FILES or (limit < MANY_OPEN_FILES and num_nodes > LARGE_CLUSTER_NODES):
        return Check("open files", node, WARNING, found, advice)
    if limit < MANY_OPEN_FILES:
        return Check("open files", node, NOTE, f"{found}: enough for up to {LARGE_CLUSTER_NODES} nodes")
    return Check("open files", node, OK, found)


def _limit(count: int) -> str:
    return "unlimited" if count < 0 else str(count)


def judge_disks(node: str, facts: Mapping[str, Any]) -> list[Check]:
    """A check for each directory that was looked at."""
    return [_judge_disk(node, what, disk) for what, disk in facts["disks"].items()]


def _judge_disk(node: str, what: str, disk: Mapping[str, Any]) -> Check:
    path = disk["path"]
    if "error" in disk:
        return Check("disk", node, PROBLEM, f"{what} {path}: {disk['error']}", "mount it, or choose another directory")
    free, total = disk["free_bytes"], disk["total_bytes"]
    found = f"{size(free)} of {size(total)} free for {what} in {path}"
    if free < NO_DISK_BYTES:
        return Check("disk", node, PROBLEM, found, "make room, or choose another directory; Ray and checkpoints fail "
                     "without")  # fmt: skip
    if free < total * FULL_SHARE:
        return Check("disk", node, WARNING, found, "make room: Ray keeps no more objects on a disk that is 95 % full")
    if free < LITTLE_DISK_BYTES:
        return Check("disk", node, WARNING, found, "make room: logs and checkpoints of a run soon need more")
    return Check("disk", node, OK, found)


def judge_shared_memory(node: str, facts: Mapping[str, Any], object_store_bytes: float | None = None) -> Check:
    """Against the object store that Ray has there; without one against what ranks of a node need to meet."""
    memory = facts["shared_memory"]
    if memory is None or "error" in memory:
        reason = "there is none" if memory is None else memory["error"]
        return Check("shared memory", node, WARNING, f"/dev/shm: {reason}", "mount a tmpfs at /dev/shm: Ray's object "
                     "store and NCCL use it")  # fmt: skip
    total = memory["total_bytes"]
    found = f"/dev/shm has {size(total)}"
    if object_store_bytes is not None:
        found += f", the object store asks for {size(object_store_bytes)}"
        if total < object_store_bytes:
            return Check("shared memory", node, WARNING, found, "give the container more (--shm-size of docker, an "
                         "emptyDir of medium Memory in Kubernetes), or Ray less (--object-store-memory)")  # fmt: skip
    if total < LITTLE_SHARED_MEMORY_BYTES:
        return Check("shared memory", node, WARNING, found, "give the container at least 1 GB (--shm-size=1g of "
                     "docker, an emptyDir of medium Memory in Kubernetes)")  # fmt: skip
    return Check("shared memory", node, OK, found)


def judge_gpus(node: str, facts: Mapping[str, Any], ray_gpus: float | None = None) -> Check:
    """What torch sees, against what Ray believes the node has (None: nobody asked Ray)."""
    devices, driver = facts["devices"], facts["driver"]
    expected = int(ray_gpus or 0)
    if facts.get("error"):
        advice = "mend the installation of torch" if not devices and not driver else (
            "see whether nvidia-smi answers; restart the driver, or replace the node")  # fmt: skip
        return Check("GPUs", node, PROBLEM, facts["error"], advice)
    if len(devices) < expected:
        return Check("GPUs", node, PROBLEM, f"Ray counts {expected}, torch sees {len(devices)}",
                     "see whether nvidia-smi shows them all and torch is a CUDA build; or start Ray with --num-gpus of "
                     "what there is")  # fmt: skip
    if not devices and driver:
        why = "torch is built without CUDA" if not facts["torch_cuda"] else "torch sees none"
        return Check("GPUs", node, WARNING, f"the driver {driver} is there, but {why}",
                     "install a CUDA build of torch, and see that CUDA_VISIBLE_DEVICES is not empty")  # fmt: skip
    if not devices:
        return Check("GPUs", node, NOTE, "no GPU: gloo will be used")
    found = f"{_devices(devices)}, driver {driver}, CUDA {facts['torch_cuda']}, NCCL {facts['nccl']}"
    if ray_gpus is not None and len(devices) > expected:
        return Check("GPUs", node, WARNING, f"torch sees {found}, but Ray counts {expected}",
                     "start Ray with --num-gpus, or the rest is never used")  # fmt: skip
    return Check("GPUs", node, OK, found)


def _devices(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))


def judge_gpu_software(facts: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Whether the machines that have GPUs have the same NCCL and driver; nothing to say of fewer than two."""
    having = {node: own for node, own in facts.items() if own["devices"]}
    if len(having) < 2:
        return []
    checks = []
    for key, title, level in (("nccl", "NCCL", PROBLEM), ("driver", "driver", WARNING)):
        usual = max({own[key] for own in having.values()}, key=lambda v: sum(o[key] == v for o in having.values()))
        for node, own in having.items():
            if own[key] != usual:
                checks.append(Check("GPU software", node, level, f"{title} {own[key]}, most others have {usual}",
                                    "use one image on all nodes"))  # fmt: skip
    return checks or [Check("GPU software", "all GPU nodes", OK, "the same NCCL and driver")]
