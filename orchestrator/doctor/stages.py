"""The stages of an examination: what they are called, how long they may take, what it means when they take longer."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.doctor.check import CLUSTER, HERE, PROBLEM, WARNING, Check


@dataclass(frozen=True)
class Settings:
    """What the user asked for; `probe` is the directory of this examination in the storage."""

    address: str | None
    storage: str | None
    quick: bool
    probe: str

    @property
    def exchange_bytes(self) -> int:
        return (8 if self.quick else 32) * 10**6

    @property
    def storage_bytes(self) -> int:
        return (8 if self.quick else 64) * 10**6


@dataclass(frozen=True)
class ExaminedStage:
    """`limit_s` is how long it may take; `advice` is for when it takes longer. One that `leads` to the cluster takes
    the stages that need the cluster with it when it fails."""

    name: str
    where: str
    limit_s: float
    advice: str
    needs_cluster: bool = True
    leads: bool = False

    def stuck(self, limit_s: float, settings: Settings) -> Check:
        found = f"not done within {limit_s:.0f} s"
        if self.name == "address":
            found = f"{settings.address} listens, but has not answered within {limit_s:.0f} s"
        return Check(self.name, self.where, PROBLEM, found, self.advice, limit_s)

    def crashed(self, reason: str) -> Check:
        return Check(self.name, self.where, PROBLEM, f"the process that examined this died: {reason}", self.advice)


_NODES_ADVICE = "see `ray status` and the logs of the nodes' raylets; a node that hangs has to be replaced"

STAGES = (
    ExaminedStage(
        "address",
        CLUSTER,
        12.0,
        "see that this is the GCS of Ray's head and not another of its ports (the GCS has 6379, if not chosen "
        "otherwise), and that the head is not overloaded",
        leads=True,
    ),
    ExaminedStage("machine", HERE, 30.0, "see whether a file system hangs (`df`)", needs_cluster=False),
    ExaminedStage(
        "GPUs",
        HERE,
        90.0,
        "see whether `nvidia-smi` answers; restart the driver, or replace the machine",
        needs_cluster=False,
    ),
    ExaminedStage("nodes", CLUSTER, 150.0, _NODES_ADVICE, leads=True),
    ExaminedStage("clock", CLUSTER, 30.0, _NODES_ADVICE),
    ExaminedStage("ports", CLUSTER, 60.0, _NODES_ADVICE),
    ExaminedStage("dashboard", CLUSTER, 30.0, _NODES_ADVICE),
    ExaminedStage("autoscaler", CLUSTER, 30.0, _NODES_ADVICE),
    ExaminedStage(
        "bandwidth", CLUSTER, 300.0, "see the checks of ports and the load of the nodes", needs_cluster=False
    ),
    ExaminedStage(
        "storage",
        CLUSTER,
        300.0,
        "see that the storage answers from here and from the nodes (route, credentials, a mount that hangs)",
        needs_cluster=False,
    ),
)
"""In this order. Those of a cluster are left out when there is none."""

SWEEP = ExaminedStage(
    "storage sweep", HERE, 30.0, "remove the directory doctor-* in the storage by hand", needs_cluster=False
)
"""After a stage of the storage that had to be ended: takes away what it left."""


def chosen(settings: Settings) -> list[ExaminedStage]:
    """The stages that these settings ask for."""
    return [
        stage
        for stage in STAGES
        if (settings.address is not None or not stage.needs_cluster)
        and (settings.storage is not None or stage.name != "storage")
    ]


def not_swept() -> Check:
    return Check("storage", HERE, WARNING, "files of this check may be left in the storage", SWEEP.advice)
