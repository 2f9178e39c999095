"""Notices of Google Compute Engine, from its metadata server.

A spot VM that is preempted has 30 s; host maintenance is announced 60 s ahead, or an hour for VMs with GPUs, which it
always stops. The metadata server says that, not when, so the shorter time is assumed.
https://cloud.google.com/compute/docs/instances/create-use-spot
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
"""

from __future__ import annotations

from orchestrator.notices.http import Response, request
from orchestrator.notices.notice import Notice, SourceError, gather

BASE_URL = "http://169.254.169.254"
"""That of `metadata.google.internal`, without the need to look the name up."""
_FLAVOR = {"Metadata-Flavor": "Google"}
_PREEMPTION_NOTICE_S = 30.0
_MAINTENANCE_NOTICE_S = 60.0


def parse_preempted(response: Response, now: float) -> list[Notice]:
    """`instance/preempted`: TRUE or FALSE."""
    word = response.expect(200).text.strip().upper()
    if word not in ("TRUE", "FALSE"):
        raise SourceError(f"{response.url} answers neither TRUE nor FALSE: {response.text[:80]!r}")
    if word == "FALSE":
        return []
    return [Notice("preempted", "GCP preempts this VM", now + _PREEMPTION_NOTICE_S)]


def parse_maintenance(response: Response, now: float) -> list[Notice]:
    """`instance/maintenance-event`: NONE, MIGRATE_ON_HOST_MAINTENANCE or TERMINATE_ON_HOST_MAINTENANCE."""
    word = response.expect(200).text.strip().upper()
    if word == "NONE":
        return []
    deadline = now + _MAINTENANCE_NOTICE_S
    if word == "TERMINATE_ON_HOST_MAINTENANCE":
        return [Notice("maintenance terminate", "GCP stops this VM for host maintenance", deadline)]
    if word == "MIGRATE_ON_HOST_MAINTENANCE":
        return [Notice("maintenance migrate", "GCP moves this VM to another host, live", deadline, possible=True)]
    raise SourceError(f"{response.url} answers an unknown maintenance event: {response.text[:80]!r}")


class Gcp:
    """See `Source`."""

    name = "gcp"

    def __init__(self, base_url: str | None = None) -> None:
        self._base = (base_url or BASE_URL).rstrip("/")

    def detect(self) -> bool:
        try:
            answer = self._get("id")
        except SourceError:
            return False
        return answer.status == 200 and answer.headers.get("metadata-flavor") == "Google"

    def poll(self, now: float) -> list[Notice]:
        return gather(
            lambda: parse_preempted(self._get("preempted"), now),
            lambda: parse_maintenance(self._get("maintenance-event"), now),
        )

    def _get(self, name: str) -> Response:
        return request(f"{self._base}/computeMetadata/v1/instance/{name}", _FLAVOR)
