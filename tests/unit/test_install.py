"""`orchestrator monitoring`: what it writes is what Prometheus and Grafana take; what is wrong is said in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from monitoring.dashboards import dashboards
from monitoring.install import RULES_FILE, Settings, files, how_to_start, install, prometheus_config
from tests.prometheus_tools import promtool

ROOT = Path(__file__).parents[2]


def orchestrator(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "monitoring", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


def test_one_configuration_scrapes_ray_and_every_run() -> None:
    done = orchestrator("config", "--ray-temp-dir", "/scratch/ray", "--alertmanager", "localhost:9093")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    found = {job["job_name"]: job["file_sd_configs"][0]["files"] for job in config["scrape_configs"]}
    assert found == {
        "ray": ["/scratch/ray/prom_metrics_service_discovery.json"],
        "orchestrator": ["/scratch/ray/orchestrator_targets/*.json"],
    }
    assert config["rule_files"] == [RULES_FILE]
    assert config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["localhost:9093"]


def test_ray_keeps_its_file_where_it_is_looked_for() -> None:
    """The name is Ray's: if that changes, so must ours."""
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}" in prometheus_config(Settings())


def test_runs_may_announce_themselves_elsewhere(tmp_path: Path) -> None:
    config = yaml.safe_load(prometheus_config(Settings(targets=tmp_path)))
    assert config["scrape_configs"][1]["file_sd_configs"][0]["files"] == [f"{tmp_path}/*.json"]
    assert "alerting" not in config


def test_everything_is_written_and_taken(tmp_path: Path) -> None:
    site = tmp_path / "my site"
    done = orchestrator("install", str(site), "--goodput-target", "0.8", "--runbooks", "https://example.com/r")
    assert done.returncode == 0, done.stderr
    names = sorted(str(path.relative_to(site)) for path in site.rglob("*") if path.is_file())
    assert names == sorted(files(site, Settings()))
    for name in names:
        assert f"wrote {site / name}" in done.stdout
    assert f"'{site}/prometheus.yml'" in done.stdout, "a command to paste, with quotes where they are needed"
    for command in how_to_start(site).values():
        assert command in (site / "README.md").read_text()
        assert command in done.stdout
    assert "SUCCESS" in promtool("check", "config", str(site / "prometheus.yml"))
    rules = (site / RULES_FILE).read_text()
    assert "target is 80%" in rules
    assert "https://example.com/r#orchestratortrainingstalled" in rules


def test_grafana_finds_the_dashboards_and_prometheus(tmp_path: Path) -> None:
    install(tmp_path, Settings(prometheus_url="http://prometheus:9090"))
    grafana = tmp_path / "grafana"
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/orchestrator.yml").read_text())["providers"]
    pages = {json.loads(path.read_text())["uid"] for path in Path(provider["options"]["path"]).glob("*.json")}
    assert pages == {page.uid for page in dashboards()}
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/orchestrator.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")


def test_installing_again_replaces_its_own_files_and_no_others(tmp_path: Path) -> None:
    first = install(tmp_path, Settings())
    (tmp_path / "mine.txt").write_text("mine")
    content = {path: path.read_text() for path in first}
    first[0].write_text("old")
    assert install(tmp_path, Settings()) == first
    assert {path: path.read_text() for path in first} == content
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("config", "--alertmanager", "alerts"), "HOST:PORT"),
        (("config", "--alertmanager", "alerts:99999"), "HOST:PORT"),
        (("config", "--ray-temp-dir", str(ROOT / "README.md")), "README.md"),
        (("config", "--targets", "/tmp/*"), "without wildcards"),
        (("rules", "--goodput-target", "90"), "goodput target of 90"),
        (("install", str(ROOT / "README.md")), "cannot be written"),
        (("install", "/tmp/x", "--prometheus-url", "localhost:9090"), "http://localhost:9090"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: tuple[str, ...], expected: str) -> None:
    done = orchestrator(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("orchestrator: ")
    assert expected in line
