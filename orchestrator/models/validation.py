"""Whether a job's model can be built, found out without its weights: what `validate` looks at beyond the job file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestrator.job import Job
from orchestrator.job.lengths import limit_of
from orchestrator.job.rules import Finding
from orchestrator.models.configuration import check_by_name, config_from
from orchestrator.models.directory import find_directory, read_config
from orchestrator.models.loading import check_vocabulary, choose_trained, config_in, empty_model, from_factory
from orchestrator.models.problems import ModelError
from orchestrator.models.routers import routers_of
from strategies.layout.schedule import chunks_of

if TYPE_CHECKING:
    from torch import nn

    from strategies.model.cutting import Cuts

_OWN_HEAD_SIZES = ("head_dim", "qk_head_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim", "kv_channels")


def look_at_model(job: Job, *, here: bool = True) -> None:
    """What can be said of a model at once, without torch and transformers: run before Ray is started. `here`: whether
    the run's data and model are on this machine.

    Raises ModelError.
    """
    hf = job.model.hf
    if isinstance(hf, str) and here:
        read_config(hf, find_directory(hf))
    elif isinstance(hf, dict) and (findings := check_by_name(hf)):
        raise ModelError(findings)


def check_model(job: Job) -> None:
    """Builds the job's model without the memory of its parameters, and checks what it is built for: the tokenizer's
    vocabulary, the sequence length, the layout.

    A factory that does not work there is called as a worker calls it. Raises ModelError or DataError.
    """
    look_at_model(job)
    from orchestrator.data import load_tokenizer

    vocab_size = load_tokenizer(job.data.tokenizer).vocab_size
    check_sizes(job)
    model = model_without_weights(job)
    check_vocabulary(job, model, vocab_size)
    routers_of(job, model)
    if (reason := why_not_recomputed(job, model)) is not None:
        raise ModelError([Finding(("train.recompute",), reason)])
    _check_layout(job, model)


def why_not_recomputed(job: Job, model: nn.Module) -> str | None:
    """Why layers of this model cannot compute again what the job says; None where they can, or need not."""
    from strategies.model.anatomy import find_layers

    layers, reason = find_layers(model)
    if job.train.recompute == "none" or layers is not None:
        return None
    return f"train.recompute is of layers, and it is not known which the model has: {reason}; set recompute: none"


def model_without_weights(job: Job) -> nn.Module:
    """The job's model; a factory that does not work so is called as a worker calls it. Raises ModelError."""
    import torch

    from orchestrator.models.initialisation import without_parameters
    from strategies.model.randomness import seed_stream

    seed_stream(job.train.seed, "initialisation")
    if job.model.factory is None:
        with without_parameters():
            model: nn.Module = empty_model(job)
    else:
        try:
            with torch.device("meta"):
                model = from_factory(job.model.factory, job.model.args)
        except ModelError:
            model = from_factory(job.model.factory, job.model.args)
    return choose_trained(job, model)


def check_sizes(job: Job) -> None:
    """Raises ModelError for what of a configuration does not fit together, or not with the job's samples."""
    look_at_model(job)
    if isinstance(job.model.hf, str):
        config = config_in(job, job.model.hf)[1]
    elif job.model.hf is not None:
        config = config_from(dict(job.model.hf), 1)
    else:
        return
    text = config.get_text_config()
    if findings := [*_heads(job, text), *_positions(job, text)]:
        raise ModelError(findings)


def _heads(job: Job, text: Any) -> list[Finding]:
    names = ("num_attention_heads", "hidden_size", "num_key_value_heads")
    heads, hidden, groups = (getattr(text, name, None) for name in names)
    found = []
    if not isinstance(heads, int) or heads <= 0:
        return []
    if isinstance(hidden, int) and hidden % heads and not _has_own_head_size(job, text):
        found.append(
            Finding(
                (_field(job, text, "num_attention_heads"), _field(job, text, "hidden_size")),
                f"{heads} heads do not divide the hidden size {hidden}",
            )
        )
    if isinstance(groups, int) and groups > 0 and heads % groups:
        found.append(
            Finding(
                (_field(job, text, "num_key_value_heads"), _field(job, text, "num_attention_heads")),
                f"{groups} key-value heads do not divide {heads} heads; each serves the same number of them",
            )
        )
    return found


