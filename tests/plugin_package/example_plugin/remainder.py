"""Sequence classification, as an objective in one file: which remainder has the sum of a row's tokens?"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from strategies.objective.batch import Batch
from strategies.objective.objective import Objective
from strategies.objective.rows import Rows

CLASSES = 4


class Remainder(Objective):
    name = "remainder"
    loss_unit = "nats per row"
    model_class = "AutoModelForCausalLM"

    def labels(self, rows: Rows) -> torch.Tensor:
        return rows.tokens.sum(dim=1) % CLASSES

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        return F.cross_entropy(logits[:, -1, :CLASSES].float(), self.labels(rows), reduction="sum")

    def weight(self, batch: Batch) -> int:
        return batch.targets // (batch.tokens.shape[1] - 1)


REMAINDER = Remainder()
