"""What a run did with its time: the goodput ledger and what each incident cost, as JSON or as text.

Made of the run directory's files alone, so it can be had of any run at any time, also of one that ended badly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monitoring.clock import Line
from monitoring.events import GenerationFormed, RunStarted
from monitoring.goodput import REASONS, VOLUNTARY, read_ledger
from monitoring.outside import Unreadable, read_json
from monitoring.records import passed_over_text, read_records
from monitoring.shapes import RESULT

_BAR = 30


def report_of(run_dir: Path, *, alive: bool = False, now: float | None = None) -> dict[str, Any]:
    """The report of a run; one that is `alive` is told of up to `now`, another up to what is last known of it."""
    passed_over: Counter[str] = Counter()
    events = list(read_records(run_dir / "events.jsonl", passed_over))
    steps = list(read_records(run_dir / "metrics.jsonl", passed_over))
    damaged = passed_over_text(passed_over)
    until = (Line.of(events).now() if now is None else now) if alive else None
    ledger = read_ledger(events, steps)
    account = ledger.account(until)
    try:
        result = read_json(run_dir / "result.json", RESULT)
    except FileNotFoundError:
        result = {}
    except Unreadable as error:
        result = {}
        damaged.append(str(error))
    return {
        "run": next(
            (event["run"] for event in events if event["kind"] == RunStarted.kind and "run" in event), run_dir.name
        ),
        "run_dir": str(run_dir),
        "status": "running" if alive else result.get("status", "interrupted"),
        "reason": None if alive else result.get("reason"),
        "steps": len(steps),
        "tokens": sum(int(record["tokens"]) for record in steps),
        "loss": steps[-1]["loss"] if steps else None,
        "goodput": account.as_dict(),
        "goodput_ratio": round(account.ratio, 4),
        "generations": sum(
            1 for event in events if event["kind"] == GenerationFormed.kind and not event.get("collect")
        ),
        "incidents": ledger.incidents(until),
        "state_digest": result.get("state_digest"),
        "data_digest": result.get("data_digest"),
        "damaged": damaged,
    }


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """The report for a terminal."""
    loss = report["loss"]
    goodput = report["goodput"]
    lines = [
        f"{'run':<11}{report['run_dir']}",
        f"{'state':<11}{report['status']}, {report['steps']} steps, {report['tokens']:,} tokens"
        + (f", loss {loss:.4f}" if loss is not None else "")
        + f", {report['generations']} generations",
    ]
    if report["reason"] and report["status"] != "finished":
        lines.append(f"{'because':<11}{report['reason']}")
    lines += [f"{'damaged':<11}{problem}" for problem in report["damaged"]]
    return [*lines, "", *_goodput_lines(goodput), "", *_incident_lines(report["incidents"])]


def _goodput_lines(goodput: Mapping[str, Any]) -> list[str]:
    wall = goodput["wall_seconds"]
    rows = [("productive", goodput["productive_seconds"])]
    rows += [(reason, goodput["badput_seconds"][reason]) for reason in REASONS if goodput["badput_seconds"][reason]]
    lines = [f"{'wall time':<24}{'seconds':>10}{'share':>9}"]
    for name, seconds in rows:
        share = seconds / wall if wall else 0.0
        bar = "#" * round(share * _BAR)
        lines.append(f"{name.replace('_', ' '):<24}{seconds:>10.2f}{share:>9.2%}  {bar}".rstrip())
    total = goodput["productive_seconds"] + sum(goodput["badput_seconds"].values())
    return [*lines, f"{'sum':<24}{total:>10.2f}{total / wall if wall else 0.0:>9.2%}  of {wall:.2f} s"]


def _incident_lines(incidents: list[Mapping[str, Any]]) -> list[str]:
    if not incidents:
        return ["no incidents"]
    lines = [f"{'incident':<11}{'worker':>7}{'step':>8}{'cost':>9}{'lost':>6}  of that, and why"]
    for incident in incidents:
        worker = "" if incident["worker"] is None else str(incident["worker"])
        parts = ", ".join(f"{reason.replace('_', ' ')} {s:.2f} s" for reason, s in incident["seconds"].items())
        open_ = "" if incident["stall_seconds"] is not None or incident["incident"] in VOLUNTARY else " (open)"
        lines.append(
            f"{incident['incident']:<11}{worker:>7}{incident['step']:>8}{incident['total_seconds']:>7.2f} s"
            f"{incident['steps_lost']:>6}  {parts or 'nothing'}: {incident['cause']}{open_}"
        )
    return lines
