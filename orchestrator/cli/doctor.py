"""`orchestrator doctor`: is this machine, or this cluster, fit to train on? Reads RAY_ADDRESS; starts no Ray."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from monitoring.outside import json_text
from orchestrator.doctor.check import Check, as_json, is_ok, lines_of, summary
from orchestrator.doctor.stages import Settings, chosen
from orchestrator.doctor.supervise import examine
from orchestrator.urls import expand


def doctor(address: str | None, storage: str | None, *, as_json_: bool, quick: bool) -> bool:
    """Prints a line for each check when it is made, or one JSON object at the end; returns whether there is no problem.

    Raises ValueError for an address or a storage URL that cannot be one.
    """
    address = cluster_address(address or os.environ.get("RAY_ADDRESS") or None)
    settings = Settings(address, storage and storage_url(storage), quick, f"doctor-{secrets.token_hex(4)}")

    def tell(checks: list[Check]) -> None:
        if not as_json_ and checks:
            print("\n".join(lines_of(checks)), flush=True)

    checks = examine(settings, chosen(settings), tell)
    if as_json_:
        print(json_text(as_json(checks)))
        return is_ok(checks)
    print(f"\n{summary(checks)}")
    if address is not None and not any(check.name == "ports" for check in checks):
        print("the nodes of the cluster were not examined")
    if address is None:
        print("only this machine was examined; for a cluster run this on one of its nodes with --address auto, or "
              "with the address of its head: --address HOST:6379")  # fmt: skip
    return is_ok(checks)


def cluster_address(address: str | None) -> str | None:
    """An address that Ray's driver connects to: host:port, or auto; None is this machine alone. Raises ValueError."""
    if address is None or address == "local":
        return None
    if address == "auto":
        return address
    if "://" in address:
        which = "Ray Client's" if address.startswith("ray://") else "the dashboard's"
        raise ValueError(f"{address} is {which} address; give that of the GCS, HOST:6379, or auto on a node of the "
                         "cluster")  # fmt: skip
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or (":" in host and not host.startswith("[")):
        raise ValueError(f"{address!r} is no address; give HOST:PORT of the GCS (port 6379, if not chosen otherwise), "
                         "or auto on a node of the cluster")  # fmt: skip
    return address


def storage_url(storage: str) -> str:
    """A storage as every process understands it. Raises ValueError for a URL of no known kind."""
    protocol, separator, rest = storage.partition("://")
    if not separator:
        return str(Path(storage).expanduser().absolute())
    import fsspec

    if not rest.strip("/"):
        raise ValueError(f"{storage!r} names no bucket or directory")
    if protocol not in fsspec.available_protocols():
        raise ValueError(f"{protocol}:// is no storage that fsspec knows; for example s3, gs, abfs, hdfs, sftp")
    return expand(storage)
