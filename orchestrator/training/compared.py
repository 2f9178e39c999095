"""Another model that a job's own is compared with: a teacher to learn from (objective distill), or the reference of
preferences. A directory, or a run; known by its content, wherever it is."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.models.problems import reason_of, refused

if TYPE_CHECKING:
    import torch

    from orchestrator.checkpoint.export_run import Named
    from strategies.model.values import Values
    from strategies.objective.objective import Objective


def with_compared(job: Job, *, has_begun: bool = False) -> Job:
    """The job with `objective.content` filled in, if its objective names another model; what `digest()` and
    `numerics()` then cover is that and not where it is. A run is named with the step of its checkpoint. A reference is
    computed once: if a run `has_begun` with it, what it gave is on record, and it need not be there any more.

    Raises ModelError when there is no such model, or when the job says another content than it has.
    """
    objective = objective_of(job)
    field = objective.another
    name = getattr(objective.settings, field) if field else ""
    if not name or (has_begun and field == "reference" and objective.settings.content is not None):
        return job
    found, content = _verified(field, name, objective.settings.content)
    _check_vocabulary(objective, found)
    if objective.settings.content is not None:
        return job
    given = job.objective.model_dump(exclude_unset=True) | {"content": content, field: found.name}
    return job.model_copy(update={"objective": type(job.objective).model_validate(given)})


def _verified(field: str, name: str, said: str | None) -> tuple[Named, str]:
    from orchestrator.checkpoint.export_run import find_model

    found = find_model(name)
    content = found.content
    if said not in (None, content):
        raise refused(
            f"{name} holds {content}, the job says {said}: it is not the {field} that the job was made for; restore "
            "it, or name the directory that has it",
            f"objective.{field}", "objective.content",
        )  # fmt: skip
    return found, content


def _check_vocabulary(objective: Objective, found: Named) -> None:
    top_k = getattr(objective.settings, "top_k", 0)
    if not top_k:
        return
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(found.directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = reason_of(error)
        raise refused(f"the teacher in {found.name} cannot be loaded: {reason}", "objective.teacher") from error
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and top_k > size:
        raise refused(f"top_k = {top_k} is more than the {size} tokens that {found.name} knows", "objective.top_k")


def with_teacher(job: Job, objective: Objective) -> Objective:
    """The objective with what the job's teacher gives, where it has one that is asked while it learns; it is read when
    it is first asked."""
    if not objective.needs_teacher or objective.settings.top_k:
        return objective
    made: Any = objective

    def teacher(tokens: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        import torch

        more = {} if places is None else {"position_ids": places}
        with torch.no_grad():
            found: torch.Tensor = load_teacher(job, tokens.device)(input_ids=tokens, **more).logits
        return found

    return made.with_teacher(teacher)  # type: ignore[no-any-return]


def reference_values(job: Job) -> Values | None:
    """The parameters of the reference of the job's objective; None where that is the model as it is before training.
    Raises ModelError, also for one of another architecture."""
    objective = objective_of(job)
    settings: Any = objective.settings
    if objective.another != "reference" or not settings.reference:
        return None
    from orchestrator.checkpoint.export_run import find_model
    from orchestrator.data import load_tokenizer
    from orchestrator.models.loading import prepare_model
    from orchestrator.models.problems import ModelError

    name = settings.reference
    found = find_model(name) if settings.content is None else _verified("reference", name, settings.content)[0]
    own = type(job.model)(hf=str(found.directory), untie=job.model.untie)
    size = load_tokenizer(job.data.tokenizer).vocab_size
    try:
        made = prepare_model(job.model_copy(update={"model": own}), size)
    except ModelError as error:
        raise refused(f"{name}: {error.findings[0].reason}", "objective.reference") from error
    wanted, there = (
        {key: tuple(each.shape) for key, each in model.named_parameters()}
        for model in (prepare_model(job, size).model, made.model)
    )
    if wanted != there:
        differing = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        raise refused(
            f"{name} is of another architecture than the model that is trained: they differ in "
            f"{', '.join(differing[:3])}",
            "objective.reference",
        )
    return made.values


_reading = threading.Lock()


def load_teacher(job: Job, device: torch.device) -> Any:
    """The job's, read once, in evaluation mode and without gradients. Raises ModelError, also where this node's is not
    the one that the run was started with."""
    settings = objective_of(job).settings
    with _reading:
        return _loaded(settings.teacher, settings.content, job.train.precision, device)


def release_teacher() -> None:
    """Gives its memory back, until it is wanted again."""
    _loaded.cache_clear()


@lru_cache(maxsize=1)
def _loaded(name: str, content: str | None, precision: str, device: torch.device) -> Any:
    """Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    from orchestrator.checkpoint.export_run import find_model

    found = find_model(name) if content is None else _verified("teacher", name, content)[0]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(found.directory), local_files_only=True, trust_remote_code=False,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        )  # fmt: skip
    except Exception as error:
        raise refused(f"the teacher in {name} cannot be loaded: {reason_of(error)}", "objective.teacher") from error
    model.config.use_cache = False
    return model.to(device).eval().requires_grad_(False)
