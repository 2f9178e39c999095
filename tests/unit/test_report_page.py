"""report.html: self-contained, without scripts, everything escaped, with figures that add up."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from monitoring.goodput import read_ledger
from monitoring.records import read_records
from monitoring.report.charts import Mark, elapsed, line_chart, ribbon, ticks, time_ticks
from monitoring.report.page import render, write_report_page
from monitoring.report.speeds import rank_speeds
from tests.simulated_run import SimulatedRun


class Page(HTMLParser):
    """The tags, attributes and words of a page, and whether its tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self._open[-1:] != ["style"] else ""


@pytest.fixture
def run(tmp_path: Path) -> SimulatedRun:
    run = SimulatedRun(tmp_path / "run", steps=120)
    run.start()
    run.train(40)
    run.save()
    run.recover(run.lose(1))
    run.train(30)
    run.save(error="no space left on device")
    lost = run.lose(2, "hang", detect=4.0)
    run.roll_back(60)
    run.recover(lost, replace=False)
    run.speeds[3] = 0.5
    run.train(60)
    run.finish()
    run.write_json("result.json", {"status": "finished", "run": "run", "state_digest": "sha256:feed"})
    return run


def test_it_needs_nothing_else(run: SimulatedRun, tmp_path: Path) -> None:
    write_report_page(run.path, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")], tag
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert list(tmp_path.glob(".report*")) == [], "no draft is left"


def test_it_tells_what_happened(run: SimulatedRun) -> None:
    text = Page(render(run.path)).text
    for part in ("finished", "120 of 120", "kill", "hang", "worker 2", "wasted steps", "no space left on device",
                 "sha256:feed", "sha256:1234", "generation", "checkpoint"):  # fmt: skip
        assert part in text, part


def test_the_parts_of_the_wall_time_add_up(run: SimulatedRun) -> None:
    html = render(run.path)
    account = read_ledger(read_records(run.path / "events.jsonl"), read_records(run.path / "metrics.jsonl")).account()
    table = html[html.index("<h2>Goodput</h2>") :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    seconds = [float(cell.replace(",", "")) for cell in re.findall(r"<td>([\d,.]+)</td><td>[\d.]+ %</td></tr>", body)]
    assert len(seconds) >= 6
    assert sum(seconds) == pytest.approx(account.wall_seconds, abs=0.005 * len(seconds))
    assert f"add up to {account.wall_seconds:,.2f} s" in html


def test_what_a_run_says_of_itself_is_text(tmp_path: Path) -> None:
    evil = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    run = SimulatedRun(tmp_path / "run", steps=20)
    run.write_json("job.resolved.json", {"name": evil, "train": {"steps": 20}})
    run.write_json("environment.json", {"packages": {evil: evil}, "processor": evil})
    run.write_json("result.json", {"status": evil, "reason": evil, "run": evil, "state_digest": evil})
    run.layout = {"data": evil, "tensor": 1, "pipeline": 1, "shard": evil}
    run.start()
    run.train(10)
    run.recover(run.lose(1, evil, evil))
    run.event("checkpoint_failed", committed=evil, error=evil)
    run.event("checkpoint_invalid", path=evil, reason=evil)
    run.train(6)
    run.sum_up()
    page = Page(render(run.path))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 8, "it is all there, as text"


def test_runs_that_hardly_began_have_a_report(tmp_path: Path) -> None:
    Page(render(tmp_path))
    run = SimulatedRun(tmp_path / "run")
    assert "interrupted" in Page(render(run.path)).text
    run.event("controller", epoch=1, pid=1, session="a", node="n")
    run.event("run_started", run="run", job="sha256:1234")
    run.event("run_finished", status="failed", reason="no workers")
    text = Page(render(run.path)).text
    assert "failed" in text
    assert "no workers" in text


def test_the_slow_worker_is_the_slow_one_in_the_report(run: SimulatedRun) -> None:
    events, steps = read_records(run.path / "events.jsonl"), read_records(run.path / "metrics.jsonl")
    speeds = {one.worker: one for one in rank_speeds(events, steps)}
    assert speeds.keys() == {0, 1, 2, 3}
    assert speeds[3].lowest == pytest.approx(0.5, abs=0.06)
    assert min(speeds[worker].lowest for worker in (0, 1, 2)) > 0.9
    for one in speeds.values():
        assert all(start < stop and 0.0 < speed <= 1.0 for start, stop, speed in one.windows)


def test_stages_of_a_pipeline_are_compared_with_their_like() -> None:
    """A stage with thrice the work is no slow worker."""
    layout = {"data": 2, "tensor": 1, "pipeline": 2, "shard": "none"}
    workers = [{"worker": worker, "node": "n"} for worker in range(4)]
    events = [{"kind": "generation", "generation": 0, "workers": workers, "layout": layout}]
    ranks = [[[seconds], 0.0, 0.0, 0.0, 1.0, 1, 0] for seconds in (1.0, 3.0, 1.0, 6.0)]
    steps = [{"generation": 0, "ranks": ranks, "committed_at": 10.0 * n + 10, "seconds": 6.0} for n in range(8)]
    assert [one.median for one in rank_speeds(events, steps)] == pytest.approx([1.0, 1.0, 1.0, 0.5])


def test_ticks_are_round_and_few() -> None:
    assert ticks(0.0, 10.0, 5) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert ticks(2.13, 2.94, 4) == [2.2, 2.4, 2.6, 2.8]
    assert ticks(5.0, 5.0, 4) == [5.0]
    assert time_ticks(0.0, 300.0, 6) == [0.0, 60.0, 120.0, 180.0, 240.0, 300.0]
    assert len(time_ticks(0.0, 3.0e6, 8)) <= 9
    assert [elapsed(s) for s in (0, 65, 3599, 3600, 90_061)] == ["0:00", "1:05", "59:59", "1:00:00", "25:01:01"]


def test_charts_are_drawn_inside_their_frame() -> None:
    line = [(float(n), 5.0 + (n * 7919 % 13)) for n in range(100)]
    html = line_chart("a < b", [line[:50], line[50:]], 99.0, [Mark(42.0, "kill & more")], from_zero=True)
    Page(html)
    assert "a &lt; b" in html
    assert "kill &amp; more" in html
    wide = html[: html.index('class="narrow"')]
    for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", wide):
        assert 56 <= float(x) <= 992
        assert 0 <= float(y) <= 200
    assert "nothing is on record" in line_chart("none", [], 0.0)


def test_short_stretches_stay_visible_without_growing_the_page() -> None:
    """Tens of thousands of short causes are at most one mark per pixel and cause; none of a kind vanishes."""
    segments = []
    for n in range(20_000):
        segments += [(n, n + 0.999, "steps"), (n + 0.999, n + 1.0, "detection" if n % 2 else "recovery")]
    html = ribbon("causes", segments, 20_000.0)
    assert "var(--detection" in html
    assert "var(--recovery" in html
    assert len(html) < 1_500_000
