"""Workers are asked for on a thread of its own: one that is not wanted any more is not left behind."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from orchestrator.control.core.protocol import Abort, Died, KillWorker, RequestWorker
from orchestrator.control.core.workers import WorkerId
from orchestrator.runtime.ray import processes as module
from orchestrator.runtime.ray.placement import Bundle, WorkerHandle
from orchestrator.runtime.ray.presence import Raylets
from orchestrator.runtime.ray.processes import WorkerProcesses
from orchestrator.runtime.ray.resource_request import Need

NEED = Need({"CPU": 1.0}, 2, {})
PATIENCE_S = 60.0


class FakeRay:
    """What is asked of it waits for `answers`: an error to raise, or None for an actor. `asked` and `killed` say whom
    for; `groups` are placement groups, of which those given back are gone."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.answers: queue.Queue[Exception | None] = queue.Queue()
        self.asked: queue.Queue[WorkerId] = queue.Queue()
        self.killed: list[WorkerId] = []
        self.taken_back: queue.Queue[WorkerId] = queue.Queue()
        self.groups: list[str] = []
        fake = self

        def ask(handle: WorkerHandle, *args: Any, **more: Any) -> None:
            handle.was_asked_for = True
            fake.asked.put(handle.worker)
            answer = fake.answers.get(timeout=PATIENCE_S)
            if answer is not None:
                raise answer
            assert handle.place is not None
            handle.place.reserve(lambda: fake._reserve(str(handle.worker)))
            handle.actor = str(handle.worker)

        def kill(handle: WorkerHandle) -> None:
            handle.is_ended = True
            if handle.actor is not None:
                fake.killed.append(handle.worker)
            handle.free()

        patch.setattr(WorkerHandle, "ask", ask)
        patch.setattr(WorkerHandle, "kill", kill)
        patch.setattr(WorkerHandle, "watch", lambda handle, gone: None)
        patch.setattr(WorkerHandle, "take_back", lambda handle: fake.taken_back.put(handle.worker))
        patch.setattr(
            "orchestrator.runtime.ray.placement.remove_placement_group", lambda group: self.groups.remove(group)
        )
        patch.setattr(module, "AGAIN_S", 0.01)

    def _reserve(self, name: str) -> Any:
        self.groups.append(name)
        return name


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return FakeRay(monkeypatch)


@pytest.fixture
def told() -> queue.Queue[Died | Abort]:
    return queue.Queue()


@pytest.fixture
def processes(cluster: FakeRay, told: queue.Queue[Died | Abort]) -> Iterator[WorkerProcesses]:
    processes = WorkerProcesses("run", 2, None, told.put)
    yield processes
    processes.ask_no_more()


def request(processes: WorkerProcesses, slot: int, incarnation: int = 0) -> WorkerId:
    worker = WorkerId(slot, incarnation)
    processes.request(RequestWorker(worker), {}, NEED)
    return worker


def wait_until(condition: Callable[[], bool]) -> None:
    event = threading.Event()
    for _ in range(int(PATIENCE_S / 0.01)):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("not in time")


def test_it_asks_until_it_is_answered_and_nobody_waits_for_that(cluster: FakeRay, processes: WorkerProcesses) -> None:
    worker = request(processes, 0)
    assert processes.handles[worker].where() is None, "it waits for a place"
    for _ in range(3):
        cluster.answers.put(ray.exceptions.GetTimeoutError("no GCS"))
    cluster.answers.put(None)
    wait_until(lambda: processes.handles[worker].actor is not None)
    assert [cluster.asked.get(timeout=PATIENCE_S) for _ in range(4)] == [worker] * 4


def test_a_unit_shares_the_place_that_its_first_worker_is_still_asked_for(
    cluster: FakeRay, processes: WorkerProcesses
) -> None:
    first, second, other = request(processes, 0), request(processes, 1), request(processes, 2)
    for _ in range(3):
        cluster.answers.put(None)
    wait_until(lambda: processes.handles[other].actor is not None)
    assert processes.handles[first].place is processes.handles[second].place
    assert cluster.groups == [str(first), str(other)]


def test_one_that_is_ended_before_it_was_asked_for_is_not_asked_for(
    cluster: FakeRay, processes: WorkerProcesses, told: queue.Queue[Died | Abort]
) -> None:
    first, second = request(processes, 0), request(processes, 2)
    cluster.asked.get(timeout=PATIENCE_S)
    handle = processes.handles[second]
    processes.kill(KillWorker(second, "test"))
    wait_until(lambda: handle.is_ended)
    cluster.answers.put(None)
    assert told.get(timeout=PATIENCE_S) == Died(second, "not wanted any more")
    assert cluster.groups == [str(first)]
    assert cluster.asked.empty()


def test_one_that_is_ended_while_it_is_asked_for_is_ended_when_it_is_there(
    cluster: FakeRay, processes: WorkerProcesses
) -> None:
    worker = request(processes, 0)
    cluster.asked.get(timeout=PATIENCE_S)
    handle = processes.handles[worker]
    processes.kill(KillWorker(worker, "test"))
    wait_until(lambda: handle.is_ended)
    cluster.answers.put(None)
    wait_until(lambda: cluster.killed == [worker])
    assert cluster.groups == [], "nor is its place left"


