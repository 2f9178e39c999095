"""Notices of AWS EC2, from its instance metadata service (IMDSv2).

What is looked at: the spot interruption notice (two minutes ahead, "best effort"), scheduled events of the instance
(days ahead), the state its Auto Scaling group moves it to, and, as a possible notice, the rebalance recommendation.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

from __future__ import annotations

from orchestrator.notices.http import Response, request
from orchestrator.notices.notice import Notice, SourceError, gather, parse_time

BASE_URL = "http://169.254.169.254"
_TOKEN_TTL_S = 21600
_SPOT_NOTICE_S = 120.0

_LEAVING = {"Terminated", "Warmed:Terminated", "Warmed:Stopped", "Warmed:Hibernated"}
"""Target lifecycle states in which an Auto Scaling group ends an instance or lets it sleep. It says no time, as that
depends on the group's lifecycle hooks."""
_TAKES_THE_INSTANCE = {"instance-stop", "instance-retirement", "instance-reboot", "system-reboot"}
"""Codes of scheduled events that end what runs; `system-maintenance` only may interrupt network or power."""


def parse_spot(response: Response, now: float) -> list[Notice]:
    """`spot/instance-action`: absent (404), or `{"action": "terminate", "time": "2026-08-02T08:22:00Z"}`."""
    if response.expect(200, 404).status == 404:
        return []
    content = response.json()
    if not isinstance(content, dict) or not isinstance(content.get("action"), str):
        raise SourceError(f"{response.url} answers what is no interruption notice: {response.text[:80]!r}")
    action, time = content["action"], str(content.get("time", ""))
    try:
        deadline = parse_time(time)
    except ValueError:
        # That it will be interrupted counts for more than a time that cannot be read.
        deadline = now + _SPOT_NOTICE_S
    if action == "hibernate":
        deadline = min(deadline, now)  # Which begins at once.
    return [Notice(f"spot {action} {time}", f"AWS will {action} this spot instance", deadline)]


def parse_scheduled(response: Response) -> list[Notice]:
    """`events/maintenance/scheduled`: absent, or a list of events, those of the past too."""
    if response.expect(200, 404).status == 404 or not response.text.strip():
        return []
    content = response.json()
    if not isinstance(content, list):
        raise SourceError(f"{response.url} answers what is no list of events: {response.text[:80]!r}")
    notices = []
    for event in content:
        if not isinstance(event, dict) or event.get("State", "active") != "active":
            continue
        code, begins = str(event.get("Code", "event")), str(event.get("NotBefore", ""))
        try:
            deadline = parse_time(begins)
        except ValueError as error:
            raise SourceError(f"{response.url}: {code} at {error}") from error
        reason = f"AWS has scheduled {code} ({event.get('Description') or 'no description'})"
        key = f"scheduled {event.get('EventId') or code} {begins}"
        notices.append(Notice(key, reason, deadline, possible=code not in _TAKES_THE_INSTANCE))
    return notices


def parse_lifecycle(response: Response) -> list[Notice]:
    """`autoscaling/target-lifecycle-state`: absent, or a word such as `InService`."""
    state = response.text.strip()
    if response.expect(200, 404).status == 404 or state not in _LEAVING:
        return []
    return [Notice(f"lifecycle {state}", f"AWS Auto Scaling moves this instance to {state}", None)]


def parse_rebalance(response: Response) -> list[Notice]:
    """`events/recommendations/rebalance`: absent, or `{"noticeTime": "2026-08-02T08:22:00Z"}`."""
    if response.expect(200, 404).status == 404:
        return []
    content = response.json()
    if not isinstance(content, dict) or "noticeTime" not in content:
        raise SourceError(f"{response.url} answers what is no recommendation: {response.text[:80]!r}")
    reason = "AWS expects to interrupt this spot instance (rebalance recommendation)"
    return [Notice(f"rebalance {content['noticeTime']}", reason, None, possible=True)]


class Aws:
    """See `Source`."""

    name = "aws"

    def __init__(self, base_url: str | None = None) -> None:
        self._base = (base_url or BASE_URL).rstrip("/")
        self._token: str | None = None

    def detect(self) -> bool:
        try:
            self._new_token()
            return self._get("instance-id").status == 200
        except SourceError:
            return False

    def poll(self, now: float) -> list[Notice]:
        return gather(
            lambda: parse_spot(self._get("spot/instance-action"), now),
            lambda: parse_lifecycle(self._get("autoscaling/target-lifecycle-state")),
            lambda: parse_scheduled(self._get("events/maintenance/scheduled")),
            lambda: parse_rebalance(self._get("events/recommendations/rebalance")),
        )

    def _get(self, path: str) -> Response:
        """With a new token when the old one is refused, as it is after its time."""
        url = f"{self._base}/latest/meta-data/{path}"
        if self._token is not None:
            response = request(url, {"X-aws-ec2-metadata-token": self._token})
            if response.status != 401:
                return response
        return request(url, {"X-aws-ec2-metadata-token": self._new_token()})

    def _new_token(self) -> str:
        self._token = None
        url = f"{self._base}/latest/api/token"
        answer = request(url, {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}, method="PUT").expect(200)
        # It goes into a header: what cannot be one is the answer of something else.
        self._token = answer.text.strip()
        if not self._token or not self._token.isascii() or not self._token.isprintable():
            self._token = None
            raise SourceError(f"{url} answers what is no token")
        return self._token
