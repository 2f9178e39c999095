"""Models that give a few numbers for a text instead of words: transformers' models for sequence classification."""

from __future__ import annotations

from typing import Any

from orchestrator.models.problems import refused

NEW = ("score.*",)
"""The tensors of a new head, which a directory of a language model lacks."""
LEFT_OUT = ("lm_head.*", "embed_out.*", "output_projection.*")
"""The head of a language model, which such a model has no place for."""


def give_hidden_states(model: Any) -> Any:
    """Has a model without head give its hidden states alone, [batch, length, width]. Only its class is another."""
    kind = type(model)

    def forward(self: Any, *given: Any, **more: Any) -> Any:
        return kind.forward(self, *given, **more)[0]

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def give_every_position(model: Any) -> Any:
    """Has a model for sequence classification give its logits at every position, [batch, length, outputs], and not of
    the last one that is no padding, which it would tell by ids: which one counts, the objective knows.

    Only its class is another; names of parameters, and what is saved, are as before. Raises ModelError for model types
    whose classification is more than a matrix behind the hidden states.
    """
    from transformers.modeling_layers import GenericForSequenceClassification

    kind = type(model)
    if not isinstance(model, GenericForSequenceClassification):
        raise refused(
            f"models of type {model.config.model_type} classify texts in a way of their own ({kind.__name__}); what is "
            "supported is a causal model with a matrix behind its hidden states",
            "model",
        )

    def forward(self: Any, input_ids: Any = None, **more: Any) -> Any:
        more.pop("labels", None)
        hidden = getattr(self, self.base_model_prefix)(input_ids=input_ids, **more)[0]
        return self.score(hidden)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model
