"""How a model is split over tensor-parallel ranks: its own plan (`tp_plan`), read strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from strategies.model.parameters import place_of, sites_of, split_ties, trained_parameters

SPLIT: dict[str, tuple[int, int, int | None]] = {
    "colwise": (0, 1, 0),
    "colwise_rep": (0, 1, 0),
    "colwise_gather_output": (0, 1, 0),
    "rowwise": (1, 0, None),
    "rowwise_split_input": (1, 0, None),
    "embedding_rowwise": (1, 0, None),
    "embedding_colwise": (0, 1, None),
    "rowwise_rep": (1, 0, None),
}
"""The dimension that each style splits: of a Linear's weight, of an Embedding's weight, of a bias."""
REDUCED = ("replicated_with_grad_allreduce",)
"""Styles of modules that are whole everywhere but see a part of the activations only: their gradients are added up."""
EXPERTS = "moe_tp_experts"
ADDED_UP = (EXPERTS, "all_reduce")
"""Styles of modules of stacked experts: each rank has a part of every expert, as styles of their parameters say, and
what they give is a part of a sum."""
LOCAL = "local_params"
"""The style of a module that has parameters of its own beside those of modules inside, one for each head, say."""
IDENTITY = "moe_identity_expert"
"""The style of an expert that gives what it is given, on every rank, and so has too large a part of the sum."""
STACKED: dict[str, tuple[int, int]] = {
    "colwise": (-2, 1),
    "rowwise": (-1, 1),
    "packed_colwise": (-2, 2),
    "packed_rowwise": (-1, 2),
}
"""Of a stack of matrices, one for each expert, the dimension that a style splits, and how many matrices that has end to
end, each of which is split."""
WHOLE = ("mla_kv_a_proj",)
"""Styles of modules that are whole everywhere, and of what they give a part goes into what is split without more ado
(see `strategies.model.partial_sums`)."""
KNOWN = (*SPLIT, *REDUCED, *ADDED_UP, *WHOLE, LOCAL, IDENTITY, "replicate")


class NothingSaid(ValueError):
    """A model has no plan, or one that splits next to nothing."""


@dataclass(frozen=True)
class TensorPlan:
    """`styles` are those of modules, `stacks` what is split of parameters that are computed with as they are, by name:
    the dimension and how many matrices it has (see STACKED). The outputs of linear modules in `sums` are parts of a
    sum; `counts` are whole numbers that modules have, which are divided by the degree."""

    styles: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sums: frozenset[str] = frozenset()
    counts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def split_linears(self) -> list[str]:
        """The linear modules that are split by what they give, though not by a style."""
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.stacks)
        return [owner for owner in owners if owner not in self.sums and owner not in self.styles]

    def is_distributed(self, name: str) -> bool:
        """Whether modules compute with a parameter as a DTensor; otherwise with this rank's share as it is."""
        return self.styles.get(name.rpartition(".")[0]) in SPLIT

    def is_reduced(self, name: str) -> bool:
        """Whether a parameter's gradient is only this coordinate's part of it."""
        return self.styles.get(name.rpartition(".")[0]) in REDUCED

    def dim_of(self, name: str, *, is_embedding: bool) -> int | None:
        """The dimension that is split of a parameter."""
        if name in self.stacks:
            return self.stacks[name][0]
        owner, _, key = name.rpartition(".")
        style = self.styles.get(owner)
        if style not in SPLIT:
            return None
        linear, embedding, bias = SPLIT[style]
        if key == "bias":
            return bias
        return embedding if is_embedding else linear

    @property
    def packs(self) -> dict[str, int]:
        """How many matrices the split dimension has end to end, where it has more than one."""
        return {name: packs for name, (_, packs) in self.stacks.items() if packs > 1}


def check_divides(model: nn.Module, plan: TensorPlan, degree: int) -> None:
    """Raises ValueError where what the plan splits, trained or not, does not divide by the degree, naming that."""
    uneven = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        dim = plan.dim_of(name, is_embedding=isinstance(owner, nn.Embedding))
        if dim is not None and parameter.shape[dim] % (degree * plan.packs.get(name, 1)):
            uneven.append(f"{name} {list(parameter.shape)} in dimension {dim % parameter.dim()}")
    for owner_name, attributes in plan.counts.items():
        module = model.get_submodule(owner_name)
        counts = ((attribute, getattr(module, attribute)) for attribute in attributes)
        uneven += [f"{owner_name}.{attribute} = {value}" for attribute, value in counts if value % degree]
    if uneven:
        more = f" and {len(uneven) - 5} more" if len(uneven) > 5 else ""
        raise ValueError(f"tensor {degree} does not divide {'; '.join(uneven[:5])}{more}")


def read_tensor_plan(model: nn.Module) -> TensorPlan:
    """What the model's plan splits. Raises ValueError where it has none, or one with an unknown style."""
    plan: Mapping[str, str] | None = getattr(model, "tp_plan", None)
    if not plan:
        raise NothingSaid(
            f"{type(model).__name__} has no tp_plan, which says how its modules are split: use tensor: 1, or a model "
            "with one (the decoder models of transformers have it; a model.factory may give its module one)"
        )
    patterns = [(re.compile(re.escape(p).replace(r"\*", r"[^.]+")), style) for p, style in plan.items()]
    styles = {}
    for name, module in model.named_modules():
        style = next((style for pattern, style in patterns if pattern.fullmatch(name)), None)
        if style in (None, "replicate"):
            continue
        if style not in KNOWN:
            raise ValueError(
                f"the tp_plan gives {name} the style {style!r}, which is not supported; supported: {', '.join(KNOWN)}"
            )
        if style in SPLIT and list(module.children()):
            _refuse_more(name, module, style)
        elif style == IDENTITY or list(module.parameters(recurse=False)):
            styles[name] = style
    stacks = _read_stacks(model, patterns, styles)
    styles |= dict.fromkeys(_learned_activations(model, styles), REDUCED[0])
    _refuse_whole_layers(model, styles)
    agree_on_ties(model, styles)
    return TensorPlan(styles, stacks)


