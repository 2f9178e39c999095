"""What is measured in an evaluation beside what the objective measures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.tokenizers import byte_lengths, load_tokenizer
from orchestrator.job import Job
from orchestrator.job.kinds import metric_from
from orchestrator.job.parts import objective_of
from strategies.objective.metric import Metric
from strategies.objective.objective import Sums

if TYPE_CHECKING:
    import torch

BYTES_OF_TEXT = "bytes_of_text"


class BytesOfText(Metric):
    """How many bytes of text the targets that count stand for."""

    name = BYTES_OF_TEXT

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        """`lengths` in bytes, by token id."""
        self._lengths = lengths

    def measure(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        """See `Metric`."""
        import torch

        lengths = torch.from_numpy(self._lengths).to(labels.device)
        counted = labels[labels >= 0]
        # Ids beyond the tokenizer's, which a model may have, are no text.
        known = counted[counted < len(lengths)]
        return {"bytes": lengths[known].sum(dtype=torch.float64)[None]}

    def report(self, sums: Mapping[str, list[float]]) -> Any:
        """See `Metric`."""
        return int(sums["bytes"][0]) if "bytes" in sums else 0


@lru_cache(maxsize=4)
def _bytes_of(tokenizer: str) -> BytesOfText | None:
    lengths = byte_lengths(load_tokenizer(tokenizer))
    return None if lengths is None else BytesOfText(lengths)


def metrics_of(job: Job) -> tuple[Metric, ...]:
    """A user's own; and where losses are by token, and it is known of how many bytes each token is, these bytes."""
    if job.evaluation is None or not job.evaluation.holds_out:
        return ()
    found = tuple(map(metric_from, job.evaluation.metrics))
    # What a user's own objective gives need be no likelihood.
    has_likelihoods = job.objective.factory is None and objective_of(job).loss_unit == "nats per token"
    own = _bytes_of(job.data.tokenizer) if has_likelihoods else None
    return found if own is None else (*found, own)
