"""Whether a model, which may be without weights, can be cut into pipeline stages."""

from __future__ import annotations

from torch import nn

from strategies.model.anatomy import find_layers
from strategies.model.parameters import Sites, sites_of, split_ties, trained_parameters


class Cuts:
    """What of a model, which may be without weights, is known of cutting it."""

    def __init__(self, model: nn.Module) -> None:
        self._layers, self._cannot_cut = find_layers(model)
        self._sites = split_ties(model, sites_of(model, trained_parameters(model)))[0]
        self._number = len(model.get_submodule(self._layers)) if self._layers else 0  # type: ignore[arg-type]

    def check(self, stages: int, parts: int) -> None:
        """Raises ValueError when the model cannot be cut into `parts` model parts: those of all `stages`."""
        refuse_cut(self._cannot_cut, self._sites, stages)
        if parts > self._number:
            raise ValueError(
                f"pipeline {stages} needs at least {parts} layers for its model parts; {self._layers} has "
                f"{self._number}"
            )


def refuse_cut(cannot_cut: str, sites: Sites, stages: int) -> None:
    if cannot_cut:
        raise ValueError(f"pipeline {stages} needs to know where the model can be cut: {cannot_cut}")
    if shared := [name for name, places in sites.items() if len(places) > 1]:
        raise ValueError(shared_reason("pipeline", stages, shared))


def shared_reason(what: str, degree: int, shared: list[str]) -> str:
    return (
        f"{what} {degree} cannot be used with parameters that two modules share: {', '.join(shared)}. "
        "Untie them (for transformers: tie_word_embeddings: false; for a directory, model.untie: true)"
    )
