"""One run: does it learn, how fast, with whom, and where did the time go."""

from __future__ import annotations

from monitoring.dashboards.panels import Annotation, Color, Dashboard, Panel, Row, Target, Threshold, Variable
from monitoring.dashboards.query import STATES, count, lately, mean_so_far, now, of_run, rate, so_far, state_number

CHOICE = Variable("run", "orchestrator_run_info", "run")

NO_PEAK = "The peak of the devices is unknown."
ONE_RANK = "One rank has nobody to send anything to."
NO_RESIZE = "The number of workers was not changed."
NO_INCIDENT = "Nothing went wrong."
NO_CHECKPOINT = "No checkpoint is complete yet."
NO_EVALUATION = "The job evaluates nothing."

_MEMBERS = now("world_size", 'state="member"')
_WALL = of_run("run_wall_seconds_total")
_FAILURES = of_run("failures_total")
_SO_FAR = f"max by (run, kind) ({_FAILURES})"
INCIDENTS = Annotation(
    "Incidents",
    # Not increase(): a kind is counted from its first incident on, and increase() misses what a series begins with.
    f"({_SO_FAR} - (max by (run, kind) ({_FAILURES} offset $__rate_interval) or {_SO_FAR} * 0) > 0) "
    f"and on (run) max by (run) ({of_run('step')} offset $__rate_interval)",
    "{{kind}}",
    "red",
    NO_INCIDENT,
)
GENERATIONS = Annotation(
    "Generations", f"max by (run) (changes({of_run('generation')}[$__rate_interval])) > 0", "another generation",
    "blue", NO_INCIDENT,
)  # fmt: skip

_STATE_COLORS: tuple[Color, ...] = ("orange", "yellow", "blue", "green", "purple", "text")
_STATES = tuple((float(n), state, color) for n, (state, color) in enumerate(zip(STATES, _STATE_COLORS, strict=True)))


def _stat(title: str, description: str, target: Target, unit: str, *thresholds: Threshold, **more: object) -> Panel:
    return Panel(title, description, (target,), unit, "stat", 3, 4, thresholds, **more)  # type: ignore[arg-type]


_GLANCE = Row(
    "At a glance",
    (
        _stat("State", "What the run is doing now.", Target(state_number(), "state"), "none", states=_STATES),
        _stat(
            "Progress", "Steps committed, as a share of the job's.",
            Target(f"{now('step')} / {now('step_target')}", "done"), "percentunit", minimum=0, maximum=1,
        ),
        _stat("Loss", "Loss per token of the newest committed step.", Target(now("loss"), "loss"), "none"),
        _stat("Speed", "Tokens in committed steps a second.", Target(rate(of_run("tokens_total")), "tokens/s"),
              "short"),
        _stat(
            "Goodput", "Share of the wall time so far spent in steps that stayed committed.",
            Target(now("goodput_ratio"), "goodput"), "percentunit",
            Threshold(0.8, "yellow"), Threshold(0.9, "green"), base="red", minimum=0, maximum=1,
        ),
        _stat(
            "Missing workers", "Workers that the run wants to train with and does not have.",
            Target(f"{now('world_target')} - ignoring (state) {_MEMBERS}", "missing"), "none",
            Threshold(1, "orange"),
        ),
        _stat(
            "Open incidents", "Incidents from which the run has not yet recovered.",
            Target(count("incidents_open"), "open"), "none", Threshold(1, "red"),
        ),
        _stat(
            "Time left", "The steps that are left, at the speed of recent ones.",
            Target(f"({now('step_target')} - {now('step')}) * {now('step_expected_seconds')}", "left"), "s",
        ),
    ),
)  # fmt: skip

