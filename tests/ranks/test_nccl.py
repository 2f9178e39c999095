"""Every layout, and what goes wrong with it, over a fake NCCL that behaves as the real one does where it hurts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.control.core.workers import WorkerId
from strategies.comm import nccl
from strategies.comm.fabric import Fabric
from strategies.comm.group_errors import Misconfigured, PeerLost
from tests.ranks.fake_nccl import ASKED_WHILE_ABORTING, FakeNccl
from tests.ranks.laid_out import CPU, layout_of
from tests.ranks.local_cluster import LocalCluster, Outcome, die, stop_for_good, tiny_job
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks
from tests.ranks.other_transports import pretend_nccl
from tests.ranks.test_transports import assert_same_over
from tests.selection import nightly

FAST_STALL = "elastic.progress_timeout_s=1.5"
PATIENT = "elastic.interrupt_timeout_s=60"
"""A worker that breaks out of a collective by itself is not ended, however slow this machine is."""


def test_every_layout_gives_the_same_bits() -> None:
    layouts = [layout_of(3), layout_of(2, shard="parameters"), layout_of(2, 2, shard="gradients"), layout_of(1, 2)]
    assert_same_over(pretend_nccl, layouts)


def test_tensor_parallel_layouts_give_the_same_bits() -> None:
    assert_same_over(pretend_nccl, [layout_of(tensor=2), layout_of(2, 1, 2, "optimizer")])


def test_exchanges_inside_of_a_model_need_not_be_waited_for_one_by_one() -> None:
    assert_same_over(pretend_ordered, [layout_of(3, shard="parameters"), layout_of(2, 2, shard="parameters")])


def pretend_ordered() -> None:
    pretend_nccl(orders=True)


# ---------------------------------------------------------------------------------------- stories


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One worker, which has no groups."""
    return LocalCluster(
        job_text, tmp_path_factory.mktemp("undisturbed") / "run", overrides=["elastic.workers.max=1"]
    ).run()


@pytest.fixture
def run(job_text: str, tmp_path: Path) -> Callable[..., Outcome]:
    def start(*overrides: str, first: Callable[[], None] = pretend_nccl, **arguments: Any) -> Outcome:
        return LocalCluster(job_text, tmp_path / "run", first=first, overrides=list(overrides), **arguments).run()

    return start


def assert_survived(outcome: Outcome, expected: Outcome, *lost: int) -> None:
    """The same bits, no step lost, and only the `lost` workers lost their processes."""
    assert outcome.status == "finished", outcome.reason
    died = [(fields["worker"], fields.get("detail")) for fields in outcome.of("worker_died")]
    assert all(str(ASKED_WHILE_ABORTING) not in str(detail) for _, detail in died), died
    assert (outcome.digest, outcome.losses) == (expected.digest, expected.losses)
    assert (outcome.rollbacks, outcome.steps_lost) == ([], 0)
    survivors = {worker: pid for worker, pid in outcome.members(0).items() if worker.slot not in lost}
    assert survivors.items() <= outcome.members(1).items()


LAYOUTS = {
    "replicated": "{}",
    "sharded": "{shard: parameters}",
    "mirrored": "{shard: optimizer}",
}


@pytest.mark.parametrize("phase", ["reduce", "vote", *nightly(["data", "compute", "gather", "commit"])])
@pytest.mark.parametrize("layout", ["replicated", *nightly(["sharded", "mirrored"])])
def test_a_kill_costs_no_step(run: Callable[..., Outcome], undisturbed: Outcome, phase: str, layout: str) -> None:
    faults = [f"step=3,worker=1,kind=kill,phase={phase}"]
    outcome = run(f"strategy={LAYOUTS[layout]}", faults=faults)
    assert_survived(outcome, undisturbed, 1)
    assert outcome.recoveries[0]["kind"] == "kill"


@pytest.mark.parametrize("layout", ["mirrored", *nightly(["replicated", "sharded"])])
def test_a_rank_that_hangs_costs_no_step(run: Callable[..., Outcome], undisturbed: Outcome, layout: str) -> None:
    faults = ["step=3,worker=1,kind=hang,phase=reduce"]
    outcome = run(f"strategy={LAYOUTS[layout]}", faults=faults)
    assert_survived(outcome, undisturbed, 1)
    assert outcome.recoveries[0]["kind"] == "hang"


def test_a_collective_that_hangs_is_aborted_and_costs_nobody_its_process(
    run: Callable[..., Outcome], undisturbed: Outcome
) -> None:
    outcome = run(FAST_STALL, PATIENT, faults=["step=3,worker=1,kind=nccl-hang,phase=reduce"])
    assert_survived(outcome, undisturbed)
    assert outcome.of("worker_killed") == []


@pytest.mark.parametrize(
    "fault", ["kind=kill,phase=compute", "kind=nccl-hang,phase=compute", *nightly(["kind=kill,phase=data"])]
)
def test_what_is_aborted_inside_of_a_model_is_noticed_at_the_end_of_the_pass(
    run: Callable[..., Outcome], undisturbed: Outcome, fault: str
) -> None:
    """Until then the model is computed with rubbish."""
    outcome = run(
        "strategy={shard: parameters}",
        FAST_STALL,
        PATIENT,
        first=pretend_ordered,
        faults=[f"step=3,worker=1,{fault}"],
    )
    assert_survived(outcome, undisturbed, *([1] if "kill" in fault else []))