def _learned_activations(model: nn.Module, styles: Mapping[str, str]) -> list[str]:
    """Modules that plans forget (that of apertus does): beside one that is split by what it gives and one that is split
    by what it is given, with parameters that are single numbers. They are activation functions between these two, so
    each rank's gradient is that of its part of the activations."""
    beside: dict[str, set[str]] = {}
    for name, style in styles.items():
        beside.setdefault(name.rpartition(".")[0], set()).add(style)
    return [
        name
        for name, module in model.named_modules()
        if name not in styles
        and {"colwise", "rowwise"} <= beside.get(name.rpartition(".")[0], set())
        and (own := list(module.parameters()))
        and all(parameter.numel() == 1 for parameter in own)
    ]


def _refuse_more(name: str, module: nn.Module, style: str) -> None:
    """A table that does more than to look up is left whole; a linear module that does more is not known."""
    if not isinstance(module, nn.Embedding):
        raise ValueError(
            f"the tp_plan gives {name} ({type(module).__name__}) the style {style!r}, but it has modules inside, which "
            "would see a part of the activations; use tensor: 1"
        )


def _read_stacks(
    model: nn.Module, patterns: list[tuple[re.Pattern[str], str]], styles: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    stacks: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        style = next((style for pattern, style in patterns if pattern.fullmatch(name)), None)
        owner = styles.get(name.rpartition(".")[0])
        is_stacked, is_local = owner in ADDED_UP, owner == LOCAL
        if style == "replicate" or (style is None and not is_stacked):
            continue
        if is_local and style == "colwise" and parameter.dim() == 1:
            stacks[name] = (0, 1)
            continue
        if not is_stacked or style not in STACKED or parameter.dim() != 3:
            raise ValueError(
                f"the tp_plan gives the parameter {name} {list(parameter.shape)} the style {style!r}; supported are "
                f"{', '.join(STACKED)}, of stacks of matrices in a module with the style "
                f"{' or '.join(ADDED_UP)}, and colwise, of a vector in one with the style {LOCAL}"
            )
        dim, packs = STACKED[style]
        stacks[name] = (dim % parameter.dim(), packs)
    return stacks


def agree_on_ties(model: nn.Module, styles: dict[str, str]) -> None:
    """A table that is the head, too, is split once: by tokens, which both can be. Raises ValueError for a plan that
    wants it split in two ways."""
    sites, aliased = split_ties(model, sites_of(model, trained_parameters(model)))
    for alias, name in aliased.items():
        owners = [owner for each in (name, alias) for owner, _ in sites[each]]
        tables = [owner for owner in owners if isinstance(model.get_submodule(owner), nn.Embedding)]
        heads = [owner for owner in owners if owner not in tables]
        if not any(styles.get(owner) in SPLIT for owner in (*tables, *heads)):
            continue
        for owner in tables:
            styles.setdefault(owner, "embedding_rowwise")
        for owner in heads:
            styles.setdefault(owner, "colwise_gather_output")
        dims = {SPLIT[styles[owner]][1] for owner in tables} | {SPLIT[styles[owner]][0] for owner in heads}
        if len(dims) > 1:
            raise ValueError(
                f"the tp_plan of {type(model).__name__} splits {name} by tokens in one of its two uses and by width in "
                f"the other ({', '.join(f'{owner}: {styles[owner]}' for owner in (*tables, *heads))}); untie them"
            )


def split_in_two(model: nn.Module, plan: TensorPlan) -> list[str]:
    """The trained parameters that modules share, but for an embedding that is the head, and the plan splits."""
    sites, _ = split_ties(model, sites_of(model, trained_parameters(model)))
    return [
        place_of(places[0])
        for places in sites.values()
        if len(places) > 1
        and any(
            plan.dim_of(place_of(site), is_embedding=isinstance(model.get_submodule(site[0]), nn.Embedding)) is not None
            for site in places
        )
    ]


def _refuse_whole_layers(model: nn.Module, styles: Mapping[str, str]) -> None:
    """A plan that splits the embedding or the head only would have every rank compute every layer."""
    split = [name for name, style in styles.items() if style in SPLIT or style in ADDED_UP]
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if any(name.startswith(f"{layers}.") for name in split for layers in lists) or (split and not lists):
        return
    raise NothingSaid(
        f"the tp_plan of {type(model).__name__} splits {', '.join(split) or 'no module'} and nothing in its layers, "
        "which every rank would compute whole; use tensor: 1"
    )


def is_linear(module: nn.Module) -> bool:
    """Also GPT-2's kind, whose weight is the other way round (transformers.pytorch_utils.Conv1D)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def out_dim(module: nn.Module) -> int:
    """The dimension of a linear module's weight that counts what it gives."""
    return 0 if isinstance(module, nn.Linear) else 1


def in_dim(module: nn.Module) -> int:
    """The one that counts what it is given."""
    return 1 - out_dim(module)


def parallel_style(style: str, module: nn.Module, *, stays_split: bool) -> Any:
    """What torch calls a style. With `stays_split` what a module of split columns gives is not put together, where
    the style would have it so."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if style in ("embedding_rowwise", "rowwise_split_input", "rowwise_rep"):
        return RowwiseParallel(input_layouts=Replicate())
    if style == "rowwise":
        return RowwiseParallel()
    if style == "colwise":
        return ColwiseParallel()
    if stays_split:
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return ColwiseParallel(output_layouts=Replicate())
