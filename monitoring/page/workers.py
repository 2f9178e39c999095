"""The workers of a run as the page's grid shows them. Pure.

From status.json where there is one, else from what events tell. One that is lost stays for a while, marked.
"""

from __future__ import annotations

from typing import Any

from monitoring.events import (
    ControllerBegan,
    GenerationFormed,
    RunFinished,
    WorkerDied,
    WorkerKilled,
    WorkerPlaced,
    WorkerReady,
    WorkerReleased,
    WorkerRequested,
)

LOST_SHOWN_S = 60.0
"""For this long one that is gone is still shown."""
QUIET_S = 3.0
"""Heartbeats younger than this need not be told apart."""
MAX_LOST = 64

Key = str
_GONE = {WorkerDied.kind: "lost", WorkerKilled.kind: "lost", WorkerReleased.kind: "released"}
_COPIED = ("worker", "incarnation", "node", "pid", "state", "rank", "coordinates", "phase", "virtual_workers",
           "leaving", "finding")  # fmt: skip
_RATIOS = ("speed", "own_speed", "wait_share")


class Workers:
    """Every worker there is, and those that were lost a moment ago, by "worker.incarnation"."""

    def __init__(self) -> None:
        self._present: dict[Key, dict[str, Any]] = {}
        self._gone: dict[Key, dict[str, Any]] = {}
        self._dead: set[Key] = set()
        self._over = False
        self._reported = False
        self._session: Any = None

    def on_event(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == ControllerBegan.kind:
            self._over = False
            self._dead.clear()
            if event.get("session") != self._session:
                # The run is resumed, by other workers.
                self._session = event.get("session")
                self._present, self._gone, self._reported = {}, {}, False
        elif kind == RunFinished.kind:
            self._over = True
        elif kind in _GONE:
            self._lose(_key(event), event, _GONE[kind], float(event["time"]))
        elif self._reported:
            return  # status.json says it all, and better.
        elif kind == GenerationFormed.kind:
            for one in self._present.values():
                if one["state"] == "member":
                    one |= {"state": "idle", "rank": None}
            for rank, entry in enumerate(event["workers"]):
                self._know(entry, "member")["rank"] = entry.get("rank", rank)
        elif kind in (WorkerRequested.kind, WorkerPlaced.kind, WorkerReady.kind):
            states = {WorkerRequested.kind: "requested", WorkerPlaced.kind: "starting", WorkerReady.kind: "idle"}
            self._know(event, states[kind])

    def on_status(self, workers: list[dict[str, Any]] | None, now: float, *, written: float, over: bool) -> None:
        """The workers of status.json, `written` when; None where there is none. One that it no longer names is gone.

        How long a worker has been quiet is told by the writer's clock: when that is silent itself, workers are not.
        """
        self._over = over
        if workers is None:
            return
        present: dict[Key, dict[str, Any]] = {}
        for entry in workers:
            if (key := _key(entry)) not in self._dead:
                present[key] = _shown(entry, written)
        if self._reported and not over:
            for key in self._present.keys() - present.keys():
                self._lose(key, self._present[key], "lost", now)
        self._reported = True
        self._present = present

    def shown(self, now: float) -> dict[Key, dict[str, Any]]:
        """All of them; those gone too long are forgotten."""
        self._gone = {key: one for key, one in self._gone.items() if now - one["lost_at"] < LOST_SHOWN_S}
        if self._over:
            return {key: one | {"state": "ended", "quiet": None} for key, one in self._present.items()}
        return {**self._present, **self._gone}

    def _know(self, entry: dict[str, Any], state: str) -> dict[str, Any]:
        one = self._present.setdefault(_key(entry), {"worker": entry["worker"], "incarnation": entry["incarnation"]})
        one |= {key: entry[key] for key in ("node", "pid") if entry.get(key) is not None}
        one["state"] = state
        return one

    def _lose(self, key: Key, entry: dict[str, Any], how: str, at: float) -> None:
        if key in self._dead:
            return
        self._dead.add(key)
        known = self._present.pop(key, {})
        if not known and how == "released":
            return
        one = {key: entry.get(key) for key in ("worker", "incarnation", "node", "rank", "coordinates")} | known
        self._gone[key] = one | {"state": how, "lost_at": round(at, 2), "quiet": None}
        while len(self._gone) > MAX_LOST:
            self._gone.pop(next(iter(self._gone)))


def _key(entry: dict[str, Any]) -> Key:
    return f"{int(entry['worker'])}.{int(entry['incarnation'])}"


def _shown(entry: dict[str, Any], written: float) -> dict[str, Any]:
    """What the grid shows of a worker, as exact as it shows it, so that little changes from second to second."""
    one = {key: entry.get(key) for key in _COPIED}
    for key in _RATIOS:
        value = entry.get(key)
        one[key] = None if value is None else round(float(value), 2)
    seconds = entry.get("step_seconds")
    one["step_seconds"] = None if seconds is None else float(f"{seconds:.2g}")
    for key in ("host_bytes", "device_bytes"):
        one[key] = float(f"{entry.get(key) or 0:.2g}")
    heard = entry.get("heartbeat")
    quiet = 0.0 if heard is None else written - heard
    one["quiet"] = round(quiet) if quiet > QUIET_S else None
    return one
