"""The layout planner: cuts are optimal, what is ranked keeps the rules, and predictions behave as they must."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.job import Job
from orchestrator.models.costs import Block, ModelCosts, describe_model
from orchestrator.planning import search
from orchestrator.planning.hardware import Hardware, Link, ring_all_reduce_s, scatter_s
from orchestrator.planning.memory import predict_memory, zero_state
from orchestrator.planning.partition import bottleneck, cut
from orchestrator.planning.refusals import nothing_fits, refusals
from orchestrator.planning.search import Limits, Plan, Planner
from orchestrator.planning.stages import stages_of
from orchestrator.planning.step_time import sent_bytes
from orchestrator.planning.work import Degrees, StateBytes, Work, most_held, most_pieces, work_of
from strategies.layout.assignment import deal
from strategies.layout.parallel import SHARDS, ParallelLayout
from strategies.layout.schedule import SCHEDULES, PipelineSchedule, chunks_of, schedules
from strategies.reduction.tree import cover

ROOT = Path(__file__).parents[2]
GIB = 2**30
quick = settings(deadline=None, print_blob=True, max_examples=60)


def model(
    layers: int = 8, hidden: int = 1024, vocab: int = 32_000, heads: int | None = 16, tied: bool = False
) -> ModelCosts:
    """A GPT's numbers: 12 hidden^2 parameters a layer."""
    matrices = 12 * hidden * hidden
    layer = Block("layer", matrices + 2 * hidden, 2 * hidden, 2 * matrices, 0, 32 * hidden, 24 * hidden)
    table = vocab * hidden
    return ModelCosts(
        blocks=(
            Block("embedding", table, 0, 0, 0, 8, 0),
            *(replace(layer, name=f"layer {index}") for index in range(layers)),
            Block("head", hidden if tied else table + hidden, hidden, 2 * table, 0, 4 * vocab, 0, 8 * vocab),
        ),
        tied=table if tied else 0, hidden_size=hidden, vocab_size=vocab,
        heads=heads, key_value_heads=heads, value_bytes=4,
    )  # fmt: skip


def work(virtual_workers: int = 8, micro_batches: int = 4, of: ModelCosts | None = None, copies: int = 2) -> Work:
    return Work(virtual_workers, micro_batches, 1024, StateBytes(4, 4, 8), copies, model=of or model())


def hardware(memory_gib: float | None = None, ranks_per_node: int = 8) -> Hardware:
    memory = None if memory_gib is None else memory_gib * GIB
    return Hardware(100e12, 0.5, Link(100e9, 5e-6), Link(10e9, 20e-6), ranks_per_node, memory, held_back=0.0)


# ---------------------------------------------------------------------------------------- cutting into stages

costs_of_blocks = st.lists(st.integers(0, 50), min_size=1, max_size=9)


@quick
@given(costs_of_blocks, st.data())
def test_a_cut_is_as_good_as_the_best_of_all_cuts(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    bounds = cut(costs, parts)
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == len(costs)
    assert len(bounds) == parts
    assert all(start < stop for start, stop in bounds)
    every_cut = itertools.combinations(range(1, len(costs)), parts - 1)
    best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *inner, len(costs)))) for inner in every_cut)
    assert max(sum(costs[start:stop]) for start, stop in bounds) == best
    assert bottleneck(costs, parts) == best


def test_a_cut_evens_out_what_the_dearest_part_allows() -> None:
    assert sorted(stop - start for start, stop in cut([1] * 32, 5)) == [6, 6, 6, 7, 7]
    assert cut([1, 1, 1, 1, 4], 2) == ((0, 4), (4, 5))


@pytest.mark.parametrize(("costs", "parts"), [([], 1), ([1, 2], 3), ([1], 0)])
def test_what_cannot_be_cut_is_refused(costs: list[int], parts: int) -> None:
    with pytest.raises(ValueError, match="cannot"):
        cut(costs, parts)


