"""One step of fine-tuning beside TRL's trainers and transformers' Trainer: the same records, losses and gradients; and
losses beside TRL's own functions on the same tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.job import Job
from strategies.objective.distill import divergence
from tests.ranks.tuned import engine_of
from tests.records_in_tests import completions, labelled, preferences, write
from tests.unit.test_adapters import base_in
from tests.unit.tiny_model import settle

COUNT = 8
"""Records of the step."""


def job_of(base: Path, records: list[dict[str, Any]], objective: dict[str, Any], directory: Path) -> Job:
    """A job whose only step takes all of them, by plain gradient descent."""
    source = write(directory / "records.jsonl", records)
    return Job.model_validate({
        "name": "beside",
        "model": {"hf": str(base)},
        "objective": objective,
        "data": {"source": str(source), "tokenizer": str(base), "sequence_length": 64, "packing": "pad",
                 "cache": str(directory / "cache")},
        "train": {"steps": 1, "global_batch": COUNT, "clip_norm": None, "schedule": {"name": "constant"},
                  "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}},
        "elastic": {"virtual_workers": 4, "workers": {"max": 1}},
    })  # fmt: skip


def weights_of(state: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): t.clone() for name, t in state.named() if name.startswith("model.")}


def our_step(job: Job, directory: Path) -> tuple[dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """Weights before the step, its loss, and its gradients, which is what they change by."""
    engine, evaluator = engine_of(job, directory / "storage")
    fabric = settle(engine.state, 4)
    engine.bind(fabric, fabric.layout, 0)
    evaluator.prepare(fabric, 0)
    before = weights_of(engine.state)
    (record,), _ = engine.run(0)
    after = weights_of(engine.state)
    return before, record.loss, {name: before[name] - after[name] for name in before}


def their_step(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a trainer's first step, and its gradients."""
    from transformers import TrainerCallback

    gradients: dict[str, torch.Tensor] = {}

    class Kept(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in more["model"].named_parameters()})

    trainer.add_callback(Kept())
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients


def settings(directory: Path, micro_batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "theirs"), "max_steps": 1, "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": COUNT // micro_batch, "max_grad_norm": 0.0, "logging_steps": 1,
        "report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 1e-3,
    }  # fmt: skip


def assert_alike(
    ours: tuple[Any, float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert ours[1] == pytest.approx(theirs[0], abs=1e-4), "which they round to four digits"
    assert ours[2].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[2][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n} {text}"
        )
    assert max(float(gradient.abs().max()) for gradient in theirs[1].values()) > 1e-3


@pytest.mark.nightly
def test_a_step_of_sft_is_trls(tmp_path: Path) -> None:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, records = base_in(tmp_path), completions(COUNT)
    ours = our_step(job_of(base, records, {"name": "sft"}, tmp_path), tmp_path)
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base), processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(records),
        args=trl.SFTConfig(**settings(tmp_path, 2), completion_only_loss=True, max_length=64),
    )  # fmt: skip
    assert_alike(ours, their_step(trainer))


@pytest.mark.nightly
@pytest.mark.parametrize("loss", [{"loss": "sigmoid"}, {"loss": "ipo"}, {"loss": "robust", "label_smoothing": 0.2}])
def test_a_step_of_dpo_is_trls(tmp_path: Path, loss: dict[str, Any]) -> None:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, records = base_in(tmp_path), preferences(COUNT)
    ours = our_step(job_of(base, records, {"name": "dpo", "beta": 0.3, **loss}, tmp_path), tmp_path)
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base), processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(records),
        args=trl.DPOConfig(
            **settings(tmp_path, COUNT), beta=0.3, max_length=64, loss_type=[loss["loss"]],
            label_smoothing=loss.get("label_smoothing", 0.0),
        ),
    )  # fmt: skip
    assert_alike(ours, their_step(trainer))


@pytest.mark.nightly
def test_a_step_of_classification_is_trainers(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    base, records = base_in(tmp_path), labelled(COUNT)
    job = job_of(base, records, {"name": "classification", "labels": 2}, tmp_path)
    before, loss, found = our_step(job, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=300)
    model.load_state_dict(before)

    def collate(given: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [tokenizer(each["text"])["input_ids"] for each in given]
        width = max(map(len, ids))
        padded = torch.tensor([each + [300] * (width - len(each)) for each in ids])
        labels = torch.tensor([each["label"] for each in given])
        return {"input_ids": padded, "attention_mask": (padded != 300).long(), "labels": labels}

    trainer = Trainer(
        model=model, args=TrainingArguments(**settings(tmp_path, COUNT), remove_unused_columns=False),
        train_dataset=records, data_collator=collate,  # type: ignore[arg-type]
    )  # fmt: skip
    assert_alike((before, loss, found), their_step(trainer))


# ---------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_are_those_of_gkd(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 11, generator=generator) for _ in range(2))
    labels = torch.where(torch.rand(3, 5, generator=generator) < 0.6, 1, -100)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, 2.0)
    ours = divergence((student / 2).log_softmax(-1).flatten(0, 1), (teacher / 2).log_softmax(-1).flatten(0, 1), beta)
    counts = labels.flatten() != -100
    torch.testing.assert_close(ours[counts].sum() / counts.sum(), theirs, rtol=1e-6, atol=1e-6)


def test_the_odds_ratio_is_that_of_orpo() -> None:
    from trl.experimental.orpo import ORPOTrainer

    from strategies.objective.preference import Orpo, OrpoSettings

    chosen, rejected = -torch.rand(6) * 3 - 0.01, -torch.rand(6) * 3 - 0.01
    as_trainer: Any = SimpleNamespace(beta=0.2, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(as_trainer, chosen, rejected)
    ours = Orpo(OrpoSettings(0.2)).pair_losses(chosen, rejected)
    torch.testing.assert_close(ours, -theirs, rtol=1e-6, atol=1e-6)