def test_what_came_of_a_request_that_was_not_answered_is_taken_back_when_nobody_wants_it_any_more(
    cluster: FakeRay, processes: WorkerProcesses, told: queue.Queue[Died | Abort]
) -> None:
    worker = request(processes, 0)
    cluster.asked.get(timeout=PATIENCE_S)
    handle = processes.handles[worker]
    processes.kill(KillWorker(worker, "test"))
    wait_until(lambda: handle.is_ended)
    cluster.answers.put(ray.exceptions.GetTimeoutError("no GCS"))
    assert cluster.taken_back.get(timeout=PATIENCE_S) == worker
    assert told.get(timeout=PATIENCE_S) == Died(worker, "not wanted any more")


def test_what_cannot_be_asked_for_is_the_end_of_a_run_that_begins_and_a_failed_start_of_others(
    cluster: FakeRay, processes: WorkerProcesses, told: queue.Queue[Died | Abort]
) -> None:
    worker = request(processes, 0)
    cluster.answers.put(ValueError("labels make no sense"))
    why = f"worker {worker} cannot be asked for: ValueError: labels make no sense"
    assert [told.get(timeout=PATIENCE_S) for _ in range(2)] == [Abort(why), Died(worker, why)]


def test_it_is_known_that_ray_does_not_answer(
    cluster: FakeRay, processes: WorkerProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENT_S", 0.05)
    assert not processes.asks_in_vain
    worker = request(processes, 0)
    wait_until(lambda: processes.asks_in_vain)
    cluster.answers.put(None)
    wait_until(lambda: not processes.asks_in_vain)
    assert processes.handles[worker].actor is not None


@pytest.mark.parametrize(("unit", "shares"), [(1, False), (2, True)])
def test_a_place_on_a_node_to_avoid_is_not_used_again_unless_others_of_the_unit_are_there(
    cluster: FakeRay, told: queue.Queue[Died | Abort], unit: int, shares: bool
) -> None:
    processes = WorkerProcesses("run", unit, None, told.put)
    lost = request(processes, 0)
    cluster.answers.put(None)
    wait_until(lambda: processes.handles[lost].actor is not None)
    processes.handles[lost].node = "bad"
    next_one = WorkerId(0, 1)
    processes.request(RequestWorker(next_one, avoid=("bad",)), {}, NEED)
    cluster.answers.put(None)
    wait_until(lambda: processes.handles[next_one].actor is not None)
    assert (processes.handles[next_one].place is processes.handles[lost].place) is shares
    processes.ask_no_more()


def test_a_place_is_asked_for_once_and_not_kept_when_all_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Any] = []
    monkeypatch.setattr("orchestrator.runtime.ray.placement.remove_placement_group", removed.append)
    place, group = Bundle("run/worker-0.0"), object()
    assert place.take(WorkerId(0, 0))
    assert place.take(WorkerId(1, 0))
    place.leave(WorkerId(0, 0))
    assert place.reserve(lambda: group) is group  # type: ignore[arg-type, return-value]
    assert place.reserve(lambda: pytest.fail("it is there")) is group
    assert removed == []
    place.leave(WorkerId(1, 0))
    assert removed == [group]
    assert not place.take(WorkerId(1, 1))


def test_whether_a_node_is_gone_is_seen_without_asking_ray_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as listens:
        port = listens.getsockname()[1]
        nodes = [
            {"NodeID": "a", "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port},
            {"NodeID": "b", "Alive": False, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port},
        ]
        monkeypatch.setattr(ray, "nodes", lambda: asked.append(True) or nodes)
        raylets = Raylets()
        assert not raylets.is_gone("a"), "not that anybody knew"
        raylets.learn({"a", "b"})
        raylets.learn({"a"})
        assert (raylets.is_gone("a"), raylets.is_gone("b")) == (False, True)
    assert raylets.is_gone("a"), "nothing listens any more"
    assert len(asked) == 1


class Table:
    """Ray's tables as far as a worker's request looks at them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.groups: dict[str, dict[str, Any]] = {}
        self.actors: dict[str, str] = {}
        self.ended: list[Any] = []
        where = "orchestrator.runtime.ray.placement"
        patch.setattr(ray.util, "placement_group_table", lambda: self.groups)
        patch.setattr(ray, "get_actor", self._get_actor)
        patch.setattr(ray, "kill", lambda actor, no_restart: self.ended.append(actor))
        patch.setattr(f"{where}.PlacementGroup", lambda found: found)
        patch.setattr(ray, "PlacementGroupID", lambda number: number.hex())
        patch.setattr(f"{where}.remove_placement_group", self.ended.append)

    def _get_actor(self, name: str, namespace: str) -> str:
        assert namespace == "orchestrator"
        if name not in self.actors:
            raise ValueError("there is none")
        return self.actors[name]


def test_what_a_request_left_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch)
    handle = WorkerHandle.to_be("run", WorkerId(1, 2), [])
    handle.take_back()
    assert table.ended == []
    table.groups = {
        "aa": {"name": "run/worker-1.1", "state": "CREATED"},
        "bb": {"name": "run/worker-1.2", "state": "REMOVED"},
        "cc": {"name": "run/worker-1.2", "state": "PENDING"},
    }
    table.actors = {"run/worker-1.2": "the actor"}
    handle.take_back()
    assert table.ended == ["the actor", "cc"]
