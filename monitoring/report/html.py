"""The small parts that the report's HTML is made of, and figures as people read them. Pure; escapes what it is given,
except for cells of tables and the content of sections, which are HTML already."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from monitoring.report.charts import elapsed

MAX_ROWS = 200
"""Rows of a table; of a longer one the last are shown, and how many were left out."""


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], foot: Sequence[str] | None = None, *, words: Sequence[str] = ()
) -> str:
    """A table of cells that are HTML already; headings are text. Columns in `words` are of text, not of figures."""
    classes = [' class="words"' if name in words else "" for name in head]

    def row(cells: Sequence[str]) -> str:
        inside = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, cells, strict=True))
        return f"<tr>{inside}</tr>"

    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(classes, head, strict=True))
    body = "".join(map(row, rows))
    end = f"<tfoot>{row(foot)}</tfoot>" if foot else ""
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody>{end}</table></div>'


def left_out(found: Sequence[Any]) -> str:
    return f'<p class="note">The last {MAX_ROWS} of {len(found):,}.</p>' if len(found) > MAX_ROWS else ""


def swatch(reason: str) -> str:
    name = "".join(char for char in reason if char.isascii() and (char.isalnum() or char == "_"))
    return f'<i class="swatch" style="background:var(--{name},var(--other))"></i>'


def costs(seconds: Mapping[str, float]) -> str:
    parts = (f"{swatch(reason)}{escape(words(reason))} {cost:.2f}" for reason, cost in seconds.items() if cost >= 0.005)
    return " ".join(f'<span class="cost">{part}</span>' for part in parts)


def words(name: str) -> str:
    return str(name).replace("_", " ")


def clip(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{elapsed(seconds)} {'h' if seconds >= 3600 else 'min'}"


def date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