_LEARNING = Row(
    "Learning",
    (
        Panel("Loss", "Loss per token, in nats, of committed steps. A gap: it was not finite.",
              (Target(now("loss"), "loss"),), "none"),
        Panel("Gradient norm", "Before clipping.", (Target(now("grad_norm"), "norm"),), "none", width=6),
        Panel(
            "Learning rate and skipped updates", "Updates are skipped when the gradient is not finite.",
            (Target(now("learning_rate"), "learning rate"),), "sci", width=4,
        ),
        Panel("Skipped updates", "Steps whose gradient was not finite, so far.",
              (Target(count("nonfinite_total"), "skipped"),), "none", "stat", 2, 8, (Threshold(1, "red"),)),
        Panel("Evaluation", "What the newest evaluation gave, by metric.",
              (Target(now("evaluation_metric"), "{{metric}}", may_be_empty=NO_EVALUATION),), "none"),
        Panel(
            "Weights evaluated", "How many steps the newest weights that were evaluated had seen, and the best ones.",
            (
                Target(now("evaluation_step"), "newest", may_be_empty=NO_EVALUATION),
                Target(now("evaluation_best_step"), "best", may_be_empty=NO_EVALUATION),
            ),
            "none",
        ),
    ),
)  # fmt: skip

_SPEED = Row(
    "Speed",
    (
        Panel("Tokens", "Tokens in committed steps, a second.", (Target(rate(of_run("tokens_total")), "tokens/s"),),
              "short", width=6, minimum=0),
        Panel(
            "Model FLOP/s utilisation", "Operations of the model a second, as a share of the devices' peak.",
            (Target(now("mfu_ratio"), "MFU", may_be_empty=NO_PEAK),), "percentunit", width=6, minimum=0,
        ),
        Panel(
            "Duration of steps", "Quantiles of the steps lately committed, and the median that the run expects.",
            (
                Target(lately(0.5, "step_duration_seconds"), "half are faster than"),
                Target(lately(0.9, "step_duration_seconds"), "9 of 10"),
                Target(lately(0.99, "step_duration_seconds"), "99 of 100"),
                Target(now("step_expected_seconds"), "expected"),
            ),
            "s", width=6, minimum=0,
        ),
        Panel(
            "Where a step's time goes", "Mean time of the first rank in each phase of the steps lately committed.",
            (
                Target(
                    f"{rate(of_run('phase_duration_seconds_sum'), 'phase')}"
                    f" / {rate(of_run('phase_duration_seconds_count'), 'phase')}",
                    "{{phase}}",
                ),
            ),
            "s", width=6, stacked=True, minimum=0,
        ),
        Panel(
            "Sent between ranks", "Bytes that ranks send each other in committed steps, a second, by what they are.",
            (Target(rate(of_run("wire_bytes_total"), "kind"), "{{kind}}", may_be_empty=ONE_RANK),), "Bps", width=18,
            stacked=True, minimum=0,
        ),
        Panel("Rounds", "Rounds of steps that are committed together, a minute.",
              (Target(f"60 * {rate(of_run('rounds_total'))}", "rounds"),), "short", width=6, minimum=0),
    ),
)  # fmt: skip

_WORLD = Row(
    "Workers",
    (
        Panel(
            "World size", "Workers by state, and how many the run wants and needs.",
            (
                Target(now("world_size"), "{{state}}"),
                Target(now("world_target"), "target"),
                Target(now("world_min"), "minimum"),
            ),
            "none", width=8, minimum=0,
        ),
        Panel("State", "What the run was doing.", (Target(state_number(), "state"),), "none", "state-timeline", 8, 8,
              states=_STATES),
        Panel("Generation", "Each change of who trains makes another one.",
              (Target(now("generation"), "generation"),), "none", width=8, minimum=0),
    ),
)  # fmt: skip

