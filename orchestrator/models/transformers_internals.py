"""What is used of transformers that it does not promise: how the tensors of a saved model become those of the model.
It stands here and nowhere else; `tests/unit/test_reading.py` pins what is relied upon.

A saved model may have other names than the class has today, and other tensors: experts one by one that are one stack
now, projections apart that are one matrix now. Transformers keeps that as a list of renamings and of converters.
"""

from __future__ import annotations

import copy
import inspect
import sys
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


def router_places(model: Any) -> dict[str, int]:
    """The modules of a model of transformers that give the logits by which a token's experts are chosen, by name, in
    module order: as which element of what they give."""
    from transformers import PreTrainedModel

    found: dict[str, int] = {}

    def look(module: Any, name: str, recorders: list[Any]) -> None:
        if isinstance(module, PreTrainedModel):
            recorders = _recorders(module)
        for recorder in recorders:
            is_of_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
            is_named = recorder.class_name is not None and name.endswith(recorder.class_name)
            layer = recorder.layer_name
            if (is_of_class or is_named) and (layer is None or f".{layer.strip('.')}." in f".{name}."):
                found[name] = recorder.index
        for key, child in module.named_children():
            look(child, f"{name}.{key}" if name else key, recorders)

    look(model, "", [])
    order = [name for name, _ in model.named_modules() if name in found]
    return {name: found[name] for name in order}


def _recorders(model: Any) -> list[Any]:
    """How a model records what its routers give."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

    specs = _CAN_RECORD_REGISTRY.get(model).get("router_logits", [])
    return [
        each if isinstance(each, OutputRecorder) else OutputRecorder(target_class=each, index=1)
        for each in (specs if isinstance(specs, list) else [specs])
    ]


def balances_as_usual(model: Any) -> bool:
    """Whether the class adds to its loss that of its routers, in the form that most have: of all layers together."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    expected = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    return function is not None and list(inspect.signature(function).parameters) == expected
