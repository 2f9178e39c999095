"""How a model that does not say it, or says next to nothing, can be split over tensor-parallel ranks: found by trying.

In a pass through a layer, linear modules that are given the same tensor (queries, keys and values; the two halves of a
gated network) are followed by one that is given something else. The first are split by what they give, the last by what
it is given, and its outputs are a sum over ranks (Shoeybi et al. 2019, "Megatron-LM", section 3). What lies between may
count heads: whole numbers of the modules around, which are divided, too. Whether that is right is tried with two ranks,
one after the other: the sum must give what the whole model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strategies.layout.space import Cut
from strategies.model.anatomy import find_layers, kinds_of
from strategies.model.cutting import check_split
from strategies.model.head import logits_of
from strategies.model.parameters import sites_of, split_ties, trained_parameters
from strategies.model.tensor_plan import (
    NothingSaid,
    TensorPlan,
    agree_on_ties,
    in_dim,
    is_linear,
    out_dim,
    read_tensor_plan,
)
from strategies.trial.copies import Copies
from strategies.trial.stacks import with_tried_stacks

PACKS = (1, 3, 2)
"""How many matrices may stand end to end in one: queries, keys and values; the two of a gated network."""
_CLOSE = 1e-4
_TOKENS = (1, 2, 3, 1, 2, 0)
_LARGEST = 300_000_000
_EASILY_SPLIT = 64
"""A vocabulary that is a multiple of it is split, as any usual degree divides it."""


class CannotDerive(ValueError):
    """Why no way to split a model was found."""


def tensor_plan_of(model: nn.Module) -> TensorPlan:
    """What the model says, its experts tried, or what is found out. Raises ValueError where there is neither, or what
    it says of experts is wrong."""
    try:
        return with_tried_stacks(model, read_tensor_plan(model))
    except NothingSaid as error:
        try:
            return derive(model)
        except CannotDerive as why:
            raise ValueError(f"{error}; trying it out has not found a way either: {why}") from None


def check_tensor(model: nn.Module, degree: int) -> None:
    """Raises ValueError when the model, which may be without weights, cannot be split over `degree` ranks."""
    check_split(model, tensor_plan_of(model), degree)


@dataclass(frozen=True)
class _Group:
    """Linear modules of a layer, by name in it: those that are given the same, and the one behind them."""

    first: tuple[str, ...]
    last: str


@dataclass(frozen=True)
class _Way:
    """How a group is split: the matrices end to end in each of the first, and (module, attribute) that are divided."""

    packs: int
    counts: tuple[tuple[str, str], ...]


def derive(model: nn.Module) -> TensorPlan:
    """Raises CannotDerive."""
    name, why = find_layers(model)
    if name is None:
        raise CannotDerive(why)
    _refuse_large(model, name)
    # With made-up values: of a module whose own are zeros, as those of the last in a layer may be, all ways work.
    tried: Any = Copies(model, torch.device("cpu"), makes_up=True).make(torch.float32)
    if tried is model:
        raise CannotDerive("the model cannot be copied")
    tried.eval()
    stacks: dict[str, tuple[int, int]] = {}
    sums: set[str] = set()
    counts: dict[str, tuple[str, ...]] = {}
    try:
        trial = _Trial(tried, name)
        for numbers in kinds_of(list(model.get_submodule(name))):  # type: ignore[call-overload]
            layer = tried.get_submodule(f"{name}.{numbers[0]}")
            for group in trial.groups(layer):
                way = trial.find(layer, group)
                if way is not None:
                    for number in numbers:
                        _note(f"{name}.{number}", layer, group, way, stacks, sums, counts)
    except (CannotDerive, MemoryError):
        raise
    except Exception as error:  # Whatever a model raises that is computed in another way than its own.
        raise CannotDerive(f"{type(error).__name__}: {error}") from error
    if not stacks:
        raise CannotDerive("no linear modules of its layers give the same when they are split")
    styles = _vocabulary(model)
    agree_on_ties(model, styles)
    return TensorPlan(styles, stacks, frozenset(sums), counts)


def _refuse_large(model: nn.Module, layers: str) -> None:
    """Raises CannotDerive for what takes too long to try: it is computed here, many times."""
    found: Any = model.get_submodule(layers)
    for layer in found:
        parameters = list(layer.parameters())
        convolutions = {id(p) for part in layer.modules() if isinstance(part, nn.Conv1d) for p in part.parameters()}
        if any(parameter.dim() == 3 and id(parameter) not in convolutions for parameter in parameters):
            raise CannotDerive("its layers have stacks of experts")
        if sum(parameter.numel() for parameter in parameters) > _LARGEST:
            raise CannotDerive(f"its layers have more than {_LARGEST:,} parameters")


def _note(
    prefix: str, layer: nn.Module, group: _Group, way: _Way, stacks: dict[str, tuple[int, int]], sums: set[str],
    counts: dict[str, tuple[str, ...]],
) -> None:  # fmt: skip
    for inner in group.first:
        part = layer.get_submodule(inner)
        stacks[f"{prefix}.{inner}.weight"] = (out_dim(part), way.packs)
        if part.bias is not None:
            stacks[f"{prefix}.{inner}.bias"] = (0, way.packs)
    stacks[f"{prefix}.{group.last}.weight"] = (in_dim(layer.get_submodule(group.last)), 1)
    sums.add(f"{prefix}.{group.last}")
    for owner, attribute in way.counts:
        full = f"{prefix}.{owner}" if owner else prefix
        counts[full] = tuple(dict.fromkeys((*counts.get(full, ()), attribute)))


def _vocabulary(model: Any) -> dict[str, str]:
    """The styles of embedding and head, where they divide easily."""
    if not hasattr(model, "get_output_embeddings"):
        return {}
    names = {id(part): name for name, part in model.named_modules()}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    parts: list[tuple[Any, Any, str]] = [
        (head, nn.Linear, "colwise_gather_output"),
        (table, nn.Embedding, "embedding_rowwise"),
    ]
    sites, _ = split_ties(model, sites_of(model, trained_parameters(model)))
    shared = {owner for places in sites.values() if len(places) > 1 for owner, _ in places}
    return {
        names[id(part)]: style
        for part, kind, style in parts
        if isinstance(part, kind)
        and id(part) in names
        and part.weight.shape[0] % _EASILY_SPLIT == 0
        and names[id(part)] not in shared
    }


# ------------------------------------------------------------------------------------ trying


class _Stop(Exception):
    """What was wanted of a pass is there."""


class _Trial:
    """A model in evaluation mode that is tried out; its layers have this name."""

    def __init__(self, model: Any, layers: str) -> None:
        self._model, self._layers = model, layers
        with torch.no_grad():
            self._expected = self._logits()

    def _logits(self) -> torch.Tensor:
        return logits_of(self._model(input_ids=torch.tensor([_TOKENS])))

    def groups(self, layer: nn.Module) -> list[_Group]:
        """Those that a pass shows, in its order."""
        calls: list[tuple[str, int]] = []
        kept: list[torch.Tensor] = []

        def see(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
                kept.append(given[0])  # So that its address is not given to another.
                calls.append((name, given[0].data_ptr()))

            return hook

        linears = [(name, part) for name, part in layer.named_modules() if is_linear(part)]
        handles = [part.register_forward_pre_hook(see(name)) for name, part in linears]
        with torch.no_grad():
            self._logits()
        for handle in handles:
            handle.remove()
        found: list[_Group] = []
        first: list[str] = []
        at: int | None = None
        for name, pointer in calls:
            if first and pointer != at:
                found.append(_Group(tuple(first), name))
                first, at = [], None
            else:
                first.append(name)
                at = pointer
        return [group for group in found if len({*group.first, group.last}) == len(group.first) + 1]

    def find(self, layer: nn.Module, group: _Group) -> _Way | None:
        """A way in which the sum over two ranks is what the whole model gives."""
        first: list[Any] = [layer.get_submodule(name) for name in group.first]
        last: Any = layer.get_submodule(group.last)
        if last.weight.shape[in_dim(last)] % 2 or self._is_used_between(layer, group):
            return None
        for packs in PACKS:
            if any(part.weight.shape[out_dim(part)] % (2 * packs) for part in first):
                continue
            for counts in _attributes(layer, group, last.weight.shape[in_dim(last)]):
                way = _Way(packs, counts)
                if self._works(layer, group, way):
                    return way
        return None

    def _is_used_between(self, layer: nn.Module, group: _Group) -> bool:
        """Whether trained parameters of others are computed with between the first and the last, or what these gave
        before: each rank would know a part of their gradients only."""
        leaves = []

        def cut(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        seen: list[torch.Tensor] = []

        def stop(module: nn.Module, given: tuple[Any, ...]) -> None:
            seen.append(given[0])
            raise _Stop

        handles = [layer.get_submodule(name).register_forward_hook(cut) for name in group.first]
        handles.append(layer.get_submodule(group.last).register_forward_pre_hook(stop))
        try:
            with torch.enable_grad():
                self._logits()
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        if not seen or not seen[0].requires_grad:
            return True
        found = torch.autograd.grad(seen[0].sum(), [*parameters, *leaves], allow_unused=True)
        return any(each is not None for each in found[: len(parameters)])

    @torch.no_grad()
    def _works(self, layer: nn.Module, group: _Group, way: _Way) -> bool:
        parts: list[torch.Tensor] = []
        last: Any = layer.get_submodule(group.last)

        def note(value: torch.Tensor) -> torch.Tensor:
            parts.append(value)
            raise _Stop

        def add(value: torch.Tensor) -> torch.Tensor:
            total = value + parts[0]
            return total if last.bias is None else total + last.bias

        try:
            with _split(layer, group, way, 1, note):
                self._logits()
        except _Stop:
            pass
        except MemoryError:
            raise  # It says nothing of the model.
        except Exception:  # Whatever comes of numbers of heads that do not fit.
            return False
        if not parts:
            return False
        try:
            with _split(layer, group, way, 0, add):
                found = self._logits()
        except MemoryError:
            raise
        except Exception:
            return False
        scale = float(self._expected.abs().max())
        return bool(torch.allclose(found, self._expected, rtol=_CLOSE, atol=_CLOSE * scale))


def _attributes(layer: nn.Module, group: _Group, width: int) -> Iterator[tuple[tuple[str, str], ...]]:
    """What of the modules around may count heads: nothing; numbers of heads; and widths of all of them, too."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in (*group.first, group.last))
    for owner in list(owners):
        while owner:
            owner = owner.rpartition(".")[0]
            owners.setdefault(owner)
    whole = [
        (owner, name, value)
        for owner in owners
        for name, value in vars(layer.get_submodule(owner)).items()
        if type(value) is int and value > 1 and value % 2 == 0
    ]
    heads = [
        (owner, name) for owner, name, _ in whole if "head" in name and not {"dim", "size", "group"} & _words(name)
    ]
    widths = [(owner, name) for owner, name, value in whole if value == width and (owner, name) not in heads]
    yield ()
    if heads:
        yield tuple(heads)
    if widths:
        yield (*heads, *widths)