_GOODPUT = Row(
    "Goodput",
    (
        Panel(
            "Where the time goes", "Share of the wall time by use. Time is told a few seconds late.",
            (
                Target(rate(of_run("goodput_seconds_total")), "steps"),
                Target(rate(of_run("badput_seconds_total"), "reason"), "{{reason}}"),
            ),
            "percentunit", stacked=True, minimum=0,
        ),
        Panel(
            "Lost so far", "Wall time since the run began that was not spent in steps that stayed committed.",
            (Target(f"sum by (reason) ({now('badput_seconds_total')}) > 0", "{{reason}}", instant=True),), "s",
            "bargauge", 6, 8,
        ),
        Panel(
            "Goodput", "Over the whole run, and over the last hour.",
            (
                Target(now("goodput_ratio"), "whole run"),
                Target(
                    f"sum by (run) (increase({of_run('goodput_seconds_total')}[1h]))"
                    f" / sum by (run) (increase({_WALL}[1h]))",
                    "last hour",
                ),
            ),
            "percentunit", width=6, minimum=0, maximum=1,
        ),
    ),
)  # fmt: skip

_INCIDENTS = Row(
    "Incidents",
    (
        Panel("Incidents", "So far, by kind.", (Target(f"sum by (kind) ({_FAILURES})", "{{kind}}",
              may_be_empty=NO_INCIDENT),), "none", width=6, minimum=0),
        Panel(
            "Detection", "From an incident to when the controller knew of it, over the whole run.",
            (
                Target(so_far(0.5, "detection_seconds"), "half within", may_be_empty=NO_INCIDENT),
                Target(so_far(0.9, "detection_seconds"), "9 of 10 within", may_be_empty=NO_INCIDENT),
            ),
            "s", width=6, minimum=0,
        ),
        Panel(
            "Recovery", "Mean duration of recoveries by stage, over the whole run.",
            (Target(mean_so_far("recovery_seconds", "stage"), "{{stage}}", may_be_empty=NO_INCIDENT),), "s", width=6,
            minimum=0,
        ),
        Panel(
            "Change of size", "Mean time for which a change of the number of workers held training up.",
            (Target(mean_so_far("resize_duration_seconds", "direction"), "{{direction}}", may_be_empty=NO_RESIZE),),
            "s", width=6, minimum=0,
        ),
        Panel(
            "What incidents cost",
            "Committed steps that were redone, restarts of the controller, failures on the worst node, so far.",
            (
                Target(count("steps_lost_total"), "steps redone"),
                Target(count("controller_restarts_total"), "controller restarts"),
                Target(count("worst_node_failures"), "failures on the worst node"),
            ),
            "none", minimum=0,
        ),
        Panel(
            "Age of the newest checkpoint", "What would be lost if every worker went away now, against the plan.",
            (
                Target(f"time() - ({now('checkpoint_last_success_timestamp_seconds')} > 0)", "age",
                       may_be_empty=NO_CHECKPOINT),
                Target(f"{now('checkpoint_expected_interval_seconds')} > 0", "planned interval",
                       may_be_empty="No checkpoint is planned but the last."),
            ),
            "s", minimum=0,
        ),
    ),
)  # fmt: skip

_DATA = Row(
    "Data and balance",
    (
        Panel(
            "Skew", "What the most loaded rank was dealt, as a multiple of the mean.",
            (Target(now("data_skew_ratio"), "predicted cost"), Target(now("token_skew_ratio"), "tokens")),
            "none", width=8, thresholds=(Threshold(1.25, "orange"),),
        ),
        Panel("Padding", "Share of computed positions without a target that counts.",
              (Target(now("padding_ratio"), "padding"),), "percentunit", width=8, minimum=0),
        Panel(
            "Balance", "Findings that are open, and what was done about them so far.",
            (
                Target(f"sum by (finding) ({now('skew_findings')})", "{{finding}}",
                       may_be_empty="No skew was found."),
                Target(count("rebalances_total"), "rebalances"),
                Target(count("evictions_total"), "evictions"),
            ),
            "none", width=8, minimum=0,
        ),
    ),
)  # fmt: skip

DASHBOARD = Dashboard(
    "orchestrator-run", "Orchestrator: run", "One run: does it learn, how fast, with whom, where did the time go.",
    (_GLANCE, _LEARNING, _SPEED, _WORLD, _GOODPUT, _INCIDENTS, _DATA), (CHOICE,), (INCIDENTS, GENERATIONS),
)  # fmt: skip
