"""Everything that a Prometheus and a Grafana need to watch runs, as files. Knows nothing of the command line.

One Prometheus configuration scrapes Ray and every run, and follows runs as they come and go.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring import alerts, dashboards
from monitoring.dashboards.grafana import as_json
from monitoring.discovery import JOB_NAME, RAY_ROOT, targets_directory

RAY_DISCOVERY_FILE = "prom_metrics_service_discovery.json"
"""Under Ray's temporary root: the endpoints of its nodes, which Ray keeps up to date."""
RULES_FILE = "orchestrator_rules.yml"
PROMETHEUS_URL = "http://localhost:9090"


@dataclass(frozen=True)
class Settings:
    """What a site may want otherwise. Raises ValueError for what cannot be."""

    ray_temp_dir: Path = Path(RAY_ROOT)
    targets: Path | None = None
    """Where runs announce themselves; None: below `ray_temp_dir`."""
    alertmanager: str | None = None
    """host:port"""
    goodput_target: float = alerts.DEFAULT_GOODPUT_TARGET
    runbooks: str = alerts.DEFAULT_RUNBOOKS
    """Address or path of the page that alerts link to."""
    prometheus_url: str = PROMETHEUS_URL
    """Where Grafana finds Prometheus."""
    scrape_seconds: int = 10

    def __post_init__(self) -> None:
        for what, path in (("Ray's temporary directory", self.ray_temp_dir), ("directory of targets", self.targets)):
            if path is not None and (path.is_file() or re.search(r"[*?\[\]]", str(path))):
                raise ValueError(f"{path} cannot be {what}: give a directory, without wildcards")
        if self.alertmanager is not None and not _is_address(self.alertmanager):
            raise ValueError(f"Alertmanager at {self.alertmanager!r}: give HOST:PORT, e.g. localhost:9093")
        if not re.match(r"https?://[^\s/]+", self.prometheus_url):
            raise ValueError(f"Prometheus at {self.prometheus_url!r}: give a URL, e.g. {PROMETHEUS_URL}")
        if self.scrape_seconds < 1:
            raise ValueError(f"a scrape every {self.scrape_seconds} s cannot be: give one second or more")
        alerts.rules(self.goodput_target)


def _is_address(text: str) -> bool:
    found = re.fullmatch(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", text)
    return found is not None and 0 < int(found[1]) < 65536


def prometheus_config(settings: Settings) -> str:
    """Prometheus's configuration. The rules are expected beside it."""
    targets = settings.targets or targets_directory(str(settings.ray_temp_dir))
    interval = f"{settings.scrape_seconds}s"
    config: dict[str, Any] = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [RULES_FILE],
    }
    if settings.alertmanager is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [settings.alertmanager]}]}]}
    config["scrape_configs"] = [
        {
            "job_name": "ray",
            "file_sd_configs": [
                {"files": [str(settings.ray_temp_dir.absolute() / RAY_DISCOVERY_FILE)], "refresh_interval": "15s"}
            ],
        },
        {
            "job_name": JOB_NAME,
            # The files say which run it is, and so do the series: keep one label for it.
            "honor_labels": True,
            "file_sd_configs": [{"files": [str(targets.absolute() / "*.json")], "refresh_interval": "15s"}],
        },
    ]
    return (
        "# Written by `orchestrator monitoring config`: scrapes Ray and every run.\n"
        f"# Beside this file belongs {RULES_FILE}: orchestrator monitoring rules > {RULES_FILE}\n" + _yaml(config)
    )


def rules_file(settings: Settings) -> str:
    """Alerting and recording rules."""
    return alerts.as_yaml(alerts.rules(settings.goodput_target), settings.runbooks)


def files(directory: Path, settings: Settings) -> dict[str, str]:
    """Everything that belongs into `directory`, by its path there."""
    pages = directory.absolute() / "grafana" / "dashboards"
    datasource = {
        "name": "Prometheus", "uid": "orchestrator-prometheus", "type": "prometheus", "access": "proxy",
        "url": settings.prometheus_url, "isDefault": True,
        "jsonData": {"timeInterval": f"{settings.scrape_seconds}s", "httpMethod": "POST"},
    }  # fmt: skip
    provider = {
        "name": "orchestrator", "folder": "Orchestrator", "type": "file", "updateIntervalSeconds": 30,
        "options": {"path": str(pages)},
    }  # fmt: skip
    return {
        "README.md": _readme(directory.absolute(), settings),
        "prometheus.yml": prometheus_config(settings),
        RULES_FILE: rules_file(settings),
        "grafana/provisioning/datasources/orchestrator.yml": _yaml({"apiVersion": 1, "datasources": [datasource]}),
        "grafana/provisioning/dashboards/orchestrator.yml": _yaml({"apiVersion": 1, "providers": [provider]}),
        **{f"grafana/dashboards/{page.uid}.json": as_json(page) for page in dashboards.dashboards()},
    }


def install(directory: Path, settings: Settings) -> list[Path]:
    """Writes them; files of earlier times are replaced, others stay. Returns what was written. Raises OSError."""
    written = []
    for name, content in files(directory, settings).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        written.append(path)
    return written


def how_to_start(directory: Path) -> dict[str, str]:
    """The command that starts each program with these files."""
    config, data, provisioning = (
        shlex.quote(str(directory.absolute() / name))
        for name in ("prometheus.yml", "prometheus-data", "grafana/provisioning")
    )
    return {
        "Prometheus": f"prometheus --config.file={config} --storage.tsdb.path={data}",
        "Grafana": f"GF_PATHS_PROVISIONING={provisioning} grafana server --homepath /usr/share/grafana",
    }


def _readme(home: Path, settings: Settings) -> str:
    targets = (settings.targets or targets_directory(str(settings.ray_temp_dir))).absolute()
    start = how_to_start(home)
    return f"""# Prometheus and Grafana for runs

Written by `orchestrator monitoring install`; running it again brings these files up to date.

- `prometheus.yml` scrapes Ray ({settings.ray_temp_dir.absolute()}/{RAY_DISCOVERY_FILE})
  and every run ({targets}/*.json, one file for each live run), and loads `{RULES_FILE}`.
- `{RULES_FILE}`: alerts, for a goodput of {settings.goodput_target:.0%}, and what they are computed from.
- `grafana/`: the dashboards fleet, run, ranks and checkpoints, and how Grafana is to find them and Prometheus
  ({settings.prometheus_url}).

Start Prometheus, on a machine that can read both places and reach the runs:

    {start["Prometheus"]}

Start Grafana (`--homepath` is where it is installed), or copy `grafana/provisioning` to where it keeps its own:

    {start["Grafana"]}

Prometheus takes changed rules when it gets SIGHUP; Grafana looks for changed dashboards by itself.
"""


def _yaml(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, width=10_000)
