"""Processes of a run that answer for its teacher (`elastic.teachers`), so that no worker needs to have it in memory.

The controller has them started before it asks for workers, and they end with the run, or when nobody has been heard of
it for long. Knows no torch, so that the controller needs none.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from monitoring.events import TeachersMissing
from orchestrator.job import Job
from orchestrator.runtime.ray.names import NAMESPACE, teacher_name
from orchestrator.runtime.ray.resource_request import Need, why_no_room
from orchestrator.runtime.ray.surroundings import go_to
from orchestrator.urls import take_over

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from orchestrator.training.teaching import Answer, Question

log = logging.getLogger(__name__)
LOOK_S = 1.0
TELL_AGAIN_S = 600.0
DEAF_S = 60.0
"""A process that answers nothing for this long, though it is not lost, stands still."""
ORPHANED_LEASES = 4
"""A teacher that hears of nobody for this many `elastic.lease_s` ends."""


class TeacherActor:
    """The teacher of a job, whole, in a process of its own, from the first call of `prepare` on."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._answers: Any = None
        self._heard_at = time.monotonic()
        self._seen = 0
        self._patience_s = ORPHANED_LEASES * float(spec["job"]["elastic"]["lease_s"])
        self._me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def _watch(self) -> None:
        while time.monotonic() - self._heard_at < self._patience_s:
            time.sleep(LOOK_S)
            answered = self._answered or 0
            if answered != self._seen:  # Somebody has asked.
                self._seen, self._heard_at = answered, time.monotonic()
        ray.kill(self._me, no_restart=True)

    @ray.method(concurrency_group="life")
    def hear(self) -> None:
        """The run is there."""
        self._heard_at = time.monotonic()

    @ray.method(concurrency_group="life")
    def pulse(self) -> int | None:
        """How many rows it has answered, so that one can see whether it moves; None while it has not read its model."""
        return self._answered

    @property
    def _answered(self) -> int | None:
        return None if self._answers is None else int(self._answers.answered)

    def prepare(self) -> str:
        """Reads the teacher; on what device it computes. Raises ValueError, ModelError."""
        self._heard_at = time.monotonic()
        if self._answers is None:
            take_over(self._spec["environment"])
            go_to(self._spec["cwd"])
            job = Job.model_validate(self._spec["job"])
            os.environ.update(job.resources.env)
            from orchestrator.training.build import choose_device
            from orchestrator.training.teaching import LocalTeacher

            found = LocalTeacher(job, choose_device(job))
            found([])
            self._answers = found
        return str(self._answers.device)

    def answer(self, questions: Sequence[Question]) -> tuple[str, list[Answer]]:
        """On what device they were computed, and the answers."""
        return self.prepare(), self._answers(questions)


def have_teachers(run_id: str, spec: dict[str, Any], job: Job) -> list[Any]:
    """Has Ray asked for those of a run that there are not."""
    need = Need.of(job)
    remote: Any = ray.remote
    made = remote(concurrency_groups={"life": 1})(TeacherActor)
    return [
        made.options(
            name=teacher_name(run_id, number), namespace=NAMESPACE, lifetime="detached", get_if_exists=True,
            num_cpus=need.bundle["CPU"], num_gpus=need.bundle.get("GPU"), max_restarts=-1,
            label_selector=dict(need.labels) or None,
        ).remote({key: spec[key] for key in ("environment", "cwd", "job")})
        for number in range(job.elastic.teachers)
    ]  # fmt: skip


def find_teachers(run_id: str, count: int) -> list[Any]:
    """Those of a run that there are, by number; None for one that has to be waited for. Raises what Ray does."""
    found: list[Any] = []
    for number in range(count):
        try:
            found.append(ray.get_actor(teacher_name(run_id, number), namespace=NAMESPACE))
        except ValueError:
            found.append(None)
    return found


class TeachersLease:
    """The controller's side, which alone asks Ray for them: they hear of the run for as long as it is there; one that
    does not hear any more is started anew; that some are missing for long is told to `record`."""

    def __init__(
        self, run_id: str, spec: dict[str, Any], job: Job, record: Callable[[TeachersMissing], object]
    ) -> None:  # fmt: skip
        self._job, self._record = job, record
        self._have = partial(have_teachers, run_id, spec, job)
        self._actors: list[Any] = []
        self._calls: dict[Any, tuple[int, float]] = {}
        self._heard_at = [time.monotonic()] * job.elastic.teachers
        self._were_heard: set[int] = set()
        self._told_at: float | None = None
        try:
            self._actors = self._have()
        except Exception as error:
            log.warning("teachers cannot be asked for yet: %s: %s", type(error).__name__, error)

    def look(self) -> None:
        """To be called about every second. Raises what Ray does where it cannot be asked."""
        ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0) if self._calls else ([], [])
        now = time.monotonic()
        is_gone = not self._actors
        for call in ready:
            number, _ = self._calls.pop(call)
            try:
                ray.get(call)
                self._heard_at[number] = now
                self._were_heard.add(number)
            except ray.exceptions.RayError as error:
                # Whatever comes in its place may wait for room, and has not heard yet.
                self._were_heard.discard(number)
                unreachable = (ray.exceptions.ActorUnavailableError, ray.exceptions.ObjectLostError)
                is_gone = is_gone or not isinstance(error, unreachable)  # Else it is gone for good.
        if is_gone:
            self._actors = self._have()
        self._end_the_deaf(now)
        asked = {number for number, _ in self._calls.values()}
        for number, actor in enumerate(self._actors):
            if number not in asked:
                self._calls[actor.hear.remote()] = number, now
        self._tell_of_missing(now)

    def _end_the_deaf(self, now: float) -> None:
        """One that has heard before, and neither does nor is lost: its process stands still."""
        for call, (number, since) in list(self._calls.items()):
            if number in self._were_heard and now - since > DEAF_S:
                log.warning("teacher %d has not heard for %.0f s, and is started anew", number, now - since)
                self._calls[call] = number, now
                with suppress(ray.exceptions.RayError):
                    ray.kill(self._actors[number], no_restart=False)

    def _tell_of_missing(self, now: float) -> None:
        limit_s = self._job.elastic.scaling.shortage_after_s
        missing = [number for number, heard_at in enumerate(self._heard_at) if now - heard_at > limit_s]
        if not missing:
            self._told_at = None
        elif self._told_at is None or now - self._told_at > TELL_AGAIN_S:
            self._told_at = now
            waited_s = now - min(self._heard_at)
            self._record(
                TeachersMissing(
                    teachers=missing, waited_seconds=round(waited_s, 1), reason=why_no_room(Need.of(self._job))
                )
            )
