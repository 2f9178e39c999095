"""Optimizers, schedules and the mean of weights beside what others make of the same gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import get_scheduler

from orchestrator.data.tokenizers import ByteTokenizer
from orchestrator.job import Job
from orchestrator.training import build
from strategies.layout.space import FlatRanges, Space
from strategies.layout.statemap import Span, union
from strategies.optim.adafactor import ADAFACTOR
from strategies.optim.groups import ParameterGroup
from strategies.optim.lion import LION
from strategies.optim.muon import MUON
from strategies.optim.rounding import from_fp8, to_fp8
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.spec import OptimizerSpec
from strategies.state.buffers import Fp8Buffer, Spaces
from strategies.state.chunk_loader import ChunkLoader
from strategies.state.chunks import Box
from strategies.state.kinds_of_state import KindsOfState
from strategies.state.shard import StateShard, name_of
from strategies.state.training_state import TrainingState
from strategies.update.ema import EMA, WithEma
from strategies.update.rule import UpdateRule
from tests.unit.tiny_model import CPU, make, random_gradient, settle, tiny, update

RATES = [1e-2, 3e-2, 1e-3, 5e-3]


def named(state: TrainingState) -> dict[str, torch.Tensor]:
    """Copies of the weights, by the model's own names."""
    return {name.removeprefix("model."): t.clone() for name, t in state.named() if name.startswith("model.")}


def gradients(state: TrainingState, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Random ones: as a buffer, and by name."""
    flat = random_gradient(state, seed)
    return flat, {slot.name: flat[slot.offset : slot.stop][: slot.numel].view(slot.shape) for slot in state.space.slots}


# ---------------------------------------------------------------------------------------- optimizers


def test_lion_is_the_published_program() -> None:
    """Chen et al. 2023, program 1: c = b1 m + (1 - b1) g; w -= lr (sign c + decay w); m = b2 m + (1 - b2) g."""
    state = make(spec=OptimizerSpec(kind=LION, betas=(0.9, 0.99), weight_decay=0.1))
    settle(state)
    weights = {name: value for name, value in named(state).items() if name not in ("frozen", "scale")}
    means = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step, rate in enumerate(RATES):
        flat, by_name = gradients(state, step)
        for name, weight in weights.items():
            gradient, decay = by_name[name], 0.1 if weight.dim() > 1 else 0.0
            direction = torch.sign(0.9 * means[name] + 0.1 * gradient)
            weight -= rate * (direction + decay * weight)
            means[name] = 0.99 * means[name] + 0.01 * gradient
        update(state, flat, rate)
    for name, weight in weights.items():
        torch.testing.assert_close(named(state)[name], weight, rtol=1e-5, atol=1e-6)


JOB = """
name: muon
model: {hf: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
             num_key_value_heads: 2, tie_word_embeddings: false}}
