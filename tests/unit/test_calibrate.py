"""What a run's records say of its machine, for predictions of other layouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import PlanError
from orchestrator.job import Job
from orchestrator.models.costs import describe_model
from orchestrator.planning.assume import HardwareOptions, hardware_for
from orchestrator.planning.calibrate import calibrated
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.search import Planner
from orchestrator.planning.work import Degrees, work_of
from strategies.layout.schedule import NO_PIPELINE, PipelineSchedule

ROOT = Path(__file__).parents[2]
ALONE = PipelineSchedule(NO_PIPELINE, 1)


def quickstart() -> Job:
    return Job.load(ROOT / "examples/quickstart.yaml")


def planner_for(hardware: Hardware) -> Planner:
    job = quickstart()
    return Planner(work_of(job, describe_model(job)), hardware)


def record(directory: Path, busy: list[float], wait: float, step: float, steps: int = 20, **layout: Any) -> Path:
    """A run's directory with such steps."""
    directory.mkdir()
    (directory / "job.resolved.json").write_text(json.dumps(quickstart().resolved()), encoding="utf-8")
    laid_out = {"data": len(busy), "tensor": 1, "pipeline": 1, "shard": "none", **layout}
    events = [{
        "time": 0.0, "clock": 0.0, "kind": "generation", "generation": 0, "start_step": 0, "cause": "start",
        "workers": [{"worker": 0, "incarnation": 0, "node": "n", "pid": 1}], "layout": laid_out, "dealt": [4, 4],
        "restore": None, "source": "peers", "steps_lost": 0,
    }]  # fmt: skip
    _write(directory / "events.jsonl", events)
    ranks = [[[each], 0.0, wait + number, 0.0, 1.0, 1, 0] for number, each in enumerate(busy)]
    records = [
        # The first steps are slow.
        {"time": 0.0, "step": number, "generation": 0, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 1,
         "samples": "642339c651f141534d530dade5a404da", "skipped": False, "committed_at": number * step,
         "seconds": step, "phase_seconds": {},
         "padding": 0, "ranks": ranks if number > 2 else [], "deal": 0}
        for number in range(steps)
    ]  # fmt: skip
    _write(directory / "metrics.jsonl", records)
    return directory


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")


def test_other_layouts_are_predicted_as_if_measured_on_that_machine(tmp_path: Path) -> None:
    """A made-up machine's own predictions, written down as a run of two replicas: found again for all layouts."""
    assumed, _ = hardware_for(quickstart(), HardwareOptions())
    real = replace(assumed, peak_flops=3.1e10, step_s=0.05, inside=replace(assumed.inside, bytes_per_s=5e8))
    layout = Degrees(2, 1, ALONE, "none")
    time = planner_for(real).predict(layout, 2).time
    run = record(tmp_path / "run", [time.compute, 0.9 * time.compute], time.messages, time.total)
    found, (said,) = calibrated(run, assumed)
    assert found.flops == pytest.approx(real.flops, rel=1e-6)
    assert found.step_s == pytest.approx(0.05, rel=1e-6)
    assert f"of {run}, 12 steps in data 2" in said
    for other in (layout, Degrees(4, 1, ALONE, "gradients"), Degrees(1, 1, PipelineSchedule("1f1b", 2), "none")):
        expected = planner_for(real).predict(other, 4).time.total
        assert planner_for(found).predict(other, 4).time.total == pytest.approx(expected, rel=0.02)


def test_a_run_without_messages_says_nothing_of_links(tmp_path: Path) -> None:
    assumed, _ = hardware_for(quickstart(), HardwareOptions())
    found, (said,) = calibrated(record(tmp_path / "run", [2.0], 0.02, 2.1), assumed)
    assert found.inside == assumed.inside
    assert "messages as assumed" in said
    assert found.step_s == pytest.approx(0.1)


def test_messages_that_went_on_beside_arithmetic_say_nothing_of_links(tmp_path: Path) -> None:
    """What ranks wait for is not what their messages took."""
    assumed = replace(hardware_for(quickstart(), HardwareOptions())[0], overlaps=True, gather_s=0.0)
    run = record(tmp_path / "run", [2.0, 2.0], 0.001, 2.1, shard="parameters")
    found, (said,) = calibrated(run, assumed)
    assert found.inside == assumed.inside
    assert "beside arithmetic" in said


def test_what_is_too_little_to_tell_is_refused(tmp_path: Path) -> None:
    assumed, _ = hardware_for(quickstart(), HardwareOptions())
    with pytest.raises(PlanError, match=r"no directory of a run"):
        calibrated(tmp_path / "nothing", assumed)
    with pytest.raises(PlanError, match="no generation has 11 steps"):
        calibrated(record(tmp_path / "short", [2.0], 0.0, 2.0, steps=12), assumed)
