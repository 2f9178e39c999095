"""One GPU by itself: the same bits each time, those of exact arithmetic where it is exact, and how fast a step is."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from examples.tiny_gpt import build
from strategies.comm.fabric import Fabric
from strategies.gradient.compute import LocalGradients
from strategies.gradient.spec import StepSpec
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain
from strategies.layout.space import ALIGNMENT, FlatRanges
from strategies.layout.statemap import whole
from strategies.model.blueprint import Blueprint
from strategies.objective.batch import Batch
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.spec import OptimizerSpec
from strategies.reduction.norm import square_sum
from strategies.reduction.tree import fold
from strategies.state.chunks import Box
from strategies.state.digests import digest_of, sums_of
from strategies.state.shard import StateShard
from strategies.state.snapshot import Snapshot
from strategies.state.training_state import TrainingState
from strategies.trial.probe import probe_model
from strategies.update.engine import StepEngine
from tests.batches import plain_batch
from tests.gpu.figures import Figures
from tests.ranks.laid_out import SPEC, fetch, make_engine
from tests.small_models import FAMILIES


@pytest.mark.parametrize("family", ["own", *FAMILIES])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "compiled"])
def test_every_family_computes_the_same_each_time(
    device: torch.device, figures: Figures, family: str, kind: str
) -> None:
    """Three times in one process, and with another state of everything around it."""
    if family != "own":
        pytest.importorskip("transformers")
    spec = replace(SPEC, precision="bf16" if kind == "bf16" else "fp32", compile=kind == "compiled")
    digests = []
    for _ in range(2):
        engine = make_engine(0.1, spec=spec, model=family, device=device)
        digests.append(probe_model(LocalGradients(engine.state.whole_part(), spec, fetch)))
        torch.rand(1000, device=device).sum().item()
    assert digests[0] == digests[1]
    figures.note(f"probe {family} {kind}", digests[0])


def test_shards_of_an_update_give_the_bits_of_the_whole(device: torch.device) -> None:
    """Fused AdamW, cut at any place."""
    size = 100_003
    generator = torch.Generator().manual_seed(1)
    weights, gradient = (torch.randn(size, generator=generator) for _ in range(2))

    def after(bounds: list[int]) -> torch.Tensor:
        found = []
        for start, stop in pairwise(bounds):
            flat = FlatRanges.of([(start, stop)], size // 2)
            shard = StateShard(0, flat, OptimizerSpec(), device)
            places = [(first, slice(at, at + length)) for first, at, length in flat.locate(start, stop)]
            for first, place in places:
                shard.weights[place] = weights[first : first + place.stop - place.start].to(device)
            for number in range(3):
                for first, place in places:
                    shard.gradient[place] = gradient[first : first + place.stop - place.start].to(device) * (number + 1)
                shard.apply(1e-3)
            found += [shard.weights[place].cpu() for _, place in places]
        return torch.cat(found)

    expected = after([0, size])
    for bounds in ([0, 1, size], [0, 64, 1000, 50_001, size], [0, 33_333, 66_667, size]):
        assert torch.equal(after(bounds), expected)


def test_the_norm_is_the_integer_that_a_cpu_finds(device: torch.device, figures: Figures) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(30_000_000, generator=generator) * 1e-3
    there = values.to(device)
    assert square_sum(there) == square_sum(values)
    assert square_sum(there[:7], there[7:4097], there[4097:]) == square_sum(values)
    assert square_sum(torch.full((5,), float("nan"), device=device)) is None
    began = time.perf_counter()
    square_sum(there)
    figures.note("norm of 30M elements, seconds", round(time.perf_counter() - began, 5))


def test_digests_of_what_is_sent_are_those_of_a_cpu(device: torch.device, figures: Figures) -> None:
    values = torch.randn(30_000_000, generator=torch.Generator().manual_seed(5))
    there = values.to(device)
    assert torch.equal(sums_of(there).cpu().view(torch.int32), sums_of(values).view(torch.int32))
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    digest_of(there).cpu()
    figures.note("digest of 120 MB that are sent, seconds", round(time.perf_counter() - began, 5))


@pytest.mark.parametrize("shape", [(8, 24), (64, 96), (768, 3072)])
def test_where_parameters_begin_makes_no_difference(device: torch.device, shape: tuple[int, int]) -> None:
    """Those of a part of a model begin wherever that part has them, on multiples of ALIGNMENT elements."""
    generator = torch.Generator().manual_seed(6)
    weights, inputs = torch.randn(shape, generator=generator), torch.randn(50, shape[1], generator=generator)
    found = []
    for offset in range(0, 8 * ALIGNMENT, ALIGNMENT):
        memory = torch.zeros(offset + weights.numel(), device=device)
        parameter = torch.nn.Parameter(memory[offset:].view(shape).copy_(weights))
        gradient = torch.zeros(offset + weights.numel(), device=device)
        parameter.grad = gradient[offset:].view(shape)
        (inputs.to(device) @ parameter.T).square().sum().backward()
        found.append(parameter.grad.cpu())
    assert all(torch.equal(each, found[0]) for each in found), "ALIGNMENT has to be larger on this device"


def test_sums_along_the_tree_are_those_of_a_cpu(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(10_001, generator=generator) for _ in range(11)]

    def total(where: torch.device) -> torch.Tensor:
        pieces = {(index, index + 1): leaf.to(where) for index, leaf in enumerate(leaves)}
        return fold(pieces, (0, len(leaves)), torch.Tensor.add_).cpu()

    assert torch.equal(total(device), total(torch.device("cpu")))


def gpt(device: torch.device, large: bool, precision: str) -> tuple[StepEngine, int]:
    """An engine of one rank, with a GPT of 124M parameters where it is `large`, and the tokens of its step."""
    hidden, layers, length, vocabulary = (768, 12, 1024, 50_304) if large else (32, 2, 16, 64)
    per_worker = 4

    def read(step: int, virtual_worker: int) -> Batch:
        tokens = np.random.default_rng((step, virtual_worker)).integers(0, vocabulary, (per_worker, length + 1))
        return plain_batch(tokens.astype(np.int64), np.arange(per_worker), step, 2)

    def blueprint() -> Blueprint:
        torch.manual_seed(4)
        made = build(vocab_size=vocabulary, hidden_size=hidden, layers=layers, heads=layers, dropout=0.0)
        return Blueprint(made, device=device)

    spec = StepSpec(
        seed=1, micro_batch=2, micro_batches=2, base_lr=1e-4, schedule=ScheduleSpec("constant"), precision=precision
    )  # fmt: skip
    state = TrainingState(blueprint(), OptimizerSpec())
    engine = StepEngine(state, spec, read)
    layout = ParallelLayout(1, ((0, 1),))
    fabric = Fabric(rank=0, layout=layout, device=device)
    everything = whole(state.space.size, 1)
    state.adopt_layout(layout, fabric, [everything], [Domain("", "a")], 1, 0, lambda: None)
    engine.bind(fabric, layout, 0)
    return engine, 2 * per_worker * length


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_how_long_a_step_takes(device: torch.device, figures: Figures, precision: str) -> None:
    """Where its time goes, and the rate of floating-point operations; also of a snapshot."""
    is_gpu = device.type == "cuda"
    engine, tokens = gpt(device, is_gpu, precision)
    records = [engine.run(step)[0][0] for step in range(12 if is_gpu else 3)]
    assert all(record.loss > 0 for record in records)
    seconds = float(np.median([record.seconds for record in records[2:]]))
    phases = {name: round(value, 5) for name, value in records[-1].phase_seconds.items()}
    figures.note(f"step of a GPT in {precision}, seconds", round(seconds, 4))
    figures.note(f"step of a GPT in {precision}, phases", phases)
    figures.note(
        f"step of a GPT in {precision}, TFLOP/s", round(6 * engine.state.space.size * tokens / seconds / 1e12, 2)
    )
    snapshot = Snapshot(engine.state.space, device)
    for number, name in enumerate(("first", "next"), len(records)):
        expected = {each: values.detach().cpu().clone() for each, values in engine.state.named()}
        began = time.perf_counter()
        snapshot.take(engine.state, whole(engine.state.space.size, 1), buffers=True)
        held_up_s = time.perf_counter() - began
        figures.note(f"{name} snapshot of its state in {precision} holds up, seconds", round(held_up_s, 4))
        engine.run(number)
        for copied in snapshot.contents():
            whole_of = expected[copied.name]
            wanted = copied.box.view_in(Box((0,) * whole_of.dim(), tuple(whole_of.shape)), whole_of)
            assert torch.equal(copied.values.view(wanted.shape), wanted), f"{copied.name} is of a later step"
