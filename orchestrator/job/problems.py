"""What is wrong with a job file, as data and as lines a user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from monitoring.errors import UserError
from monitoring.redaction import redact


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake and where it is.

    `file` is the job file as the user named it, or the option that brought the value (`--set a.b=value`,
    `--fault ...`). `line` and `column` count from 1; both are 0 where there is no position to give (an
    option, a file that cannot be read). `field` is the dotted path in the job, empty when the mistake is in
    no field.
    """

    file: str
    line: int
    column: int
    field: str
    reason: str

    def __str__(self) -> str:
        """`file:line:column field: reason`, or `--set a.b=value: a.b reason` for an option; without secrets."""
        return redact(self._text())

    def _text(self) -> str:
        if not self.line:
            return f"{self.file}: {self.field} {self.reason}" if self.field else f"{self.file}: {self.reason}"
        where = f"{self.file}:{self.line}:{self.column}"
        return f"{where} {self.field}: {self.reason}" if self.field else f"{where}: {self.reason}"


class JobError(UserError, ValueError):
    """The job cannot be used. `problems` holds every mistake found, in the order of their positions."""

    has_place = True

    def __init__(self, problems: Sequence[Problem]) -> None:
        # The problems are the only argument, so that BaseException's own pickling rebuilds the error.
        super().__init__(tuple(problems))
        self.problems: list[Problem] = list(problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)
