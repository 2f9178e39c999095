"""Feeds the sinks that a job asks for, each from a thread of its own, while the run is driven from this process.

A sink that fails is told of once, tried again with growing pauses, and given up after a while; the run goes on.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from monitoring.outside import json_text, read_json
from monitoring.shapes import RESULT, SINK
from monitoring.sinks.base import Sink, SinkProblem, SinkRun
from monitoring.sinks.hooks import HookSink
from monitoring.sinks.mlflow_sink import MLflowSink
from monitoring.sinks.stream import Item, Position, Stream
from monitoring.sinks.tensorboard import TensorBoardSink
from monitoring.sinks.wandb_sink import WandBSink

log = logging.getLogger(__name__)

POLL_S = 1.0
FIRST_PAUSE_S = 2.0
ATTEMPTS = 6
"""With pauses of 2, 4, ... s: a sink is given up after a minute of failing."""
FAREWELL_S = 15.0
"""How long the end of a run waits for sinks that have not taken everything yet."""
MAX_PENDING = 100_000

_OURS = ("tensorboard", "mlflow", "wandb", "hooks")
_PACKAGES = {"mlflow": ("mlflow", "mlflow (or mlflow-skinny)"), "wandb": ("wandb", "wandb")}


Maker = Callable[[str], Callable[[dict[str, Any]], Sink]]
"""What makes the sink of another package from its settings, by the sink's name; ValueError when there is none."""


class _OfPackage:
    """A sink of another package. It is made when it is opened, and may fail then like any."""

    def __init__(self, name: str, settings: dict[str, Any], maker: Maker) -> None:
        self.name = name
        self._settings, self._maker = settings, maker
        self._sink: Sink | None = None

    def open(self, run: SinkRun) -> None:
        self._sink = self._maker(self.name)(self._settings)
        self._sink.open(run)

    def write(self, items: Sequence[Item]) -> None:
        assert self._sink is not None
        self._sink.write(items)

    def close(self, status: str) -> None:
        assert self._sink is not None
        self._sink.close(status)


def check_sinks(settings: Mapping[str, Any], maker: Maker) -> None:
    """Raises SinkProblem when a sink that `settings` (the job's `monitoring`) asks for needs a package that is not
    here, or one of a package has the name of one of ours. `settings` are plain values."""
    for name in settings.get("sinks", ()):
        if name in _OURS:
            raise SinkProblem(
                f"monitoring.sinks.{name}: sinks of packages stand there, and this name is that of a field of ours: "
                f"use monitoring.{name}, or another name in the package"
            )
        try:
            maker(name)
        except ValueError as error:
            raise SinkProblem(f"monitoring.sinks.{name}: {error}") from error
    for field, (module, package) in _PACKAGES.items():
        if settings.get(field) is not None and importlib.util.find_spec(module) is None:
            raise SinkProblem(
                f"monitoring.{field} needs a package that is not installed where the run is started: "
                f"`pip install {package}`, or take monitoring.{field} out of the job"
            )
    if settings.get("tensorboard") and importlib.util.find_spec("tensorboardX") is None:
        raise SinkProblem("monitoring.tensorboard needs a package that is not installed: `pip install tensorboardX`")


def make_sinks(settings: Mapping[str, Any], maker: Maker) -> list[tuple[str, Sink]]:
    """The sinks that `settings` ask for, by their names in it."""
    sinks: list[tuple[str, Sink]] = []
    if settings.get("tensorboard"):
        sinks.append(("tensorboard", TensorBoardSink()))
    if (mlflow := settings.get("mlflow")) is not None:
        sinks.append(("mlflow", MLflowSink(mlflow["tracking_uri"], mlflow["experiment"])))
    if (wandb := settings.get("wandb")) is not None:
        sinks.append(("wandb", WandBSink(wandb["project"], wandb["mode"], wandb["entity"])))
    return sinks + [(name, _OfPackage(name, given, maker)) for name, given in settings.get("sinks", {}).items()]


