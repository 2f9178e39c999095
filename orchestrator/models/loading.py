"""A job's model with its weights: made from the job's seed, or loaded from a directory without inventing any."""

from __future__ import annotations

import fnmatch
import importlib
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.models.configuration import check_model_type, config_from
from orchestrator.models.content import with_content
from orchestrator.models.directory import find_directory, read_config
from orchestrator.models.heads import LEFT_OUT, NEW, give_every_position, give_hidden_states
from orchestrator.models.problems import ModelError, reason_of, refused
from orchestrator.models.routers import keep_quiet, routers_of
from strategies.model.routers import Routers

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.models.reading import Account, DirectoryValues
    from strategies.model.values import Values

_LISTED = 12
"""Tensors of one kind that an error names one by one."""


@dataclass(frozen=True)
class Loaded:
    """What became of a directory's weights, where that was not simply all of them."""

    directory: str
    new: tuple[str, ...] = ()
    """Tensors that the directory lacks or has in another shape: initialised from the job's seed."""
    left_out: tuple[str, ...] = ()
    """Tensors of the directory that the model has no place for."""
    untied: tuple[str, ...] = ()
    """Tensors that began as copies of the embedding, which they shared in the directory."""


def loaded_of(model: nn.Module, unused: Collection[str] = ()) -> dict[str, Any] | None:
    """What `build_model` noted about loading this model, `Loaded` as JSON values, and the trained parameters that its
    loss does not depend on; None where there is neither."""
    found = getattr(model, "_orchestrator_loaded", None)
    told = {} if found is None else {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(found).items()}
    return (told | ({"unused": sorted(unused)} if unused else {})) or None


class Prepared(NamedTuple):
    """A model in training mode whose parameters take no memory until they are wanted, and their first values."""

    model: nn.Module
    values: Values
    routers: Routers | None = None

    def filled(self) -> nn.Module:
        """The model with its values, whole, in fp32 on the CPU."""
        from torch import nn

        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        made: dict[str, nn.Parameter] = {}
        for owner in self.model.modules():
            for key, parameter in list(owner._parameters.items()):
                if parameter is None or not parameter.is_meta:
                    continue
                name = names[id(parameter)]
                if name not in made:
                    made[name] = nn.Parameter(self.values.read(name).clone(), requires_grad=parameter.requires_grad)
                owner._parameters[key] = made[name]
        return self.model


def prepare_model(job: Job, vocab_size: int) -> Prepared:
    """The job's model, to be initialised from the job's seed alone or loaded.

    Raises ModelError, a ValueError, when the configuration does not fit (unknown model type or field, vocabulary
    smaller than the tokenizer's, a factory that cannot be imported or gives no module) or the weights do not.
    """
    spec = job.model
    if spec.factory is not None:
        prepared = _from_factory(job)
    elif isinstance(spec.hf, str):
        prepared = _from_directory(job, spec.hf)
    else:
        prepared = _at_random(job, _with_outputs(job, config_from(dict(spec.hf or {}), vocab_size)))
    prepared = _with_what_is_trained(job, prepared)
    model = prepared.model
    check_vocabulary(job, model, vocab_size)
    routers = routers_of(job, model)
    keep_quiet(model)
    if hasattr(model, "set_attn_implementation"):
        from orchestrator.models.attention import choose_attention

        choose_attention(model, job)
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", None):
        config.use_cache = False
    model.train()
    return prepared._replace(routers=routers)


def _with_what_is_trained(job: Job, prepared: Prepared) -> Prepared:
    """With the job's adapter, and without what it freezes. Raises ModelError."""
    model = choose_trained(job, prepared.model)
    if job.adapter is None:
        return prepared
    from orchestrator.models.adapters import AdaptedValues

    values: Values = AdaptedValues(prepared.values, model, job.train.seed)
    if (kind := job.adapter.quantize_base) != "none":
        from orchestrator.models.quantization import quantize_base

        values = quantize_base(model, values, kind)
    return prepared._replace(values=values)


def choose_trained(job: Job, model: nn.Module) -> nn.Module:
    """The model with the job's adapter, of which what the job freezes is not trained. Raises ModelError."""
    if job.adapter is not None:
        from orchestrator.models.adapters import add_adapter

        # A new head is as good as none until it is trained.
        add_adapter(model, job.adapter, ("score",) if objective_of(job).num_outputs else ())
    freeze(model, job.train.freeze)
    _check_groups(job, model)
    return model