@pytest.mark.parametrize("kind", ["device", "oom"])
def test_a_device_that_fails_and_too_little_memory(
    run: Callable[..., Outcome], undisturbed: Outcome, kind: str
) -> None:
    outcome = run(faults=[f"step=3,worker=1,kind={kind}"])
    assert_survived(outcome, undisturbed, *([1] if kind == "device" else []))
    assert outcome.recoveries[0]["kind"] == {"device": "device", "oom": "memory"}[kind]


def when_nccl_forms(generation: int, rank: int, action: Callable[[], None], worker: Any) -> None:
    """Runs `action` when the rank is about to form a communicator of `generation`, and the others wait for it there."""
    form = nccl.Nccl.form

    def watched(self: Any, *arguments: Any) -> Any:
        at = worker.protocol.generation
        if at.number == generation and at.rank_of(worker.worker) == rank:
            time.sleep(0.2)
            action()
        return form(self, *arguments)

    nccl.Nccl.form = watched  # type: ignore[method-assign]


@pytest.mark.parametrize(("action", "rank"), [(die, 0), (stop_for_good, 1), *nightly([(die, 1), (stop_for_good, 0)])])
def test_a_peer_lost_while_a_communicator_forms(
    run: Callable[..., Outcome], undisturbed: Outcome, action: Callable[[], None], rank: int
) -> None:
    """Those that wait for it cannot be told, and give up when their time is over: a second here."""
    outcome = run(
        "elastic.workers.max=4",
        faults=["step=2,worker=2,kind=kill"],
        hooks=[partial(when_nccl_forms, 1, rank, action)],
        holds={1: lambda cluster: cluster.is_whole(4)},
    )
    assert outcome.status == "finished", outcome.reason
    assert (outcome.digest, outcome.rollbacks, outcome.steps_lost) == (undisturbed.digest, [], 0)
    killed = {WorkerId(fields["worker"], 0) for fields in outcome.of("worker_killed")}
    assert killed <= {WorkerId(rank, 0)}, "the others kept their processes"


def test_two_workers_on_one_gpu_are_refused_at_once(run: Callable[..., Outcome]) -> None:
    outcome = run(first=partial(pretend_nccl, duplicate_gpu=True))
    assert outcome.status == "failed"
    assert "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device" in outcome.reason
    assert len(outcome.generations) == 1


# ---------------------------------------------------------------------------------------- what it would do by itself


def test_left_to_itself_it_ends_those_that_lose_a_peer(run: Callable[..., Outcome]) -> None:
    """What the environment is settled for: the fake does kill."""
    outcome = run(
        first=partial(pretend_nccl, settles=False, network_tells=True),
        faults=["step=3,worker=1,kind=kill,phase=reduce"],
        script=[(lambda cluster: len(cluster.generations) > 1, lambda cluster: time.sleep(1.0))],
    )
    died = [fields["detail"] for fields in outcome.of("worker_died")]
    assert f"exit code {-signal.SIGABRT}" in died


def test_an_environment_that_says_otherwise_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in nccl.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "false")
    nccl.settle_environment()
    nccl.settle_environment()
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    with pytest.raises(Misconfigured, match=r"the environment has TORCH_NCCL_ASYNC_ERROR_HANDLING=3: .* set it to 0"):
        nccl.settle_environment()
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "detail")
    with pytest.raises(Misconfigured, match="TORCH_DISTRIBUTED_DEBUG=DETAIL"):
        nccl.settle_environment()


def hung_in_all(rank: int, address: Endpoint, at_once: bool) -> str:
    """Rank 1 takes part in nothing; rank 0 hangs in an operation of each of its groups, and is then told to leave:
    what it was told."""
    pretend_nccl()
    fabric = Fabric(rank=rank, layout=layout_of(2, shard="parameters"), device=CPU)
    fabric.form(store_address=address, prefix="hung", host=HOST, timeout_s=PATIENCE_S)
    both = [fabric.world, fabric.data_group]
    assert both[0] is not both[1]
    if rank == 1:
        time.sleep(2.0)
        fabric.drop()
        return ""
    works = [groups.receive(torch.zeros(1), 1, 0) for groups in both]
    time.sleep(0.2)
    if at_once:
        FakeNccl.abort_s = 2.0
        fabric.abort()
        try:
            both[0].finish(works[0])
        except PeerLost as error:
            told = str(error) if not fabric.is_gone(0.0) else "it waited for the abort"
        fabric.drop()
        assert fabric.is_gone(5.0)
        return told
    aborting = threading.Thread(target=both[0]._group.abort, daemon=True)
    aborting.start()
    aborting.join(1.0)
    return "hangs" if aborting.is_alive() else "is over"


def test_groups_are_aborted_all_at_once_as_one_waits_for_the_others() -> None:
    assert run_ranks(2, hung_in_all, True)[0] == "the process group was aborted"
    assert run_ranks(2, hung_in_all, False, timeout_s=30.0)[0] == "hangs", "one after the other they never end"
