"""Asking the teachers of a run (`orchestrator.runtime.ray.teacher_actor`).

An answer is a function of its question and the teacher: any of them may give it, also twice. So a lost one costs time
only: Ray starts another in its place, and the others are asked meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from orchestrator.job import Job
from orchestrator.models.problems import refused
from orchestrator.runtime.ray.teacher_actor import LOOK_S, find_teachers
from orchestrator.training.teaching import Answer, Look, Question
from strategies.comm.group_errors import first_line

log = logging.getLogger(__name__)
TELL_AGAIN_S = 60.0
BREATH_S = 0.2
"""Before anything is asked again after a loss."""
STUCK_S = 60.0
"""One that has a question, has read its model and answers no row for this long, nobody's, is ended, for Ray to start
another. Each time twice as long: it may be slow."""
GAP_S = 10.0
"""What happened while nobody looked for longer than this is not known."""
FIND_AGAIN_S = 1.0
FAILURES = 3
"""When each teacher has failed so often, with no answer of its in between, none can answer."""
LOST = (
    ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.WorkerCrashedError,
    ray.exceptions.RuntimeEnvSetupError, ray.exceptions.ActorUnschedulableError, ray.exceptions.NodeDiedError,
)  # fmt: skip
"""Errors of a process that is not there; others it has raised itself."""
MOST_REST_S = 30.0


@dataclass
class _Call:
    """Something that a teacher was asked: the `places` of questions among all; None: to prepare itself."""

    number: int
    places: list[int] | None
    since: float


@dataclass
class _Condition:
    """How a teacher is: how many rows it had `answered`, and since when that has not moved; how often it has failed in
    a row, until when it is let alone for that; whether people know that it is away."""

    answered: int | None = None
    moved_at: float = 0.0
    failures: int = 0
    rests_until: float = 0.0
    is_told: bool = False


class RemoteTeachers:
    """Asks the teachers of a run, for as long as it takes until one answers. See `orchestrator.training.teaching.Ask`.

    Each is asked one thing at a time by this process.
    """

    def __init__(self, run_id: str, job: Job) -> None:
        self.look: Look = lambda: None
        self._mixed = job.elastic.mixed_numerics
        self._lock = threading.Lock()
        self._device = ""
        count = job.elastic.teachers
        self._find = partial(find_teachers, run_id, count)
        self._actors: list[Any] = [None] * count
        self._conditions = [_Condition() for _ in range(count)]
        self._ready: set[int] = set()
        self._calls: dict[Any, _Call] = {}
        self._pulses: dict[Any, int] = {}
        self._patience_s = STUCK_S
        self._looked_at = self._told_at = self._felt_at = time.monotonic()

    @property
    def device(self) -> str:
        """See `Ask`."""
        if not self._device:
            self([])
        return self._device

    def release(self) -> None:
        """They keep what they have: they are there for nothing else."""

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Raises ModelError where they do not compute alike, or none can answer."""
        while not self._lock.acquire(timeout=LOOK_S):
            self.look()
        try:
            return self._ask_all(questions)
        finally:
            # What another question's asker has not waited for concerns nobody.
            self._calls = {call: asked for call, asked in self._calls.items() if asked.places is None}
            self._lock.release()

    def _ask_all(self, questions: Sequence[Question]) -> list[Answer]:
        found: list[Answer | None] = [None] * len(questions)
        shares: list[list[int]] | None = None
        while True:
            self._prepare_others()
            if self._ready and shares is None:
                count = len(self._ready)
                shares = [share for n in range(count) if (share := list(range(n, len(questions), count)))]
            busy = {asked.number for asked in self._calls.values()}
            for number in sorted(self._ready - busy):
                if shares:
                    places = shares.pop()
                    given = [questions[place] for place in places]
                    self._note(self._actors[number].answer.remote(given), number, places)
            if shares is not None and not shares and not any(asked.places for asked in self._calls.values()):
                return [answer for answer in found if answer is not None]
            for call in self._wait():
                asked = self._calls.pop(call)
                answers = self._taken(call, asked)
                if asked.places is None:
                    continue
                if answers is None:
                    assert shares is not None
                    shares.append(asked.places)
                    continue
                for place, answer in zip(asked.places, answers, strict=True):
                    found[place] = answer

    def _note(self, call: Any, number: int, places: list[int] | None) -> None:
        self._calls[call] = _Call(number, places, time.monotonic())

    def _prepare_others(self) -> None:
        """Has all prepare themselves that are not known to be ready."""
        now = time.monotonic()
        self._find_missing(now)
        under_way = {asked.number for asked in self._calls.values()}
        for number, actor in enumerate(self._actors):
            is_idle = actor is not None and number not in self._ready | under_way
            if is_idle and now >= self._conditions[number].rests_until:
                self._note(actor.prepare.remote(), number, None)
        if not self._ready and now - self._told_at > TELL_AGAIN_S:
            self._told_at = now
            log.warning("no teacher answers yet: they start, read the model, or wait for room")

    def _find_missing(self, now: float) -> None:
        """The controller has had Ray asked for them, and does so again for those that end for good."""
        missing = [number for number, actor in enumerate(self._actors) if actor is None]
        if not any(now >= self._conditions[number].rests_until for number in missing):
            return
        try:
            found = self._find()
        except Exception as error:
            log.warning("teachers cannot be looked for: %s: %s", type(error).__name__, error)
            found = [None] * len(self._actors)
        for number in missing:
            self._actors[number] = found[number]
            self._conditions[number].rests_until = now + FIND_AGAIN_S if found[number] is None else now

    def _wait(self) -> list[Any]:
        """What has come back. Looks around about every second, also where something comes back all the time."""
        if self._calls:
            ready: list[Any] = ray.wait(list(self._calls), timeout=LOOK_S)[0]
        else:
            time.sleep(BREATH_S)  # All rest.
            ready = []
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self.look()
            self._feel_pulses(now, [asked for call, asked in self._calls.items() if call not in ready])
        return ready

    def _taken(self, call: Any, asked: _Call) -> list[Answer] | None:
        """What has been answered; None where that one is lost, or only has prepared itself."""
        try:
            given = ray.get(call)
        except LOST as error:
            self._is_lost(asked.number, error)
            return None
        except ray.exceptions.RayError as error:
            self._has_failed(asked.number, error)
            return None
        device, answers = (given, None) if asked.places is None else given
        self._device = self._device or device
        if device != self._device and not self._mixed:
            raise refused(
                f"teachers compute on different devices ({self._device}, and {device}), which may round otherwise: "
                "name one kind, or set elastic.mixed_numerics: true",
                "resources.accelerators",
            )  # fmt: skip
        self._ready.add(asked.number)
        condition = self._conditions[asked.number]
        condition.is_told = False
        if answers is not None:
            condition.failures = 0
        return answers

    # ------------------------------------------------------------------------------------ when one does not answer

    def _is_lost(self, number: int, error: Exception) -> None:
        """Its process ended, or nobody can reach it. Ray starts another, unless it was ended for good."""
        self._ready.discard(number)
        if not self._conditions[number].is_told:
            self._conditions[number].is_told = True
            lines = [line for line in str(error).splitlines() if line.strip()]
            log.warning("teacher %d is lost: %s", number, lines[-1] if lines else type(error).__name__)
        if not isinstance(error, (ray.exceptions.ActorUnavailableError, ray.exceptions.ObjectLostError)):
            self._actors[number] = None
            self._conditions[number].rests_until = time.monotonic() + FIND_AGAIN_S
        time.sleep(BREATH_S)

    def _has_failed(self, number: int, error: Any) -> None:
        """Its device, its memory, its node's storage, or the model: another process may fare better, here or elsewhere.
        Raises ModelError if that has been tried."""
        self._ready.discard(number)
        condition = self._conditions[number]
        condition.failures += 1
        condition.rests_until = time.monotonic() + min(MOST_REST_S, 2.0 ** (condition.failures - 1))
        cause = getattr(error, "cause", None) or error
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        if all(each.failures >= FAILURES for each in self._conditions):
            raise refused(f"no teacher can answer ({reason})", "objective.teacher")
        log.warning("teacher %d fails (%s), and is started anew", number, reason)
        self._end(number)

    def _feel_pulses(self, now: float, waited_for: Sequence[_Call]) -> None:
        """Ends those that are alive and do not move. (Reading a model takes as long as it takes; one that does not even
        begin is the controller's to end.)"""
        if now - self._felt_at > GAP_S:  # Nobody has looked meanwhile.
            self._pulses = {}
            for asked in waited_for:
                asked.since = now
        self._felt_at = now
        ready = ray.wait(list(self._pulses), num_returns=len(self._pulses), timeout=0)[0] if self._pulses else []
        for call in ready:
            condition = self._conditions[self._pulses.pop(call)]
            with suppress(ray.exceptions.RayError):  # Its calls fail as well.
                answered = ray.get(call)
                if answered is None or answered != condition.answered:
                    condition.answered, condition.moved_at = answered, now
        for asked in waited_for:
            number, condition = asked.number, self._conditions[asked.number]
            if self._actors[number] is None:
                continue
            if number not in self._pulses.values():
                self._pulses[self._actors[number].pulse.remote()] = number
            has_begun = asked.places is not None or condition.moved_at > asked.since
            if has_begun and now - max(asked.since, condition.moved_at) > self._patience_s:
                log.warning("teacher %d does not move for %.0f s, and is started anew", number, self._patience_s)
                self._patience_s *= 2
                condition.moved_at = now
                self._end(number)

    def _end(self, number: int) -> None:
        with suppress(ray.exceptions.RayError):
            ray.kill(self._actors[number], no_restart=False)
