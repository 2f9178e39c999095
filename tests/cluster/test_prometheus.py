"""A real Prometheus scrapes a real run with faults: it is found, every panel has its data, every rule is healthy."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from monitoring import discovery, install
from monitoring.alerts import rules
from monitoring.dashboards import dashboards
from monitoring.dashboards.ranks import NO_GPU
from monitoring.dashboards.run import NO_PEAK
from monitoring.goodput import REASONS
from monitoring.records import read_records
from monitoring.series import RANK_SERIES, RUN_SERIES
from tests.cluster.command_line import CommandLine
from tests.cluster.conftest import PATIENCE_S, wait_for
from tests.in_process import orchestrator
from tests.prometheus_tools import Prometheus, running_prometheus

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]
DID_NOT_HAPPEN = {NO_GPU, NO_PEAK, "Every run answers."}
"""Of all that may leave a panel empty, what is so here: the run below has incidents, resizes and checkpoints."""


LEISURELY = "model={factory: 'tests.small_models:leisurely', args: {seconds: 0.01}}"
"""Training that leaves the processors to those who watch it."""


@dataclass
class Watched:
    """A run that has ended, and the Prometheus that watched it."""

    prometheus: Prometheus
    run: str
    directory: Path
    began: float
    stopped: float
    """When it was asked to stop: until then it trained, with all its ranks."""
    ended: float
    """When it was last scraped."""
    targets: Path
    left_behind: list[Path]
    """What was in `targets` when all processes of the run had ended."""

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_records(self.directory / "events.jsonl") if event["kind"] == kind]

    def filled_in(self, expr: str) -> str:
        """As Grafana sends it."""
        expr = expr.replace("$run", self.run).replace("$__rate_interval", "10s")
        assert "$" not in expr
        return expr

    def over_time(self, expr: str) -> list[list[float]]:
        """The values of each series of the result, second by second."""
        found = self.prometheus.get(
            "query_range", query=self.filled_in(expr), start=self.began, end=self.ended, step=1
        )  # fmt: skip
        return [[float(value) for _, value in series["values"]] for series in found["result"]]

    def while_it_trains(self, expr: str) -> list[list[float]]:
        """What a table shows of a live run. (A run that finishes has no ranks any more, and says so.)"""
        found = self.prometheus.get("query", query=self.filled_in(expr), time=self.stopped)
        return [[float(series["value"][1])] for series in found["result"]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Watched]:
    home = tmp_path_factory.mktemp("prometheus")
    targets = home / "targets"
    targets.mkdir()
    settings = install.Settings(ray_temp_dir=home / "ray", targets=targets, scrape_seconds=1)
    install.install(home / "site", settings)
    with running_prometheus(home / "site" / "prometheus.yml", home) as prometheus:
        began = time.time()
        command = CommandLine(home, cache)
        command.job.write_text((ROOT / "examples" / "quickstart.yaml").read_text())
        process = command.start(
            "--set", f"monitoring.targets={targets}", "--set", "train.steps=100000", "--set", "elastic.workers.max=3",
            "--set", "evaluation={share: 0.01, every_steps: 20, samples: 4, best: {metric: loss}}",
            "--set", LEISURELY, "--fault", "step=20,worker=1,kind=kill",
            "--fault", "step=30,worker=2,kind=hang", "--fault", "step=40,kind=controller", "--json",
        )  # fmt: skip
        try:
            command.until_step(process, 60)
            resized = orchestrator("resize", str(command.run_dir), "2")
            assert resized.returncode == 0, resized.stderr
            _until_resized(command)
            time.sleep(5)  # Nothing is tested by this: a few more scrapes, so that rates have something to say.
            stopped = time.time()
            assert orchestrator("stop", str(command.run_dir)).returncode == 0
            output, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            if process.poll() is None:
                process.terminate()
        assert process.returncode == 3, output
        command.nothing_left()
        left_behind = list(targets.iterdir())
        (up,) = prometheus.get(
            "query_range", query='max(up{job="orchestrator"} == 1)', start=began, end=time.time(), step=0.5
        )["result"]
        (run,) = prometheus.get("label/run/values", start=began)
        last_scrape = float(up["values"][-1][0])
        yield Watched(prometheus, run, command.run_dir, began, stopped, last_scrape, targets, left_behind)


def _until_resized(command: CommandLine) -> None:
    def resized() -> bool:
        events = read_records(command.run_dir / "events.jsonl")
        return any(event["kind"] == "recovery" and event["incident"] == "shrink" for event in events)

    wait_for(resized, what="the end of the resize")


def test_a_run_that_ends_takes_its_file_away_itself(watched: Watched) -> None:
    assert watched.left_behind == []


def test_the_run_was_found_and_is_forgotten_when_it_ended(watched: Watched) -> None:
    """Also when its file was left: the next run's controller sweeps."""
    discovery.sweep(watched.targets)
    assert list(watched.targets.iterdir()) == []

    def targets() -> list[dict[str, Any]]:
        found = watched.prometheus.get("targets", state="active")["activeTargets"]
        return [target for target in found if target["labels"]["job"] == "orchestrator"]

    wait_for(lambda: not targets(), what="Prometheus to forget the run")


