"""What somebody should be told about a run. Knows what series mean, and nothing of how they come about.

Every alert gives one alert a run (its labels are `run` and the severity, and `rank` where a rank is meant), links to
its section of docs/runbooks.md, and has a test that it fires and one that it does not.
"""

from __future__ import annotations

from monitoring.alerts import burn
from monitoring.alerts.rule import Alert, Group, Recording
from monitoring.goodput import VOLUNTARY

DEFAULT_GOODPUT_TARGET = 0.9
DEFAULT_RUNBOOKS = "docs/runbooks.md"

_VOLUNTARY = "|".join(sorted(VOLUNTARY))


def _total(name: str, matcher: str = "") -> Recording:
    """A counter of a run that is 0, not absent, before its first event: only so is the first one an increase."""
    return Recording(
        f"run:orchestrator_{name}:sum",
        f"sum by (run) (orchestrator_{name}_total{matcher}) or sum by (run) (orchestrator_run_info) * 0",
    )


def _new(name: str, window: str) -> str:
    """How many of them came within the window. Exact, as `increase()` is not: that extrapolates."""
    return f"(run:orchestrator_{name}:sum - min_over_time(run:orchestrator_{name}:sum[{window}]))"


_TOTALS = (
    _total("failures", f'{{kind!~"{_VOLUNTARY}"}}'),
    _total("controller_restarts"),
    _total("checkpoint_failures"),
    _total("checkpoint_verify_failures"),
    _total("nonfinite"),
    Recording(
        "run:orchestrator_worst_node_failures:max",
        "max by (run) (orchestrator_worst_node_failures) or sum by (run) (orchestrator_run_info) * 0",
    ),
)


def _in_state(states: str) -> str:
    return f'max by (run) (orchestrator_run_state{{state=~"{states}"}}) == 1'


_PROGRESS = (
    Alert(
        "OrchestratorTrainingStalled",
        "critical",
        f"""
        max by (run) (
          time() - (orchestrator_last_step_timestamp_seconds > 0)
          > clamp_min(10 * orchestrator_step_expected_seconds, 60)
        )
        and on (run) {_in_state("running")}
        """,
        "2m",
        "Run {{ $labels.run }} trains, but no step was committed for {{ $value | humanizeDuration }}",
        """The run is in state running, and its newest step is older than ten times what a step takes. A rank that
        hangs is found by its heartbeats or elastic.progress_timeout_s long before; this is something else.""",
    ),
    Alert(
        "OrchestratorStartStalled",
        "critical",
        f"""
        {_in_state("settling|forming|running")}
        unless on (run) max by (run) (time() - orchestrator_last_step_timestamp_seconds <= 900)
        """,
        "15m",
        "Run {{ $labels.run }} has workers, but no step was committed for 15 minutes",
        """The run settles, forms a generation or computes its first step for a quarter of an hour. Large models may
        take that long to load or to compile: then give this alert more time.""",
    ),
    Alert(
        "OrchestratorWorldBelowMinimum",
        "critical",
        """
        (
          sum by (run) (orchestrator_world_size{state="member"}) or sum by (run) (orchestrator_run_info) * 0
        ) < on (run) max by (run) (orchestrator_world_min)
        and on (run) max by (run) (orchestrator_run_state{state="waiting"}) == 1
        """,
        "5m",
        "Run {{ $labels.run }} waits: {{ $value }} workers are fewer than it needs",
        """Training stands until elastic.workers.min workers can be had. The cluster has no room, or workers cannot
        start.""",
    ),
    Alert(
        "OrchestratorWorldBelowTarget",
        "warning",
        f"""
        (
          sum by (run) (orchestrator_world_size{{state="member"}}) or sum by (run) (orchestrator_run_info) * 0
        ) < on (run) max by (run) (orchestrator_world_target)
        unless on (run) {_in_state("finalizing|over")}
        """,
        "15m",
        "Run {{ $labels.run }} trains with {{ $value }} workers, fewer than it wants",
        """Replacements have not come for a quarter of an hour: the cluster has no room, or workers cannot start. The
        run goes on, more slowly.""",
    ),
)

_FAILURES = (
    Alert(
        "OrchestratorHeartbeatMissing",
        "critical",
        f"""
        max by (run, rank) (time() - orchestrator_rank_heartbeat_timestamp_seconds > 60)
        unless on (run) {_in_state("finalizing|over")}
        """,
        "1m",
        "Rank {{ $labels.rank }} of run {{ $labels.run }} was not heard for {{ $value | humanizeDuration }}",
        """A silent rank is taken for lost after elastic.heartbeat_timeout_s, a few seconds. This one is still counted
        in: the controller does not act, or the timeout of the job is very long.""",
    ),
    Alert(
        "OrchestratorRestartLoop",
        "critical",
        f"""
        {_new("failures", "15m")} >= 5
        or {_new("controller_restarts", "15m")} >= 3
        """,
        "0m",
        "Run {{ $labels.run }} failed {{ $value }} times within 15 minutes",
        """Workers, or the controller, fail again and again, and each time the run starts over. Something is broken
        that restarting does not mend.""",
    ),
    Alert(
        "OrchestratorRepeatOffenderNode",
        "warning",
        """
        run:orchestrator_worst_node_failures:max - min_over_time(run:orchestrator_worst_node_failures:max[1d]) >= 3
        """,
        "0m",
        "One node failed run {{ $labels.run }} {{ $value }} times within a day",
        """Workers on one and the same node keep failing: its hardware or its set-up is likely at fault, and it should
        not be used.""",
    ),
    Alert(
        "OrchestratorExporterAbsent",
        "critical",
        """
        max by (run) (up{job="orchestrator"}) == 0
        """,
        "2m",
        "Run {{ $labels.run }} does not answer: nothing is known about it",
        """Prometheus was told of this run and cannot reach its controller. The controller's process or its node is
        gone, or the network between is; no other alert can fire for this run.""",
    ),
)

