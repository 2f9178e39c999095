"""Whether a model, which may be without weights, can be cut into pipeline stages, and split as a plan says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from strategies.model.anatomy import NotInTurn, find_layers
from strategies.model.model_stages import Stages
from strategies.model.parameters import Sites, made_up_values, place_of, sites_of, split_ties, trained_parameters
from strategies.model.randomness import stream_key
from strategies.model.tensor_plan import TensorPlan, check_divides, split_in_two

_LARGEST = 50_000_000
"""Parameters of a model that is quickly computed with made-up values."""


class Cuts:
    """What of a model, which may be without weights, is known of cutting it."""

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._layers, self._cannot_cut = find_layers(model)
        self._sites = split_ties(model, sites_of(model, trained_parameters(model)))[0]
        self._stages = Stages(
            model, self._layers, _made_up, body=None, dtype=torch.float32, device=torch.device("cpu"),
            unused=frozenset(),
        )  # fmt: skip
        self._is_small = sum(parameter.numel() for parameter in model.parameters()) <= _LARGEST

    def check(self, stages: int, parts: int) -> None:
        """Raises ValueError when the model cannot be cut into `parts` model parts: those of all `stages`. That of a
        large one two stages give what the whole gives is not tried."""
        refuse_cut(self._cannot_cut, self._sites, self._layers, stages)
        number = self._stages.num_layers
        if parts > number:
            raise ValueError(
                f"pipeline {stages} needs at least {parts} layers for its model parts; {self._layers} has {number}"
            )
        check_cut(self._stages, self._sites, self._name, stages, computes=self._is_small)

    @property
    def order(self) -> Sequence[int] | None:
        """The numbers of the layers as a pass computes them; None where that is not known."""
        if self._layers is None:
            return None
        try:
            self._stages.anatomy()
        except NotInTurn as error:
            return error.calls
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # Whatever a model raises that is computed without some of its layers.
            return None
        return range(self._stages.num_layers)


def _made_up(place: str, parameter: nn.Parameter, is_fake: bool) -> torch.Tensor:
    if is_fake:
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
    else:
        value = made_up_values(parameter.shape, stream_key("made up", place), torch.device("cpu"), parameter.dtype)
    return value.requires_grad_(value.is_floating_point())


def refuse_cut(cannot_cut: str, sites: Sites, layers: str | None, stages: int) -> None:
    """Raises ValueError for what is known of a model without computing it."""
    if cannot_cut:
        raise ValueError(f"pipeline {stages} needs to know where the model can be cut: {cannot_cut}")
    if shared := [name for name, places in sites.items() if len({_layer_of(owner, layers) for owner, _ in places}) > 1]:
        raise ValueError(shared_reason("pipeline", stages, shared))


def check_cut(stages: Stages, sites: Sites, name: str, degree: int, *, computes: bool = True) -> None:
    """Raises ValueError for a model of this name whose `stages` do not give what it gives whole, or share a trained
    parameter."""
    shared = []
    with torch.random.fork_rng():
        try:
            anatomy = stages.anatomy()
            for each, places in sites.items():
                used = {place_of(site) for site in places}
                if used & anatomy.before and used & anatomy.after:
                    shared.append(each)
            if computes and not shared:
                stages.check()
        except (MemoryError, torch.OutOfMemoryError):
            raise  # There may be more elsewhere: it says nothing of the model.
        except NotInTurn as error:
            raise ValueError(f"pipeline {degree} needs to know where the model can be cut: {error}") from error
        except Exception as error:  # Whatever a model raises that is given something else than by itself.
            first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
            said = str(error) if isinstance(error, ValueError) else f"in parts it fails: {first_line}"
            raise ValueError(f"pipeline {degree} cannot be used with {name}: {said}") from error
    if shared:
        raise ValueError(shared_reason("pipeline", degree, shared))


def check_split(model: nn.Module, plan: TensorPlan, degree: int) -> None:
    """Raises ValueError for a model that cannot be split by the plan over `degree` ranks."""
    if shared := split_in_two(model, plan):
        raise ValueError(shared_reason("tensor", degree, shared))
    check_divides(model, plan, degree)


def _layer_of(owner: str, layers: str | None) -> str:
    """The number of the layer that a module is in; empty for one beside the layers."""
    return owner[len(layers) + 1 :].partition(".")[0] if layers and owner.startswith(f"{layers}.") else ""


def shared_reason(what: str, degree: int, shared: Sequence[str]) -> str:
    return (
        f"{what} {degree} cannot be used with parameters that two modules share: {', '.join(shared)}. "
        "Untie them (for transformers: tie_word_embeddings: false; for a directory, model.untie: true)"
    )
