"""Asking teachers in processes of their own: lost, slow, stuck and failing ones, with a Ray that does as told."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.exceptions

from monitoring.events import TeachersMissing
from orchestrator.job import Job
from orchestrator.models.problems import ModelError
from orchestrator.runtime.ray import teacher_actor, teachers
from orchestrator.runtime.ray.teacher_actor import TeachersLease
from orchestrator.runtime.ray.teachers import RemoteTeachers
from orchestrator.training.teaching import Answer, Question

Behaviour = Callable[["Actor", str, Any], Any]
NEVER = object()
"""A call that does not come back."""
JOB = """
name: student
model: {hf: {model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1}}
data: {source: python-stdlib, tokenizer: bytes, sequence_length: 16}
train: {steps: 4, global_batch: 2}
objective: {name: distill, teacher: /nowhere, top_k: 2}
elastic: {virtual_workers: 2, workers: {max: 1}, teachers: 2, scaling: {shortage_after_s: 0.2}}
"""
SHORT_S = 0.05


class Actor:
    """What it says to a call is what `behave` returns, or raises; each `kill` gives it the next of its `lives`."""

    def __init__(self, number: int, *lives: Behaviour) -> None:
        self.number, self.lives, self.rows, self.kills = number, list(lives), 0, 0
        self.calls: list[Call] = []
        for name in ("prepare", "answer", "pulse", "hear"):
            setattr(self, name, SimpleNamespace(remote=lambda *given, name=name: Call(self, name, given)))

    def kill(self) -> None:
        self.kills += 1
        self.rows = 0
        if len(self.lives) > 1:
            self.lives.pop(0)
        for call in self.calls:
            if call.value is NEVER:
                call.value, call.error = None, ray.exceptions.ActorUnavailableError("ended", None)


class Call:
    def __init__(self, actor: Actor, name: str, given: Any) -> None:
        self.value: Any
        self.error: Exception | None
        actor.calls.append(self)
        try:
            self.value, self.error = actor.lives[0](actor, name, given), None
        except Exception as error:
            self.value, self.error = None, error


class FakeRay:
    exceptions = ray.exceptions

    @staticmethod
    def wait(calls: list[Call], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Call], list[Call]]:
        ready = [call for call in calls if call.value is not NEVER]
        if not ready:
            time.sleep(timeout)
        return ready, [call for call in calls if call.value is NEVER]

    @staticmethod
    def get(call: Call) -> Any:
        if call.error is not None:
            raise call.error
        return call.value

    @staticmethod
    def kill(actor: Actor, *, no_restart: bool) -> None:
        assert not no_restart
        actor.kill()


def well(actor: Actor, name: str, given: Any) -> Any:
    """The answer to a question tells which it is."""
    if name == "prepare":
        return "cpu"
    if name == "pulse":
        return actor.rows
    if name == "hear":
        return None
    (questions,) = given
    actor.rows += len(questions)
    return "cpu", [Answer(question.tokens[None].astype(np.float32), np.zeros(1, np.int32)) for question in questions]


def restarting(actor: Actor, name: str, given: Any) -> Any:
    raise ray.exceptions.ActorUnavailableError("it restarts", None)


def gone(actor: Actor, name: str, given: Any) -> Any:
    raise ray.exceptions.ActorDiedError


def never_set_up(actor: Actor, name: str, given: Any) -> Any:
    raise ray.exceptions.RuntimeEnvSetupError("pip")


def stopped(actor: Actor, name: str, given: Any) -> Any:
    """It was well, and then its process stands still."""
    return well(actor, name, given) if name == "prepare" else NEVER


def standing(actor: Actor, name: str, given: Any) -> Any:
    """Its process lives, and what computes in it does not come back."""
    return NEVER if name == "answer" else well(actor, name, given)


def failing(error: Exception) -> Behaviour:
    def fail(actor: Actor, name: str, given: Any) -> Any:
        if name == "answer":
            raise ray.exceptions.RayTaskError("answer", "a traceback", error)
        return well(actor, name, given)

    return fail


def after(count: int, first: Behaviour, then: Behaviour = well) -> Behaviour:
    """The first calls end otherwise than those that follow."""
    calls = itertools.count()
    return lambda actor, name, given: (first if next(calls) < count else then)(actor, name, given)


def asking(monkeypatch: pytest.MonkeyPatch, *actors: Actor, anew: list[Actor] | None = None) -> RemoteTeachers:
    made = itertools.chain([list(actors)], itertools.repeat(list(actors) if anew is None else anew))
    monkeypatch.setattr(teachers, "ray", FakeRay)
    monkeypatch.setattr(teachers, "find_teachers", lambda *_: next(made))
    for name, value in {
        "LOOK_S": SHORT_S,
        "STUCK_S": 4 * SHORT_S,
        "BREATH_S": 0.01,
        "MOST_REST_S": SHORT_S,
        "FIND_AGAIN_S": 0.02,
    }.items():
        monkeypatch.setattr(teachers, name, value)
    return RemoteTeachers("run", Job.loads(JOB.replace("teachers: 2", f"teachers: {len(actors)}")))


QUESTIONS = [Question(np.arange(number, number + 3), None) for number in range(7)]


def answers_rightly(asked: RemoteTeachers) -> bool:
    found = asked(QUESTIONS)
    return [answer.logits[0, 0] for answer in found] == [question.tokens[0] for question in QUESTIONS]


def test_each_answers_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Actor(0, well), Actor(1, well)
    asked = asking(monkeypatch, first, second)
    assert answers_rightly(asked)
    assert answers_rightly(asked)
    assert {first.rows, second.rows} != {0}
    assert first.rows + second.rows == 14
    assert asked.device == "cpu"
    assert asked([]) == []


@pytest.mark.parametrize("other", [restarting, gone, stopped, standing])
def test_while_one_is_away_the_other_answers_and_who_waits_looks_around(
    monkeypatch: pytest.MonkeyPatch, other: Behaviour
) -> None:
    asked = asking(monkeypatch, Actor(0, well), Actor(1, other, well), anew=[Actor(0, well), Actor(1, well)])
    assert answers_rightly(asked)


def test_one_that_restarts_is_waited_for_looking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what has been asked comes back with an error all the time."""
    looks: list[float] = []
    asked = asking(monkeypatch, Actor(0, after(30, restarting)), Actor(1, after(30, restarting)))
    asked.look = lambda: looks.append(time.monotonic())
    assert answers_rightly(asked)
    assert looks


