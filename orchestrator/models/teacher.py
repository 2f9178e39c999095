"""The model that another one learns from (objective distill): whole in every process that computes losses, or that
answers for it (`orchestrator.training.teaching`)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.models.content import with_content
from orchestrator.models.directory import find_directory
from orchestrator.models.problems import reason_of, refused

if TYPE_CHECKING:
    import torch

    from strategies.objective.objective import Objective


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


def load_teacher(job: Job, device: torch.device) -> Any:
    """The job's, read once, in evaluation mode and without gradients. Raises ModelError."""
    if objective_of(job).settings.content is not None:
        with_content(job)  # This node's directory is the one that the run was started with.
    return _loaded(objective_of(job).settings.teacher, job.train.precision, device)


def release_teacher() -> None:
    """Gives its memory back, until it is wanted again."""
    _loaded.cache_clear()


@lru_cache(maxsize=1)
def _loaded(name: str, precision: str, device: torch.device) -> Any:
    """Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(find_directory(name)), local_files_only=True, trust_remote_code=False,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        )  # fmt: skip
    except Exception as error:
        raise refused(f"the teacher in {name} cannot be loaded: {reason_of(error)}", "objective.teacher") from error
    model.config.use_cache = False
    return model.to(device).eval().requires_grad_(False)
