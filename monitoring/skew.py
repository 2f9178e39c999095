"""Who is slow, and why: what workers account for in steps becomes ratings, and ratings become findings.

Pure: no clock, no I/O; the same accounts give the same findings. Steps are looked at in windows, each rated by medians,
and a finding takes several windows to open and to close, so that noise and single hiccups name nobody.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW_STEPS = 4
WINDOW_SECONDS = 1.0
"""A window has at least this many steps, and takes at least this long: hiccups of the machine are shorter."""
MAX_NOISE = 0.06
MAX_WINDOW_STEPS = 24
"""It goes on until what it says of nine in ten workers is this certain (the standard error of a median, as a share of
it), or has this many steps."""
CLEAR = 6.0
"""Or until one is behind by this many times that error: one that slow need not be measured any closer."""
SLOW, RECOVERED = 0.75, 0.85
"""Speeds, as shares of the fastest, below which a worker counts as slow, and above which it no longer does."""
WINDOWS_TO_TELL = 2
"""How many windows in a row have to agree."""
STARVED, FED = 0.2, 0.1
"""Shares of a step spent on waiting for input, above which everybody starves, and below which nobody does."""
UNEVEN, EVEN = 1.25, 1.15
"""Largest cost by mean cost: of virtual workers, and of pipeline stages."""

Worker = Hashable


@dataclass(frozen=True)
class RankAccount:
    """What one worker says of a step; times in seconds.

    `stage` is the part of the model that it computes, `share` the share of the whole model's cost that it was predicted
    to be. `cost` is that of its virtual workers, of which it has `held`; the average one costs 1.
    """

    node: str
    busy: float
    data: float
    wait: float
    cost: float
    held: int
    tokens: int = 0
    padding: int = 0
    stage: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Rating:
    """A worker in a window.

    `rate` is its seconds (input and computing) for an average virtual worker of the whole model, `noise` how uncertain
    that is, as a share of it; `device_rate` is computing alone. `speed` and `device_speed` compare with the fastest
    (1.0), `own_speed` with its own best. The other shares are of the step's time; `cost` is a step's.
    """

    node: str
    stage: int
    noise: float
    rate: float
    device_rate: float
    speed: float
    device_speed: float
    own_speed: float
    data_share: float
    wait_share: float
    cost: float
    cost_per_held: float
    stage_seconds: float
    """What it computes for an average virtual worker: `device_rate` for its share of the model."""


@dataclass(frozen=True)
class Window:
    """Some steps in a row. `data_skew` is the largest by the mean of what workers were dealt (predicted cost),
    `token_skew` the same of tokens, `padding_share` what was computed for nothing. `noise` is how uncertain the rates
    of nine in ten workers are at the most."""

    steps: int
    step_seconds: float
    noise: float
    workers: Mapping[Worker, Rating]
    data_skew: float
    token_skew: float
    padding_share: float


def fastest(values: Iterable[float]) -> float:
    """The smallest of a few; the lowest tenth of many, of which the very smallest is chance."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 10] if ordered else 0.0


def skew(values: Sequence[float]) -> float:
    """Largest by mean; 1.0 where there is nothing."""
    total = sum(values)
    return max(values) * len(values) / total if total > 0 else 1.0


def standard_error(values: Sequence[float]) -> float:
    """Of the median of some values, as a share of it; from their median deviation, so that single outliers count for
    little (Rousseeuw and Croux 1993, "Alternatives to the Median Absolute Deviation": 1.4826 makes it consistent for
    normal values, for which a median has 1.25 times the error of a mean)."""
    middle = median(values)
    deviation = median(abs(value - middle) for value in values)
    return 1.4826 * 1.2533 * deviation / len(values) ** 0.5 / middle if middle > 0 else 0.0


