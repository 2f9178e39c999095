"""A transformers configuration from the job file, as strictly as the rest of it.

Transformers takes any key and keeps those it does not know as attributes that nothing reads, so that a typo builds the
default model. Here a key is known when the configuration class has a field of that name, another name for one
(`attribute_map`), or reads it when it is made; or when the model's own code reads it from its configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.job.explain import close, did_you_mean
from orchestrator.job.rules import Finding
from orchestrator.models.problems import ModelError, reason_of, refused

_PRECISION = (
    "says nothing here: weights are kept in fp32 whatever a model was saved in, and train.precision (fp32, bf16) is "
    "what they are computed in; leave it out"
)
_REFUSED = {
    "dtype": _PRECISION,
    "torch_dtype": _PRECISION,
    "quantization_config": "quantized weights cannot be trained; leave it out, and set train.precision for a cheaper "
    "forward pass",
    "auto_map": "names code that comes with a model, and such code is never run; leave it out, or make the model "
    "with model.factory",
    "trust_remote_code": "code that comes with a model is never run; leave it out, or make the model with "
    "model.factory",
}
_ROUTER_LOSS = re.compile(r".*(aux|router|z)_(loss|z_loss)\w*")
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_OTHER_LOSS = (
    "this part of a model's loss is not supported, and leaving it out silently would train another model; leave it out "
    "(train.router_loss has what there is for mixtures of experts)"
)
_ROPE_LEGACY = {"rope_scaling", "rope_theta", "partial_rotary_factor"}
_ROPE = ("rope_parameters", "rope_scaling")
_OF_KWARGS = re.compile(r"""kwargs(?:\.(?:pop|get|setdefault)\(|\[)\s*["'](\w+)["']|["'](\w+)["'] in kwargs""")
_OF_CONFIG = re.compile(r"""\bconfig\.(\w+)|\bgetattr\(\s*(?:self\.)?config,\s*["'](\w+)["']""")


def check_by_name(config: dict[str, Any], prefix: str = "model.hf") -> list[Finding]:
    """What can be refused of a mapping without transformers: keys that would be accepted and ignored."""
    found = []
    for key, value in config.items():
        field = f"{prefix}.{key}"
        if key in _REFUSED and value is not None:
            found.append(Finding((field,), _REFUSED[key]))
        elif isinstance(key, str) and key not in COEFFICIENTS and _ROUTER_LOSS.fullmatch(key) and value:
            found.append(Finding((field,), _OTHER_LOSS))
        elif isinstance(value, dict):
            found.extend(check_by_name(value, field))
    return found


def config_from(mapping: dict[str, Any], vocab_size: int) -> Any:
    """The configuration that `model.hf: {...}` describes, with room for a vocabulary of `vocab_size` unless it says
    its own. Raises ModelError with every mistake."""
    given = dict(mapping)
    model_type = given.pop("model_type")
    kind = _config_class(model_type)
    findings = [*check_by_name(given), *_unknown(kind, given, "model.hf")]
    if findings:
        raise ModelError(findings)
    given.setdefault("vocab_size", -(-vocab_size // 64) * 64)
    try:
        config = kind(**given)
    except Exception as error:
        # Configurations are checked by whatever line first trips over them, with whatever that raises.
        said = re.search(r"field '(\w+)'", str(error))
        field = f"model.hf.{said[1]}" if said and said[1] in given else "model.hf"
        reason = f"transformers cannot make a {model_type} configuration of this: {reason_of(error)}"
        raise refused(reason, field) from error
    return config


def _config_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    field = "model.hf.model_type"
    if model_type not in CONFIG_MAPPING:
        near = close(model_type, CAUSAL, 0.6)
        raise refused(f"transformers has no model type {model_type!r}{did_you_mean(near)}", field)
    if model_type not in CAUSAL:
        near = close(model_type, CAUSAL, 0.6)
        raise refused(f"transformers has no causal language model of type {model_type!r}{did_you_mean(near)}", field)
    return CONFIG_MAPPING[model_type]


def check_model_type(model_type: str, where: str, *, has_code: bool) -> None:
    """Raises ModelError when transformers itself has no causal language model of this type, which is in `where`."""
    try:
        _config_class(model_type)
    except ModelError as error:
        code = " (the directory brings code for it, which is never run; use model.factory)" if has_code else ""
        raise refused(f"{where}: {error.findings[0].reason}{code}") from None


def _unknown(kind: Any, given: dict[str, Any], prefix: str) -> Iterator[Finding]:
    """The keys that a configuration class would keep without reading them, also inside of nested mappings."""
    known = known_keys(kind)
    parts: dict[str, Any] = dict(kind.sub_configs)
    for key, value in given.items():
        field = f"{prefix}.{key}"
        if key not in known and key not in _REFUSED:
            names = close(key, known, 0.6)
            hint = did_you_mean(names) or f"; its fields: {', '.join(each.name for each in dataclasses.fields(kind))}"
            yield Finding((field,), f"unknown field of a {kind.model_type} configuration{hint}")
        elif isinstance(value, dict) and key in parts:
            part = _part_class(parts[key], kind, key, value)
            inner = {name: item for name, item in value.items() if name != "model_type"}
            if part is not None:
                yield from _unknown(part, inner, field)
        elif isinstance(value, dict) and key in _ROPE:
            yield from _unknown_rope(kind, value, field)


def _part_class(part: Any, kind: Any, key: str, value: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if part is not AutoConfig:
        return part
    model_type = value.get("model_type") or kind.sub_configs_defaults[key].model_type
    # Not a mapping whose `get` answers for all of its keys.
    return CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401


def _unknown_rope(kind: Any, value: dict[str, Any], field: str) -> Iterator[Finding]:
    nested = {key: inner for key, inner in value.items() if isinstance(inner, dict)}
    for key, inner in nested.items():
        yield from _unknown_rope(kind, inner, f"{field}.{key}")
    import transformers.modeling_rope_utils as rope

    code = inspect.getsource(rope) + _code_of(kind)
    words = set(re.findall(r"""["'](\w+)["']""", code))
    for key in value.keys() - nested.keys() - words:
        yield Finding((f"{field}.{key}",), f"unknown field of rotary embeddings{did_you_mean(close(key, words, 0.7))}")


@functools.cache
def known_keys(kind: Any) -> frozenset[str]:
    """The keys that a configuration class, or the code of its model, reads."""
    from transformers import PreTrainedConfig

    own = [base for base in kind.__mro__ if base is not kind and base.__module__.startswith("transformers.models.")]
    names = {field.name for field in dataclasses.fields(kind)}
    names |= set(kind.attribute_map) | set(kind.attribute_map.values())
    generic = _read_by(inspect.getsource(PreTrainedConfig.__post_init__)) - _ROPE_LEGACY
    if "rope_parameters" in names:
        generic |= _ROPE_LEGACY
    for base in (kind, *own):
        names |= _read_by(inspect.getsource(base))
    static = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    names |= {name for name, value in static.items() if isinstance(value, property) and value.fset}
    with contextlib.suppress(Exception):  # Some have fields without a default.
        names |= set(vars(kind()))  # What a saved configuration may have.
    names |= {a or b for a, b in _OF_CONFIG.findall(_code_of(kind))} - set(dir(kind))
    return frozenset(names | generic)


def _read_by(code: str) -> set[str]:
    return {a or b for a, b in _OF_KWARGS.findall(code)}


@functools.cache
def _code_of(kind: Any) -> str:
    """The source of the package that a configuration class is in: its model's code beside its own."""
    path = Path(str(sys.modules[kind.__module__].__file__))
    return "\n".join(file.read_text("utf-8") for file in sorted(path.parent.glob("*.py")))
