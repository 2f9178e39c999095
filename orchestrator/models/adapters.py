"""Adapters: a few trained parameters beside frozen ones (LoRA and its kin), made by peft in the model itself.

Their first values are keyed by (seed, name), like those of everything else. The model computes as it did before at step
0, to the bit: the second matrix of each pair begins as zeros (Hu et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from orchestrator.job.sections.adapter import Adapter
from orchestrator.models.problems import ModelError, reason_of, refused

if TYPE_CHECKING:
    import torch
    from torch import nn

    from strategies.model.values import Values

NAME = "default"
"""Of the adapter, in peft's words."""
_BASE = ".base_layer."


def peft_config(adapter: Adapter, *, targets: list[str] | str | None, saved: list[str]) -> Any:
    """The adapter as peft's own files describe it. Raises ModelError where peft is not installed."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise refused("needs the package peft (pip install 'peft>=0.21,<0.22')", "adapter") from None
    return LoraConfig(
        r=adapter.r, lora_alpha=_whole(adapter.alpha), lora_dropout=adapter.dropout, target_modules=targets,
        use_dora=adapter.name == "dora", use_rslora=adapter.name == "rslora", bias="none",
        modules_to_save=saved or None,
    )  # fmt: skip


def _whole(value: float) -> Any:
    """As an integer, which is what peft's files have, where it is one."""
    return int(value) if value == int(value) else value


def add_adapter(model: nn.Module, adapter: Adapter, also: Iterable[str] = ()) -> None:
    """Puts an adapter into a model and freezes the rest, but for `modules_to_save` and the modules `also` named. All
    parameters may be on the meta device. Raises ModelError for modules that there are not."""
    from peft import inject_adapter_in_model
    from torch.nn import Linear

    from orchestrator.models.initialisation import without_parameters

    saved = [*adapter.modules_to_save, *also]
    config = peft_config(adapter, targets=adapter.target_modules, saved=saved)
    before = {name for name, _ in model.named_modules()}
    for name in saved:
        if not any(_ends_with(each, name) for each in before):
            raise refused(f"names {name!r}, and the model has no module of that name", "adapter.modules_to_save")
    config.modules_to_save = None  # Those stay as they are, and are trained.
    try:
        with without_parameters():
            inject_adapter_in_model(config, model, adapter_name=NAME)
    except ModelError:
        raise
    except Exception as error:  # Whatever peft says of modules that it does not find, or cannot adapt.
        there = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, Linear)})
        raise refused(
            f"peft cannot adapt this model: {reason_of(error)} (its linear modules are called {', '.join(there)})",
            "adapter.target_modules",
        ) from error
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        parameter.requires_grad_("lora_" in name or any(_is_inside(owner, each) for each in saved))


def _ends_with(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _is_inside(owner: str, wanted: str) -> bool:
    """Whether a module of this name is, or is in, one that is wanted by its last parts."""
    parts = owner.split(".")
    return any(_ends_with(".".join(parts[:stop]), wanted) for stop in range(1, len(parts) + 1))


def base_name(name: str) -> str:
    """What a parameter of an adapted model is called without adapter."""
    return name.replace(_BASE, ".")


def is_of_adapter(name: str) -> bool:
    """Whether a parameter is one that an adapter brings."""
    return ".lora_" in name


class AdaptedValues:
    """First values of an adapted model: of the `base`, and of the adapter from the seed. See `Values`."""

    def __init__(self, base: Values, model: nn.Module, seed: int) -> None:
        self._base, self._seed = base, seed
        self._shapes = {name: p.shape for name, p in model.named_parameters() if is_of_adapter(name)}

    def read(self, name: str) -> torch.Tensor:
        """See `Values`."""
        return self._first(name) if name in self._shapes else self._base.read(base_name(name))

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Values`."""
        if name in self._shapes:
            return self._first(name).reshape(-1)[start:stop]
        return self._base.read_range(base_name(name), start, stop)

    def is_at_hand(self, name: str) -> bool:
        """See `Values`."""
        return name in self._shapes or self._base.is_at_hand(base_name(name))

    def forget(self) -> None:
        """See `Values`."""
        self._base.forget()

    @property
    def is_stored(self) -> bool:
        """See `Values`: those of the base are, which alone are frozen."""
        return self._base.is_stored

    def _first(self, name: str) -> torch.Tensor:
        """As peft has them (`LoraLayer.reset_lora_parameters`)."""
        import torch
        from torch import nn

        from strategies.model.randomness import seed_stream

        shape = self._shapes[name]
        if "lora_magnitude_vector" in name:
            # The norms of rows of the frozen matrix (Liu et al. 2024, DoRA, section 4).
            weight = self._base.read(f"{name.split('.lora_magnitude_vector')[0]}.weight")
            norms: torch.Tensor = torch.linalg.norm(weight.float(), dim=1).reshape(shape)
            return norms
        values = torch.zeros(shape)
        is_random = ".lora_A." in name or ".lora_embedding_B." in name
        if is_random:
            states = torch.get_rng_state()
            try:
                seed_stream(self._seed, "initialisation", name)
                if ".lora_A." in name:
                    nn.init.kaiming_uniform_(values, a=math.sqrt(5))
                else:
                    nn.init.normal_(values)
            finally:
                torch.set_rng_state(states)
        return values