data: {source: python-stdlib, tokenizer: bytes, sequence_length: 16}
train: {steps: 4, global_batch: 2, optimizer: {name: muon, lr: 1.0e-2}}
elastic: {virtual_workers: 2, workers: {max: 2}}
"""


def test_muon_is_torchs_to_the_bit_and_adamw_for_the_rest() -> None:
    job = Job.loads(JOB)
    state = build.build_state(job, ByteTokenizer.vocab_size, CPU)
    settle(state)
    given = job.train.optimizer
    assert state.space.slots
    weights = {name: nn.Parameter(value) for name, value in named(state).items()}
    matrices = [name for name, value in weights.items() if value.dim() == 2 and ".layers." in name]
    others = [name for name in weights if name not in matrices]
    assert len(matrices) == 2 * 7
    betas, decay = tuple(given.betas), given.weight_decay
    reference: list[torch.optim.Optimizer] = [
        torch.optim.Muon([weights[name] for name in matrices], lr=1.0, weight_decay=decay, momentum=0.95,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [weights[name] for name in others if weights[name].dim() > 1], "weight_decay": decay},
             {"params": [weights[name] for name in others if weights[name].dim() < 2], "weight_decay": 0.0}],
            lr=1.0, betas=betas, eps=given.eps, fused=True,
        ),
    ]  # fmt: skip
    for step, rate in enumerate(RATES):
        flat, by_name = gradients(state, step)
        for name, weight in weights.items():
            weight.grad = by_name[name].clone()
        for optimizer in reference:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        update(state, flat, rate)
    found = named(state)
    for name in matrices:
        assert torch.equal(found[name], weights[name]), name
    for name in others:
        torch.testing.assert_close(found[name], weights[name].detach(), rtol=1e-6, atol=1e-7)


def test_adafactor_is_torchs_to_the_bit_and_keeps_rows_and_columns() -> None:
    state = make(spec=OptimizerSpec(kind=ADAFACTOR, weight_decay=0.1))
    settle(state)
    start = named(state)
    weights = {slot.name: nn.Parameter(start[slot.name]) for slot in state.space.slots}
    groups = [
        {"params": [weight for weight in weights.values() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights.values() if weight.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.Adafactor(groups, foreach=False)
    for step, rate in enumerate(RATES):
        flat, by_name = gradients(state, step)
        for name, weight in weights.items():
            weight.grad = by_name[name].clone()
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        update(state, flat, rate)
    found = dict(state.named())
    for name, weight in weights.items():
        assert torch.equal(found[f"model.{name}"], weight), name
        kept = {key.split(".")[1]: value for key, value in found.items() if key.endswith(f".{name}")}
        kept.pop(name.split(".")[0], None)
        theirs = {key: value for key, value in reference.state[weight].items() if key != "step"}
        assert kept.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(kept[key], value), (name, key)
    (shard,) = state.holders
    assert isinstance(shard, StateShard)
    # Of 7 x 13 numbers 20 are kept, each parameter's from a multiple of 16 on.
    assert shard.num_bytes < 1.7 * 4 * state.space.size


def test_moments_in_fp8_are_close_and_take_a_quarter_of_the_memory() -> None:
    space = Space.of([("w", (64, 48), 0, None), ("b", (48,), 0, None)], 1)
    flat = FlatRanges.of([(0, space.size)], space.boundary)
    spec = OptimizerSpec(betas=(0.9, 0.95), weight_decay=0.0)
    exact, small = (StateShard(0, flat, replace(spec, state=state), CPU) for state in ("fp32", "fp8"))
    matrix, vector = 64 * 48, 48
    assert exact.num_bytes - small.num_bytes == matrix * 2 * (4 - 1 - 1 / 16)
    assert small.num_bytes == 4 * 3 * vector + matrix * (4 + 2 * (1 + 1 / 16))
    generator = torch.Generator().manual_seed(3)
    # Rows differ by as much as rows of real gradients do, and what is in a row by less.
    rows = 10.0 ** -torch.randint(0, 9, (space.size // 48, 1), generator=generator)
    scale = (rows * 10.0 ** -torch.randint(0, 3, (space.size // 48, 48), generator=generator)).reshape(-1)
    for _ in range(30):
        gradient = torch.randn(space.size, generator=generator) * scale
        for shard in (exact, small):
            shard.gradient.copy_(gradient)
            shard.apply(1e-3)
    assert torch.equal(exact.weights[matrix:], small.weights[matrix:]), "vectors are as they are"
    one, other = exact.weights[:matrix], small.weights[:matrix]
    assert not torch.equal(one, other)
    # All have moved about as far, those with the smallest gradients too; and none by more than its rate each time.
    assert float((one - other).norm() / one.norm()) < 0.15
    assert float(other.abs().max()) <= 30 * 1.1e-3
    least = scale[:matrix] == scale.min()
    assert float(other[least].norm() / one[least].norm()) == pytest.approx(1.0, abs=0.5)


def blocks(values: Any, squares: bool) -> Fp8Buffer:
    space = Space.of([("w", (len(values) // 16, 16), 0, None)], 1)
    buffer = Fp8Buffer(FlatRanges.of([(0, space.size)], space.boundary), CPU, is_square=squares)
    buffer.update(0, values, 1)
    return buffer


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0.0, 1e-20, 1e-8, 1.0, 1e6]), st.data())
@settings(deadline=None, max_examples=60)
def test_what_fp8_has_stored_is_stored_again_in_any_pieces_without_a_change(
    seed: int, squares: bool, scale: float, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(64, generator=generator) * 10.0 ** -torch.randint(0, 9, (64,), generator=generator)
    values = values.square() if squares else values
    first = blocks(values, squares)
    read = first.read(0, 64).clone()
    second = blocks(torch.zeros(64), squares)
    cuts = sorted({0, 64, *data.draw(st.lists(st.integers(1, 63), max_size=5))})
    for low, high in data.draw(st.permutations(list(pairwise(cuts)))):
        second.write(low, read[low:high])
    assert torch.equal(second.read(0, 64), read)
    assert torch.equal(torch.sign(read), torch.sign(values)) or not squares or scale < 1e-8
    largest = values.view(4, 16).abs().amax(1, keepdim=True)
    # A 16th of a number's own size, or of the smallest that its block knows.
    bound = values.abs().view(4, 16) / (4 if squares else 8) + largest * (2.0**-14 if squares else 2.0**-15)
    assert bool(((read - values).abs().view(4, 16) <= bound + 1e-30).all())


def test_what_is_read_into_a_buffer_does_not_depend_on_what_was_there() -> None:
    """A checkpoint's pieces end where rows do, which need not be where blocks do."""
    space = Space.of([("w", (8, 12), 0, None)], 1)
    flat = FlatRanges.of([(0, space.size)], space.boundary)
    spec = OptimizerSpec(state="fp8")
    spaces: Spaces = {"weights": space, **{name: spec.space_of(name, space) for name in spec.moments}}
    generator = torch.Generator().manual_seed(5)
    saved, fresh, used = (StateShard(0, flat, spec, CPU, spaces=spaces) for _ in range(3))
    for shard, scale in ((saved, 1.0), (used, 1e4)):
        for buffer in shard.moments.values():
            buffer.update(0, scale * torch.rand(space.size, generator=generator), 1)
    for shard in (fresh, used):
        loader = ChunkLoader(KindsOfState(spaces), [shard], union([Span(0, 0, space.size)]), {})
        for kind in spaces:
            whole = saved.kinds()[kind].of_slot(space.slots[0])
            for row in range(8):
                loader.put(name_of(kind, "w"), Box((row, 0), (1, 12)), whole[row : row + 1])
        assert loader.missing == 0
        for kind, buffer in shard.moments.items():
            assert torch.equal(buffer.read(0, space.size), saved.moments[kind].read(0, space.size)), kind


