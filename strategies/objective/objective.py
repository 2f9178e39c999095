"""What a model is trained for: how its output becomes a loss, of what a step's mean is, and which models it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    import torch

    from strategies.objective.batch import Batch
    from strategies.objective.rows import Rows

LabelKind = Literal["single", "multi", "number", "boolean"]


@dataclass(frozen=True)
class Labels:
    """What labels an objective's records have: one of `count` classes, several of them, that many numbers, or yes and
    no; classes may have `names`. In `Rows.labels` they are the class, the set as bits, the bits of one fp32, 0 or 1."""

    kind: LabelKind
    count: int = 1
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoSettings:
    """Of an objective that a job says nothing more about."""


END_TO_END = "all."
"""How names begin of what is not added up but put end to end."""
Sums = dict[str, "torch.Tensor"]
"""What is measured of some rows, by name: fp64 [n], to be added up over all rows of an evaluation; or of a name that
begins with "all.", to be put end to end in the order of samples."""


class Objective(ABC):
    """One objective. Pure: what it gives is a function of its arguments, and of torch's random stream.

    `loss_unit` is what people read beside a loss. `model_class` is the class of transformers that builds its models.
    `sees_all` says that a position may depend on those after it; otherwise a model that lets it is refused.
    `takes_split_logits`: its loss can be computed of logits that tensor parallelism has split over classes (a DTensor);
    otherwise they are gathered first.

    `shapes` are the shapes of records that it takes (`orchestrator.data.records`); without any it takes text, of which
    all counts. `counts` says which tokens of a record do, `sequences` how many rows a sample has. `Settings` is a
    dataclass of what a job may say of it, beside its name.
    """

    name: ClassVar[str]
    loss_unit: ClassVar[str]
    model_class: ClassVar[str]
    sees_all: ClassVar[bool] = False
    takes_split_logits: bool = False
    shapes: ClassVar[tuple[str, ...]] = ()
    counts: str = "auto"
    sequences: ClassVar[int] = 1
    by_token: ClassVar[bool] = False
    """Whether it is a `TokenObjective` and nothing beside."""
    gives_hidden_states: ClassVar[bool] = False
    """Whether its models have no head, and it takes hidden states in place of logits."""
    whole_virtual_workers: ClassVar[bool] = False
    """Whether samples of a virtual worker are compared with each other, so that they have to be one micro-batch."""
    needs_reference: bool = False
    """Whether its loss compares with what the model gave before it was trained (`reference` gives that of rows)."""
    another: ClassVar[str] = ""
    """The setting that names another model, a directory or a run, of which `content` is the digest."""
    Settings: ClassVar[type] = NoSettings

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with another model while it learns (`with_teacher`)."""
        return self.another == "teacher"

    def with_settings(self, given: Mapping[str, Any]) -> Self:
        """The same with what a job says. Raises TypeError for a field that it has not, ValueError for a value."""
        return type(self)(self.Settings(**given)) if given else self

    @property
    def labels_of_records(self) -> Labels | None:
        """What labels its records have."""
        return None

    @property
    def num_outputs(self) -> int | None:
        """How many numbers its models give for a position, where that is not the size of the vocabulary."""
        return None

    @abstractmethod
    def labels(self, rows: Rows) -> torch.Tensor:
        """What the model is to predict, int64, IGNORED where nothing is; of the shape that `loss` wants."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The sum (fp32, no dimensions) of the losses of everything in `rows` that counts; `logits`
        [rows, length, classes] are the model's, in the type that it computes in."""

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """How much counts in the whole step that `batch` is of: its mean loss is the sum of all losses over this."""

    def made_up(self, rows: Rows) -> Rows:
        """The least that a model can compute in place of `rows`, where it has to take part and nobody looks at what
        comes of it."""
        return rows.first_token(self.sequences)

    def invented(self, rows: Rows) -> Rows:
        """Rows of made-up tokens, as many as there are, as rows of this objective: to try a model with."""
        return rows

    def reference(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """What is kept of a reference model's `logits`: fp32 [rows]."""
        raise NotImplementedError(f"{self.name} compares with no reference")

    # ------------------------------------------------------------------------------------ evaluation

    def measure(self, logits: torch.Tensor, rows: Rows) -> Sums:
        """What is measured of rows that are not trained on; `logits` as for `loss`. Without gradients."""
        import torch

        loss = self.loss(logits, rows).double()
        count = self.num_counted(rows)
        return {"loss": torch.stack([loss, torch.tensor(float(count), dtype=torch.float64, device=loss.device)])}

    def num_counted(self, rows: Rows) -> int:
        """How much counts in these rows, in the unit of `weight`."""
        return len(rows.tokens) // self.sequences

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """The metrics of an evaluation, by name, from what was measured of all of it. `loss` is always there."""
        total, count = sums["loss"][:2]
        return {"loss": total / count if count else 0.0}


class TokenObjective(Objective):
    """An objective whose loss is a sum over positions, each of its own logits and label: so it can be computed for some
    positions at a time, and the logits of all never have to be there at once."""

    by_token = True

    @abstractmethod
    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum (fp32, no dimensions) of the losses of `logits` [rows, classes], in the type that the model computes
        in, by `labels` int64 [rows], of which IGNORED ones do not count."""

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`."""
        return self.token_loss(logits.flatten(0, 1), self.labels(rows).flatten())

    def measure_tokens(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        """What is measured of some positions: `logits` [rows, classes], whole, and `labels` int64 [rows]."""
        import torch

        from strategies.objective.rows import IGNORED

        counted = (labels != IGNORED).sum().double()
        return {"loss": torch.stack([self.token_loss(logits, labels).double(), counted])}

    def measure(self, logits: torch.Tensor, rows: Rows) -> Sums:
        """See `Objective`."""
        return self.measure_tokens(logits.flatten(0, 1), self.labels(rows).flatten())
