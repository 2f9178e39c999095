"""The rules of a job file about what replicas that train by themselves ask of the rest of the job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.job.kinds import optimizer_named
from orchestrator.job.rules import Finding, Get, Rule


def warmup_steps_of(steps: int, asked: int | None) -> int:
    """How many steps of a job are synchronous before its replicas train by themselves: half of them if nothing is
    asked."""
    return steps // 2 if asked is None else asked


def _local(get: Get) -> dict[str, Any] | None:
    update = get("strategy.update")
    return update if isinstance(update, dict) and update.get("rule") == "local" else None


def _replicas(get: Get) -> Iterator[Finding]:
    if (update := _local(get)) is None:
        return
    replicas, shares = get("strategy.update.replicas"), get("elastic.virtual_workers")
    if shares % replicas:
        below = shares // replicas * replicas
        fits = f"{below} or {below + replicas}" if below else f"{replicas}"
        yield Finding(
            ("strategy.update.replicas", "elastic.virtual_workers"),
            f"virtual_workers = {shares} are not divided by replicas = {replicas}, each of which has as many; "
            f"virtual_workers: {fits} would fit",
        )
    inner, fragments = get("strategy.update.inner_steps"), update.get("fragments", 1)
    if inner % fragments:
        reason = f"inner_steps = {inner} must be a multiple of fragments = {fragments}, which are exchanged in turn"
        yield Finding(("strategy.update.fragments", "strategy.update.inner_steps"), reason)
    elif update.get("overlap_steps", 0) > inner // fragments:
        reason = (
            f"an exchange is over before the next begins: at most inner_steps / fragments = {inner // fragments}, got "
            f"{update['overlap_steps']}"
        )
        yield Finding(("strategy.update.overlap_steps",), reason)


def _together(get: Get) -> Iterator[Finding]:
    """What else a job has."""
    if _local(get) is None:
        return
    refused = {
        "strategy.wire": (
            get("strategy.wire") != "fp32",
            "is about sums of gradients; what replicas exchange is strategy.update.wire, and the warm-up sends fp32",
        ),
        "strategy.reduction": (get("strategy.reduction") == "native", "must be canonical with rule: local"),
        "train.offload": (get("train.offload") != "none", "moves what replicas are trained with: use offload: none"),
        "train.ema": (get("train.ema") is not None, "is a mean over steps, and rule: local updates once a round"),
        "train.optimizer.state": (
            get("train.optimizer.state") != "fp32", "replicas keep what the optimizer has as fp32: use state: fp32",
        ),
        "train.optimizer.name": (
            optimizer_named(get("train.optimizer.name")).scope == "parameter",
            "keeps rows and columns, and replicas keep what has the shape of parameters: use adamw, sgd, lion or muon",
        ),
    }  # fmt: skip
    for field, (is_refused, reason) in refused.items():
        if is_refused:
            yield Finding((field, "strategy.update"), reason)
    router_loss = get("train.router_loss")
    if router_loss is not None and get("train.router_loss.over") == "step":
        reason = "over: step is about the tokens of all replicas, which compute by themselves: use virtual-worker"
        yield Finding(("train.router_loss.over", "strategy.update"), reason)


def _evaluated_between_rounds(get: Get) -> Iterator[Finding]:
    if (update := _local(get)) is None or get("evaluation") is None:
        return
    steps, every = get("train.steps"), get("evaluation.every_steps")
    if not steps or not every:
        return
    first = warmup_steps_of(steps, update.get("warmup_steps"))
    length = max(1, get("strategy.update.inner_steps") // update.get("fragments", 1))
    inside = [step for step in range(every, steps, every) if step > first and (step - first) % length]
    if inside:
        reason = (
            f"the weights after {inside[0]} steps are inside of a round: rounds of {length} steps begin after "
            f"{first} steps of warm-up. Let every_steps and warmup_steps be multiples of {length}"
        )
        yield Finding(("evaluation.every_steps", "strategy.update"), reason)


UPDATE_RULES: tuple[Rule, ...] = (_replicas, _together, _evaluated_between_rounds)
