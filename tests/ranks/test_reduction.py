"""The canonical reduction and the whole step over real gloo ranks: the same bits in every placement."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch

from strategies.comm.fabric import Fabric
from strategies.comm.gloo import Gloo
from strategies.comm.groups import Groups
from strategies.gradient.spec import StepSpec
from strategies.layout.assignment import deal, even
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain
from strategies.layout.space import ALIGNMENT, FlatRanges, Space
from strategies.layout.statemap import NOTHING, Span, Transfer, plan_transfers, whole
from strategies.model.blueprint import Blueprint
from strategies.objective.batch import Batch
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.spec import OptimizerSpec
from strategies.reduction.norm import square_sum
from strategies.reduction.reducer import Reducer, RoundReducer
from strategies.reduction.tree import Subtree, cover, split
from strategies.state.reshard import StateCorrupt, execute
from strategies.state.shard import StateShard
from strategies.state.training_state import TrainingState, state_digest
from strategies.update.engine import StepEngine
from tests.batches import plain_batch
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks

CPU = torch.device("cpu")
Assignment = tuple[tuple[int, ...], ...]


def form(rank: int, world_size: int, address: Endpoint, prefix: str) -> Groups:
    groups = Groups(rank=rank, world_size=world_size, device=CPU, transport=Gloo())
    groups.form(store_address=address, prefix=prefix, host=HOST, timeout_s=PATIENCE_S)
    return groups


def partitions(virtual_workers: int, rng: random.Random) -> list[Assignment]:
    """One rank; even shares and two random dealings over 2 to 8 ranks, ranks without work among them."""
    found: list[Assignment] = []
    for ranks in range(1, 9):
        found.append(deal(virtual_workers, [1.0] * ranks))
        for _ in range(2):
            owner = [rng.randrange(ranks) for _ in range(virtual_workers)]
            found.append(tuple(tuple(i for i, o in enumerate(owner) if o == rank) for rank in range(ranks)))
    idle = deal(virtual_workers, [0.0, 1.0, 0.0, 2.0])
    return [*found, idle]


def gradient_of(virtual_worker: int, size: int) -> torch.Tensor:
    """Values of very different sizes, so that any other order of the sum shows."""
    rng = np.random.default_rng((virtual_worker, size))
    values = rng.standard_normal(size) * 10.0 ** rng.integers(-6, 7, size)
    return torch.from_numpy(values.astype(np.float32))


def partial_sum(node: Subtree, size: int) -> torch.Tensor:
    if node[1] - node[0] == 1:
        return gradient_of(node[0], size)
    left, right = split(node)
    return partial_sum(left, size) + partial_sum(right, size)


def reduce_all(
    rank: int, address: Endpoint, cases: list[tuple[Assignment, int]], native: bool
) -> list[tuple[str, int] | None]:
    """For each case the digest of the reduced gradient and the sum of squares of this rank's slice; None where not a
    rank."""
    results: list[tuple[str, int] | None] = []
    for index, (assignment, size) in enumerate(cases):
        if rank >= len(assignment):
            results.append(None)
            continue
        groups = form(rank, len(assignment), address, f"case{index}")
        layout = ParallelLayout(data=len(assignment), assignment=assignment)
        reducer = Reducer(groups, layout, size, CPU, native=native)
        gradient = torch.full((size,), 7.0)
        for _ in range(2):  # the second time with used buffers
            pieces = {node: partial_sum(node, size) for node in cover(assignment[rank], layout.root)}
            reduced = reducer.reduce(pieces)
            assert reduced is not None
            reducer.gather(reducer.own_slice(reduced) if native else reduced, gradient)
        squares = square_sum(reducer.own_slice(gradient))
        assert squares is not None
        if native:
            expected = partial_sum((0, layout.virtual_workers), size)
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)
        results.append((hashlib.sha256(gradient.numpy().tobytes()).hexdigest(), squares))
        leave(groups)
    return results


def leave(groups: Groups) -> None:
    """Nobody leaves while a neighbour still needs it."""
    ones = torch.ones(groups.world_size)
    if groups.world_size > 1:
        groups.all_to_all(torch.empty_like(ones), ones, [1] * groups.world_size, [1] * groups.world_size)
    groups.drop()


@pytest.mark.parametrize(
    ("virtual_workers", "sizes"),
    [(8, (1, 33, 4096, 70_001)), (7, (5003,)), (33, (20_000,)), (1, (9000,))],
)
def test_the_sum_has_the_same_bits_for_every_partition(virtual_workers: int, sizes: tuple[int, ...]) -> None:
    """Also for gradients smaller than a vector, smaller than the number of ranks, and no multiple of anything."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    cases = [(assignment, size) for size in sizes for assignment in partitions(virtual_workers, rng)]
    by_rank = run_ranks(8, reduce_all, cases, False)
    for index, (assignment, size) in enumerate(cases):
        expected = partial_sum((0, virtual_workers), size)
        digest = hashlib.sha256(expected.numpy().tobytes()).hexdigest()
        answers = [answers[index] for answers in by_rank[: len(assignment)]]
        assert {found for found, _ in answers} == {digest}, f"{assignment}, {size} elements"
        assert sum(squares for _, squares in answers) == square_sum(expected), f"{assignment}, {size} elements"


