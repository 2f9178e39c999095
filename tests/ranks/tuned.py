"""Jobs of fine-tuning on forked gloo ranks: real records, real models, the step engine in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.data.of_job import dataset_of, held_out_of, open_stores, prepare_held_out, prepare_stores
from orchestrator.evaluation.judge import NOT_YET
from orchestrator.job import Job
from orchestrator.job.parts import update_rule_of
from orchestrator.storage import open_storage
from orchestrator.training import build
from orchestrator.training.evaluator import Evaluator
from orchestrator.training.teaching import Teaching
from strategies.comm.fabric import Fabric
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain
from strategies.layout.statemap import whole
from strategies.update.engine import StepEngine
from tests.ranks.laid_out import CPU, Trained, as_numbers, barrier, layout_of
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint
from tests.records_in_tests import CHATML, chats, completions, labelled, liked, preferences, scored, together, write

VIRTUAL_WORKERS = 4
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
OBJECTIVES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "sft": (chats, {"name": "sft"}, {"chat_template": CHATML, "packing": "pack", "sequence_length": 64}),
    "sft-completions": (completions, {"name": "sft", "label_smoothing": 0.1, "z_loss": 1e-3}, {}),
    "classification": (labelled, {"name": "classification", "labels": 2, "class_weights": [1.0, 2.0]}, {}),
    "regression": (scored, {"name": "regression"}, {}),
    "reward": (preferences, {"name": "reward", "center": 0.01}, {}),
    "orpo": (preferences, {"name": "orpo"}, {}),
    "dpo": (preferences, {"name": "dpo", "beta": 0.5}, {}),
    "kto": (liked, {"name": "kto", "beta": 0.5}, {}),
    "embedding": (together, {"name": "embedding", "pooling": "mean"}, {}),
}
"""By a name: what makes their records, `objective`, and what `data` has beside."""


def job_of(name: str, directory: Path, layout: ParallelLayout | None = None, **sections: Any) -> Job:
    """A job of that objective, its records in `directory`; padded to one length, so that it may be a pipeline."""
    make, objective, data = OBJECTIVES[name]
    path = directory / f"{name}.jsonl"
    if not path.exists():
        write(path, make())
    layout = layout_of(virtual_workers=VIRTUAL_WORKERS) if layout is None else layout
    base: dict[str, Any] = {
        "name": "tuned",
        "model": {"hf": LLAMA},
        "objective": objective,
        "data": {"source": str(path), "tokenizer": "bytes", "sequence_length": 48, "packing": "pad",
                 "pad_to": "sequence_length", "cache": str(directory / "cache"), **data},
        "train": {"steps": 8, "global_batch": 8, "seed": 3, "optimizer": {"lr": 1e-2},
                  "schedule": {"name": "constant"}},
        "elastic": {"virtual_workers": VIRTUAL_WORKERS,
                    "workers": {"min": layout.num_placed, "max": layout.num_placed}},
        "strategy": {"tensor": layout.tensor, "pipeline": layout.pipeline, "shard": layout.shard,
                     "schedule": layout.schedule},
    }  # fmt: skip
    if name == "embedding":
        base["train"]["micro_batch"] = 2
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    if base["data"]["packing"] == "pack":
        del base["data"]["pad_to"]
    return Job.model_validate(base)


def engine_of(job: Job, storage: Path) -> tuple[StepEngine, Evaluator]:
    """A worker's."""
    stores = [(store.directory, store.digest, ()) for store in prepare_stores(job, verify=False)]
    held = [(store.directory, store.digest, ()) for store in prepare_held_out(job, verify=False)]
    dataset = dataset_of(job, open_stores(job, stores))
    held_out = held_out_of(job, open_stores(job, held, is_held_out=True))
    state = build.build_state(job, dataset.vocab_size, CPU)
    teaching = Teaching.of(job, CPU)
    fetch = dataset.batch if teaching is None else teaching.joined_to(dataset.batch)
    engine = StepEngine(state, build.step_spec(job), fetch, rule=update_rule_of(job))
    catalog = Catalog(open_storage(str(storage)), "test")
    return engine, Evaluator(job, dataset, held_out, engine, catalog)


def tune(
    rank: int, address: Endpoint, jobs: Sequence[tuple[Job, ParallelLayout]], directory: Path, steps: int = 2
) -> list[Any]:  # fmt: skip
    """Some steps of each job in its layout, from the start: losses, norms, digest, and what evaluations gave."""
    found: list[Any] = []
    for number, (job, layout) in enumerate(jobs):
        if rank >= layout.world_size:
            found.append(None)
            continue
        engine, evaluator = engine_of(job, directory / f"storage{number}")
        fabric = Fabric(rank=rank, layout=layout, device=CPU)
        seen, metrics = Trained(), []
        try:
            fabric.form(store_address=address, prefix=f"tuned{number}", host=HOST, timeout_s=PATIENCE_S)
            held = [whole(engine.state.space.size, layout.tensor)] * layout.world_size
            nodes = [Domain("", str(each)) for each in range(layout.world_size)]
            engine.state.adopt_layout(layout, fabric, held, nodes, 2, 0, lambda fabric=fabric: barrier(fabric))
            engine.bind(fabric, layout, 0)
            evaluator.prepare(fabric, 0)
            for step in range(steps):
                metrics += _evaluated(evaluator, step)
                (record,), _ = engine.run(step)
                seen.losses.append(record.loss)
                seen.norms.append(record.grad_norm)
            metrics += _evaluated(evaluator, steps)
            finish(engine, fabric, layout, seen)
        finally:
            fabric.drop()
        found.append((*as_numbers(seen), metrics))
    return found


def _evaluated(evaluator: Evaluator, step: int) -> list[dict[str, Any]]:
    report = evaluator.evaluate(step, 0, NOT_YET)
    return [] if report is None else [report.metrics]


def finish(engine: StepEngine, fabric: Fabric, layout: ParallelLayout, seen: Trained) -> None:
    """Collects the state on the first rank, for its digest."""
    from strategies.layout.placement import trained_spans
    from strategies.state.training_state import state_digest

    engine.state.collect(trained_spans(layout, engine.state.arrangement.shards), fabric)
    if fabric.rank == 0:
        seen.digest = state_digest(engine.state)
    barrier(fabric)
