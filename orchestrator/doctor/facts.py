"""What there is on a machine. Measured in whatever process calls; judged elsewhere.

Sent to the nodes of a cluster as it is, by value, since a node may lack this very package: so functions here return
plain dictionaries, and use nothing of ours that is not sent along.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.comm.interfaces import interface_of

PACKAGES = ("ray", "torch", "elastic-orchestrator")


def machine_facts(directories: Mapping[str, str]) -> dict[str, Any]:
    """Versions, limits, memory, and the space in `directories` (by what they are for)."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": _code_digest(),
        "open_files": _open_files(),
        "disks": {what: _space(path) for what, path in directories.items()},
        "shared_memory": _space("/dev/shm") if os.path.isdir("/dev/shm") else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # From a job's working directory it comes without metadata.
        there = package == "elastic-orchestrator" and importlib.util.find_spec("orchestrator") is not None
        return "not installed, but importable" if there else None


def _code_digest() -> str | None:
    """Of the sources of our packages as this process would import them: a version number does not tell what somebody
    changed since."""
    digest = hashlib.sha256()
    for package in ("orchestrator", "strategies", "monitoring"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.origin:
            return None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _open_files() -> list[int]:
    """How many files a process may have open: now, and at most after asking for more. -1 is without limit."""
    import resource

    return list(resource.getrlimit(resource.RLIMIT_NOFILE))


def _space(path: str) -> dict[str, Any]:
    """Of the file system that a directory is on, or would be on when it is made."""
    there = Path(path).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        total, _, free = shutil.disk_usage(there)
    except OSError as error:
        return {"path": path, "error": str(error)}
    return {"path": path, "total_bytes": total, "free_bytes": free}


def interface_facts(host: str) -> dict[str, Any]:
    """The network interface that has the address `host`, its speed in bits per second (0: not known), and what the
    environment chooses for NCCL."""
    import psutil

    name = interface_of(host)
    stats = psutil.net_if_stats().get(name or "")
    return {
        "host": host,
        "name": name,
        "bits_per_second": 0 if stats is None else stats.speed * 1_000_000,
        "chosen": os.environ.get("NCCL_SOCKET_IFNAME", ""),
    }


def token_facts(environment: Mapping[str, str], home: Path) -> dict[str, Any]:
    """How this process would authenticate itself to Ray, in the order in which Ray looks: never the token itself.

    The order is that of Ray's documentation of token authentication: RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH,
    ~/.ray/auth_token.
    """
    facts: dict[str, Any] = {"mode": environment.get("RAY_AUTH_MODE"), "source": None, "path": None, "file_mode": None}
    if environment.get("RAY_AUTH_TOKEN", "").strip():
        return facts | {"source": "RAY_AUTH_TOKEN"}
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray" / "auth_token"
    try:
        if not path.read_text(encoding="utf-8").strip():
            raise OSError("the file is empty")
        file_mode = path.stat().st_mode & 0o777
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return facts | ({"source": "RAY_AUTH_TOKEN_PATH", "path": str(path), "error": reason} if named else {})
    return facts | {"source": "RAY_AUTH_TOKEN_PATH" if named else "default", "path": str(path), "file_mode": file_mode}


def gpu_facts() -> dict[str, Any]:
    """What torch sees; imports it, which takes seconds."""
    try:
        import torch
    except Exception as error:  # what a broken installation raises is not always an ImportError
        return {"error": f"torch cannot be imported: {error}", "devices": [], "driver": _driver()}
    facts: dict[str, Any] = {"devices": [], "torch_cuda": torch.version.cuda, "nccl": None, "driver": _driver()}
    try:
        facts["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.version.cuda and torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except Exception as error:
        facts["error"] = str(error).strip().splitlines()[0]
    return facts


def _driver() -> str | None:
    """The version of NVIDIA's driver; None when there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
