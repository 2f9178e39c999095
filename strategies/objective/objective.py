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
    """

    name: ClassVar[str]
    loss_unit: ClassVar[str]
    model_class: ClassVar[str]
    sees_all: ClassVar[bool] = False

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
