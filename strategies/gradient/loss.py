"""The loss of a micro-batch, from the hidden states that its model's head is given.

Logits of a whole micro-batch in fp32 take more memory than anything else in a small model: 2 GiB for 4,096 tokens of a
vocabulary of 128,000. So they are made for some positions at a time, and of each chunk at once the gradients, as in
Liger (Hsu et al. 2024, arXiv:2410.10989): what is kept for the backward pass has the size of hidden states and head.
Every logit is computed once, as without chunks. What fits into one chunk, and goes back as soon as it is computed,
autograd does as well, to the same bits and with less to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from strategies.compat import leave_uncompiled
from strategies.model.head import Head
from strategies.objective.objective import Objective, TokenObjective
from strategies.objective.rows import Rows


def loss_of(
    objective: Objective, value: torch.Tensor, head: Head | None, rows: Rows, weight: float | torch.Tensor, chunk: int,
    *, waits: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The sum of losses of `rows`, divided by `weight`: from hidden states [batch, length, width] and their head, or
    without one from logits. `chunk` is how many positions are looked at at a time (0: all). It `waits` for its backward
    pass if others are computed forward before."""
    if head is None:
        whole: torch.Tensor = objective.loss(value, rows) / weight
        return whole
    if not isinstance(objective, TokenObjective) or not (objective.by_token and chunk and torch.is_grad_enabled()):
        at_once: torch.Tensor = objective.loss(head(value), rows) / weight
        return at_once
    return _in_chunks(objective, value, head, objective.labels(rows), weight, chunk, waits)


@leave_uncompiled
def _in_chunks(
    objective: TokenObjective, hidden: torch.Tensor, head: Head, labels: torch.Tensor, weight: float | torch.Tensor,
    chunk: int, waits: bool,
) -> torch.Tensor:  # fmt: skip
    flat = labels.flatten()

    def compute(hidden: torch.Tensor, start: int) -> torch.Tensor:
        logits = head(hidden[None])
        return objective.token_loss(logits.flatten(0, 1), flat[start : start + len(hidden)]) / weight

    if len(flat) <= chunk and not waits:
        return compute(hidden.flatten(0, 1), 0)
    found: torch.Tensor = _Chunked.apply(compute, chunk, hidden.flatten(0, 1), *head.parameters)  # type: ignore[no-untyped-call]
    return found


class _Chunked(torch.autograd.Function):
    """`compute` gives the loss of hidden states [positions, width] from a position on. The gradients are made in the
    forward pass; a backward pass multiplies them with that of the loss, which is the same in each of its halves, where
    it is cut in two (first for what comes in, then for the parameters)."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[torch.Tensor, int], torch.Tensor], chunk: int, hidden: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        wanted = [hidden.requires_grad, *(parameter.requires_grad for parameter in parameters)]
        is_whole = len(hidden) <= chunk
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad and not is_whole else None
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        total: torch.Tensor | None = None
        for start in range(0, len(hidden), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(hidden.requires_grad)
            with torch.enable_grad():
                loss = compute(part, start)
            asked = [each for each, is_wanted in zip((part, *parameters), wanted, strict=True) if is_wanted]
            found = list(torch.autograd.grad(loss, asked, allow_unused=True))
            if of_hidden is not None:
                of_hidden[start : start + chunk] = found.pop(0)
            elif hidden.requires_grad:
                of_hidden = found.pop(0)
            _add(sums, found)
            total = loss.detach() if total is None else total.add_(loss.detach())
        assert total is not None
        # Of less than fp32 only the sum is rounded, as if it were of one product.
        rounded = [
            None if each is None else each.to(parameter.dtype) for each, parameter in zip(sums, parameters, strict=True)
        ]
        ctx.gradients, ctx.is_multiplied = (of_hidden, *rounded), False
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        if not ctx.is_multiplied:
            # In place, as the head's may be the largest of all.
            for each in ctx.gradients:
                if each is not None:
                    each.mul_(gradient)
            ctx.is_multiplied = True
        return None, None, *ctx.gradients


def _add(sums: list[torch.Tensor | None], found: Sequence[torch.Tensor | None]) -> None:
    for number, gradient in enumerate(found):
        if gradient is None:
            continue
        before = sums[number]
        sums[number] = gradient.float() if before is None else before.add_(gradient)