class Feeder:
    """Feeds one sink; how far it came is kept in `.sink-<field>.json`, for the driver that goes on with the run."""

    def __init__(
        self, field: str, sink: Sink, run: SinkRun, *, poll_s: float = POLL_S, first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self._sink = sink
        self._run = run
        self._file = run.directory / f".sink-{field}.json"
        self._poll_s = poll_s
        self._first_pause_s = first_pause_s
        self._over = threading.Event()
        self._pending: list[Item] = []
        self._is_open = False
        self._failures = 0
        self.is_given_up = False
        known = self._remembered()
        run.memory = known.get("memory", {})
        self._stream = Stream(run.directory, Position.read(known), getattr(sink, "wants", frozenset()))
        self._thread = threading.Thread(target=self._loop, name=f"sink {field}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """Lets the sink have what is left, and waits for that."""
        self._over.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("%s has not taken all of the run in time; the rest of it is not told", self._sink.name)

    def _loop(self) -> None:
        try:
            while not self.is_given_up:
                over = self._over.is_set()
                self.feed()
                if over and not self._pending:
                    break
                self._over.wait(self._pause_s) if not over else time.sleep(self._pause_s if self._failures else 0.0)
            if self._is_open:
                self._sink.close(self._status())
        except Exception as error:
            log.warning("%s could not be closed: %s", self._sink.name, _told(error))

    @property
    def _pause_s(self) -> float:
        return self._first_pause_s * 2 ** (self._failures - 1) if self._failures else self._poll_s

    def feed(self) -> None:
        """Hands over what is new, or what an earlier attempt could not."""
        try:
            self._pending += self._stream.new()
            if len(self._pending) > MAX_PENDING:
                raise RuntimeError(f"more than {MAX_PENDING} records wait for it")
            if not self._is_open:
                self._sink.open(self._run)
                self._is_open = True
                self._remember()
            if self._pending:
                self._sink.write(self._pending)
                self._pending = []
                self._remember()
            if self._failures:
                log.info("%s works again", self._sink.name)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                log.warning("%s failed (the run goes on, it is tried again): %s", self._sink.name, _told(error))
            elif self._failures >= ATTEMPTS:
                self.is_given_up = True
                log.warning("%s is given up, the rest of this run is not told to it: %s", self._sink.name, _told(error))

    def _remember(self) -> None:
        content = self._stream.position.as_dict() if not self._pending else self._remembered()
        draft = self._file.with_name(f"{self._file.name}.draft")
        draft.write_text(json_text(content | {"memory": self._run.memory}), encoding="utf-8")
        os.replace(draft, self._file)

    def _remembered(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return dict(read_json(self._file, SINK))
        return {}

    def _status(self) -> str:
        with suppress(OSError, ValueError, KeyError):
            return str(read_json(self._run.directory / "result.json", RESULT)["status"])
        return "interrupted"


@contextmanager
def feeding(
    settings: Mapping[str, Any],
    run: str,
    directory: Path,
    job: dict[str, Any],
    maker: Maker,
    hooks: Callable[[SinkRun], Any] | None = None,
) -> Iterator[None]:
    """Feeds the sinks that `settings` (the job's `monitoring`, as plain values) ask for while the block runs, unless
    another process that follows the run does already. `hooks` makes those of the job."""
    with _alone(directory) as alone:
        sinks = make_sinks(settings, maker) if alone else []
        if alone and hooks is not None:
            sinks.append(("hooks", HookSink(hooks)))
        feeders = [Feeder(field, sink, SinkRun(run, directory.name, directory, job)) for field, sink in sinks]
        for feeder in feeders:
            feeder.start()
        try:
            yield
        finally:
            deadline = time.monotonic() + FAREWELL_S
            for feeder in feeders:
                feeder.finish(max(0.1, deadline - time.monotonic()))


@contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Whether this process is the one that feeds the run's sinks, until the block ends."""
    with (directory / ".sinks.lock").open("ab") as file:
        with suppress(OSError):  # Not ours, most likely.
            os.fchmod(file.fileno(), 0o666 & directory.stat().st_mode)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.info("the sinks of this run are fed by another process")
            yield False
        else:
            yield True


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"