def test_a_heavy_head_gets_fewer_layers() -> None:
    """Gemma's kind: the head costs as much as several layers, so its stage has fewer of them."""
    costs = model(layers=12, hidden=512, vocab=64_000)
    assert costs.blocks[-1].flops_per_token > 10 * costs.blocks[1].flops_per_token
    assert Planner(work(of=costs), hardware()).stages(1, PipelineSchedule("1f1b", 3)).layers == (6, 6, 0)


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("shard", "gigabytes"), [("none", 120), ("optimizer", 31.4), ("gradients", 16.6), ("parameters", 1.88)]
)
def test_state_memory_is_that_of_the_zero_paper(shard: str, gigabytes: float) -> None:
    """Figure 1: 7.5 billion parameters on 64 ranks, 2 + 2 + 12 bytes each."""
    state = zero_state(7.5e9, shard, 64, StateBytes(2, 2, 12))
    assert (state.weights + state.gradients + state.optimizer) / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_our_state_takes_16_bytes_a_parameter_too() -> None:
    """fp32 weights and gradients and two fp32 moments: 4 + 4 + 8, in every precision; and the gradient of an update
    beside that of the virtual worker."""
    plan = Planner(work(virtual_workers=1), hardware()).predict(Degrees(1, 1, PipelineSchedule("none", 1), "none"), 1)
    state = plan.memory.weights + plan.memory.gradients + plan.memory.optimizer
    assert state == (16 + 4) * model().parameters
    assert plan.memory.copies == 0


@quick
@given(
    st.sampled_from(SHARDS), st.sampled_from([s for p in (1, 2, 4) for s in schedules(p)]),
    st.integers(1, 16), st.sampled_from([1, 2, 4]), st.integers(1, 3),
)  # fmt: skip
def test_sharding_and_splitting_never_take_more_memory(
    shard: str, schedule: PipelineSchedule, data: int, tensor: int, copies: int
) -> None:
    planner = Planner(work(16, 8, model(layers=16), copies), hardware())

    def state(shard: str, tensor: int) -> float:
        memory = predict_memory(planner.work, planner.stages(tensor, schedule), Degrees(data, tensor, schedule, shard))
        return memory.weights + memory.gradients + memory.optimizer

    assert state(shard, tensor) <= state("none", tensor) + 1
    if tensor > 1:
        assert state(shard, tensor) < state(shard, 1)
    if data > 1:
        for less, more in itertools.pairwise(SHARDS):
            assert state(more, tensor) < state(less, tensor)


def test_schedules_keep_activations_as_their_papers_say() -> None:
    """Whole micro-batches on the fullest rank of 4 stages and 16 micro-batches."""
    layers = model(layers=16, vocab=2)
    planner = Planner(work(1, 16, layers), hardware())
    whole = 16 * 32 * 1024 * 1024
    kept = {
        (schedule.kind, schedule.chunks): predict_memory(
            planner.work, planner.stages(1, schedule), Degrees(1, 1, schedule, "none")
        ).activations / (whole / 4)
        for schedule in schedules(4)
    }  # fmt: skip
    assert kept["gpipe", 1] == pytest.approx(16, rel=0.01)
    assert kept["1f1b", 1] == pytest.approx(4, rel=0.01)
    assert kept["zero-bubble", 2] == pytest.approx(4, rel=0.01)
    # Megatron-LM: 1 + (p-1)/(p v) times that of 1F1B.
    assert kept["interleaved-1f1b", 2] == pytest.approx(4 * (1 + 3 / (4 * 2)), rel=0.02)


def test_the_heads_gradient_is_kept_for_each_micro_batch_that_waits() -> None:
    plain = model(layers=16)
    head = replace(plain.blocks[-1], kept_bytes=10**9)
    planner = Planner(work(1, 16, replace(plain, blocks=(*plain.blocks[:-1], head))), hardware())
    without = Planner(work(1, 16, plain), hardware())

    def more(kind: str) -> float:
        degrees = Degrees(1, 1, PipelineSchedule(kind, 4, chunks_of(kind)), "none")
        kept = [predict_memory(each.work, each.stages(1, degrees.schedule), degrees) for each in (planner, without)]
        return kept[0].activations / 10**9

    assert more("gpipe") > 15
    assert more("1f1b") < 2


def test_a_borrowed_embedding_is_there_twice() -> None:
    def weights(*, tied: bool) -> float:
        """Of the fuller of two stages, each with an end of the model and half of the layers."""
        planner = Planner(work(1, 16, model(layers=8, vocab=8_000, tied=tied)), hardware())
        stages = stages_of(planner.work.model, PipelineSchedule("1f1b", 2), 1, [range(5), range(5, 10)])
        last = replace(stages, ranks=(stages.ranks[1],) * 2)
        return predict_memory(planner.work, last, Degrees(1, 1, PipelineSchedule("1f1b", 2), "none")).weights

    assert weights(tied=True) == weights(tied=False)


def test_uneven_replicas_exchange_more_pieces() -> None:
    even, uneven = (
        Planner(work(64), hardware()).predict(Degrees(data, 1, PipelineSchedule("none", 1), "none"), data).memory
        for data in (8, 6)
    )
    assert uneven.buffers > 2 * even.buffers - model().blocks[-1].working_bytes_per_token


