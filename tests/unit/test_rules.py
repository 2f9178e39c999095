"""Alerts: every one fires when it should and is silent when it should, and leads to its runbook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.alerts import DEFAULT_RUNBOOKS, Alert, as_yaml, rules
from monitoring.alerts.burn import WINDOWS
from monitoring.series import PREFIX, exposed_names
from tests.prometheus_tools import promtool
from tests.selection import nightly
from tests.unit.rule_cases import CASES, documents

ROOT = Path(__file__).parents[2]
ALERTS = [alert for group in rules() for alert in group.alerts]
RECORDINGS = [recording for group in rules() for recording in group.recordings]


def test_every_alert_that_was_asked_for_is_there() -> None:
    assert {alert.name.removeprefix("Orchestrator") for alert in ALERTS} >= {
        "TrainingStalled", "HeartbeatMissing", "RestartLoop", "CheckpointStale", "CheckpointInvalid",
        "CheckpointFailing", "NonFiniteLoss", "LossSpike", "GoodputBurnFast", "GoodputBurnSlow", "Straggler",
        "DataSkew", "WorldBelowTarget", "RepeatOffenderNode", "ExporterAbsent",
    }  # fmt: skip
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    for fires in (True, False):
        tested = {f"Orchestrator{case.alert}" for case in CASES if case.fires == fires}
        assert tested == {alert.name for alert in ALERTS}, f"fires: {fires}"


def test_the_rules_are_valid(tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(as_yaml(rules(), DEFAULT_RUNBOOKS))
    assert f"{len(ALERTS) + len(RECORDINGS)} rules found" in promtool("check", "rules", str(file))


@pytest.mark.parametrize("name", ["quick", *nightly(["long"])])
def test_alerts_fire_and_do_not_fire(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(as_yaml(rules(), DEFAULT_RUNBOOKS))
    test = tmp_path / "test.yml"
    test.write_text(yaml.safe_dump(documents(rules(), str(file))[name], sort_keys=False))
    assert "SUCCESS" in promtool("test", "rules", str(test))


def test_a_wrong_expectation_is_noticed(tmp_path: Path) -> None:
    """That promtool passes is worth something only if it fails for another expectation."""
    file = tmp_path / "rules.yml"
    file.write_text(as_yaml(rules(), DEFAULT_RUNBOOKS))
    document = documents(rules(), str(file))["quick"]
    wrong = next(test for test in document["tests"] if test["name"] == "TrainingStalled: the newest step is old")
    wrong["alert_rule_test"][0]["exp_alerts"] = []
    test = tmp_path / "test.yml"
    test.write_text(yaml.safe_dump(document | {"tests": [wrong]}, sort_keys=False))
    with pytest.raises(AssertionError, match="OrchestratorTrainingStalled"):
        promtool("test", "rules", str(test))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_says_what_where_and_what_to_do(alert: Alert) -> None:
    annotations = alert.as_dict("https://example.com/runbooks.md")["annotations"]
    assert "{{ $labels.run }}" in annotations["summary"]
    assert "{{" not in annotations["description"], "the cases compare it as it is"
    assert annotations["runbook_url"] == f"https://example.com/runbooks.md#{alert.name.lower()}"


def test_rules_speak_of_series_that_exist() -> None:
    known = set(exposed_names()) | {recording.name for recording in RECORDINGS}
    for rule in (*ALERTS, *RECORDINGS):
        used = set(re.findall(rf"(?:run:)?{PREFIX}[a-z_]+(?::[a-z0-9_]+)?", rule.expr))
        assert used <= known, used - known
        assert used or "up{" in rule.expr


def test_the_rules_are_the_same_every_time() -> None:
    assert as_yaml(rules(), DEFAULT_RUNBOOKS) == as_yaml(rules(), DEFAULT_RUNBOOKS)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.99])
def test_every_goodput_target_has_thresholds_that_can_be_reached(target: float) -> None:
    limits = [window.most_badput(target) for window in WINDOWS]
    assert all(1 - target < limit < 1 or window.burn_rate <= 1 for limit, window in zip(limits, WINDOWS, strict=True))
    assert limits == sorted(limits, reverse=True), "a longer window is stricter"


@pytest.mark.parametrize("target", [0.0, 0.4, 1.0, 90.0])
def test_a_goodput_target_that_cannot_be_watched_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="goodput target"):
        rules(target)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    text = (ROOT / DEFAULT_RUNBOOKS).read_text()
    sections = re.findall(r"^## (Orchestrator\w+)$", text, flags=re.MULTILINE)
    assert sections == [alert.name for alert in ALERTS]
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if section.startswith("Orchestrator"):
            assert "**Urgent**" in section, section.splitlines()[0]
            assert re.search(r"^    orchestrator ", section, flags=re.MULTILINE), section.splitlines()[0]


def test_runbooks_use_commands_and_options_that_there_are() -> None:
    from typer.main import get_command

    from orchestrator.cli import app

    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^    orchestrator (.+?)(?:  .*)?$", (ROOT / DEFAULT_RUNBOOKS).read_text(), flags=re.MULTILINE)
    assert len(lines) > 40
    for line in lines:
        name, *words = line.split()
        command = commands[name]
        if name == "monitoring":
            command = command.commands[words[0]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_runbooks_link_to_sections_and_pages_that_there_are() -> None:
    page = ROOT / DEFAULT_RUNBOOKS
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        text = (page.parent / name).read_text() if name else page.read_text()
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, target
