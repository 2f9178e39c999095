"""`orchestrator plan`: options, tables, JSON and what it says when it cannot answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import PlanError
from orchestrator.job import Job
from orchestrator.planning.assume import HardwareOptions, hardware_for
from orchestrator.planning.command import LimitOptions, limits_of
from orchestrator.planning.units import parse_bytes, parse_counts, parse_rate, parse_seconds, show_runs
from strategies.layout.parallel import SHARDS
from strategies.layout.schedule import SCHEDULES
from tests.in_process import orchestrator

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart.yaml"


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return orchestrator("plan", *arguments, cwd=ROOT)


# ---------------------------------------------------------------------------------------- numbers as people write them


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24e9), ("1.5TiB", 1.5 * 2**40), ("512", 512), ("2e9b", 2e9)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize(
    ("text", "rate"), [("25GB/s", 25e9), ("200Gbit/s", 25e9), ("1GiB/s", 2**30), ("400Gbps", 4e11)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text, "--bandwidth") == rate


@pytest.mark.parametrize("text", ["80XB", "", "-3GiB", "0GB", "GiB", "nan", "inf", "1e999GB"])
def test_a_size_that_is_none_names_the_option(text: str) -> None:
    with pytest.raises(PlanError, match="--gpu-memory must be a size such as 80GiB"):
        parse_bytes(text, "--gpu-memory")


def test_times() -> None:
    assert parse_seconds("5us", "--latency") == pytest.approx(5e-6)
    with pytest.raises(PlanError, match="--latency must be a time"):
        parse_seconds("5 minutes", "--latency")


@pytest.mark.parametrize(
    ("text", "counts"), [("8", (8,)), ("1..4", (1, 2, 3, 4)), ("8,2,2", (2, 8)), ("1..2, 7", (1, 2, 7))]
)
def test_counts(text: str, counts: tuple[int, ...]) -> None:
    assert parse_counts(text, "--workers") == counts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "between 1 and 1,000,000"),
        ("5..1", "runs backwards; write 1..5"),
        ("x", "must be a number, a list such as 1,2,4 or a range such as 1..64"),
        ("1,,2", "must be a number"),
        ("-3", "must be a number"),
        ("1..1000000", "at most 4,096 at once"),
        ("9999999", "between 1 and 1,000,000"),
    ],
)
def test_counts_that_make_no_sense_are_refused(text: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        parse_counts(text, "--workers")


@given(st.sets(st.integers(1, 60), min_size=1))
def test_folded_numbers_read_back(numbers: set[int]) -> None:
    assert parse_counts(show_runs(sorted(numbers)), "--workers") == tuple(sorted(numbers))


# ---------------------------------------------------------------------------------------- what options mean


def test_what_is_not_given_is_assumed_and_said() -> None:
    hardware, lines = hardware_for(Job.load(QUICKSTART), HardwareOptions())
    text = " ".join(lines)
    assert hardware.memory_bytes is None
    assert "memory per rank unknown" in text
    assert "CPU cores" in text
    given, lines = hardware_for(
        Job.load(ROOT / "examples/llama-7b.yaml"),
        HardwareOptions("80GiB", 989.0, 0.5, "450GB/s", "50GB/s", "3us", "10us", 4),
    )
    assert not any("assumed" in line for line in lines)
    assert given.flops == pytest.approx(494.5e12)
    assert given.usable_bytes == pytest.approx(72 * 2**30)
    assert (given.ranks_per_node, given.inside.bytes_per_s, given.between.latency_s) == (4, 450e9, pytest.approx(1e-5))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (HardwareOptions(gpu_tflops=0.0), "--gpu-tflops must be more than 0"),
        (HardwareOptions(gpu_tflops=float("nan")), "--gpu-tflops must be more than 0"),
        (HardwareOptions(efficiency=1.5), "--efficiency must be more than 0 and at most 1"),
        (HardwareOptions(ranks_per_node=0), "--ranks-per-node must be at least 1"),
        (HardwareOptions(node_bandwidth="fast"), "--node-bandwidth must be a rate"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(options: HardwareOptions, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        hardware_for(Job.load(QUICKSTART), options)


def test_workers_that_share_a_gpu_are_planned_with_their_part_of_it() -> None:
    whole, half = (
        hardware_for(
            Job.load(ROOT / "examples/llama-7b.yaml", [f"resources.gpu={gpu}", "strategy.transport=gloo"]),
            HardwareOptions(gpu="H100"),
        )
        for gpu in (1, 0.5)
    )
    assert half[0].memory_bytes == whole[0].memory_bytes / 2  # type: ignore[operator]
    assert half[0].flops == whole[0].flops / 2
    assert "0.5 of a GPU" in " ".join(half[1])


def test_what_validate_says_of_routers_plan_says_too() -> None:
    done = plan("examples/quickstart.yaml", "--set", "train.router_loss={balance: 0.1}")
    assert done.returncode == 2
    assert "router" in done.stderr


def test_the_job_decides_tensor_and_what_else_it_says() -> None:
    silent = limits_of(Job.load(QUICKSTART), LimitOptions())
    assert (silent.tensor, silent.pipeline, silent.shards) == ((1,), None, SHARDS)
    said = Job.load(QUICKSTART, ["strategy.tensor=2", "strategy.shard=gradients", "elastic.workers.min=2"])
    assert (limits_of(said, LimitOptions()).tensor, limits_of(said, LimitOptions()).shards) == ((2,), ("gradients",))
    scheduled = Job.load(QUICKSTART, ["strategy={pipeline: 2, schedule: gpipe}"])
    assert limits_of(scheduled, LimitOptions()).schedules == ("gpipe",)
    assert limits_of(said, LimitOptions()).schedules == SCHEDULES
    asked = limits_of(said, LimitOptions(tensor="1,4", pipeline="2", shard="parameters,none", schedule="gpipe"))
    assert (asked.tensor, asked.pipeline, asked.shards, asked.schedules) == (
        (1, 4), (2,), ("none", "parameters"), ("gpipe",),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- the command


def test_the_quickstart_is_planned_for_every_number_of_workers() -> None:
    started = time.perf_counter()
    done = plan("examples/quickstart.yaml", "--workers", "1..8", "--json")
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 60
    content = json.loads(done.stdout)
    assert content["model"]["parameters"] == 885_888
    assert [each["workers"] for each in content["workers"]] == list(range(1, 9))
    steps = []
    for each in content["workers"]:
        best = each["layouts"][0]
        assert best["data"] * best["tensor"] * best["pipeline"] == best["ranks"] == each["workers"] - best["idle"]
        assert sum(best["virtual_workers"]) == 8
        assert sum(best["stages"]) == 4
        assert best["step_seconds"] == pytest.approx(sum(best["step_parts_seconds"].values()))
        assert best["memory_bytes"] == pytest.approx(sum(best["memory_parts_bytes"].values()))
        steps.append(best["step_seconds"])
    assert steps == sorted(steps, reverse=True)


def test_the_7b_example_fits_64_workers_of_80_gib() -> None:
    done = plan("examples/llama-7b.yaml", "--workers", "64", "--gpu-memory", "80GiB")
    assert done.returncode == 0, done.stderr
    assert "6,738,415,616 parameters, 32 layers" in done.stdout
    assert "best on 64: step" in done.stdout
    assert "pipeline 1, shard none: needs" in done.stdout
    assert all(len(line) <= 132 for line in done.stdout.split("\nout:")[0].splitlines()[3:10])
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("examples/quickstart.yaml", "--workers", "0"), "--workers must be between 1"),
        (("examples/quickstart.yaml", "--workers", "4", "--gpu-memory", "80XB"), "--gpu-memory must be a size"),
        (("examples/quickstart.yaml", "--workers", "5..1"), "runs backwards"),
        (("examples/quickstart.yaml", "--schedule", "1f2b"), "--schedule must be one or more of 1f1b, gpipe"),
        (("examples/quickstart.yaml", "--set", "train.stepz=3"), "train.stepz"),
        (("no-such.yaml", "--workers", "4"), "cannot be read"),
        (("examples/quickstart.yaml", "--workers", "2", "--gpu-memory", "8MiB"), "the job fits no layout on 2 workers"),
        (("examples/quickstart.yaml", "--tensor", "3", "--workers", "3"), "does not divide the model's 4 attention"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(arguments: tuple[str, ...], expected: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_planning_never_imports_ray() -> None:
    code = (
        "import sys; sys.argv = ['orchestrator', 'plan', 'examples/quickstart.yaml', '--workers', '2']\n"
        "from orchestrator.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "sys.exit('imported ray' if 'ray' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
