"""Local steps: virtual replicas train by themselves, and whoever computes them, and whoever is lost, it is the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from strategies.layout.parallel import ParallelLayout
from strategies.optim.spec import OPTIMIZERS, OptimizerSpec
from strategies.update.local import LocalRule
from strategies.update.outer import LocalSettings
from strategies.wire.codecs import codec_of
from strategies.wire.format import WireFormat
from tests.ranks.laid_out import Stretch, Trained, layout_of, train
from tests.ranks.local_ranks import run_ranks
from tests.selection import nightly

STEPS = 7
USUAL = LocalSettings(replicas=4, inner_steps=2, warmup_steps=1)
"""One synchronous step, then rounds of two; the last is a whole one."""
FRAGMENTS = replace(USUAL, inner_steps=4, fragments=2)
OVERLAP = replace(USUAL, inner_steps=3, overlap_steps=1, mix=0.5, warmup_steps=0)
STREAMING = replace(FRAGMENTS, overlap_steps=1, mix=0.5)
KINDS = {
    "diloco": USUAL,
    "int4": replace(USUAL, wire=WireFormat("int4")),
    "fragments": FRAGMENTS,
    "overlap": OVERLAP,
    "streaming": STREAMING,
    "without momentum": replace(USUAL, momentum=0.0),
}


def rule_of(settings: LocalSettings, optimizer: str = "adamw") -> LocalRule:
    return LocalRule(settings, OptimizerSpec(kind=OPTIMIZERS[optimizer]).moments)


def program(settings: LocalSettings, optimizer: str = "adamw", **more: Any) -> Any:
    return partial(train, rule=rule_of(settings, optimizer), total_steps=STEPS, optimizer=optimizer, **more)


def laid(settings: LocalSettings, data: int, pipeline: int = 1, **more: Any) -> ParallelLayout:
    return layout_of(data, pipeline, replicas=settings.replicas, **more)


@cache
def alone(name: str, model: str = "llama") -> Trained:
    settings = KINDS[name]
    seen: Trained = run_ranks(1, program(settings, model=model), [Stretch(laid(settings, 1), STEPS)])[0]
    assert len(seen.losses) == STEPS
    return seen


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("data", "pipeline"), [(2, 1), (3, 1), *nightly([(4, 1), (8, 1), (1, 2), (2, 2)])])
def test_whoever_computes_the_replicas_it_is_the_same(name: str, data: int, pipeline: int) -> None:
    settings, one = KINDS[name], alone(name)
    layout = laid(settings, data, pipeline)
    for seen in run_ranks(layout.world_size, program(settings), [Stretch(layout, STEPS)]):
        assert (seen.losses, seen.norms) == (one.losses, one.norms)
        assert seen.digest in ("", one.digest)


def test_models_that_draw_random_numbers_and_whose_head_is_the_embedding() -> None:
    """A pipeline sets its parts up anew for every replica."""
    for model, dropout in (("own", 0.2), ("tied", 0.0)):
        ways = [laid(USUAL, 1), laid(USUAL, 2), laid(USUAL, 1, 2)]
        programs = program(USUAL, model=model, dropout=dropout)
        found = [run_ranks(each.world_size, programs, [Stretch(each, STEPS)])[0] for each in ways]
        assert {each.digest for each in found} == {found[0].digest}, model


def test_replicas_move_and_outlive_the_loss_of_who_has_them() -> None:
    """Moments of replicas, and their weights, have two holders; each stretch begins without one of those before."""
    for settings in (USUAL, STREAMING):
        one = run_ranks(1, program(settings), [Stretch(laid(settings, 1), STEPS)])[0]
        stretches = [
            Stretch(laid(settings, 3), 3, (0, 1, 2)),
            Stretch(laid(settings, 2), 2, (0, 3)),  # two are lost or gone, and one that has nothing joins
            Stretch(laid(settings, 8), 2, (4, 5, 0, 1, 2, 6, 7, 8)),
        ]
        stretches[0] = replace(stretches[0], ranks=(0, 1, 3))
        seen = run_ranks(9, program(settings), stretches)
        assert seen[4].digest == one.digest
        assert seen[0].losses == one.losses


# ---------------------------------------------------------------------------------------- right values


def plain_losses(optimizer: str = "adamw", **more: Any) -> Trained:
    done: Trained = run_ranks(1, partial(train, optimizer=optimizer, **more), [Stretch(layout_of(1), STEPS)])[0]
    return done


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_one_replica_whose_weights_are_taken_as_they_are_is_plain_training(inner_steps: int) -> None:
    settings = LocalSettings(replicas=1, inner_steps=inner_steps, lr=1.0, momentum=0.0)
    one = run_ranks(1, program(settings), [Stretch(laid(settings, 1), STEPS)])[0]
    plain = plain_losses()
    assert (one.losses, one.norms) == (plain.losses, plain.norms), "to the last bit"
    two = run_ranks(2, program(settings), [Stretch(laid(settings, 2), STEPS)])[0]
    assert two.digest == one.digest


def test_one_step_of_sgd_and_the_mean_of_weights_is_synchronous_sgd() -> None:
    """Up to rounding: a mean of weights is rounded once more than a mean of gradients."""
    settings = LocalSettings(replicas=4, inner_steps=1, lr=1.0, momentum=0.0)
    run = program(settings, optimizer="sgd", clip_norm=None)
    mean = run_ranks(2, run, [Stretch(laid(settings, 2), STEPS)])[0]
    plain = plain_losses("sgd", clip_norm=None)
    assert mean.losses == pytest.approx(plain.losses, rel=2e-7)


def test_the_warm_up_is_synchronous_training() -> None:
    settings = LocalSettings(replicas=4, inner_steps=2, warmup_steps=5)
    seen = run_ranks(2, program(settings), [Stretch(laid(settings, 2), STEPS)])[0]
    plain = plain_losses()
    assert (seen.losses[:5], seen.norms[:5]) == (plain.losses[:5], plain.norms[:5])
    assert seen.losses[5] == pytest.approx(plain.losses[5]), "the first local step begins with the same weights"
    assert seen.losses[6] != plain.losses[6]
    all_of_it = replace(settings, warmup_steps=STEPS)
    assert run_ranks(1, program(all_of_it), [Stretch(laid(all_of_it, 1), STEPS)])[0].losses == plain.losses


def test_it_is_diloco() -> None:
    """Against the published algorithm, written down with torch's own SGD as the outer optimizer."""
    settings = LocalSettings(replicas=2, inner_steps=3, lr=0.7, momentum=0.9)
    ours = run_ranks(2, program(settings, optimizer="sgd", clip_norm=None), [Stretch(laid(settings, 2), 6)])[0]
    theirs = run_ranks(1, published, settings, 6)[0]
    assert ours.losses == pytest.approx(theirs, rel=1e-5)


