"""Sums that are rounded on their way have the same bits in every layout, and what is rounded off is not lost."""

from __future__ import annotations

import socket
import struct
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import pytest

from strategies.comm.fabric import Fabric
from strategies.layout.placement import Domain
from strategies.wire.format import WireFormat
from tests.ranks.laid_out import (
    CPU,
    SPEC,
    Stretch,
    Trained,
    as_numbers,
    barrier,
    layout_of,
    make_engine,
    model_of,
    train,
)  # fmt: skip
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks
from tests.ranks.test_layouts import Numbers, assert_all_give, expected

FORMATS = {
    "bf16": WireFormat("bf16"),
    "int8": WireFormat("int8"),
    "int8 with feedback": WireFormat("int8", feedback=True),
    "int4": WireFormat("int4", feedback=True),
    "top 5 %": WireFormat("top_k", fraction=0.05, feedback=True),
    "int4 of pairs": WireFormat("int4", feedback=True, across=2),
    "two columns": WireFormat("power_sgd", rank=2, feedback=True),
}


@cache
def alone(name: str, steps: int = 2, tensor: int = 1, model: str = "llama") -> Numbers:
    """What the smallest group of ranks computes."""
    program = partial(train, wire=FORMATS[name], model=model)
    seen: Trained = run_ranks(tensor, program, [Stretch(layout_of(tensor=tensor), steps)])[0]
    return as_numbers(seen)  # type: ignore[return-value]


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_gives_one_ranks_bits(name: str) -> None:
    assert alone(name)[0][0] == expected()[0][0], "the first step reads the same weights"
    assert alone(name)[2] != expected()[2], "and what it sends is rounded"
    layouts = [layout_of(2), layout_of(3), layout_of(2, shard="optimizer"), layout_of(1, 2)]
    if FORMATS[name].across == 1 and name != "two columns":
        layouts.append(layout_of(3, shard="gradients"))
    assert_all_give(alone(name), layouts, wire=FORMATS[name])


def test_tensor_parallel_groups_give_the_bits_of_one() -> None:
    layouts = [layout_of(2, 1, 2), layout_of(1, 2, 2)]
    assert_all_give(alone("int4", tensor=2, model="own"), layouts, wire=FORMATS["int4"], model="own")


@pytest.mark.parametrize("name", ["int4", "two columns"])
def test_a_head_that_is_the_embedding_is_sent_as_it_is_and_the_bits_are_the_same(name: str) -> None:
    layouts = [layout_of(2), layout_of(2, 2), layout_of(3, shard="optimizer")]
    if name == "int4":
        layouts.append(layout_of(2, shard="gradients"))
    assert_all_give(alone(name, model="tied"), layouts, wire=FORMATS[name], model="tied")


STRETCHES = [
    Stretch(layout_of(3), 2, (0, 1, 2)),
    Stretch(layout_of(2), 1, (0, 2)),  # one is lost
    Stretch(layout_of(1, 2), 1, (3, 0)),  # and another, while one that has nothing joins
    Stretch(layout_of(2, shard="optimizer"), 1, (3, 0)),
    Stretch(layout_of(3, shard="gradients"), 1, (1, 3, 0)),
    Stretch(layout_of(1, 2), 1, (3, 0)),
]


@pytest.mark.parametrize("name", ["int4", "top 5 %", "two columns"])
def test_what_was_rounded_off_moves_with_the_work_and_outlives_who_had_it(name: str) -> None:
    """There are two copies of everything; each stretch begins without one of those that had it."""
    stretches = [s for s in STRETCHES if name != "two columns" or s.layout.shard != "gradients"]
    one = alone(name, sum(stretch.steps for stretch in stretches))
    seen = run_ranks(4, partial(train, wire=FORMATS[name]), stretches)
    assert seen[3].digest == one[2]
    assert seen[0].losses == one[0]


# ---------------------------------------------------------------------------------------- bytes

TCP_INFO_BYTES_ACKED = 120
"""Where the kernel's tcp_info has what the peer has acknowledged (linux/tcp.h: tcpi_bytes_acked)."""


def acknowledged(fabric: Fabric) -> int:
    """Bytes that the sockets of this rank's groups have sent."""
    found = 0
    for groups in {id(each): each for each in (fabric.control, fabric.world, fabric.data_group)}.values():
        for connection in groups.transport._connections:  # type: ignore[attr-defined]
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            found += struct.unpack_from("Q", info, TCP_INFO_BYTES_ACKED)[0]
    return found


def sent_in_steps(rank: int, address: Endpoint, wire: WireFormat, shard: str) -> tuple[int, dict[str, int]]:
    """Of two steps after the first: bytes at this rank's sockets, and what all ranks say that they have sent."""
    layout = layout_of(2, shard=shard)
    engine = make_engine(spec=replace(SPEC, wire=wire), model="wide")
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    try:
        fabric.form(store_address=address, prefix="bytes", host=HOST, timeout_s=PATIENCE_S)
        held = [engine.state.everything] * 2
        engine.state.adopt_layout(layout, fabric, held, [Domain("", "")] * 2, 1, 0, lambda: barrier(fabric))
        engine.bind(fabric, layout, 0)
        engine.run(0)
        barrier(fabric)
        before, told = acknowledged(fabric), Counter[str]()
        for step in (1, 2):
            (record,), _ = engine.run(step)
            told.update(record.wire_bytes)
        barrier(fabric)
        return acknowledged(fabric) - before, dict(told)
    finally:
        fabric.drop()


MOST_SENT = {"bf16": 0.51, "int8": 0.27, "int4": 0.15, "top 1 %": 0.02}


@pytest.mark.parametrize("name", MOST_SENT)
def test_the_sockets_have_sent_what_is_told_and_no_more_than_promised(name: str) -> None:
    wire = WireFormat("top_k", fraction=0.01, feedback=True) if name == "top 1 %" else FORMATS[name]
    exact, coded = ([*run_ranks(2, sent_in_steps, each, "none")] for each in (WireFormat(), wire))
    for seen in (exact, coded):
        at_sockets, told = sum(sent for sent, _ in seen), seen[0][1]
        assert seen[0][1] == seen[1][1]
        rest = at_sockets - sum(told.values())
        assert 0 <= rest < 16_000, f"votes, barriers and headers: {rest} of {at_sockets}"
    gradients = exact[0][1]["gradients"]
    share = sum(coded[0][1].values()) / gradients
    print(f"{name}: {share:.4f} of fp32, {coded[0][1]}")
    assert share <= MOST_SENT[name]
    assert coded[0][1]["plain"] > 0, "vectors are sent as they are, and that is told"


@pytest.mark.parametrize("rank", [1, 4])
def test_power_sgd_sends_what_its_two_matrices_have(rank: int) -> None:
    wire = WireFormat("power_sgd", rank=rank, feedback=True)
    exact, thin = (run_ranks(2, sent_in_steps, each, "none")[0][1] for each in (WireFormat(), wire))
    shapes = [(*parameter.shape,) for parameter in model_of("wide").parameters() if parameter.dim() == 2]
    expected = sum(rank * (m + n) for m, n in shapes) / sum(m * n for m, n in shapes)
    matrices = exact["gradients"] - thin["plain"]
    assert thin["gradients"] / matrices == pytest.approx(expected, rel=0.05)
