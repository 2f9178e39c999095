"""Whether what a model gives at one place depends on tokens that it must not see there: found out by trying."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

ROUNDING = 1e-5
"""In units of the largest logit. Experts see other tokens beside those of a document, and may round differently."""


@contextlib.contextmanager
def nothing_hidden(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter zero: what is zero at first (often the last matrix of a block, or a gate) would
    hide what flows through it later. All is as before afterwards, random numbers too."""
    was_training = model.training
    zeros = [parameter for parameter in model.parameters() if not parameter.is_meta and not parameter.any()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in zeros:
                parameter.normal_(std=0.02)
            yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
        model.train(was_training)


def logits(model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Of token ids int64 [batch, length]; fp32 [batch, length, vocabulary]."""
    more = {} if positions is None else {"position_ids": positions}
    output = model(input_ids=tokens, **more)
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return found.float()


def differ(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether logits differ by more than rounding."""
    return not float((one - two).abs().max()) <= ROUNDING * float(one.abs().max())


def refuse_foresight(model: nn.Module, tokens: torch.Tensor) -> None:
    """Raises ValueError when the model, whole and with its weights, lets a position see those after it: then other
    tokens there change what it predicts. `tokens` are ids int64 [2, length], the two rows nowhere alike.

    Computed in fp32.
    """
    one, two = tokens[:1], tokens[1:2]
    length = tokens.shape[1]
    with nothing_hidden(model):
        usual = logits(model, one)
        for at in sorted({length // 2, length - 1} - {0}):
            other = logits(model, torch.cat([one[:, :at], two[:, at:]], dim=1))
            if differ(usual[:, :at], other[:, :at]):
                raise ValueError(
                    f"in {type(model).__name__} what is predicted at a position depends on tokens after it (it attends "
                    "both ways, as encoders like bert do), so that it would train on its own answers: use a causal "
                    "model (a decoder); those encoders of transformers that can be one need model.hf.is_decoder: true"
                )
