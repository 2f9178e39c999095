"""Every layout beside PyTorch's own parts, in turn on this machine; what state copies, a relayout and a plan cost.

Same model, batch, micro-batch, ranks, threads and backend on both sides. Ours is the step engine in plain processes,
without Ray, controller and heartbeats (for those see steady.py), and with the job's default of two copies of all state.
The counterparts are in torch_layouts.py. A round is a turn of each side, and ratios are taken round by round: 1.0 or
more means that ours is at least as fast.

    python benchmarks/layouts.py [--layouts dp4,dp4.optimizer,dp2.tp2.pp2,...] [--rounds 8] [--steps 4]
                                 [--kills 5] [--only steps,relayout,planner] [--phases] [--json]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from paired import HOST, Done, Side, Start, Turn

from orchestrator.job import Job
from strategies.layout.parallel import SHARDS, ParallelLayout
from strategies.layout.schedule import SCHEDULES

SECRET = b"only ranks of this benchmark know."
WARM_UP_STEPS = 3
OURS, ONE_COPY = "ours", "ours, 1 copy"
AT_4 = (
    "dp4 dp4.optimizer dp4.gradients dp4.parameters tp4 dp2.tp2 pp4 pp4.gpipe dp2.pp2 dp2.pp2.gpipe "
    "dp2.pp2.interleaved-1f1b dp2.pp2.zero-bubble tp2.pp2"
)
AT_8 = "dp8 dp8.optimizer dp8.gradients dp8.parameters dp4.tp2 dp2.pp4 dp4.pp2 dp2.tp2.pp2"
DEFAULT_LAYOUTS = [*AT_4.split(), *AT_8.split()]


# -------------------------------------------------------------------------------------------- layouts and our side


def parse(name: str) -> dict[str, str]:
    """The job's settings for a layout such as `dp2.pp2.gpipe`: degrees, then a shard or a schedule.

    Raises ValueError for anything else.
    """
    found = {"data": "1", "tensor": "1", "pipeline": "1", "shard": "none", "schedule": "1f1b"}
    for word in name.split("."):
        degree = re.fullmatch(r"(dp|tp|pp)([1-9]\d*)", word)
        if degree:
            found[{"dp": "data", "tp": "tensor", "pp": "pipeline"}[degree[1]]] = degree[2]
        elif word in SHARDS:
            found["shard"] = word
        elif word in SCHEDULES:
            found["schedule"] = word
        else:
            raise ValueError(
                f"{name!r}: {word!r} is neither dpN, tpN or ppN nor one of {', '.join((*SHARDS, *SCHEDULES))}"
            )
    return found


def layout_of(job_path: str, name: str) -> tuple[Job, ParallelLayout]:
    """The job in this layout, and what its controller would choose for that many workers."""
    from orchestrator.planning.choose import LayoutChooser
    from orchestrator.training import build

    settings = parse(name)
    workers = int(settings.pop("data")) * int(settings["tensor"]) * int(settings["pipeline"])
    overrides = [f"strategy.{key}={value}" for key, value in settings.items()]
    overrides += [f"elastic.workers.min={workers}", f"elastic.workers.max={workers}", "elastic.standby=0"]
    job = Job.load(job_path, overrides=[*overrides, "train.steps=100000", "checkpoint.every_steps=null"])
    layout = LayoutChooser.for_job(job).choose(workers, build.model_costs(job), 0, None)
    if layout is None or layout.num_placed != workers:
        raise SystemExit(f"{name}: {workers} workers would not all have work")
    return job, layout


def serve() -> tuple[int, Any]:
    from strategies.comm.groups import serve_store

    store, address = serve_store(HOST, SECRET)
    return address.port, store


def ours(start: Start, job: Job, layout: ParallelLayout, copies: int) -> Any:
    """This rank's part of our step engine, set up as a worker does it."""
    import numpy as np
    import torch

    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.training import build
    from orchestrator.training.deterministic import make_deterministic
    from strategies.comm.fabric import Fabric
    from strategies.comm.rendezvous_proof import StoreAddress
    from strategies.layout.placement import Domain
    from strategies.layout.statemap import whole
    from strategies.update.engine import StepEngine
    from strategies.update.vote import exchange
    from strategies.update.warm_up import warm_up

    device = torch.device("cpu")
    make_deterministic(job, device)
    dataset = dataset_of(job, prepare_stores(job, verify=False))
    state = build.build_state(job, dataset.vocab_size, device)
    engine = StepEngine(state, build.step_spec(job), dataset.batch)
    warm_up(engine, keep=job.strategy.keeps_model_whole)
    fabric = Fabric(rank=start.rank, layout=layout, device=device)
    fabric.form(store_address=StoreAddress(HOST, start.port, SECRET), prefix="layouts", host=HOST, timeout_s=120.0)
    everything = whole(state.space.size, state.space.tensor)
    ranks = layout.world_size

    def barrier() -> None:
        exchange(fabric.control, np.array([0]), [1] * ranks)

    state.adopt_layout(layout, fabric, [everything] * ranks, [Domain("", "here")] * ranks, copies, 0, barrier)
    engine.bind(fabric, layout, 0)

    def step(number: int) -> Done:
        (record,), _ = engine.run(number)
        return Done(record.loss if start.rank == 0 else 0.0, record.phase_seconds)

    return step


