"""The ranks of one run: who is slow, who waits, who is silent, who is about to run out of memory."""

from __future__ import annotations

from monitoring.dashboards.panels import Column, Dashboard, Panel, Row, Target, Threshold
from monitoring.dashboards.query import of_run
from monitoring.dashboards.run import CHOICE, GENERATIONS, INCIDENTS

ALONE = "A rank alone is compared with nobody."
_SLOW = (Threshold(0.75, "yellow"), Threshold(0.85, "green"))


def _by_rank(name: str, may_be_empty: str = "") -> tuple[Target, ...]:
    return (Target(f"max by (rank) ({of_run(name)})", "{{rank}}", may_be_empty=may_be_empty),)


def _now(name: str, may_be_empty: str = "") -> Target:
    return Target(f"max by (rank) ({of_run(name)})", instant=True, may_be_empty=may_be_empty)


_MAPS = Row(
    "Heat maps, a line a rank",
    (
        Panel("Step time", "The rank's own work in the newest step, without waiting for others.",
              _by_rank("rank_step_seconds"), "s", "heatmap", low_is_good=True),
        Panel("Speed", "As a share of the fastest rank's: red is slow.", _by_rank("rank_relative_speed_ratio", ALONE),
              "percentunit", "heatmap", minimum=0.4, maximum=1),
        Panel("Waiting", "Share of a step that the rank waits for others: the slowest waits least.",
              _by_rank("rank_wait_ratio", ALONE), "percentunit", "heatmap", low_is_good=True, minimum=0, maximum=0.5),
        Panel("Own speed", "As a share of the rank's own best: red has become slower than it was.",
              _by_rank("rank_own_speed_ratio", ALONE), "percentunit", "heatmap", minimum=0.4, maximum=1),
    ),
)  # fmt: skip

_NOW = Row(
    "Now",
    (
        Panel(
            "Ranks", "Who has which rank, and how it does.",
            (
                Target(f"max by (rank, worker, node) ({of_run('rank_info')})", instant=True),
                _now("rank_relative_speed_ratio", ALONE),
                _now("rank_wait_ratio", ALONE),
                _now("rank_step_seconds"),
                _now("rank_virtual_workers"),
                Target(f"time() - max by (rank) ({of_run('rank_heartbeat_timestamp_seconds')})", instant=True),
                _now("rank_host_memory_bytes"),
            ),
            kind="table", width=24,
            columns=(
                Column("rank", "Rank"), Column("worker", "Worker"), Column("node", "Node"),
                Column("B", "Speed", "percentunit", _SLOW, "red"), Column("C", "Waits", "percentunit"),
                Column("D", "Step time", "s"), Column("E", "Virtual workers", "none"),
                Column("F", "Last heard", "s", (Threshold(10, "yellow"), Threshold(60, "red"))),
                Column("G", "Memory", "bytes"),
            ),
        ),
    ),
)  # fmt: skip

_WORK = Row(
    "Work",
    (
        Panel("Virtual workers", "How many each rank computes: work moves to where it is done fastest.",
              _by_rank("rank_virtual_workers"), "none", width=8, minimum=0),
        Panel("Tokens", "Targets that each rank was dealt in the newest step.", _by_rank("shard_tokens"), "short",
              width=8, minimum=0),
        Panel("Reading", "Time in which each rank read data in the newest step.", _by_rank("rank_data_seconds"), "s",
              width=8, minimum=0),
    ),
)  # fmt: skip

_HEALTH = Row(
    "Health",
    (
        Panel("Age of heartbeats", "How long ago each rank was last heard.",
              (Target(f"time() - max by (rank) ({of_run('rank_heartbeat_timestamp_seconds')})", "{{rank}}"),), "s",
              width=8, minimum=0, thresholds=(Threshold(60, "red"),)),
        Panel("Host memory", "Resident memory of each rank's process.", _by_rank("rank_host_memory_bytes"), "bytes",
              width=8, minimum=0),
        Panel("Device memory", "What each rank has allocated on its device; 0 without one.",
              _by_rank("rank_device_memory_bytes"), "bytes", width=8, minimum=0),
    ),
)  # fmt: skip

NO_GPU = "Of GPUs that are watched (NVML)."
_GPUS = Row(
    "GPUs",
    (
        Panel("GPU at work", "Share of the time in which something ran on each rank's GPU.",
              _by_rank("rank_gpu_utilization_ratio", NO_GPU), "percentunit", width=8, minimum=0, maximum=1),
        Panel("Clock", "Clock of the processors of each rank's GPU.", _by_rank("rank_gpu_clock_hertz", NO_GPU), "hertz",
              width=8, minimum=0),
        Panel("Slowed down", "1 while heat, power supply or hardware keeps the clock of a rank's GPU down.",
              _by_rank("rank_gpu_slowed_down", NO_GPU), "none", width=8, minimum=0, maximum=1,
              thresholds=(Threshold(1, "red"),)),
        Panel("Temperature", "Of each rank's GPU.", _by_rank("rank_gpu_temperature_celsius", NO_GPU), "celsius",
              width=8),
        Panel("Power", "What each rank's GPU takes.", _by_rank("rank_gpu_power_watts", NO_GPU), "watt", width=8,
              minimum=0),
        Panel("Free memory", "What nobody has of the memory of each rank's GPU.",
              _by_rank("rank_gpu_free_memory_bytes", NO_GPU), "bytes", width=8, minimum=0),
        Panel("Memory errors, corrected", "Since the driver was loaded.", _by_rank("rank_gpu_corrected_errors", NO_GPU),
              "none", width=12, minimum=0),
        Panel("Memory errors, not corrected", "Since the driver was loaded.",
              _by_rank("rank_gpu_uncorrected_errors", NO_GPU), "none", width=12, minimum=0,
              thresholds=(Threshold(1, "red"),)),
    ),
)  # fmt: skip

DASHBOARD = Dashboard(
    "orchestrator-ranks", "Orchestrator: ranks", "The ranks of one run: who is slow, who waits, who is silent.",
    (_MAPS, _NOW, _WORK, _HEALTH, _GPUS), (CHOICE,), (INCIDENTS, GENERATIONS),
)  # fmt: skip
