"""Passwords in text that is shown or written down: one function that takes them out, wherever text leaves the process.

Nothing that is redacted can be got back: whoever needs the secret has it from `${env:NAME}` or gives it again.
"""

from __future__ import annotations

import re
import threading

STARS = "***"

# scheme://user:password@host, also with a "/" or "@" in the password, as in keys of S3 that nobody has encoded; but not
# a port and a path behind it that has an "@", and not `${env:NAME}`, which is none yet.
_IN_AUTHORITY = re.compile(r"""(://[^\s/@:"'<>?#]*:)(?!\d*(?:/|$)|\$\{env:\w+\}@)(?:[^\s/"'<>?#]+@|[^\s@"'<>?#]+@)""")
# What signs a request for whoever has the URL: AWS, Google, Azure (sig), and the usual names of tokens.
_IN_QUERY = re.compile(
    r"""([?&;](?:[\w.-]*[-_.])?(?:sig|signature|token|access[-_]?token|password|passwd|secret|credential|"""
    r"""(?:api|access|account|secret|auth)[-_]?(?:key|id)?|awsaccesskeyid|key)=)(?!\$\{env:\w+\})[^&;#\s"'<>]+""",
    re.IGNORECASE,
)
_SHORTEST = 4
"""Characters: to put stars for every "a" would hide all text and no secret."""
_known: set[str] = set()
_lock = threading.Lock()


def learn(secret: str) -> None:
    """From now on `redact` hides this text of at least 4 characters wherever it is found in this process."""
    if len(secret) >= _SHORTEST:
        with _lock:
            _known.add(secret)


def redact(text: str) -> str:
    """`text` with stars for the passwords and signatures of URLs in it, and for the secrets that were learnt."""
    if _known:
        with _lock:
            known = sorted(_known, key=len, reverse=True)
        for secret in known:
            text = text.replace(secret, STARS)
    if "://" not in text:
        return text
    text = _IN_AUTHORITY.sub(rf"\1{STARS}@", text)
    return _IN_QUERY.sub(rf"\1{STARS}", text) if "=" in text else text


def is_redacted(url: str) -> bool:
    """Whether stars stand in a URL for what is needed to open it."""
    return "://" in url and (f":{STARS}@" in url or f"={STARS}" in url)
