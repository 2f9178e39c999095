"""What the page shows of a run: few points with every extreme, roll-backs, deltas that add up to the whole."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from monitoring.page.feed import Feed, StepFile
from monitoring.page.run_status import INTERRUPTED_S
from monitoring.page.workers import LOST_SHOWN_S
from monitoring.report.steps import MAX_POINTS, Point, StepSeries
from tests.simulated_run import SimulatedRun


def together(state: dict[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
    """What static/state.js does: a state, and what changed in it."""
    if changes is None:
        return state
    new = {**state, **changes}
    new["status"] = {**state["status"], **changes.get("status", {})}
    points = state["points"]["rows"]
    if "points" in changes:
        points = [row for row in points if row[0] < changes["points"]["from"]] + changes["points"]["rows"]
    new["points"] = {"from": 0, "rows": points}
    workers = dict(state["workers"])
    for key, part in changes.get("workers", {}).items():
        if part is None:
            workers.pop(key)
        else:
            workers[key] = {**workers.get(key, {}), **part}
    new["workers"] = workers
    new["timeline"] = (state["timeline"] + changes.get("timeline", []))[-300:]
    return new


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that are null, which a patch may leave behind; as the browser gets it."""
    workers = {key: {k: v for k, v in one.items() if v is not None} for key, one in state["workers"].items()}
    status = {k: v for k, v in state["status"].items() if v is not None}
    return json.loads(json.dumps({**state, "workers": workers, "status": status, "now": 0}))


def story(run: SimulatedRun) -> Any:
    """A run with three incidents, a moment at a time."""
    run.start()
    yield
    for _ in range(4):
        run.train(9)
        run.status()
        yield
    run.save()
    lost = run.lose(1)
    run.status()
    yield
    run.recover(lost)
    run.train(5)
    run.status()
    yield
    lost = run.lose(2, "hang", detect=4.0)
    run.roll_back(20)
    yield
    run.recover(lost, replace=False)
    run.train(30)
    run.findings = [{"finding": "slow device", "workers": [3], "detail": "slow"}]
    run.status()
    yield
    run.train(2)
    run.finish()
    yield