def test_who_waits_can_be_called_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class CalledAway(Exception):
        pass

    def look() -> None:
        raise CalledAway

    asked = asking(monkeypatch, Actor(0, restarting), Actor(1, restarting))
    asked.look = look
    with pytest.raises(CalledAway):
        asked(QUESTIONS)


@pytest.mark.parametrize("end", [gone, never_set_up])
def test_the_next_of_those_that_are_dead_for_good_is_found(monkeypatch: pytest.MonkeyPatch, end: Behaviour) -> None:
    asked = asking(monkeypatch, Actor(0, end), anew=[Actor(0, well)])
    assert answers_rightly(asked)


def test_those_that_there_are_not_yet_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(monkeypatch, Actor(0, well), Actor(1, well))
    found = itertools.chain([[None, None]] * 3, [[None, Actor(1, well)]] * 3, itertools.repeat([Actor(0, well)] * 2))
    monkeypatch.setattr(teachers, "find_teachers", lambda *_: next(found))
    assert answers_rightly(asked)


def test_a_sick_one_does_not_speak_for_one_that_still_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    sick = Actor(0, failing(RuntimeError("CUDA error")))
    reads = Actor(1, lambda *call: (restarting if sick.kills < 7 else well)(*call))
    assert answers_rightly(asking(monkeypatch, sick, reads))
    assert sick.kills >= 7