class Windows:
    """Collects steps of the same workers into windows. Workers that change begin a new one; what each was at its best
    is remembered for as long as it is among them."""

    def __init__(self, steps: int = WINDOW_STEPS, seconds: float = WINDOW_SECONDS) -> None:
        self._steps = steps
        self._seconds = seconds
        self._open: list[tuple[float, Mapping[Worker, RankAccount]]] = []
        self._best: dict[Worker, float] = {}

    def restart(self) -> None:
        """What was dealt or who is there changes: the window under way is no window."""
        self._open = []

    def add(self, seconds: float, accounts: Mapping[Worker, RankAccount]) -> Window | None:
        """A step that took this long; the window that it completes."""
        if self._open and self._open[-1][1].keys() != accounts.keys():
            self._open = []
        self._open.append((seconds, accounts))
        if len(self._open) < self._steps or sum(each for each, _ in self._open) < self._seconds:
            return None
        rates = self._rates_of(self._open)
        noise = {worker: standard_error(each) for worker, each in rates.items()}
        usual = sorted(noise.values())[(len(noise) - 1) * 9 // 10] if noise else 0.0
        if usual > MAX_NOISE and len(self._open) < MAX_WINDOW_STEPS:
            middles = {worker: median(each) for worker, each in rates.items() if noise[worker] <= 2 * usual}
            if not middles or 1 - fastest(middles.values()) / max(middles.values()) < CLEAR * usual:
                return None
        steps, self._open = self._open, []
        return self._rate(steps, noise, usual)

    @staticmethod
    def _rates_of(steps: Sequence[tuple[float, Mapping[Worker, RankAccount]]]) -> dict[Worker, list[float]]:
        """Seconds for an average virtual worker in every step that a worker was seen at work in."""
        found: dict[Worker, list[float]] = {}
        for _, accounts in steps:
            for worker, a in accounts.items():
                if a.cost > 0 and a.busy > 0:
                    found.setdefault(worker, []).append((a.busy + a.data) / (a.cost * a.share))
        return found

    def _rate(
        self, steps: Sequence[tuple[float, Mapping[Worker, RankAccount]]], noise: Mapping[Worker, float], usual: float
    ) -> Window:
        step_seconds = median(seconds for seconds, _ in steps)
        rates = {worker: median(each) for worker, each in self._rates_of(steps).items()}
        device_rates: dict[Worker, float] = {}
        for worker, rate in rates.items():
            worked = [accounts[worker] for _, accounts in steps]
            device_rates[worker] = median(a.busy / (a.cost * a.share) for a in worked if a.cost > 0 and a.busy > 0)
            self._best[worker] = min(rate, self._best.get(worker, rate))
        self._best = {worker: best for worker, best in self._best.items() if worker in steps[0][1]}
        best_rate, best_device = fastest(rates.values()), fastest(device_rates.values())
        ratings = {}
        for worker, rate in rates.items():
            accounts = [accounts[worker] for _, accounts in steps]
            last = accounts[-1]
            ratings[worker] = Rating(
                node=last.node,
                stage=last.stage,
                noise=noise[worker],
                rate=rate,
                device_rate=device_rates[worker],
                speed=min(1.0, best_rate / rate),
                device_speed=min(1.0, best_device / device_rates[worker]),
                own_speed=self._best[worker] / rate,
                data_share=median(a.data for a in accounts) / step_seconds if step_seconds else 0.0,
                wait_share=median(a.wait for a in accounts) / step_seconds if step_seconds else 0.0,
                cost=sum(a.cost for a in accounts) / len(accounts),
                cost_per_held=sum(a.cost for a in accounts) / max(1, sum(a.held for a in accounts)),
                stage_seconds=device_rates[worker] * last.share,
            )
        tokens = [sum(accounts[worker].tokens for _, accounts in steps) for worker in steps[0][1]]
        padding = sum(account.padding for _, accounts in steps for account in accounts.values())
        return Window(
            steps=len(steps),
            step_seconds=step_seconds,
            noise=usual,
            workers=ratings,
            data_skew=skew([rating.cost for rating in ratings.values()]),
            token_skew=skew([float(each) for each in tokens]),
            padding_share=padding / max(1, padding + sum(tokens)),
        )


@dataclass(frozen=True)
class SkewFinding:
    """Something that costs time. `kind` is one of slow device, slow node, slow input, input starvation, uneven data,
    pipeline imbalance; `workers` are those that it is about (none: all alike), `value` is what gave it away."""

    kind: str
    workers: tuple[Worker, ...]
    value: float
    detail: str
    node: str = ""


@dataclass(frozen=True)
class News:
    """What a window changed."""

    opened: tuple[SkewFinding, ...] = ()
    closed: tuple[SkewFinding, ...] = ()


@dataclass
class Detector:
    """Turns windows into findings. `open` are those that hold."""

    open: dict[tuple[str, Worker], SkewFinding] = field(default_factory=dict)
    _seen: dict[tuple[str, Worker], int] = field(default_factory=dict)
    _missed: dict[tuple[str, Worker], int] = field(default_factory=dict)

    def look(self, window: Window) -> News:
        """What this window opens and closes."""
        suspected, cleared = suspects(window)
        opened, closed = [], []
        for key in [key for key in self._seen if key not in suspected]:
            del self._seen[key]
        for key, finding in suspected.items():
            self._missed.pop(key, None)
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] >= WINDOWS_TO_TELL and key not in self.open:
                self.open[key] = finding
                opened.append(finding)
        for key in [key for key in self.open if key not in suspected]:
            kind, who = key
            if who is not None and who not in window.workers:
                closed.append(self.open.pop(key))
            elif key in cleared or _is_renamed(kind, who, self.open.keys() & suspected.keys()):
                self._missed[key] = self._missed.get(key, 0) + 1
                if self._missed[key] >= WINDOWS_TO_TELL:
                    closed.append(self.open.pop(key))
                    del self._missed[key]
        return News(tuple(opened), tuple(closed))


