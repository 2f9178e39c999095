"""report.html: what a run came to, on one page that needs nothing else. No scripts; charts are inline SVG.

Reads a run directory's files only, of finished, stopped, failed and interrupted runs, and of live ones as they are now.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from monitoring.clock import Line, on_line
from monitoring.evaluations import StandingEvaluations, numbers_in
from monitoring.events import (
    CheckpointComplete,
    CheckpointFailed,
    CheckpointInvalid,
    ControllerBegan,
    RunFinished,
    RunStarted,
)
from monitoring.follow import megabytes
from monitoring.goodput import read_ledger
from monitoring.outside import Unreadable, read_json
from monitoring.records import passed_over_text, read_records
from monitoring.report.charts import Mark, bar, elapsed, heat_map, line_chart, ribbon
from monitoring.report.html import (
    MAX_ROWS,
    clip,
    costs,
    date,
    duration,
    left_out,
    percent,
    section,
    swatch,
    table,
    words,
)
from monitoring.report.speeds import Speeds, rank_speeds
from monitoring.report.steps import Point, StepSeries
from monitoring.shapes import SMALL_FILES
from monitoring.terminal.clean import clean_lines

MAX_MARKS = 200
MAX_HEAT_ROWS = 128

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report_page(run_dir: Path, to: Path) -> None:
    """Writes the report of the run in `run_dir` to the file `to`, whole or not at all.

    Raises OSError when it cannot be written.
    """
    draft = to.with_name(f".{to.name}.{os.getpid()}")
    draft.write_text(render(run_dir), encoding="utf-8", errors="backslashreplace")
    os.replace(draft, to)


def render(run_dir: Path) -> str:
    """The report as HTML."""
    return clean_lines(_Report(run_dir).page())


class _Report:
    """Makes the page of one run. More than 15 attributes: what its parts have in common is worked out once."""

    def __init__(self, run_dir: Path) -> None:
        self.dir = run_dir
        passed_over: Counter[str] = Counter()
        self.damaged: list[str] = []
        records = list(read_records(run_dir / "events.jsonl", passed_over))
        self.events = [on_line(event) for event in records]
        self.line = Line.of(records)
        self.result = self._read_json("result.json")
        self.job = self._read_json("job.resolved.json")
        self.environment = self._read_json("environment.json")
        self.series = StepSeries()
        self.tokens = 0
        self.last: Mapping[str, Any] = {}
        accounts: list[dict[str, Any]] = []
        start = self.events[0]["time"] if self.events else None
        for step in read_records(run_dir / "metrics.jsonl", passed_over):
            seconds = float(step.get("seconds") or 0.0)
            start = step["committed_at"] if start is None else start
            speed = step["tokens"] / seconds if seconds > 0 else 0.0
            at = float(step["committed_at"]) - start
            self.series.add(Point(int(step["step"]), at, step["loss"], speed, int(step["generation"])))
            self.tokens += int(step["tokens"])
            self.last = step
            # Of what a step says, only what is needed again: records may be long.
            kept = {key: step[key] for key in ("step", "generation", "committed_at", "seconds", "tokens")}
            if step.get("ranks"):
                accounts.append({**kept, "ranks": step["ranks"]})
        self.damaged += passed_over_text(passed_over)
        self.start = float(start or 0.0)
        self.ledger = read_ledger(self.events, read_records(run_dir / "metrics.jsonl"))
        self.account = self.ledger.account()
        self.incidents = self.ledger.incidents()
        self.speeds = rank_speeds(self.events, accounts)
        last_event = float(self.events[-1]["time"]) if self.events else self.start
        self.end = max(last_event, float(self.last.get("committed_at", self.start))) - self.start

    # --------------------------------------------------------------------------------------------------- the page

    def page(self) -> str:
        style = (_text("page/static/tokens.css") + _text("report/report.css")).replace("</", "<\\/")
        name = str(self.job.get("name") or self.dir.name)
        marks = [
            Mark(float(event["at"]) - self.start, f"{event['incident']}: {event['cause']}")
            for event in self._of("incident")[-MAX_MARKS:]
        ]
        body = [
            self._head(name),
            self._goodput(),
            self._over_time(marks),
            self._evaluations(),
            self._incident_table(),
            self._speed_map(),
            self._generations(),
            self._checkpoints(),
            self._identity(),
        ]
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
            f"<title>{escape(name)}: report</title><style>{style}</style></head>\n<body>"
            + "\n".join(part for part in body if part)
            + f"<footer>written {date(time.time())} from {escape(str(self.dir.name))}</footer></body></html>\n"
        )

    def _head(self, name: str) -> str:
        status, reason = self._status()
        steps = int(self.last["step"]) + 1 if self.last else 0
        total = (self.job.get("train") or {}).get("steps")
        loss = self.last.get("loss")
        most = max((len(event["workers"]) for event in self._of("generation")), default=0)
        facts = [
            ("steps", f"{steps:,}" + (f" <small>of {total:,}</small>" if total else "")),
            ("loss", "–" if loss is None else f"{loss:.4f}"),
            ("tokens", f"{self.tokens:,}"),
            ("wall time", duration(self.account.wall_seconds)),
            ("goodput", f"{self.account.ratio:.1%}".replace("%", " %")),
            ("incidents", str(len(self.incidents))),
            ("workers at most", str(most)),
        ]
        cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{value}</dd></div>" for key, value in facts)
        why = f'<p class="reason">{escape(reason)}</p>' if reason and status != "finished" else ""
        why += "".join(f'<p class="reason">{escape(problem)}</p>' for problem in self.damaged)
        when = f"{date(self.start)} to {date(self.start + self.end)}" if self.events else ""
        return (
            f'<header><h1>{escape(name)} <span class="status {escape(status)}">{escape(status)}</span></h1>'
            f'<p class="under">{escape(self._run_id())}, {when}</p>{why}<dl class="facts">{cells}</dl></header><main>'
        )

    def _status(self) -> tuple[str, str]:
        """How the run ended: finished, failed, stopped; running or interrupted when it did not."""
        ended = next((e for e in reversed(self.events) if e["kind"] in (RunFinished.kind, ControllerBegan.kind)), None)
        if ended is not None and ended["kind"] == RunFinished.kind:
            return str(ended["status"]), str(ended.get("reason") or "")
        if self.result:
            return str(self.result.get("status", "finished")), str(self.result.get("reason") or "")
        quiet = self.line.now() - self.start - self.end
        return ("running", "") if self.events and quiet < 60.0 else ("interrupted", "it has not said that it ended")

    def _goodput(self) -> str:
        account = self.account
        if account.wall_seconds <= 0:
            return ""
        bad = sorted(((r, s) for r, s in account.badput_seconds.items() if s >= 0.005), key=lambda part: -part[1])
        parts = [("productive", account.productive_seconds), *bad]
        rows = [
            [f"{swatch(reason)}{escape(words(reason))}", f"{s:,.2f}", percent(s / account.wall_seconds)]
            for reason, s in parts
        ]
        total = sum(seconds for _, seconds in parts)
        foot = ["sum", f"{total:,.2f}", percent(total / account.wall_seconds)]
        text = f"The parts add up to {total:,.2f} s; the run took {account.wall_seconds:,.2f} s of wall time."
        made = table(["what the time went to", "seconds", "share"], rows, foot)
        return section("Goodput", f'{bar(parts)}<div class="half">{made}</div><p class="note">{text}</p>')

    def _over_time(self, marks: Sequence[Mark]) -> str:
        loss: list[list[tuple[float, float]]] = []
        speed: list[list[tuple[float, float]]] = []
        previous: Point | None = None
        for point in self.series.points():
            if previous is None or previous.generation != point.generation:
                loss.append([])
                speed.append([])
            if point.loss is not None:
                loss[-1].append((point.at, point.loss))
            speed[-1].append((point.at, point.tokens_per_second))
            previous = point
        world = [(event["time"] - self.start, float(len(event["workers"]))) for event in self._of("generation")]
        if world:
            world.append((self.end, world[-1][1]))
        segments = [(a - self.start, b - self.start, reason) for a, b, reason in self.ledger.segments()]
        charts = [
            ("Loss", self.loss_unit, line_chart("Loss over time", loss, self.end, marks, height=230)),
            ("Throughput", "tokens/s while stepping",
             line_chart("Throughput over time", speed, self.end, marks, from_zero=True, height=150)),
            ("Workers", "in the generation",
             line_chart("Workers over time", [world] if world else [], self.end, marks, from_zero=True,
                        is_stepped=True, height=100)),
            ("Where the time went", "by cause; see the table above", ribbon("Causes over time", segments, self.end)),
        ]  # fmt: skip
        figures = "".join(
            f"<figure><figcaption>{title} <span>{unit}</span></figcaption>{chart}</figure>"
            for title, unit, chart in charts
        )
        note = '<p class="note">Dashed lines are incidents; time since the run began, as minutes or hours.</p>'
        return section("Over time", figures + (note if marks else ""))

    def _evaluations(self) -> str:
        evaluations = StandingEvaluations(self.events)
        found = evaluations.standing
        if not found:
            return ""
        names = list(numbers_in(found[-1]["metrics"]))
        rows = []
        for event in found[-MAX_ROWS:]:
            numbers = numbers_in(event["metrics"])
            step = f"{event['step']:,}" + (" <small>best</small>" if event is evaluations.best else "")
            cells = [f"{numbers[name]:.5g}" if name in numbers else "–" for name in names]
            rows.append([step, elapsed(event["time"] - self.start), *cells, f"{event.get('seconds', 0.0):.2f}"])
        head = ["after steps", "at", *map(words, names), "took, s"]
        return section("Evaluations", left_out(found) + table(head, rows))

    def _incident_table(self) -> str:
        if not self.incidents:
            return section("Incidents", '<p class="empty">none</p>')
        rows = []
        for one in self.incidents[-MAX_ROWS:]:
            stall = "–" if one["stall_seconds"] is None else f"{one['stall_seconds']:.2f}"
            who = "" if one["worker"] is None else f" <small>worker {escape(str(one['worker']))}</small>"
            rows.append([
                f"<b>{escape(words(one['incident']))}</b>{who}<br><small>{escape(clip(str(one['cause'])))}</small>",
                f"{one['step']:,}", elapsed(float(one["at"]) - self.start), f"{one['detect_seconds']:.2f}", stall,
                str(one["steps_lost"]), costs(one["seconds"]) or "–", f"{one['total_seconds']:.2f}",
            ])  # fmt: skip
        lost = sum(one["steps_lost"] for one in self.incidents)
        total = sum(one["total_seconds"] for one in self.incidents)
        head = ["incident", "step", "at", "detected in", "stalled", "steps lost", "cost by cause, s", "cost, s"]
        foot = ["all", "", "", "", "", str(lost), "", f"{total:,.2f}"]
        share = f"{percent(total / self.account.wall_seconds)} of the wall time" if self.account.wall_seconds else ""
        note = f'<p class="note">Times in seconds. Incidents cost {total:,.2f} s in all, {share}.</p>'
        return section(
            "Incidents",
            left_out(self.incidents) + table(head, rows, foot, words=["incident", "cost by cause, s"]) + note,
        )

    def _speed_map(self) -> str:
        if not self.speeds:
            return ""
        shown = sorted(self.speeds, key=lambda one: one.lowest)[:MAX_HEAT_ROWS]
        shown.sort(key=lambda one: one.worker)
        rows = [(_name(one), [(a - self.start, b - self.start, speed) for a, b, speed in one.windows]) for one in shown]
        scale = "".join(
            f'<span><i class="{name}"></i>{text}</span>'
            for name, text in zip(_SPEED_CLASSES, ("≥ 0.95", "≥ 0.85", "≥ 0.75", "≥ 0.5", "slower"), strict=True)
        )
        return section(
            "Speed of workers",
            f'<p class="note">Work per virtual worker\'s cost, relative to the fastest; medians of windows of steps. '
            f'<span class="scale">{scale}</span></p>{heat_map("Speed of workers", rows, self.end, _speed_class)}'
            + self._speed_table(shown),
        )

    def _speed_table(self, shown: Sequence[Speeds]) -> str:
        slowest = sorted(shown, key=lambda one: one.median)[:16]
        rows = [
            [f"worker {one.worker}", escape(one.node[:12]), f"{one.median:.2f}", f"{one.lowest:.2f}"] for one in slowest
        ]
        title = '<p class="note">The 16 slowest:</p>' if len(shown) > len(slowest) else ""
        return f'{title}<div class="half">{table(["worker", "node", "median", "lowest"], rows, words=["node"])}</div>'

    def _generations(self) -> str:
        found = self._of("generation")
        rows = []
        for event in found[-MAX_ROWS:]:
            layout = event.get("layout") or {}
            axes = [f"{axis} {layout[axis]}" for axis in ("data", "pipeline", "tensor") if layout.get(axis, 1) != 1]
            if layout.get("shard", "none") != "none":
                axes.append(f"shard {layout['shard']}")
            source = event.get("source") or "–"
            if event.get("restore") is None and event["start_step"] == 0:
                source = "new"
            rows.append([
                str(event["generation"]), elapsed(event["time"] - self.start), f"{event['start_step']:,}",
                escape(clip(str(event.get("cause", "")))), str(len(event["workers"])),
                escape(", ".join(axes) or "one worker"), escape(str(source)), str(event.get("steps_lost", 0)),
            ])  # fmt: skip
        head = ["generation", "at", "from step", "cause", "workers", "layout", "state from", "steps lost"]
        return section("Generations", left_out(found) + table(head, rows, words=["cause"])) if rows else ""

    def _checkpoints(self) -> str:
        kinds = (CheckpointComplete.kind, CheckpointFailed.kind, CheckpointInvalid.kind)
        found = [event for event in self.events if event["kind"] in kinds]
        rows = []
        for event in found[-MAX_ROWS:]:
            at = elapsed(event["time"] - self.start)
            if event["kind"] == CheckpointComplete.kind:
                held = f"{event['blocked_seconds']:.3f}" if "blocked_seconds" in event else "–"
                size, seconds, state = megabytes(event["bytes"]), f"{event['seconds']:.2f}", "saved"
            else:
                held = size = seconds = "–"
                told = event.get("error") or event.get("reason") or ""
                state = f'<b class="bad">{event["kind"][11:]}</b> {escape(clip(str(told)))}'
            name = event.get("committed", Path(str(event.get("path", ""))).name)
            rows.append([f"step {escape(str(name))}" if "committed" in event else escape(str(name)), at, state, size,
                         seconds, held])  # fmt: skip
        head = ["checkpoint", "at", "state", "size", "written in, s", "held training up, s"]
        made = left_out(found) + table(head, rows, words=["state"]) if rows else '<p class="empty">none</p>'
        return section("Checkpoints", made)

    def _identity(self) -> str:
        started = next((event for event in self.events if event["kind"] == RunStarted.kind), {})
        data = self.environment.get("store") or {}
        packages = ", ".join(f"{name} {version}" for name, version in (self.environment.get("packages") or {}).items())
        rows = [
            ("run", self._run_id()), ("job", started.get("job")),
            ("weights (state_digest)", self.result.get("state_digest")),
            ("samples (data_digest)", self.result.get("data_digest")),
            ("data", data.get("digest")), ("reduction", self.result.get("reduction")),
            ("packages", packages), ("python", self.environment.get("python")),
            ("processor", self.environment.get("processor")), ("platform", self.environment.get("platform")),
        ]  # fmt: skip
        cells = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in rows if value)
        note = '<p class="note">Runs with equal digests of weights ended in the same state, bit for bit.</p>'
        return section("Identity", f'<dl class="identity">{cells}</dl>{note}') + "</main>"

    @property
    def loss_unit(self) -> str:
        """As the run's objective has it; runs of earlier versions had one objective."""
        started = next((event for event in self.events if event["kind"] == RunStarted.kind), {})
        return str(started.get("loss_unit") or "nats per token")

    def _run_id(self) -> str:
        started = next((event for event in self.events if event["kind"] == RunStarted.kind), {})
        return str(self.result.get("run") or started.get("run") or self.dir.name)

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            return dict(read_json(self.dir / name, SMALL_FILES[name]))
        except FileNotFoundError:
            return {}
        except Unreadable as error:
            self.damaged.append(str(error))
            return {}

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


_SPEED_CLASSES = ("s5", "s4", "s3", "s2", "s1")


def _name(one: Speeds) -> str:
    return f"worker {one.worker}" if one.worker < 100 else str(one.worker)


def _speed_class(speed: float) -> str:
    for name, least in zip(_SPEED_CLASSES, (0.95, 0.85, 0.75, 0.5), strict=False):
        if speed >= least:
            return name
    return _SPEED_CLASSES[-1]


def _text(name: str) -> str:
    return files("monitoring").joinpath(name).read_text(encoding="utf-8")