def _check_groups(job: Job, model: nn.Module) -> None:
    """Raises ModelError for a pattern of the optimizer's groups that fits nothing that is trained."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for number, group in enumerate(job.train.optimizer.groups):
        for place, pattern in enumerate(group.params):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise refused(
                    f"{pattern!r} fits none of the {len(names)} parameters that are trained "
                    f"({', '.join(names[:3])}, ...)",
                    f"train.optimizer.groups.{number}.params.{place}",
                )


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters whose names fit from training. Raises ModelError for a pattern that fits none, and where
    nothing is left."""
    names = [name for name, _ in model.named_parameters()]
    for number, pattern in enumerate(patterns):
        fitting = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            shown = ", ".join(names[:3])
            raise refused(
                f"{pattern!r} fits none of the {len(names)} parameters ({shown}, ...)", f"train.freeze.{number}"
            )
        for name in fitting:
            model.get_parameter(name).requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in model.parameters()):
        raise refused("freezes every parameter, and nothing is left to train", "train.freeze")


def build_model(job: Job, vocab_size: int) -> nn.Module:
    """The same with its values, whole, in fp32 on the CPU. Raises ModelError."""
    return prepare_model(job, vocab_size).filled()


def _from_factory(job: Job) -> Prepared:
    from strategies.model.randomness import seed_stream
    from strategies.model.values import BuiltValues

    def build() -> nn.Module:
        seed_stream(job.train.seed, "initialisation")
        return from_factory(str(job.model.factory), job.model.args).float()

    model = build()
    return Prepared(model, BuiltValues(model, build))


def _at_random(job: Job, config: Any) -> Prepared:
    from orchestrator.models.initialisation import KeyedValues, without_parameters

    with without_parameters():
        model = _from_config(job, config)
    return Prepared(model, KeyedValues(model, job.train.seed, lambda: _from_config(job, config)))


def empty_model(job: Job) -> Any:
    """The job's transformers model by its configuration alone; on the meta device it takes no memory.

    Raises ModelError.
    """
    from orchestrator.data import load_tokenizer

    if isinstance(job.model.hf, str):
        return _from_config(job, config_in(job, job.model.hf)[1])
    given = dict(job.model.hf or {})
    # A plan is made where the tokenizer need not be yet.
    size = 0 if "vocab_size" in given else load_tokenizer(job.data.tokenizer).vocab_size
    return _from_config(job, _with_outputs(job, config_from(given, size)))


def config_in(job: Job, name: str) -> tuple[Path, Any]:
    """The directory that `model.hf: name` means, and its configuration. Raises ModelError."""
    from transformers import AutoConfig

    directory = find_directory(name)
    content = read_config(name, directory)
    check_model_type(content["model_type"], str(directory / "config.json"), has_code="auto_map" in content)
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # As for a mapping: whatever line first trips over the configuration.
        raise refused(f"the configuration in {name} cannot be used: {reason_of(error)}") from error
    _with_outputs(job, config)
    if getattr(config, "quantization_config", None):
        raise refused(f"{name} holds quantized weights, which cannot be trained; name a directory with the full ones")
    if job.model.untie:
        if not config.get_text_config().tie_word_embeddings:
            raise refused(f"the head of {name} has weights of its own; leave untie out", "model.untie")
        _set_tied(config, False)
    return directory, config


def _set_tied(config: Any, is_tied: bool) -> None:
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = is_tied


def _model_class(job: Job) -> Any:
    """The class of transformers that builds models for the job's objective."""
    import transformers

    return getattr(transformers, objective_of(job).model_class)


def _from_config(job: Job, config: Any) -> nn.Module:
    import torch

    try:
        model: nn.Module = _model_class(job).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        # Configurations are checked by whatever line first trips over them, with whatever that raises.
        raise refused(
            f"transformers cannot build {config.model_type!r} from this configuration: {reason_of(error)}"
        ) from error
    objective = objective_of(job)
    if objective.gives_hidden_states:
        model = give_hidden_states(model)
    elif objective.num_outputs is not None:
        model = give_every_position(model)
    return model


def _with_outputs(job: Job, config: Any) -> Any:
    """The configuration, for as many outputs as the objective wants, and their names."""
    objective = objective_of(job)
    if objective.num_outputs is not None:
        config.num_labels = objective.num_outputs
        labels = objective.labels_of_records
        if labels is not None and labels.names:
            config.id2label = dict(enumerate(labels.names))
            config.label2id = {name: number for number, name in enumerate(labels.names)}
    return config


def _from_directory(job: Job, name: str) -> Prepared:
    from orchestrator.models.reading import DirectoryValues
    from orchestrator.models.weights import saved_in

    if job.model.content is not None:
        with_content(job)  # This node's directory is the one that the run was started with.
    directory, config = config_in(job, name)
    if job.model.untie:
        _set_tied(config, True)
    model, new, _ = _at_random(job, config)
    values = DirectoryValues(model, saved_in(directory), new)
    loaded = _checked(job, name, model, values.account)
    if job.model.untie:
        loaded = Loaded(loaded.directory, loaded.new, loaded.left_out, _untie(name, model, values))
    model._orchestrator_loaded = loaded  # type: ignore[assignment]
    return Prepared(model, values)