def _is_renamed(kind: str, who: Worker, found: Iterable[tuple[str, Worker]]) -> bool:
    """Whether a finding about a worker has another kind now."""
    return any(other != kind and name == who for other, name in found)


def suspects(window: Window) -> tuple[dict[tuple[str, Worker], SkewFinding], set[tuple[str, Worker]]]:
    """What one window speaks for, by kind and worker (None: nobody in particular); and what it speaks against. Between
    the two limits it says nothing."""
    found: dict[tuple[str, Worker], SkewFinding] = {}
    cleared: set[tuple[str, Worker]] = set()
    ratings = window.workers
    starved = median(rating.data_share for rating in ratings.values()) if ratings else 0.0
    slow_devices = []
    for worker, rating in ratings.items():
        # Speeds compare two uncertain numbers; who is named is slow even if both are off by twice their error.
        doubt = 1 + 2 * (rating.noise**2 + window.noise**2) ** 0.5
        by_device = rating.device_speed * doubt < SLOW
        if rating.speed * doubt < SLOW and not by_device:
            found["slow input", worker] = SkewFinding(
                "slow input", (worker,), rating.speed,
                f"works at {rating.speed:.2f} of the fastest's speed, {rating.data_share:.0%} of a step for input",
                rating.node,
            )  # fmt: skip
        elif rating.speed > RECOVERED:
            cleared.add(("slow input", worker))
        if by_device:
            slow_devices.append(worker)
        elif rating.device_speed > RECOVERED:
            cleared |= {("slow device", worker), ("slow node", worker)}
    _name_devices(window, slow_devices, found)
    if starved > STARVED:
        found["input starvation", None] = SkewFinding(
            "input starvation", (), starved, f"half of the workers wait for input for {starved:.0%} of the step or more"
        )
    elif starved < FED:
        cleared.add(("input starvation", None))
    uneven = skew([rating.cost_per_held for rating in ratings.values()]) if ratings else 1.0
    if uneven > UNEVEN:
        most = max(ratings, key=lambda worker: ratings[worker].cost_per_held)
        found["uneven data", None] = SkewFinding(
            "uneven data", (most,), uneven, f"its virtual workers cost {uneven:.2f} times the average"
        )
    elif uneven < EVEN:
        cleared.add(("uneven data", None))
    _look_at_stages(ratings, found, cleared)
    return found, cleared


def _name_devices(
    window: Window, slow: Sequence[Worker], found: dict[tuple[str, Worker], SkewFinding]
) -> None:  # fmt: skip
    """When all of a node's workers are slow, and others' are not, it is the node."""
    ratings = window.workers
    by_node: dict[str, list[Worker]] = defaultdict(list)
    for worker, rating in ratings.items():
        by_node[rating.node].append(worker)
    for worker in slow:
        rating = ratings[worker]
        fellows = by_node[rating.node]
        is_node = len(fellows) > 1 and len(fellows) < len(ratings) and all(fellow in slow for fellow in fellows)
        kind = "slow node" if is_node else "slow device"
        was = f", at {rating.own_speed:.2f} of its own best" if rating.own_speed < RECOVERED else ""
        found[kind, worker] = SkewFinding(
            kind, (worker,), rating.device_speed, f"computes at {rating.device_speed:.2f} of the fastest's speed{was}",
            rating.node,
        )  # fmt: skip


def _look_at_stages(
    ratings: Mapping[Worker, Rating],
    found: dict[tuple[str, Worker], SkewFinding],
    cleared: set[tuple[str, Worker]],
) -> None:
    """A stage that takes longer than others though its devices are no slower has too much of the model."""
    seconds: dict[int, list[float]] = defaultdict(list)
    for rating in ratings.values():
        if rating.device_speed >= SLOW:
            seconds[rating.stage].append(rating.stage_seconds)
    if len(seconds) < 2:
        cleared.add(("pipeline imbalance", None))
        return
    stages = {stage: median(each) for stage, each in seconds.items()}
    uneven = skew(list(stages.values()))
    if uneven > UNEVEN:
        stage = max(stages, key=lambda each: stages[each])
        workers = tuple(worker for worker, rating in ratings.items() if rating.stage == stage)
        found["pipeline imbalance", None] = SkewFinding(
            "pipeline imbalance", workers, uneven, f"stage {stage} takes {uneven:.2f} times as long as the average one"
        )
    elif uneven < EVEN:
        cleared.add(("pipeline imbalance", None))
