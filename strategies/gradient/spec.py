"""What decides the numbers of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from strategies.gradient.loss import loss_of
from strategies.gradient.router_loss import RouterLossSpec
from strategies.model.head import Head
from strategies.model.recompute import NOTHING_AGAIN, Recompute
from strategies.model.stage import Stage
from strategies.objective.batch import Batch, counting, positions
from strategies.objective.causal_lm import CAUSAL_LM
from strategies.objective.chunk import CHUNK_TOKENS
from strategies.objective.metric import Metric
from strategies.objective.objective import Objective
from strategies.objective.rows import Rows
from strategies.optim.schedule import ScheduleSpec
from strategies.wire.format import FP32, WireFormat


@dataclass(frozen=True)
class StepSpec:
    """What decides the numbers of a step, and what of it is computed twice; a function of the job file.

    With `document_mask` the model is told where documents begin, and must not attend across. `loss_chunk` is how many
    positions the loss is computed for at a time (0: all).

    More than 15 attributes: each decides some numbers, or how they are come by."""

    seed: int
    micro_batch: int
    micro_batches: int
    base_lr: float
    schedule: ScheduleSpec
    clip_norm: float | None = 1.0
    precision: str = "fp32"
    native_reduction: bool = False
    compile: bool = False
    document_mask: bool = False
    objective: Objective = CAUSAL_LM
    loss_chunk: int = CHUNK_TOKENS
    recompute: Recompute = NOTHING_AGAIN
    router_loss: RouterLossSpec | None = None
    wire: WireFormat = FP32
    """How sums of gradients are sent."""
    total_steps: int = 0
    """Of the job; 0: it has no end that is known."""
    metrics: tuple[Metric, ...] = ()
    """Of evaluations, beside the objective's own."""

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context of forward passes."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def micro_batches_of(self, batch: Batch, device: torch.device) -> list[Rows]:
        """A virtual worker's micro-batches, on the device."""
        if batch.documents is None:
            tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
            whole = [Rows(each) for each in tokens.split(self.micro_batch)]
            if batch.taught is None:
                return whole
            taught = [micro.taught for micro in batch.micro_batches(self.micro_batch)]
            return [each._replace(taught=_moved(given, device)) for each, given in zip(whole, taught, strict=True)]
        found = []
        for micro in batch.micro_batches(self.micro_batch):
            assert micro.documents is not None
            places = positions(micro.documents[:, :-1]) if self.document_mask else None
            counts = counting(micro.documents, micro.marks)
            arrays = (micro.tokens, counts, places, micro.labels, micro.reference)
            moved = (None if a is None else torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
            rows = Rows(*moved)  # type: ignore[arg-type]
            found.append(rows._replace(taught=_moved(micro.taught, device)))
        return found

    def loss(self, model: Stage, rows: Rows, weight: float | torch.Tensor) -> torch.Tensor:
        """The share that a micro-batch has of the mean loss of a step of this `weight` (see `Objective.weight`)."""

        def score(value: torch.Tensor, head: Head | None) -> torch.Tensor:
            return self.score(value, head, rows, weight)

        with self.autocast(rows.tokens.device):
            loss: torch.Tensor = model(rows.tokens[:, :-1], rows.positions, score)
        return loss

    def score(
        self, value: torch.Tensor, head: Head | None, rows: Rows, weight: float | torch.Tensor, *, waits: bool = False
    ) -> torch.Tensor:  # fmt: skip
        """The same from hidden states and head, or without a head from logits. It `waits` for its backward pass if
        others are computed forward before."""
        return loss_of(self.objective, value, head, rows, weight, self.loss_chunk, waits=waits)

    def divisor(self, batch: Batch) -> float | torch.Tensor:
        """The weight of the step that a batch is of, to divide by: 1 for a step in which nothing counts, whose loss is
        0.

        Where it differs from step to step a compiled model must not be compiled for each: then it is a tensor."""
        weight = max(1, self.objective.weight(batch))
        return torch.tensor(float(weight)) if self.compile and batch.documents is not None else weight


def _moved(given: Any, device: torch.device) -> Any:
    if given is None:
        return None
    return tuple(torch.from_numpy(np.ascontiguousarray(each)).to(device, non_blocking=True) for each in given)


@contextlib.contextmanager
def first_pass(model: nn.Module, length: int, tensor: int = 1) -> Iterator[None]:
    """Turns what goes wrong in the first passes of a model, split over `tensor` ranks, over rows of `length` tokens,
    into a ValueError in our words: it is the job's fault, and would go wrong wherever it is tried. Only memory that is
    short may be there elsewhere."""
    try:
        yield
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # A model can fail with anything.
        said = (str(error).strip().splitlines() or [""])[0]
        split = f", split over {tensor} tensor-parallel ranks by its tp_plan," if tensor > 1 else ""
        text = f"the model {type(model).__name__}{split} fails in its first pass, over {length} tokens"
        hint = ""
        if isinstance(error, IndexError) or "index out of" in said:
            hint = (
                f". Has it positions for the {length} tokens of data.sequence_length, and a vocabulary as large as the "
                "tokenizer's?"
            )
        elif "being modified inplace" in said:
            hint = ". Has it a layer that changes what it is given in place? Let that make a new tensor"
        raise ValueError(f"{text}: {type(error).__name__}: {said}{hint}") from error
