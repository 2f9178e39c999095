"""What the schema says about a value, in plain words: the reasons, and the names it takes a typo for."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from orchestrator.job.rules import ACROSS_FIELDS, OWN_WORDS, Unknown
from orchestrator.job.yaml_tree import Path, describe

Kind = TypeVar("Kind", bound=BaseModel)

_WANTED = {
    "int": "an integer",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping of fields",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True, slots=True)
class Explained:
    """One mistake of a value. `at_key`: its key is at fault, not what the key is given."""

    path: Path
    reason: str
    at_key: bool = False


def explain(error: ValidationError, root: type[BaseModel], data: object) -> Iterator[Explained]:
    """Pydantic's errors about `data` as a `root`, less those across fields, which the loader finds itself."""
    for detail in error.errors(include_url=False):
        if detail["type"] == ACROSS_FIELDS:
            continue
        path = _path(detail["loc"], data)
        if detail["type"] == "extra_forbidden":
            yield Explained(path, _unknown_field(root, path), at_key=True)
        else:
            yield Explained(path, _reason(detail, root, path))


def default_at(root: type[BaseModel], path: Path) -> Any:
    """The value a field has when the file is silent about it. Raises Unknown when it has none."""
    model = _model_at(root, path[:-1])
    field = model.model_fields.get(str(path[-1])) if model else None
    value = field.get_default(call_default_factory=True) if field else PydanticUndefined
    if value is PydanticUndefined:
        raise Unknown(path)
    return value


def _path(location: tuple[Any, ...], data: Any) -> Path:
    """`location` without the names pydantic gives to the branches of a union."""
    path: list[int | str] = []
    for index, part in enumerate(location):
        is_key = isinstance(data, dict) and part in data
        if is_key or (isinstance(data, list | tuple) and isinstance(part, int)):
            data = data[part]
        elif not (isinstance(data, dict) and index == len(location) - 1):
            continue  # only the last part can be absent: a field that is missing
        path.append(part)
    return tuple(path)


def _reason(detail: ErrorDetails, root: type[BaseModel], path: Path) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    got = f", got {describe(value)}"
    if kind == "missing":
        return "is required, but missing"
    if kind == OWN_WORDS:
        return detail["msg"] + got + did_you_mean(close(value, context.get("choices", ()), 0.6))
    if kind == "literal_error":
        choices = [str(choice) for choice in _choices(_annotation(root, path))]
        listed = f"must be one of {', '.join(choices)}" if len(choices) > 1 else f"can only be {choices[0]}"
        return listed + got + did_you_mean(close(value, choices, 0.6))
    if kind == "finite_number":
        return f"must be a finite number{got}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"must be {words} {context[key]:g}, got {value!r}"
    wanted = _WANTED.get(kind.split("_")[0])
    # A new pydantic may have errors that are not in the tables: its own words are better than none.
    return f"must be {wanted}{got}" if wanted else detail["msg"] + got


OF_OTHERS = {
    "learning_rate": "train.optimizer.lr", "lr_scheduler_type": "train.schedule.name",
    "lr_scheduler": "train.schedule.name", "max_grad_norm": "train.clip_norm", "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs", "max_steps": "train.steps",
    "per_device_train_batch_size": "train.global_batch, of all workers together, and train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch, of all workers together, and train.micro_batch",
    "gradient_checkpointing": "train.recompute: full", "bf16": "train.precision: bf16",
    "model_name_or_path": "model.hf", "base_model": "model.hf", "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length", "sequence_len": "data.sequence_length",
    "sample_packing": "data.packing: pack", "dataset_text_field": "data.field",
    "eval_steps": "evaluation.every_steps", "val_set_size": "evaluation.share", "test_size": "evaluation.share",
    "metric_for_best_model": "evaluation.best.metric", "greater_is_better": "evaluation.best.mode",
    "early_stopping_patience": "evaluation.early_stop.patience", "lora_r": "adapter.r", "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout", "lora_target_modules": "adapter.target_modules",
    "load_in_4bit": "adapter.quantize_base: nf4", "load_in_8bit": "adapter.quantize_base: int8",
    "save_steps": "checkpoint.every_steps", "save_total_limit": "checkpoint.keep", "report_to": "monitoring",
}  # fmt: skip
"""What Trainer, TRL and Axolotl call things (docs/migrating.md)."""


_INSTEAD = "~"
"""Stands for a point before fields of a mapping that may be given in place of a name."""


def _unknown_field(root: type[BaseModel], path: Path) -> str:
    model, key = _model_at(root, path[:-1]), str(path[-1])
    if key in OF_OTHERS:
        return f"unknown field; here it is {OF_OTHERS[key]}"
    here = list(model.model_fields) if model else []
    # Of several places the nearest to the top, and none in entries of lists where there is another, nor in a mapping
    # that may stand in place of a name.
    everywhere = list(_all_fields(root))
    exact = [dotted for dotted in everywhere if dotted.split(".")[-1] == key]
    usual = [dotted for dotted in everywhere if _INSTEAD not in dotted]
    exact = [dotted for dotted in exact if ".0." not in dotted and dotted in usual] or exact
    # A clear typo first, then a field in the wrong section, then whatever is closest.
    for names in (
        close(key, here, 0.75),
        exact,
        close(key, here, 0.6),
        [dotted for dotted in usual if close(key, [dotted.split(".")[-1]], 0.85)],
        [dotted for dotted in everywhere if close(key, [dotted.split(".")[-1]], 0.85)],
    ):
        if names:
            return "unknown field" + did_you_mean(name.replace(_INSTEAD, ".") for name in names)
    return f"unknown field; allowed here: {', '.join(here)}"


def did_you_mean(names: Iterable[str]) -> str:
    """`, did you mean "x"?`, or nothing when there is nothing to suggest."""
    quoted = [f'"{name}"' for name in names]
    return f", did you mean {' or '.join(quoted[:3])}?" if quoted else ""


def close(value: object, names: Iterable[str], cutoff: float) -> list[str]:
    """The one of `names` that `value` is most likely a typo of, if any."""
    return difflib.get_close_matches(value, list(names), 1, cutoff) if isinstance(value, str) else []


def _all_fields(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in root.model_fields.items():
        yield prefix + name
        inner = _model_in(field.annotation)
        if inner:
            item = ".0." if typing.get_origin(field.annotation) is list else "."
            if any(str in (kind, *typing.get_args(kind)) for kind in typing.get_args(field.annotation)):
                item = _INSTEAD
            yield from _all_fields(inner, f"{prefix}{name}{item}")


def _annotation(root: type[BaseModel], path: Path) -> Any:
    model = _model_at(root, path[:-1])
    return model.model_fields[str(path[-1])].annotation if model else None


def _model_at(root: type[BaseModel], path: Path) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    for part in path:
        if isinstance(part, int):
            continue  # an item has the class that its list's annotation names
        field = model.model_fields.get(part) if model else None
        model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def _choices(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for inner in typing.get_args(annotation) for choice in _choices(inner)]


def validate(root: type[Kind], data: object) -> tuple[Kind | None, list[Explained]]:
    """`data` as a `root`, and what is wrong with it; both empty when only rules across fields do not hold."""
    try:
        # The class's own `model_validate` may tell of mistakes in other words than pydantic's.
        found: Kind = root.__pydantic_validator__.validate_python(data)
        return found, []
    except ValidationError as error:
        return None, list(explain(error, root, data))