def _checked(job: Job, name: str, model: Any, account: Account) -> Loaded:
    """Whether the directory's tensors are the model's, less those that may be new. Raises ModelError."""
    shapes, missing, unexpected = account.mismatched, account.missing, account.unexpected
    allowed = list(job.model.allow_new)
    if objective_of(job).num_outputs is not None or objective_of(job).gives_hidden_states:
        # A language model gets another head, or none, which is told.
        allowed += [*NEW, *LEFT_OUT]

    def refusable(names: Iterable[str]) -> list[str]:
        return [each for each in names if not any(fnmatch.fnmatchcase(each, pattern) for pattern in allowed)]

    wrong = [
        _listed("lacks", refusable(missing)),
        _listed("has in another shape", [
            f"{each} ({_shape(shapes[each][0])} there, {_shape(shapes[each][1])} in the model)"
            for each in refusable(sorted(shapes))
        ]),
        _listed("has, but the model has no place for,", refusable(unexpected)),
    ]  # fmt: skip
    if any(wrong):
        raise refused(
            f"{name} does not hold the weights of a {type(model).__name__}: it {'; it '.join(filter(None, wrong))}. "
            f"Nothing is made up in their place{_advice(model, refusable(missing))}; model.allow_new: [patterns] says "
            "which tensors may be new (initialised from train.seed) or left out",
        )
    return Loaded(name, tuple(sorted({*missing, *shapes})), unexpected)


def _advice(model: Any, missing: list[str]) -> str:
    """What to do about a missing head in a directory whose configuration says that it has one of its own."""
    head = model.get_output_embeddings()
    names = {key for key, parameter in model.named_parameters() if head is not None and parameter is head.weight}
    if not names & set(missing):
        return ""
    return (
        ". If its head shared the embedding when it was saved: set tie_word_embeddings: true in its config.json, and "
        "model.untie: true to train the two apart, from the same values"
    )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what} {', '.join(names[:_LISTED])}{more}"


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "scalar"


def _untie(name: str, model: Any, values: DirectoryValues) -> tuple[str, ...]:
    """Gives the head a parameter of its own that begins with the values of the embedding, which it shares. Raises
    ModelError when it shares none."""
    tokens, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tokens is None or head is None or head.weight is not tokens.weight:
        raise refused(f"the model of {name} has no head that shares the embedding; leave untie out", "model.untie")
    apart = values.separate(head, "weight")
    _set_tied(model.config, False)
    model.all_tied_weights_keys = {}
    return (apart,)


def from_factory(path: str, args: dict[str, Any]) -> nn.Module:
    """What a user's `package.module:function` returns. Raises ModelError when that fails or is no module."""
    from torch import nn

    module_name, _, function_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        # A module of a user's may raise anything when it is imported.
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        raise refused(f"{path!r} cannot be imported: {kind}{reason_of(error)}", "model.factory") from error
    try:
        model = function(**args)
    except Exception as error:
        reason = f"{path!r} failed: {type(error).__name__}: {reason_of(error)}"
        raise refused(reason, "model.factory") from error
    if not isinstance(model, nn.Module):
        raise refused(f"{path!r} returned a {type(model).__name__}, not a torch.nn.Module", "model.factory")
    return model


def check_vocabulary(job: Job, model: nn.Module, vocab_size: int) -> None:
    """Raises ModelError when the tokenizer may give ids that the model has no embedding for."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        rows = getattr(get() if callable(get) else None, "num_embeddings", None)
    except NotImplementedError:
        return
    if rows is None or rows >= vocab_size:
        return
    found = f"the model's vocabulary has {rows} entries, the tokenizer {job.data.tokenizer!r} needs {vocab_size}"
    if isinstance(job.model.hf, str):
        raise refused(
            f"{found}; use the tokenizer that the model was made with (data.tokenizer: {job.model.hf})",
            "data.tokenizer", "model.hf",
        )  # fmt: skip
    if job.model.factory is not None:
        raise refused(f"{found}; let model.factory make a larger one", "model.factory", "data.tokenizer")
    raise refused(f"{found}: set vocab_size to {vocab_size} or more", "model.hf.vocab_size", "data.tokenizer")


__all__ = [
    "Loaded",
    "ModelError",
    "build_model",
    "config_in",
    "empty_model",
    "from_factory",
    "loaded_of",
    "prepare_model",
]
