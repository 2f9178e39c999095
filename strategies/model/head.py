"""The end of a model that makes logits of hidden states, apart from the rest of it.

A causal model of transformers calls its body (`model`, `transformer`) for hidden states, and makes logits of them with
a module and whatever it does to them beside (scaling, caps). So the same forward, with something in place of the body
that gives hidden states at hand, is the head alone, for as few positions as are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn


class Head:
    """Makes logits [..., length, classes] of hidden states [..., length, width], with these trained parameters."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
        self._compute = compute
        # Two modules may share one.
        self.parameters = tuple(dict.fromkeys(parameters))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._compute(hidden)

    @classmethod
    def behind(
        cls, model: nn.Module, forward: Callable[..., Any], body: str, outputs: Any, unused: Collection[str] = ()
    ) -> tuple[torch.Tensor, Head]:
        """The hidden states in the `outputs` of the module `body` of a model, and the head that takes them. No loss
        depends on the `unused` parameters."""
        inside = {id(part) for part in model.get_submodule(body).modules()}
        parameters = [
            p for owner, part in model.named_modules() if id(part) not in inside
            for p in trained_in(owner, part, unused)
        ]  # fmt: skip

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            with _in_place_of(model, body, _replaced(outputs, hidden)):
                return logits_of(forward(input_ids=ids))

        return first_of(outputs), cls(compute, parameters)


def trained_in(owner: str, module: nn.Module, unused: Collection[str]) -> Iterator[nn.Parameter]:
    """The parameters of the module of this name itself, not of those inside, that are trained; without `unused` ones,
    which have no place in a backward pass."""
    for key, parameter in module._parameters.items():
        if parameter is not None and parameter.requires_grad and ".".join(filter(None, (owner, key))) not in unused:
            yield parameter


Score = Callable[[torch.Tensor, Head | None], torch.Tensor]
"""Makes a loss of hidden states and a head, or of logits where the head is not known apart."""


def logits_of(output: Any) -> torch.Tensor:
    """Of what a model gives."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return found


def first_of(outputs: Any) -> torch.Tensor:
    """The hidden states in what a body gives: a tensor, or the first of several."""
    found: torch.Tensor = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    return found


def _replaced(outputs: Any, hidden: torch.Tensor) -> Any:
    if isinstance(outputs, torch.Tensor):
        return hidden
    if isinstance(outputs, dict):
        first, *others = outputs.items()
        return type(outputs)(**{first[0]: hidden, **dict(others)})
    return (hidden, *outputs[1:])


class _in_place_of:
    """Has something else given in place of what a module gives."""

    def __init__(self, model: nn.Module, name: str, outputs: Any) -> None:
        owner, _, self._key = name.rpartition(".")
        self._owner = model.get_submodule(owner)
        self._outputs = outputs

    def __enter__(self) -> None:
        self._module = self._owner._modules[self._key]
        self._owner._modules[self._key] = _Given(self._module, self._outputs)

    def __exit__(self, *unused: object) -> None:
        self._owner._modules[self._key] = self._module


class _Given(nn.Module):
    """Gives what it was made with; whatever else is asked of it, the module knows that it stands for."""

    def __init__(self, module: nn.Module | None, outputs: Any) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = module
        self._outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._outputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"], name)


def find_body(model: nn.Module, layers: str | None, tokens: torch.Tensor) -> str | None:
    """The name of the module that gives the hidden states which the head makes logits of: found by trying on `tokens`
    int64 [batch, length], whose logits must be the same to the last bit when they are made of hidden states that were
    computed before. None when there is none, its hidden states are of other positions, or the head computes with
    parameters of the body, too."""
    if layers is None:
        return None
    parts = layers.split(".")[:-1]
    with torch.no_grad():
        expected = logits_of(model(input_ids=tokens))
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            try:
                hidden, head = Head.behind(model, model.forward, name, model.get_submodule(name)(input_ids=tokens))
                # It depends on hidden states, position by position, and on nothing else.
                same = hidden.shape[:2] == expected.shape[:2] and torch.equal(head(hidden), expected)
                same = same and not torch.equal(head(hidden * 0.5), expected)
                same = same and not _uses_inside(head, hidden, model.get_submodule(name))
            except (MemoryError, torch.OutOfMemoryError):
                raise  # Others may have more, and all are to find the same.
            except Exception:  # Whatever a module raises that is called in another way than its own model does.
                continue
            if same:
                return name
    return None


def _uses_inside(head: Head, hidden: torch.Tensor, body: nn.Module) -> bool:
    inside = [parameter for parameter in body.parameters() if parameter.requires_grad and not parameter.is_meta]
    own = {id(parameter) for parameter in head.parameters}
    inside = [parameter for parameter in inside if id(parameter) not in own]
    if not inside:
        return False
    with torch.enable_grad():
        logits = head(hidden.detach().requires_grad_())
        found = torch.autograd.grad(logits, inside, torch.ones_like(logits), allow_unused=True)
    return any(gradient is not None for gradient in found)