def test_a_layout_of_one_replica_pays_for_copies_and_a_replicated_one_does_not() -> None:
    planner = Planner(work(), hardware())
    alone = planner.predict(Degrees(1, 1, PipelineSchedule("1f1b", 4), "none"), 4)
    twice = planner.predict(Degrees(2, 1, PipelineSchedule("1f1b", 4), "none"), 8)
    sharded = planner.predict(Degrees(4, 1, PipelineSchedule("none", 1), "optimizer"), 4)
    assert alone.memory.copies == pytest.approx(alone.memory.weights + alone.memory.optimizer)
    assert alone.time.copies > 0
    assert (twice.memory.copies, twice.time.copies) == (0, 0)
    assert sharded.memory.copies == pytest.approx(1.5 * sharded.memory.optimizer), "weights and two moments"


# ---------------------------------------------------------------------------------------- time


def test_collectives_cost_what_the_ring_moves() -> None:
    link = Link(1e9, 0.0)
    assert ring_all_reduce_s(8e9, 4, link) == pytest.approx(2 * 3 / 4 * 8)
    assert scatter_s(8e9, 4, Link(1e9, 1.0)) == pytest.approx(6 + 3)
    assert ring_all_reduce_s(8e9, 1, link) == 0


def test_bubbles_are_those_of_the_papers() -> None:
    """Four equal stages: GPipe and 1F1B wait 3 (F + B), interleaving over the chunks, ZB-V only for attention."""
    even = model(layers=16, vocab=2)
    planner = Planner(work(1, 16, even), hardware())

    def share(schedule: PipelineSchedule) -> float:
        plan = planner.predict(Degrees(1, 1, schedule, "none"), 4)
        return plan.time.bubble / plan.time.compute

    assert share(PipelineSchedule("1f1b", 4)) == share(PipelineSchedule("gpipe", 4)) == pytest.approx(3 / 16, rel=1e-3)
    assert share(PipelineSchedule("interleaved-1f1b", 4, 2)) == pytest.approx(3 / 32, rel=1e-3)
    assert share(PipelineSchedule("zero-bubble", 4, 2)) == 0


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_is_padded_until_it_can_be_followed_and_no_further(kind: str) -> None:
    for stages, wanted in itertools.product(range(2, 9), range(1, 40)):
        schedule = PipelineSchedule(kind, stages, chunks_of(kind))
        padded = schedule.padded(wanted)
        assert not schedule.refuses(padded)
        assert all(schedule.refuses(count) for count in range(wanted, padded))


@quick
@given(st.integers(1, 64), st.integers(1, 12))
def test_more_work_or_a_slower_machine_never_makes_a_step_faster(virtual_workers: int, workers: int) -> None:
    def fastest(of: Work, on: Hardware) -> float:
        return Planner(of, on).best(workers, 1)[0].time.total

    base = fastest(work(virtual_workers), hardware())
    assert fastest(work(virtual_workers, micro_batches=8), hardware()) > base
    assert fastest(work(virtual_workers), replace(hardware(), efficiency=0.25)) > base
    assert fastest(work(virtual_workers), replace(hardware(), inside=Link(1e9, 5e-6), between=Link(1e9, 20e-6))) >= base
    more = Planner(work(virtual_workers), hardware()).best(workers + 1, 1)[0]
    assert more.time.total <= base, "a rank may be left idle"


@quick
@given(st.integers(1, 200), st.integers(1, 40))
def test_a_replica_never_sends_more_partial_sums_than_predicted(virtual_workers: int, data: int) -> None:
    data = min(data, virtual_workers)
    dealt = deal(virtual_workers, [1.0] * data)
    assert max(len(held) for held in dealt) == most_held(virtual_workers, data)
    assert max(len(cover(held, (0, virtual_workers))) for held in dealt) <= most_pieces(virtual_workers, data)


# ---------------------------------------------------------------------------------------- the search

jobs = st.tuples(
    st.integers(1, 24), st.integers(1, 4), st.integers(1, 8), st.integers(1, 16),
    st.sampled_from([None, 0.5, 1.0, 2.0, 4.0]),
)  # fmt: skip


