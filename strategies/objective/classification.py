"""Classes of texts: one of several, or any number of them; read off after the last token.

A head with an output for each class, as transformers' models for sequence classification have it (`score`), gives
logits at every position; what counts is the last one of a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.objective import scores
from strategies.objective.objective import Labels, Sums, TokenObjective
from strategies.objective.rows import IGNORED, Rows

if TYPE_CHECKING:
    import torch

    from strategies.objective.batch import Batch

_MOST_BITS = 62
"""Classes of which a set fits into the bits of an int64 label."""


@dataclass(frozen=True)
class ClassificationSettings:
    """`labels`: how many classes there are, or their names. With `multi_label` a text may have any of them. An error in
    a class counts `class_weights` times (one number a class), and the mean is weighted, too. `auroc`: also the area
    under the ROC curve, for which every score of an evaluation is kept."""

    labels: int | list[str]
    multi_label: bool = False
    class_weights: list[float] | None = None
    label_smoothing: float = 0.0
    auroc: bool = False

    def __post_init__(self) -> None:
        names = self.labels if isinstance(self.labels, list) else []
        count = len(names) if names else self.labels
        if not isinstance(count, int) or count < 2 - self.multi_label:
            raise ValueError("labels must be the number of classes, at least 2, or a list of their names")
        if len(set(names)) < len(names):
            raise ValueError("labels names a class twice")
        if self.multi_label and count > _MOST_BITS:
            raise ValueError(f"labels: with multi_label there can be {_MOST_BITS} classes at the most, got {count}")
        weights = self.class_weights
        if weights is not None and (len(weights) != count or min(weights) < 0 or not sum(weights)):
            raise ValueError(f"class_weights must be {count} numbers, one a class, none negative, not all 0")
        if weights is not None and self.multi_label:
            raise ValueError("class_weights does not go with multi_label")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}")
        if self.label_smoothing and self.multi_label:
            raise ValueError("label_smoothing does not go with multi_label")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, if they have any."""
        return tuple(self.labels) if isinstance(self.labels, list) else ()

    @property
    def count(self) -> int:
        """Of classes."""
        return len(self.labels) if isinstance(self.labels, list) else self.labels


class LastPosition(TokenObjective):
    """An objective that reads off the last position of a text, with a label of its own for each row."""

    model_class = "AutoModelForSequenceClassification"
    shapes = ("labelled",)
    counts = "last"

    def labels(self, rows: Rows) -> torch.Tensor:
        """The row's label at the position that counts, int64 [rows, length]."""
        assert rows.labels is not None, "records of this objective have labels"
        assert rows.counting is not None, "and a position that counts"
        labels = rows.labels[:, None].expand(rows.counting.shape)
        return labels.masked_fill(~rows.counting, IGNORED)

    def weight(self, batch: Batch) -> float:
        """The samples of the step."""
        return batch.step_samples

    def invented(self, rows: Rows) -> Rows:
        """See `Objective`."""
        import torch

        counting = torch.zeros(rows.tokens[:, 1:].shape, dtype=torch.bool, device=rows.tokens.device)
        counting[:, -1] = True
        labels = torch.zeros(len(rows.tokens), dtype=torch.int64, device=rows.tokens.device)
        return rows._replace(counting=counting, labels=labels)

    def made_up(self, rows: Rows) -> Rows:
        """See `Objective`."""
        return self.invented(rows.first_token())


