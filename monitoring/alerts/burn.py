"""Goodput as an objective, and alerts for how fast its budget is spent. Knows nothing of other alerts.

After "Alerting on SLOs" in the Site Reliability Workbook (Google, 2018, chapter 5): several windows, each with a burn
rate, and a short window beside each long one so that the alert ends soon after the cause does. The workbook's rates are
for a month and objectives near 1. Training has an objective near 0.9, which no burn rate above 10 is possible of, and
its runs last days: so the rates here spend a week's budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from monitoring.alerts.rule import Alert, Recording, Severity

WEEK_HOURS = 7 * 24
MOST_BADPUT = 0.95
"""No threshold is above this share of a window: one above 1 would never be reached."""


@dataclass(frozen=True)
class BurnWindow:
    """Alert when a share of a week's budget is spent within `hours`, and at that rate still within `short`."""

    hours: int
    long: str
    short: str
    spent: float
    """Share of a week's budget."""
    severity: Severity
    holds: str

    @property
    def burn_rate(self) -> float:
        """How many times as fast as would just last for a week."""
        return self.spent * WEEK_HOURS / self.hours

    def most_badput(self, target: float) -> float:
        """The share of badput in both windows above which the alert is due."""
        return min(self.burn_rate * (1 - target), MOST_BADPUT)


WINDOWS = (
    BurnWindow(1, "1h", "5m", 0.05, "critical", "2m"),
    BurnWindow(6, "6h", "30m", 0.15, "critical", "15m"),
    BurnWindow(24, "1d", "2h", 0.30, "warning", "1h"),
    BurnWindow(72, "3d", "6h", 0.45, "warning", "3h"),
)
_LENGTHS = tuple(length for window in WINDOWS for length in (window.short, window.long))


def recordings() -> tuple[Recording, ...]:
    """The share of wall time that was badput, over each window."""
    return tuple(
        Recording(
            f"run:orchestrator_badput:ratio_rate{length}",
            f"""
            1 - clamp_max(
              (
                sum by (run) (rate(orchestrator_goodput_seconds_total[{length}]))
                or sum by (run) (orchestrator_run_info) * 0
              )
              / (sum by (run) (rate(orchestrator_run_wall_seconds_total[{length}])) > 0),
              1
            )
            """,
        )
        for length in dict.fromkeys(_LENGTHS)
    )


def alerts(target: float) -> tuple[Alert, ...]:
    """For a goodput of `target` (a share between 0.5 and 1). Raises ValueError for another."""
    if not 0.5 <= target < 1:
        raise ValueError(
            f"a goodput target of {target:g} cannot be watched: give a share from 0.5 to below 1, e.g. 0.9"
        )
    return (
        _alert("OrchestratorGoodputBurnFast", target, WINDOWS[:2]),
        _alert("OrchestratorGoodputBurnSlow", target, WINDOWS[2:]),
    )


def _alert(name: str, target: float, windows: tuple[BurnWindow, ...]) -> Alert:
    first = windows[0]
    return Alert(
        name,
        first.severity,
        "\nor\n".join(_condition(window, target) for window in windows),
        first.holds,
        "Run {{ $labels.run }} spends {{ $value | humanizePercentage }} of its time on other things than training",
        f"""The goodput target is {target:.0%}. At this rate the losses that a week may have are spent in
        {_days(WEEK_HOURS / first.burn_rate)}. See by cause where the time goes: orchestrator report, or the dashboard
        of the run.""",
    )


def _days(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.0f} hours"


def _condition(window: BurnWindow, target: float) -> str:
    """Both windows burn; a quarter of the long one has passed, as start-up is all badput."""
    limit = f"{window.most_badput(target):.4g}"
    return (
        f"(\n"
        f"  run:orchestrator_badput:ratio_rate{window.long} > {limit}\n"
        f"  and run:orchestrator_badput:ratio_rate{window.short} > {limit}\n"
        f"  and on (run) max by (run) (orchestrator_run_wall_seconds_total) > {window.hours * 900}\n"
        f")"
    )
