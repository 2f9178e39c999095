"""A micro-batch on the device. No torch to know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a target that does not count."""


class Rows(NamedTuple):
    """A micro-batch: tokens int64 [batch, length + 1]; which targets count, bool [batch, length] (None: all); and where
    each input is in its document, int64 [batch, length] (None: documents are not told apart)."""

    tokens: torch.Tensor
    counting: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def first_token(self) -> Rows:
        """The least that a model can compute of it."""
        return Rows(
            self.tokens[:1, :2],
            None if self.counting is None else self.counting[:1, :1],
            None if self.positions is None else self.positions[:1, :1],
        )