def test_the_backends_own_sum_is_the_same_on_all_ranks_and_within_rounding() -> None:
    cases = [(deal(8, [1.0] * ranks), size) for ranks in (1, 2, 3, 5) for size in (33, 10_001)]
    cases.append((((0, 3, 5), (), (1, 2, 4, 6, 7)), 10_001))
    by_rank = run_ranks(5, reduce_all, cases, True)
    for index, (assignment, _) in enumerate(cases):
        assert len({answers[index][0] for answers in by_rank[: len(assignment)]}) == 1


def reduce_in_rounds(rank: int, address: Endpoint, cases: list[tuple[Assignment, int]]) -> list[str | None]:
    """For each case the digest of this rank's slice of the sum; None where not a rank."""
    results: list[str | None] = []
    for index, (assignment, size) in enumerate(cases):
        if rank >= len(assignment):
            results.append(None)
            continue
        groups = form(rank, len(assignment), address, f"rounds{index}")
        layout = ParallelLayout(data=len(assignment), assignment=assignment)
        reducer = RoundReducer(groups, layout, even(size, layout.data, ALIGNMENT), CPU)
        held = assignment[rank]
        for _ in range(2):
            reducer.begin()
            for number in range(reducer.num_rounds):
                gradient = gradient_of(held[number], size) if number < len(held) else torch.full((size,), torch.nan)
                reducer.add(number, gradient)
        results.append(hashlib.sha256(reducer.total().numpy().tobytes()).hexdigest())
        leave(groups)
    return results


@pytest.mark.parametrize(("virtual_workers", "size"), [(8, 4099), (7, 33), (1, 500)])
def test_a_sum_made_in_rounds_has_the_same_bits(virtual_workers: int, size: int) -> None:
    """What a replica without a virtual worker in a round brings is not looked at."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dealings = partitions(virtual_workers, random.Random(seed))
    cases = [(assignment, size) for assignment in dealings[1::3] if len(assignment) > 1]
    by_rank = run_ranks(8, reduce_in_rounds, cases)
    expected = partial_sum((0, virtual_workers), size)
    for index, (assignment, _) in enumerate(cases):
        slices = expected.split(list(even(size, len(assignment), ALIGNMENT)))
        digests = [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in slices]
        assert [answers[index] for answers in by_rank[: len(assignment)]] == digests, assignment


# ---------------------------------------------------------------------------------------- whole steps


def llama_engine(native: bool = False) -> StepEngine:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=97, max_position_embeddings=32, attention_dropout=0.2, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip

    def blueprint() -> Blueprint:
        torch.manual_seed(0)
        return Blueprint(LlamaForCausalLM(config).train(), device=CPU)

    spec = StepSpec(
        seed=3,
        micro_batch=1,
        micro_batches=2,
        base_lr=1e-2,
        schedule=ScheduleSpec("cosine", warmup_steps=1, total_steps=3),
        clip_norm=0.5,
        native_reduction=native,
    )
    return StepEngine(TrainingState(blueprint(), OptimizerSpec()), spec, fetch)


def fetch(step: int, virtual_worker: int) -> Batch:
    rng = np.random.default_rng((step, virtual_worker))
    return plain_batch(
        rng.integers(0, 97, size=(2, 17), dtype=np.int64), np.arange(2), (virtual_worker << 50) + step, 8
    )


def train(rank: int, address: Endpoint, layouts: list[Assignment], native: bool) -> list[Any]:
    """Three steps from the start in each layout; None where not a rank."""
    results: list[Any] = []
    for index, assignment in enumerate(layouts):
        if rank >= len(assignment):
            results.append(None)
            continue
        engine = llama_engine(native)
        layout = ParallelLayout(data=len(assignment), assignment=assignment)
        fabric = Fabric(rank=rank, layout=layout, device=CPU)
        fabric.form(store_address=address, prefix=f"layout{index}", host=HOST, timeout_s=PATIENCE_S)
        nodes = [Domain("", str(other)) for other in range(layout.data)]
        try:
            engine.state.adopt_layout(layout, fabric, [engine.state.held] * layout.data, nodes, 1, 0, lambda: None)
            engine.bind(fabric, layout, index)
            records = [engine.run(step)[0][0] for step in range(3)]
        finally:
            fabric.drop()
        numbers = [(r.loss, r.grad_norm, r.lr, r.hashes, r.skipped) for r in records]
        results.append((state_digest(engine.state), numbers))
    return results


def test_three_steps_of_a_llama_with_dropout_do_not_depend_on_the_ranks() -> None:
    layouts = [deal(8, [1.0] * ranks) for ranks in (1, 2, 3, 4, 8)]
    layouts += [((0, 3, 7), (1, 2, 4, 5, 6)), ((), (0, 2, 4, 6), (1, 3, 5, 7))]
    by_rank = run_ranks(8, train, layouts, False)
    expected = by_rank[0][0]
    losses = [numbers[0] for numbers in expected[1]]
    print(f"losses {losses}, digest {expected[0]}")
    assert len(set(losses)) == 3
    for rank, results in enumerate(by_rank):
        for layout, result in zip(layouts, results, strict=True):
            if rank < len(layout):
                assert result == expected, f"rank {rank} of {layout}"


def weights_after(rank: int, address: Endpoint, shard: str) -> dict[str, torch.Tensor]:
    """After three steps of two replicas with the backend's own sum."""
    engine = llama_engine(native=True)
    layout = ParallelLayout(2, deal(8, [1.0, 1.0]), shard=shard)
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    fabric.form(store_address=address, prefix=shard, host=HOST, timeout_s=PATIENCE_S)
    nodes = [Domain("", str(other)) for other in range(2)]
    try:
        engine.state.adopt_layout(layout, fabric, [engine.state.held] * 2, nodes, 2, 0, lambda: None)
        engine.bind(fabric, layout, 0)
        for step in range(3):
            engine.run(step)
    finally:
        fabric.drop()
    return {name: tensor for name, tensor in engine.state.named() if name.startswith("model.")}


