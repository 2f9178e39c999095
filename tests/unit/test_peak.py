"""What devices can do at the most, by their names."""

from __future__ import annotations

import pytest
import torch

from orchestrator.job import Job
from orchestrator.training.build import choose_device
from orchestrator.training.peak import known_flops, lacks_bf16

NAMES = {
    "NVIDIA H200": 989.0, "NVIDIA H20": 148.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0, "NVIDIA GH200 480GB": 989.0, "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A10": 125.0, "NVIDIA A10G": 70.0, "NVIDIA A30": 165.0, "NVIDIA L4": 121.0, "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0, "NVIDIA B200": 2250.0, "NVIDIA GB200": 2500.0, "NVIDIA B300 SXM6 AC": 2250.0,
    "NVIDIA GeForce RTX 4090": 165.0, "NVIDIA RTX 6000 Ada Generation": 364.0, "NVIDIA RTX A6000": 155.0,
    "AMD Instinct MI300X": 1307.0, "Tesla T4": 0.0, "Tesla V100-SXM2-16GB": 0.0, "NVIDIA Z9000": 0.0,
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb": 312.0 * 3 / 7, "NVIDIA A30 MIG 2g.12gb": 82.5,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_device_is_known_by_the_model_in_its_name(name: str) -> None:
    assert known_flops(name, is_bf16=True) == pytest.approx(NAMES[name] * 1e12)


def test_cards_without_bf16_are_known_and_others_are_given_the_benefit_of_the_doubt() -> None:
    assert [lacks_bf16(name) for name in ("Tesla T4", "Tesla V100-SXM2-16GB", "NVIDIA L4", "NVIDIA Z9000")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert known_flops("Tesla T4", is_bf16=False) == 8.1e12


def test_a_job_in_bf16_is_refused_on_a_card_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    data = "{source: python-stdlib, sequence_length: 16}"
    text = f"{{name: a, model: {{hf: {{model_type: llama}}}}, data: {data}, train: {{steps: 1}}}}"
    job = Job.loads(text, overrides=["resources.gpu=1", "train.precision=bf16", "train.global_batch=8"])
    with pytest.raises(ValueError, match="a Tesla V100-SXM2-16GB has no arithmetic in bf16: set it to fp32"):
        choose_device(job)
    assert choose_device(Job.loads(text, overrides=["resources.gpu=1", "train.global_batch=8"])).type == "cuda"
