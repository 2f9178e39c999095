"""Whether a model keeps documents that share a row apart.

A model is told by `position_ids`, which start at 0 in every document. Decoder models of transformers make a mask of
them (`masking_utils.find_packed_sequence_indices`) as long as there is neither a cache nor another mask; what a model
really does is found out by trying.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from strategies.trial.leaks import differ, logits, nothing_hidden


def refuse_without_positions(model: nn.Module) -> None:
    """Raises ValueError when the model cannot be told where documents begin."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            "data.document_mask: true needs a model that is told where documents begin, and the forward of "
            f"{type(model).__name__} takes no position_ids (int64 [batch, length], from 0 at each document); "
            "give it that argument and let it keep attention within documents, or set document_mask: false"
        )


def refuse_leaks(model: nn.Module, device: torch.device) -> None:
    """Raises ValueError when the model, whole and with its weights, takes positions and yet lets a document attend to
    the one before: then another first document changes what the second gives. Computed in fp32."""
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device)
    with nothing_hidden(model):
        one, two = (
            logits(model, torch.tensor([[*first, 1, 2, 3, 1]], device=device), places)[:, 3:]
            for first in ([1, 2, 3], [3, 3, 1])
        )
    if differ(one, two):
        raise ValueError(
            f"data.document_mask: true, but in {type(model).__name__} what a document gives depends on the document "
            "before it in its row: it does not start attention anew where position_ids start at 0; use a model that "
            "does, or set document_mask: false"
        )
