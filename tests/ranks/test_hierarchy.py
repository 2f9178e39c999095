"""Ranks on several nodes: partial sums meet inside a node, the bits are those of one rank, and few bytes cross the
network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from strategies.comm.fabric import Fabric, by_node
from strategies.comm.groups import Groups
from strategies.layout.assignment import deal
from strategies.layout.parallel import ParallelLayout
from strategies.reduction.hierarchy import HierarchicalReducer
from strategies.reduction.reducer import Reducer
from tests.ranks.laid_out import CPU, layout_of
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks
from tests.ranks.test_layouts import assert_all_give, expected
from tests.selection import nightly

TWO_BY_TWO = ("a", "a", "b", "b")


def test_nodes_with_as_many_ranks_each_are_a_hierarchy() -> None:
    assert by_node(["a", "a", "b", "b"]) == ((0, 1), (2, 3))
    assert by_node(["a", "b", "b", "a"]) == ((0, 3), (1, 2))
    for names in (["a"], ["a", "a"], ["a", "b"], ["a", "a", "b"], []):
        assert by_node(names) is None


def uneven(held: Sequence[int]) -> ParallelLayout:
    return ParallelLayout(4, deal(8, held), 1, 1, "none", "1f1b", ())


def test_any_deal_over_two_nodes_gives_the_bits_of_one_rank() -> None:
    layouts = [layout_of(4), layout_of(4, shard="optimizer"), uneven([1, 1, 5, 1]), uneven([0, 1, 1, 1])]
    assert_all_give(expected(dropout=0.1, model="own"), layouts, dropout=0.1, model="own", domains=TWO_BY_TWO)


@pytest.mark.parametrize("names", ["abba", *nightly(["abab"])])
def test_ranks_of_a_node_need_not_be_neighbours(names: str) -> None:
    assert_all_give(expected(dropout=0.1, model="own"), [layout_of(4)], dropout=0.1, model="own", domains=tuple(names))


@pytest.mark.nightly
def test_stages_and_more_nodes_give_the_bits_of_one_rank() -> None:
    assert_all_give(
        expected(dropout=0.1, model="own"), [layout_of(6)], dropout=0.1, model="own", domains=tuple("aabbcc")
    )
    layouts = [layout_of(4, 2, shard="optimizer")]
    assert_all_give(expected(dropout=0.1, model="own"), layouts, dropout=0.1, model="own", domains=tuple("aaaabbbb"))


def reduced(rank: int, address: Endpoint, nodes: Sequence[str], size: int) -> dict[str, Any]:
    """A gradient [size] of every virtual worker, reduced and gathered, with and without regard to nodes: what comes
    out, and the bytes that this rank sends to other nodes and in all."""
    layout = layout_of(len(nodes), virtual_workers=8)
    fabric = Fabric(rank=rank, layout=layout, device=CPU, nodes=nodes)
    fabric.form(store_address=address, prefix="bytes", host=HOST, timeout_s=PATIENCE_S)
    assert fabric.hierarchy is not None
    peers = {
        id(fabric.data_group): list(range(len(nodes))),
        id(fabric.hierarchy.inner): list(fabric.hierarchy.nodes[fabric.hierarchy.node]),
        id(fabric.hierarchy.rail): [ranks[fabric.hierarchy.place] for ranks in fabric.hierarchy.nodes],
    }
    sent = {"far": 0, "all": 0}
    usual = Groups.all_to_all

    def counted(self: Groups, output: Any, input: torch.Tensor, output_sizes: Any, input_sizes: list[int]) -> None:
        for peer, count in zip(peers[id(self)], input_sizes, strict=True):
            if peer != rank:
                sent["all"] += count * input.element_size()
                sent["far"] += count * input.element_size() * (nodes[peer] != nodes[rank])
        usual(self, output, input, output_sizes, input_sizes)

    Groups.all_to_all = counted  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    try:
        for name, reducer in (
            ("flat", Reducer(fabric.data_group, layout, size, CPU)),
            ("by node", HierarchicalReducer(fabric.data_group, fabric.hierarchy, layout, size, CPU)),
        ):
            sent.update(far=0, all=0)
            pieces = {}
            for node in reducer.covers[rank]:
                generator = torch.Generator().manual_seed(100 * node[0] + node[1])
                pieces[node] = torch.randn(size, generator=generator)
            everything = torch.empty(size)
            own = reducer.reduce(pieces)
            reducer.gather(own, everything)
            assert torch.equal(own, reducer.own_slice(everything))
            found[name] = (everything, dict(sent))
    finally:
        fabric.drop()
    return found


@pytest.mark.parametrize("nodes", ["aabb", *nightly(["aaaabbbb"])])
@pytest.mark.parametrize("size", [10_000, 1, 0])
def test_what_crosses_the_network_is_one_partial_sum_for_each_node(nodes: str, size: int) -> None:
    by_rank = run_ranks(len(nodes), reduced, nodes, size)
    first = by_rank[0]["flat"][0]
    totals = {"flat": {"far": 0, "all": 0}, "by node": {"far": 0, "all": 0}}
    for found in by_rank:
        for name, (everything, sent) in found.items():
            assert torch.equal(everything, first)
            for kind in sent:
                totals[name][kind] += sent[kind]
    print(
        f"{nodes} of {size}: bytes sent to other nodes {totals['flat']['far']} flat, {totals['by node']['far']} by node"
    )
    if size == 10_000:
        per_node = nodes.count("a")
        # Both ways: the gradients of all, or of each node, to the owners; and the slices of all back to all.
        assert totals["flat"]["far"] == 4 * size * len(nodes)
        assert totals["by node"]["far"] == 4 * size * len(nodes) // per_node
