"""The checkpoints of one run: are there any, are they what was saved, what do they cost."""

from __future__ import annotations

from monitoring.dashboards.panels import Dashboard, Panel, Row, Target, Threshold
from monitoring.dashboards.query import count, mean_so_far, now, so_far
from monitoring.dashboards.run import CHOICE, INCIDENTS, NO_CHECKPOINT

_AGE = f"time() - ({now('checkpoint_last_success_timestamp_seconds')} > 0)"
_UNPLANNED = "No checkpoint is planned but the last."


def _count(title: str, description: str, name: str, *thresholds: Threshold) -> Panel:
    return Panel(title, description, (Target(count(name), title.lower()),), "none", "stat", 4, 4, thresholds)


_GLANCE = Row(
    "At a glance",
    (
        Panel("Age", "How long ago the newest checkpoint was complete.",
              (Target(_AGE, "age", may_be_empty=NO_CHECKPOINT),), "s", "stat", 4, 4),
        _count("Steps saved", "Steps in the newest complete checkpoint.", "checkpoint_step"),
        _count("Complete", "Checkpoints completed so far.", "checkpoints_total"),
        _count("Failed", "Checkpoints that could not be made.", "checkpoint_failures_total", Threshold(1, "orange")),
        _count("Not valid", "Checkpoints set aside because they are not what was saved.",
               "checkpoint_verify_failures_total", Threshold(1, "red")),
        _count("Delayed", "Checkpoints that had to wait for the one before.", "checkpoints_delayed_total",
               Threshold(1, "yellow")),
    ),
)  # fmt: skip

_FRESHNESS = Row(
    "Freshness",
    (
        Panel(
            "Age against plan", "The age may exceed the planned interval by the time that a checkpoint takes.",
            (
                Target(_AGE, "age", may_be_empty=NO_CHECKPOINT),
                Target(f"{now('checkpoint_expected_interval_seconds')} > 0", "planned interval",
                       may_be_empty=_UNPLANNED),
            ),
            "s", minimum=0,
        ),
        Panel(
            "Steps at risk", "Steps since the newest checkpoint: redone if every holder of the state is lost.",
            (Target(f"clamp_min(({count('step')}) - ({count('checkpoint_step')}), 0)", "steps"),), "none", minimum=0,
        ),
    ),
)  # fmt: skip

_COST = Row(
    "Cost",
    (
        Panel(
            "Duration", "Mean over the run. Blocked: training was held up. Write: from the first byte to the last.",
            (Target(mean_so_far("checkpoint_duration_seconds", "phase"), "{{phase}}", may_be_empty=NO_CHECKPOINT),),
            "s", width=8, minimum=0,
        ),
        Panel(
            "Longest ones", "What 9 of 10 checkpoints of the run took less than.",
            (Target(so_far(0.9, "checkpoint_duration_seconds", "phase"), "{{phase}}", may_be_empty=NO_CHECKPOINT),),
            "s", width=8, minimum=0,
        ),
        Panel("Size", "Of the newest checkpoint.",
              (Target(now("checkpoint_bytes"), "size", may_be_empty=NO_CHECKPOINT),), "bytes", width=8, minimum=0),
        Panel(
            "Time lost to checkpoints", "Wall time so far in which training was held up to save or to restore.",
            (Target(now("badput_seconds_total", 'reason=~"checkpoint_.*"'), "{{reason}}",
                    may_be_empty=NO_CHECKPOINT),),
            "s", minimum=0,
        ),
        Panel(
            "What went wrong", "So far.",
            (
                Target(count("checkpoint_failures_total"), "failed"),
                Target(count("checkpoint_verify_failures_total"), "not valid"),
                Target(count("checkpoints_delayed_total"), "delayed"),
            ),
            "none", minimum=0,
        ),
    ),
)  # fmt: skip

DASHBOARD = Dashboard(
    "orchestrator-checkpoints", "Orchestrator: checkpoints",
    "The checkpoints of one run: fresh, valid, and their cost.",
    (_GLANCE, _FRESHNESS, _COST), (CHOICE,), (INCIDENTS,),
)  # fmt: skip