def test_with_the_backends_own_sum_a_tied_embedding_may_be_sharded() -> None:
    whole, sharded = (run_ranks(2, weights_after, shard) for shard in ("none", "optimizer"))
    for one, other in zip(whole, sharded, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_three_steps_with_the_backends_own_sum_agree_within_rounding() -> None:
    layouts = [deal(8, [1.0]), deal(8, [1.0] * 3)]
    by_rank = run_ranks(3, train, layouts, True)
    canonical = run_ranks(1, train, [layouts[0]], False)[0][0]
    assert len({by_rank[rank][1][0] for rank in range(3)}) == 1, "all ranks hold the same state"
    alone, together = by_rank[0]
    for (a, b), (_, c) in zip(
        zip(alone[1], together[1], strict=True), zip(alone[1], canonical[1], strict=True), strict=True
    ):
        assert b[0] == pytest.approx(a[0], rel=1e-4)
        assert c[0] == pytest.approx(a[0], rel=1e-4)
        assert b[1] == pytest.approx(a[1], rel=1e-3)


# ---------------------------------------------------------------------------------------- moving state

SIZE = 10_016
SPACE = Space.of([("w", (SIZE // 2, 2), 0, None)], tensor=1)


def move(rank: int, address: Endpoint, holders: tuple[int, ...], max_elements: int) -> tuple[str, int, int]:
    """The digest of what this rank has in the end, bytes received, and the most that buffers took."""
    torch.manual_seed(0 if rank in holders else 100 + rank)
    state_shard = StateShard(0, FlatRanges.of([(0, SIZE)], 512), OptimizerSpec(), CPU)
    for buffer in state_shard.kinds().values():
        buffer.write(0, torch.randn(SIZE))
    held = [whole(SIZE, 1) if other in holders else NOTHING for other in range(4)]
    plan = plan_transfers(held, [whole(SIZE, 1)] * 4, max_elements)
    groups = form(rank, 4, address, "move")
    moved = execute(plan, [state_shard], [state_shard], lambda at: dict.fromkeys(state_shard.kinds(), SPACE), groups)
    leave(groups)
    content = b"".join(buffer.values.numpy().tobytes() for buffer in state_shard.kinds().values())
    return hashlib.sha256(content).hexdigest(), moved.received_bytes, moved.buffer_bytes


@pytest.mark.parametrize("holders", [(0,), (1, 3), (0, 1, 2), (0, 1, 2, 3)])
def test_everyone_ends_up_with_the_holders_state(holders: tuple[int, ...]) -> None:
    results = run_ranks(4, move, holders, 1024)
    assert len({digest for digest, _, _ in results}) == 1
    assert [received for _, received, _ in results] == [0 if rank in holders else 4 * 3 * SIZE for rank in range(4)]
    largest = 4 * (3 * 1024 + 4)
    assert all(most <= 2 * largest for _, _, most in results), "two transfers on their way at once"


def move_with_a_flipped_bit(rank: int, address: Endpoint) -> str:
    """Rank 0's memory changes between the digest and the network."""
    state_shard = StateShard(0, FlatRanges.of([(0, SIZE)], 512), OptimizerSpec(), CPU)
    groups = form(rank, 2, address, "corrupt")
    send = groups.send

    def send_another(tensor: torch.Tensor, target: int, tag: int) -> Any:
        tensor[17] = 1.0
        return send(tensor, target, tag)

    groups.send = send_another  # type: ignore[method-assign]
    try:
        transfer = Transfer(Span(0, 32, 1056), 0, 1)
        execute([transfer], [state_shard], [state_shard], lambda at: dict.fromkeys(state_shard.kinds(), SPACE), groups)
    except StateCorrupt as error:
        assert not any(buffer.values.any() for buffer in state_shard.kinds().values())
        return str(error)
    finally:
        leave(groups)
    return ""


def test_what_arrives_changed_is_told_and_not_taken_over() -> None:
    told = run_ranks(2, move_with_a_flipped_bit)
    assert told == ["", "Span(tensor=0, start=32, stop=1056) arrived with other bytes than were sent"]
