"""The same bits over every transport."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from strategies.comm.fabric import Fabric
from strategies.comm.ordered_sum import sum_in_order
from strategies.layout.parallel import ParallelLayout
from tests.ranks.laid_out import CPU, layout_of
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks
from tests.ranks.other_transports import stage_everything, train_each_over
from tests.ranks.test_layouts import Numbers

Install = Callable[[], None]
SETTINGS = {"dropout": 0.1, "model": "own"}


@functools.cache
def alone(tensor: int) -> Numbers:
    """What the smallest group of ranks computes over gloo."""
    numbers: Numbers = run_ranks(tensor, train_each_over, int, [layout_of(tensor=tensor)], SETTINGS)[0][0]
    return numbers


def assert_same_over(install: Install, layouts: list[ParallelLayout]) -> None:
    ranks = max(layout.world_size for layout in layouts)
    for number, of_layout in enumerate(
        zip(*run_ranks(ranks, train_each_over, install, layouts, SETTINGS), strict=True)
    ):
        layout = layouts[number]
        losses, norms, digest = alone(layout.tensor)
        for rank in range(layout.world_size):
            assert of_layout[rank] == (losses, norms, digest if rank == 0 else ""), (rank, layout.describe())


def test_staged_tensors_give_the_same_bits_in_every_layout() -> None:
    layouts = [layout_of(3), layout_of(2, shard="parameters"), layout_of(2, 2, shard="gradients"), layout_of(1, 2)]
    assert_same_over(stage_everything, layouts)


def test_staged_tensors_give_the_same_bits_where_tensor_parallelism_splits_them() -> None:
    assert_same_over(stage_everything, [layout_of(tensor=2), layout_of(2, 1, 2, "optimizer")])


# ---------------------------------------------------------------------------------------- sums in the order of ranks


def sums(rank: int, address: Endpoint, install: Install, dtype: torch.dtype) -> list[torch.Tensor]:
    """What tensor-parallel ranks add up to, by way of torch's own collective; tensors of several shapes."""
    from strategies.compat import all_reduce

    install()
    layout = layout_of(tensor=4)
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    fabric.form(store_address=address, prefix="sums", host=HOST, timeout_s=PATIENCE_S)
    try:
        found = []
        for shape in ((3, 7), (64,), (1,), (0, 4)):
            summand = summand_of(rank, shape, dtype)
            found.append(all_reduce(summand, "sum", fabric.axis("tensor")) + 0)
        return found
    finally:
        fabric.drop()


def summand_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 10.0 ** (rank * 3)).to(dtype)


@pytest.mark.parametrize("install", [int, stage_everything], ids=["gloo", "staged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_parallel_ranks_add_up_in_the_order_of_ranks(install: Install, dtype: torch.dtype) -> None:
    for found in run_ranks(4, sums, install, dtype):
        for tensor in found:
            total = summand_of(0, tuple(tensor.shape), dtype).float()
            for rank in range(1, 4):
                total = total + summand_of(rank, tuple(tensor.shape), dtype).float()
            assert torch.equal(tensor, total.to(dtype))


def test_a_sum_of_one_is_itself() -> None:
    tensor = torch.arange(5.0)
    sum_in_order(tensor, 1, lambda output, input: output.copy_(input))
    assert torch.equal(tensor, torch.arange(5.0))
