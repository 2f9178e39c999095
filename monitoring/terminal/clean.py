"""Text of others on our terminal: what would steer the terminal is shown instead of done.

What events, logs and results say was written by whatever ran: an exception's text, a model's name, a node's address.
Secrets in it are redacted.
"""

from __future__ import annotations

import re

from monitoring.redaction import redact

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and line feed, delete, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks and overrides of direction
    "\u2028\u2029\ufeff\ud800-\udfff]"  # other line ends, the byte-order mark, halves of characters
)


def clean(text: str) -> str:
    r"""`text` as one line: control characters as escapes (`\x1b`), line ends as `\n`."""
    return clean_lines(text).replace("\n", "\\n")


def clean_lines(text: str) -> str:
    r"""The same for text that may have several lines, such as a traceback."""
    return _STEERING.sub(_shown, redact(text))


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
