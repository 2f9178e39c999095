"""`orchestrator monitoring`: what Prometheus and Grafana need to watch runs. Touches no run and no Ray."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from monitoring.install import Settings

app = typer.Typer(
    help="Configuration, dashboards and alerts for Prometheus and Grafana.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RayTempDir = Annotated[
    Path, typer.Option("--ray-temp-dir", metavar="DIR", help="Where Ray keeps its sessions (ray start --temp-dir).")
]
Targets = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where runs announce themselves (monitoring.targets of the jobs).")
]
Alertmanager = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Who is told of alerts.")]
GoodputTarget = Annotated[
    float, typer.Option(metavar="SHARE", help="The goodput below which alerts for its burn are due.")
]
Runbooks = Annotated[str, typer.Option(metavar="URL", help="The page that alerts link to.")]
PrometheusUrl = Annotated[str, typer.Option(metavar="URL", help="Where Grafana finds Prometheus.")]


@app.command()
def config(
    ray_temp_dir: RayTempDir = Path("/tmp/ray"), targets: Targets = None, alertmanager: Alertmanager = None
) -> None:
    """Print one Prometheus configuration that scrapes Ray and every run."""
    from monitoring.install import prometheus_config

    print(
        prometheus_config(_settings(ray_temp_dir=ray_temp_dir, targets=targets, alertmanager=alertmanager)), end=""
    )  # fmt: skip


@app.command()
def rules(goodput_target: GoodputTarget = 0.9, runbooks: Runbooks = "docs/runbooks.md") -> None:
    """Print the alerting and recording rules for Prometheus."""
    from monitoring.install import rules_file

    print(rules_file(_settings(goodput_target=goodput_target, runbooks=runbooks)), end="")


@app.command()
def install(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them.", show_default=False)],
    ray_temp_dir: RayTempDir = Path("/tmp/ray"),
    targets: Targets = None,
    alertmanager: Alertmanager = None,
    goodput_target: GoodputTarget = 0.9,
    runbooks: Runbooks = "docs/runbooks.md",
    prometheus_url: PrometheusUrl = "http://localhost:9090",
) -> None:
    """Write dashboards, rules and the configurations of Prometheus and Grafana, and say how to start them."""
    from monitoring.install import how_to_start
    from monitoring.install import install as write

    settings = _settings(
        ray_temp_dir=ray_temp_dir, targets=targets, alertmanager=alertmanager, goodput_target=goodput_target,
        runbooks=runbooks, prometheus_url=prometheus_url,
    )  # fmt: skip
    try:
        written = write(directory, settings)
    except OSError as error:
        _refuse(f"{directory} cannot be written to: {error.strerror} ({error.filename})")
    for path in written:
        print(f"wrote {path}")
    for program, command in how_to_start(directory).items():
        print(f"\nstart {program}:\n    {command}")


def _settings(**given: object) -> Settings:
    from monitoring.install import Settings

    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValueError as error:
        _refuse(str(error))


def _refuse(text: str) -> NoReturn:
    print(f"orchestrator: {text}", file=sys.stderr)
    raise typer.Exit(2)
