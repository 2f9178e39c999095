"""What a worker needs of a node, and whether a node has it."""

from __future__ import annotations

import pytest

from orchestrator.job import Job
from orchestrator.runtime.ray.resource_request import Need, meets

JOB = """
name: test
model: {hf: {model_type: llama}}
data: {source: python-stdlib, sequence_length: 64}
train: {steps: 10, global_batch: 8}
"""


@pytest.mark.parametrize(
    ("label", "condition", "expected"),
    [
        ("spot", "spot", True),
        ("spot", "on-demand", False),
        ("spot", "!spot", False),
        ("on-demand", "!spot", True),
        (None, "spot", False),
        (None, "!spot", True),
        ("a", "in(a,b)", True),
        ("b", "in(a, b)", True),
        ("c", "in(a,b)", False),
        ("a", "!in(a,b)", False),
        ("c", "!in(a,b)", True),
        ("in", "in", True),
    ],
)
def test_a_label_meets_a_condition(label: str | None, condition: str, expected: bool) -> None:
    assert meets(label, condition) is expected


def test_a_need_is_what_the_job_says() -> None:
    job = Job.loads(JOB, overrides=["resources={cpu: 2, gpu: 1, accelerator: A100, labels: {disk: '!hdd'}}",
                                    "strategy.tensor=2", "elastic.workers={min: 2, max: 8}"])  # fmt: skip
    need = Need.of(job, "spot")
    assert need.bundle == {"CPU": 2.0, "GPU": 1.0}
    assert need.tensor == 2
    assert need.labels == {
        "disk": "!hdd", "ray.io/accelerator-type": "in(A100)", "ray.io/market-type": "spot",
    }  # fmt: skip
    good = {"ray.io/accelerator-type": "A100", "ray.io/market-type": "spot"}
    assert need.fits({"CPU": 4.0, "GPU": 2.0}, good)
    assert not need.fits({"CPU": 4.0, "GPU": 1.0}, good), "a tensor-parallel group shares a node"
    assert not need.fits({"CPU": 4.0, "GPU": 2.0}, good | {"disk": "hdd"})
    assert not need.fits({"CPU": 4.0, "GPU": 2.0}, {"ray.io/accelerator-type": "A100"})
    assert str(need) == ("{4 CPU, 2 GPU, disk: !hdd, ray.io/accelerator-type: in(A100), ray.io/market-type: spot}")
    assert Need.of(Job.loads(JOB)) == Need({"CPU": 1.0}, 1, {})
