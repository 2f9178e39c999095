"""Fine-tuning beside what people use: SFT with packing beside TRL's SFTTrainer, what an evaluation costs beside its own
forward passes, what a checkpoint of LoRA has in it, and a classifier beside two baselines.

Both sides of SFT have the same model, records, length of rows, rows a step and workers, and run one after the other in
each round; speeds are in tokens that are not padding.

    python benchmarks/finetune.py [--rounds 3] [--steps 30] [--workers 4] [--only sft,evaluation,lora,classify]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WARM_UP_STEPS = 5
LENGTH, ROWS = 512, 16
MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": LENGTH, "vocab_size": 320,
    "tie_word_embeddings": False,
}  # fmt: skip


def job_of(home: Path, **sections: Any) -> Any:
    from orchestrator import Job

    base: dict[str, Any] = {
        "name": "finetune",
        "model": {"hf": MODEL},
        "objective": {"name": "sft"},
        "data": {"source": str(home / "records.jsonl"), "tokenizer": "bytes", "sequence_length": LENGTH,
                 "packing": "pack", "document_mask": True, "cache": str(home / "cache")},
        "train": {"steps": 20, "global_batch": ROWS, "micro_batch": 1, "optimizer": {"lr": 1e-3},
                  "schedule": {"name": "constant"}},
        "elastic": {"virtual_workers": 4, "workers": {"min": 1, "max": 1}, "standby": 0},
    }  # fmt: skip
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return Job.model_validate(base)


def prompts(home: Path) -> None:
    """Records of the examples, as prompts and completions."""
    from examples.records import answers

    lines = [json.dumps({"prompt": ask, "completion": answer}) + "\n" for ask, answer in answers()]
    (home / "records.jsonl").write_text("".join(lines), encoding="utf-8")


# -------------------------------------------------------------------------------------------- SFT


def ours(home: Path, workers: int, steps: int) -> float:
    """Tokens per second after the warm-up, from the times at which steps were committed."""
    from monitoring.records import read_records
    from orchestrator import run

    job = job_of(home, train={"steps": steps}, elastic={"workers": {"min": workers, "max": workers}})
    with tempfile.TemporaryDirectory() as run_home:
        directory = Path(run_home) / "run"
        result = run(job, directory)
        if result.status != "finished":
            raise SystemExit(f"our run {result.status}: {result.reason}")
        times = [record["committed_at"] for record in read_records(directory / "metrics.jsonl")]
        padding = json.loads((directory / "environment.json").read_text("utf-8"))["store"]["padding"]
    after = times[WARM_UP_STEPS - 1 :]
    return ROWS * LENGTH * (1 - padding) * (len(after) - 1) / (after[-1] - after[0])


def theirs(home: Path, model: Path, workers: int, steps: int) -> float:
    out = home / "theirs.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(workers),
        str(ROOT / "benchmarks" / "trl_sft.py"), str(model), str(home / "records.jsonl"), str(out), str(steps),
        str(LENGTH), "1", str(ROWS // workers),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"TRL's side failed:\n{done.stderr[-3000:]}")
    times = json.loads(out.read_text("utf-8"))[WARM_UP_STEPS - 1 :]
    return float((times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0]))


def saved_model(home: Path) -> Path:
    """The model as a directory, with its tokenizer, for the other side."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from orchestrator.checkpoint.export import write_tokenizer

    target = home / "model"
    config = AutoConfig.for_model(**MODEL)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    write_tokenizer("bytes", target)
    return target


def sft(home: Path, rounds: int, steps: int, workers: int) -> dict[str, Any]:
    model = saved_model(home)
    pairs = []
    for number in range(rounds):
        sides = [("ours", lambda: ours(home, workers, steps)), ("TRL", lambda: theirs(home, model, workers, steps))]
        found = {name: side() for name, side in (sides if number % 2 == 0 else reversed(sides))}
        pairs.append(found)
        print(f"  round {number + 1}: ours {found['ours']:,.0f}, TRL {found['TRL']:,.0f} tokens/s", flush=True)
    ratios = [pair["ours"] / pair["TRL"] for pair in pairs]
    return {"tokens_per_second": pairs, "ratio": summary(ratios)}


# -------------------------------------------------------------------------------------------- evaluation


