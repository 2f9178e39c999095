"""What is used of transformers that it does not promise: how the tensors of a saved model become those of the model.
It stands here and nowhere else; `tests/unit/test_reading.py` pins what is relied upon.

A saved model may have other names than the class has today, and other tensors: experts one by one that are one stack
now, projections apart that are one matrix now. Transformers keeps that as a list of renamings and of converters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Recipe:
    """How tensors of a saved model become one of the model's, or several: by being it (`converter` is None), or by a
    conversion of all `sources`, each a (name, pattern)."""

    first_target: str
    sources: list[tuple[str, str | None]]
    converter: Any = None

    def convert(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors by name, of those that `read` gives. Raises RuntimeError when they do not fit."""
        if self.converter is None:
            return {self.first_target: read(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first_target, name, pattern, read(name))
        told = _report(set(), set())
        found = converter.convert(self.first_target, model=model, config=model.config, loading_info=told)
        if told.conversion_errors:
            raise RuntimeError("; ".join(map(str, told.conversion_errors.values())))
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


@dataclass
class Plan:
    """The recipes, and what is left over: names in the saved model that the model has no place for, and names in the
    model that nothing is there for."""

    recipes: list[Recipe] = field(default_factory=list)
    unexpected: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)


def plan_reading(model: Any, names: Iterable[str]) -> Plan:
    """How the tensors of a saved model, by these names, become those of `model` (which may be on the meta device)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    there = model.state_dict()
    recipes: dict[str, Recipe] = {}
    plan = Plan(missing=set(there))
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
        if target not in there and name in there:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, there)
        if target in there:
            recipe = recipes.setdefault(
                target, Recipe(target, [], None if pattern is None else by_pattern[pattern])
            )  # fmt: skip
            recipe.sources.append((name, pattern))
        elif pattern is not None:
            targets = by_pattern[pattern].target_patterns
            plan.unexpected.update(target.replace(targets[0], each) for each in targets)
        else:
            plan.unexpected.add(target)
    plan.recipes = list(recipes.values())
    return plan


def adjust(model: Any, plan: Plan) -> None:
    """Takes out of what is left over what the model's class says that it does not matter."""
    info = _report(plan.missing, plan.unexpected)
    model._adjust_missing_and_unexpected_keys(info)
    plan.missing, plan.unexpected = set(info.missing_keys), set(info.unexpected_keys)


def _report(missing: set[str], unexpected: set[str]) -> Any:
    from transformers.utils.loading_report import LoadStateDictInfo

    return LoadStateDictInfo(
        missing_keys=missing, unexpected_keys=unexpected, mismatched_keys=set(), conversion_errors={}, error_msgs=[],
        skipped_pp_keys=set(),
    )  # fmt: skip


def untie(model: Any, name: str) -> None:
    """Says of a parameter that it is not tied any more."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied.pop(name, None)
