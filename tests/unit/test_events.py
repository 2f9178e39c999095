"""The schema of events.jsonl: what is written, what readers ask for, and what is documented."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from monitoring import shapes
from monitoring.events import ABSENT, KINDS, VERSION, RunFinished, RunStarted, as_markdown
from tests.unit.events_in_tests import event_with
from tests.unit.test_controller_histories import live, make_world

ROOT = Path(__file__).parents[2]


def test_the_docs_have_the_table_that_the_schema_makes() -> None:
    text = (ROOT / "docs/run-directory.md").read_text()
    found = re.search(r"<!-- events: from monitoring/events.py -->\n(.*)<!-- /events -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == as_markdown()


def test_what_controllers_write_is_what_readers_ask_for() -> None:
    """Of runs in which all kinds of things go wrong."""
    seen = set()
    for seed in range(12):
        world = make_world(seed)
        live(world)
        for record in world.events:
            again = json.loads(json.dumps(record))
            kind = KINDS[record["kind"]]
            if record["kind"] != "run_started" and record["kind"] != "controller":  # the simulation says less of these
                assert shapes.event(again) is None, (record, shapes.event(again))
            assert record.keys() <= {"time", "kind", *(f.rstrip("_") for f in kind.__dataclass_fields__)}
            seen.add(record["kind"])
    assert seen >= {"generation", "incident", "recovery", "worker_ready", "rollback", "steps", "run_finished"}


def test_a_record_needs_what_its_readers_rely_on_and_no_more() -> None:
    ended = {"time": 1.0, "kind": "run_finished", "status": "failed"}
    assert shapes.event(ended) is None, "versions before this one gave no reason"
    assert shapes.event(ended | {"exit_code": 3}) is None, "a later version says more"
    assert shapes.event(ended | {"kind": "heard_a_noise", "status": 3}) is None, "a later version has more kinds"
    assert shapes.event({"time": 1.0, "kind": "run_finished"}) == "has no status"
    assert shapes.event(ended | {"reason": 7}) == ".reason is no text"
    assert shapes.event(ended | {"time": "noon"}) == ".time is no time"


def test_what_there_is_nothing_to_say_of_is_not_in_the_record() -> None:
    stamp = {"time": 5.0, "clock": 4.0}
    resized = KINDS["resize_requested"](from_=2, to=3)
    assert resized.record(stamp) == {"time": 5.0, "clock": 4.0, "kind": "resize_requested", "from": 2, "to": 3}
    assert RunFinished(status="stopped", reason="").fields() == {"status": "stopped", "reason": ""}
    assert event_with("run_finished", status="stopped").fields() == {"status": "stopped"}
    started = RunStarted(run="r", job="j", steps=1, min_workers=1, loss_unit="nats per token")
    assert started.fields()["events"] == VERSION
    assert repr(ABSENT) == "ABSENT"


@pytest.mark.parametrize("package", ["monitoring", "orchestrator"])
def test_kinds_are_named_by_their_classes(package: str) -> None:
    """So that one who renames or removes a kind finds all that know it."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named: list[ast.AST] = []
            if isinstance(node, ast.Compare) and _is_kind(node.left):
                named = [each for right in node.comparators for each in ast.walk(right)]
            elif isinstance(node, ast.Match) and _is_kind(node.subject):
                named = [each for case in node.cases for each in ast.walk(case.pattern)]
            found += [
                f"{path.relative_to(ROOT)}:{each.lineno}: {each.value!r}"
                for each in named
                if isinstance(each, ast.Constant) and each.value in KINDS
            ]
    assert found == []


def _is_kind(node: ast.AST) -> bool:
    """Whether this is `event["kind"]` or `event.get("kind")`."""
    match node:
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value="kind")):
            return name != "request"  # of the command line: those have kinds of their own
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value="kind"), *_]):
            return True
    return False
