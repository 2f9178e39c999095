"""The table of series, the registry that serves them and the page that tells of them say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.alerts.burn import WINDOWS
from monitoring.metrics import RunMetrics
from monitoring.series import RANK_SERIES, RUN_SERIES, SERIES
from tests.prometheus_tools import promtool

DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"


WORKER = {
    "worker": 1, "incarnation": 0, "node": 'a"b', "state": "member", "rank": 0, "heartbeat": 9.0, "speed": 1.0,
    "own_speed": 1.0, "wait_share": 0.1, "step_seconds": 0.5, "data_seconds": 0.1, "virtual_workers": 8, "tokens": 64,
    "host_bytes": 1 << 30, "device_bytes": 0,
    "gpu": {
        "utilization": 0.9, "sm_hertz": 1.41e9, "celsius": 60, "watts": 300.0, "free_bytes": 10**9, "corrected": 1,
        "uncorrected": 0, "slowed_by": [], "at_power_limit": True,
    },
}  # fmt: skip
STATUS = {
    "state": "running", "steps": 10, "median_step_seconds": 0.5, "target": 1, "min": 1,
    "checkpoint_interval_seconds": 60.0, "workers": [WORKER],
}  # fmt: skip
STEP = {
    "step": 0, "committed_at": 2.0, "loss": None, "grad_norm": 1.0, "lr": 1e-3, "generation": 0, "tokens": 64,
    "seconds": 0.5, "phase_seconds": {"compute": 0.4}, "skipped": True, "ranks": [],
}  # fmt: skip
EVENTS = [
    {"time": 1.0, "kind": "run_started"},
    {"time": 3.0, "kind": "checkpoint_saved", "committed": 1, "bytes": 10, "seconds": 0.1, "blocked_seconds": 0.0},
    {"time": 4.0, "kind": "incident", "incident": "kill", "worker": 1, "incarnation": 0, "cause": "it died", "step": 1,
     "at": 3.9, "detect_seconds": 0.1},
    {"time": 6.0, "kind": "recovery", "incident": "kill", "worker": 1, "step": 1, "at": 3.9, "detect_seconds": 0.1,
     "stall_seconds": 2.0, "pause_seconds": 2.0, "steps_lost": 0},
]  # fmt: skip


def served() -> str:
    """What a run with one rank and a little of a history serves."""
    metrics = RunMetrics("lm-1", "lm", "1")
    metrics.replay(EVENTS, [STEP])
    metrics.on_status(STATUS)
    return metrics.render().decode()


def test_the_page_has_the_table() -> None:
    lines = ["| series | type | labels | unit | |", "|---|---|---|---|---|"]
    for series in SERIES:
        labels = ", ".join(f"`{label}`" for label in series.labels)
        lines.append(f"| `{series.name}` | {series.kind} | {labels} | {series.unit} | {series.help} |")
    table = "\n".join(lines)
    assert table in DOCS.read_text(), f"docs/monitoring.md: put in\n{table}"


def test_the_page_has_the_windows_of_the_alerts() -> None:
    rows = re.findall(
        r"^\| (\d+) (h|d) \| (\d+) (min|h) \| (\d+) % \| ([\d.]+) %", DOCS.read_text(), flags=re.MULTILINE
    )
    told = [(f"{a}{b}", f"{c}{d[0]}", int(e) / 100, float(f) / 100) for a, b, c, d, e, f in rows]
    real = [(w.long, w.short, w.spent, round(w.most_badput(0.9), 4)) for w in WINDOWS]
    assert told == real


def test_the_registry_has_the_families_of_the_table_and_no_others() -> None:
    families = {family.name: family for family in RunMetrics("lm-1").registry.collect()}
    assert {name.removesuffix("_total") for name in families} == {s.name.removesuffix("_total") for s in RUN_SERIES}
    for series in RUN_SERIES:
        family = families[series.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (series.kind, series.help), series.name


def test_what_is_served_has_the_labels_of_the_table() -> None:
    found = {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(served())
        for sample in family.samples
    }
    assert found["orchestrator_recovery_seconds_bucket"] == {"run", "stage", "le"}
    names = {name for series in SERIES for name in series.exposed}
    assert set(found) <= names
    for series in SERIES:
        for name in set(series.exposed) & set(found):
            assert found[name] - {"le"} == {"run", *series.labels}, name
    assert {series.name for series in RANK_SERIES} <= set(found)


def test_names_follow_the_rules_of_prometheus() -> None:
    assert promtool("check", "metrics", content=served()) == ""
    with pytest.raises(AssertionError, match="help"):
        promtool("check", "metrics", content="# TYPE steps_total counter\nsteps_total 1\n")
    for series in SERIES:
        assert series.name.endswith("_total") == (series.kind == "counter")
        assert not series.name.endswith(("_ms", "_milliseconds", "_percent", "_mb"))
        assert series.help.endswith(".")
    assert len({series.name for series in SERIES}) == len(SERIES)
