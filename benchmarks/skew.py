"""Uneven speeds and uneven data, beside DistributedDataParallel with a DistributedSampler, in turn on this machine.

Same model, ranks, data, global batch and micro-batch on both sides. Ours is the whole product: Ray actors, heartbeats,
events, the policy that moves work. Every rank has a *device* of its own, as ranks on a cluster do and ranks that share
two cores do not: after each forward and backward pass it waits, in proportion to the time that pass took, so that the
processors of this machine are mostly free. Ours waits by the fault kind `slow` on every worker, DDP by the same rule.

    python benchmarks/skew.py [--rounds 3] [--only slow,lengths,files,overhead]

slow      one of 4 workers takes twice as long from a step on: throughput 20 steps later, as a share of what the sum of
          the speeds would give (goal 0.9; DDP gets 0.57)
lengths   records of long-tailed length (functions and classes of the standard library): useful tokens per second beside
          DDP's on the same records, padded (goal 1.15) and packed (goal 1.5); largest by mean predicted cost per rank
          (goal 1.05)
files     one of 4 input files is 10 times as large: samples of each worker, and what is left over of an epoch
overhead  what measuring and the policy cost when nothing is wrong, as a share of a step (goal 0.5 %)
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paired import Done, Side, Start

WORKERS = 4
DEVICE = 6.0
"""How many times as long a pass takes on a device as on a processor of this machine."""
LONG_DEVICE = 4.0
"""The same for long records, of which a pass takes long anyway."""
ONSET, LATER, STEPS = 30, 50, 80
LONG_FIRST, LONG_STEPS = 5, 20

MODEL = """
name: skew
model:
  hf: {{model_type: llama, hidden_size: {hidden}, intermediate_size: {wide}, num_hidden_layers: 2,
       num_attention_heads: 4, num_key_value_heads: 4, max_position_embeddings: 1024, vocab_size: 320}}
data: {{{data}, tokenizer: bytes, cache: {cache}}}
train: {{steps: {steps}, global_batch: {batch}, micro_batch: {micro}, optimizer: {{lr: 1.0e-3}}, seed: 3}}
elastic: {{workers: {{min: 4, max: 4}}, virtual_workers: {shares}, rebalance: {{enabled: {moves}}}}}
faults: {faults}
"""


def devices(factor: float, slow: float = 1.0) -> list[dict[str, Any]]:
    """A device for every worker; worker 1's takes `slow` times as long from the step ONSET on."""
    found = [{"step": 0, "worker": slot, "kind": "slow", "factor": factor} for slot in range(WORKERS)]
    if slow > 1:
        found.append({"step": ONSET, "worker": 1, "kind": "slow", "factor": slow})
    return found


def our_run(text: str, home: Path) -> list[dict[str, Any]]:
    """The steps that a run commits."""
    from monitoring.records import read_records
    from orchestrator import Job, run

    result = run(Job.loads(text), home / f"run-{time.time():.0f}")
    if result.status != "finished":
        raise SystemExit(f"our run {result.status}: {result.reason}")
    return list(read_records(Path(result.run_dir) / "metrics.jsonl"))


def rate(steps: list[dict[str, Any]], first: int, last: int) -> float:
    """Counting tokens per second from step `first` to step `last`."""
    tokens = sum(step["tokens"] for step in steps[first:last])
    return float(tokens / (steps[last - 1]["committed_at"] - steps[first - 1]["committed_at"]))


# ---------------------------------------------------------------------------------------- DistributedDataParallel