def evaluation(home: Path, rounds: int) -> dict[str, Any]:
    """What an evaluation takes beside the forward passes and losses of the same micro-batches, on one rank."""
    import torch

    from orchestrator.evaluation.judge import NOT_YET
    from tests.ranks.tuned import engine_of
    from tests.unit.tiny_model import settle

    torch.set_num_threads(1)
    asked = {"share": 0.02, "every_steps": 1}
    job = job_of(home, evaluation=asked, train={"steps": 1000})
    engine, evaluator = engine_of(job, home / "storage")
    fabric = settle(engine.state, 4)
    engine.bind(fabric, fabric.layout, 0)
    from orchestrator.data.of_job import held_out_of, prepare_held_out

    samples = held_out_of(job, prepare_held_out(job))
    assert samples is not None
    part = engine.state.arrangement.part
    assert part is not None
    model = part.modules[0]
    objective = engine.spec.objective
    ratios = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        evaluator.evaluate(number + 1, 0, NOT_YET)
        whole = time.perf_counter() - started
        started = time.perf_counter()
        with torch.no_grad():
            for index in range(samples.num_micro_batches):
                (rows,) = engine.spec.micro_batches_of(samples.batch(index), torch.device("cpu"))
                objective.loss(model(rows.tokens[:, :-1], position_ids=rows.positions), rows)
        if number:  # The first one is not counted.
            ratios.append(whole / (time.perf_counter() - started))
    return {"ratio": summary(ratios), "samples": samples.num_samples}


# -------------------------------------------------------------------------------------------- LoRA


def lora(home: Path) -> dict[str, Any]:
    """Bytes of a checkpoint of a run with an adapter beside those of the adapter as it is exported."""
    from orchestrator import run
    from orchestrator.checkpoint import of_run
    from orchestrator.checkpoint.adapters import export_adapter
    from orchestrator.checkpoint.weights import weights_of
    from orchestrator.rundir import RunDirectory

    job = job_of(
        home, train={"steps": 2}, adapter={"name": "lora", "r": 8, "target_modules": "all-linear"},
        model={"hf": str(saved_model(home / "lora"))},
    )  # fmt: skip
    directory = home / "lora-run"
    run(job, directory)
    catalog = of_run.catalog_of(RunDirectory(directory), job, None)
    checkpoint = catalog.open(catalog.steps()[0])
    files = export_adapter(weights_of(checkpoint, job), job, home / "adapter")
    adapter = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    whole = sum(path.stat().st_size for path in (directory / "checkpoints").rglob("*") if path.is_file())
    return {"adapter": adapter, "checkpoint": whole, "with_two_moments": round(whole / (3 * adapter), 3)}


# -------------------------------------------------------------------------------------------- a classifier


def classify(home: Path) -> dict[str, Any]:
    """The example beside the most frequent class and bags of words, on the same held-out records."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    from examples.records import labelled
    from orchestrator import Job, run
    from orchestrator.data.encoding import Side, content_of

    records = labelled()
    source = home / "paragraphs.jsonl"
    lines = [json.dumps(record) for record in records]
    source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    job = Job.load(ROOT / "examples" / "classify.yaml", overrides=[f"data.source={source}", f"data.cache={home}/cache"])
    started = time.perf_counter()
    result = run(job, home / "classify-run")
    seconds = time.perf_counter() - started
    ended = json.loads((home / "classify-run" / "result.json").read_text("utf-8"))["evaluation"]
    assert job.evaluation is not None
    assert job.evaluation.share is not None
    side = Side(job.evaluation.share, True)
    held = [side.has(content_of(record)) for record in records]
    train = [record for record, out in zip(records, held, strict=True) if not out]
    test = [record for record, out in zip(records, held, strict=True) if out]
    vectors = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]")
    model = LogisticRegression(max_iter=1000).fit(
        vectors.fit_transform([each["text"] for each in train]), [each["label"] for each in train]
    )
    said = model.predict(vectors.transform([each["text"] for each in test]))
    truth = [each["label"] for each in test]
    frequent = statistics.mode(each["label"] for each in train)
    return {
        "records": len(records), "held_out": len(test), "status": result.status, "seconds": round(seconds, 1),
        "ours": {which: {name: round(ended[which][name], 4) for name in ("step", "accuracy", "f1_macro")}
                 for which in ended},
        "bag of words": {"accuracy": round(float(accuracy_score(truth, said)), 4),
                         "f1_macro": round(float(f1_score(truth, said, average="macro")), 4)},
        "most frequent class": {"accuracy": round(truth.count(frequent) / len(truth), 4)},
    }  # fmt: skip


def summary(values: list[float]) -> dict[str, float]:
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", default="sft,evaluation,lora,classify")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prompts(home)
        for name in options.only.split(","):
            print(f"{name}:", flush=True)
            match name:
                case "sft":
                    found[name] = sft(home, options.rounds, options.steps, options.workers)
                case "evaluation":
                    found[name] = evaluation(home, options.rounds)
                case "lora":
                    found[name] = lora(home)
                case "classify":
                    found[name] = classify(home)
                case other:
                    raise SystemExit(f"--only: there is no {other}")
            print(f"  {json.dumps({key: value for key, value in found[name].items() if key != 'tokens_per_second'})}",
                  flush=True)  # fmt: skip
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
