"""Charts as inline SVG, for a page without scripts: lines, steps, ribbons and heat maps over time. Pure.

Every chart is drawn twice, wide and narrow, and the page's style shows the one that fits; colours are style variables,
so that light and dark are the page's too. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = 1000, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 8, 10, 20

Segment = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`, with what a reader is told who points at it."""

    x: float
    text: str


@dataclass(frozen=True)
class Frame:
    """Where things are in a chart: data coordinates to pixels. `x1` > `x0` and `y1` > `y0`."""

    width: int
    height: int
    x0: float
    x1: float
    y0: float = 0.0
    y1: float = 1.0

    def x(self, value: float) -> float:
        return round(_LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(_TOP + (self.y1 - value) / (self.y1 - self.y0) * (self.height - _TOP - _BOTTOM), 1)

    @property
    def bottom(self) -> int:
        return self.height - _BOTTOM


def elapsed(seconds: float) -> str:
    """Time since the start of a run, as 1:07 or 2:05:09."""
    whole = int(max(0.0, seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def number(value: float) -> str:
    """A number on an axis: 4,096, 12.5 k, 3.2."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g} k"
    return f"{value:,.6g}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers between two others."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / max(1, most)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.9)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(low: float, high: float, most: int) -> list[float]:
    """The same for seconds: at round minutes and hours."""
    for step in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800):
        if (high - low) / step <= most:
            break
    return [float(n * step) for n in range(math.ceil(low / step), int(high // step) + 1)]


def line_chart(
    label: str,
    segments: Sequence[Segment],
    end: float,
    marks: Iterable[Mark] = (),
    *,
    from_zero: bool = False,
    is_stepped: bool = False,
    height: int = 200,
) -> str:
    """A line of (seconds, value), broken between segments, over 0 to `end` seconds; an area when `from_zero`."""
    values = [value for segment in segments for _, value in segment]
    if not values:
        return '<p class="empty">nothing is on record</p>'
    low, high = (0.0 if from_zero else min(values)), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = (0.0 if from_zero else low - room), high + room

    def draw(width: int) -> str:
        frame = Frame(width, height, 0.0, max(end, 1e-3), low, high)
        whole = all(value == int(value) for value in values)
        lines = [value for value in ticks(low, high, height // 40) if not whole or value == int(value)]
        parts = [_time_axis(frame), *(_level(frame, value) for value in lines)]
        for segment in segments:
            points = list(_steps(segment) if is_stepped else segment)
            path = _path(frame, points)
            if from_zero and points:
                base = f"L{frame.x(points[-1][0])} {frame.bottom}L{frame.x(points[0][0])} {frame.bottom}Z"
                parts.append(f'<path class="area" d="{path}{base}"/>')
            parts.append(f'<path class="line" d="{path}"/>')
        parts += [_mark(frame, mark) for mark in marks]
        return _svg(frame, label, parts)

    return _both(draw)


def ribbon(label: str, segments: Iterable[tuple[float, float, str]], end: float, *, height: int = 48) -> str:
    """What time went to: stretches of (start, stop, reason) in seconds; the colour is the variable of that name."""
    pieces: list[tuple[float, float, str]] = []
    for start, stop, reason in segments:
        if pieces and pieces[-1][2] == reason and start - pieces[-1][1] < 1e-3:
            pieces[-1] = (pieces[-1][0], stop, reason)
        else:
            pieces.append((start, stop, reason))

    def draw(width: int) -> str:
        frame = Frame(width, height, 0.0, max(end, 1e-3))
        parts = [_time_axis(frame)]
        drawn: set[tuple[int, str]] = set()
        # What is not training is drawn last and at least a pixel wide: it is what one looks for.
        for start, stop, reason in sorted(pieces, key=lambda piece: piece[2] != "steps"):
            left, right = frame.x(start), frame.x(stop)
            if right - left < 1.0:
                if (int(left), reason) in drawn:
                    continue
                drawn.add((int(left), reason))
            name = "productive" if reason == "steps" else reason
            parts.append(
                f'<rect x="{left}" y="{_TOP}" width="{max(1.0, round(right - left, 1))}" '
                f'height="{frame.bottom - _TOP}" style="fill:var(--{_word(name)},var(--other))">'
                f"<title>{escape(name.replace('_', ' '))}, {stop - start:.2f} s at {elapsed(start)}</title></rect>"
            )
        return _svg(frame, label, parts)

    return _both(draw)


def heat_map(
    label: str, rows: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], end: float, of: Callable[[float], str]
) -> str:
    """Rows of (start, stop, value) in seconds; `of` gives the class of a value."""
    row_height = 20 if len(rows) <= 16 else 12 if len(rows) <= 40 else 7

    def draw(width: int) -> str:
        frame = Frame(width, _TOP + _BOTTOM + row_height * len(rows), 0.0, max(end, 1e-3))
        parts = [_time_axis(frame)]
        every = max(1, math.ceil(12 / row_height))
        for index, (name, cells) in enumerate(rows):
            top = _TOP + index * row_height
            if index % every == 0:
                parts.append(f'<text x="{_LEFT - 6}" y="{top + row_height / 2 + 4}" class="end">{escape(name)}</text>')
            for start, stop, value in cells:
                left, right = frame.x(start), frame.x(stop)
                parts.append(
                    f'<rect x="{left}" y="{top}" width="{max(0.8, round(right - left, 1))}" '
                    f'height="{row_height - 1}" class="{_word(of(value))}">'
                    f"<title>{escape(name)}: {value:.2f} at {elapsed(start)}</title></rect>"
                )
        return _svg(frame, label, parts)

    return _both(draw)


def bar(parts: Sequence[tuple[str, float]]) -> str:
    """One stacked bar of (reason, seconds)."""
    whole = sum(seconds for _, seconds in parts)
    if whole <= 0:
        return ""
    pieces, left = [], 0.0
    for reason, seconds in parts:
        share = 100.0 * seconds / whole
        pieces.append(
            f'<rect x="{left:.3f}" y="0" width="{share:.3f}" height="10" '
            f'style="fill:var(--{_word(reason)},var(--other))"><title>{escape(reason.replace("_", " "))}: '
            f"{seconds:.2f} s</title></rect>"
        )
        left += share
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">' + "".join(pieces)
        + "</svg>"
    )  # fmt: skip


def _both(draw: Callable[[int], str]) -> str:
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def _svg(frame: Frame, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if n else 'M'}{frame.x(x)} {frame.y(y)}" for n, (x, y) in enumerate(points))


def _steps(segment: Segment) -> Iterable[tuple[float, float]]:
    last: float | None = None
    for x, y in segment:
        if last is not None:
            yield x, last
        yield x, y
        last = y


def _time_axis(frame: Frame) -> str:
    texts = []
    for at in time_ticks(frame.x0, frame.x1, frame.width // 90):
        x = frame.x(at)
        anchor = "end" if x > frame.width - 24 else "middle"
        texts.append(f'<text x="{x}" y="{frame.height - 5}" class="{anchor}">{elapsed(at)}</text>')
    right = frame.width - _RIGHT
    return f'<path class="grid" d="M{_LEFT} {frame.bottom}H{right}"/>' + "".join(texts)


def _level(frame: Frame, value: float) -> str:
    y = frame.y(value)
    return (
        f'<path class="grid" d="M{_LEFT} {y}H{frame.width - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4}" class="end">{escape(number(value))}</text>'
    )


def _mark(frame: Frame, mark: Mark) -> str:
    x = frame.x(mark.x)
    return (
        f'<g class="mark"><title>{escape(mark.text)}</title><path d="M{x} {_TOP}V{frame.bottom}"/>'
        f'<path class="wedge" d="M{x - 4} 3H{x + 4}L{x} {_TOP}Z"/></g>'
    )


def _word(name: str) -> str:
    """A name that is safe inside a style or a class, whatever a file says."""
    return "".join(char for char in name if char.isascii() and (char.isalnum() or char in "_-"))
