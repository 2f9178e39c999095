"""What a source of notices says, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol

from monitoring.errors import UserError


class NoticeError(UserError, ValueError):
    """A source was asked for that there is not, or that cannot be used; says what to give instead."""


class SourceError(RuntimeError):
    """A source did not answer, or answered what cannot be understood. It is asked again."""


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away.

    `key` tells notices of one source apart: the same key on the next poll is the same notice. `deadline` is when the
    machine goes, in seconds since the epoch, or None when the source does not say. A notice that is only `possible` (a
    recommendation, a pause of seconds) is logged, and acted on only with `--early`.
    """

    key: str
    reason: str
    deadline: float | None
    possible: bool = False


class Source(Protocol):
    """Where notices come from. `--source package.module:Class` takes any class like this.

    It is made with the base URL of `--source-url` (None if not given) as its only argument. `poll` is called every few
    seconds, from one thread; it returns every notice that stands now, and leaving one out withdraws it. Both methods
    return within a few seconds, and raise SourceError (or OSError, ValueError) when they cannot tell.
    """

    name: str

    def detect(self) -> bool:
        """Whether this machine has such a source. Only asked for `--source auto`."""
        ...

    def poll(self, now: float) -> list[Notice]:
        """The notices that stand; `now` is in seconds since the epoch."""
        ...


def gather(*questions: Callable[[], list[Notice]]) -> list[Notice]:
    """The notices that several questions find. One that fails hides no notice of the others.

    Raises SourceError when one failed and the others found nothing.
    """
    notices: list[Notice] = []
    failure: SourceError | None = None
    for question in questions:
        try:
            notices += question()
        except SourceError as error:
            failure = failure or error
    if failure is not None and not notices:
        raise failure
    return notices


def parse_time(text: str) -> float:
    """Seconds since the epoch of a time in ISO 8601 or in the format of mail and HTTP headers; UTC if it names no zone.

    Raises ValueError.
    """
    text = text.strip()
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        try:
            time = parsedate_to_datetime(text)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"not a time: {text[:60]!r}") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
