"""Numbers of texts, read off after the last token (see `strategies.objective.classification`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.objective.classification import LastPosition
from strategies.objective.objective import Labels, Sums
from strategies.objective.rows import IGNORED

if TYPE_CHECKING:
    import torch

    from strategies.objective.rows import Rows

_ONE = 1


@dataclass(frozen=True)
class RegressionSettings:
    """`loss`: the square of the error (mse), its size (l1), or what is the square near 0 and the size beyond 1
    (huber)."""

    loss: str = "mse"

    def __post_init__(self) -> None:
        if self.loss not in ("mse", "l1", "huber"):
            raise ValueError(f"loss must be mse, l1 or huber, got {self.loss!r}")


class Regression(LastPosition):
    """The mean over the samples of a step of the error of one number a text."""

    name = "regression"
    loss_unit = "error per sample"
    Settings = RegressionSettings

    @property
    def labels_of_records(self) -> Labels:
        """See `Objective`."""
        return Labels("number", _ONE)

    @property
    def num_outputs(self) -> int:
        """See `Objective`."""
        return _ONE

    def labels(self, rows: Rows) -> torch.Tensor:
        """The bits of the number of the row, moved so that none of them is IGNORED: int64 [rows, length]."""
        assert rows.labels is not None, "records of this objective have labels"
        assert rows.counting is not None, "and a position that counts"
        # The bits of an fp32 may be those of any int32, and IGNORED is one.
        moved = rows.labels + (1 << 33)
        return moved[:, None].expand(rows.counting.shape).masked_fill(~rows.counting, IGNORED)

    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `TokenObjective`."""
        import torch.nn.functional as F

        counts = labels != IGNORED
        values = logits.float()[:, 0].masked_fill(~counts, 0.0)
        targets = _numbers(labels).masked_fill(~counts, 0.0)
        match self.settings.loss:
            case "mse":
                return F.mse_loss(values, targets, reduction="sum")
            case "l1":
                return F.l1_loss(values, targets, reduction="sum")
        return F.huber_loss(values, targets, reduction="sum")

    def measure_tokens(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        """The loss, and what R2 takes: counts, sums and squares."""
        import torch

        here = labels != IGNORED
        values, targets = logits[here].double()[:, 0], _numbers(labels[here]).double()
        loss = self.token_loss(logits[here], labels[here]).double()
        errors = values - targets
        count = torch.tensor(float(len(targets)), dtype=torch.float64, device=loss.device)
        squares = [errors.square().sum(), errors.abs().sum(), targets.sum(), targets.square().sum()]
        return {"loss": torch.stack([loss, count, *squares])}

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """`loss`, `mse`, `mae`, `r2` (None where all numbers are the same)."""
        total, count, squares, sizes, targets, of_targets = sums["loss"]
        if not count:
            return {"loss": 0.0, "mse": 0.0, "mae": 0.0, "r2": None}
        spread = of_targets - targets * targets / count
        r2 = 1.0 - squares / spread if spread > 1e-12 * max(1.0, of_targets) else None
        return {"loss": total / count, "mse": squares / count, "mae": sizes / count, "r2": r2}


def _numbers(labels: torch.Tensor) -> torch.Tensor:
    """The fp32 of which `labels` are the bits."""
    import torch

    return (labels - (1 << 33)).to(torch.int32).view(torch.float32)


REGRESSION = Regression()
