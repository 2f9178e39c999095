"""A file whose appearance is the notice: for clouds and schedulers that are not known here (Slurm, on-premises)."""

from __future__ import annotations

from pathlib import Path

from monitoring.outside import parse
from monitoring.values import MOST_S
from orchestrator.notices.notice import Notice


class NoticeFile:
    """See `Source`. The file may be empty, hold a line that says why, or JSON: `{"deadline_s": 90, "reason": "..."}`,
    with the deadline counted from when the file was written. Removing it withdraws the notice."""

    name = "file"

    def __init__(self, path: Path) -> None:
        self._path = path

    def detect(self) -> bool:
        return True

    def poll(self, now: float) -> list[Notice]:
        try:
            written = self._path.stat().st_mtime_ns
            text = self._path.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return []
        return [parse_file(str(self._path), text, written)]


def parse_file(path: str, text: str, written_ns: int) -> Notice:
    """The notice that a file is. What cannot be read as JSON is its reason: the file is there, that is what counts."""
    deadline, reason = None, ""
    try:
        content = parse(text)
    except ValueError:
        reason = text.splitlines()[0][:200] if text else ""
    else:
        if isinstance(content, dict):
            reason = str(content.get("reason") or "")
            seconds = content.get("deadline_s")
            if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < MOST_S:
                deadline = written_ns / 1e9 + seconds
        else:
            reason = str(content)[:200]
    return Notice(str(written_ns), reason or f"{path} is there", deadline)
