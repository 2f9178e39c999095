"""Update rules and compressed wires: what they do to the loss, and to the speed on a thin link.

    python benchmarks/update_rules.py loss   [--seeds 3] [--steps 60] [--json FILE]
    python benchmarks/update_rules.py speed  [--mbit 100] [--rounds 3] [--json FILE]

`loss` trains the quickstart's model on its data, all ways on the same tokens, with one rank (the bits are the same for
any number), and evaluates it on a share of the samples that is held out. `speed` trains a larger model with a rank on
either side of a thin link (`thin_link`), in turn, and reports tokens a second as ratios of the same round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paired import HOST, Done, Side, Start
from thin_link import HOSTS, ThinLink, go_through

SECRET = b"benchmark of update rules"
JOB = Path(__file__).parents[1] / "examples/quickstart.yaml"
LOCAL = "strategy.update={{rule: local, replicas: {n}, inner_steps: {h}, warmup_steps: {w}{more}}}"


def ways(steps: int) -> dict[str, list[str]]:
    """What each way to train overrides."""
    half, first = steps // 2, 0
    return {
        "synchronous": [],
        "wire int8": ["strategy.wire=int8"],
        "wire int4": ["strategy.wire=int4"],
        "wire top 1 %": ["strategy.wire={top_k: 0.01}"],
        "wire power_sgd 4": ["strategy.wire={power_sgd: 4}"],
        "local 10, half-way": [LOCAL.format(n=4, h=10, w=half, more="")],
        "local 10, half-way, int4": [LOCAL.format(n=4, h=10, w=half, more=", wire: int4")],
        "local 10, half-way, streaming": [LOCAL.format(n=4, h=10, w=half, more=", fragments: 2, overlap_steps: 1")],
        "local 10, from scratch": [LOCAL.format(n=4, h=10, w=first, more="")],
    }


# -------------------------------------------------------------------------------------------- loss


def trained(arguments: tuple[str, int, int, list[str], str]) -> tuple[str, int, float]:
    """(way, seed, held-out loss) of a run on one rank."""
    name, seed, steps, overrides, cache = arguments
    import torch

    torch.set_num_threads(1)
    from orchestrator.data.of_job import dataset_of, held_out_of, prepare_held_out, prepare_stores
    from orchestrator.evaluation.report import report_of
    from orchestrator.job import Job
    from orchestrator.job.parts import update_rule_of
    from orchestrator.planning.choose import LayoutChooser
    from orchestrator.training import build
    from orchestrator.training.deterministic import make_deterministic
    from strategies.comm.fabric import Fabric
    from strategies.comm.rendezvous_proof import StoreAddress
    from strategies.layout.placement import Domain
    from strategies.update.engine import StepEngine
    from strategies.update.evaluation import Evaluation

    settings = [
        f"train.steps={steps}", f"train.seed={seed}", f"data.cache={cache}", "checkpoint.every_steps=null",
        f"evaluation={{share: 0.02, every_steps: {steps}}}", "elastic.workers.max=1", "elastic.standby=0",
    ]  # fmt: skip
    job = Job.load(JOB, overrides=[*settings, *overrides])
    device = torch.device("cpu")
    make_deterministic(job, device)
    dataset = dataset_of(job, prepare_stores(job, verify=False))
    held_out = held_out_of(job, prepare_held_out(job))
    state = build.build_state(job, dataset.vocab_size, device)
    engine = StepEngine(state, build.step_spec(job), dataset.batch, rule=update_rule_of(job))
    layout = LayoutChooser.for_job(job).choose(1, None, 0, None)
    assert layout is not None
    assert held_out is not None
    fabric = Fabric(rank=0, layout=layout, device=device)
    fabric.form(store_address=StoreAddress(HOST, 0, SECRET), prefix="alone", host=HOST, timeout_s=1.0)
    state.adopt_layout(layout, fabric, [state.everything], [Domain("", "")], 1, 0, lambda: None)
    engine.bind(fabric, layout, 0)
    step = 0
    while step < steps:
        step += len(engine.run(step)[0])
    found = report_of(job, engine.evaluate(step, Evaluation(held_out, engine.spec)))
    return name, seed, float(found["loss"])


def losses(seeds: int, steps: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as cache,
        multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool,
    ):
        tasks = [(name, seed, steps, how, cache) for seed in range(seeds) for name, how in ways(steps).items()]
        for name, seed, loss in pool.imap_unordered(trained, tasks):
            found.setdefault(name, []).append(loss)
            print(f"  {name}, seed {seed}: {loss:.4f}", file=sys.stderr, flush=True)
    return {name: found[name] for name in ways(steps)}


def show_losses(found: dict[str, list[float]]) -> None:
    base = statistics.fmean(found["synchronous"])
    print(f"{'held-out loss':34}{'mean':>9}{'min':>9}{'max':>9}{'beside synchronous':>20}")
    for name, values in found.items():
        mean = statistics.fmean(values)
        print(f"{name:34}{mean:>9.4f}{min(values):>9.4f}{max(values):>9.4f}{(mean / base - 1) * 100:>+19.2f}%")


# -------------------------------------------------------------------------------------------- speed

MODEL = (
    "model={hf: {model_type: llama, hidden_size: 512, intermediate_size: 1376, num_hidden_layers: 4, "
    "num_attention_heads: 8, num_key_value_heads: 8, max_position_embeddings: 256, vocab_size: 320, "
    "tie_word_embeddings: false}}"
)
SMALL_STEP = ["data.sequence_length=64", "train.global_batch=4", "elastic.virtual_workers=4"]


def timed_steps(name: str) -> int:
    """Steps that are timed together: a round, or a few of those that are all alike."""
    return 20 if name.startswith("local") else 4


ONE_COPY = "elastic.state_copies=1"
"""What is kept for itself would have its copy on the other side of the link, as there is no other rank."""
SPEEDS = {
    "synchronous": [],
    "wire int8": ["strategy.wire=int8"],
    "wire int4": ["strategy.wire=int4", ONE_COPY],
    "wire top 1 %": ["strategy.wire={top_k: 0.01}", ONE_COPY],
    "wire power_sgd 4": ["strategy.wire={power_sgd: 4}", "train.schedule.warmup_steps=0", ONE_COPY],
    "local 20": [LOCAL.format(n=2, h=20, w=0, more=""), ONE_COPY],
    "local 20, two copies": [LOCAL.format(n=2, h=20, w=0, more="")],
    "local 20, int4": [LOCAL.format(n=2, h=20, w=0, more=", wire: int4"), ONE_COPY],
    "local 20, overlap 10": [LOCAL.format(n=2, h=20, w=0, more=", overlap_steps: 10"), ONE_COPY],
    "local 20, int4, overlap 10": [LOCAL.format(n=2, h=20, w=0, more=", wire: int4, overlap_steps: 10"), ONE_COPY],
}


def serve() -> tuple[int, Any]:
    from strategies.comm.groups import serve_store

    store, address = serve_store(HOST, SECRET)
    return address.port, store


def rank_of(start: Start, overrides: list[str], each: int, door: int | None) -> Any:
    """One rank; a step of the benchmark is `each` steps of training. Its phases are seconds that it waited, and bytes
    that all have sent."""
    import numpy as np
    import torch

    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.job import Job
    from orchestrator.job.parts import update_rule_of
    from orchestrator.planning.choose import LayoutChooser
    from orchestrator.training import build
    from orchestrator.training.deterministic import make_deterministic
    from strategies.comm.fabric import Fabric
    from strategies.comm.rendezvous_proof import StoreAddress
    from strategies.layout.placement import Domain
    from strategies.update.engine import StepEngine
    from strategies.update.vote import exchange

    host = HOST
    if door is not None:
        group = 2 * start.rank // start.world_size
        go_through(door, group)
        host = HOSTS[group]
    job = Job.load(
        JOB, overrides=[MODEL, *SMALL_STEP, "train.steps=1000000", "checkpoint.every_steps=null", *overrides]
    )
    device = torch.device("cpu")
    make_deterministic(job, device)
    dataset = dataset_of(job, prepare_stores(job, verify=False))
    state = build.build_state(job, dataset.vocab_size, device)
    engine = StepEngine(state, build.step_spec(job), dataset.batch, rule=update_rule_of(job))
    ranks = start.world_size
    layout = LayoutChooser.for_job(job).choose(ranks, None, 0, None)
    assert layout is not None
    fabric = Fabric(rank=start.rank, layout=layout, device=device)
    fabric.form(store_address=StoreAddress(HOST, start.port, SECRET), prefix="speed", host=host, timeout_s=120.0)
    domains = [Domain("", str(rank)) for rank in range(ranks)]

    def barrier() -> None:
        exchange(fabric.control, np.array([0]), [1] * ranks)

    copies = job.elastic.state_copies
    state.adopt_layout(layout, fabric, [state.everything] * ranks, domains, copies, 0, barrier)
    engine.bind(fabric, layout, 0)

    def some_steps(number: int) -> Done:
        step, loss = number * each, 0.0
        waited, sent = 0.0, 0
        while step < (number + 1) * each:
            records, _ = engine.run(step)
            step += len(records)
            loss = records[-1].loss
            sent += sum(records[-1].wire_bytes.values())
            waited += records[-1].ranks[start.rank].wait
        waits = {"waited": waited, "bytes": float(sent)}
        return Done(loss if start.rank == 0 else 0.0, waits)

    return some_steps


def speeds(mbit: float, rounds: int, only: list[str]) -> dict[str, dict[str, list[float]]]:
    """Of each way: tokens a second, bytes that all ranks told of for a step, and the share of time that they waited."""
    ways_ = {name: how for name, how in SPEEDS.items() if not only or name in ("synchronous", *only)}
    tokens = 4 * 64
    found: dict[str, dict[str, list[float]]] = {name: {"tokens_per_s": [], "bytes": [], "waited": []} for name in ways_}
    link = ThinLink(mbit * 1e6) if mbit else None
    sides: dict[str, Side] = {}
    try:
        for name, overrides in ways_.items():
            door = None if link is None else link.door
            sides[name] = Side(name, 2, serve, rank_of, overrides, timed_steps(name), door)
        at = dict.fromkeys(ways_, 0)
        for number in range(rounds):
            order = list(ways_) if number % 2 == 0 else list(reversed(ways_))
            for name in order:
                turn = sides[name].turn(at[name], 1)
                at[name] += 2
                each = timed_steps(name)
                found[name]["tokens_per_s"].append(each * tokens / turn.seconds)
                found[name]["bytes"].append(turn.phases[0]["bytes"] / each)
                found[name]["waited"].append(statistics.fmean(each["waited"] for each in turn.phases) / turn.seconds)
                print(f"  {name}: {each * tokens / turn.seconds:.0f} tokens/s", file=sys.stderr, flush=True)
    finally:
        for side in sides.values():
            side.close()
        if link is not None:
            link.close()
    return found


def show_speeds(found: dict[str, dict[str, list[float]]]) -> None:
    base = found["synchronous"]
    print(
        f"{'':26}{'tokens/s':>10}{'ratio: min':>12}{'median':>9}{'max':>9}{'MB a step':>11}{'of fp32':>9}{'waits':>8}"
    )
    for name, values in found.items():
        ratios = [mine / its for mine, its in zip(values["tokens_per_s"], base["tokens_per_s"], strict=True)]
        sent = statistics.median(values["bytes"])
        print(
            f"{name:26}{statistics.median(values['tokens_per_s']):>10.0f}{min(ratios):>12.2f}"
            f"{statistics.median(ratios):>9.2f}{max(ratios):>9.2f}{sent / 1e6:>11.3f}"
            f"{sent / statistics.median(base['bytes']):>9.4f}{statistics.median(values['waited']):>8.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "speed"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--mbit", type=float, default=100.0, help="of the link, in million bits a second; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], help="of the ways whose speed is measured; repeatable")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    found: Any
    if options.what == "loss":
        found = losses(options.seeds, options.steps)
        show_losses(found)
    else:
        found = speeds(options.mbit, options.rounds, options.only)
        show_speeds(found)
    print(f"({time.perf_counter() - started:.0f} s)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