def test_fp8_is_right_on_average() -> None:
    values = torch.tensor([1.0, 0.3, 0.011, 1e-3, -1e-5, 0.7, -0.0123, 0.0] * 2)
    total = torch.zeros(16)
    for key in range(4000):
        codes, exponents = to_fp8(values, torch.arange(16) + 1000, key, is_square=False)
        total += from_fp8(codes, exponents, is_square=False)
    torch.testing.assert_close(total / 4000, values, rtol=0.02, atol=1e-5)


def test_a_group_has_its_own_rate_and_decay() -> None:
    groups = (ParameterGroup(("head.*",), 0.1, 0.0), ParameterGroup(("*.bias",), 0.0))
    state, plain = (make(spec=OptimizerSpec(weight_decay=0.1, groups=each)) for each in (groups, ()))
    for each in (state, plain):
        settle(each)
        before = named(each)
        update(each, random_gradient(each, 1), 1e-2)
    changed, usual = ({name: value - before[name] for name, value in named(each).items()} for each in (state, plain))
    assert torch.equal(changed["hidden.weight"], usual["hidden.weight"])
    assert not changed["hidden.bias"].any()
    assert usual["hidden.bias"].any()
    # The first update of AdamW is as large as the rate.
    torch.testing.assert_close(changed["head.weight"].abs(), torch.full_like(before["head.weight"], 1e-3), rtol=1e-2,
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("shares", [2, 3, 5])
def test_no_matrix_that_is_updated_whole_is_cut(shares: int) -> None:
    """And of AdamW, which does not mind, some are."""
    cut = {}
    for name in ("muon", "adamw"):
        job = Job.loads(JOB, overrides=[f"train.optimizer.name={name}"])
        state = build.build_state(job, ByteTokenizer.vocab_size, CPU)
        settle(state)
        own = state.arrangement.own
        assert own is not None
        ends = set(accumulate(state.space.slices(own.flat, shares)))
        matrices = [part for part in OptimizerSpec(kind=MUON).parts(own.flat, state.space.slots) if part.shape]
        assert len(matrices) == 2 * 7
        cut[name] = [part for part in matrices if any(part.start < end < part.stop for end in ends)]
    assert not cut["muon"]
    assert cut["adamw"]


# ---------------------------------------------------------------------------------------- the mean of weights


class Applied(UpdateRule):
    """Updates with a random gradient."""

    name = "applied"

    def kinds(self) -> tuple[str, ...]:
        """See `UpdateRule`."""
        return ()

    def prepare(self, step: Any) -> None:
        """See `UpdateRule`."""

    def commit(self, step: Any, norm: float) -> None:
        """See `UpdateRule`."""
        update(step.state, random_gradient(step.state, step.state.updates))


def test_the_mean_of_weights_is_the_exponential_one() -> None:
    from strategies.model.blueprint import Blueprint

    rule = WithEma(Applied(), 0.8)
    state = TrainingState(Blueprint(tiny(), device=CPU), OptimizerSpec(), rule.kinds())
    settle(state)
    assert rule.kinds() == (EMA,)
    expected = None
    for _ in range(4):
        rule.commit(SimpleNamespace(state=state), 0.0)  # type: ignore[arg-type]
        own = state.arrangement.own
        assert own is not None
        weights = own.weights.clone()
        expected = weights if expected is None else 0.8 * expected + 0.2 * weights
    assert expected is not None
    (shard,) = state.arrangement.state_shards
    torch.testing.assert_close(shard.kept[EMA], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(shard.kept[EMA], weights)


# ---------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("name", "theirs", "more"),
    [
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"num_cycles": 3}, {"cycles": 3}),
        ("polynomial", {"lr_end": 1e-9, "power": 2.0}, {"power": 2.0}),
        ("inverse_sqrt", {}, {}),
        ("wsd", {"num_decay_steps": 8, "decay_type": "linear"}, {"decay_ratio": 0.2}),
        ("constant", {}, {}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_schedules_are_those_of_transformers(name: str, theirs: dict[str, Any], more: dict[str, Any]) -> None:
    ours = ScheduleSpec(name, 5, 0.0, 40, "transformers", **more)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    known = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}.get(name, name)
    scheduler = get_scheduler(
        known, optimizer, num_warmup_steps=5, num_training_steps=40, scheduler_specific_kwargs=theirs
    )
    for step in range(40):
        assert ours.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6), step
        optimizer.step()
        scheduler.step()
