"""What a model is trained for: how its output becomes a loss, of what a step's mean is, and which models it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from strategies.objective.batch import Batch
    from strategies.objective.rows import Rows


class Objective(ABC):
    """One objective. Pure: what it gives is a function of its arguments, and of torch's random stream.

    `loss_unit` is what people read beside a loss. `model_class` is the class of transformers that builds its models.
    `sees_all` says that a position may depend on those after it; otherwise a model that lets it is refused.
    `takes_split_logits`: its loss can be computed of logits that tensor parallelism has split over classes (a DTensor);
    otherwise they are gathered first.
    """

    name: ClassVar[str]
    loss_unit: ClassVar[str]
    model_class: ClassVar[str]
    sees_all: ClassVar[bool] = False
    takes_split_logits: ClassVar[bool] = False

    @abstractmethod
    def labels(self, rows: Rows) -> torch.Tensor:
        """What the model is to predict, int64, IGNORED where nothing is; of the shape that `loss` wants."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The sum (fp32, no dimensions) of the losses of everything in `rows` that counts; `logits`
        [batch, length, classes] are the model's, in the type that it computes in."""

    @abstractmethod
    def weight(self, batch: Batch) -> int:
        """How much counts in the whole step that `batch` is of: its mean loss is the sum of all losses over this."""

    def made_up(self, rows: Rows) -> Rows:
        """The least that a model can compute in place of `rows`, where it has to take part and nobody looks at what
        comes of it."""
        return rows.first_token()


class TokenObjective(Objective):
    """An objective whose loss is a sum over positions, each of its own logits and label: so it can be computed for some
    positions at a time, and the logits of all never have to be there at once."""

    @abstractmethod
    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum (fp32, no dimensions) of the losses of `logits` [rows, classes], in the type that the model computes
        in, by `labels` int64 [rows], of which IGNORED ones do not count."""

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`."""
        return self.token_loss(logits.flatten(0, 1), self.labels(rows).flatten())