def _has_own_head_size(job: Job, text: Any) -> bool:
    """Whether the width of a head is said, and not what is left of the hidden size."""
    if isinstance(job.model.hf, dict):
        said = [name for name in _OWN_HEAD_SIZES if job.model.hf.get(name) is not None]
        defaults = [name for name in _OWN_HEAD_SIZES if getattr(type(text), name, None) is not None]
        return bool(said or defaults)
    return any(getattr(text, name, None) is not None for name in _OWN_HEAD_SIZES)


def _positions(job: Job, text: Any) -> list[Finding]:
    length, limit = job.data.sequence_length, limit_of(text)
    if limit is None or length <= limit[1]:
        return []
    name, most = limit
    field = _field(job, text, name)
    where = f"raise {field.removeprefix('model.')}" if field != "model.hf" else "use another model"
    return [
        Finding(
            ("data.sequence_length", field),
            f"sequence_length = {length} is above the model's {most} positions ({name}); lower it, or {where}",
        )
    ]


def _field(job: Job, config: Any, name: str) -> str:
    """The field of the job file that decides this one of the configuration: by the name that the file uses."""
    if not isinstance(job.model.hf, dict):
        return "model.hf"
    names = [name, *(other for other, meant in config.attribute_map.items() if meant == name)]
    names.append(config.attribute_map.get(name, name))
    return f"model.hf.{next((each for each in names if each in job.model.hf), name)}"


def _check_layout(job: Job, model: nn.Module) -> None:
    strategy = job.strategy
    parts = strategy.pipeline * chunks_of(strategy.schedule) if strategy.pipeline > 1 else 1
    reasons = LayoutReasons(model)
    for field, reason in (
        ("tensor", reasons.of_tensor(strategy.tensor)),
        ("pipeline", reasons.of_pipeline(strategy.pipeline, parts)),
        ("shard", reasons.of_shard(strategy.shard)),
    ):
        if reason is not None:
            raise ModelError([Finding((f"strategy.{field}",), reason)])


class LayoutReasons:
    """Why a model, which may be without weights, cannot be laid out so; None where it can. Remembers what it said."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cuts: Cuts | None = None
        self._said: dict[tuple[Any, ...], str | None] = {}

    def of_tensor(self, tensor: int) -> str | None:
        """Why it cannot be split over `tensor` ranks."""
        from strategies.trial.derive import check_tensor

        return self._reason(("tensor", tensor), tensor > 1, lambda: check_tensor(self._model, tensor))

    def of_pipeline(self, pipeline: int, parts: int) -> str | None:
        """Why it cannot be cut into `pipeline` stages of `parts` model parts together."""
        return self._reason(("pipeline", pipeline, parts), pipeline > 1, lambda: self._check_cut(pipeline, parts))

    def of_shard(self, shard: str) -> str | None:
        """Why it cannot be sharded so."""
        from strategies.model.sharding import check_sharded

        return self._reason(
            ("shard", shard), shard == "parameters", lambda: check_sharded(self._model, self._known_cuts().order)
        )

    def _check_cut(self, pipeline: int, parts: int) -> None:
        self._known_cuts().check(pipeline, parts)

    def _known_cuts(self) -> Cuts:
        from strategies.model.cutting import Cuts

        if self._cuts is None:
            self._cuts = Cuts(self._model)
        return self._cuts

    def _reason(self, key: tuple[Any, ...], applies: bool, check: Callable[[], None]) -> str | None:
        if key not in self._said:
            self._said[key] = None
            try:
                if applies:
                    check()
            except ValueError as error:
                self._said[key] = str(error)
        return self._said[key]
