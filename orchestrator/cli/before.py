"""Commands for the time before a run: is the job sound, which layouts suit it, is the machine fit?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import AsJson, JobFile, Overrides, refuse
from orchestrator.cli.outcome import EXIT_FAILED


def validate(
    job: JobFile,
    set_: Overrides = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Leave out the first records of the data.")] = False,
    show: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also the first N sequences; what is learnt of them in [[ ]].")
    ] = 0,
    json_: AsJson = False,
) -> None:
    """Check a job file, its model (without weights) and first records; show it with all defaults; starts nothing."""
    from orchestrator.cli.validate import validate as check

    check(job, set_ or [], with_data=not no_data or show > 0, show=show, as_json=json_)


def plan(
    job: JobFile,
    workers: Annotated[
        str | None, typer.Option(metavar="N|N..M|N,M", help="How many workers; elastic.workers.max if not given.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(metavar="H100", help="A100, H100, H200, B200 or L40S.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="A run's directory: plan for its machine.")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(metavar="80GiB", help="Memory of a worker's GPU.")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="Its peak TFLOP/s in the job's precision.")] = None,
    efficiency: Annotated[float | None, typer.Option(help="The fraction of the peak that is reached.")] = None,
    bandwidth: Annotated[str | None, typer.Option(metavar="300GB/s", help="Of a worker inside its node.")] = None,
    node_bandwidth: Annotated[str | None, typer.Option(metavar="25GB/s", help="Of a worker between nodes.")] = None,
    latency: Annotated[str | None, typer.Option(metavar="5us", help="Of a message inside a node.")] = None,
    node_latency: Annotated[str | None, typer.Option(metavar="15us", help="Of a message between nodes.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Workers on a node.")] = None,
    tensor: Annotated[str | None, typer.Option(metavar="1,2,..", help="Degrees to allow; else the job's.")] = None,
    pipeline: Annotated[str | None, typer.Option(metavar="1,2,..", help="Degrees to allow; else all.")] = None,
    shard: Annotated[str | None, typer.Option(help="Shards to allow; else the job's, or all if it says none.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Pipeline schedules to allow; else all.")] = None,
    set_: Overrides = None,
    json_: AsJson = False,
    all_: Annotated[bool, typer.Option("--all", help="Every layout and every reason.")] = False,
) -> None:
    """Predict which layouts suit a job and a number of workers, and why others do not; starts nothing."""
    from orchestrator.cli.validate import pointing_into
    from orchestrator.planning import command
    from orchestrator.planning.assume import HardwareOptions

    hardware = HardwareOptions(
        gpu_memory, gpu_tflops, efficiency, bandwidth, node_bandwidth, latency, node_latency, ranks_per_node, gpu
    )
    limits = command.LimitOptions(tensor, pipeline, shard, schedule)
    with pointing_into(job, set_ or []):
        command.plan(job, workers, hardware, limits, set_ or [], as_json_=json_, everything=all_, run=from_)


def doctor(
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|auto", help="Of the cluster; else RAY_ADDRESS; else this machine.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="DIR|URL", help="Also try out a storage, as for checkpoint.storage.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Move less data over the network and to the storage.")] = False,
    json_: AsJson = False,
) -> None:
    """Is this machine, or every node of a cluster, fit to train on? Exit code 1 with a problem; starts no Ray."""
    from orchestrator.cli.doctor import doctor as examine

    try:
        fit = examine(address, storage, as_json_=json_, quick=quick)
    except ValueError as error:
        refuse(str(error))
    raise typer.Exit(0 if fit else EXIT_FAILED)
