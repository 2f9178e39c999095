"""Asking the teachers of a run (`orchestrator.runtime.ray.teacher_actor`).

An answer is a function of its question and the teacher: any of them may give it, also twice. So a lost one costs time
only: Ray starts another in its place, and the others are asked meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.job import Job
from orchestrator.runtime.ray.teacher_actor import LOOK_S, have_teachers
from orchestrator.training.teaching import Answer, Look, Question

log = logging.getLogger(__name__)
TELL_AGAIN_S = 60.0
BREATH_S = 0.2
"""Before one is asked again that was lost."""
STUCK_S = 60.0
"""One that has been asked, is alive and says nothing for this long is ended, for Ray to start another; or for ten times
as long as answers have taken."""


@dataclass
class _Call:
    """Something that a teacher was asked: the `places` of questions among all; None: to prepare itself."""

    number: int
    places: list[int] | None
    since: float


class RemoteTeachers:
    """Asks the teachers of a run, for as long as it takes until one answers. See `orchestrator.training.teaching.Ask`.

    Each is asked one thing at a time by this process.
    """

    def __init__(self, run_id: str, spec: dict[str, Any], job: Job) -> None:
        self.look: Look = lambda: None
        self._mixed = job.elastic.mixed_numerics
        self._lock = threading.Lock()
        self._device = ""
        self._actors = have_teachers(run_id, spec, job)
        self._ready: set[int] = set()
        self._calls: dict[Any, _Call] = {}
        self._longest_s = 0.0
        self._told_at = time.monotonic()

    @property
    def device(self) -> str:
        """See `Ask`."""
        if not self._device:
            self([])
        return self._device

    def release(self) -> None:
        """They keep what they have: they are there for nothing else."""

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Raises ValueError where they do not compute alike, and what a teacher raises that cannot be made."""
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
            ready, _ = ray.wait(list(self._calls), timeout=LOOK_S)
            if not ready:
                self.look()
                self._end_the_stuck()
            for call in ready:
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
        under_way = {asked.number for asked in self._calls.values()}
        for number, actor in enumerate(self._actors):
            if number not in self._ready and number not in under_way:
                self._note(actor.prepare.remote(), number, None)
        if not self._ready and time.monotonic() - self._told_at > TELL_AGAIN_S:
            self._told_at = time.monotonic()
            log.warning("no teacher answers yet: they start, read the model, or wait for room")

    def _taken(self, call: Any, asked: _Call) -> list[Answer] | None:
        """What has been answered; None where that one is lost, or only has prepared itself."""
        try:
            given = ray.get(call)
        except ray.exceptions.RayTaskError:
            raise  # It is there, and cannot do it; no other could.
        except ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            log.warning("teacher %d is lost: %s", asked.number, lines[-1] if lines else type(error).__name__)
            self._ready.discard(asked.number)
            time.sleep(BREATH_S)
            return None
        device, answers = (given, None) if asked.places is None else given
        self._device = self._device or device
        if device != self._device and not self._mixed:
            raise ValueError(
                f"teachers compute on different devices ({self._device}, and {device}), which may round otherwise: "
                "name one kind (resources.accelerators), or set elastic.mixed_numerics: true"
            )
        self._ready.add(asked.number)
        if asked.places is not None:
            self._longest_s = max(self._longest_s, time.monotonic() - asked.since)
        return answers

    def _end_the_stuck(self) -> None:
        """Reading a model takes as long as it takes; answering does not."""
        limit_s = max(STUCK_S, 10 * self._longest_s)
        for asked in self._calls.values():
            if asked.places is not None and time.monotonic() - asked.since > limit_s:
                log.warning("teacher %d has not answered for %.0f s and is ended", asked.number, limit_s)
                ray.kill(self._actors[asked.number], no_restart=False)