def test_changes_one_by_one_add_up_to_the_whole(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    feed, late = Feed(run.path), Feed(run.path)
    state = feed.view.whole(run.now)
    feed.view.changes(run.now)
    for _ in story(run):
        feed.poll(run.now)
        state = together(state, feed.view.changes(run.now))
        assert plain(state) == plain(feed.view.whole(run.now))
        assert feed.view.changes(run.now) is None, "nothing happened since"
    late.poll(run.now)
    for part in ("points", "world", "timeline", "checkpoints"):
        assert late.view.whole(run.now)[part] == state[part], "who comes late sees the same"


def test_the_status_says_where_the_run_is(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run", steps=50)
    feed = Feed(run.path)
    moments = story(run)

    def shown_status() -> dict[str, Any]:
        next(moments)
        feed.poll(run.now)
        return dict(feed.view.status.shown(run.now))

    assert shown_status()["life"] == "live"
    for step in (9, 18, 27, 36):
        shown = shown_status()
        assert (shown["state"], shown["step"], shown["steps"]) == ("running", step, 50)
    shown = shown_status()
    assert shown["state"] == "settling"
    assert [one["incident"] for one in shown["open_incidents"]] == ["kill"]
    assert shown["checkpoint"]["committed"] == 36
    shown = shown_status()
    assert (shown["generation"], shown["last_recovery"]["incident"]) == (1, "kill")
    assert not shown["open_incidents"]
    assert shown_status()["step"] == 20, "rolled back"
    assert shown_status()["step"] == 50
    shown = shown_status()
    assert (shown["life"], shown["reason"], shown["incidents"]) == ("finished", "all steps committed", 2)


def test_a_run_that_nobody_steers_is_interrupted_and_one_that_goes_on_is_not(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    feed = Feed(run.path)
    run.start()
    run.train(5)
    run.status()
    feed.poll(run.now)
    assert feed.view.status.shown(run.now + 1)["life"] == "live"
    assert feed.view.status.shown(run.now + 10)["life"] == "silent"
    assert feed.view.status.shown(run.now + INTERRUPTED_S + 1)["life"] == "interrupted"
    run.now += 3600.0
    run.event("controller", epoch=2, pid=2, session="b", node="n")
    feed.poll(run.now)
    assert feed.view.whole(run.now)["workers"] == {}, "those of the earlier session are gone"
    run.finish("stopped", "SIGINT")
    feed.poll(run.now)
    assert feed.view.status.shown(run.now + 1e6)["life"] == "stopped"
    run.now += 60.0
    run.event("controller", epoch=3, pid=3, session="c", node="n")
    feed.poll(run.now)
    assert feed.view.status.shown(run.now)["life"] == "live", "the old status.json, which says over, does not count"


def test_a_clock_that_differs_from_the_writers_does_not_interrupt_a_run(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    feed = Feed(run.path)
    run.start()
    run.train(1)
    for second in range(5):
        run.status(time=run.now + second)
        feed.poll(run.now + 500.0 + second)
    assert feed.view.status.shown(run.now + 505.0)["life"] == "live"


def test_a_lost_worker_is_shown_for_a_while(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    feed = Feed(run.path)
    run.start()
    run.train(3)
    run.status()
    feed.poll(run.now)
    assert feed.view.whole(run.now)["workers"]["1.0"]["state"] == "member"
    incident = run.lose(1)
    feed.poll(run.now)
    shown = feed.view.whole(run.now)["workers"]["1.0"]
    assert (shown["state"], shown["rank"], shown["node"]) == ("lost", 1, run.node(1)), "before status.json says so"
    run.recover(incident)
    run.status()
    feed.poll(run.now)
    assert {"1.0", "1.1"} <= feed.view.whole(run.now)["workers"].keys()
    later = run.now + LOST_SHOWN_S
    run.status(time=later)
    feed.poll(later)
    assert feed.view.whole(later)["workers"].keys() == {"0.0", "1.1", "2.0", "3.0"}


def test_a_worker_is_quiet_by_the_controllers_clock(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    feed = Feed(run.path)
    run.start()
    run.train(3)
    run.status()
    feed.poll(run.now + 20.0)
    assert feed.view.whole(run.now + 20.0)["workers"]["1.0"]["quiet"] is None, "the controller is silent, not it"
    status = json.loads((run.path / "status.json").read_text())
    status["time"] += 7.0
    for worker in status["workers"]:
        worker["heartbeat"] += 0.0 if worker["worker"] == 1 else 7.0
    run.write_json("status.json", status)
    feed.poll(run.now + 20.0)
    shown = feed.view.whole(run.now + 20.0)["workers"]
    assert (shown["1.0"]["quiet"], shown["2.0"]["quiet"]) == (7, None)


def test_a_run_without_status_is_shown_from_its_events(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    feed = Feed(run.path)
    run.start()
    run.train(7)
    run.sum_up()
    feed.poll(run.now)
    shown = feed.view.whole(run.now)
    assert {key: one["rank"] for key, one in shown["workers"].items()} == {"0.0": 0, "1.0": 1, "2.0": 2, "3.0": 3}
    assert shown["status"]["state"] == "running"
    assert shown["status"]["loss"] == shown["points"]["rows"][-1][2]
    account = shown["goodput"]
    total = account["productive_seconds"] + sum(account["badput_seconds"].values())
    assert total == pytest.approx(account["wall_seconds"], abs=0.5)


def test_a_damaged_record_hides_nothing_else(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    run.event("generation", workers="none")
    run.events.append({"kind": 5})
    run.start()
    run.train(2)
    run.write_json("status.json", {"time": run.now, "workers": [], "state": "running"})
    feed = Feed(run.path)
    feed.poll(run.now)
    shown = feed.view.whole(run.now)
    assert shown["status"]["step"] == 2
    assert [entry["kind"] for entry in shown["timeline"]].count("generation") == 1
    told = next(entry for entry in shown["timeline"] if entry["kind"] == "damaged")
    assert told["text"] == "2 lines of events.jsonl could not be read"


# ------------------------------------------------------------------------------------------------------------- series


def losses(count: int, seed: int) -> list[Point]:
    noise = random.Random(seed)
    return [Point(n, float(n), 3.0 + noise.random(), 100.0 + noise.random(), n // 1000) for n in range(count)]


@pytest.mark.parametrize("count", [1, 700, MAX_POINTS, MAX_POINTS + 1, 20_000])
def test_few_points_with_every_extreme(count: int) -> None:
    points = losses(count, seed=count)
    spike = count // 3
    points[spike] = points[spike]._replace(loss=50.0)
    points[count // 2] = points[count // 2]._replace(tokens_per_second=1.0)
    series = StepSeries()
    for point in points:
        series.add(point)
    kept = series.points()
    assert len(kept) <= MAX_POINTS
    assert len(kept) >= min(count, MAX_POINTS // 4)
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    assert points[spike] in kept
    assert points[count // 2] in kept
    assert set(kept) <= set(points)


def test_a_loss_that_is_not_finite_is_kept() -> None:
    series = StepSeries(max_points=64)
    for point in losses(5000, seed=1):
        series.add(point._replace(loss=None) if point.step == 1234 else point)
    assert [point.step for point in series.points() if point.loss is None] == [1234]


def test_a_cut_series_is_as_if_the_steps_had_never_been() -> None:
    points = losses(5000, seed=2)
    series, other = StepSeries(max_points=200), StepSeries(max_points=200)
    for point in points:
        series.add(point)
    again = series.cut(3001)
    assert again <= 3001
    assert again % series.width == 0
    other.width = series.width
    for point in points[again:3001]:
        series.add(point)
    for point in points[:3001]:
        other.add(point)
    assert series.points() == other.points()


# ---------------------------------------------------------------------------------------------------------- StepFile


def step_numbers(file: StepFile) -> tuple[int | None, list[int]]:
    cut, steps = file.new()
    return cut, [step["step"] for step in steps]


def test_a_roll_back_with_steps_right_after_it_is_found(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    file = StepFile(run.path / "metrics.jsonl")
    assert step_numbers(file) == (None, [])
    run.train(40)
    assert step_numbers(file) == (None, list(range(40)))
    assert step_numbers(file) == (None, [])
    run.roll_back(25)
    run.train(60)
    assert step_numbers(file) == (25, list(range(25, 85))), "though the file is longer than before"
    run.roll_back(80)
    assert step_numbers(file) == (80, [])
    run.train(1)
    assert step_numbers(file) == (None, [80])
    run.roll_back(0)
    assert step_numbers(file) == (0, [])


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "run")
    run.train(2)
    path = run.path / "metrics.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[:-10])
    file = StepFile(path)
    assert step_numbers(file) == (None, [0])
    path.write_bytes(text)
    assert step_numbers(file) == (None, [1])
