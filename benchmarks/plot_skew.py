"""Draws a run's rank speeds, dealt work and step times over its steps, as an SVG that needs nothing to be looked at.

python benchmarks/plot_skew.py RUN OUT.svg
"""

from __future__ import annotations

import argparse
import html
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monitoring.records import read_records

WIDTH, LEFT, RIGHT = 860, 64, 150
PANELS = (("speed, share of the fastest", 150), ("virtual workers dealt", 130), ("seconds of a step", 110))
TOP, GAP, BOTTOM = 30, 42, 40
COLOURS = ("#3b76c4", "#d1495b", "#2a9d6f", "#b07d12", "#7b5ea7", "#2b8c9e", "#a0522d", "#6b7280")
SMOOTH = 5
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.axis{stroke:#999;fill:none}.grid{stroke:#ddd}"
    ".mark{stroke:#888;stroke-dasharray:3 3}.note{font-size:11px;fill:#555}"
    "@media(prefers-color-scheme:dark){text{fill:#e5e5e5}.grid{stroke:#444}.note{fill:#aaa}}"
)


class Panel:
    """One plot: steps to the right, values up."""

    def __init__(self, title: str, top: float, height: float, steps: int, most: float) -> None:
        self.title, self.top, self.height, self.steps, self.most = title, top, height, steps, most

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, self.steps - 1)

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - min(value, self.most) / self.most)

    def frame(self) -> list[str]:
        """Title, axes and three grid lines with their values."""
        out = [f'<text x="{LEFT}" y="{self.top - 8:.0f}">{html.escape(self.title)}</text>']
        for share in (0.0, 0.5, 1.0):
            y = self.y(self.most * share)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{self.most * share:.3g}</text>')
        return out

    def line(self, values: Sequence[float | None], colour: str, *, stairs: bool = False) -> str:
        """A curve over the steps; `stairs` for what changes all at once."""
        points: list[str] = []
        before: float | None = None
        for step, value in enumerate(values):
            if value is None:
                continue
            if stairs and before is not None and value != before:
                points.append(f"{self.x(step):.1f},{self.y(before):.1f}")
            points.append(f"{self.x(step):.1f},{self.y(value):.1f}")
            before = value
        return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.8"/>'


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """The median of each value and those before it."""
    found: list[float | None] = []
    for index in range(len(values)):
        recent = [value for value in values[max(0, index - SMOOTH + 1) : index + 1] if value is not None]
        found.append(statistics.median(recent) if recent else None)
    return found


def curves(run: Path) -> tuple[list[int], list[list[float | None]], list[list[float | None]], list[float]]:
    """Workers; by worker and step seconds for a virtual worker, and virtual workers; and seconds of each step."""
    members: dict[int, list[int]] = {}
    for event in read_records(run / "events.jsonl"):
        if event["kind"] == "generation":
            members[event["generation"]] = [worker["worker"] for worker in event["workers"]]
    steps = list(read_records(run / "metrics.jsonl"))
    workers = sorted({slot for slots in members.values() for slot in slots})
    rates: list[list[float | None]] = [[] for _ in workers]
    dealt: list[list[float | None]] = [[] for _ in workers]
    for step in steps:
        accounts: dict[int, Any] = dict(zip(members[step["generation"]], step.get("ranks") or [], strict=False))
        for number, slot in enumerate(workers):
            busy, data = (accounts[slot][0], accounts[slot][1]) if slot in accounts else ([], 0.0)
            rates[number].append((sum(busy) + data) / len(busy) if busy else None)
            dealt[number].append(float(len(busy)) if busy else None)
    return workers, rates, dealt, [step["seconds"] for step in steps]


def round_up(value: float) -> float:
    """To a number whose half is round too.

    >>> [round_up(value) for value in (0.83, 10.0, 37.0)]
    [1.0, 12.0, 40.0]
    """
    size = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return float(next(step * size for step in (1.2, 2, 3, 4, 6, 8, 10) if step * size > value))


def draw(run: Path) -> str:
    """The SVG's text. Raises SystemExit for a run without steps."""
    workers, rates, dealt, seconds = curves(run)
    if not seconds:
        raise SystemExit(f"{run} has no committed steps")
    smoothed = [smooth(each) for each in rates]
    speeds: list[list[float | None]] = []
    for each in smoothed:
        speed: list[float | None] = []
        for step, rate in enumerate(each):
            known = [other[step] for other in smoothed]
            fastest = min((value for value in known if value is not None), default=None)
            speed.append(None if rate is None or fastest is None else fastest / rate)
        speeds.append(speed)
    most_dealt = max((value for each in dealt for value in each if value is not None), default=1.0)
    longest = statistics.quantiles(seconds, n=50)[-1] if len(seconds) > 1 else seconds[0]
    limits = (1.0, round_up(most_dealt), round_up(longest))
    panels, top = [], float(TOP)
    for (title, height), most in zip(PANELS, limits, strict=True):
        panels.append(Panel(title, top, height, len(seconds), most))
        top += height + GAP
    height = top - GAP + BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="Speeds, dealt work and step times of a run">',
        f"<style>{STYLE}</style>",
    ]
    for panel in panels:
        out += panel.frame()
    for number, slot in enumerate(workers):
        colour = COLOURS[number % len(COLOURS)]
        out.append(panels[0].line(speeds[number], colour))
        # Lines that would lie on each other are set apart by a little.
        shifted = [None if value is None else value + 0.12 * (number - len(workers) / 2) for value in dealt[number]]
        out.append(panels[1].line(shifted, colour, stairs=True))
        y = TOP + 16 + 18 * number
        out.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{y - 9}" width="12" height="4" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 32}" y="{y - 3}">worker {slot}</text>')
    out.append(panels[2].line(list(smooth(list(seconds))), COLOURS[-1]))
    out += marks(run, panels)
    last = panels[-1]
    for step in range(0, len(seconds), max(10, round(len(seconds) / 8 / 10) * 10)):
        x, y = last.x(step), last.top + last.height + 18
        out.append(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{WIDTH - RIGHT + 14}" y="{last.top + last.height + 18:.0f}">step</text>')
    return "\n".join([*out, "</svg>", ""])


def marks(run: Path, panels: Sequence[Panel]) -> list[str]:
    """Where faults began, and where work was moved."""
    committed = [record["committed_at"] for record in read_records(run / "metrics.jsonl")]
    out = []
    for event in read_records(run / "events.jsonl"):
        what = {"rebalance": "dealt anew", "fault_injected": "fault", "eviction": "evicted"}.get(event["kind"])
        fault = event.get("what", {})
        if what is None or (what == "fault" and fault.get("step") == 0):
            continue
        step = event["step"] if "step" in event else sum(at <= event["time"] for at in committed)
        told = [(step, what)]
        if fault.get("steps"):
            told.append((fault["step"] + fault["steps"], "fault over"))
        for at, note in told:
            x, bottom = panels[0].x(at), panels[-1].top + panels[-1].height
            out.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{panels[0].top}" y2="{bottom:.0f}"/>')
            # Below the curves, and neighbours in different rows.
            y = panels[0].top + panels[0].height - 8 - 16 * (note == "dealt anew")
            out.append(f'<text class="note" x="{x + 3:.1f}" y="{y:.0f}">{note}</text>')
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(draw(options.run))


if __name__ == "__main__":
    main()