def breaks_a_rule(planner: Planner, plan: Plan, workers: int) -> str | None:
    """The rules of issue 3, looked at from the finished layout."""
    job, degrees = planner.work, plan.degrees
    assignment = plan.assignment(job.virtual_workers)
    replicas = [len(held) * job.micro_batches for held in assignment]
    if degrees.data * degrees.tensor * degrees.pipeline != degrees.ranks or degrees.ranks + plan.idle != workers:
        return "does not multiply out"
    if plan.idle < 0 or degrees.data > job.virtual_workers or min(replicas) < 1:
        return "more ranks than there are, or a replica without work"
    if degrees.pipeline > job.model.layers or min(replicas) < degrees.pipeline:
        return "too many stages"
    if sum(plan.layers) != job.model.layers or len(plan.layers) != degrees.schedule.parts:
        return "layers are lost"
    if job.model.heads is None or job.model.heads % degrees.tensor or degrees.tensor > planner.hardware.ranks_per_node:
        return "tensor degree"
    limit = planner.hardware.usable_bytes
    if limit is not None and plan.memory.total > limit:
        return "memory"
    if any(part < 0 for part in vars(plan.time).values()) or not math.isfinite(plan.time.total):
        return "time"
    return None


@quick
@given(jobs)
def test_nothing_that_breaks_a_rule_is_ranked_and_the_order_is_by_time(
    job: tuple[int, int, int, int, float | None],
) -> None:
    virtual_workers, micro_batches, layers, workers, memory_gib = job
    limits = Limits(tensor=(1, 2, 3))
    planner = Planner(work(virtual_workers, micro_batches, model(layers=layers)), hardware(memory_gib, 2), limits)
    plans = planner.best(workers, keep=None)
    assert [breaks_a_rule(planner, plan, workers) for plan in plans] == [None] * len(plans)
    assert [plan.time.total for plan in plans] == sorted(plan.time.total for plan in plans)
    assert planner.best(workers, keep=3) == plans[:3]
    assert Planner(planner.work, planner.hardware, limits).best(workers, keep=None) == plans
    for plan in plans[:3]:
        d = plan.degrees
        per_rank = [held for held in plan.assignment(virtual_workers) for _ in range(d.pipeline * d.tensor)]
        if d.pipeline * d.tensor == 1:
            ParallelLayout(d.data, tuple(per_rank), d.tensor, d.pipeline, d.shard)


