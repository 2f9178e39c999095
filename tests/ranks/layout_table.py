"""A table of layouts and shards: loss, digest, and what a killed rank costs in each. Not a test; prints markdown.

    python -m tests.ranks.layout_table [--steps 50] [--kill-at 20] [--only dp4,pp4] [--shards none,parameters]
                                       [--set train.recompute=full ...]

Real workers in forked processes and the real controller, without Ray; the quickstart's model on shorter samples, or
what the job becomes with other settings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.ranks.local_cluster import LocalCluster, Outcome

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
LAYOUTS = {
    "dp2": (2, 1, 1),
    "dp3": (3, 1, 1),
    "dp4": (4, 1, 1),
    "dp2·tp2": (4, 2, 1),
    "pp2": (2, 1, 2),
    "dp2·pp2": (4, 1, 2),
    "pp4": (4, 1, 4),
    "tp2·pp2": (4, 2, 2),
    "dp2·tp2·pp2": (8, 2, 2),
}
"""Workers, tensor and pipeline degree; the data degree is what is left."""
SHARDS = ("none", "optimizer", "gradients", "parameters")


def run(
    directory: Path, changes: list[str], steps: int, degrees: tuple[int, int, int], shard: str, kill_at: int
) -> Outcome:
    workers, tensor, pipeline = degrees
    overrides = [
        *changes,
        f"train.steps={steps}", "train.global_batch=16", "data.sequence_length=64", "elastic.virtual_workers=8",
        f"elastic.workers.max={workers}", f"elastic.workers.min={tensor}", "elastic.standby=0",
        f"strategy.tensor={tensor}", f"strategy.pipeline={pipeline}", f"strategy.shard={shard}",
        f"data.cache={directory / 'cache'}",
    ]  # fmt: skip
    faults = [f"step={kill_at},worker=1,kind=kill"] if 0 < kill_at < steps else []
    with tempfile.TemporaryDirectory(dir=directory) as inside:
        cluster = LocalCluster(EXAMPLE.read_text(), Path(inside) / "run", overrides=overrides, faults=faults)
        return cluster.run(timeout_s=1200.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kill-at", type=int, default=20)
    parser.add_argument("--only", default=",".join(LAYOUTS))
    parser.add_argument("--shards", default=",".join(SHARDS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the job")
    options = parser.parse_args()
    print("| layout | shard | loss | digest | against the reference | killed: lost | stall s | from | digest | then |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        one = run(here, options.set, options.steps, (1, 1, 1), "none", 0)
        print(f"| 1 worker | none | {one.losses[-1]:.9f} | {short(one)} | reference | | | | | |", flush=True)
        split: Outcome | None = None
        for name in options.only.split(","):
            degrees = LAYOUTS[name]
            for shard in options.shards.split(","):
                calm = run(here, options.set, options.steps, degrees, shard, 0)
                if degrees[1] > 1 and split is None:
                    split = calm
                reference = one if degrees[1] == 1 or split is None else split
                hurt = run(here, options.set, options.steps, degrees, shard, options.kill_at)
                print(f"| {name} | {shard} | {row(calm, hurt, one, reference)} |", flush=True)


def row(calm: Outcome, hurt: Outcome, one: Outcome, reference: Outcome) -> str:
    """The cells from the loss on."""
    if reference is one:
        against = "equal" if calm.digest == one.digest else "DIFFERS"
    else:
        apart = max(abs(a - b) / abs(b) for a, b in zip(calm.losses, one.losses, strict=True))
        against = f"{'equal at its degree' if calm.digest == reference.digest else 'DIFFERS'}, loss within {apart:.1e}"
    kill = next(recovery for recovery in hurt.recoveries if recovery["kind"] == "kill")
    after = hurt.generations[1].layout
    same = "equal" if hurt.digest == calm.digest and hurt.samples == calm.samples else "DIFFERS"
    then = "·".join(f"{k}{v}" for k, v in (("dp", after.data), ("tp", after.tensor), ("pp", after.pipeline)) if v > 1)
    return (
        f"{calm.losses[-1]:.9f} | {short(calm)} | {against} | {hurt.steps_lost} | {kill['stall_seconds']:.2f} | "
        f"{kill['source']} | {same} | {then or 'one rank'}"
    )


def short(outcome: Outcome) -> str:
    assert outcome.digest is not None, outcome.reason
    return outcome.digest[:19]


if __name__ == "__main__":
    main()