def _words(name: str) -> set[str]:
    return {word.rstrip("s") for word in name.split("_")}


@contextmanager
def _split(
    layer: nn.Module, group: _Group, way: _Way, coordinate: int, behind: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """A layer as one of two ranks has it; `behind` makes of what its part of the last module gives, without bias, what
    that gives."""
    undo: list[Callable[[], None]] = []
    try:
        for name in group.first:
            part: Any = layer.get_submodule(name)
            for key, dim in (("weight", out_dim(part)), ("bias", 0)):
                if part._parameters.get(key) is not None:
                    _swap(part._parameters, key, _share(part._parameters[key], dim, way.packs, coordinate), undo)
            if hasattr(part, "nf"):
                _set(part, "nf", part.nf // 2, undo)
        last: Any = layer.get_submodule(group.last)
        weight = _share(last.weight, in_dim(last), 1, coordinate)
        transposed = in_dim(last) == 0
        _set(last, "forward", lambda value: behind(value @ (weight if transposed else weight.t())), undo)
        for owner, attribute in way.counts:
            module = layer.get_submodule(owner)
            _set(module, attribute, getattr(module, attribute) // 2, undo)
        yield
    finally:
        for each in reversed(undo):
            each()


def _share(parameter: torch.Tensor, dim: int, packs: int, coordinate: int) -> nn.Parameter:
    return nn.Parameter(Cut(dim, packs, coordinate, 2).of(parameter.detach()).contiguous(), requires_grad=False)


def _swap(mapping: Any, key: str, value: Any, undo: list[Callable[[], None]]) -> None:
    before = mapping[key]
    mapping[key] = value
    undo.append(lambda: mapping.__setitem__(key, before))


def _set(module: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    own = vars(module)
    if name in own:
        before = own[name]
        undo.append(lambda: own.__setitem__(name, before))
    else:
        undo.append(lambda: own.pop(name))
    own[name] = value
