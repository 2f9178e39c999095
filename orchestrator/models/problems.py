"""What is wrong with a job's model, by field, so that those who have the job file can say where."""

from __future__ import annotations

from collections.abc import Sequence

from monitoring.errors import UserError
from orchestrator.job.rules import Finding


class ModelError(UserError, ValueError):
    """The job's model cannot be used. `findings` holds every mistake found."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        # The findings are the only argument, so that BaseException's own pickling rebuilds the error.
        super().__init__(tuple(findings))
        self.findings: list[Finding] = list(findings)

    def __str__(self) -> str:
        return "; ".join(f"{finding.fields[0]}: {finding.reason}" for finding in self.findings)


def refused(reason: str, *fields: str) -> ModelError:
    """The error for one mistake; `fields` with the most relevant first, `model.hf` if there is none."""
    return ModelError([Finding(fields or ("model.hf",), reason)])


def reason_of(error: BaseException) -> str:
    """What an exception of a library says, in one line of bounded length."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 400 else said[:400] + " ..."
