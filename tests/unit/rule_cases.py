"""For every alert, histories in which it fires and in which it does not, as `promtool test rules` reads them.

A case is what differs from a run in which all is well. Time is in minutes from 0; a value such as `0+60x30` is
promtool's: 0, then 30 times 60 more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from monitoring.alerts import DEFAULT_RUNBOOKS, Alert, Group

ALWAYS = 6000
"""Minutes: longer than the longest window. A series ends with its case, which is sooner."""
LONG = 200
"""Cases that last longer than this (minutes) are evaluated every ten minutes only."""


def fixed(value: float | str, minutes: int = ALWAYS) -> str:
    return f"{value}+0x{minutes}"


def clock(behind: int = 0) -> str:
    """A timestamp that is now, or some seconds ago."""
    return f"{-behind}+60x{ALWAYS}"


def stopped(minute: int) -> str:
    """A timestamp that was now until that minute, and stays there."""
    return f"0+60x{minute} {60 * minute}+0x{ALWAYS}"


def then(*parts: tuple[float | str, int]) -> str:
    """Values one after the other, each for some minutes."""
    return " ".join(f"{value}+0x{minutes - 1}" for value, minutes in parts)


STATES = ("waiting", "settling", "forming", "running", "finalizing", "over")


def state(name: str) -> dict[str, str]:
    return {f'run_state{{state="{other}"}}': fixed(int(other == name)) for other in STATES}


HEALTHY: dict[str, str] = {
    'run_info{name="lm",version="1"}': fixed(1),
    "run_start_timestamp_seconds": fixed(0),
    **state("running"),
    "run_wall_seconds_total": clock(),
    "goodput_seconds_total": f"0+57x{ALWAYS}",
    "step": f"0+10x{ALWAYS}",
    "last_step_timestamp_seconds": clock(3),
    "step_expected_seconds": fixed(6),
    'world_size{state="member"}': fixed(4),
    "world_target": fixed(4),
    "world_min": fixed(2),
    "worst_node_failures": fixed(0),
    "controller_restarts_total": fixed(0),
    "loss": fixed(3),
    "nonfinite_total": fixed(0),
    "data_skew_ratio": fixed(1.05),
    'skew_findings{finding="slow device"}': fixed(0),
    'skew_findings{finding="uneven data"}': fixed(0),
    "checkpoint_step": f"0+10x{ALWAYS}",
    "checkpoint_last_success_timestamp_seconds": clock(240),
    "checkpoint_expected_interval_seconds": fixed(600),
    "checkpoint_failures_total": fixed(0),
    "checkpoint_verify_failures_total": fixed(0),
    'rank_heartbeat_timestamp_seconds{rank="0"}': clock(1),
    'rank_heartbeat_timestamp_seconds{rank="1"}': clock(1),
    "up": fixed(1),
}


@dataclass(frozen=True)
class Case:
    """At minute `at` the alert has these summaries (by rank, or "" where no rank is meant), or is silent."""

    alert: str
    name: str
    at: int
    changes: Mapping[str, str | None]
    """None takes a series away."""
    summaries: Mapping[str, str] = field(default_factory=dict)

    @property
    def fires(self) -> bool:
        return bool(self.summaries)


def fires(alert: str, name: str, at: int, summary: str, changes: Mapping[str, str | None]) -> Case:
    return Case(alert, name, at, changes, {"": summary})


def silent(alert: str, name: str, at: int, changes: Mapping[str, str | None]) -> Case:
    return Case(alert, name, at, changes)


_KILLS = 'failures_total{kind="kill"}'
_HANGS = 'failures_total{kind="hang"}'
_SLOW = 'skew_findings{finding="slow device"}'
_UNEVEN = 'skew_findings{finding="uneven data"}'
_BEAT = 'rank_heartbeat_timestamp_seconds{rank="1"}'
_MEMBERS = 'world_size{state="member"}'
_CHECKPOINT = "checkpoint_last_success_timestamp_seconds"

CASES: tuple[Case, ...] = (
    fires(
        "TrainingStalled", "the newest step is old", 34,
        "Run lm-1 trains, but no step was committed for 4m 0s", {"last_step_timestamp_seconds": stopped(30)},
    ),
    silent("TrainingStalled", "not yet for long enough", 32, {"last_step_timestamp_seconds": stopped(30)}),
    silent(
        "TrainingStalled", "steps take minutes", 34,
        {"last_step_timestamp_seconds": stopped(30), "step_expected_seconds": fixed(120)},
    ),
    silent(
        "TrainingStalled", "it waits for workers", 60,
        {"last_step_timestamp_seconds": stopped(30), **state("waiting")},
    ),
    silent("TrainingStalled", "it is over", 60, {"last_step_timestamp_seconds": stopped(30), **state("over")}),
    fires(
        "StartStalled", "no first step", 16, "Run lm-1 has workers, but no step was committed for 15 minutes",
        {"last_step_timestamp_seconds": None, "step": fixed(0), **state("forming")},
    ),
    fires(
        "StartStalled", "none since a recovery began", 62,
        "Run lm-1 has workers, but no step was committed for 15 minutes",
        {"last_step_timestamp_seconds": stopped(30), **state("forming")},
    ),
    silent("StartStalled", "a first step after ten minutes", 16, {"last_step_timestamp_seconds": f"0+0x9 {clock()}"}),
    silent("StartStalled", "it waits for workers", 60, {"last_step_timestamp_seconds": None, **state("waiting")}),
    fires(
        "WorldBelowMinimum", "one worker of two", 6, "Run lm-1 waits: 1 workers are fewer than it needs",
        {_MEMBERS: fixed(1), **state("waiting")},
    ),
    fires(
        "WorldBelowMinimum", "no worker at all", 6, "Run lm-1 waits: 0 workers are fewer than it needs",
        {_MEMBERS: None, **state("waiting")},
    ),
    silent("WorldBelowMinimum", "for a moment", 6, {_MEMBERS: then((4, 3), (1, 3)), **state("waiting")}),
    silent("WorldBelowMinimum", "fewer than it wants are enough", 60, {_MEMBERS: fixed(2)}),
    fires(
        "WorldBelowTarget", "three workers of four", 16, "Run lm-1 trains with 3 workers, fewer than it wants",
        {_MEMBERS: fixed(3)},
    ),
    silent("WorldBelowTarget", "a replacement comes", 30, {_MEMBERS: then((4, 10), (3, 8), (4, 100))}),
    silent("WorldBelowTarget", "workers leave at the end", 60, {_MEMBERS: fixed(0), **state("finalizing")}),
    Case(
        "HeartbeatMissing", "one rank is silent", 34, {_BEAT: stopped(30)},
        {"1": "Rank 1 of run lm-1 was not heard for 4m 0s"},
    ),
    silent("HeartbeatMissing", "silent for a minute", 31, {_BEAT: stopped(30)}),
    silent("HeartbeatMissing", "the rank was taken out", 40, {_BEAT: "0+60x30 stale"}),
    silent("HeartbeatMissing", "the run is over", 60, {_BEAT: stopped(30), **state("over")}),
    fires(
        "RestartLoop", "six failures of two kinds", 40, "Run lm-1 failed 6 times within 15 minutes",
        {_KILLS: f"_x30 1+1x3 4+0x{ALWAYS}", _HANGS: f"_x30 2+0x{ALWAYS}"},
    ),
    fires(
        "RestartLoop", "the controller too", 40, "Run lm-1 failed 3 times within 15 minutes",
        {"controller_restarts_total": f"0+0x29 1+1x2 3+0x{ALWAYS}"},
    ),
    silent("RestartLoop", "six failures in two hours", 150, {_KILLS: "_x10 " + then(*((n, 20) for n in range(1, 8)))}),
    silent(
        "RestartLoop", "a run with many failures is resumed", 3,
        {_KILLS: fixed(20), "controller_restarts_total": fixed(9)},
    ),
    silent("RestartLoop", "many resizes", 40, {'failures_total{kind="grow"}': f"0+0x29 1+1x20 21+0x{ALWAYS}"}),
    fires(
        "RepeatOffenderNode", "three failures in an hour", 100, "One node failed run lm-1 3 times within a day",
        {"worst_node_failures": "_x30 " + then((1, 30), (2, 30), (3, ALWAYS))},
    ),
    silent(
        "RepeatOffenderNode", "three in three days", 5000,
        {"worst_node_failures": then((0, 900), (1, 1500), (2, 1500), (3, ALWAYS))},
    ),
    fires(
        "ExporterAbsent", "no answer", 33, "Run lm-1 does not answer: nothing is known about it",
        {"up": then((1, 30), (0, 99))},
    ),
    silent("ExporterAbsent", "one missed scrape", 33, {"up": then((1, 30), (0, 1), (1, 99))}),
    silent("ExporterAbsent", "the run ended and took its file away", 40, {"up": "1+0x30 stale"}),
    fires(
        "NonFiniteLoss", "the loss is not finite", 32, "Run lm-1 computes numbers that are not finite",
        {"loss": f"3+0x29 NaN+0x{ALWAYS}"},
    ),
    fires(
        "NonFiniteLoss", "updates are skipped", 36, "Run lm-1 computes numbers that are not finite",
        {"nonfinite_total": f"_x30 1+1x3 4+0x{ALWAYS}"},
    ),
    silent("NonFiniteLoss", "one update was skipped", 36, {"nonfinite_total": then((0, 30), (1, ALWAYS))}),
    silent("NonFiniteLoss", "a spike", 36, {"loss": then((3, 30), (30, ALWAYS))}),
    fires(
        "LossSpike", "up by half", 45, "The loss of run lm-1 rose to 4.5 and stays there",
        {"loss": then((3, 40), (4.5, ALWAYS))},
    ),
    silent("LossSpike", "for a minute", 45, {"loss": then((3, 42), (4.5, 1), (3, ALWAYS))}),
    silent("LossSpike", "noise", 60, {"loss": " ".join(["3.0 3.6"] * 60)}),
    silent("LossSpike", "a fall", 45, {"loss": then((11, 40), (3, ALWAYS))}),
    fires(
        "Straggler", "a slow device stays", 45, "Run lm-1 has 1 slow workers or nodes that stay slow",
        {_SLOW: then((0, 30), (1, ALWAYS))},
    ),
    silent("Straggler", "slow for five minutes", 45, {_SLOW: then((0, 30), (1, 5), (0, ALWAYS))}),
    silent("Straggler", "uneven data is none", 45, {_UNEVEN: fixed(1)}),
    fires(
        "DataSkew", "uneven data stays", 45, "The most loaded rank of run lm-1 has 1.6 times the mean of work",
        {_UNEVEN: then((0, 30), (1, ALWAYS)), "data_skew_ratio": fixed(1.6)},
    ),
    silent("DataSkew", "ranks hold uneven numbers of virtual workers", 45, {"data_skew_ratio": fixed(1.6)}),
    silent("DataSkew", "for five minutes", 45, {_UNEVEN: then((0, 30), (1, 5), (0, ALWAYS))}),
    fires(
        "CheckpointStale", "none for half an hour, planned each ten minutes", 66,
        "The newest checkpoint of run lm-1 is 36m 0s old",
        {_CHECKPOINT: stopped(30), "checkpoint_step": then((300, ALWAYS))},
    ),
    fires(
        "CheckpointStale", "never one", 40, "The newest checkpoint of run lm-1 is 40m 0s old",
        {_CHECKPOINT: fixed(0), "checkpoint_step": None},
    ),
    silent("CheckpointStale", "a little late", 45, {_CHECKPOINT: stopped(30), "checkpoint_step": fixed(300)}),
    silent(
        "CheckpointStale", "resumed from an old one, as new as it can be", 90,
        {_CHECKPOINT: fixed(60), "checkpoint_step": "0+1x89 90+10x100", "step": "0+1x89 90+10x100"},
    ),
    silent(
        "CheckpointStale", "none planned", 600,
        {_CHECKPOINT: fixed(0), "checkpoint_step": None, "checkpoint_expected_interval_seconds": fixed(0)},
    ),
    fires(
        "CheckpointFailing", "the first one that fails", 31, "1 checkpoints of run lm-1 failed within an hour",
        {"checkpoint_failures_total": f"_x30 1+0x{ALWAYS}"},
    ),
    silent("CheckpointFailing", "yesterday", 1500, {"checkpoint_failures_total": then((0, 30), (1, ALWAYS))}),
    silent("CheckpointFailing", "delayed only", 31, {"checkpoints_delayed_total": then((0, 30), (1, ALWAYS))}),
    fires(
        "CheckpointInvalid", "one was not what was saved", 31, "1 checkpoints of run lm-1 are not what was saved",
        {"checkpoint_verify_failures_total": f"_x30 1+0x{ALWAYS}"},
    ),
    silent("CheckpointInvalid", "yesterday", 1500, {"checkpoint_verify_failures_total": then((0, 30), (1, ALWAYS))}),
    fires(
        "GoodputBurnFast", "hardly any training for an hour", 300,
        "Run lm-1 spends 95% of its time on other things than training",
        {"goodput_seconds_total": f"0+57x200 {57 * 200}+3x{ALWAYS}"},
    ),
    fires(
        "GoodputBurnFast", "half of the time for six hours", 600,
        "Run lm-1 spends 50% of its time on other things than training", {"goodput_seconds_total": f"0+30x{ALWAYS}"},
    ),
    fires(
        "GoodputBurnFast", "no training at all", 90, "Run lm-1 spends 100% of its time on other things than training",
        {"goodput_seconds_total": None},
    ),
    silent("GoodputBurnFast", "a start of ten minutes", 14, {"goodput_seconds_total": f"0+0x9 0+57x{ALWAYS}"}),
    silent(
        "GoodputBurnFast", "bad until an hour ago", 700,
        {"goodput_seconds_total": f"0+6x600 3600+60x{ALWAYS}"},
    ),
    fires(
        "GoodputBurnSlow", "a quarter lost for a day", 1600,
        "Run lm-1 spends 25% of its time on other things than training", {"goodput_seconds_total": f"0+45x{ALWAYS}"},
    ),
    fires(
        "GoodputBurnSlow", "a little too much for three days", 4500,
        "Run lm-1 spends 15% of its time on other things than training", {"goodput_seconds_total": f"0+51x{ALWAYS}"},
    ),
    silent("GoodputBurnSlow", "on target", 4500, {}),
)  # fmt: skip


def _named(series: str) -> str:
    """A series of the run in full."""
    if series == "up":
        return 'up{instance="10.0.0.1:4000",job="orchestrator",run="lm-1"}'
    name, _, labels = series.partition("{")
    own = f",{labels}" if labels else "}"
    return f'orchestrator_{name}{{instance="10.0.0.1:4000",job="orchestrator",run="lm-1"{own}'


def _series(changes: Mapping[str, str | None], minutes: int) -> list[dict[str, str]]:
    return [
        {"series": _named(name), "values": re.sub(r"x(5999|6000)\b", f"x{minutes + 1}", values)}
        for name, values in {**HEALTHY, **changes}.items()
        if values is not None
    ]


def documents(groups: tuple[Group, ...], rules_file: str) -> dict[str, dict[str, Any]]:
    """Files for `promtool test rules`, by name: every case, and every alert on the run in which all is well."""
    alerts = {alert.name: alert for group in groups for alert in group.alerts}
    quick, long = [_test_of_health(alerts)], []
    for case in CASES:
        alert = alerts[f"Orchestrator{case.alert}"]
        expected = [
            {
                "exp_labels": {"run": "lm-1", "severity": alert.severity} | ({"rank": rank} if rank else {}),
                "exp_annotations": alert.as_dict(DEFAULT_RUNBOOKS)["annotations"] | {"summary": summary},
            }
            for rank, summary in case.summaries.items()
        ]
        (long if case.at > LONG else quick).append(
            {
                "name": f"{case.alert}: {case.name}",
                "interval": "1m",
                "input_series": _series(case.changes, case.at),
                "alert_rule_test": [{"alertname": alert.name, "eval_time": f"{case.at}m", "exp_alerts": expected}],
            }
        )
    common = {"rule_files": [rules_file], "group_eval_order": [group.name for group in groups]}
    return {
        "quick": common | {"evaluation_interval": "1m", "tests": quick},
        "long": common | {"evaluation_interval": "10m", "tests": long},
    }


def _test_of_health(alerts: Mapping[str, Alert]) -> dict[str, Any]:
    return {
        "name": "all is well",
        "interval": "1m",
        "input_series": _series({}, 300),
        "alert_rule_test": [
            {"alertname": name, "eval_time": f"{at}m", "exp_alerts": []} for name in alerts for at in (1, 20, 300)
        ],
    }
