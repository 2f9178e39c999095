"""Processes of a run that answer for its teacher (`elastic.teachers`), so that no worker needs to have it in memory.

The controller has them started before it asks for workers, and they end with the run, or when nobody has been heard of
it for long. Knows no torch, so that the controller needs none.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import ray

from orchestrator.job import Job
from orchestrator.runtime.ray.names import NAMESPACE, teacher_name
from orchestrator.runtime.ray.resource_request import Need, why_no_room
from orchestrator.runtime.ray.surroundings import go_to
from orchestrator.urls import take_over

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.training.teaching import Answer, Question

log = logging.getLogger(__name__)
LOOK_S = 1.0
ORPHANED_LEASES = 4
"""A teacher that hears of nobody for this many `elastic.lease_s` ends."""


class TeacherActor:
    """The teacher of a job, whole, in a process of its own, from the first call of `prepare` on."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._answers: Any = None
        self._heard_at = time.monotonic()
        self._patience_s = ORPHANED_LEASES * float(spec["job"]["elastic"]["lease_s"])
        self._me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def _watch(self) -> None:
        while time.monotonic() - self._heard_at < self._patience_s:
            time.sleep(LOOK_S)
        ray.kill(self._me, no_restart=True)

    @ray.method(concurrency_group="life")
    def hear(self) -> None:
        """The run is there."""
        self._heard_at = time.monotonic()

    def prepare(self) -> str:
        """Reads the teacher; on what device it computes. Raises ValueError, ModelError."""
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
    """Has Ray asked for all of a run, if there are none; to be called by who wants them, in any process."""
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


class TeachersLease:
    """The controller's side: they hear of it for as long as there is a run, and people hear of it if there is no room
    for them."""

    def __init__(self, run_id: str, spec: dict[str, Any], job: Job) -> None:
        self._job = job
        self._actors = have_teachers(run_id, spec, job)
        self._heard: dict[Any, int] = {}
        self._missing_since = time.monotonic()
        self._told_at = 0.0

    def look(self) -> None:
        """To be called about every second."""
        ready, _ = ray.wait(list(self._heard), num_returns=len(self._heard), timeout=0) if self._heard else ([], [])
        for call in ready:
            del self._heard[call]
        for number, actor in enumerate(self._actors):
            if number not in self._heard.values():
                self._heard[actor.hear.remote()] = number
        now = time.monotonic()
        if len(ready) == len(self._actors):
            self._missing_since = now
        limit_s = self._job.elastic.scaling.shortage_after_s
        if now - self._missing_since > limit_s and now - self._told_at > limit_s:
            self._told_at = now
            log.warning("teachers have not started for %.0f s: %s", now - self._missing_since, _reason(self._job))


def _reason(job: Job) -> str:
    try:
        return why_no_room(Need.of(job))
    except Exception as error:
        return f"the cluster cannot be asked why: {type(error).__name__}: {error}"