class Classification(LastPosition):
    """Cross-entropy over classes, or with `multi_label` the mean over classes of that of each; the mean over the
    samples of a step, weighted by class if the job says so."""

    name = "classification"
    loss_unit = "nats per sample"
    Settings = ClassificationSettings

    def __init__(self, settings: Any = None) -> None:
        self.settings = ClassificationSettings(2) if settings is None else settings

    def with_settings(self, given: Mapping[str, Any]) -> Classification:
        """See `Objective`; `labels` is required."""
        return Classification(ClassificationSettings(**given))

    @property
    def labels_of_records(self) -> Labels:
        """See `Objective`."""
        settings = self.settings
        return Labels("multi" if settings.multi_label else "single", settings.count, settings.names)

    @property
    def num_outputs(self) -> int:
        """See `Objective`."""
        return self.settings.count  # type: ignore[no-any-return]

    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `TokenObjective`."""
        import torch
        import torch.nn.functional as F

        values, settings = logits.float(), self.settings
        if settings.multi_label:
            counts = labels != IGNORED
            each = F.binary_cross_entropy_with_logits(values, self._bits(labels).float(), reduction="none")
            return each.mean(dim=-1).masked_fill(~counts, 0.0).sum()
        weights = settings.class_weights
        if weights is None:
            return F.cross_entropy(
                values, labels, reduction="sum", ignore_index=IGNORED, label_smoothing=settings.label_smoothing
            )
        by_class = torch.tensor(weights, dtype=torch.float32, device=values.device)
        return F.cross_entropy(
            values, labels, weight=by_class, reduction="sum", ignore_index=IGNORED,
            label_smoothing=settings.label_smoothing,
        )  # fmt: skip

    def weight(self, batch: Batch) -> float:
        """The samples of the step, each as often as its class counts."""
        weights = self.settings.class_weights
        if weights is None:
            return batch.step_samples
        assert batch.step_labels is not None, "records of this objective have labels"
        return float(sum(weights[label] for label in batch.step_labels.tolist()))

    def _bits(self, labels: torch.Tensor) -> torch.Tensor:
        """Whether each class is in a set: int64 [rows, classes]."""
        import torch

        shifts = torch.arange(self.settings.count, device=labels.device)
        return (labels.clamp(min=0)[:, None] >> shifts) & 1

    # ------------------------------------------------------------------------------------ evaluation

    def measure_tokens(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        """The loss, how often each class was taken for which, and with `auroc` every score."""
        import torch

        here = labels != IGNORED
        values, chosen, settings = logits[here].float(), labels[here], self.settings
        loss = self.token_loss(values, chosen) if len(chosen) else values.sum() * 0.0
        weights = settings.class_weights
        count = float(len(chosen)) if weights is None else float(sum(weights[each] for each in chosen.tolist()))
        found: Sums = {
            "loss": torch.stack([loss.double().cpu(), torch.tensor([count], dtype=torch.float64)[0]]),
        }
        size = settings.count
        if settings.multi_label:
            actual, said = self._bits(chosen).bool(), values > 0
            table = [(actual & said), (~actual & said), (actual & ~said), (~actual & ~said)]
            found["confusion"] = torch.stack([each.sum(dim=0) for each in table]).double().flatten()
            found["exact"] = torch.stack([(actual == said).all(dim=-1).sum(), torch.tensor(len(chosen))]).double()
            targets = actual.long()
        else:
            pairs = chosen * size + values.argmax(dim=-1)
            found["confusion"] = torch.bincount(pairs, minlength=size * size).double()
            targets = torch.nn.functional.one_hot(chosen, size) if len(chosen) else chosen.new_zeros((0, size))
        if settings.auroc:
            given = values.sigmoid() if settings.multi_label else values.softmax(dim=-1)
            found["all.scores"], found["all.targets"] = given.double().flatten(), targets.double().flatten()
        return found

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """See `strategies.objective.scores`."""
        total, count = sums["loss"][:2]
        size, names = self.settings.count, self.settings.names or tuple(map(str, range(self.settings.count)))
        found: dict[str, Any] = {"loss": total / count if count else 0.0}
        if self.settings.multi_label:
            found |= scores.of_sets(sums["confusion"], sums["exact"], names)
        else:
            found |= scores.of_classes(sums["confusion"], names)
        if self.settings.auroc:
            found["auroc"] = scores.auroc(
                sums["all.scores"], sums["all.targets"], size, is_binary=size == 2 and not self.settings.multi_label
            )
        return found


CLASSIFICATION = Classification()
