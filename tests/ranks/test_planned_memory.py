"""What the planner says of memory, beside the bytes that ranks really have for state after a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.job import Job
from orchestrator.models.costs import describe_model
from orchestrator.planning.memory import predict_memory
from orchestrator.planning.stages import stages_of
from orchestrator.planning.work import Degrees, work_of
from orchestrator.training import build
from strategies.comm.fabric import Fabric
from strategies.layout.parallel import SHARDS, ParallelLayout
from strategies.layout.placement import Domain
from strategies.layout.schedule import NO_PIPELINE, PipelineSchedule, chunks_of
from strategies.layout.statemap import whole
from strategies.model.fsdp import ShardedModelPart
from strategies.update.engine import StepEngine
from tests.ranks.laid_out import CPU, LENGTH, MICRO_BATCHES, VIRTUAL_WORKERS, Stretch, Trained, fetch, layout_of
from tests.ranks.laid_out import run_stretch as run_stretch_of
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks

MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "vocab_size": 96,
}  # fmt: skip
Case = tuple[ParallelLayout, int, str, str]
"""A layout, `state_copies`, `train.precision` and the optimizer's `state`."""


def job_of(layout: ParallelLayout, copies: int, precision: str, moments: str) -> Job:
    return Job.model_validate({
        "name": "memory", "model": {"hf": MODEL},
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": LENGTH},
        "train": {"steps": 4, "global_batch": VIRTUAL_WORKERS * MICRO_BATCHES, "precision": precision,
                  "optimizer": {"state": moments}},
        "elastic": {"virtual_workers": VIRTUAL_WORKERS, "state_copies": copies,
                    "workers": {"min": layout.num_placed, "max": layout.num_placed}},
        "strategy": {"tensor": layout.tensor, "pipeline": layout.pipeline, "shard": layout.shard,
                     "schedule": layout.schedule},
    })  # fmt: skip


def state_bytes(rank: int, address: Endpoint, cases: list[Case]) -> list[int]:
    """What this rank has of weights, of what is updated and kept with them, and of others' state, in each case; 0 where
    it is not a rank."""
    found = []
    for number, case in enumerate(cases):
        layout = case[0]
        if rank >= layout.world_size:
            found.append(0)
            continue
        job = job_of(*case)
        engine = StepEngine(build.build_state(job, int(MODEL["vocab_size"]), CPU), build.step_spec(job), fetch)
        nodes = [Domain("", str(each)) for each in range(layout.world_size)]
        fabric = Fabric(rank=rank, layout=layout, device=CPU)
        try:
            fabric.form(store_address=address, prefix=f"memory{number}", host=HOST, timeout_s=PATIENCE_S)
            held = [whole(engine.state.space.size, layout.tensor)] * layout.world_size
            run_stretch_of(engine, fabric, Stretch(layout, 1), held, nodes, case[1], 0, Trained())
        finally:
            fabric.drop()
        found.append(_held_by(engine))
    return found


def _held_by(engine: StepEngine) -> int:
    arrangement = engine.state.arrangement
    tensors = [buffer.values for shard in arrangement.state_shards for buffer in shard.kinds().values()]
    part: Any = arrangement.part
    if isinstance(part, ShardedModelPart):
        tensors += [parameter.sharded_param._local_tensor for _, parameter, _, _ in part.rows()]
    else:
        tensors.append(part.weights)
    storages: dict[int, torch.UntypedStorage] = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors
    }
    return sum(storage.nbytes() for storage in storages.values())


def predicted(case: Case) -> float:
    layout = case[0]
    job = job_of(*case)
    costs = describe_model(job)
    chunks = chunks_of(layout.schedule) if layout.pipeline > 1 else 1
    kind = layout.schedule if layout.pipeline > 1 else NO_PIPELINE
    degrees = Degrees(layout.data, layout.tensor, PipelineSchedule(kind, layout.pipeline, chunks), layout.shard)
    parts = [range(start, stop) for start, stop in layout.parts] or [range(len(costs.blocks))]
    memory = predict_memory(work_of(job, costs), stages_of(costs, degrees.schedule, layout.tensor, parts), degrees)
    return memory.weights + memory.optimizer + memory.copies


@pytest.mark.parametrize("shard", SHARDS)
def test_state_takes_the_memory_that_the_planner_says(shard: str) -> None:
    """With one, two and three copies; one replica, two, and three, by which no matrix divides; stages and
    tensor-parallel groups; bf16 copies of weights, and moments in bf16."""
    plain, small = ("fp32", "fp32"), ("bf16", "bf16")
    cases: list[Case] = [(layout_of(data, shard=shard), copies, *plain) for data in (1, 2, 3) for copies in (1, 2, 3)]
    cases += [(layout_of(2, 2, shard=shard), 2, *plain), (layout_of(2, 1, 2, shard), 2, *plain)]
    cases += [(layout_of(data, shard=shard), 2, *small) for data in (1, 2)]
    by_rank = run_ranks(4, state_bytes, cases, timeout_s=240.0)
    for case, *measured in zip(cases, *by_rank, strict=True):
        layout = case[0]
        if layout.effective_shard == "parameters" and layout.data == 3:
            # The last rank computes with copies of its rows, padded to as many as others have (docs/planning.md).
            *measured, last = measured[:3]
            assert predicted(case) < last < predicted(case) + predicted((layout, 1, *plain)) / 3 * 1.05
        # Parameters begin at multiples of 16 elements.
        assert predicted(case) == pytest.approx(max(measured), rel=0.04), (layout.describe(), case[1:])
