"""Runs to which random things happen, inside and outside, give what undisturbed ones give. See `tests.chaos.play`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.chaos.play import Stage
from tests.chaos.story import ACTS, KINDS_INSIDE, LAYOUTS, draw

FEW = (20,)
"""A pipeline, short: what every run of the tests plays. (Stories with tensors take minutes each where a collective
takes milliseconds.)"""
SHORT_STEPS = 55
FACTORY = ("model={factory: 'tests.small_models:leisurely', args: {seconds: 0.005}}",)
MANY = range(40)
A_NIGHT = range(20)
"""Each layout at least once."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("chaos"))


@pytest.mark.cluster
@pytest.mark.parametrize("seed", FEW)
def test_a_chaotic_run_gives_what_an_undisturbed_one_gives(stage: Stage, seed: int) -> None:
    """With a model of a factory, which is imported in half the time."""
    verdict = stage.play(replace(draw(seed, is_loaded=False, steps=SHORT_STEPS), settings=FACTORY))
    assert not verdict.deviations, f"{verdict}\npython -m tests.chaos.play --seeds {seed} --quiet --steps {SHORT_STEPS}"


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.parametrize("seed", A_NIGHT)
def test_chaotic_runs_loaded_and_quiet(stage: Stage, seed: int) -> None:
    verdict = stage.play(draw(seed))
    assert not verdict.deviations, f"{verdict}\npython -m tests.chaos.play --seeds {seed}"


def test_the_stories_hold_everything_that_can_happen() -> None:
    stories = [draw(seed) for seed in MANY]
    assert stories == [draw(seed) for seed in MANY]
    assert {story.layout for story in stories} == {draw(seed).layout for seed in A_NIGHT} == set(LAYOUTS)
    inside = Counter(fault.split("kind=")[1].split(",")[0] for story in stories for fault in story.faults)
    outside = Counter(act.kind for story in stories for act in story.acts)
    assert set(inside) == set(KINDS_INSIDE)
    assert set(outside) == set(ACTS)
    assert 10 < sum(story.is_loaded for story in stories) < 30
    assert all(len(story.faults) + len(story.acts) >= 3 for story in stories)


def test_every_story_is_a_valid_job() -> None:
    from orchestrator import Job
    from tests.chaos.story import JOB

    for seed in MANY:
        story = draw(seed)
        job = Job.loads(JOB, overrides=story.overrides, faults=story.faults)
        calm = Job.loads(JOB, overrides=story.undisturbed)
        assert job.digest() == calm.digest()
