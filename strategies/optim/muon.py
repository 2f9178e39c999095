"""Muon (Jordan et al. 2024; Liu et al. 2025, "Muon is Scalable for LLM Training"): the matrices of layers are updated
by momentum that is made orthogonal, everything else by AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strategies.optim.optimizer import Optimizer, Settings

if TYPE_CHECKING:
    import torch


class Muon(Optimizer):
    """Of torch, with AdamW beside it for what is no matrix of a layer (embedding, head, vectors), at the same rate: so
    the update of a matrix is scaled to be of AdamW's size (`match_rms_adamw`). Its momentum is kept where AdamW keeps
    its first one, and of matrices there is no second."""

    name = "muon"
    scope = "matrix"
    counts_updates = True
    squares = frozenset({"exp_avg_sq"})

    def moments(self, settings: Settings) -> tuple[str, ...]:
        """See `Optimizer`."""
        return ("exp_avg", "exp_avg_sq")

    def shape_of(self, moment: str, shape: tuple[int, ...], *, is_whole: bool) -> tuple[int, ...] | None:
        """See `Optimizer`."""
        return None if is_whole and moment == "exp_avg_sq" else shape

    def build(self, groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
        """See `Optimizer`; groups with `is_whole` have matrices, one or a stack of them for each parameter."""
        import torch

        whole = [group for group in groups if group.get("is_whole")]
        others = [group for group in groups if not group.get("is_whole")]

        class Both(torch.optim.Optimizer):
            """Two optimizers as one: `param_groups` are theirs, and what `state` has is given to them."""

            def __init__(self) -> None:
                super().__init__([*whole, *others], {"lr": settings.lr, "weight_decay": 0.0})
                self._adamw = None
                if others:
                    # Of the same groups, so that it has the rates that are set here.
                    self._adamw = torch.optim.AdamW(
                        others, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
                    )

            @torch.no_grad()
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                """One update."""
                for group in whole:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            _update(parameter, self.state[parameter]["exp_avg"], group, settings)
                if self._adamw is not None:
                    for group in self._adamw.param_groups:
                        for parameter in group["params"]:
                            self._adamw.state[parameter] = self.state[parameter]
                    self._adamw.step()

        return Both()


def _update(parameter: Any, momentum: torch.Tensor, group: dict[str, Any], settings: Settings) -> None:
    """Each matrix of a parameter by torch's Muon, with its `momentum`."""
    import torch

    matrices = parameter.detach().reshape(-1, *parameter.shape[-2:])
    gradients = parameter.grad.reshape(matrices.shape)
    means = momentum.view(matrices.shape)
    for number in range(len(matrices)):
        one = torch.nn.Parameter(matrices[number], requires_grad=False)
        one.grad = gradients[number]
        optimizer = torch.optim.Muon(
            [one], lr=group["lr"], weight_decay=group["weight_decay"], momentum=settings.momentum or MOMENTUM,
            nesterov=True, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        optimizer.state[one]["momentum_buffer"] = means[number]
        optimizer.step()


MOMENTUM = 0.95
"""Where a job says none: torch's own."""
MUON = Muon()