def test_what_happened_while_nobody_looked_is_not_held_against_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No question for long: a call of before has come back, and a pulse is old."""
    busy = Actor(1, well)
    asked = asking(monkeypatch, Actor(0, well), busy)
    monkeypatch.setattr(teachers, "GAP_S", 2 * SHORT_S)
    assert answers_rightly(asked)
    asked._ready.discard(1)
    asked._note(Call(busy, "prepare", ()), 1, None)
    asked._pulses[Call(busy, "pulse", ())] = 1
    time.sleep(8 * SHORT_S)
    assert answers_rightly(asked)
    assert answers_rightly(asked)
    assert busy.kills == 0


@pytest.mark.parametrize("sick", [stopped, standing])
def test_one_that_does_not_move_is_started_anew_once_for_each_life(
    monkeypatch: pytest.MonkeyPatch, sick: Behaviour
) -> None:
    actor = Actor(0, sick, sick, well)
    asked = asking(monkeypatch, actor)
    assert answers_rightly(asked)
    assert actor.kills == 2


def test_one_that_is_slow_is_let_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's many questions are before ours: it moves, and takes longer than one that stands still may."""
    actor = Actor(0, lambda *call: well(*call))
    beginning = time.monotonic()

    def slow(actor: Actor, name: str, given: Any) -> Any:
        if name == "pulse":
            actor.rows += 1
            return actor.rows
        found = well(actor, name, given)
        return found if name == "prepare" else Late(found, beginning + 12 * SHORT_S)

    class Late:
        def __init__(self, value: Any, at: float) -> None:
            self.value, self.at = value, at

    class Patient(FakeRay):
        @staticmethod
        def wait(calls: list[Call], num_returns: int = 1, timeout: float = 0.0) -> Any:
            for call in calls:
                if isinstance(call.value, Late) and time.monotonic() < call.value.at:
                    time.sleep(SHORT_S)
                    others = [each for each in calls if not isinstance(each.value, Late)]
                    return others, [each for each in calls if each not in others]
            for call in calls:
                if isinstance(call.value, Late):
                    call.value = call.value.value
            return FakeRay.wait(calls, num_returns, timeout)

    actor.lives = [slow]
    asked = asking(monkeypatch, actor)
    monkeypatch.setattr(teachers, "ray", Patient)
    assert answers_rightly(asked)
    assert actor.kills == 0


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), OSError("stale file handle"), MemoryError("none")]
)
def test_what_one_fails_at_another_process_does(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Nothing of that is the fault of the worker that asked."""
    actor = Actor(0, failing(error), failing(error), well)
    assert answers_rightly(asking(monkeypatch, actor))
    assert actor.kills == 2


def test_what_none_can_do_ends_the_run_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(monkeypatch, *(Actor(number, failing(OSError("no such directory"))) for number in range(2)))
    with pytest.raises(ModelError, match=r"objective.teacher: no teacher can answer \(OSError: no such directory\)$"):
        asked(QUESTIONS)


def test_teachers_on_different_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(actor: Actor, name: str, given: Any) -> Any:
        return "gpu" if name == "prepare" else well(actor, name, given)

    with pytest.raises(ModelError, match="different devices"):
        asking(monkeypatch, Actor(0, well), Actor(1, elsewhere))(QUESTIONS)


def test_two_threads_ask_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(monkeypatch, Actor(0, well), Actor(1, after(5, restarting)))
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(answers_rightly(asked))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def lease(monkeypatch: pytest.MonkeyPatch, *made: list[Actor]) -> tuple[TeachersLease, list[TeachersMissing]]:
    them = iter(made)
    monkeypatch.setattr(teacher_actor, "ray", FakeRay)
    monkeypatch.setattr(teacher_actor, "have_teachers", lambda *_: next(them))
    monkeypatch.setattr(teacher_actor, "why_no_room", lambda _: "nodes are full")
    told: list[TeachersMissing] = []
    monkeypatch.setattr(teacher_actor, "DEAF_S", 0.1)
    job = Job.loads(JOB.replace("teachers: 2", f"teachers: {len(made[0])}"))
    return TeachersLease("run", {}, job, told.append), told


def hold(held: TeachersLease, seconds: float = 0.5) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        held.look()
        time.sleep(0.02)


@pytest.mark.parametrize("away", [restarting, stopped])
def test_teachers_that_are_not_heard_of_are_told_once(monkeypatch: pytest.MonkeyPatch, away: Behaviour) -> None:
    """A call that ends with an error is nothing heard."""
    held, told = lease(monkeypatch, [Actor(0, well), Actor(1, away)])
    hold(held)
    (missing,) = told
    assert (missing.teachers, missing.reason) == ([1], "nodes are full")
    assert missing.waited_seconds >= 0.2


@pytest.mark.parametrize("end", [gone, never_set_up])
def test_the_controller_asks_for_those_that_are_dead_for_good(monkeypatch: pytest.MonkeyPatch, end: Behaviour) -> None:
    held, told = lease(monkeypatch, [Actor(0, end)], [Actor(0, well)])
    hold(held)
    assert not told


def test_the_controller_starts_one_anew_that_does_not_hear_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never has may still wait for room."""
    stands, waits = Actor(0, after(3, well, lambda *_: NEVER), well), Actor(1, lambda *_: NEVER)
    held, told = lease(monkeypatch, [stands, waits])
    hold(held)
    assert (stands.kills, waits.kills) == (1, 0)
    assert [each.teachers for each in told] == [[1]]


def test_what_comes_in_place_of_one_that_died_may_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Actor(0, lambda *_: NEVER)
    held, told = lease(monkeypatch, [Actor(0, after(3, well, gone))], [waits])
    hold(held)
    assert waits.kills == 0
    assert told
