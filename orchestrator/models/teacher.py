"""The model that another one learns from (objective distill): whole in every process that computes losses."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from orchestrator.job import Job
from orchestrator.models.directory import find_directory
from orchestrator.models.problems import reason_of, refused

if TYPE_CHECKING:
    import torch

    from strategies.objective.objective import Objective


def with_teacher(job: Job, objective: Objective) -> Objective:
    """The objective with what the job's teacher gives, where it has one; it is read when it is first asked."""
    if not objective.needs_teacher:
        return objective
    name, dtype = objective.settings.teacher, job.train.precision
    made: Any = objective

    def teacher(tokens: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            found: torch.Tensor = _loaded(name, dtype, tokens.device)(input_ids=tokens).logits
        return found

    return made.with_teacher(teacher)  # type: ignore[no-any-return]


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