@quick
@given(jobs)
def test_the_best_is_the_best_of_all_layouts_there_are(job: tuple[int, int, int, int, float | None]) -> None:
    virtual_workers, micro_batches, layers, workers, memory_gib = job
    planner = Planner(work(virtual_workers, micro_batches, model(layers=layers)), hardware(memory_gib, 4))
    everything = []
    for pipeline in range(1, workers + 1):
        for schedule in schedules(pipeline):
            for data, shard in itertools.product(range(1, workers // pipeline + 1), SHARDS):
                if schedule.parts > layers or data > virtual_workers:
                    continue
                replicas = {len(held) * micro_batches for held in deal(virtual_workers, [1.0] * data)}
                if any(schedule.refuses(count) for count in replicas):
                    continue
                plan = planner.predict(Degrees(data, 1, schedule, shard), workers)
                if memory_gib is None or plan.memory.total <= memory_gib * GIB:
                    everything.append(plan.time.total)
    found = planner.best(workers, 1)
    assert bool(found) == bool(everything)
    if found:
        assert found[0].time.total == pytest.approx(min(everything), rel=1e-12)


def test_a_rank_is_left_idle_when_that_is_faster() -> None:
    plan = Planner(work(4, 1), hardware(), Limits(pipeline=(1,), shards=("none",))).best(5, 1)[0]
    assert (plan.degrees.data, plan.idle) == (4, 1)


def test_from_a_layout_equally_fast_ones_are_chosen_by_what_they_move() -> None:
    """Messages cost next to nothing here, so that shards differ by less than the model can tell."""
    fast = replace(hardware(), inside=Link(1e15, 1e-9))
    planner = Planner(work(), fast, Limits(pipeline=(1,)))
    for shard in SHARDS:
        current = Degrees(4, 1, PipelineSchedule("none", 1), shard)
        best = planner.best(4, 1, current)[0]
        # Sharding gradients besides the optimizer state does not change where any state is.
        alike = {"optimizer", "gradients"}
        assert best.degrees.shard in (alike if shard in alike else {shard})
        assert (best.degrees.data, best.moved_bytes) == (4, 0)
    grown = planner.best(8, 4, Degrees(4, 1, PipelineSchedule("none", 1), "optimizer"))
    moved = [plan.moved_bytes for plan in grown]
    assert moved == sorted(moved)
    assert moved[0] > 0


def test_4096_workers_are_planned_with_few_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the more than 100,000 layouts there are; 3,500 predictions take 0.3 s of one core, at most. Also when hardly
    anything or nothing at all fits."""
    predictions = 0
    for name in ("predict_memory", "predict_step"):
        usual = getattr(search, name)

        def counted(*arguments: Any, usual: Callable[..., Any] = usual) -> Any:
            nonlocal predictions
            predictions += 1
            return usual(*arguments)

        monkeypatch.setattr(search, name, counted)
    big = model(layers=80, hidden=8192, heads=64)
    for memory_gib in (None, 80.0, 40.0, 1.0):
        predictions = 0
        plans = Planner(work(4096, 4, big), hardware(memory_gib), Limits(tensor=(8,))).best(4096)
        assert predictions < 5_000, f"{predictions} predictions with {memory_gib} GiB"
        assert bool(plans) == (memory_gib != 1.0)


# ---------------------------------------------------------------------------------------- why others are out


def reasons(planner: Planner, workers: int) -> str:
    return "\n".join(f"{refusal.what}: {refusal.reason}" for refusal in refusals(planner, workers))


@pytest.mark.parametrize(
    ("limits", "job", "workers", "expected"),
    [
        (Limits(tensor=(3,)), work(), 6, "tensor 3 does not divide the model's 16 attention heads; what would: 1, 2"),
        (Limits(tensor=(16,)), work(), 16, "does not fit on a node of 8 ranks"),
        (Limits(tensor=(2,)), work(of=model(heads=None)), 4, "names its attention heads"),
        (Limits(tensor=(8,)), work(), 4, "needs at least 8 workers, there are 4"),
        (Limits(), work(), 32, "pipeline above 8: more stages than the model's 8 layers"),
        (Limits(pipeline=(9,)), work(), 32, "pipeline 9: more stages than the model's 8 layers"),
        (Limits(), work(), 32, "data above 8: more replicas than the 8 virtual workers of a step"),
        (Limits(), work(2, 1), 8, "1f1b, pipeline 3..8: pipeline 3: a replica has 2 micro-batches, fewer than the 3"),
        (Limits(), work(8, 1), 16, "pipeline 3..4: from data 3 on: a replica then has fewer micro-batches than stages"),
        (Limits(), work(1, 10), 8, "a replica's 10 micro-batches do not divide into the 3 rounds of 3 stages"),
    ],
)  # fmt: skip
def test_what_is_out_is_told_in_numbers_with_what_would_fit(
    limits: Limits, job: Work, workers: int, expected: str
) -> None:
    assert expected in reasons(Planner(job, hardware(), limits), workers)


def test_a_job_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    planner = Planner(work(), hardware(memory_gib=0.25))
    assert planner.best(2) == []
    text = str(nothing_fits(planner, 2))
    assert text.startswith("the job fits no layout on 2 workers:\n")
    assert "GiB a rank at the least" in text
    assert "256.0 MiB are usable" in text


def test_the_planner_itself_needs_neither_torch_nor_ray() -> None:
    """The controller's process asks it too."""
    code = (
        "import sys, orchestrator.planning.search, orchestrator.planning.refusals\n"
        "heavy = {'ray', 'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "least", "most"),
    [
        ("strategy.wire=int8", 0.25, 0.26),
        ("strategy.wire={power_sgd: 4}", 0.05, 0.07),
        ("strategy.update={rule: local, replicas: 4, inner_steps: 10, warmup_steps: 0}", 0.1, 0.1),
    ],
)
def test_what_is_compressed_or_sent_less_often_takes_less(override: str, least: float, most: float) -> None:
    """On a thin link, of one copy of everything."""
    texts = ("strategy.wire=fp32", override)
    alone = ["elastic.state_copies=1"]
    usual, other = (Job.load(ROOT / "examples/quickstart.yaml", overrides=[each, *alone]) for each in texts)
    thin = replace(hardware(), inside=Link(1e6, 0.0), between=Link(1e6, 0.0))
    seconds, sent = [], []
    for job in (usual, other):
        work_ = work_of(job, describe_model(job))
        degrees = Degrees(4, 1, PipelineSchedule("none", 1), "none")
        plan = Planner(work_, thin, Limits(tensor=(1,), pipeline=(1,), shards=("none",))).predict(degrees, 4)
        seconds.append(plan.time.data)
        sent.append(sent_bytes(work_, plan.degrees))
    assert least <= seconds[1] / seconds[0] <= most
    assert seconds[1] / seconds[0] == pytest.approx(sent[1] / sent[0], rel=0.01)
