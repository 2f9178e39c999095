"""Records, metrics and the sentences made from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from monitoring.follow import Tail, describe_event, summary
from monitoring.records import RecordFile, read_records


def test_a_torn_last_line_is_passed_over_and_cut_off_before_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2')
    assert list(read_records(path)) == [{"a": 1}]
    file = RecordFile(path)
    file.append({"a": 3})
    assert list(read_records(path)) == [{"a": 1}, {"a": 3}]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "m.jsonl")
    file.append({"loss": math.nan, "deep": [{"norm": math.inf}]})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"loss": None, "deep": [{"norm": None}]}


def test_keep_rewrites_and_goes_on(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "m.jsonl")
    for step in range(5):
        file.append({"step": step})
    file.keep(lambda record: record["step"] < 3)
    file.append({"step": 3, "again": True})
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl")] == [0, 1, 2, 3]


def test_tail_gives_each_record_once_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    tail = Tail(path)
    assert list(tail.new()) == []
    path.write_text('{"a":1}\n{"a":')
    assert list(tail.new()) == [{"a": 1}]
    with path.open("a") as file:
        file.write("2}\n")
    assert list(tail.new()) == [{"a": 2}]
    assert list(tail.new()) == []


def test_tail_survives_a_file_that_was_cut_and_grew_again(tmp_path: Path) -> None:
    """A rollback replaces the file; the new one may be longer than the old when it is next looked at."""
    path = tmp_path / "records.jsonl"
    file = RecordFile(path)
    for step in range(3):
        file.append({"step": step})
    tail = Tail(path)
    assert len(list(tail.new())) == 3
    file.keep(lambda record: record["step"] < 1)
    for step in range(1, 6):
        file.append({"step": step, "note": "replayed, with longer lines"})
    assert list(tail.new()) == []
    file.append({"step": 6})
    assert list(tail.new()) == [{"step": 6}]


def recovery(**changes: object) -> dict[str, object]:
    return {
        "kind": "recovery", "incident": "kill", "worker": 1, "step": 20, "generation": 1, "detect_seconds": 0.04,
        "stall_seconds": 0.21, "pause_seconds": 0.2, "steps_lost": 0, "source": "peers", "bytes_moved": 10_600_000,
    } | changes  # fmt: skip


def test_the_closing_lines_say_what_happened() -> None:
    event = recovery(kind="kill")
    lines = summary(
        {"status": "finished", "steps": 60, "tokens": 491520, "final_loss": 2.5, "wall_seconds": 40.0,
         "goodput_ratio": 0.8, "recoveries": [event], "state_digest": "sha256:aa", "data_digest": "sha256:bb"},
        "/runs/x",
    )  # fmt: skip
    text = "\n".join(lines)
    assert "60 steps, 491,520 tokens, loss 2.5000" in text
    assert "worker 1 at step 20: recovered in 0.21 s (detected after 0.04 s), 0 steps lost, 10.6 MB from peers" in text
    assert "sha256:aa" in text
    assert "/runs/x" in text
    failed = "\n".join(summary({"status": "failed", "steps": 0, "reason": "no room", "evaluation": None}, "/runs/x"))
    assert "no room" in failed


def test_events_have_sentences() -> None:
    assert describe_event(recovery()) == (  # type: ignore[arg-type]
        "kill of worker 1 at step 20: recovered in 0.21 s (detected after 0.04 s), 0 steps lost, 10.6 MB from peers"
    )
    assert describe_event({"kind": "shortage", "workers": [2, 3], "waited_seconds": 61.2, "reason": "no quota"}) == (
        "no room for worker 2, 3 for 61 s: no quota"
    )
    changed = {"kind": "market_changed", "from": "spot", "to": "on-demand", "workers": 1, "waited_seconds": 600.4}
    assert describe_event(changed) == "no spot node has come in 600 s: asking for on-demand ones"
    assert describe_event({"kind": "waiting", "workers": 1, "needed": 2}) is not None
    assert describe_event({"kind": "worker_released"}) is None


def test_what_is_seen_of_skew_and_done_about_it_is_told_in_a_line() -> None:
    told = [
        {"kind": "skew_found", "finding": "slow device", "workers": [1], "detail": "computes at 0.50 of the speed"},
        {"kind": "skew_found", "finding": "input starvation", "workers": [], "detail": "half of them wait"},
        {"kind": "rebalance", "change": "deal", "from": [8, 8], "to": [11, 5], "speeds": {"0": 1.0, "1": 0.5},
         "predicted_gain": 0.31},
        {"kind": "rebalance", "change": "stages", "from": [8], "to": [8], "speeds": {str(n): 1.0 for n in range(9)},
         "predicted_gain": 0.2, "stages": [[0, 4], [4, 6]]},
        {"kind": "rebalance_measured", "change": "deal", "predicted_gain": 0.31, "measured_gain": 0.29},
        {"kind": "eviction", "worker": 1, "speed": 0.3, "seconds": 61.2},
        {"kind": "eviction_withdrawn", "worker": 1, "speed": 0.9},
        {"kind": "skew_over", "finding": "slow device", "workers": [1]},
    ]  # fmt: skip
    assert [describe_event(event) for event in told] == [
        "slow device of worker 1: computes at 0.50 of the speed",
        "input starvation: half of them wait",
        "virtual workers dealt 8 8 -> 11 5 for speeds 0: 1.00, 1: 0.50; saves 31% of a step by prediction",
        "stages cut anew, blocks 4 2 for speeds 0: 1.00, 1: 1.00, 2: 1.00, 3: 1.00, 4: 1.00, 5: 1.00, 6: 1.00, "
        "7: 1.00, ...; saves 20% of a step by prediction",
        "the change of deal saved 29% of a step, 31% were predicted",
        "worker 1 is to be replaced: at 0.30 of the fastest's speed for 61 s",
        "worker 1 may stay: at 0.90 of the fastest's speed",
        "slow device of worker 1 is over",
    ]


def test_what_a_recovery_took_is_never_told_as_less_than_its_detection() -> None:
    """A stall is what came beyond one median step, which may be less than the detection alone."""
    told = describe_event(recovery(stall_seconds=0.0, detect_seconds=0.05))
    assert told is not None
    assert "cost 0.00 s more than a step takes (detected after 0.05 s), 0 steps lost" in told
    assert "recovered in" not in told
    told = describe_event(recovery(stall_seconds=0.21, detect_seconds=0.04))
    assert told is not None
    assert "recovered in 0.21 s (detected after 0.04 s)" in told