def has_mirrors(layout: ParallelLayout) -> bool:
    """Whether ranks must mirror others' state for there to be two copies of it."""
    return layout.num_placed > 1 and (layout.data == 1 or layout.shard != "none")


# -------------------------------------------------------------------------------------------- rounds


def measure(job_path: str, name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of each side by round, and our phases (mean of all rounds) by rank."""
    import torch_layouts

    job, layout = layout_of(job_path, name)
    theirs = torch_layouts.counterparts(layout)
    sides: list[Side] = []
    try:
        sides.append(Side(OURS, layout.num_placed, serve, ours, job, layout, job.elastic.state_copies))
        if has_mirrors(layout):
            sides.append(Side(ONE_COPY, layout.num_placed, serve, ours, job, layout, 1))
        for each in theirs:
            sides.append(
                Side(each, layout.num_placed, torch_layouts.serve, torch_layouts.make, job, layout, each)
            )  # fmt: skip
        check_losses(name, {side.name: side.turn(0, WARM_UP_STEPS - 1).loss for side in sides})
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        cpu: dict[str, list[float]] = {side.name: [] for side in sides}
        turns: list[Turn] = []
        for number in range(rounds):
            # The order alternates, so that a machine that speeds up or slows down favours nobody.
            for side in sides if number % 2 == 0 else reversed(sides):
                turn = side.turn(WARM_UP_STEPS + number * (steps + 1), steps)
                seconds[side.name].append(turn.seconds)
                cpu[side.name].append(turn.cpu_seconds)
                if side.name == OURS:
                    turns.append(turn)
    finally:
        for side in sides:
            side.close()
    phases = [
        {phase: statistics.fmean(turn.phases[rank][phase] for turn in turns) for phase in turns[0].phases[rank]}
        for rank in range(layout.num_placed)
    ]
    return {
        "layout": name, "workers": layout.num_placed, "beside": theirs, "seconds": seconds, "cpu_seconds": cpu,
        "phases": phases,
    }  # fmt: skip


def check_losses(name: str, losses: dict[str, float]) -> None:
    """All sides train the same model on the same tokens. Raises SystemExit when they do not."""
    if any(abs(loss - losses[OURS]) > 1e-3 * abs(losses[OURS]) for loss in losses.values()):
        raise SystemExit(f"{name}: the sides do not do the same work, loss after {WARM_UP_STEPS} steps: {losses}")


def ratios(row: dict[str, Any], other: str, of: str = "seconds") -> list[float]:
    """How many times as much a step of `other` takes as one of ours, by round."""
    return [theirs / own for theirs, own in zip(row[of][other], row[of][OURS], strict=True)]


def show_steps(row: dict[str, Any], *, phases: bool) -> None:
    own = statistics.median(row["seconds"][OURS])
    for other in row["beside"]:
        found = ratios(row, other)
        print(
            f"{row['layout']:<26}{other:<14}{own:>9.3f}{statistics.median(row['seconds'][other]):>9.3f}"
            f"{min(found):>9.3f}{statistics.median(found):>9.3f}{max(found):>9.3f}"
            f"{statistics.median(ratios(row, other, 'cpu_seconds')):>9.3f}",
            flush=True,
        )
    if ONE_COPY in row["seconds"]:
        cost = [1 / ratio - 1 for ratio in ratios(row, ONE_COPY)]
        median = statistics.median(row["seconds"][ONE_COPY])
        print(
            f"{row['layout']:<26}{'(1 copy)':<14}{own:>9.3f}{median:>9.3f}"
            f"   second copy costs {100 * statistics.median(cost):+.1f} % of a step",
            flush=True,
        )
    if phases:
        used = {side: statistics.median(each) for side, each in row["cpu_seconds"].items()}
        print("  processor s of a step: " + ", ".join(f"{side} {each:.3f}" for side, each in used.items()))
        for rank, spent in enumerate(row["phases"]):
            print(f"  rank {rank}: " + ", ".join(f"{phase} {1e3 * s:.1f} ms" for phase, s in spent.items() if s))


# -------------------------------------------------------------------------------------------- relayouts and plans


def relayout(job_path: str, kills: int, every: int) -> dict[str, Any]:
    """A real run in which a worker is killed again and again; each time its workers go on in another layout, and once
    more when the replacement joins."""
    from monitoring.records import read_records
    from orchestrator import run
    from orchestrator.job import Job

    faults = [f"step={every * (number + 1)},worker={number % 4},kind=kill" for number in range(kills)]
    overrides = [f"train.steps={every * (kills + 1)}", "checkpoint.every_steps=null"]
    job = Job.load(job_path, overrides=overrides, faults=faults)
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home) / "run"
        result = run(job, directory)
        if result.status != "finished":
            raise SystemExit(f"the run {result.status}: {result.reason}")
        events = list(read_records(directory / "events.jsonl"))
    return {
        "recoveries": [event for event in events if event["kind"] == "recovery"],
        "layouts": [event["layout"] for event in events if event["kind"] == "generation"],
        "median_step_seconds": result.median_step_seconds,
    }


def show_relayouts(figures: dict[str, Any]) -> None:
    print(f"\n{'':<22}{'times':>6}{'median':>10}{'max':>10}{'steps lost':>12}{'moved, MB':>12}{'buffers, MB':>13}")
    for kind, seconds in (("kill", "stall_seconds"), ("grow", "pause_seconds")):
        found = [each for each in figures["recoveries"] if each["incident"] == kind]
        if not found:
            continue
        times = [each[seconds] for each in found]
        print(
            f"{kind + ', ' + seconds.replace('_seconds', ' s'):<22}{len(found):>6}{statistics.median(times):>10.3f}"
            f"{max(times):>10.3f}{sum(each['steps_lost'] for each in found):>12}"
            f"{statistics.median(each['bytes_moved'] for each in found) / 1e6:>12.1f}"
            f"{max(each['buffer_bytes'] for each in found) / 1e6:>13.2f}"
        )
    print(f"median step {figures['median_step_seconds']:.3f} s; buffers: the most that one rank needed at once")


def planner(job_path: str, workers: int = 4096, times: int = 5) -> dict[str, Any]:
    """Seconds to rank all layouts for a number of workers, each time by a planner that knows nothing yet."""
    from orchestrator.models.costs import describe_model
    from orchestrator.planning.assume import HardwareOptions, hardware_for
    from orchestrator.planning.search import Limits, Planner
    from orchestrator.planning.work import work_of

    job = Job.load(
        job_path,
        overrides=[f"elastic.workers.max={workers}", f"elastic.virtual_workers={workers}",
                   f"train.global_batch={4 * workers}"],
    )  # fmt: skip
    hardware, _ = hardware_for(job, HardwareOptions(gpu_memory="80GiB"))
    started = time.perf_counter()
    model = describe_model(job)
    described = time.perf_counter() - started
    work = work_of(job, model)
    seconds = {}
    for tensor in ((1,), (8,), (1, 2, 4, 8)):
        found = []
        for _ in range(times):
            started = time.perf_counter()
            plans = Planner(work, hardware, Limits(tensor=tensor)).best(workers)
            found.append(time.perf_counter() - started)
            assert plans, "nothing fits"
        seconds["tensor " + ",".join(map(str, tensor))] = found
    return {"workers": workers, "describe_seconds": described, "seconds": seconds}


def show_plans(figures: dict[str, Any]) -> None:
    described = f"describing the model, once: {figures['describe_seconds']:.2f} s"
    print(f"\nplanning for {figures['workers']:,} workers ({described})")
    for what, seconds in figures["seconds"].items():
        print(f"{what:<22}median {statistics.median(seconds):.3f} s, at most {max(seconds):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="examples/quickstart.yaml")
    parser.add_argument("--layouts", default=",".join(DEFAULT_LAYOUTS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of a side in each round, after one not counted")
    parser.add_argument("--only", default="steps,relayout,planner", help="which parts to run")
    parser.add_argument("--phases", action="store_true", help="also where our step's time goes, by rank")
    parser.add_argument("--relayout-job", default="examples/tensor-pipeline.yaml")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--every", type=int, default=25, help="steps between kills")
    parser.add_argument("--planner-job", default="examples/llama-7b.yaml")
    parser.add_argument("--json", action="store_true", help="all figures as one line of JSON at the end")
    options = parser.parse_args()
    parts = options.only.split(",")
    names = options.layouts.split(",")
    for name in names:
        parse(name)
    figures: dict[str, Any] = {"benchmark": "layouts"}
    if "steps" in parts:
        print(f"{'layout':<26}{'beside':<14}{'ours s':>9}{'theirs s':>9}{'min':>9}{'median':>9}{'max':>9}"
              f"{'cpu':>9}   (speed ours / theirs; cpu: processor seconds theirs / ours)")  # fmt: skip
        figures["steps"] = []
        for name in names:
            figures["steps"].append(measure(options.job, name, options.rounds, options.steps))
            show_steps(figures["steps"][-1], phases=options.phases)
    if "relayout" in parts:
        figures["relayout"] = relayout(options.relayout_job, options.kills, options.every)
        show_relayouts(figures["relayout"])
    if "planner" in parts:
        figures["planner"] = planner(options.planner_job)
        show_plans(figures["planner"])
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
