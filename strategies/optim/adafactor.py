"""Adafactor (Shazeer & Stern 2018): of a matrix, a mean of squares for each row and each column is all that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strategies.optim.optimizer import Optimizer, Settings

if TYPE_CHECKING:
    import torch


class Adafactor(Optimizer):
    """Of torch, with its own settings but for the rate and the weight decay. As there, an update is as large as the
    rate times the root mean square of the parameter that it is of, and the rate at most one over the root of the number
    of updates: 1e-2 is usual, and what is written for transformers' `scale_parameter: false` does not carry over."""

    name = "adafactor"
    scope = "parameter"
    counts_updates = True

    def moments(self, settings: Settings) -> tuple[str, ...]:
        """See `Optimizer`."""
        return (ROWS, COLUMNS, VECTOR)

    def shape_of(self, moment: str, shape: tuple[int, ...], *, is_whole: bool) -> tuple[int, ...] | None:
        """See `Optimizer`."""
        if len(shape) < 2:
            return shape if moment == VECTOR else None
        kept = {ROWS: (*shape[:-1], 1), COLUMNS: (*shape[:-2], 1, shape[-1])}
        return kept.get(moment)

    def state_bytes(self, settings: Settings, bytes_of_one: float) -> float:
        """See `Optimizer`; of a matrix of thousands of rows and columns it is less than a hundredth of a byte."""
        return 0.0

    def build(self, groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
        """See `Optimizer`."""
        import torch

        return torch.optim.Adafactor(list(groups), lr=settings.lr, foreach=False)


ROWS, COLUMNS, VECTOR = "row_var", "col_var", "variance"
"""What torch calls them."""
ADAFACTOR = Adafactor()
