"""An evaluation, from its record to everything that shows one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from monitoring.evaluations import StandingEvaluations, as_text, describe_evaluation, numbers_in
from monitoring.follow import describe_event, summary
from monitoring.metrics import RunMetrics
from monitoring.page.view import View
from monitoring.report.page import render
from monitoring.sinks.stream import Scalars, Stream
from monitoring.terminal.facts import RunFacts
from monitoring.terminal.lines import as_text as lines_text
from monitoring.terminal.lines import status_lines
from orchestrator.job.directions import direction_of
from orchestrator.job.sections.evaluation import Best
from tests.unit.run_directories import GENERATION, RESULT, STARTED, T0, make_run, status


def evaluation(step: int, loss: float | None, *, best: bool = False, **metrics: Any) -> dict[str, Any]:
    return {
        "time": T0 + 20 + step, "kind": "evaluation", "step": step, "generation": 3, "samples": 64, "seconds": 1.25,
        "best": best,
        "metrics": {"loss": loss, "accuracy": 0.5 + step / 100, "per_class": {"a": {"f1": 0.25}}, **metrics},
    }  # fmt: skip


BACK = {"time": T0 + 60, "kind": "rollback", "committed": 4, "steps": 6, "generation": 4}
EVENTS = [STARTED, GENERATION, evaluation(0, 5.0, best=True), evaluation(4, 3.5, best=True), evaluation(8, 3.75)]


def test_those_that_a_run_went_back_over_do_not_stand() -> None:
    evaluations = StandingEvaluations(EVENTS)
    assert [each["step"] for each in evaluations.standing] == [0, 4, 8]
    assert (evaluations.last or {})["step"] == 8
    assert (evaluations.best or {})["step"] == 4
    evaluations.take(BACK)
    assert [each["step"] for each in evaluations.standing] == [0, 4]
    evaluations.take(evaluation(8, 3.75))
    assert [each["step"] for each in evaluations.standing] == [0, 4, 8]
    evaluations.take(evaluation(8, 3.75))
    assert [each["step"] for each in evaluations.standing] == [0, 4, 8], "one of each step"


def test_numbers_are_told_and_what_is_no_number_is_not() -> None:
    metrics = {"loss": 0.25, "count": 3, "not_finite": None, "yes": True, "inside": {"f1": 1.0}, "row": [1.0]}
    assert numbers_in(metrics) == {"loss": 0.25, "count": 3.0}
    assert as_text(metrics) == "loss 0.25, count 3"
    assert as_text({"loss": None}) == "nothing that is a number"


def test_it_is_a_line_of_the_story(tmp_path: Path) -> None:
    line = "evaluation after 4 steps: loss 3.5, accuracy 0.54 (64 samples, 1.25 s), the best so far"
    assert describe_event(EVENTS[3]) == describe_evaluation(EVENTS[3]) == line
    assert describe_event({"kind": "evaluation", "time": T0}) is None, "damaged"


def test_status_tells_the_newest_and_the_best(tmp_path: Path) -> None:
    facts = RunFacts(make_run(tmp_path, events=EVENTS, live=status()))
    facts.refresh()
    shown = lines_text(status_lines(facts, alive=True, now=T0 + 40))
    assert "evaluation after 8 steps: loss 3.75, accuracy 0.58; the best was after 4: loss 3.5, accuracy 0.54" in shown
    assert facts.as_json(alive=True)["evaluation"]["metrics"]["per_class"] == {"a": {"f1": 0.25}}


def test_the_closing_lines_tell_it() -> None:
    both = {"last": {"step": 8, "loss": 3.75}, "best": {"step": 4, "loss": 3.5}}
    lines = summary({**RESULT, "evaluation": both}, "here")
    assert "evaluation after 8 steps: loss 3.75" in lines
    assert "evaluation the best, after 4 steps: loss 3.5" in lines
    same = summary({**RESULT, "evaluation": {"last": both["last"], "best": both["last"]}}, "here")
    assert len([line for line in same if line.startswith("evaluation")]) == 1


def test_sinks_are_given_its_numbers_once(tmp_path: Path) -> None:
    stream = Stream(make_run(tmp_path, events=EVENTS, live=status()))
    found = [item for item in stream.new() if isinstance(item, Scalars) and item.of_evaluation]
    assert [(item.step, item.values) for item in found] == [
        (step, {"evaluation/loss": loss, "evaluation/accuracy": 0.5 + step / 100})
        for step, loss in ((0, 5.0), (4, 3.5), (8, 3.75))
    ]
    assert not [item for item in stream.new() if isinstance(item, Scalars) and item.of_evaluation]


def test_prometheus_has_the_newest() -> None:
    metrics = RunMetrics("run")
    for event in [*EVENTS, evaluation(12, None)]:
        metrics.on_event(event)
    text = metrics.render().decode()
    assert 'orchestrator_evaluation_metric{metric="accuracy",run="run"} 0.62' in text
    assert 'orchestrator_evaluation_metric{metric="loss",run="run"} NaN' in text
    assert 'metric="per_class"' not in text
    assert 'orchestrator_evaluation_step{run="run"} 12.0' in text
    assert 'orchestrator_evaluation_best_step{run="run"} 4.0' in text


def test_the_page_has_them_newest_first_and_the_best_marked() -> None:
    view = View("run")
    for event in EVENTS:
        view.on_event(event)
    shown = view.whole(T0 + 40)["evaluations"]
    assert [(each["step"], each["best"]) for each in shown] == [(8, False), (4, True), (0, False)]
    assert shown[0]["metrics"] == {"loss": 3.75, "accuracy": 0.58}
    view.changes(T0 + 40)
    view.on_event(BACK)
    assert [each["step"] for each in (view.changes(T0 + 61) or {})["evaluations"]] == [4, 0]


def test_the_report_has_a_table_of_them(tmp_path: Path) -> None:
    page = render(make_run(tmp_path / "with", events=EVENTS, live=None))
    assert "<h2>Evaluations</h2>" in page
    assert "<td>4 <small>best</small></td>" in page
    assert "<td>3.75</td>" in page
    assert "<h2>Evaluations</h2>" not in render(make_run(tmp_path / "without", events=EVENTS[:2], live=None))


def test_the_live_panel_has_a_row_for_it(tmp_path: Path) -> None:
    from monitoring.display import Display

    run = make_run(tmp_path, events=EVENTS, live=status())
    console = Console(force_terminal=True, width=120, height=50)
    display = Display(run, 20, console=console, history=5)
    with console.capture() as capture:
        console.print(display._panel())
    assert "after 8 steps: loss 3.75" in capture.get()


@pytest.mark.parametrize("missing", ["metrics", "step"])
def test_a_damaged_record_takes_nothing_else_along(missing: str) -> None:
    view = View("run")
    damaged = {key: value for key, value in EVENTS[3].items() if key != missing}
    for event in [*EVENTS[:3], damaged, EVENTS[4]]:
        view.on_event(event)
    assert view.whole(T0)["status"]["run"] == "tiny-1234"


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("loss", "min"), ("perplexity", "min"), ("bits_per_byte", "min"), ("mse", "min"), ("nll_chosen", "min"),
        ("reward_rejected", "min"), ("accuracy", "max"), ("token_accuracy", "max"), ("f1_macro", "max"),
        ("per_class.spam.recall", "max"), ("auroc", "max"), ("r2", "max"), ("margin", "max"),
        ("reward_chosen", "max"), ("arc_easy/acc_norm", "max"), ("wikitext/word_perplexity", "min"),
        ("gsm8k/exact_match_strict-match", "max"), ("top_three", None), ("lossless", None),
    ],
)  # fmt: skip
def test_which_value_of_a_metric_is_better(metric: str, mode: str | None) -> None:
    assert direction_of(metric) == mode
    if mode is not None:
        assert Best.model_validate({"metric": metric}).mode == mode
        assert Best.model_validate({"metric": metric, "mode": "min"}).mode == "min"
    else:
        with pytest.raises(ValueError, match=f"must say mode: min or max, as it is not known which of .*{metric}"):
            Best.model_validate({"metric": metric})
    assert Best().mode == "min"
