"""All runs: what trains, what waits, what needs somebody."""

from __future__ import annotations

from monitoring.dashboards.panels import Color, Column, Dashboard, Panel, Row, Target, Threshold
from monitoring.dashboards.query import of_all, rate
from monitoring.dashboards.run import NO_INCIDENT, NO_PEAK

_STATES: tuple[tuple[str, Color], ...] = (
    ("waiting", "orange"), ("settling", "yellow"), ("forming", "blue"), ("running", "green"), ("finalizing", "purple"),
    ("over", "text"),
)  # fmt: skip
_GOOD = (Threshold(0.8, "yellow"), Threshold(0.9, "green"))
_MEMBERS = of_all("world_size", 'state="member"')


def _now(expr: str, may_be_empty: str = "") -> Target:
    return Target(expr, instant=True, may_be_empty=may_be_empty)


def _each(name: str) -> str:
    return f"max by (run) ({of_all(name)})"


_RUNS = Row(
    "Runs",
    (
        Panel(
            "Runs", "Every run that is served now.",
            (
                _now(f"max by (run, state) ({of_all('run_state')} == 1)"),
                _now(_each("step")),
                _now(f"{_each('step')} / {_each('step_target')}"),
                _now(_each("goodput_ratio")),
                _now(f"max by (run) ({_MEMBERS})"),
                _now(_each("world_target")),
                _now(f"sum by (run) ({of_all('failures_total')})", NO_INCIDENT),
                _now(f"{_each('incidents_open')} or {_each('run_info')} * 0"),
                _now(_each("mfu_ratio"), NO_PEAK),
                _now(f"({_each('step_target')} - {_each('step')}) * {_each('step_expected_seconds')}"),
            ),
            kind="table", width=24, height=10,
            columns=(
                Column("run", "Run"),
                Column("state", "State", states=_STATES),
                Column("B", "Step", "none"),
                Column("C", "Progress", "percentunit"),
                Column("D", "Goodput", "percentunit", _GOOD, "red"),
                Column("E", "Workers", "none"),
                Column("F", "Target", "none"),
                Column("G", "Incidents", "none"),
                Column("H", "Open", "none", (Threshold(1, "red"),)),
                Column("I", "MFU", "percentunit"),
                Column("J", "Time left", "s"),
            ),
        ),
    ),
)  # fmt: skip

_TOGETHER = Row(
    "Together",
    (
        Panel("Endpoints", "Runs that Prometheus was told of, by whether they answer.",
              (Target('count by (run) (up{job="orchestrator"} == 1)', "{{run}} answers"),
               Target('count by (run) (up{job="orchestrator"} == 0)', "{{run}} is silent",
                      may_be_empty="Every run answers.")), "none", width=8, minimum=0),
        Panel("Workers", "Members of each run.", (Target(f"sum by (run) ({_MEMBERS})", "{{run}}"),), "none", width=8,
              stacked=True, minimum=0),
        Panel("Missing workers", "What each run wants and does not have.",
              (Target(f"{_each('world_target')} - on (run) max by (run) ({_MEMBERS})", "{{run}}"),), "none", width=8),
        Panel("Tokens", "In committed steps, a second.",
              (Target(rate(of_all("tokens_total")), "{{run}}"),), "short", width=8, stacked=True,
              minimum=0),
        Panel("Goodput", "Of each run so far.", (Target(_each("goodput_ratio"), "{{run}}"),), "percentunit", width=8,
              minimum=0, maximum=1),
        Panel("Incidents", "Of each run so far.",
              (Target(f"sum by (run) ({of_all('failures_total')})", "{{run}}", may_be_empty=NO_INCIDENT),), "none",
              width=8, minimum=0),
        Panel(
            "Where the time of all runs goes", "Share of their wall time, by use.",
            (
                Target(f"sum({rate(of_all('goodput_seconds_total'))}) / "
                       f"sum({rate(of_all('run_wall_seconds_total'))})", "steps"),
                Target(f"sum by (reason) ({rate(of_all('badput_seconds_total'), 'reason')}) / on () group_left () "
                       f"sum({rate(of_all('run_wall_seconds_total'))})", "{{reason}}"),
            ),
            "percentunit", width=24, stacked=True, minimum=0,
        ),
    ),
)  # fmt: skip

DASHBOARD = Dashboard(
    "orchestrator-fleet",
    "Orchestrator: fleet",
    "All runs: what trains, what waits, what needs somebody.",
    (_RUNS, _TOGETHER),
)
