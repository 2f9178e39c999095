"""Passwords in text that is shown or written down: one function that takes them out, wherever text leaves the process.

Nothing that is redacted can be got back: what needs the secret has it from `${env:NAME}` or is given it again.
"""

from __future__ import annotations

import re
import threading

STARS = "***"

# scheme://user:password@host, also with a "/" or "@" in the password, as in keys of S3 that nobody has encoded; but not
# a port and a path behind it that has an "@", and not `${env:NAME}`, which is none yet.
_IN_AUTHORITY = re.compile(
    r"""(?<!\bgithub)(://[^\s/@:"'<>?#\[]*:)(?!\d*(?:/|$)|\$\{env:\w+\}@)(?:[^\s/"'<>?#]+@|[^\s@"'<>?#]+@)"""
)
# https://TOKEN@host; a shorter one is a name.
_ALONE = re.compile(r"""(https?://)[^\s/@:"'<>?#]{16,}@""")
# What signs a request, so that having the URL is enough: AWS, Google, Azure (sig), and the usual names of tokens.
_IN_QUERY = re.compile(
    r"""([?&;](?:[\w.-]*(?:signature|token|password|passwd|secret|credential|secret[-_]?key)|"""
    r"""(?:[\w.-]*[-_.])?(?:sig|pwd|key|(?:api|access|account|secret|auth)[-_]?key(?:[-_]?id)?)|awsaccesskeyid)=)"""
    r"""(?!\$\{env:\w+\})[^&;#\s"'<>]+""",
    re.IGNORECASE,
)
_SHORTEST = 8
"""Characters: stars for every "text" would hide more than a secret."""


class _Learnt:
    """Secrets of this process, the longest first. What is pickled of it (as this module is, for nodes that lack it) has
    none of them."""

    def __init__(self) -> None:
        self._all: list[str] = []
        self._lock = threading.Lock()

    def add(self, secret: str) -> None:
        with self._lock:
            self._all = sorted({*self._all, secret}, key=len, reverse=True)

    def take_out_of(self, text: str) -> str:
        for secret in self._all:
            text = text.replace(secret, STARS)
        return text

    def __reduce__(self) -> tuple[type[_Learnt], tuple[()]]:
        return (_Learnt, ())


_learnt = _Learnt()


def learn(secret: str) -> None:
    """From now on `redact` hides this text of at least 8 characters wherever it is given it."""
    if len(secret) >= _SHORTEST:
        _learnt.add(secret)


def redact(text: str) -> str:
    """`text` with stars for the passwords and signatures of URLs in it, and for the secrets that were learnt."""
    return redact_urls(_learnt.take_out_of(text))


def redact_urls(text: str) -> str:
    """The same without what was learnt: what comes out depends on `text` alone."""
    if "://" not in text:
        return text
    if "@" in text:
        text = _ALONE.sub(rf"\1{STARS}@", _IN_AUTHORITY.sub(rf"\1{STARS}@", text))
    return _IN_QUERY.sub(rf"\1{STARS}", text) if "=" in text else text


def is_redacted(url: str) -> bool:
    """Whether stars stand in a URL for what is needed to open it."""
    return "://" in url and re.search(rf"[:/=]{re.escape(STARS)}(?:[@&;#]|$)", url) is not None
