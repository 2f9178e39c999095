"""Notices of Azure, from the scheduled events of its instance metadata service.

Events come for all machines of a set, so only those that name this one count. Usual notice: Preempt 30 s, Terminate 5
to 15 min, Redeploy 10 min, Reboot 15 min. Nothing is acknowledged: that would bring the event on sooner.
https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

from orchestrator.notices.http import Response, request
from orchestrator.notices.notice import Notice, SourceError, parse_time

BASE_URL = "http://169.254.169.254"
_METADATA = {"Metadata": "true"}
_EVENTS_TIMEOUT_S = 5.0
"""The very first request switches scheduled events on and may take minutes; later ones answer at once."""
_DOES = {
    "Preempt": "takes this spot VM back",
    "Terminate": "deletes this VM",
    "Redeploy": "moves this VM to another host",
    "Reboot": "reboots this VM",
}


def parse_events(response: Response, vm_name: str, now: float) -> list[Notice]:
    """`scheduledevents`: `{"DocumentIncarnation": 2, "Events": [...]}`."""
    content = response.expect(200).json()
    events = content.get("Events") if isinstance(content, dict) else None
    if not isinstance(events, list):
        raise SourceError(f"{response.url} answers what is no list of events: {response.text[:80]!r}")
    notices = []
    for event in events:
        if not isinstance(event, dict) or not _is_named(vm_name, event.get("Resources")):
            continue
        kind, begins = str(event.get("EventType")), str(event.get("NotBefore") or "")
        try:
            # Blank once it has begun.
            deadline = parse_time(begins) if begins else now
        except ValueError as error:
            raise SourceError(f"{response.url}: {kind} at {error}") from error
        does = _DOES.get(kind, f"announces {kind} for this VM")
        reason = f"Azure {does} ({event.get('Description') or event.get('EventSource') or 'no description'})"
        # Not its status: the same event goes from Scheduled to Started.
        notices.append(Notice(str(event.get("EventId")), reason, deadline, possible=kind not in _DOES))
    return notices


def _is_named(vm_name: str, resources: object) -> bool:
    return isinstance(resources, list) and vm_name.lower() in (str(name).lower() for name in resources)


class Azure:
    """See `Source`."""

    name = "azure"

    def __init__(self, base_url: str | None = None) -> None:
        self._base = (base_url or BASE_URL).rstrip("/")
        self._vm_name: str | None = None

    def detect(self) -> bool:
        try:
            return bool(self._name())
        except SourceError:
            return False

    def poll(self, now: float) -> list[Notice]:
        url = f"{self._base}/metadata/scheduledevents?api-version=2020-07-01"
        return parse_events(request(url, _METADATA, timeout_s=_EVENTS_TIMEOUT_S), self._name(), now)

    def _name(self) -> str:
        if self._vm_name is None:
            url = f"{self._base}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._vm_name = request(url, _METADATA).expect(200).text.strip() or None
            if self._vm_name is None:
                raise SourceError(f"{url} answers no name")
        return self._vm_name
