"""The layout of a generation: the job's own degrees where they can be had, else the planner's choice."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import PlanError
from orchestrator.job import Job
from orchestrator.models.costs import ModelCosts
from orchestrator.planning import search
from orchestrator.planning.assume import CPU_CORE, HardwareOptions, hardware_for
from orchestrator.planning.choose import LayoutChooser, NoLayoutFits, blocks_of
from orchestrator.planning.hardware import Link
from orchestrator.planning.search import Limits, Planner
from orchestrator.planning.work import Degrees, StepSettings, Work, work_of
from strategies.layout.assignment import deal, deal_in_turn
from strategies.layout.parallel import SHARDS, ParallelLayout
from strategies.layout.schedule import SCHEDULES, PipelineSchedule, chunks_of
from tests.unit.test_plan import model

ROOT = Path(__file__).parents[2]
GIB = 2**30
quick = settings(deadline=None, print_blob=True, max_examples=100)


def chooser(
    tensor: int = 1, pipeline: int = 1, shard: str = "none", schedule: str = "1f1b", virtual_workers: int = 8,
    micro_batches: int = 4, max_workers: int = 64,
) -> LayoutChooser:  # fmt: skip
    return LayoutChooser(tensor, pipeline, shard, schedule, max_workers, StepSettings(virtual_workers, micro_batches))


def test_the_controller_plans_the_same_work_as_the_command() -> None:
    overrides = [
        "train.offload=optimizer",
        "train.micro_batch=2",
        "train.optimizer.state=bf16",
        "elastic.state_copies=1",
        "strategy.reduction=native",
    ]
    job = Job.load(ROOT / "examples/quickstart.yaml", overrides)
    costs = model()
    assert LayoutChooser.for_job(job)._planner(costs, 0).work == work_of(job, costs)


def degrees(layout: ParallelLayout | None) -> tuple[int, int, int]:
    assert layout is not None
    return layout.data, layout.tensor, layout.pipeline


# ---------------------------------------------------------------------------------------- what a job says


def test_a_job_says_what_it_wants() -> None:
    overrides = [
        "strategy={tensor: 2, pipeline: 2, shard: optimizer, schedule: zero-bubble}",
        "elastic={workers: {min: 2, max: 8}, virtual_workers: 8, state_copies: 3}",
        "train.optimizer={name: sgd, momentum: 0.5}",
    ]
    job = Job.load(ROOT / "examples/quickstart.yaml", overrides)
    chosen = LayoutChooser.for_job(job)
    assert (chosen.tensor, chosen.pipeline, chosen.shard, chosen.schedule) == (2, 2, "optimizer", "zero-bubble")
    step = chosen.step
    assert (step.virtual_workers, step.micro_batches, chosen.max_workers, step.tokens) == (8, 4, 8, 256)
    assert (step.state.optimizer, step.state_copies, step.canonical) == (4, 3, True)
    assert pickle.loads(pickle.dumps(chosen)) == chosen


def test_the_assumed_machine_is_the_one_the_plan_command_assumes() -> None:
    job = Job.load(ROOT / "examples/quickstart.yaml")
    assumed = hardware_for(job, HardwareOptions())[0]
    for link, other in ((assumed.inside, CPU_CORE.inside), (assumed.between, CPU_CORE.between)):
        assert (link.bytes_per_s, link.latency_s) == pytest.approx((other.bytes_per_s, other.latency_s))
    assert replace(assumed, inside=CPU_CORE.inside, between=CPU_CORE.between) == CPU_CORE


@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual_workers", "max_workers", "most"),
    [(1, 1, 8, 4, 4), (1, 1, 8, 64, 8), (2, 2, 4, 64, 16), (2, 2, 4, 12, 12)],
)
def test_the_most_workers_that_have_something_to_do(
    tensor: int, pipeline: int, virtual_workers: int, max_workers: int, most: int
) -> None:
    chosen = chooser(tensor, pipeline, virtual_workers=virtual_workers, max_workers=max_workers)
    assert chosen.most_workers == most


# ---------------------------------------------------------------------------------------- without a pipeline


@pytest.mark.parametrize("shard", SHARDS)
def test_without_a_pipeline_all_whole_groups_are_replicas(shard: str) -> None:
    chosen = chooser(tensor=2, shard=shard)
    assert chosen.choose(1, None, 0, None) is None
    for workers in range(2, 40):
        layout = chosen.choose(workers, None, 0, None)
        assert layout is not None
        assert degrees(layout) == (min(workers // 2, 8), 2, 1)
        assert (layout.shard, layout.spares, layout.parts) == (shard, 0, ())
        in_turn = shard in ("gradients", "parameters")
        even = deal(8, [1.0] * layout.data)
        assert layout.assignment == (deal_in_turn(8, layout.data) if in_turn else even)


def test_a_model_of_unknown_cost_stays_in_one_stage() -> None:
    assert degrees(chooser(pipeline=2).choose(4, None, 0, None)) == (4, 1, 1)


# ---------------------------------------------------------------------------------------- the job's own degrees


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_whole_pipelines_are_the_jobs_own(schedule: str, tensor: int) -> None:
    chosen = chooser(tensor, 2, "optimizer", schedule)
    for data in range(1, 9):
        layout = chosen.choose(data * 2 * tensor, model(), 0, None)
        assert layout is not None
        assert degrees(layout) == (data, tensor, 2)
        assert (layout.schedule, len(layout.parts)) == (schedule, 2 * chunks_of(schedule))
        assert layout.assignment == deal(8, [1.0] * data)


def test_parts_are_cut_by_cost_and_have_every_block() -> None:
    layout = chooser(pipeline=3).choose(3, model(layers=12, hidden=512, vocab=64_000), 0, None)
    assert layout is not None
    # The head costs more than five layers do.
    assert layout.parts == ((0, 7), (7, 13), (13, 14))
    assert blocks_of((1,)) == ((0, 3),)


def test_uneven_replicas_and_empty_micro_batches_are_allowed_at_the_jobs_own_degrees() -> None:
    chosen = chooser(pipeline=4, schedule="zero-bubble", micro_batches=1)
    layout = chosen.choose(12, model(), 0, None)
    assert layout is not None
    assert (degrees(layout), [len(held) for held in layout.assignment]) == ((3, 1, 4), [3, 3, 2])


def test_own_degrees_that_the_model_or_the_virtual_workers_rule_out_are_not_taken() -> None:
    few_layers = chooser(pipeline=4, schedule="zero-bubble").choose(8, model(layers=4), 0, None)
    assert few_layers is not None
    assert few_layers.pipeline < 4
    many_workers = chooser(pipeline=2, virtual_workers=2, max_workers=8).choose(8, model(), 0, None)
    assert many_workers is not None
    assert many_workers.data <= 2


# ---------------------------------------------------------------------------------------- the planner's choice

questions = st.tuples(
    st.sampled_from([1, 2, 4]), st.integers(2, 4), st.sampled_from(SHARDS), st.sampled_from(SCHEDULES),
    st.integers(1, 12), st.integers(1, 4), st.integers(1, 8), st.integers(1, 20), st.sampled_from([0, 1, 2, 4, 16]),
)  # fmt: skip


@quick
@given(questions)
def test_what_is_chosen_keeps_the_rules_and_none_that_does_is_predicted_faster(
    question: tuple[int, int, str, str, int, int, int, int, int],
) -> None:
    tensor, pipeline, shard, schedule, virtual_workers, micro_batches, layers, workers, memory_gib = question
    chosen = chooser(tensor, pipeline, shard, schedule, virtual_workers, micro_batches)
    costs, memory = model(layers=layers), memory_gib * GIB
    limits = Limits((tensor,), None, (shard,), (schedule,), (1, chunks_of(schedule)))
    work = Work.of(chosen.step, costs)
    planner = Planner(work, replace(chosen.hardware, memory_bytes=memory or None), limits)
    best = planner.best(workers, 1)
    try:
        layout = chosen.choose(workers, costs, memory, None)
    except NoLayoutFits:
        assert not best
        return
    if workers < tensor:
        assert layout is None
        return
    assert layout is not None
    assert layout == chosen.choose(workers, costs, memory, None)
    assert layout.num_placed <= workers
    assert (layout.tensor, layout.shard, layout.schedule, layout.spares) == (tensor, shard, schedule, 0)
    assert layout.virtual_workers == virtual_workers
    assert all(layout.assignment)
    if layout.pipeline == 1:
        assert layout.parts == ()
        kind = PipelineSchedule("none", 1)
    else:
        kind = PipelineSchedule(schedule, layout.pipeline, chunks_of(schedule))
        assert len(layout.parts) == kind.parts
        assert layout.parts[-1][1] == layers + 2
        blocks = [block for stage in range(layout.pipeline) for block in layout.blocks_of(stage) or ()]
        assert sorted(blocks) == list(layout.parts)
    plan = planner.predict(Degrees(layout.data, tensor, kind, shard), workers)
    assert planner.hardware.usable_bytes is None or plan.memory.total <= planner.hardware.usable_bytes
    own = layout.pipeline == pipeline and layout.num_placed == workers
    if best and not own:
        assert plan.time.total == best[0].time.total


def test_workers_that_fill_no_whole_pipelines_get_another_degree() -> None:
    """A network that is nearly all arithmetic: what counts is how even the shares of virtual workers are."""
    assert degrees(chooser(pipeline=2, virtual_workers=7).choose(7, model(), 0, None)) == (7, 1, 1)
    # With eight virtual workers one of seven replicas would have two; two pipelines of three stages are faster.
    assert degrees(chooser(pipeline=2, virtual_workers=8).choose(7, model(), 0, None)) == (2, 1, 3)


def test_a_rank_is_left_idle_rather_than_slow_the_others_down() -> None:
    layout = chooser(pipeline=2, virtual_workers=2, micro_batches=8).choose(5, model(layers=4), 0, None)
    assert layout is not None
    assert layout.num_placed == 4


def test_memory_decides_when_there_is_not_enough_for_fewer_stages() -> None:
    costs, chosen = model(layers=8), chooser(pipeline=2, virtual_workers=7)
    free = chosen.choose(7, costs, 0, None)
    tight = chosen.choose(7, costs, 3 * GIB, None)
    assert free is not None
    assert tight is not None
    assert free.pipeline == 1
    assert tight.pipeline > 2
    # Not even the job's own degrees are taken when they do not fit.
    own = chosen.choose(4, costs, 3 * GIB, None)
    assert own is not None
    assert own.pipeline > 2


def test_what_fits_nowhere_is_refused_with_the_numbers() -> None:
    chosen = chooser(pipeline=2, max_workers=16)
    with pytest.raises(NoLayoutFits) as caught:
        chosen.choose(2, model(), 3 * GIB, None)
    enough = caught.value.fits_from
    assert enough is not None
    assert str(caught.value).startswith(
        "no layout of 2 workers fits in memory: with tensor 1, shard none and schedule 1f1b a worker needs "
    )
    assert str(caught.value).endswith(f" are usable; {enough} workers would be enough")
    assert chosen.choose(enough, model(), 3 * GIB, None) is not None
    with pytest.raises(NoLayoutFits):
        chosen.choose(enough - 1, model(), 3 * GIB, None)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.fits_from) == (str(caught.value), enough)


def test_what_fits_on_no_number_of_workers_says_so() -> None:
    with pytest.raises(NoLayoutFits, match=r"no number up to workers\.max = 16 would be enough") as caught:
        chooser(pipeline=2, max_workers=16).choose(4, model(), GIB // 8, None)
    assert caught.value.fits_from is None


def test_empty_micro_batches_are_the_last_resort() -> None:
    """One virtual worker of two micro-batches, and too little memory for fewer than four stages."""
    chosen = chooser(pipeline=2, virtual_workers=1, micro_batches=2)
    layout = chosen.choose(5, model(), int(2.5 * GIB), None)
    assert layout is not None
    assert layout.pipeline > 2
    roomy = chosen.choose(5, model(), 0, None)
    assert roomy is not None
    assert roomy.pipeline <= 2


def test_of_equally_fast_layouts_the_one_that_moves_least_is_taken() -> None:
    """Messages cost nothing here, so that depth and width differ by less than the model can tell."""
    free = replace(CPU_CORE, inside=Link(1e18, 1e-12), between=Link(1e18, 1e-12))
    chosen = replace(chooser(pipeline=3, schedule="zero-bubble", micro_batches=64), hardware=free)
    costs = model(layers=16, vocab=2)
    chosen_from = {}
    for pipeline in (1, 2, 4):
        own = replace(chosen, pipeline=pipeline) if pipeline > 1 else chooser()
        current = own.choose(4, costs, 0, None)
        assert current is not None
        chosen_from[pipeline] = degrees(chosen.choose(4, costs, 0, current))
    assert chosen_from == {1: (4, 1, 1), 2: (2, 1, 2), 4: (1, 1, 4)}


@pytest.mark.parametrize(
    ("tensor", "costs", "reason"),
    [
        (3, model(), "tensor 3 does not divide the model's 16 attention heads"),
    ],
)
def test_a_model_that_cannot_be_split_so_is_refused(tensor: int, costs: ModelCosts, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        chooser(tensor, 2).choose(12, costs, 0, None)


def test_a_model_that_names_no_heads_may_say_itself_how_it_is_split() -> None:
    assert degrees(chooser(2, 2).choose(8, model(heads=None), 0, None)) == (2, 2, 2)


# ---------------------------------------------------------------------------------------- in the controller


def test_choosing_takes_few_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller asks at every change of membership: 0.3 to 2 ms a time up to 64 workers."""
    predictions = 0
    usual = search.predict_step

    def counted(*arguments: Any) -> Any:
        nonlocal predictions
        predictions += 1
        return usual(*arguments)

    monkeypatch.setattr(search, "predict_step", counted)
    costs = model(layers=80, hidden=8192, heads=64)
    chosen = chooser(2, 4, "parameters", "interleaved-1f1b", 64)
    current = None
    for workers in itertools.chain(range(2, 65), range(64, 1, -1)):
        predictions = 0
        current = chosen.choose(workers, costs, 2048 * GIB, current)
        assert predictions < 200, f"{predictions} predictions for {workers} workers"


def test_choosing_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from orchestrator.planning.choose import LayoutChooser\n"
        "from orchestrator.models.costs import Block, ModelCosts\n"
        "from orchestrator.planning.work import StepSettings\n"
        "costs = ModelCosts((Block('b', 9, 1, 2, 0, 4, 0),) * 6, 0, 8, 8, None, None, 4)\n"
        "assert LayoutChooser(1, 2, 'none', '1f1b', 8, StepSettings(8, 4)).choose(5, costs, 0, None)\n"
        "heavy = {'ray', 'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
