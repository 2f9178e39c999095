"""For how many tokens a model has positions, by its transformers configuration."""

from __future__ import annotations

from typing import Any

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""How configurations spell it: most families; gpt2, gptj and codegen; mpt."""


def positions_of(config: Any) -> int | None:
    """The most tokens of a row that a model with this configuration (an object, or a mapping) was made for; None where
    it does not say, or has no limit. Scaled rotary embeddings are within it: configurations state the extended length.
    """
    found = limit_of(config)
    return None if found is None else found[1]


def limit_of(config: Any) -> tuple[str, int] | None:
    """`positions_of`, with the name of the field that says so before it."""
    for part in (config, _read(config, "text_config")):
        for field in _FIELDS:
            value = _read(part, field)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return field, value
    return None


def too_long(sequence_length: int, config: Any) -> str | None:
    """What is wrong with rows of `sequence_length` tokens for a model of this configuration; None: nothing."""
    found = limit_of(config)
    if found is None or sequence_length <= found[1]:
        return None
    field, most = found
    return (
        f"data.sequence_length {sequence_length} is more than the {most} positions of the model ({field} in model.hf): "
        f"set it to {most} or less, or give the model more positions"
    )


def _read(part: Any, field: str) -> Any:
    return part.get(field) if isinstance(part, dict) else getattr(part, field, None)
