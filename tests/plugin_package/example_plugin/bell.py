"""A source of notices: a file that says until when this machine is there."""

from __future__ import annotations

from pathlib import Path

from orchestrator.notices.notice import Notice, SourceError


class Bell:
    """`base_url` is the path of the file, which holds seconds since the epoch."""

    name = "bell"

    def __init__(self, base_url: str | None) -> None:
        self._file = Path(base_url or "/run/bell")

    def detect(self) -> bool:
        return self._file.exists()

    def poll(self, now: float) -> list[Notice]:
        try:
            deadline = float(self._file.read_text())
        except ValueError as error:
            raise SourceError(f"{self._file}: {error}") from error
        except FileNotFoundError:
            return []
        return [Notice(str(deadline), "the bell has rung", deadline)]


class Cracked(Bell):
    def __init__(self, base_url: str | None) -> None:
        raise RuntimeError("it does not ring")
