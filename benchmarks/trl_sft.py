"""SFT with packing by TRL's SFTTrainer on DistributedDataParallel, as its users launch it; see finetune.py.

torchrun --nproc_per_node 4 benchmarks/trl_sft.py MODEL RECORDS OUT STEPS LENGTH BATCH ACCUMULATION
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    model_dir, records, out, steps, length, batch, accumulation = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[tuple[float, float]] = []

    class Timed(TrainerCallback):
        """When steps ended, and how many tokens had been trained on until then."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
            if logs and "num_tokens" in logs:
                times.append((time.time(), float(logs["num_tokens"])))

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=load_dataset("json", data_files=records, split="train", cache_dir=f"{out}.cache"),
        args=SFTConfig(
            output_dir=f"{out}.d", max_steps=int(steps), per_device_train_batch_size=int(batch),
            gradient_accumulation_steps=int(accumulation), max_length=int(length), packing=True, logging_steps=1,
            completion_only_loss=True, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            save_strategy="no", disable_tqdm=True, learning_rate=1e-3, ddp_backend="gloo",
        ),
        callbacks=[Timed()],
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        Path(out).write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    main()
