"""A micro-batch on the device. No torch to know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a target that does not count."""


class Rows(NamedTuple):
    """A micro-batch: tokens int64 [rows, length + 1]; which targets count, bool [rows, length] (None: all); where each
    input is in its document, int64 [rows, length] (None: documents are not told apart); the labels of its samples,
    int64 [samples], each of which has as many rows, one after another, as the objective's records have sequences; and
    what a reference model gives for each row, fp32 [rows], where the objective compares with one; and the likeliest
    tokens that a teacher gives at each input, their logits fp32 and ids int32, [rows, length, k] each."""

    tokens: torch.Tensor
    counting: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    taught: tuple[torch.Tensor, torch.Tensor] | None = None

    def next_tokens(self) -> torch.Tensor:
        """The token after each input, where it counts: int64 [rows, length], IGNORED elsewhere."""
        tokens = self.tokens[:, 1:]
        return tokens if self.counting is None else tokens.masked_fill(~self.counting, IGNORED)

    def first_token(self, rows: int = 1) -> Rows:
        """The least that a model can compute of it: a token of as many rows as a sample has."""
        return Rows(
            self.tokens[:rows, :2],
            None if self.counting is None else self.counting[:rows, :1],
            None if self.positions is None else self.positions[:rows, :1],
            None if self.labels is None else self.labels[:1],
            None if self.reference is None else self.reference[:rows],
            None if self.taught is None else (self.taught[0][:rows, :1], self.taught[1][:rows, :1]),
        )
