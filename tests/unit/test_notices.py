"""Notices of clouds, read from a real HTTP server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.notices.aws import Aws
from orchestrator.notices.azure import Azure
from orchestrator.notices.file import NoticeFile
from orchestrator.notices.gcp import Gcp
from orchestrator.notices.notice import Notice, NoticeError, SourceError, parse_time
from orchestrator.notices.sources import SOURCES, detect, make_source
from tests.fake_metadata import (
    AWS,
    AZURE,
    EVENTS,
    GCP,
    LIFECYCLE,
    MAINTENANCE,
    PREEMPTED,
    REBALANCE,
    SCHEDULED,
    SPOT,
    VM_NAME,
    MetadataServer,
)

NOW = datetime(2026, 8, 2, 8, 20, 0, tzinfo=UTC).timestamp()


@pytest.fixture
def aws() -> Iterator[MetadataServer]:
    with MetadataServer(AWS) as server:
        yield server


@pytest.fixture
def gcp() -> Iterator[MetadataServer]:
    with MetadataServer(GCP) as server:
        yield server


@pytest.fixture
def azure() -> Iterator[MetadataServer]:
    with MetadataServer(AZURE) as server:
        yield server


# ---------------------------------------------------------------------------------------- what the clouds say


@pytest.mark.parametrize(
    ("text", "clock"),
    [
        ("2026-08-02T08:22:00Z", "08:22:00"),
        ("2026-08-02T08:22:00", "08:22:00"),
        ("2026-08-02T10:22:00+02:00", "08:22:00"),
        ("02 Aug 2026 08:22:00 GMT", "08:22:00"),
        ("Sun, 02 Aug 2026 08:22:00 GMT", "08:22:00"),
        ("Sun, 02 Aug 2026 01:22:00 -0700", "08:22:00"),
    ],
)
def test_times_of_all_clouds_are_read_in_their_zone(text: str, clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert datetime.fromtimestamp(parse_time(text), UTC).strftime("%H:%M:%S") == clock


def test_aws_says_nothing_until_it_does(aws: MetadataServer) -> None:
    source = Aws(aws.url)
    assert source.poll(NOW) == []
    aws.paths[SPOT] = '{"action": "terminate", "time": "2026-08-02T08:22:00Z"}'
    (notice,) = source.poll(NOW)
    assert notice.deadline == NOW + 120
    assert "terminate" in notice.reason
    assert not notice.possible
    assert source.poll(NOW + 2) == [notice], "the same notice is the same on the next poll"
    assert aws.num_tokens == 1, "a token serves more than one request"


def test_aws_token_is_renewed_when_it_is_refused(aws: MetadataServer) -> None:
    source = Aws(aws.url)
    source.poll(NOW)
    aws.expire_tokens()
    aws.paths[SPOT] = '{"action": "stop", "time": "2026-08-02T08:21:00Z"}'
    assert [notice.deadline for notice in source.poll(NOW)] == [NOW + 60]
    assert aws.num_tokens == 2


def test_aws_hibernation_begins_at_once_and_an_unreadable_time_is_two_minutes(aws: MetadataServer) -> None:
    aws.paths[SPOT] = '{"action": "hibernate", "time": "2026-08-02T08:22:00Z"}'
    assert Aws(aws.url).poll(NOW)[0].deadline == NOW
    aws.paths[SPOT] = '{"action": "terminate", "time": "soon"}'
    assert Aws(aws.url).poll(NOW)[0].deadline == NOW + 120


def test_aws_scheduled_events_count_while_active(aws: MetadataServer) -> None:
    event = {"Code": "system-reboot", "Description": "scheduled reboot", "EventId": "instance-event-1",
             "NotBefore": "02 Aug 2026 09:20:00 GMT", "NotAfter": "02 Aug 2026 11:20:00 GMT"}  # fmt: skip
    events = [event | {"State": "completed"}, event | {"State": "active"},
              event | {"State": "active", "EventId": "instance-event-2", "Code": "system-maintenance"}]  # fmt: skip
    aws.paths[SCHEDULED] = json.dumps(events)
    reboot, maintenance = Aws(aws.url).poll(NOW)
    assert (reboot.deadline, reboot.possible) == (NOW + 3600, False)
    assert "scheduled reboot" in reboot.reason
    assert maintenance.possible


def test_aws_lifecycle_and_rebalance(aws: MetadataServer) -> None:
    source = Aws(aws.url)
    aws.paths[LIFECYCLE] = "InService"
    assert source.poll(NOW) == []
    aws.paths[LIFECYCLE] = "Terminated"
    aws.paths[REBALANCE] = '{"noticeTime": "2026-08-02T08:19:00Z"}'
    leaves, may_leave = source.poll(NOW)
    assert (leaves.deadline, leaves.possible) == (None, False)
    assert (may_leave.deadline, may_leave.possible) == (None, True)


@pytest.mark.parametrize("text", ["<html>log in</html>", "[]", '{"instance-action": "none"}', ""])
def test_aws_garbage_is_an_error_and_no_notice(aws: MetadataServer, text: str) -> None:
    aws.paths[SPOT] = text
    with pytest.raises(SourceError, match="instance-action answers what is"):
        Aws(aws.url).poll(NOW)


def test_trouble_with_one_question_hides_no_notice_of_another(aws: MetadataServer) -> None:
    aws.paths[SCHEDULED] = "garbage"
    aws.paths[SPOT] = '{"action": "terminate", "time": "2026-08-02T08:22:00Z"}'
    assert [notice.deadline for notice in Aws(aws.url).poll(NOW)] == [NOW + 120]
    del aws.paths[SPOT]
    with pytest.raises(SourceError, match="maintenance/scheduled"):
        Aws(aws.url).poll(NOW)


def test_gcp(gcp: MetadataServer) -> None:
    source = Gcp(gcp.url)
    assert source.poll(NOW) == []
    gcp.paths[PREEMPTED] = "TRUE"
    assert [(n.deadline, n.possible) for n in source.poll(NOW)] == [(NOW + 30, False)]
    gcp.paths |= {PREEMPTED: "FALSE", MAINTENANCE: "TERMINATE_ON_HOST_MAINTENANCE"}
    assert [(n.deadline, n.possible) for n in source.poll(NOW)] == [(NOW + 60, False)]
    gcp.paths[MAINTENANCE] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert [n.possible for n in source.poll(NOW)] == [True]
    gcp.paths |= {PREEMPTED: "perhaps", MAINTENANCE: "NONE"}
    with pytest.raises(SourceError, match="neither TRUE nor FALSE"):
        source.poll(NOW)


def azure_event(**changed: object) -> dict[str, object]:
    return {
        "EventId": "602d9444", "EventType": "Preempt", "ResourceType": "VirtualMachine", "EventStatus": "Scheduled",
        "Resources": ["other_0", "GPU-worker_3"], "NotBefore": "Sun, 02 Aug 2026 08:20:30 GMT", "Description": "",
        "EventSource": "Platform", "DurationInSeconds": -1, **changed,
    }  # fmt: skip


def test_azure_events_that_name_this_vm(azure: MetadataServer) -> None:
    source = Azure(azure.url)
    assert source.poll(NOW) == []
    events = [azure_event(), azure_event(EventId="b", Resources=["other_0"]),
              azure_event(EventId="c", EventType="Reboot", NotBefore="Sun, 02 Aug 2026 08:35:00 GMT"),
              azure_event(EventId="d", EventType="Freeze"),
              azure_event(EventId="e", EventType="Redeploy", EventStatus="Started", NotBefore="")]  # fmt: skip
    azure.paths[EVENTS] = json.dumps({"DocumentIncarnation": 2, "Events": events})
    found = {notice.key: (notice.deadline, notice.possible) for notice in source.poll(NOW)}
    assert found == {
        "602d9444": (NOW + 30, False), "c": (NOW + 900, False), "d": (NOW + 30, True), "e": (NOW, False),
    }  # fmt: skip
    assert [path for _, path in azure.asked].count(f"{VM_NAME}?api-version=2021-02-01&format=text") == 1


@pytest.mark.parametrize("text", ["oops", "{}", '{"Events": {}}'])
def test_azure_garbage_is_an_error(azure: MetadataServer, text: str) -> None:
    azure.paths[EVENTS] = text
    with pytest.raises(SourceError, match="scheduledevents"):
        Azure(azure.url).poll(NOW)


@pytest.mark.parametrize("cloud", [AWS, GCP, AZURE])
def test_a_service_that_fails_or_is_gone_is_an_error(cloud: str) -> None:
    with MetadataServer(cloud) as server:
        source = SOURCES[cloud](server.url)
        server.fails_with = 503
        with pytest.raises(SourceError, match=r"answers HTTP 503: 'out of order'"):
            source.poll(NOW)
    with pytest.raises(SourceError, match="does not answer"):
        source.poll(NOW)


def test_no_proxy_is_asked(aws: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Aws(aws.url).poll(NOW) == []


def test_a_file_is_a_notice(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    source = NoticeFile(path)
    assert source.poll(NOW) == []
    path.write_text('{"deadline_s": 90, "reason": "rack move"}')
    (notice,) = source.poll(NOW)
    assert notice.reason == "rack move"
    assert notice.deadline == pytest.approx(path.stat().st_mtime + 90)
    for text, reason in [("", f"{path} is there"), ("power work\n", "power work"), ('{"deadline_s": "x"}', str(path))]:
        path.write_text(text)
        (notice,) = source.poll(NOW)
        assert reason in notice.reason
        assert notice.deadline is None


# ---------------------------------------------------------------------------------------- which source there is


@pytest.mark.parametrize("cloud", [AWS, GCP, AZURE])
def test_the_cloud_is_recognised(cloud: str) -> None:
    with MetadataServer(cloud) as server:
        found = detect(server.url, threading.Event(), tries=1)
    assert found is not None
    assert found.name == cloud


def test_detection_is_patient_then_finds_nothing(aws: MetadataServer) -> None:
    aws.fails_with = 500
    assert detect(aws.url, threading.Event(), tries=3, pause_s=0.01) is None
    assert len(aws.asked) == 9, "three services, three times"
    threading.Timer(0.2, lambda: setattr(aws, "fails_with", None)).start()
    found = detect(aws.url, threading.Event(), tries=50, pause_s=0.05)
    assert found is not None
    assert found.name == "aws"


class Own:
    """A source of somebody else's."""

    name = "own"

    def __init__(self, base_url: str | None) -> None:
        self.base_url = base_url

    def detect(self) -> bool:
        return True

    def poll(self, now: float) -> list[Notice]:
        return []


def test_a_source_of_ones_own_is_made_and_a_bad_name_refused() -> None:
    made = make_source(f"{__name__}:Own", "http://here")
    assert (made.name, made.base_url) == ("own", "http://here")  # type: ignore[attr-defined]
    with pytest.raises(NoticeError, match="choose one of auto, aws, gcp, azure, none"):
        make_source("amazon", None)
    with pytest.raises(NoticeError, match="ModuleNotFoundError"):
        make_source("no.such.module:Class", None)
    with pytest.raises(NoticeError, match="it has no detect, poll"):
        make_source("pathlib:PurePath", "x")