_LEARNING = (
    Alert(
        "OrchestratorNonFiniteLoss",
        "critical",
        f"""
        max by (run) (orchestrator_loss != orchestrator_loss)
        or {_new("nonfinite", "10m")} >= 3
        """,
        "1m",
        "Run {{ $labels.run }} computes numbers that are not finite",
        """The loss is not finite now, or the updates of three steps were skipped within ten minutes because the
        gradient was not finite. What the run computes from here on may be worthless.""",
    ),
    Alert(
        "OrchestratorLossSpike",
        "warning",
        """
        max by (run) (
          min_over_time(orchestrator_loss[3m])
          > 1.3 * quantile_over_time(0.5, orchestrator_loss[30m] offset 3m)
        )
        """,
        "1m",
        "The loss of run {{ $labels.run }} rose to {{ $value | humanize }} and stays there",
        """For three minutes the loss was more than 1.3 times its median of the half hour before.""",
    ),
    Alert(
        "OrchestratorStraggler",
        "warning",
        """
        sum by (run) (orchestrator_skew_findings{finding=~"slow device|slow node|slow input"}) > 0
        """,
        "10m",
        "Run {{ $labels.run }} has {{ $value }} slow workers or nodes that stay slow",
        """A worker is slower than the others for ten minutes. Work was moved away from it as far as that helps; all
        others still wait for it in every step.""",
    ),
    Alert(
        "OrchestratorDataSkew",
        "warning",
        """
        max by (run) (orchestrator_data_skew_ratio)
        and on (run) sum by (run) (orchestrator_skew_findings{finding="uneven data"}) > 0
        """,
        "10m",
        "The most loaded rank of run {{ $labels.run }} has {{ $value | humanize }} times the mean of work",
        """Some virtual workers are dealt samples that cost much more than the average, and moving virtual workers does
        not even that out.""",
    ),
)

_CHECKPOINTS = (
    Alert(
        "OrchestratorCheckpointStale",
        "critical",
        f"""
        max by (run) (
          time() - (
            (orchestrator_checkpoint_last_success_timestamp_seconds > 0) or orchestrator_run_start_timestamp_seconds
          )
          > 2 * (orchestrator_checkpoint_expected_interval_seconds > 0) + 60
        )
        and on (run) max by (run) (
          (orchestrator_step - (orchestrator_checkpoint_step or orchestrator_step * 0))
          * orchestrator_step_expected_seconds
          > 1.5 * (orchestrator_checkpoint_expected_interval_seconds > 0)
        )
        unless on (run) {_in_state("finalizing|over")}
        """,
        "5m",
        "The newest checkpoint of run {{ $labels.run }} is {{ $value | humanizeDuration }} old",
        """That is more than twice the planned interval, and more steps than fit in one and a half intervals would be
        lost if every worker went away now.""",
    ),
    Alert(
        "OrchestratorCheckpointFailing",
        "warning",
        f"""
        {_new("checkpoint_failures", "1h")} >= 1
        """,
        "0m",
        "{{ $value }} checkpoints of run {{ $labels.run }} failed within an hour",
        """Training goes on, and the next checkpoint is tried when it is due; until one is complete, what a loss of all
        workers would cost grows.""",
    ),
    Alert(
        "OrchestratorCheckpointInvalid",
        "critical",
        f"""
        {_new("checkpoint_verify_failures", "1h")} >= 1
        """,
        "0m",
        "{{ $value }} checkpoints of run {{ $labels.run }} are not what was saved",
        """Their bytes do not have the digests that were recorded, or files are missing. They were set aside and an
        older checkpoint is used. The storage may be losing data.""",
    ),
)


def rules(goodput_target: float = DEFAULT_GOODPUT_TARGET) -> tuple[Group, ...]:
    """All rules, for a goodput of `goodput_target`. Raises ValueError when that cannot be watched."""
    return (
        Group("orchestrator-progress", (), _PROGRESS),
        Group("orchestrator-failures", _TOTALS, _FAILURES),
        Group("orchestrator-learning", (), _LEARNING),
        Group("orchestrator-checkpoints", (), _CHECKPOINTS),
        Group("orchestrator-goodput", burn.recordings(), burn.alerts(goodput_target)),
    )