def serve() -> tuple[int, Any]:
    """A rendezvous store on a free port."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port, store


def ddp(start: Start, text: str, factor: Callable[[int, int], float], padded: bool) -> Callable[[int], Done]:
    """A rank of DDP. `factor(rank, step)` is how many times as long a pass takes; with `padded` a sample is a record,
    and a micro-batch is padded to its longest."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DistributedSampler

    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.job import Job
    from orchestrator.models.loading import build_model
    from orchestrator.training import build

    store = start.store or dist.TCPStore("127.0.0.1", start.port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=start.rank, world_size=start.world_size)
    job = Job.loads(text)
    data = dataset_of(job, prepare_stores(job, verify=False))
    (cut,) = data._cuts
    model = build_model(job, data.vocab_size)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    spec = build.optimizer_spec(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
    sampler: DistributedSampler[int] = DistributedSampler(range(data.num_samples), shuffle=True, drop_last=True)  # type: ignore[arg-type]
    share, micro = job.train.global_batch // start.world_size, job.train.micro_batch

    def batches() -> Iterator[list[int]]:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            ids = list(sampler)
            yield from (ids[at : at + share] for at in range(0, len(ids) - share + 1, share))
            epoch += 1

    source = batches()

    def step(number: int) -> Done:
        import numpy as np

        ids = next(source)
        tokens = 0
        for at in range(0, share, micro):
            some = np.array(ids[at : at + micro])
            width = max(int(data.sample_lengths[some].max()) - 1, 1) if padded else job.data.sequence_length  # type: ignore[index]
            rows, documents = cut.rows(some, width)
            batch = torch.from_numpy(rows)
            labels = batch[:, 1:]
            if documents is not None:
                labels = labels.masked_fill(torch.from_numpy(documents[:, 1:] < 0), -100)
            started = time.perf_counter()
            is_last = at + micro >= share
            replica.require_backward_grad_sync = is_last
            loss = F.cross_entropy(replica(input_ids=batch[:, :-1]).logits.flatten(0, 1), labels.flatten())
            if is_last:
                # The wait for others must not be stretched, so the device's time is that of the forward pass, of which
                # a backward pass is twice.
                forward = time.perf_counter() - started
                time.sleep(3 * forward * (factor(start.rank, number) - 1))
                (loss / (share // micro)).backward()
            else:
                (loss / (share // micro)).backward()
                time.sleep((time.perf_counter() - started) * (factor(start.rank, number) - 1))
            tokens += int((labels != -100).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return Done(float(loss.detach()) / start.world_size, {"tokens": float(tokens)})

    return step


def plain_device(rank: int, step: int) -> float:
    return LONG_DEVICE


def slowed_device(rank: int, step: int) -> float:
    return DEVICE * (2.0 if rank == 1 and step >= ONSET else 1.0)


# ---------------------------------------------------------------------------------------- scenarios


def table(title: str, rows: list[tuple[str, list[float], str]]) -> None:
    print(f"\n{title:<44}{'min':>9}{'median':>9}{'max':>9}  goal")
    for name, values, goal in rows:
        figures = (min(values), statistics.median(values), max(values))
        print(f"  {name:<42}" + "".join(f"{v:>9,.3f}" if v < 100 else f"{v:>9,.0f}" for v in figures) + f"  {goal}")


def slow(rounds: int, home: Path) -> dict[str, Any]:
    """See the module."""
    shape: dict[str, Any] = {
        "hidden": 64, "wide": 128, "data": "source: python-stdlib, sequence_length: 64", "cache": home / "cache",
        "steps": STEPS, "batch": 64, "micro": 1, "shares": 64, "moves": "true",
    }  # fmt: skip
    text = MODEL.format(**shape, faults=json.dumps(devices(DEVICE, 2.0)))
    theirs = Side("DDP", WORKERS, serve, ddp, text, slowed_device, False)
    ideal = (WORKERS - 0.5) / WORKERS
    rows = []
    for number in range(rounds):
        steps = our_run(text, home)
        ours = rate(steps, LATER, STEPS) / (ideal * rate(steps, 10, ONSET))
        before = theirs.turn(5, 20).seconds
        after = theirs.turn(LATER, 20).seconds
        rows.append((ours, before / after / ideal))
        in_force = next((step["step"] for step in steps if step["deal"]), None)
        print(f"slow, round {number + 1}: ours {ours:.3f} of the ideal (dealt anew at step {in_force}), "
              f"DDP {rows[-1][1]:.3f}", flush=True)  # fmt: skip
    theirs.close()
    table("one of 4 takes twice as long, of the ideal", [
        ("ours, 20 to 50 steps after the onset", [a for a, _ in rows], ">= 0.9"),
        ("DDP", [b for _, b in rows], "0.57 expected"),
    ])  # fmt: skip
    return {"slow": rows}


def functions(home: Path) -> Path:
    """The functions and classes of the standard library, one per record."""
    path = home / "functions.jsonl"
    if path.exists():
        return path
    root = Path(sysconfig.get_path("stdlib"))
    with path.open("w") as out:
        for file in sorted(root.glob("*.py")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            try:
                tree = ast.parse(text)
            except SyntaxError:
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    segment = ast.get_source_segment(text, node)
                    if segment:
                        out.write(json.dumps({"text": segment}) + "\n")
    return path


def lengths(rounds: int, home: Path) -> dict[str, Any]:
    """See the module."""
    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.job import Job

    def text(packing: str) -> str:
        data = f"source: {functions(home)}, sequence_length: 1024, packing: {packing}"
        return MODEL.format(
            hidden=64, wide=128, data=data, cache=home / "cache", steps=LONG_STEPS, batch=128, micro=4, shares=16,
            moves="true", faults=json.dumps(devices(LONG_DEVICE)),
        )  # fmt: skip

    theirs = Side("DDP", WORKERS, serve, ddp, text("pad"), plain_device, True)
    rows = []
    skews: list[float] = []
    for number in range(rounds):
        padded, packed = (our_run(text(packing), home) for packing in ("pad", "pack"))
        turn = theirs.turn(0, LONG_STEPS - LONG_FIRST)
        plain = sum(phases["tokens"] for phases in turn.phases) / turn.seconds
        rows.append((rate(padded, LONG_FIRST, LONG_STEPS), rate(packed, LONG_FIRST, LONG_STEPS), plain))
        costs = [[rank[4] for rank in step["ranks"]] for step in padded if step["ranks"] and not step["deal"]]
        skews += [max(each) * len(each) / sum(each) for each in costs]
        print(f"lengths, round {number + 1}: padded {rows[-1][0]:,.0f}, packed {rows[-1][1]:,.0f}, "
              f"DDP padded {plain:,.0f} useful tokens/s", flush=True)  # fmt: skip
    theirs.close()
    job = Job.loads(text("pack"))
    dataset = dataset_of(job, prepare_stores(job, verify=False))
    table("records of long-tailed length", [
        ("ours padded / DDP padded, useful tokens/s", [a / c for a, _, c in rows], ">= 1.15"),
        ("ours packed / DDP padded, useful tokens/s", [b / c for _, b, c in rows], ">= 1.5"),
        ("largest / mean predicted cost of a rank", skews, "<= 1.05"),
        ("padding of packed rows", [dataset.padding], "< 0.02"),
    ])  # fmt: skip
    return {"lengths": rows, "skew": statistics.median(skews)}


def files(rounds: int, home: Path) -> dict[str, Any]:
    """See the module."""
    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.job import Job

    directory = home / "shards"
    directory.mkdir(exist_ok=True)
    records = functions(home).read_text().splitlines(keepends=True)
    random.Random(1).shuffle(records)
    sizes = [60, 60, 600, 60]
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        (directory / f"shard-{number}.jsonl").write_text("".join(records[start : start + size]))
    text = MODEL.format(
        hidden=32, wide=64, data=f"source: {directory}, sequence_length: 64", cache=home / "cache", steps=40, batch=64,
        micro=2, shares=16, moves="false", faults="[]",
    )  # fmt: skip
    job = Job.loads(text)
    num_samples = dataset_of(job, prepare_stores(job, verify=False)).num_samples
    steps = max(40, -(-num_samples // 64) + 1)
    text = text.replace("steps: 40", f"steps: {steps}")
    done = our_run(text + "checkpoint: {}\n", home)
    held = [[len(rank[0]) * 4 for rank in step["ranks"]] for step in done if len(step["ranks"]) == WORKERS]
    sizes_mb = [round((directory / f"shard-{n}.jsonl").stat().st_size / 1e6, 2) for n in range(4)]
    per_worker = [sum(counts) for counts in zip(*held, strict=True)]
    print(f"\none of 4 input files is 10 times as large: {sizes_mb} MB, {num_samples:,} samples an epoch")
    print(f"  samples of each worker in {len(held)} steps: {per_worker}")
    print(f"  samples of each worker, largest difference in a step: {max(max(n) - min(n) for n in held)} (goal <= 1)")
    print(
        f"  an epoch ends inside step {num_samples // 64}, which has 64 samples like all others: {len(done)} committed"
    )
    return {"files": per_worker}


def toggle_measuring(engine: Any) -> Callable[[bool], None]:
    """Puts what measures into an engine, or takes it out."""
    from contextlib import nullcontext

    from strategies.update.timing import RankTimes

    nothing = nullcontext()
    on, rank_times = engine.watch.on, engine.rank_times
    held = len(engine.polls.held[engine.fabric.rank])
    account = RankTimes((0.0,) * held, 0.0, 0.0, 0.0, 0.0, 0, 0)

    def toggle(is_measured: bool) -> None:
        engine.watch.on = on if is_measured else lambda index: nothing
        engine.rank_times = rank_times if is_measured else lambda: account

    return toggle


SECRET = b"only ranks of this benchmark know."
TURN = 8
"""Steps in a turn of the overhead's measurement, of which the first is not counted."""


def overhead(rounds: int, home: Path) -> dict[str, Any]:
    """See the module. The same processes measure in one turn, and do not in the next."""
    side = Side("ours", WORKERS, serve_ours, ours_alone, Path("examples/quickstart.yaml").read_text())
    ratios, cpu = [], []
    for number in range(rounds * 4):
        # Which of the two is first alternates.
        turns = [side.turn(TURN * (2 * number + half), TURN - 1) for half in range(2)]
        measured, bare = turns if number % 2 == 0 else reversed(turns)
        ratios.append(measured.seconds / bare.seconds)
        cpu.append(measured.cpu_seconds / bare.cpu_seconds)
    side.close()
    seconds = bare.seconds
    policy = {ranks: policy_seconds(ranks) for ranks in (WORKERS, 4096)}
    table("measuring and the policy, nothing wrong", [
        ("measured / not, wall time of a step", ratios, "<= 1.005"),
        ("measured / not, processor time of all ranks", cpu, "<= 1.005"),
    ])  # fmt: skip
    alone = measuring_seconds()
    share = f"{alone / seconds:.4%} of {seconds:.3f} s"
    print(f"  measuring a step of 8 micro-batches, by itself: {1e6 * alone:.0f} us = {share}")
    for ranks, each in policy.items():
        print(f"  policy, a step of {ranks} ranks, in the controller: {1e6 * each:,.0f} us")
    return {"overhead": ratios, "overhead_cpu": cpu}


def serve_ours() -> tuple[int, Any]:
    from strategies.comm.groups import serve_store

    server, address = serve_store("127.0.0.1", SECRET)
    return address.port, server


def ours_alone(start: Start, text: str) -> Callable[[int], Done]:
    """A rank of ours without controller and Ray."""
    import torch

    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.job import Job
    from orchestrator.training import build
    from strategies.comm.fabric import Fabric
    from strategies.comm.rendezvous_proof import StoreAddress
    from strategies.layout.parallel import ParallelLayout
    from strategies.layout.placement import Domain
    from strategies.update.engine import StepEngine
    from strategies.update.warm_up import warm_up

    job = Job.loads(text)
    dataset = dataset_of(job, prepare_stores(job, verify=False))
    device = torch.device("cpu")
    state = build.build_state(job, dataset.vocab_size, device)
    engine = StepEngine(state, build.step_spec(job), build.make_fetch(job, dataset))
    warm_up(engine, keep=True)
    layout = ParallelLayout.fit(start.world_size, job.elastic.virtual_workers)
    fabric = Fabric(rank=start.rank, layout=layout, device=device)
    address = StoreAddress("127.0.0.1", start.port, SECRET)
    fabric.form(store_address=address, prefix="bench", host="127.0.0.1", timeout_s=30.0)
    domains = [Domain("", str(rank)) for rank in range(start.world_size)]
    state.adopt_layout(layout, fabric, [state.held] * start.world_size, domains, 1, 0, barrier=lambda: None)
    engine.bind(fabric, layout, 0)

    toggle = toggle_measuring(engine)

    def step(number: int) -> Done:
        # Turns come in pairs: measured and not, then not and measured.
        turn = number // TURN
        toggle((turn % 2 == 0) == (turn // 2 % 2 == 0))
        (record,), _ = engine.run(number)
        return Done(record.loss / start.world_size, record.phase_seconds)

    return step


def measuring_seconds() -> float:
    """Seconds that the stopwatch, and a rank's account, take in a step of 8 micro-batches."""
    from strategies.gradient.stopwatch import Stopwatch
    from strategies.update.timing import RankTimes, from_row, to_row

    watch = Stopwatch()
    rounds = 2000
    started = time.perf_counter()
    for _ in range(rounds):
        watch.reset()
        for index in (0, 0, 0, 0, 1, 1, 1, 1):
            with watch.on(index):
                pass
        account = RankTimes(tuple(watch.seconds().values()), 0.0, 0.0, 0.0, 2.0, 2048, 0)
        for _ in range(WORKERS):
            from_row(to_row(account))
    return (time.perf_counter() - started) / rounds


def policy_seconds(ranks: int) -> float:
    """Seconds that the policy takes for a step of `ranks` equal ranks."""
    from orchestrator.control.core.workers import WorkerId
    from orchestrator.control.training.layouts import Layouts
    from orchestrator.control.training.rebalance import Rebalancer
    from orchestrator.control.training.views import ControllerConfig, RebalanceRules, WorkerView
    from orchestrator.planning.choose import LayoutChooser
    from orchestrator.planning.work import StepSettings
    from orchestrator.training.messages import Generation, Member, StepReport
    from strategies.layout.parallel import ParallelLayout
    from strategies.update.timing import RankTimes

    chooser = LayoutChooser(1, 1, "none", "1f1b", ranks, StepSettings(4 * ranks, 1))
    config = ControllerConfig(total_steps=10**6, chooser=chooser, min_workers=1, max_workers=ranks)
    layout = ParallelLayout.fit(ranks, 4 * ranks)
    members = tuple(Member(WorkerId(slot, 0), "node", 1, "host", 1) for slot in range(ranks))
    views = {member.worker: WorkerView(member.worker, 0.0, node="node") for member in members}
    generation = Generation(0, 1, 0, "start", members, layout, ((),) * ranks)
    balance = Rebalancer(RebalanceRules(), Layouts(config), 1, 10**6)
    balance.begin(generation)
    rng = random.Random(1)
    steps = 400 if ranks < 100 else 24
    reports = []
    for step in range(steps):
        account = tuple(RankTimes((rng.uniform(0.9, 1.1),) * 4, 0.0, 0.0, 0.0, 4.0, 100, 0) for _ in range(ranks))
        reports.append(StepReport(step + 1, 0, 1.0, 1.0, 0.1, 10, "", False, float(step), 0.5, ranks=account))
    started = time.perf_counter()
    for report in reports:
        balance.observe(report, generation, views)
    return (time.perf_counter() - started) / steps


SCENARIOS = {"slow": slow, "lengths": lengths, "files": files, "overhead": overhead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(SCENARIOS))
    options = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "skew"}
    with tempfile.TemporaryDirectory(prefix="skew-") as home:
        for name in options.only.split(","):
            found |= SCENARIOS[name](options.rounds, Path(home))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
