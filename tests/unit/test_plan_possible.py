"""What `plan` recommends `validate` accepts, for any job: both ask one function."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.job import Job
from orchestrator.job.problems import JobError
from orchestrator.models.costs import describe_model
from orchestrator.models.problems import ModelError
from orchestrator.models.validation import check_model, model_without_weights
from orchestrator.planning.assume import HardwareOptions, hardware_for
from orchestrator.planning.possible import possible
from orchestrator.planning.refusals import refusals
from orchestrator.planning.search import Limits, Planner
from orchestrator.planning.work import work_of
from strategies.layout.parallel import SHARDS
from strategies.layout.schedule import NO_PIPELINE, SCHEDULES, PipelineSchedule

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
    "tied llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4},
    "opt": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
    "gpt_oss": {
        "model_type": "gpt_oss", **SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
    "albert's kind": {"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}  # fmt: skip
jobs = st.fixed_dictionaries({
    "model": st.sampled_from(sorted(MODELS)),
    "virtual_workers": st.sampled_from([1, 2, 3, 8]),
    "micro_batches": st.integers(1, 5),
    "compile": st.booleans(),
    "packing": st.sampled_from(["stream", "pack", "pad"]),
    "reduction": st.sampled_from(["canonical", "native"]),
    "recompute": st.sampled_from(["none", "full", {"every": 2}]),
})  # fmt: skip


def job_of(drawn: dict[str, Any], **layout: Any) -> Job:
    virtual_workers = drawn["virtual_workers"]
    return Job.model_validate({
        "name": "any", "model": {"hf": MODELS[drawn["model"]] | {"vocab_size": 260}},
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": 16, "packing": drawn["packing"]},
        "train": {"steps": 1, "global_batch": virtual_workers * drawn["micro_batches"], "compile": drawn["compile"],
                  "recompute": drawn["recompute"]},
        "elastic": {"virtual_workers": virtual_workers,
                    "workers": {"min": 1, "max": layout.pop("workers", 1)} | layout.pop("bounds", {})},
        "strategy": {"reduction": drawn["reduction"], **layout},
    })  # fmt: skip


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(jobs, st.integers(1, 12), st.sampled_from([(1,), (1, 2), (2,)]))
def test_whatever_is_recommended_can_be_had(drawn: dict[str, Any], workers: int, tensor: tuple[int, ...]) -> None:
    try:
        job = job_of(drawn)
    except JobError:
        return  # No job, whatever its layout.
    hardware, _ = hardware_for(job, HardwareOptions())
    model = model_without_weights(job)
    planner = Planner(work_of(job, describe_model(job)), hardware, Limits(tensor), possible(job, model))
    for plan in planner.best(workers, None):
        degrees = plan.degrees
        ranks, group = degrees.ranks, degrees.tensor
        schedule = {} if degrees.schedule.kind == NO_PIPELINE else {"schedule": degrees.schedule.kind}
        asked = job_of(
            drawn, tensor=degrees.tensor, pipeline=degrees.pipeline, shard=degrees.shard, workers=ranks,
            bounds={"min": group, "max": ranks}, **schedule,
        )  # fmt: skip
        check_model(asked)


def why_not(drawn: dict[str, Any], **layout: Any) -> str | None:
    """What `validate` says of a layout."""
    try:
        check_model(job_of(drawn, **layout))
    except (JobError, ModelError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", MODELS)
def test_what_a_job_cannot_have_is_not_recommended_and_said(name: str) -> None:
    drawn = {"model": name, "virtual_workers": 8, "micro_batches": 2, "compile": False, "packing": "stream",
             "reduction": "canonical", "recompute": "none"}  # fmt: skip
    job = job_of(drawn)
    model = model_without_weights(job)
    refuse = possible(job, model)
    hardware, _ = hardware_for(job, HardwareOptions())
    planner = Planner(work_of(job, describe_model(job)), hardware, Limits((1, 2)), refuse)
    said = " ".join(refusal.reason for refusal in refusals(planner, 8))
    refused = 0
    for tensor in (1, 2):
        for shard in SHARDS:
            for kind in (NO_PIPELINE, *SCHEDULES):
                schedule = PipelineSchedule(kind, 1 if kind == NO_PIPELINE else 2, 2 if kind[0] in "iz" else 1)
                reason = refuse(tensor, schedule, shard)
                layout = {} if kind == NO_PIPELINE else {"schedule": kind, "pipeline": 2}
                found = why_not(drawn, tensor=tensor, shard=shard, workers=8, bounds={"min": 2}, **layout)
                assert (found is None) == (reason is None), (tensor, schedule, shard, found, reason)
                if reason is not None:
                    refused += 1
                    # What has too few layers is counted by the planner itself.
                    assert reason in said or tensor == 2 or "layers" in reason
    assert refused or name in ("llama", "mixtral", "tied llama")
