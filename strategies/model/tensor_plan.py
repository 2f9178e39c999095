"""How a model is split over tensor-parallel ranks: its own plan (`tp_plan`), read strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from strategies.model.cutting import shared_reason
from strategies.model.parameters import sites_of, split_ties, trained_parameters

SPLIT: dict[str, tuple[int, int, int | None]] = {
    "colwise": (0, 1, 0),
    "colwise_rep": (0, 1, 0),
    "colwise_gather_output": (0, 1, 0),
    "rowwise": (1, 0, None),
    "rowwise_split_input": (1, 0, None),
    "embedding_rowwise": (1, 0, None),
    "embedding_colwise": (0, 1, None),
}
"""The dimension that each style splits: of a Linear's weight, of an Embedding's weight, of a bias."""
REDUCED = ("replicated_with_grad_allreduce",)
"""Styles of modules that are whole everywhere but see a part of the activations only: their gradients are added up."""


def read_styles(model: nn.Module) -> dict[str, str]:
    """The style of every module that the model's plan splits. Raises ValueError where it has none or an unknown one."""
    plan: Mapping[str, str] | None = getattr(model, "tp_plan", None)
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no tp_plan, which says how its modules are split: use tensor: 1, or a model "
            "with one (the decoder models of transformers have it; a model.factory may give its module one)"
        )
    patterns = [(re.compile(re.escape(p).replace(r"\*", r"[^.]+")), style) for p, style in plan.items()]
    styles = {}
    for name, module in model.named_modules():
        style = next((style for pattern, style in patterns if pattern.fullmatch(name)), None)
        if style is None or not list(module.parameters(recurse=False)):
            continue
        if style not in SPLIT and style not in REDUCED:
            known = ", ".join((*SPLIT, *REDUCED))
            raise ValueError(
                f"the tp_plan gives {name} the style {style!r}, which is not supported; supported: {known}"
            )
        styles[name] = style
    _refuse_whole_layers(model, styles)
    _agree_on_ties(model, styles)
    return styles


def _agree_on_ties(model: nn.Module, styles: dict[str, str]) -> None:
    """A table that is the head, too, is split once: by tokens, which both can be. Raises ValueError for a plan that
    wants it split in two ways."""
    sites, aliased = split_ties(model, sites_of(model, trained_parameters(model)))
    for alias, name in aliased.items():
        tables, heads = ([owner for owner, _ in sites[each]] for each in (name, alias))
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


def _refuse_whole_layers(model: nn.Module, styles: Mapping[str, str]) -> None:
    """A plan that splits the embedding or the head only would have every rank compute every layer."""
    split = [name for name, style in styles.items() if style in SPLIT]
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if any(name.startswith(f"{layers}.") for name in split for layers in lists) or (split and not lists):
        return
    raise ValueError(
        f"the tp_plan of {type(model).__name__} splits {', '.join(split) or 'no module'} and nothing in its layers, "
        "which every rank would compute whole; use tensor: 1"
    )


def parallel_style(style: str, module: nn.Module, *, stays_split: bool) -> Any:
    """What torch calls a style. With `stays_split` what a module of split columns gives is not put together, where
    the style would have it so."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if style in ("embedding_rowwise", "rowwise_split_input"):
        return RowwiseParallel(input_layouts=Replicate())
    if style == "rowwise":
        return RowwiseParallel()
    if style == "colwise":
        return ColwiseParallel()
    if stays_split:
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return ColwiseParallel(output_layouts=Replicate())


def check_tensor(model: nn.Module, degree: int) -> None:
    """Raises ValueError when the model, which may be without weights, cannot be split over `degree` ranks."""
    read_styles(model)
    sites, _ = split_ties(model, sites_of(model, trained_parameters(model)))
    if shared := [names for names in sites.values() if len(names) > 1]:
        raise ValueError(shared_reason("tensor", degree, [".".join(filter(None, site)) for site in shared[0]]))