def published(rank: int, address: Any, settings: LocalSettings, steps: int) -> list[float]:
    """Mean losses of DiLoCo (arXiv:2311.08105, algorithm 1) with SGD inside."""
    from tests.ranks.laid_out import SPEC, VIRTUAL_WORKERS, fetch, model_of

    outer_model = model_of("llama")
    outer = torch.optim.SGD(outer_model.parameters(), lr=settings.lr, momentum=settings.momentum, nesterov=True)
    share = VIRTUAL_WORKERS // settings.replicas
    losses = [0.0] * steps
    for first in range(0, steps, settings.inner_steps):
        differences = [torch.zeros_like(p) for p in outer_model.parameters()]
        for replica in range(settings.replicas):
            inner_model = model_of("llama")
            inner_model.load_state_dict(outer_model.state_dict())
            matrices = [p for p in inner_model.parameters() if p.dim() >= 2]
            others = [p for p in inner_model.parameters() if p.dim() < 2]
            decay = OptimizerSpec().weight_decay
            groups = [{"params": matrices, "weight_decay": decay}, {"params": others}]
            inner = torch.optim.SGD(groups, lr=SPEC.base_lr)
            for step in range(first, first + settings.inner_steps):
                tokens = torch.cat(
                    [torch.from_numpy(fetch(step, replica * share + each).tokens) for each in range(share)]
                )
                logits = inner_model(input_ids=tokens[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                inner.zero_grad()
                loss.backward()
                inner.step()
                losses[step] += float(loss.detach()) / settings.replicas
            for total, now, then in zip(differences, inner_model.parameters(), outer_model.parameters(), strict=True):
                total += (then - now).detach() / settings.replicas
        for parameter, total in zip(outer_model.parameters(), differences, strict=True):
            parameter.grad = total
        outer.step()
    return losses


def sent(settings: LocalSettings) -> int:
    layout = laid(settings, 2)
    return sum(run_ranks(2, bytes_of, settings, layout)[0].values())


def test_a_round_of_h_steps_sends_what_one_synchronous_step_does() -> None:
    every = {h: sent(LocalSettings(replicas=2, inner_steps=h)) for h in (1, 4)}
    assert every[4] == pytest.approx(every[1] / 4, rel=0.02)
    assert codec_of(WireFormat("int4")).ratio < 0.15
    assert sent(LocalSettings(replicas=2, inner_steps=4, wire=WireFormat("int4"))) < 0.17 * every[4]


def bytes_of(rank: int, address: Any, settings: LocalSettings, layout: ParallelLayout) -> dict[str, int]:
    """What all ranks send in four steps, of what is summed."""
    from strategies.comm.fabric import Fabric
    from strategies.layout.placement import Domain
    from tests.ranks.laid_out import CPU, SPEC, barrier, make_engine
    from tests.ranks.local_ranks import HOST, PATIENCE_S

    engine = make_engine(spec=replace(SPEC, total_steps=4), rule=rule_of(settings), model="wide")
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    told: dict[str, int] = {}
    try:
        fabric.form(store_address=address, prefix="bytes", host=HOST, timeout_s=PATIENCE_S)
        held = [engine.state.everything] * 2
        engine.state.adopt_layout(layout, fabric, held, [Domain("", "")] * 2, 1, 0, lambda: barrier(fabric))
        engine.bind(fabric, layout, 0)
        step = 0
        while step < 4:
            records, _ = engine.run(step)
            step += len(records)
            for kind in ("outer", "plain", "gradients"):
                told[kind] = told.get(kind, 0) + records[-1].wire_bytes.get(kind, 0)
    finally:
        fabric.drop()
    return told
