"""Who may see the page. Pure: the checks, without a web server.

On loopback everybody on this machine may, unless there is a token; a foreign web page that has its own name resolved
to loopback (DNS rebinding) is told apart by the Host that the browser sends, and one that has the browser ask for
something here (an image, a frame) by its fetch metadata. Beyond loopback nobody may without token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from monitoring.errors import UserError
from monitoring.secret_files import others

TOKEN_VARIABLE = "ORCHESTRATOR_PAGE_TOKEN"
MIN_TOKEN_LENGTH = 16


class PageError(UserError, ValueError):
    """The page cannot be served as asked; says why and what to do."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host` (an address, or localhost)."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def name_in(host_header: str | None) -> str | None:
    """The name or address in a request's Host, without the port; None when there is none."""
    try:
        return urlsplit(f"//{host_header or ''}").hostname
    except ValueError:
        return None


def is_own_name(host_header: str | None, served_on: str) -> bool:
    """Whether a request's Host is what this machine is called: no foreign name that was made to point here.

    On loopback these are loopback's names; elsewhere any address, as a page that has its name resolved to another's
    address sends the name, and this machine's own name.
    """
    name = name_in(host_header)
    if name is None:
        return False
    if is_loopback(name) or is_loopback(served_on):
        return is_loopback(name)
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name.lower().rstrip(".") in (served_on.lower(), socket.gethostname().lower())


def check_exposure(host: str, token: str | None) -> None:
    """Raises PageError when the page would be open to other machines without a token, or the token is too short."""
    if token is not None and (len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable()):
        raise PageError(f"the page's token needs at least {MIN_TOKEN_LENGTH} printable ASCII characters; make one with "
                        "`openssl rand -hex 16`")  # fmt: skip
    if token is None and not is_loopback(host):
        raise PageError(
            f"--host {host} can be reached from other machines, so the page needs a token: set {TOKEN_VARIABLE}, or "
            "write one to a file and give --token-file FILE (`openssl rand -hex 16` makes one); or keep to 127.0.0.1 "
            "and forward the port with ssh -L"
        )


def token_of(path: Path) -> str:
    """The token in a file. Raises PageError when there is none, or when others could read it too."""
    try:
        token = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode & 0o777
    except (OSError, UnicodeDecodeError) as error:
        raise PageError(f"--token-file {path} cannot be read: {error}") from error
    if not token:
        raise PageError(f"--token-file {path} is empty; write a token to it, e.g. with `openssl rand -hex 16`")
    if who := others(mode):
        raise PageError(f"--token-file {path} has mode {mode:o}: open to {who}; chmod 600 {path}")
    return token


class Access:
    """The checks of one server, which listens on `host`."""

    def __init__(self, host: str, token: str | None) -> None:
        check_exposure(host, token)
        self._loopback = is_loopback(host)
        self._token = token
        # The browser keeps this instead of the token, which it need not know.
        self.cookie = "" if token is None else hmac.new(token.encode(), b"the live page", hashlib.sha256).hexdigest()

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    def is_host_allowed(self, host_header: str | None) -> bool:
        """Whether a request's Host is one that this machine calls itself; of a forwarded port too."""
        if not self._loopback:
            return True
        name = name_in(host_header)
        return name is not None and is_loopback(name)

    def is_site_allowed(self, headers: Mapping[str, str], path: str) -> bool:
        """Whether a browser may ask for `path` on behalf of the web page that made it ask.

        A page of another site may only link to `/`: it is not to take the places of those who look, nor to have
        reports made. Browsers say so in the Sec-Fetch headers, which no page can set; other programs send none.
        """
        if not self._loopback or headers.get("Sec-Fetch-Site") != "cross-site":
            return True
        is_link = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
        return is_link and path == "/"

    def is_token(self, given: str) -> bool:
        """Compares in a time that tells nothing."""
        return self._token is not None and hmac.compare_digest(given.encode(errors="replace"), self._token.encode())

    def is_allowed(self, headers: Mapping[str, str], cookie: str | None) -> bool:
        """Whether a request has the token, or the cookie that stands for it."""
        if self._token is None:
            return True
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(given.strip()):
            return True
        return cookie is not None and hmac.compare_digest(cookie.encode(errors="replace"), self.cookie.encode())
