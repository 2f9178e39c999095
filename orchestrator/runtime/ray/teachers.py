"""Processes of a run that answer for its teacher (`elastic.teachers`), so that no worker needs to have it in memory.

An answer is a function of its question and the teacher: any of them may give it, also twice. So a lost one costs time
only: Ray starts another in its place, and the others are asked meanwhile. They are made by whoever needs them first,
and end with the run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from orchestrator.job import Job
from orchestrator.runtime.ray.names import NAMESPACE, teacher_name
from orchestrator.runtime.ray.surroundings import go_to
from orchestrator.training.teaching import Answer, Question
from orchestrator.urls import take_over

log = logging.getLogger(__name__)
PATIENCE_S = 5.0
"""How long one is waited for before another is asked the same."""
TELL_AGAIN_S = 60.0
BREATH_S = 0.2
"""Before one is asked in place of another that was lost."""


class TeacherActor:
    """The teacher of a job, whole, in a process of its own."""

    def __init__(self, spec: dict[str, Any]) -> None:
        take_over(spec["environment"])
        go_to(spec["cwd"])
        self._job = Job.model_validate(spec["job"])
        os.environ.update(self._job.resources.env)
        from orchestrator.training import build
        from orchestrator.training.fingerprint import fingerprint
        from orchestrator.training.teaching import LocalTeacher

        device = build.choose_device(self._job)
        build.make_deterministic(self._job, device)
        self._device = fingerprint(device)
        self._answers = LocalTeacher(self._job, device)

    def answer(self, questions: Sequence[Question]) -> tuple[str, list[Answer]]:
        """On what device they were computed, and the answers."""
        return self._device, self._answers(questions)


class RemoteTeachers:
    """Asks the teachers of a run. See `orchestrator.training.teaching.Ask`."""

    def __init__(self, run_id: str, spec: dict[str, Any], job: Job) -> None:
        self._resources, self._mixed = job.resources, job.elastic.mixed_numerics
        self._spec = {key: spec[key] for key in ("environment", "cwd", "job")}
        self._run_id = run_id
        self._device: str | None = None
        self._actors = dict.fromkeys(range(job.elastic.teachers))
        self._coming: dict[Any, int] = {}
        """Of those that have not answered since they were asked for, or lost: what they were asked, to see them
        answer."""
        for number in self._actors:
            self._call(number)
        self._told_at = -TELL_AGAIN_S

    def _call(self, number: int) -> None:
        """Has Ray asked for the one of that number, if there is none."""
        kinds = self._resources.kinds
        actor: Any = (
            ray.remote(TeacherActor)
            .options(
                name=teacher_name(self._run_id, number), namespace=NAMESPACE, lifetime="detached", get_if_exists=True,
                num_cpus=self._resources.cpu, num_gpus=self._resources.gpu or None, max_restarts=-1,
                accelerator_type=kinds[0] if len(kinds) == 1 else None,
            )
            .remote(self._spec)
        )  # fmt: skip
        self._actors[number] = actor
        self._coming[actor.answer.remote([])] = number

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Waits for as long as none of them answers. Raises ValueError where they do not compute alike."""
        there = self._there()
        shares = [_Share(list(range(first, len(questions), len(there)))) for first in range(len(there))]
        for share, number in zip(shares, there, strict=True):
            self._ask(share, number, questions)
        found: list[Answer | None] = [None] * len(questions)
        while shares:
            ready, _ = ray.wait([call for share in shares for call in share.calls], timeout=PATIENCE_S)
            for share in list(shares):
                given = self._taken(share, set(ready))
                if given is not None:
                    for place, answer in zip(share.places, given, strict=True):
                        found[place] = answer
                    shares.remove(share)
                elif not share.calls or not ready:
                    # Lost, or slow: another one is asked the same, if there is one.
                    others = [number for number in self._there() if number not in share.calls.values()]
                    if others:
                        self._ask(share, others[0], questions)
        return [answer for answer in found if answer is not None]

    def _there(self) -> list[int]:
        """The numbers of those that answer: one at least."""
        while True:
            waits = len(self._coming) == len(self._actors)
            ready, _ = ray.wait(list(self._coming), timeout=PATIENCE_S if waits else 0) if self._coming else ([], [])
            for call in ready:
                number = self._coming.pop(call)
                if self._answer_of(call, number) is None:
                    self._call(number)
            if there := [number for number in self._actors if number not in self._coming.values()]:
                return there
            if time.monotonic() - self._told_at > TELL_AGAIN_S:
                self._told_at = time.monotonic()
                log.warning("no teacher answers yet: they start, or wait for room")

    def _ask(self, share: _Share, number: int, questions: Sequence[Question]) -> None:
        actor: Any = self._actors[number]
        share.calls[actor.answer.remote([questions[place] for place in share.places])] = number

    def _taken(self, share: _Share, ready: set[Any]) -> list[Answer] | None:
        """What one of those that were asked has answered; None where none has yet. Who is lost is asked for again."""
        for call in [call for call in share.calls if call in ready]:
            number = share.calls.pop(call)
            if (answers := self._answer_of(call, number)) is not None:
                return answers
            if number not in self._coming.values():
                self._call(number)
        return None

    def _answer_of(self, call: Any, number: int) -> list[Answer] | None:
        """None where that one is lost."""
        try:
            device, answers = ray.get(call)
        except ray.exceptions.RayActorError as error:
            log.warning("teacher %d is lost: %s", number, str(error).partition("\n")[0])
            time.sleep(BREATH_S)
            return None
        self._device = self._device or device
        if device != self._device and not self._mixed:
            raise ValueError(
                f"teachers compute on different devices ({self._device}, and {device}), which may round otherwise: "
                "name one kind (resources.accelerators), or set elastic.mixed_numerics: true"
            )
        return list(answers)


@dataclass
class _Share:
    """The places of some questions among all, and who was asked them, by what is to be waited for."""

    places: list[int]
    calls: dict[Any, int] = field(default_factory=dict)