def test_the_run_has_one_label_and_not_two(watched: Watched) -> None:
    assert "exported_run" not in watched.prometheus.get("labels", start=watched.began)


def test_prometheus_knows_what_is_on_record(watched: Watched) -> None:
    steps = sum(1 for _ in read_records(watched.directory / "metrics.jsonl"))
    assert 60 <= watched.while_it_trains("max(orchestrator_step)")[0][0] <= steps
    counted = max(max(values) for values in watched.over_time('sum(orchestrator_failures_total{run="$run"})'))
    assert 3 <= counted <= len(watched.events("incident"))
    recorded = max(max(values) for values in watched.over_time("run:orchestrator_failures:sum"))
    assert 2 <= recorded < counted, "a resize is no failure"


def test_counters_go_on_when_the_controller_is_restarted(watched: Watched) -> None:
    assert len(watched.events("controller_restarted")) == 1
    for name in ("tokens_total", "goodput_seconds_total", "run_wall_seconds_total", "step_duration_seconds_count"):
        (values,) = watched.over_time(f'max by (run) (orchestrator_{name}{{run="$run"}})')
        assert values == sorted(values), name
        assert values[-1] > values[0], name
    for reason in REASONS:
        series = f'orchestrator_badput_seconds_total{{run="$run",reason="{reason}"}}'
        (values,) = watched.over_time(f"max by (run) ({series})")
        assert values == sorted(values), reason


def test_every_series_of_the_table_came(watched: Watched) -> None:
    stored = set(watched.prometheus.get("label/__name__/values", start=watched.began))
    # Nothing of the kind happened: no node, no data and no storage was bad.
    rare = {
        "orchestrator_nonfinite_total", "orchestrator_evictions_total", "orchestrator_checkpoint_failures_total",
        "orchestrator_checkpoint_verify_failures_total", "orchestrator_checkpoints_delayed_total",
        "orchestrator_mfu_ratio", "orchestrator_rebalances_total",
    }  # fmt: skip
    rare |= {series.name for series in RANK_SERIES if "_gpu_" in series.name}  # Nor is there a GPU.
    missing = {series.name for series in (*RUN_SERIES, *RANK_SERIES) if not set(series.exposed) <= stored}
    assert missing <= rare
    known = {name for series in (*RUN_SERIES, *RANK_SERIES) for name in series.exposed}
    assert {name for name in stored if name.startswith("orchestrator_")} <= known


@pytest.mark.parametrize("page", dashboards(), ids=lambda page: page.uid)
def test_lines_of_a_panel_can_be_told_apart(watched: Watched, page: Any) -> None:
    """Also in a run whose controller was restarted, and so serves from another instance."""
    for panel in page.panels():
        if panel.kind == "table":
            continue
        names = []
        for target in panel.targets:
            found = watched.prometheus.get(
                "query_range", query=watched.filled_in(target.expr), start=watched.began, end=watched.ended, step=1
            )
            for series in found["result"]:
                names.append(re.sub(r"{{(\w+)}}", lambda label: series["metric"][label[1]], target.legend))  # noqa: B023
        assert len(set(names)) == len(names), (panel.title, names)


@pytest.mark.parametrize("page", dashboards(), ids=lambda page: page.uid)
def test_every_panel_has_its_data(watched: Watched, page: Any) -> None:
    asked = [
        (f"{panel.title}: {target.legend or target.expr}", target.expr, target.instant, target.may_be_empty)
        for panel in page.panels()
        for target in panel.targets
    ]
    asked += [(f"annotation {a.name}", a.expr, False, a.may_be_empty) for a in page.annotations]
    empty = []
    for name, expr, instant, may_be_empty in asked:
        series = watched.while_it_trains(expr) if instant else watched.over_time(expr)
        has_data = any(not math.isnan(value) for values in series for value in values)
        if not has_data and may_be_empty not in DID_NOT_HAPPEN:
            empty.append(name)
    assert empty == []


def test_every_rule_is_loaded_and_healthy(watched: Watched) -> None:
    groups = {group["name"]: group for group in watched.prometheus.get("rules")["groups"]}
    for group in rules():
        loaded = groups.pop(group.name)["rules"]
        assert [rule["name"] for rule in loaded] == [rule.name for rule in (*group.recordings, *group.alerts)]
        assert {rule["health"] for rule in loaded} == {"ok"}, loaded
    assert groups == {}


def test_rules_can_be_asked_for_the_time_of_the_run(watched: Watched) -> None:
    """No error on real series, such as labels that match twice while one controller follows another."""
    for group in rules():
        for recording in group.recordings:
            assert watched.over_time(recording.expr), recording.name
            assert watched.over_time(recording.name), recording.name
        for alert in group.alerts:
            watched.over_time(alert.expr)
