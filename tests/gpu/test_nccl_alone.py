"""NCCL in a process by itself: formed, aborted and left again and again; and a device that fails."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from strategies.comm import nccl
from strategies.comm.group_errors import PeerLost
from strategies.comm.groups import Groups
from strategies.comm.nccl import Nccl
from tests.gpu.figures import Figures

ROOT = Path(__file__).parents[2]
TIMES = 50

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    nccl.settle_environment()


def formed(device: torch.device) -> Groups:
    """A group of one rank, which `Groups.form` would have none for."""
    groups = Groups(rank=0, world_size=1, device=device, transport=Nccl(device, lambda: False))
    groups.form_on(dist.HashStore(), "127.0.0.1", 30.0)  # type: ignore[attr-defined]
    return groups


def test_groups_are_formed_aborted_and_left_again_and_again(device: torch.device, figures: Figures) -> None:
    """Without leaving memory, threads or anything else behind."""
    times: dict[str, list[float]] = {"form": [], "use": [], "leave": []}
    free, threads = [], []
    tensor = torch.ones(1_000_000, device=device)
    for _ in range(TIMES):
        began = time.perf_counter()
        groups = formed(device)
        at_form = time.perf_counter()
        groups.all_to_all(torch.empty_like(tensor), tensor, [len(tensor)], [len(tensor)])
        at_use = time.perf_counter()
        groups.drop()
        assert groups.transport.is_gone(20.0)
        del groups
        for name, value in zip(times, (at_form - began, at_use - at_form, time.perf_counter() - at_use), strict=True):
            times[name].append(value)
        free.append(torch.cuda.mem_get_info(device)[0])
        threads.append(threading.active_count())
    for name, values in times.items():
        figures.note(f"{name} a group, median seconds of {TIMES}", round(sorted(values)[TIMES // 2], 4))
    lost = free[TIMES // 5] - free[-1]
    figures.note("memory lost in the last four fifths, bytes", lost)
    assert lost < 64 << 20
    assert threads[-1] <= threads[0]


def test_a_group_is_aborted_while_its_kernels_wait(device: torch.device, figures: Figures) -> None:
    """For work of the stream before them, a second or two: an abort does not wait for that, nor does who waits."""
    groups = formed(device)
    tensor = torch.ones(1_000_000, device=device)
    torch.cuda._sleep(4_000_000_000)
    threading.Timer(0.2, groups.abort).start()
    began = time.perf_counter()
    with pytest.raises(PeerLost, match="the process group was aborted"):
        groups.all_to_all(torch.empty_like(tensor), tensor, [len(tensor)], [len(tensor)])
    figures.note("from an abort to its error in the caller, seconds", round(time.perf_counter() - began - 0.2, 4))
    groups.drop()
    gone = groups.transport.is_gone(30.0)
    figures.note("abort under a busy stream, seconds until all is gone", round(time.perf_counter() - began - 0.2, 4))
    assert gone
    torch.cuda.synchronize(device)
    again = formed(device)
    again.all_to_all(torch.empty_like(tensor), tensor, [len(tensor)], [len(tensor)])
    again.drop()


def test_an_error_of_the_device_stays_and_is_known_for_what_it_is() -> None:
    """In a process of its own, which is of no use afterwards."""
    code = """
import torch
from strategies.comm.group_errors import DeviceFailed, first_line, kind_of
device = torch.device("cuda", 0)
found = []
torch._assert_async(torch.zeros(1, device=device))
for _ in range(3):
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:
        found.append((type(error).__name__, kind_of(error) is DeviceFailed, first_line(error)))
print(found)
assert len(found) == 3 and all(is_device for _, is_device, _ in found), found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
