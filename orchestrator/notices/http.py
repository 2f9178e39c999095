"""HTTP as metadata services want it: never through a proxy, never redirected, with little patience."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any

from monitoring.outside import parse
from orchestrator.notices.notice import SourceError

TIMEOUT_S = 1.0
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Response:
    """An answer of any status; header names are in lower case."""

    status: int
    text: str
    headers: Mapping[str, str]
    url: str

    def json(self) -> Any:
        """Raises SourceError."""
        try:
            return parse(self.text)
        except ValueError as error:
            raise SourceError(f"{self.url} answers what is not JSON: {self.text[:80]!r}") from error

    def expect(self, *statuses: int) -> Response:
        """Raises SourceError when the answer has another status."""
        if self.status not in statuses:
            raise SourceError(f"{self.url} answers HTTP {self.status}: {self.text.strip()[:80]!r}")
        return self


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect means that something else answers than the metadata service, a captive portal perhaps."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:  # fmt: skip
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())


def request(
    url: str, headers: Mapping[str, str], method: str = "GET", timeout_s: float = TIMEOUT_S
) -> Response:  # fmt: skip
    """Raises SourceError when nothing answers."""
    asked = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _OPENER.open(asked, timeout=timeout_s) as answer:
            return _response(url, answer.status, answer, answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return _response(url, error.code, error, error.headers)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise SourceError(f"{url} does not answer: {str(reason) or type(reason).__name__}") from error


def _response(url: str, status: int, body: Any, headers: Message) -> Response:
    text = body.read(_MAX_BYTES).decode("utf-8", errors="replace")
    return Response(status, text, {name.lower(): value for name, value in headers.items()}, url)
