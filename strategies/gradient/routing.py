"""The loss of a mixture's routers: that experts are chosen about equally often, and that logits stay small.

Of some tokens, f is how often each expert was chosen, p the mean probability that its router gave it, and the loss
experts * sum(f * p), over all routers together, as transformers has it (Fedus et al. 2021, "Switch Transformers",
equations 4 to 6). `over` says which tokens: those of a micro-batch, of a virtual worker, or of the whole step, which
lets a micro-batch be of one kind where a step is not (Qiu et al. 2025, arXiv:2501.11873). The z-loss is the mean square
of logsumexp(logits) (Zoph et al. 2022, "ST-MoE", equation 5).

The gradient of f is none, so f is a constant; but one that must be known before anything of its tokens is computed
backward. Choices are counted, in integers whose sum has no order: of a micro-batch in its own forward pass, otherwise
in passes before, of which nothing else is kept. What then belongs to a router enters the backward pass there, wherever
in a pipeline that is, and what it adds to the loss is told router by router and added up in their order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from strategies.comm.fabric import Fabric
from strategies.compat import leave_uncompiled
from strategies.gradient.router_loss import RouterLoss
from strategies.gradient.spec import StepSpec
from strategies.layout.parallel import ParallelLayout
from strategies.model.routers import Routers


@dataclass
class Pass:
    """What the routers of a rank did in the forward pass of one micro-batch, by their numbers."""

    fractions: torch.Tensor | None = None
    """f, fp32 [experts]; None: to be known of this pass itself, when it is over."""
    tokens: int = 0
    counts: dict[int, torch.Tensor] = field(default_factory=dict)
    """How often each expert was chosen, int64 [experts]."""
    probabilities: dict[int, torch.Tensor] = field(default_factory=dict)
    """Their sums, fp32 [experts]."""
    squares: dict[int, torch.Tensor] = field(default_factory=dict)
    """The sums of logsumexp(logits) squared, fp32."""

    def note(self, number: int, logits: torch.Tensor, top_k: int) -> None:
        """What router `number` gave: fp32 [tokens, experts]."""
        probabilities = logits.softmax(dim=-1)
        chosen = torch.nn.functional.one_hot(probabilities.topk(top_k, dim=-1).indices, logits.shape[-1])
        self.tokens = len(logits)
        self.counts[number] = chosen.sum(dim=(0, 1))
        self.probabilities[number] = probabilities.sum(dim=0)
        self.squares[number] = logits.logsumexp(dim=-1).square().sum()


class Routing:
    """Watches the routers of one rank in a step after the other. What it knows is by (virtual worker, micro-batch).

    With an `exchange` the step's choices are counted before, and told to all ranks: routers or tokens of other ranks
    count, too.
    """

    def __init__(self, loss: RouterLoss, exchange: RouterExchange | None = None) -> None:
        self.loss = loss
        self.exchange = exchange
        self._at: Pass | None = None
        self._only_counts = False
        self._step: int | None = None
        self._counted: dict[tuple[int, int], Pass] = {}
        self._passes: dict[tuple[int, int], Pass] = {}
        self._fractions: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def counts_first(self) -> bool:
        """Whether choices have to be counted before anything is computed backward."""
        return self.exchange is not None or self.loss.over != "micro-batch"

    def begin(self, step: int) -> None:
        """What is known of another step is of no use."""
        if step != self._step:
            self.discard()
            self._step = step

    def discard(self) -> None:
        """Forgets all that is known of the step."""
        self._step = None
        self._counted, self._passes, self._fractions = {}, {}, {}

    # ------------------------------------------------------------------------------------ in passes

    def install(self, module: nn.Module) -> None:
        """Watches those routers that a module (the model, or a stage of it) has."""
        for number, (name, index) in enumerate(self.loss.routers.items()):
            try:
                router = module.get_submodule(name)
            except AttributeError:
                continue  # Another stage's.
            forget(router)
            router.register_forward_hook(_RouterHook(self, number, index))

    def is_counted(self, virtual_worker: int) -> bool:
        """Whether all of its choices are known."""
        return (virtual_worker, self.loss.micro_batches - 1) in self._counted

    @contextmanager
    def count(self, virtual_worker: int, micro_batch: int) -> Iterator[None]:
        """In a forward pass of this micro-batch choices are counted, and nothing else."""
        at = Pass()
        with self.watch(at, only_counts=True):
            yield
        # A pass that failed is not known, and made again.
        self._counted[virtual_worker, micro_batch] = at

    def settle(self, held: Iterable[int]) -> None:
        """The virtual workers of this replica have been counted. With an exchange: raises PeerLost."""
        here = {key: at for key, at in self._counted.items() if key[0] in set(held)}
        counts = {key: functools.reduce(torch.add, at.counts.values()).cpu() for key, at in here.items() if at.counts}
        if self.exchange is not None:
            counts = self.exchange.sum_counts(counts)
        together: dict[Any, list[torch.Tensor]] = {}
        for key, of_experts in counts.items():
            together.setdefault(self._unit(*key), []).append(of_experts)
        sums = {unit: functools.reduce(torch.add, all_of_it) for unit, all_of_it in together.items()}
        for key, at in here.items():
            if at.tokens:  # Else there is no router here.
                unit = self._unit(*key)
                fractions = self.fractions(sums[unit], at.tokens * len(together[unit]))
                self._fractions[key] = fractions.to(next(iter(at.counts.values())).device)

    def _unit(self, virtual_worker: int, micro_batch: int) -> tuple[int, ...]:
        """What a micro-batch is balanced with: all that has the same."""
        match self.loss.over:
            case "step":
                return ()
            case "virtual-worker":
                return (virtual_worker,)
            case _:
                return (virtual_worker, micro_batch)

    def train(self, virtual_worker: int, micro_batch: int) -> AbstractContextManager[None]:
        """In passes of this micro-batch, forward and backward, the routers' loss is part of the loss."""
        key = virtual_worker, micro_batch
        at = self._passes.get(key)
        if at is None:
            at = self._passes[key] = Pass(self._fractions.get(key))
        return self.watch(at)

    @contextmanager
    def watch(self, into: Pass, *, only_counts: bool = False) -> Iterator[None]:
        """What routers do meanwhile, forward or backward, belongs to this pass."""
        self._at, self._only_counts = into, only_counts
        try:
            yield
        finally:
            self._at = None

    @leave_uncompiled
    def see(self, number: int, logits: torch.Tensor, others: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """`others` are what is computed with of what a router gives beside `logits` [tokens, experts]: the same again,
        with the router's loss behind them."""
        if (at := self._at) is None:
            return others
        if logits.shape[-1] != self.loss.experts:
            raise ValueError(f"a router gives logits of {logits.shape[-1]} experts; the model has {self.loss.experts}")
        if number not in at.counts:  # Else its layer is computed again.
            at.note(number, logits.detach().float().flatten(0, -2), self.loss.top_k)
        if self._only_counts or not logits.requires_grad:
            return others
        found: Any = _Balanced.apply(self, at, logits, *others)  # type: ignore[no-untyped-call]
        return found  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------ numbers

    def fractions(self, counts: torch.Tensor, tokens: int) -> torch.Tensor:
        """f, fp32, of `counts` int64 [experts] of `tokens` tokens, summed over all routers."""
        return (counts.double() / (tokens * len(self.loss.routers))).float()

    def factors(self, at: Pass) -> tuple[torch.Tensor, float]:
        """What the probabilities of a token are multiplied by, fp32 [experts], and its squared logsumexp."""
        loss = self.loss
        share = 1.0 / (at.tokens * loss.virtual_workers * loss.micro_batches * len(loss.routers))
        fractions = at.fractions
        if fractions is None:
            fractions = self.fractions(functools.reduce(torch.add, at.counts.values()), at.tokens)
        return fractions * (self.loss.balance * self.loss.experts * share), self.loss.z * share

    def losses(self, virtual_worker: int) -> torch.Tensor:
        """What the routers here add to the loss of a virtual worker, fp64 [routers]; zeros where one is not here."""
        found = torch.zeros(len(self.loss.routers), dtype=torch.float64)
        for micro_batch in range(self.loss.micro_batches):
            at = self._passes[virtual_worker, micro_batch]
            of_probability, of_square = self.factors(at) if at.counts else (torch.zeros(0), 0.0)
            for number, sums in at.probabilities.items():
                balance = (of_probability.double() * sums.double()).sum()
                found[number] += (balance + of_square * at.squares[number].double()).cpu()
        return found

    def all_losses(self, held: Iterable[int]) -> dict[int, float]:
        """What all routers add to the loss of each virtual worker of this replica. With an exchange: raises
        PeerLost."""
        found = {index: self.losses(index) for index in held}
        if self.exchange is not None and self.exchange.splits_routers:
            found = self.exchange.sum_losses(found)
        return {index: math.fsum(found[index].tolist()) for index in held}


class RouterExchange:
    """Tells all ranks what those know that have other routers, or other tokens. Every rank of the world takes part, one
    that computes nothing too."""

    def __init__(self, loss: RouterLoss, layout: ParallelLayout, fabric: Fabric) -> None:
        self._loss, self._fabric = loss, fabric
        place = layout.place(fabric.rank)
        # Ranks that share tensors know the same.
        self._tells = place is not None and place.tensor == 0
        self.splits_routers = layout.pipeline > 1

    @classmethod
    def where_needed(
        cls, routers: Routers | None, spec: StepSpec, layout: ParallelLayout, fabric: Fabric
    ) -> RouterExchange | None:
        """None where every rank has all that its routers' loss depends on."""
        loss = RouterLoss.of(routers, spec.router_loss, spec.micro_batches)
        if loss is None or (layout.pipeline == 1 and (loss.over != "step" or layout.data == 1)):
            return None
        return cls(loss, layout, fabric)

    def sum_counts(self, counts: Mapping[tuple[int, int], torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
        """By (virtual worker, micro-batch), int64 [experts], of all routers. Raises PeerLost."""
        loss = self._loss
        table = torch.zeros((loss.virtual_workers, loss.micro_batches, loss.experts), dtype=torch.int64)
        for (virtual_worker, micro_batch), of_experts in counts.items() if self._tells else ():
            table[virtual_worker, micro_batch] = of_experts
        self._fabric.control.all_reduce(table)
        return {(v, m): table[v, m] for v in range(loss.virtual_workers) for m in range(loss.micro_batches)}

    def sum_losses(self, losses: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """By virtual worker, fp64 [routers]: of each one only one rank knows other than zero. Raises PeerLost."""
        table = torch.zeros((self._loss.virtual_workers, len(self._loss.routers)), dtype=torch.float64)
        for virtual_worker, of_routers in losses.items() if self._tells else ():
            table[virtual_worker] = of_routers
        self._fabric.control.all_reduce(table)
        return dict(enumerate(table))

    def take_part(self) -> None:
        """For a rank that computes nothing. Raises PeerLost."""
        self.sum_counts({})
        if self.splits_routers:
            self.sum_losses({})


class _RouterHook:
    def __init__(self, routing: Routing, number: int, index: int) -> None:
        self._routing = routing
        self._number, self._index = number, index

    def __deepcopy__(self, memo: Any) -> _RouterHook:
        return self

    def __call__(self, module: nn.Module, given: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return self._routing.see(self._number, output, [output])[0]
        logits = output[self._index]
        places = [at for at, each in enumerate(output) if at != self._index and _is_computed_with(each)]
        places = places or [self._index]
        found = list(output)
        for at, each in zip(
            places, self._routing.see(self._number, logits, [output[at] for at in places]), strict=True
        ):
            found[at] = each
        return tuple(found)


def _is_computed_with(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def forget(router: nn.Module) -> None:
    """Takes from a router, or a copy of it, that it is watched."""
    for key, hook in list(router._forward_hooks.items()):
        if isinstance(hook, _RouterHook):
            del router._forward_hooks[key]


class _Balanced(torch.autograd.Function):
    """Gives back what it is given. In the backward pass, which is that of a loss, it adds that of the routers."""

    @staticmethod
    def forward(
        ctx: Any, routing: Routing, at: Pass, logits: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.routing, ctx.at = routing, at
        ctx.save_for_backward(logits)
        return tuple(each.view_as(each) for each in others)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (logits,) = ctx.saved_tensors
        of_probability, of_square = ctx.routing.factors(ctx.at)
        values = logits.float()
        probabilities = values.softmax(dim=-1)
        # d softmax = diag(p) - p p^T; d logsumexp = p.
        wanted = of_probability - (probabilities * of_probability).sum(dim=-1, keepdim=True)
        if of_square:
            wanted = wanted + 2 * of_square * values.logsumexp(dim=-1, keepdim=True)
        return (None, None, (probabilities * wanted).to(logits.dtype), *gradients)
